"""How many layers each stage of a Hugging Face decoder gets: as many, as much memory, or as much time as the others.

The embedding always lies on the first stage, the final norm and the head on the last, so they are counted there: with
a vocabulary of 150,000 words the head weighs and takes as much as several layers.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from .decoder_plan import DecoderPlan

BALANCES = ("layers", "memory", "time")

PROBE_TOKENS = 128
"""Length of the prompt by which time is measured."""
_WARMUP_ROUNDS, _MEASURED_ROUNDS = 2, 5


def balanced_layer_counts(layer_count: int, stages: int) -> tuple[int, ...]:
    """Layers per stage, as even as possible: ``balanced_layer_counts(10, 4) == (2, 3, 2, 3)``."""
    if not 1 <= stages <= layer_count:
        raise ValueError(
            f"cannot cut {layer_count} layers into {stages} stages: the number of stages must be 1 to {layer_count}."
        )
    return tuple(layer_count * (stage + 1) // stages - layer_count * stage // stages for stage in range(stages))


def layer_counts_by(balance: str, model: PreTrainedModel, plan: DecoderPlan, stages: int) -> tuple[int, ...]:
    """Layers per stage of ``model``, so that the stages are alike in what ``balance`` names.

    ``"layers"``: their number. ``"memory"``: bytes of weights; what is tied counts on each stage that holds it. Caches
    are not counted (each layer's is as large), so a model on the meta device will do. ``"time"``: the time of a prompt
    of `PROBE_TOKENS` tokens, run eagerly where the model lies: a median, so two runs, and two ranks, may answer
    differently; measure once and pass the counts on.

    Raises `ValueError` for another name, more stages than layers, and time asked of a model on the meta device.
    """
    even = balanced_layer_counts(plan.layer_count, stages)
    if balance == "layers":
        return even
    if balance == "memory":
        return cut_evenly(_bytes_of_layers(model, plan), stages)
    if balance == "time":
        return cut_evenly(_seconds_of_layers(model, plan), stages)
    raise ValueError(f"balance={balance!r}: one of {', '.join(BALANCES)} is expected.")


def cut_evenly(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """Sizes of ``stages`` runs of consecutive ``costs``, none empty: the dearest as cheap as can be.

    Among cuts alike in that, the one whose other runs are most even (the least sum of squares). Costs are at least 0.
    """
    sums = [0, *itertools.accumulate(costs)]
    # A rounding error of the sums is no difference.
    limit = _best_cut(sums, stages, max, float("inf"))[0] * (1 + 1e-9)
    ends = _best_cut(sums, stages, lambda best, own: best + own * own, limit)[1]
    return tuple(end - begin for begin, end in itertools.pairwise((0, *ends)))


def _best_cut(
    sums: Sequence[float], stages: int, combine: Callable[[float, float], float], limit: float
) -> tuple[float, tuple[int, ...]]:
    """The least combined cost of runs that cost at most ``limit`` each, and where they end; by dynamic programming."""
    last = len(sums) - 1
    # For each end of the runs so far: their combined cost, and the ends of all.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(stages):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for begin, (cost, ends) in best.items():
            for end in range(begin + 1, last - (stages - stage - 1) + 1):
                own = sums[end] - sums[begin]
                candidate = (combine(cost, own), (*ends, end))
                if own <= limit and (end not in longer or candidate[0] < longer[end][0]):
                    longer[end] = candidate
        best = longer
    return best[last]


def _bytes_of_layers(model: PreTrainedModel, plan: DecoderPlan) -> list[float]:
    base: nn.Module = model.base_model
    layers: Any = getattr(base, plan.layers)
    result = [float(_bytes_of([layer])) for layer in layers]
    result[0] += _bytes_of(getattr(base, child) for child in plan.before_layers)
    head = [child for child in model.children() if child is not base]
    result[-1] += _bytes_of([*(getattr(base, child) for child in plan.after_layers), *head])
    return result


def _bytes_of(modules: Iterable[nn.Module]) -> int:
    tensors = {id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def _seconds_of_layers(model: PreTrainedModel, plan: DecoderPlan) -> list[float]:
    """Median time of each layer; with the first, what comes before it, and with the last, what comes after."""
    import torch

    layers: Any = getattr(model.base_model, plan.layers)
    device = next(model.parameters()).device
    if device.type == "meta":
        raise ValueError("balance='time' measures the model, and this one is on the meta device, which has no times.")
    tokens = torch.arange(PROBE_TOKENS, device=device)[None] % model.config.vocab_size
    rounds: list[list[float]] = []
    moments: list[Any] = []
    # A layer ends where the next begins.
    hooks = [layer.register_forward_pre_hook(lambda *_: moments.append(_now(device))) for layer in layers[1:]]
    was_training = model.training
    try:
        model.eval()
        for _ in range(_WARMUP_ROUNDS + _MEASURED_ROUNDS):
            moments.clear()
            begin = _now(device)
            with torch.no_grad():
                model(input_ids=tokens, use_cache=False)
            end = _now(device)
            if device.type == "cuda":
                end.synchronize()
            rounds.append([_seconds(*pair) for pair in itertools.pairwise([begin, *moments, end])])
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return [statistics.median(of_layer) for of_layer in zip(*rounds[_WARMUP_ROUNDS:], strict=True)]


def _now(device: torch.device) -> Any:
    """A moment on the device: an event on its stream where it has one, else of the host's clock."""
    if device.type != "cuda":
        return time.perf_counter()
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(begin: Any, end: Any) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000

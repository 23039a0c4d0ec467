"""Names the stage, and in it the piece, that computes something else than eager; in one process, without a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ...backend import backend
from ...runtime.program import Program
from ..decoder_stages import cut_decoder
from ..slots import DecoderRows
from .compare import ROUNDING_FACTOR, error
from .job import CheckJob


class _Stage(NamedTuple):
    number: int
    rows: DecoderRows
    wide: DecoderRows
    tokens: dict[str, torch.Tensor]
    """Input of the first stage, which all have."""
    hidden_states: torch.Tensor | None
    """Of the later ones, as eager hands them over."""

    @property
    def name(self) -> str:
        layers = self.rows.stage.layers
        return f"rank {self.number} (layers {layers.start}-{layers.stop - 1})"

    def call(self, rows: Callable[..., Any], cache: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The only result of the stage, or of what was compiled from it."""
        proxies = {} if self.hidden_states is None else {"hidden_states": self.hidden_states.to(dtype).clone()}
        own = self.tokens if self.hidden_states is None else {}
        places = cache.places(0, 0, len(self.tokens["input_ids"]))
        return next(iter(rows(**own, **proxies, places=places, past_key_values=cache).values()))


@torch.no_grad()
def find(model: Any, wide: Any, job: CheckJob, prompt: Sequence[int]) -> list[str]:
    """Sentences that say where a pipeline leaves the way of eager on ``prompt``; empty where it is not found here.

    Args:
        model: the whole decoder, in the dtype of the job.
        wide: the same in a wider dtype.
    """
    sentences = []
    layers_before = 0
    borders = model(torch.tensor([prompt]), use_cache=False, output_hidden_states=True).hidden_states
    for stage in _stages(model, wide, job, prompt):
        eager = stage.call(stage.rows, stage.rows.new_cache(1, job.max_cache_tokens), model.dtype)
        right = stage.call(stage.wide, stage.wide.new_cache(1, job.max_cache_tokens), wide.dtype)
        layers_before += len(stage.rows.stage.layers)
        allowed = ROUNDING_FACTOR * error(eager, right)
        if not stage.rows.stage.is_last and error(borders[layers_before][0], eager) > allowed:
            sentences.append(
                f"{stage.name} computes something else than these layers of the whole decoder, in eager too: what they "
                "compute depends on more than their weights and inputs, such as the number of the layer"
            )
        sentences += _find_in(stage, eager, allowed, job)
    return sentences


def _stages(model: Any, wide: Any, job: CheckJob, prompt: Sequence[int]) -> Iterator[_Stage]:
    cuts = [cut_decoder(one, layer_counts=job.layer_counts) for one in (model, wide)]
    tokens = {"input_ids": torch.tensor(prompt)}
    hidden_states = None
    for number, pair in enumerate(zip(*cuts, strict=True)):
        rows, wide_rows = (DecoderRows(stage, returns=("logits",)) for stage in pair)
        stage = _Stage(number, rows, wide_rows, tokens, hidden_states)
        yield stage
        if not rows.stage.is_last:
            hidden_states = stage.call(rows, rows.new_cache(1, job.max_cache_tokens), model.dtype)


def _find_in(stage: _Stage, eager: torch.Tensor, allowed: float, job: CheckJob) -> list[str]:
    """What is wrong in the compiled stage."""
    recorded: list[tuple[Program, tuple[Any, ...]]] = []

    def compiled(**options: Any) -> tuple[Callable[..., Any], Any]:
        torch._dynamo.reset()
        cache = stage.rows.new_cache(1, job.max_cache_tokens)
        return torch.compile(
            stage.rows, backend=_recording(recorded, {**job.options, **options}), fullgraph=True
        ), cache

    rows, cache = compiled(graphs="off")
    if error(stage.call(rows, cache, eager.dtype), eager) > allowed:
        return [f"{stage.name}, {sentence}" for program, args in recorded[-1:] for sentence in _worst(program, args)]
    rows, cache = compiled(verify_every=1)
    for _ in range(3):  # the second call captures
        got = stage.call(rows, cache, eager.dtype)
    dropped = [bucket for program, _ in recorded if program.graphs for bucket in program.graphs.dropped.values()]
    sentences = [f"{stage.name}, {reason.sentence}" for reason in dict.fromkeys(dropped)]
    if not sentences and error(got, eager) > allowed:
        sentences = [f"{stage.name} computes something else when its pieces are replayed than before that"]
    return sentences


def _recording(recorded: list[Any], options: dict[str, Any]) -> Callable[..., Any]:
    """The backend, and what its programs are called with."""

    def compile_(graph_module: Any, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        program = backend(graph_module, example_inputs, options=options)

        def call(*args: Any) -> Any:
            if isinstance(program, Program):
                recorded.append((program, args))
            return program(*args)

        return call

    return compile_


def _worst(program: Program, args: Sequence[Any]) -> list[str]:
    """The piece whose compiled code is furthest from its graph, each on what eager gives it."""
    registers = program.layout.fill(args)
    worst: tuple[float, str] = (0.0, "")
    for instruction in program.layout.instructions:
        piece, arguments = instruction.piece, instruction.gather(registers)
        if piece.kind == "compute":
            values = list(piece.graph_module.forward(*arguments))
            got = instruction.run(arguments)
            off = max((_relative_error(*both) for both in zip(got, values, strict=True)), default=0.0)
            sentence = f"piece[{piece.index}] ({', '.join(dict.fromkeys(piece.ops))}): its compiled code"
            worst = max(worst, (off, f"{sentence} differs from its graph by {off:.1e} of the largest value"))
        else:
            values = list(instruction.run(arguments))
        for register, value in zip(instruction.outputs, values, strict=True):
            registers[register] = value
    return [worst[1]] if worst[1] else []


def _relative_error(got: Any, expected: Any) -> float:
    if not isinstance(expected, torch.Tensor) or not expected.is_floating_point() or not expected.numel():
        return 0.0
    return error(got, expected) / max(float(expected.abs().max()), torch.finfo(expected.dtype).tiny)

"""A pipeline in one process, its stages in threads."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import pp_piecewise_backend as ppb
from models.small_pipeline import FEEDBACK, MAX_TOKENS, OPTIONS, PROXIES, one_layer, own_inputs
from pp_piecewise_backend.pipeline.transports.local import LocalHub, LocalTransport

LONGEST_SECONDS = 120.0


class Delayed(LocalTransport):
    """Random pauses before each transfer, of the sender and of the receiver."""

    seconds = 0.0

    def wire(self, source: int, target: int, name: str, sizes_bytes: Sequence[int] = ()) -> Any:
        wire = super().wire(source, target, name)
        if wire is None or not self.seconds:
            return wire
        chosen = random.Random(f"{self.stage} {source} {target} {name}")
        for method in ("send", "receive"):
            original = getattr(wire, method)

            def paused(tensors: Any, original: Callable[[Any], Any] = original) -> Any:
                if chosen.random() < 0.3:
                    time.sleep(chosen.random() * self.seconds)
                return original(tensors)

            setattr(wire, method, paused)
        return wire


Rank = Callable[[ppb.StageRunner, int], Any]


def in_threads(
    count: int,
    play: Rank,
    *,
    make_module: Callable[[int, int], nn.Module] = one_layer,
    delay_seconds: float = 0.0,
    options: Mapping[str, Any] = OPTIONS,
    device: str = "cpu",
    **arguments: Any,
) -> list[Any]:
    """What ``play(runner, stage)`` returned, or raised, on each stage. On a GPU each has a stream of its own."""
    hub = LocalHub(count, LONGEST_SECONDS, device)

    def one(stage: int) -> Any:
        is_first, is_last = stage == 0, stage == count - 1
        transport = Delayed(hub, stage)
        transport.seconds = delay_seconds
        ends: dict[str, Any] = {
            "inputs": None if is_first else PROXIES,
            "outputs": None if is_last else PROXIES,
            "feedback": FEEDBACK if count > 1 and (is_first or is_last) else None,
            "make_inputs": lambda num_tokens, tag: own_inputs(is_first, num_tokens, tag, device),
        }
        with torch.no_grad():
            module = make_module(stage, count).to(device)
        with torch.Stream(device) if device != "cpu" else contextlib.nullcontext(), ppb.StageRunner(
            module, max_tokens=MAX_TOKENS, transport=transport,
            options={**options, "graphs": "cuda"} if device != "cpu" else options,
            setup_timeout_s=LONGEST_SECONDS, **{"timeout_s": 20, **ends, **arguments},
        ) as runner:  # fmt: skip
            return play(runner, stage)

    outcomes = together(count, one)
    if device != "cpu":
        torch.cuda.synchronize()
    return outcomes


def together(count: int, one: Callable[[int], Any]) -> list[Any]:
    """What ``one(stage)`` returned, or raised, for each stage, in a thread of its own."""
    outcomes: dict[int, Any] = {}

    def noted(stage: int) -> None:
        try:
            outcomes[stage] = one(stage)
        except BaseException as error:
            outcomes[stage] = error

    threads = [threading.Thread(target=noted, args=(stage,), daemon=True) for stage in range(count)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + LONGEST_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert len(outcomes) == count, f"only stages {sorted(outcomes)} ended"
    return [outcomes[stage] for stage in range(count)]


def all_well(outcomes: Sequence[Any]) -> Sequence[Any]:
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes


one_at_a_time = threading.Lock()


def warm_up_alone(runner: ppb.StageRunner) -> None:
    """A capture on a GPU forbids much to other threads, and Dynamo is better not in two of them at once."""
    with one_at_a_time:
        runner.warmup()


def play_all(chosen: Sequence[int]) -> Rank:
    """Run micro-batches of these sizes: the last stage gives its outputs, and each its counters."""

    def play(runner: ppb.StageRunner, stage: int) -> Any:
        warm_up_alone(runner)
        before = runner.stats
        batches = (ppb.MicroBatch(n, str(number).encode()) for number, n in enumerate(chosen))
        outputs = [
            {name: tensor.clone() for name, tensor in output.items()}
            for output in runner.run(batches if stage == 0 else None)
            if output is not None
        ]
        told = [runner.feedback() for _ in chosen] if stage == 0 and runner.stage_count > 1 else []
        assert [tag for tag, _ in told] == [str(number).encode() for number in range(len(told))]
        after = runner.stats
        return outputs, {name: after[name] - before[name] for name in after if isinstance(after[name], int)}

    return play

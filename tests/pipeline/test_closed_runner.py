"""A closed runner: what it keeps, whoever keeps it, and which of its calls still work."""

from __future__ import annotations

import gc
import socket
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pp_piecewise_backend as ppb
from models.small_pipeline import FEEDBACK, PipelineStage
from pp_piecewise_backend import errors
from pp_piecewise_backend.pipeline.transports.local import LocalHub
from runner_ranks import all_well, groups_on_one_port, opens_and_closes, run
from stages_in_threads import all_well as threads_well
from stages_in_threads import in_threads, warm_up_alone
from tiers import slow_but

pytestmark = pytest.mark.usefixtures("fresh_backend")

OPTIONS = {"compiler": "eager", "graphs": "emulate", "capture_sizes": "2,4"}


class Weighted(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x[:, None] * self.weight}


class Breaking(Weighted):
    """Two graphs per forward."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = super().forward(x)["y"]
        torch._dynamo.graph_break()
        return {"y": y * self.weight}


def made(module: torch.nn.Module, **changes: Any) -> ppb.StageRunner:
    usual: dict[str, Any] = {
        "make_inputs": lambda num_tokens, tag: {"x": torch.ones(num_tokens)},
        "max_tokens": 4,
        "transport": LocalHub(1).transport(0),
        "options": OPTIONS,
    }
    return ppb.StageRunner(module, **{**usual, **changes})


def in_order(runner: ppb.StageRunner) -> None:
    with runner:
        for _ in runner.run([ppb.MicroBatch(3)]):
            pass


def loop_raises(runner: ppb.StageRunner) -> BaseException:
    """The traceback has the runner, as a debugger would that shows it."""
    with pytest.raises(ArithmeticError) as caught, runner:
        for _ in runner.run([ppb.MicroBatch(3)]):
            raise ArithmeticError
    return caught.value


def make_inputs_raises(runner: ppb.StageRunner) -> BaseException:
    with pytest.raises(KeyError) as caught, runner:
        for _ in runner.run([ppb.MicroBatch(3), ppb.MicroBatch(2, b"raise")]):
            pass
    return caught.value


@pytest.mark.parametrize(
    ("kind", "ends"),
    slow_but(
        [(Weighted, in_order), (Breaking, make_inputs_raises)],
        [(kind, ends) for kind in (Weighted, Breaking) for ends in (in_order, loop_raises, make_inputs_raises)],
    ),
)
def test_whoever_keeps_a_closed_runner_keeps_no_weights_memory_or_threads(
    kind: type[Weighted], ends: Callable[[ppb.StageRunner], Any]
) -> None:
    def make_inputs(num_tokens: int, tag: bytes) -> dict[str, torch.Tensor]:
        if tag:
            raise KeyError("the data of this micro-batch are not there")
        return {"x": torch.ones(num_tokens)}

    def closed() -> tuple[Any, ...]:
        runner = made(kind(), make_inputs=make_inputs)  # no name for the module: tracebacks have this frame, too
        own = runner._module.module
        held = [weakref.ref(thing) for thing in (own, own.weight, runner._module)]
        del own
        return held, weakref.ref(runner._stage), runner, ends(runner)

    before, threads = ppb.stats(), own_threads()
    held, stage, *_kept = closed()
    gc.collect()
    assert [reference() for reference in held] == [None] * 3
    after = ppb.stats()
    assert after.captures > before.captures
    assert (after.graph_bytes, after.static_bytes) == (before.graph_bytes, before.static_bytes)
    assert own_threads() == threads
    if kind is Weighted:  # what is compiled after a break hangs on the code of the user's module
        assert stage() is None and ppb.programs() == ()


def own_threads() -> list[threading.Thread]:
    """Without the one that watches over bars of progress in a process, from the first on."""
    return [thread for thread in threading.enumerate() if type(thread).__module__ != "tqdm._monitor"]


@pytest.mark.parametrize("breaks", [False, True])
def test_landing_memory_is_released_though_dynamo_may_keep_programs(breaks: bool) -> None:
    """What it compiles after a break hangs on the code of the user's module, which others may use."""

    class Stage(PipelineStage):
        def __init__(self, index: int, count: int) -> None:
            super().__init__(index, count, num_layers=1)

        def forward(self, positions: torch.Tensor, **arguments: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
            output = super().forward(positions, **arguments)
            if breaks:
                torch._dynamo.graph_break()
            return {name: tensor * 1 for name, tensor in output.items()}

    def play(runner: ppb.StageRunner, stage: int) -> tuple[ppb.StageRunner, list[Any]]:
        warm_up_alone(runner)
        for _ in runner.run([ppb.MicroBatch(3, b"1")] if stage == 0 else None):
            pass
        landing = [runner._stage.landing(name) for name in runner._stage.inputs]
        if stage == 0:
            landing += [runner._feedback._landing.landing(name) for name in FEEDBACK]
        return runner, [weakref.ref(block.untyped_storage()) for block in landing]

    outcomes = in_threads(2, play, make_module=Stage)
    gc.collect()
    for runner, landing in threads_well(outcomes):
        assert runner.stats.microbatches == 1
        assert [reference() for reference in landing] == [None] * len(landing) != []


def test_memory_is_released_at_once_and_without_the_garbage_collector() -> None:
    before = ppb.stats()
    gc.disable()
    try:
        in_order(made(Weighted()))
        after = ppb.stats()
    finally:
        gc.enable()
    assert (after.graph_bytes, after.static_bytes) == (before.graph_bytes, before.static_bytes)


CALLS: dict[str, Callable[[ppb.StageRunner], Any]] = {
    "run": lambda runner: runner.run([]),
    "warmup": lambda runner: runner.warmup(),
    "feedback": lambda runner: runner.feedback(),
    "confirm_feedback": lambda runner: runner.confirm_feedback(),
    "confirm_output": lambda runner: runner.confirm_output(),
    "trace": lambda runner: runner.trace("trace.json"),
}


@pytest.mark.parametrize("has_run", [False, True])
def test_calls_of_a_closed_runner(has_run: bool) -> None:
    runner = made(Weighted())
    if has_run:
        list(runner.run([ppb.MicroBatch(3)]))
    runner.close()
    for name, call in CALLS.items():
        with pytest.raises(errors.PPPiecewiseError, match="the runner was closed"):
            call(runner)
            pytest.fail(f"{name}() did something")
    assert runner.stats.microbatches == has_run
    assert runner.report().ranks[0].micro_batches == has_run
    assert [tokens for tokens, _ in runner.bucket_times()] == [1, 2, 4] * has_run
    assert (runner.stage, runner.stage_count, runner.is_first, runner.is_last) == (0, 1, True, True)
    runner.close()
    assert all(name in CALLS for name in public_calls() - {"close", "report", "bucket_times"}), "a call without a rule"


def public_calls() -> set[str]:
    """Without those that programs call."""
    named = {name for name, value in vars(ppb.StageRunner).items() if callable(value) and not name.startswith("_")}
    return named - {"landing_was_read", "mark_landing_read", "results_are_written"}


def test_a_loop_over_a_runner_that_is_closed_in_it_ends() -> None:
    runner, passed = made(Weighted()), 0
    for _ in runner.run(ppb.MicroBatch(2) for _ in range(5)):
        passed += 1
        if passed == 2:
            runner.close()
    assert passed == 2


def test_a_runner_is_not_closed_from_within_its_micro_batch() -> None:
    def make_inputs(num_tokens: int, tag: bytes) -> dict[str, torch.Tensor]:
        if tag:
            with pytest.raises(errors.PPPiecewiseError, match="between two micro-batches"):
                runner.close()
        return {"x": torch.ones(num_tokens)}

    runner = made(Weighted(), make_inputs=make_inputs)
    with runner:
        assert [len(output["y"]) for output in runner.run([ppb.MicroBatch(3, b"1"), ppb.MicroBatch(2, b"2")])] == [3, 2]


@pytest.mark.process
@pytest.mark.parametrize(
    ("transport", "how"),
    slow_but(
        [("auto", "lost"), ("p2p", "lost")],
        [(transport, how) for transport in ("auto", "p2p") for how in ("in order", "lost")],
    ),
)
def test_ranks_that_make_runners_again_and_again_hold_as_much_as_after_the_first(
    transport: str, how: str, tmp_path: Path
) -> None:
    for outcome in all_well(run(opens_and_closes, 2, tmp_path, transport=transport, how=how)):
        first, *later = outcome.value["descriptors"]
        assert max(later) <= first, outcome.value
        first, *later = outcome.value["threads"]
        assert max(later) <= first, outcome.value
        assert outcome.value["runners"] == 0


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("transport", ["auto", "p2p"])
def test_groups_and_runners_one_after_the_other_on_one_port(transport: str, tmp_path: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    outcomes = all_well(run(groups_on_one_port, 2, tmp_path, transport=transport, port=port))
    assert [outcome.value for outcome in outcomes] == [4, 4]

"""A pipeline in one process, its stages in threads: results, overlap, order, misuse."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pp_piecewise_backend as ppb
from against_eager import assert_same
from captured import DEVICES
from models.small_pipeline import (
    FEEDBACK,
    HIDDEN,
    MAX_TOKENS,
    OPTIONS,
    PROXIES,
    PipelineStage,
    one_after_the_other,
    own_inputs,
    sizes,
)
from pp_piecewise_backend import errors
from pp_piecewise_backend.pipeline.transports.local import LocalHub, LocalTransport
from pp_piecewise_backend.runtime.ownership import Boundary, find_boundary

pytestmark = [pytest.mark.usefixtures("fresh_backend"), pytest.mark.timeout(300)]

on_devices = pytest.mark.parametrize("device", DEVICES)
LONGEST_SECONDS = 120.0


class Delayed(LocalTransport):
    """Random pauses before each transfer, of the sender and of the receiver."""

    seconds = 0.0

    def wire(self, source: int, target: int, name: str) -> Any:
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
    make_module: Callable[[int, int], nn.Module] = PipelineStage,
    delay_seconds: float = 0.0,
    options: Mapping[str, Any] = OPTIONS,
    device: str = "cpu",
    **arguments: Any,
) -> list[Any]:
    """What ``play(runner, stage)`` returned, or raised, on each stage. On a GPU each has a stream of its own."""
    hub = LocalHub(count, LONGEST_SECONDS)
    outcomes: dict[int, Any] = {}

    def one(stage: int) -> None:
        is_first, is_last = stage == 0, stage == count - 1
        transport = Delayed(hub, stage)
        transport.seconds = delay_seconds
        ends: dict[str, Any] = {
            "inputs": None if is_first else PROXIES,
            "outputs": None if is_last else PROXIES,
            "feedback": FEEDBACK if count > 1 and (is_first or is_last) else None,
            "make_inputs": lambda num_tokens, tag: own_inputs(is_first, num_tokens, tag, device),
        }
        try:
            with torch.no_grad():
                module = make_module(stage, count).to(device)
            with torch.Stream(device) if device != "cpu" else contextlib.nullcontext(), ppb.StageRunner(
                module, max_tokens=MAX_TOKENS, transport=transport,
                options={**options, "graphs": "cuda"} if device != "cpu" else options,
                setup_timeout_s=LONGEST_SECONDS, **{"timeout_s": 20, **ends, **arguments},
            ) as runner:  # fmt: skip
                outcomes[stage] = play(runner, stage)
        except BaseException as error:
            outcomes[stage] = error

    threads = [threading.Thread(target=one, args=(stage,), daemon=True) for stage in range(count)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + LONGEST_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert len(outcomes) == count, f"only stages {sorted(outcomes)} ended"
    if device != "cpu":
        torch.cuda.synchronize()
    return [outcomes[stage] for stage in range(count)]


def all_well(outcomes: Sequence[Any]) -> Sequence[Any]:
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes


one_at_a_time = threading.Lock()


def play_all(chosen: Sequence[int]) -> Rank:
    """Run micro-batches of these sizes: the last stage gives its outputs, and each its counters."""

    def play(runner: ppb.StageRunner, stage: int) -> Any:
        with one_at_a_time:  # a capture on a GPU forbids much to other threads
            runner.warmup()
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


# ------------------------------------------------------------------------------------------ results


@on_devices
@pytest.mark.parametrize(("count", "max_in_flight"), [(2, None), (2, 1), (3, 3), (4, 8)])
def test_results_are_those_of_one_thread_bit_for_bit(count: int, max_in_flight: int | None, device: str) -> None:
    chosen = sizes(125, seed=count)
    *_, (outputs, _) = all_well(
        in_threads(count, play_all(chosen), delay_seconds=0.004, max_in_flight=max_in_flight, device=device)
    )
    assert len(outputs) == len(chosen)
    torch._dynamo.reset()
    ppb.reset()
    options = OPTIONS if device == "cpu" else {**OPTIONS, "graphs": "cuda"}
    expected = one_after_the_other(chosen, count, options, device)
    eager = one_after_the_other(chosen, count, None, device)
    for got, same_buckets, unsplit in zip(outputs, expected, eager, strict=True):
        assert_same(got, same_buckets)
        torch.testing.assert_close(got["logits"], unsplit["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("graphs", ["off", "emulate"])
def test_nothing_is_copied_on_the_way(graphs: str) -> None:
    chosen = sizes(40)
    with torch.no_grad():
        outcomes = all_well(in_threads(3, play_all(chosen), options={**OPTIONS, "graphs": graphs}))
    for stage, (_, stats) in enumerate(outcomes):
        assert stats["microbatches"] == len(chosen)
        assert stats["headers"] == 2 * len(chosen)
        assert stats["recvs"] == len(chosen) * (1 if stage == 0 else 2)
        assert stats["sends"] == len(chosen) * (1 if stage == 2 else 2)
        assert (stats["proxy_copies"], stats["pickles"], stats["blocking_metadata"]) == (0, 0, 0)
        assert stats["early_releases"] == (0 if stage == 0 else len(chosen))


def too_early(*args: Any) -> Boundary:
    found = find_boundary(*args)
    last = found.last_reader
    return Boundary(None if last is None else last - 1, found.first_writer, found.landing_storages)


def test_a_release_one_step_too_early_gives_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pp_piecewise_backend.runtime.capture_plan.find_boundary", too_early)
    with pytest.raises(AssertionError):
        test_results_are_those_of_one_thread_bit_for_bit(2, None, "cpu")


def test_without_the_wait_for_the_last_send_results_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppb.StageRunner, "results_are_written", lambda self: None)
    with pytest.raises(AssertionError):
        test_results_are_those_of_one_thread_bit_for_bit(3, None, "cpu")


def test_only_steps_that_write_results_wait_for_the_last_send(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[int, list[str]] = {}

    def noting(name: str) -> Callable[[ppb.StageRunner], None]:
        original = getattr(ppb.StageRunner, name)

        def noted(self: ppb.StageRunner) -> None:
            if self._in_forward:
                told.setdefault(self.stage, []).append(name)
            original(self)

        return noted

    for name in ("landing_was_read", "results_are_written"):
        monkeypatch.setattr(ppb.StageRunner, name, noting(name))
    all_well(in_threads(3, play_all(sizes(10))))
    # On the last stage results are the caller's, and nothing is sent from where they lie.
    assert told[1] == ["landing_was_read", "results_are_written"] * 10


def test_a_trace_shows_every_micro_batch_on_every_rank(tmp_path: Path) -> None:
    chosen, path = sizes(6), tmp_path / "trace.json"

    def play(runner: ppb.StageRunner, stage: int) -> Any:
        runner.trace(str(path))
        return play_all(chosen)(runner, stage)

    all_well(in_threads(3, play))
    spans = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    assert all(event["dur"] >= 0 for event in spans)
    for stage in range(3):
        for micro_batch in range(len(chosen)):
            own = [e for e in spans if (e["pid"], e["args"].get("micro_batch")) == (stage, micro_batch)]
            begins = {event["name"]: event["ts"] for event in own}
            pieces = [event["name"] for event in own if event["name"].startswith("ppb.piece[")]
            assert len(pieces) == len(set(pieces)) == 3
            assert [event["name"] for event in own].count("ppb.eager[attention]") == 2
            assert ("send" in begins) == (stage < 2)
            assert ("receive" in begins) == ("release" in begins) == (stage > 0)
            if stage > 0:
                assert begins["receive"] < begins[pieces[0]] < begins["release"] < begins[pieces[1]]
            if stage < 2:
                assert begins["send"] > begins[pieces[-1]]


class Breaking(PipelineStage):
    """Two graphs per forward."""

    def forward(self, positions: Tensor, **arguments: Any) -> dict[str, Tensor]:  # type: ignore[override]
        output = super().forward(positions, **arguments)
        torch._dynamo.graph_break()
        return {name: tensor * 1 for name, tensor in output.items()}


def test_a_stage_that_breaks_the_graph_runs_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    chosen = sizes(30)
    *_, (outputs, stats) = all_well(in_threads(2, play_all(chosen), make_module=Breaking, delay_seconds=0.002))
    assert "breaks into several graphs" in caplog.text
    assert stats["early_releases"] == 0
    for got, expected in zip(outputs, one_after_the_other(chosen, 2, None), strict=True):
        torch.testing.assert_close(got["logits"], expected["logits"], rtol=1e-5, atol=1e-5)


def test_inputs_of_the_caller_replace_those_that_are_made() -> None:
    ids = torch.tensor([3, 1, 2])

    def play(runner: ppb.StageRunner, stage: int) -> Any:
        batch = ppb.MicroBatch(3, b"", {"input_ids": ids, "positions": torch.arange(3)})
        return [o["logits"] for o in runner.run([batch] if stage == 0 else None) if o is not None]

    *_, (logits,) = all_well(in_threads(2, play))
    with torch.no_grad():
        first, last = PipelineStage(0, 2), PipelineStage(1, 2)
        expected = last(torch.arange(3), **first(torch.arange(3), ids))["logits"]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------- feedback, early ends


@pytest.mark.parametrize("max_in_flight", [None, 1, 3])
def test_the_first_stage_goes_on_from_what_the_last_one_tells(max_in_flight: int | None) -> None:
    rounds = 12

    def play(runner: ppb.StageRunner, stage: int) -> Any:
        def batches() -> Iterator[ppb.MicroBatch]:
            tokens = torch.tensor([1, 2])
            for number in range(rounds):
                inputs = {"input_ids": tokens, "positions": torch.tensor([0, 1])}
                yield ppb.MicroBatch(2, str(number).encode(), inputs)
                tag, told = runner.feedback()
                assert tag == str(number).encode()
                tokens = told["next_tokens"].clone()
                seen.append(tokens.tolist())

        seen: list[list[int]] = []
        for _ in runner.run(batches() if stage == 0 else None):
            pass
        return seen, runner.stats.recv_allocations

    (seen, allocations), *_ = all_well(in_threads(2, play, max_in_flight=max_in_flight))
    assert len(seen) == rounds and allocations == 0
    with torch.no_grad():
        first, last = PipelineStage(0, 2), PipelineStage(1, 2)
        tokens, positions = torch.tensor([1, 2]), torch.tensor([0, 1])
        for found in seen:
            tokens = last(positions, **first(positions, tokens))["next_tokens"]
            assert found == tokens.tolist()


@pytest.mark.parametrize("leaver", [0, 1, 2])
def test_leaving_early_stops_all_stages_in_order(leaver: int) -> None:
    def play(runner: ppb.StageRunner, stage: int) -> int:
        endless = (ppb.MicroBatch(n) for _ in range(10**6) for n in (3, 5))
        count = 0
        for _ in runner.run(endless if stage == 0 else None):
            count += 1
            if stage == leaver and count == 4:
                break
        return count

    counts = all_well(in_threads(3, play))
    assert counts[leaver] == 4 and all(4 <= count < 1000 for count in counts[: leaver + 1]), counts


def test_a_stage_that_is_closed_without_a_run_ends_the_pipeline() -> None:
    def play(runner: ppb.StageRunner, stage: int) -> int:
        if stage == 1:
            return 0
        return sum(1 for _ in runner.run((ppb.MicroBatch(2) for _ in range(10**6)) if stage == 0 else None))

    counts = all_well(in_threads(3, play))
    assert counts[2] == 0


def test_at_most_so_many_micro_batches_are_in_flight() -> None:
    started, ended, most = [0], [0], [0]

    class Slow(PipelineStage):
        pass

    def play(runner: ppb.StageRunner, stage: int) -> int:
        runner.warmup()

        def batches() -> Iterator[ppb.MicroBatch]:
            for _ in range(30):
                yield ppb.MicroBatch(3)

        for _ in runner.run(batches() if stage == 0 else None):
            if stage == 0:
                started[0] += 1
                most[0] = max(most[0], started[0] - ended[0])
            elif runner.is_last:
                ended[0] += 1
                time.sleep(0.005)
        return most[0]

    all_well(in_threads(4, play, make_module=Slow, max_in_flight=2, feedback=None))
    # The last stage tells of an end before the test counts it.
    assert 2 <= most[0] <= 3


# --------------------------------------------------------------------------------------------- misuse


def test_a_profile_shows_receives_by_their_name() -> None:
    def play(runner: ppb.StageRunner, stage: int) -> dict[str, int]:
        runner.warmup()
        if stage == 0:
            for _ in runner.run([ppb.MicroBatch(2)] * 5):
                pass
            return {}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in runner.run():
                pass
        return {event.key: event.count for event in profile.key_averages()}

    _, seen = all_well(in_threads(2, play))
    assert seen["ppb.handoff.recv"] == 5 + 1, "one per micro-batch, and the end"
    assert any(name.startswith("ppb.piece[") for name in seen)


@pytest.mark.parametrize(("stages", "late_seconds"), [(3, 0.0), (5, 0.5)])
def test_an_exception_of_the_callers_own_code_is_told_to_all(stages: int, late_seconds: float) -> None:
    def play(runner: ppb.StageRunner, stage: int) -> int:
        count = 0
        try:
            for _ in runner.run((ppb.MicroBatch(2) for _ in range(10**6)) if stage == 0 else None):
                count += 1
                if stage == 1 and count == 3:
                    raise ArithmeticError("the caller's own code failed")
        finally:
            # Here the iterator was left, so the others stop in order; only later can they learn why.
            time.sleep(late_seconds * (stage == 1))
        return count

    outcomes = in_threads(stages, play)
    assert isinstance(outcomes.pop(1), ArithmeticError)
    for outcome in outcomes:
        assert isinstance(outcome, errors.PeerLost) and "rank 1 failed (ArithmeticError)" in str(outcome)


def test_a_rank_that_is_late_to_close_is_waited_for_no_longer_than_a_silent_one() -> None:
    closed_at: dict[int, float] = {}

    def play(runner: ppb.StageRunner, stage: int) -> None:
        for _ in runner.run([ppb.MicroBatch(2)] if stage == 0 else None):
            pass
        time.sleep(5.0 * (stage == 1))
        runner.close()
        closed_at[stage] = time.monotonic()

    all_well(in_threads(3, play, timeout_s=2.0))
    assert max(closed_at[0], closed_at[2]) < closed_at[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda output: output["hidden_states"], "stage 0 returned Tensor: expected a dict with 'hidden_states', 'res"),
        (lambda output: {"residual": output["residual"]}, r"returned a dict with \['residual'\]"),
        (lambda output: {**output, "residual": output["residual"].double()}, "'residual' as contiguous torch.float32"),
        (
            lambda output: {**output, "residual": output["residual"][:-1]},
            r"torch.float32\[3, 16\], but got .*\[2, 16\]",
        ),
    ],
    ids=["no dict", "no such name", "dtype", "rows"],
)
def test_a_module_that_returns_something_else_is_told(change: Callable[[Any], Any], words: str) -> None:
    class Other(PipelineStage):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            return output if self.is_last else change(output)

    def play(runner: ppb.StageRunner, stage: int) -> int:
        return sum(1 for _ in runner.run([ppb.MicroBatch(3)] if stage == 0 else None))

    first, last = in_threads(2, play, make_module=Other)
    with pytest.raises(ValueError, match=words):
        raise first
    assert isinstance(last, errors.PeerLost)


def test_results_with_other_strides_are_copied_and_counted() -> None:
    class Transposed(PipelineStage):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            if self.is_last:
                return output
            return {name: tensor.t().contiguous().t() for name, tensor in output.items()}

    chosen = sizes(10, seed=1)
    (_, stats), (outputs, _) = all_well(in_threads(2, play_all(chosen), make_module=Transposed))
    assert stats["proxy_copies"] == 2 * sum(num_tokens > 1 for num_tokens in chosen)
    for got, expected in zip(outputs, one_after_the_other(chosen, 2, None), strict=True):
        torch.testing.assert_close(got["logits"], expected["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"receive": "late"}, "receive='late': expected 'early' or 'step'"),
        ({"max_in_flight": 0}, "max_in_flight=0: expected None or at least 1"),
        ({"timeout_s": -1}, "silence_seconds=-1"),
        ({"options": {"stage": None}}, "option 'stage' is set by StageRunner itself"),
        ({"options": {"max_tokens": 4}}, "option 'max_tokens' is set by StageRunner itself"),
        ({"transport": "tcp"}, "transport='tcp': expected 'auto', 'p2p', 'shared_memory', 'cuda_ipc' or a transport"),
        ({"transport": "auto"}, "no initialised torch.distributed"),
        ({"inputs": PROXIES}, r"stage 0 of 1, the first one, got inputs \['hidden_states', 'residual'\]"),
        ({"feedback": FEEDBACK}, "only the first and the last stage have feedback"),
    ],
)
def test_arguments_that_cannot_be_used(arguments: Mapping[str, Any], words: str) -> None:
    given = {"transport": LocalHub(1).transport(0), **arguments}
    with pytest.raises(errors.ConfigError, match=words):
        ppb.StageRunner(PipelineStage(0, 1), make_inputs=lambda n, tag: own_inputs(True, n, tag), max_tokens=8, **given)


def test_a_pipeline_of_one_stage() -> None:
    runner = ppb.StageRunner(
        PipelineStage(0, 1), make_inputs=lambda n, tag: own_inputs(True, n, tag), max_tokens=MAX_TOKENS,
        transport=LocalHub(1).transport(0), options=OPTIONS,
    )  # fmt: skip
    with pytest.raises(errors.PPPiecewiseError, match="no micro-batches on the first stage"):
        runner.run()
    chosen = sizes(9)
    outputs, _ = play_all(chosen)(runner, 0)
    with pytest.raises(errors.PPPiecewiseError, match="run\\(\\) was called before"):
        runner.run([])
    with pytest.raises(errors.PPPiecewiseError, match="only the first stage of a pipeline with feedback"):
        runner.feedback()
    runner.close()
    runner.close()
    for got, expected in zip(outputs, one_after_the_other(chosen, 1, None), strict=True):
        torch.testing.assert_close(got["logits"], expected["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((0,), "num_tokens=0"), ((2.0,), "num_tokens=2.0"), ((1, b"x" * 25), "at most 24 bytes"), ((1, "x"), "tag='x'")],
)
def test_a_micro_batch_that_cannot_be(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(errors.ConfigError, match=words):
        ppb.MicroBatch(*arguments)


def test_make_inputs_must_leave_proxies_out() -> None:
    def play(runner: ppb.StageRunner, stage: int) -> None:
        runner.warmup()

    def make_inputs(num_tokens: int, tag: bytes) -> dict[str, Tensor]:
        return {**own_inputs(True, num_tokens, tag), "residual": torch.zeros(num_tokens, HIDDEN)}

    first, last = in_threads(2, play, make_inputs=make_inputs)
    assert isinstance(last, ValueError) and "make_inputs gave 'residual', which the previous stage sends" in str(last)
    assert isinstance(first, errors.PeerLost) and "rank 1 failed (ValueError)" in str(first)

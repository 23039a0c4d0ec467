"""A rank that hangs in its own code: found by itself, named to all, with its stack in its log."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import pp_piecewise_backend as ppb
from emulated_streams import Stream
from models.small_pipeline import own_inputs
from plain_stage import Plain
from pp_piecewise_backend import errors
from pp_piecewise_backend.pipeline import report, watchdog
from pp_piecewise_backend.pipeline.positions import DeviceWork, Step
from pp_piecewise_backend.pipeline.report import LateStep, StepClock
from pp_piecewise_backend.pipeline.transports.base import Patience
from stages_in_threads import in_threads, warm_up_alone

STEP_TIMEOUT_S = 2.0


@pytest.mark.usefixtures("fresh_backend", "one_program")
def test_a_rank_that_hangs_is_named_to_all_and_shows_its_stack(caplog: pytest.LogCaptureFixture) -> None:
    """Rank 1 waits for a lock; the others wait for it, and the first one had nothing to do for long before."""
    lock, hanging_at = threading.Event(), 5

    def play(runner: ppb.StageRunner, stage: int) -> None:
        def inputs(num_tokens: int, tag: bytes) -> Any:
            if stage == 1 and tag == str(hanging_at).encode():
                a_lock_that_nobody_releases(lock)
            return own_inputs(stage == 0, num_tokens, b"")

        def batches() -> Iterator[ppb.MicroBatch]:
            time.sleep(1.5 * STEP_TIMEOUT_S)
            for number in range(10**6):
                yield ppb.MicroBatch(2, str(number).encode())
                if number > 1:
                    runner.feedback()

        runner._make_inputs = inputs
        warm_up_alone(runner)
        try:
            for _ in runner.run(batches() if stage == 0 else None):
                pass
        except errors.PeerLost:
            lost.append(stage)
            if len(lost) == 2:
                lock.set()
            raise

    lost: list[int] = []
    options = {"compiler": "eager", "graphs": "off"}
    outcomes = in_threads(3, play, make_module=Plain, options=options, step_timeout_s=STEP_TIMEOUT_S)
    assert sorted(lost[:2]) == [0, 2]
    for stage, outcome in enumerate(outcomes):
        assert isinstance(outcome, errors.PeerLost)
        whose = "rank 1 itself failed" if stage == 1 else "rank 1 failed"
        assert f"{whose} (hangs in its make_inputs) at micro-batch {hanging_at}" in str(outcome), outcome
        assert f"StageRunner(step_timeout_s={STEP_TIMEOUT_S:g})" in str(outcome), "how it was set, on each rank"
        first, hanging, last = outcome.positions
        assert hanging.step == f"in its make_inputs of micro-batch {hanging_at}" and hanging.as_of - hanging.since > 1.9
        # The first one is in flight ahead, or waits until its send has left; then the pipeline is full.
        assert first.step.startswith(("waiting for feedback after micro-batch", "waiting for its last send to leave"))
        assert last.step.startswith(("waiting for the header of micro-batch", "receiving the tensors of micro-batch"))
    (record,) = [record for record in caplog.records if "hangs" in record.getMessage()]
    assert "rank 1 hangs at micro-batch 5, in its make_inputs" in record.getMessage()
    assert "in a_lock_that_nobody_releases" in record.getMessage()
    assert not [thread for thread in threading.enumerate() if "watchdog" in thread.name]


def test_a_look_at_a_device_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_CLOSING_SECONDS", 0.2)
    looks, ends = threading.Event(), threading.Event()

    class Clock:
        def late_step(self, longest_seconds: float) -> None:
            looks.set()
            ends.wait()

    class Links:
        rank = 0

    looking = watchdog.Watchdog(Clock(), Links(), 60.0)  # type: ignore[arg-type]
    monkeypatch.setattr(watchdog, "_LONGEST_LOOK_SECONDS", 0.01)
    looking.start()
    looks.wait()
    closing = threading.Thread(target=looking.close, daemon=True)
    closing.start()
    closing.join(5.0)
    assert not closing.is_alive()
    ends.set()


def a_lock_that_nobody_releases(lock: threading.Event) -> None:
    lock.wait(60)


def test_waits_for_other_ranks_do_not_make_a_step_late(monkeypatch: pytest.MonkeyPatch) -> None:
    waited_ns = [0]
    readings = itertools.count(10**9)  # no two are alike
    monkeypatch.setattr(report.time, "perf_counter_ns", lambda: next(readings) + waited_ns[0])
    clock = StepClock(torch.device("cpu"))
    assert clock.late_step(0) is None
    clock.step_begins(3)
    assert clock.late_step(0) == LateStep(3, "make_inputs", threading.get_ident())
    clock.forward_begins()
    begin_ns = clock.wait_begins("send")
    waited_ns[0] += 4 * 10**8
    assert clock.late_step(0.3) is None
    clock.waited("send", begin_ns)
    assert clock.late_step(0.3) is None
    waited_ns[0] += 4 * 10**8
    assert clock.late_step(0.3) == LateStep(3, "forward", threading.get_ident())
    clock.forward_ends()
    assert clock.late_step(0.3) == LateStep(3, "results", threading.get_ident())
    clock.step_ends()
    assert clock.late_step(0) is None
    clock.step_begins(4)
    assert clock.late_step(0.3) is None


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), "2"])
def test_a_step_timeout_is_a_positive_number(seconds: Any) -> None:
    with pytest.raises(
        errors.ConfigError,
        match=r"step_timeout_s=.*expected a positive number of seconds, given as StageRunner\(step_timeout_s=\)",
    ):
        Patience(step_seconds=seconds)


def test_a_clock_says_where_its_rank_is() -> None:
    clock = StepClock(torch.device("cpu"))

    def phrase() -> str:
        return clock.place().phrase(["a", "b"])

    assert phrase() == "setting up"
    clock.begins(Step.CALLER)
    assert phrase() == "in its caller's code"
    begin_ns = clock.wait_begins("receive")
    assert phrase() == "waiting for the header of micro-batch 0" and clock.place().since_ns == begin_ns
    clock.header_came(0)
    assert phrase() == "receiving the tensors of micro-batch 0"
    clock.waited("receive", begin_ns)
    clock.step_begins(0)
    assert phrase() == "in its make_inputs of micro-batch 0"
    clock.forward_begins()
    assert phrase() == "in its forward of micro-batch 0"
    begin_ns = clock.wait_begins("send")
    assert phrase() == "waiting for its last send to leave at micro-batch 0"
    clock.waited("send", begin_ns)
    assert phrase() == "in its forward of micro-batch 0"
    clock.forward_ends()
    assert phrase() == "sending a, b of micro-batch 0"
    begin_ns = clock.wait_begins("receive")
    assert phrase() == "receiving the tensors of micro-batch 0", "as a last stage confirms them"
    clock.waited("receive", begin_ns)
    clock.begins(Step.FINISH)
    late = clock.late_step(0)
    assert phrase() == "in its finish of micro-batch 0" and late is not None and late.part == "finish"
    clock.step_ends()
    assert phrase() == "in its caller's code after micro-batch 0"
    clock.wait_begins("receive")
    assert phrase() == "waiting for the header of micro-batch 1"


# ------------------------------------------------------------------------------ a device that hangs


class StreamEvent:
    """An event of the emulated stream that is the current one."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._has_come = threading.Event()

    def record(self) -> None:
        self._has_come = has_come = threading.Event()
        self._stream.enqueue(has_come.set)

    def query(self) -> bool:
        return self._has_come.is_set()


def enqueued_and_blocked(stream: Stream) -> threading.Event:
    """What the stream waits for from now on."""
    block = threading.Event()
    stream.enqueue(lambda: block.wait(60))
    return block


def test_work_that_a_device_began_and_does_not_end_is_late_and_what_waits_is_not() -> None:
    stream = Stream()
    work = DeviceWork(lambda: StreamEvent(stream))
    data = enqueued_and_blocked(stream)  # of another rank
    work.begins(3)
    kernel = enqueued_and_blocked(stream)
    assert work.late(0) is None, "the host is at it"
    work.ends()
    last_send = enqueued_and_blocked(stream)
    work.begins(3)
    work.ends()
    assert work.late(0) is None and work.late(0) is None, "the stream waits for another rank"
    data.set()
    while work.late(0) is None:  # until the stream has come to the kernel
        time.sleep(1e-3)
    assert work.late(0) == 3 and work.late(60) is None
    kernel.set()
    while work.late(0) is not None:
        time.sleep(1e-3)
    assert work.late(0) is None, "the stream waits until the last results have left"
    last_send.set()
    stream.synchronize()
    assert work.late(0) is None


def test_events_of_ended_work_are_used_again() -> None:
    stream, made = Stream(), []

    def make() -> StreamEvent:
        made.append(StreamEvent(stream))
        return made[-1]

    work = DeviceWork(make)
    for number in range(5):
        work.begins(number)
        work.ends()
        stream.synchronize()
    assert len(made) == 2 and work.late(0) is None


@pytest.mark.usefixtures("fresh_backend", "one_program")
def test_a_device_that_hangs_while_its_host_runs_ahead_is_named_to_all(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 has enqueued a kernel that never ends, and its host goes on, as do the others."""
    hanging_at, stream = 5, Stream()
    blocks: list[threading.Event] = []
    begins = StepClock.forward_begins

    def begins_and_hangs(clock: StepClock) -> None:
        begins(clock)
        if clock._work is not None and clock.micro_batch == hanging_at:
            blocks.append(enqueued_and_blocked(stream))

    monkeypatch.setattr(StepClock, "forward_begins", begins_and_hangs)

    def play(runner: ppb.StageRunner, stage: int) -> None:
        warm_up_alone(runner)
        if stage == 1:  # as on a GPU
            runner._clock._work = DeviceWork(lambda: StreamEvent(stream))

        def batches() -> Iterator[ppb.MicroBatch]:
            for number in range(5000):  # far more than pass until it is noticed
                yield ppb.MicroBatch(2)
                if number > 1:
                    runner.feedback()

        for _ in runner.run(batches() if stage == 0 else None):
            pass

    options = {"compiler": "eager", "graphs": "off"}
    try:
        outcomes = in_threads(3, play, make_module=Plain, options=options, step_timeout_s=STEP_TIMEOUT_S)
    finally:
        for block in blocks:
            block.set()
    for stage, outcome in enumerate(outcomes):
        assert isinstance(outcome, errors.PeerLost), outcome
        whose = "rank 1 itself failed" if stage == 1 else "rank 1 failed"
        assert f"{whose} (hangs in its GPU forward) at micro-batch {hanging_at}" in str(outcome), outcome
    (record,) = [record for record in caplog.records if "hangs" in record.getMessage()]
    assert f"rank 1 hangs at micro-batch {hanging_at}, in its GPU forward" in record.getMessage()

"""How long forwards take, and where the time of a pipeline went."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pp_piecewise_backend as ppb
from models.small_pipeline import own_inputs
from pipeline_traces import bubbles_in
from plain_stage import Plain
from pp_piecewise_backend.pipeline.header import Header, Kind
from pp_piecewise_backend.pipeline.report import PipelineReport, RankTimes, StepClock, TimesOfRanks
from pp_piecewise_backend.pipeline.transports.local import LocalHub
from pp_piecewise_backend.runtime import warmup
from stages_in_threads import all_well, in_threads, warm_up_alone

pytestmark = [pytest.mark.usefixtures("fresh_backend")]

SECONDS_PER_ROW = 0.004
CLOCK = {"seconds": 0.0}
"""What ``scripted_clock`` shows."""


@torch.library.custom_op("report::work", mutates_args=())
def work(x: Tensor) -> Tensor:
    """Takes its time for each row, by that clock, and runs between the captured pieces."""
    CLOCK["seconds"] += SECONDS_PER_ROW * x.shape[0]
    return x.clone()


@work.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.fixture
def scripted_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup.time, "perf_counter", lambda: CLOCK["seconds"])


class Working(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        y: Tensor = work(self.layer(x))
        return self.layer(y)


def alone(**options: Any) -> ppb.StageRunner:
    chosen = {"compiler": "eager", "graphs": "emulate", "capture_sizes": "1,4", **options}
    return ppb.StageRunner(
        Working(), make_inputs=lambda n, tag: {"x": torch.ones(n, 4)}, max_tokens=6,
        transport=LocalHub(1).transport(0), options=chosen,
    )  # fmt: skip


@pytest.mark.usefixtures("scripted_clock")
@pytest.mark.parametrize("graph_memory_bytes", [None, 1])
def test_the_warm_up_times_each_bucket_and_leaves_no_trace(graph_memory_bytes: int | None) -> None:
    """One that was dropped, too, as it runs then."""
    with alone(graph_memory_bytes=graph_memory_bytes) as runner:
        assert runner.bucket_times() == ()
        runner.warmup()
        times = runner.bucket_times()
        before = ppb.stats()
        assert bool(before.graph_bytes) is (graph_memory_bytes is None)
        assert times == tuple((n, pytest.approx(1e6 * SECONDS_PER_ROW * n)) for n in (1, 4, 6))
        assert runner._module.module.calls == 0
        assert (before.calls, before.replays, before.graph_misses) == (0, 0, 0)


def test_where_nothing_is_captured_no_bucket_is_timed() -> None:
    with alone(graphs="off") as runner:
        runner.warmup()
        assert runner.bucket_times() == ()


# --------------------------------------------------------------------------------------------- report


@pytest.mark.usefixtures("one_program")
def test_the_report_names_the_slowest_rank_and_the_bubble_of_the_trace(tmp_path: Path) -> None:
    count, in_flight, slow, path = 40, 4, 1, tmp_path / "trace.json"
    all_are_warm = threading.Barrier(3)

    def play(runner: ppb.StageRunner, stage: int) -> Any:
        def inputs(num_tokens: int, tag: bytes) -> Any:
            time.sleep(0.005 * (stage == slow and tag != b""))
            return own_inputs(stage == 0, num_tokens, b"")

        def batches() -> Iterator[ppb.MicroBatch]:
            for number in range(count):
                if number >= in_flight:
                    runner.feedback()
                yield ppb.MicroBatch(4, str(number).encode())

        runner._make_inputs = inputs
        runner.trace(str(path))
        warm_up_alone(runner)
        assert runner.report().missing == tuple(rank for rank in range(3) if rank != stage)
        all_are_warm.wait(60)  # else who runs first waits within its steps for those that still compile
        for number, _ in enumerate(runner.run(batches() if stage == 0 else None), 1):
            if number == count - 1:
                (own,) = runner.report().ranks
                assert (own.rank, own.micro_batches) == (stage, count - 1)
        return runner.report(), runner

    options = {"compiler": "eager", "graphs": "off"}
    outcomes = all_well(in_threads(3, play, make_module=Plain, options=options, max_in_flight=in_flight))
    traced = bubbles_in(path)
    for report, runner in outcomes:
        assert report == outcomes[0][0] == runner.report(), "all ranks know the same, also when closed"
        assert report.missing == () and [times.micro_batches for times in report.ranks] == [count] * 3
        assert report.slowest is not None and report.slowest.rank == slow
        assert report.verdict.startswith(f"bubble {report.bubble_percent:.0f} %, rank 1 is the slowest, ")
        assert report.verdict.endswith("% of its step is host") and report.verdict in str(report)
    for times in outcomes[0][0].ranks:
        assert abs(times.bubble_percent - traced[times.rank]) < 10, (times, traced)
        parts_us = times.forward_us, times.receive_us, times.send_us, times.feedback_us, times.host_us
        assert times.step_us == pytest.approx(sum(parts_us), rel=0.01) and min(parts_us) >= 0
    first, second, third = outcomes[0][0].ranks
    assert second.host_us >= 5000 and second.bubble_percent < min(first.bubble_percent, third.bubble_percent)
    assert first.receive_us == 0 < first.feedback_us and third.receive_us > third.feedback_us == 0


@pytest.mark.usefixtures("one_program")
def test_a_report_of_ranks_that_ran_nothing_and_one_that_never_ends() -> None:
    def play(runner: ppb.StageRunner, stage: int) -> Any:
        warm_up_alone(runner)
        for _ in runner.run([] if stage == 0 else None):
            pass
        return runner.report()

    options = {"compiler": "eager", "graphs": "off"}
    for report in all_well(in_threads(2, play, make_module=Plain, options=options)):
        assert (report.verdict, report.bubble_percent, report.slowest) == ("no micro-batch was run", 0.0, None)

    known = TimesOfRanks((4, 6), 0)
    known.publish(RankTimes(4, 1))
    began = time.monotonic()
    report = known.report(RankTimes(4, 1), 0.2, lambda: False)
    assert report.missing == (6,) and 0.2 <= time.monotonic() - began < 5
    assert known.report(RankTimes(4, 1), 60, lambda: True).missing == (6,)


def times_of(rank: int, **parts_us: float) -> RankTimes:
    return RankTimes(rank, 10, step_us=1000.0, **parts_us)


@pytest.mark.parametrize(
    ("slow", "ending"),
    [
        ({"forward_us": 250.0, "receive_us": 100.0, "host_us": 650.0}, "65 % of its step is host"),
        ({"forward_us": 800.0, "host_us": 200.0}, "80 % of its step is forward"),
        ({"forward_us": 300.0, "feedback_us": 600.0, "host_us": 100.0}, "60 % of its step is waiting for feedback"),
        # On a GPU, which works while the host waits.
        ({"forward_us": 900.0, "receive_us": 700.0, "host_us": 300.0}, "90 % of its step is forward"),
    ],
)
def test_the_verdict(slow: dict[str, float], ending: str) -> None:
    report = PipelineReport((times_of(0, send_us=900.0, host_us=100.0), times_of(1, **slow)), missing=(2,))
    busy_us = max(1000 - slow.get("receive_us", 0) - slow.get("feedback_us", 0), slow["forward_us"])
    assert report.bubble_percent == pytest.approx((90 + 100 - busy_us / 10) / 2)
    assert report.verdict.endswith(f"rank 1 is the slowest, {ending}; not heard of: rank 2")
    assert len({len(line) for line in str(report).splitlines()[:-1]}) == 1


def test_times_travel_in_one_message() -> None:
    times = times_of(3, forward_us=0.5, receive_us=2.0, send_us=3.0, feedback_us=4.0, host_us=5.0)
    assert RankTimes.from_bytes(3, 10, times.to_bytes()) == times
    header = Header(Kind.TIMES, 0, 0, 0, times.micro_batches, 3, RankTimes(3, 1).to_bytes())
    assert RankTimes.from_bytes(3, 1, Header.unpack(header.pack()).tag) == RankTimes(3, 1)


def test_what_another_thread_waits_for_is_no_part_of_a_step() -> None:
    clock = StepClock(torch.device("cpu"))
    clock.waited("receive", 0)  # the pipeline fills
    clock.step_begins(0)
    long_ago = time.perf_counter_ns() - 10**9
    thread = threading.Thread(target=clock.waited, args=("feedback", long_ago))
    thread.start()
    thread.join()
    clock.step_ends()
    clock.waited("send", long_ago)  # after the last step
    times = clock.times(0)
    assert (times.receive_us, times.feedback_us, times.send_us) == (0, 0, 0)

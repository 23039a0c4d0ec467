"""The report on a pipeline of real processes, of which one is slow: which one, and how long the others wait for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline_traces import bubbles_in
from runner_ranks import all_well, run, slowed
from tiers import slow_but

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("count", "slow", "where"),
    slow_but(
        [(2, 1, "forward")],
        [(count, slow, where) for count in (2, 3) for slow in range(count) for where in ("forward", "host")],
    ),
)
def test_the_report_names_a_rank_that_is_slow_and_the_bubble_of_the_trace(
    count: int, slow: int, where: str, tmp_path: Path
) -> None:
    outcomes = all_well(run(slowed, count, tmp_path, slow=slow, where=where, microbatches=60))
    reports = [outcome.value for outcome in outcomes]
    assert reports == count * reports[:1], "all ranks say the same"
    (report, *_) = reports
    assert report["slowest"] == slow
    assert f"rank {slow} is the slowest, " in report["verdict"]
    assert report["parts_us"][str(slow)][where] >= 5000
    traced = bubbles_in(tmp_path / "trace.json")
    bubbles = {int(rank): percent for rank, percent in report["bubbles"].items()}
    assert bubbles.keys() == traced.keys() == set(range(count))
    assert {rank: (bubbles[rank], traced[rank]) for rank in bubbles if abs(bubbles[rank] - traced[rank]) >= 10} == {}
    mean = sum(traced.values()) / count
    assert abs(float(report["verdict"].split()[1]) - mean) < 10
    assert bubbles[slow] < min(percent for rank, percent in bubbles.items() if rank != slow)

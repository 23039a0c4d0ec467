"""How a pipeline ends, its stages in threads of one process: early, without a run, with an exception, late."""

from __future__ import annotations

import time

import pytest

import pp_piecewise_backend as ppb
from pp_piecewise_backend import errors
from stages_in_threads import all_well, in_threads
from tiers import slow_but

pytestmark = [pytest.mark.usefixtures("fresh_backend", "one_program"), pytest.mark.timeout(300)]


@pytest.mark.parametrize("leaver", slow_but([1], [0, 1, 2]))
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


@pytest.mark.parametrize(("stages", "late_seconds"), slow_but([(3, 0.0)], [(3, 0.0), (5, 0.5)]))
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
        time.sleep(9.0 * (stage == 1))
        runner.close()
        closed_at[stage] = time.monotonic()

    all_well(in_threads(3, play, timeout_s=4.0))
    assert max(closed_at[0], closed_at[2]) < closed_at[1]

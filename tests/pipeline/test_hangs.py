"""A rank that hangs in its own code ends all ranks in time; its log has its stack, and all errors where all were."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from handoff_ranks import MARGIN_SECONDS, fault_time
from pp_piecewise_backend.errors import Position
from runner_ranks import HANGING_STEP, TIMEOUT_SECONDS, hangs, run

pytestmark = [
    pytest.mark.process,
    pytest.mark.usefixtures("fresh_backend", "no_gradients"),
]

STACKS = {
    "a lock": "in a_lock_that_nobody_releases",
    "a collective": "in a_collective_to_which_nobody_comes",
    "a kernel": "in a_kernel_that_never_ends",
    "a kernel that holds the interpreter": "in a_kernel_that_never_ends",
}


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", STACKS)
def test_a_hang_ends_all_ranks_in_time_and_says_where_they_were(kind: str, count: int, tmp_path: Path) -> None:
    is_silent = kind == "a kernel that holds the interpreter"
    arguments = {"kind": kind, "victim": 1, "step_timeout_s": 1.0 if is_silent else 1.5}
    outcomes = run(hangs, count, tmp_path, TIMEOUT_SECONDS, left_alone=[1], **arguments)
    victim, begin = 1, fault_time([outcomes[1]])
    longest_seconds = TIMEOUT_SECONDS if is_silent else arguments["step_timeout_s"]
    part = "make_inputs" if kind == "a lock" else "forward"
    for number, outcome in enumerate(outcomes):
        if number == victim:
            continue
        assert outcome.exit_code == 1 and "errors.PeerLost: " in outcome.error, outcome.log
        waited = sum(one.waited_seconds for one in outcomes)
        assert outcome.raised_at - begin < longest_seconds + MARGIN_SECONDS + waited, outcome
        positions = [Position(*fields) for fields in json.loads((tmp_path / f"positions_{number}.json").read_text())]
        assert [position.rank for position in positions] == [*range(count)]
        hanging = positions[victim]
        if is_silent:
            is_next = abs(number - victim) == 1
            heard = f"has sent nothing for {TIMEOUT_SECONDS:g} s" if is_next else "failed (silent), as rank "
            assert f"rank {victim} {heard}" in outcome.error
            assert outcome.raised_at - hanging.as_of > 0.9 * TIMEOUT_SECONDS and ", as of " in outcome.error
        else:
            reason = rf"rank {victim} failed \(hangs in its {part}\) at micro-batch {HANGING_STEP}"
            assert re.search(reason, outcome.error) and "(step_timeout_s=1.5)" in outcome.error
            assert hanging.step == f"in its {part} of micro-batch {HANGING_STEP}"
            assert begin - 0.5 < hanging.since < begin + 0.5 < hanging.as_of
            assert f"rank {victim}: {hanging.step} for " in outcome.error
            # Between stages of processes headers run ahead of their tensors.
            waits = ("waiting for the header", "receiving the tensors")
            after = [position.step for position in positions[victim + 1 :]]
            assert all(step.startswith(waits) for step in after), after
    log = outcomes[victim].log
    assert STACKS[kind] in log, log
    assert ("Timeout (" if is_silent else f"rank {victim} hangs at micro-batch {HANGING_STEP}, in its {part}") in log

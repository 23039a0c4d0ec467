"""The runner with real processes over gloo: every way in which a rank can fail, and what the others then do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from handoff_ranks import MARGIN_SECONDS, fault_time
from runner_ranks import TIMEOUT_SECONDS, Outcome, fault, other_plan, run, stops_before_its_trace
from tiers import slow_but

pytestmark = [
    pytest.mark.process,
    pytest.mark.usefixtures("fresh_backend", "no_gradients"),
]


@pytest.mark.parametrize("kind", ["ladder", "max_tokens", "proxies", "transport", "version"])
def test_ranks_set_up_differently_all_say_so(kind: str, tmp_path: Path) -> None:
    outcomes = run(other_plan, 3, tmp_path, kind=kind, victim=1)
    assert all(outcome.exit_code == 1 for outcome in outcomes)
    (error,) = {outcome.error for outcome in outcomes}
    name = {"ladder": "buckets_tokens", "proxies": "torch.bfloat16", "version": "package_version"}.get(kind, kind)
    log = outcomes[0].log
    assert "errors.PlanMismatch: " in log and name in log.rpartition("errors.PlanMismatch: ")[2] and error


def survivors_lose_their_peer(
    outcomes: Sequence[Outcome], victim: int, timeout_seconds: float = TIMEOUT_SECONDS
) -> None:
    begin = fault_time([outcomes[victim]])
    survivors = {number: outcome for number, outcome in enumerate(outcomes) if number != victim}
    waited = sum(outcome.waited_seconds for outcome in survivors.values())
    for number, outcome in survivors.items():
        assert outcome.exit_code == 1 and "errors.PeerLost: " in outcome.error, f"rank {number}\n{outcome.log}"
        assert f"rank {victim}" in outcome.error
        assert outcome.raised_at - begin < timeout_seconds + MARGIN_SECONDS + waited, outcome
    slowest = max(outcome.raised_at - begin for outcome in survivors.values())
    print(f"slowest rank raised {slowest:.2f} s after the fault, at {timeout_seconds} s of silence")


@pytest.mark.parametrize(
    ("kind", "victim", "transport"),
    slow_but(
        [("exit", 1, "shared_memory"), ("SIGKILL", 2, "shared_memory"), ("SIGSTOP", 1, "p2p")],
        [
            ("exit", 1, "p2p"),
            ("exit", 1, "shared_memory"),
            ("SIGKILL", 0, "p2p"),
            ("SIGKILL", 2, "shared_memory"),
            ("SIGSTOP", 0, "shared_memory"),
            ("SIGSTOP", 1, "p2p"),
            ("SIGSTOP", 1, "shared_memory"),
        ],
    ),
)
def test_a_rank_that_dies_or_stops_is_lost_to_all(kind: str, victim: int, transport: str, tmp_path: Path) -> None:
    left_alone = [victim] if kind == "SIGSTOP" else []
    outcomes = run(fault, 3, tmp_path, TIMEOUT_SECONDS, left_alone, kind=kind, victim=victim, transport=transport)
    survivors_lose_their_peer(outcomes, victim)
    assert outcomes[victim].exit_code == (3 if kind == "exit" else -9)


@pytest.mark.parametrize("transport", ["auto", "p2p"])
def test_a_rank_that_stops_before_the_trace_is_lost_to_the_other(transport: str, tmp_path: Path) -> None:
    """Which waits for it and nobody else: one more that raises would end its wait, too."""
    arguments = {"victim": 1, "transport": transport}
    outcomes = run(stops_before_its_trace, 2, tmp_path, TIMEOUT_SECONDS, left_alone=[1], **arguments)
    survivors_lose_their_peer(outcomes, 1)


@pytest.mark.parametrize(
    ("kind", "victim", "error"),
    [
        ("SystemExit", 1, "SystemExit: 3"),
        ("raise", 1, "ArithmeticError: attention of 1.0 failed"),
        pytest.param("raise", 2, "ArithmeticError: attention of 2.0 failed", marks=pytest.mark.slow),
        ("wrong dtype", 1, "ValueError"),
        ("wrong rows", 1, "ValueError"),
    ],
)
def test_a_rank_that_fails_tells_the_others(kind: str, victim: int, error: str, tmp_path: Path) -> None:
    outcomes = run(fault, 3, tmp_path, 20.0, kind=kind, victim=victim)
    survivors_lose_their_peer(outcomes, victim, timeout_seconds=0.0)
    assert outcomes[victim].exit_code == 1 and outcomes[victim].error.startswith(error), outcomes[victim].log
    if kind == "wrong dtype":
        assert "torch.float64" in outcomes[victim].error
    if kind == "wrong rows":
        assert "'residual'" in outcomes[victim].error and f"but got torch.float32[{2}" in outcomes[victim].error
    for number, outcome in enumerate(outcomes):
        assert number == victim or f"rank {victim} failed ({error.partition(':')[0]})" in outcome.error

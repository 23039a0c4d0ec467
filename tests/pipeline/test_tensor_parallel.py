"""Two stages of two ranks each: what of a tensor travels, where it lands and is gathered, and who hears of a loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from handoff_ranks import (
    PROXIES,
    SILENCE_SECONDS,
    all_well,
    fault,
    other_siblings,
    run,
    steady,
    survivors_lose_their_peer,
)

pytestmark = [pytest.mark.compat, pytest.mark.process]


@pytest.mark.parametrize(("layout", "share"), [("replicated", 1), ("scattered", 2)])
def test_tensors_arrive_whole_in_landing_memory(layout: str, share: int, tmp_path: Path) -> None:
    options = {"tensor_parallel_size": 2, "layout": layout, "microbatches": 40, "delay_seconds": 0.003}
    outcomes = all_well(run("p2p", steady, 4, tmp_path, **options))
    tokens = sum(num_tokens for num_tokens, _ in outcomes[0].value["seen"])
    proxy_bytes, feedback_bytes = tokens * PROXIES.bytes_per_token() // share, tokens * 8
    for rank, outcome in enumerate(outcomes):
        is_first, stats, observed = rank < 2, outcome.value["stats"], outcome.value["observed"]
        assert stats["bytes_sent"] == (proxy_bytes if is_first else feedback_bytes)
        assert stats["bytes_received"] == (feedback_bytes if is_first else proxy_bytes)
        assert observed["receives"] == stats["recvs"] == 40 * (1 if is_first else 2)
        assert observed["gathers"] == (0 if is_first or layout == "replicated" else 2 * 40)
        assert (observed["outside"], observed["gathers_elsewhere"], observed["pickles"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("differs", "what"),
    [
        ("buckets of rank 3", "buckets_tokens is [1, 2, 4, 8, 16] on ranks 0, 1, 2, [1, 16] on rank 3"),
        ("no groups on stage 1", "tensor_parallel_size is 2 on rank {first}, 1 on rank {second}"),
    ],
)
def test_all_ranks_refuse_plans_that_differ(differs: str, what: str, tmp_path: Path) -> None:
    outcomes = run("p2p", other_siblings, 4, tmp_path, tensor_parallel_size=2, differs=differs)
    for rank, outcome in enumerate(outcomes):
        assert outcome.error == "PlanMismatch" and outcome.exit_code != 0, outcome.log
        assert what.format(first=rank % 2, second=rank % 2 + 2) in outcome.message


@pytest.mark.parametrize("victim", [1, 2])
@pytest.mark.parametrize("kind", ["SIGKILL", "SIGSTOP"])
def test_a_loss_in_one_pipeline_is_told_to_the_other(kind: str, victim: int, tmp_path: Path) -> None:
    """Nobody waits on in a gather for a rank that will not come."""
    options = {"tensor_parallel_size": 2, "layout": "scattered", "kind": kind, "victim": victim}
    outcomes = run("p2p", fault, 4, tmp_path, SILENCE_SECONDS, **options)
    for outcome in survivors_lose_their_peer(outcomes, victim, SILENCE_SECONDS):
        assert f"rank {victim}" in outcome.message

"""One suite for every transport: order, contents, stopping, misuse, and what happens when a stage is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from handoff_ranks import (
    PROXIES,
    SILENCE_SECONDS,
    all_well,
    early_end,
    exchange_with_a_dead_rank,
    fault,
    further_exchanges,
    headers_ahead,
    holds_up_its_threads,
    misuse,
    other_plans,
    run,
    sends_while_idle_receiver_dies,
    slow_first_stage,
    slow_last_stage,
    steady,
    survivors_lose_their_peer,
)

pytestmark = pytest.mark.compat

TRANSPORTS = (
    "local",  # between threads
    *(pytest.param(name, marks=pytest.mark.process) for name in ("p2p", "shared_memory")),
    *(pytest.param(name, marks=[pytest.mark.process, pytest.mark.cuda]) for name in ("cuda_ipc", "nccl")),
)

every_transport = pytest.mark.parametrize("transport", TRANSPORTS)
between_processes = pytest.mark.parametrize("transport", TRANSPORTS[1:])


# ------------------------------------------------------------------------------- what goes right


@every_transport
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_micro_batches_arrive_in_order_and_whole(transport: str, stages: int, tmp_path: Path) -> None:
    outcomes = all_well(run(transport, steady, stages, tmp_path, microbatches=40, delay_seconds=0.003))
    seen = outcomes[0].value["seen"]
    assert len({num_tokens for num_tokens, _ in seen}) > 8
    assert all([*map(tuple, outcome.value["seen"])] == [*map(tuple, seen)] for outcome in outcomes)

    tokens = sum(num_tokens for num_tokens, _ in seen)
    for number, outcome in enumerate(outcomes):
        is_first, is_last = number == 0, number == stages - 1
        stats = outcome.value["stats"]
        assert stats["headers"] == 2 * 40
        assert stats["sends"] == 40 * (1 if is_last else 2)
        assert stats["recvs"] == 40 * (1 if is_first else 2)
        assert stats["bytes_sent"] == tokens * (8 if is_last else PROXIES.bytes_per_token())
        assert stats["bytes_received"] == tokens * (8 if is_first else PROXIES.bytes_per_token())


@pytest.mark.process
def test_every_receive_lands_in_the_given_memory_and_nothing_is_pickled(tmp_path: Path) -> None:
    outcomes = all_well(run("p2p", steady, 3, tmp_path, microbatches=50))
    for outcome in outcomes:
        observed, stats = outcome.value["observed"], outcome.value["stats"]
        assert observed["receives"] == stats["recvs"] > 0
        assert observed["header_receives"] > 0
        assert (observed["outside"], observed["pickles"], observed["object_calls"]) == (0, 0, 0)


@every_transport
def test_headers_run_ahead_of_the_data(transport: str, tmp_path: Path) -> None:
    assert [o.value for o in all_well(run(transport, headers_ahead, 2, tmp_path))] == [[3, 1, 5]] * 2


@every_transport
@pytest.mark.parametrize("scenario", [slow_first_stage, slow_last_stage])
def test_a_slow_stage_is_not_taken_for_lost(transport: str, scenario: object, tmp_path: Path) -> None:
    on_a_gpu = transport in ("cuda_ipc", "nccl")  # there kernels are loaded with the GIL held, longer on a busy host
    outcomes = run(transport, scenario, 3, tmp_path, silence_seconds=3.0 if on_a_gpu else 1.0)
    assert [outcome.value for outcome in all_well(outcomes)] == [2, 2, 2]


@between_processes
def test_a_stage_that_said_that_it_is_busy_may_be_silent(transport: str, tmp_path: Path) -> None:
    outcomes = run(transport, holds_up_its_threads, 2, tmp_path, silence_seconds=1.0, says_so=True)
    assert [outcome.value for outcome in all_well(outcomes)] == [1, 1]


@between_processes
def test_a_stage_that_did_not_say_so_is_lost(transport: str, tmp_path: Path) -> None:
    first, _ = run(transport, holds_up_its_threads, 2, tmp_path, silence_seconds=1.0, says_so=False)
    assert first.error == "PeerLost" and "has sent nothing for 1 s" in first.message


@every_transport
def test_the_last_stage_can_ask_for_an_early_end(transport: str, tmp_path: Path) -> None:
    counts = [outcome.value for outcome in all_well(run(transport, early_end, 3, tmp_path))]
    assert len(set(counts)) == 1 and counts[0] >= 3


# ------------------------------------------------------------------------------- what goes wrong


@every_transport
def test_ranks_can_exchange_texts_again(transport: str, tmp_path: Path) -> None:
    outcomes = all_well(run(transport, further_exchanges, 3, tmp_path))
    expected = [[f"{number} of {stage}" for stage in range(3)] for number in range(3)]
    assert [outcome.value for outcome in outcomes] == [expected] * 3


@between_processes
def test_a_rank_that_dies_in_an_exchange_is_lost_to_all(transport: str, tmp_path: Path) -> None:
    outcomes = run(transport, exchange_with_a_dead_rank, 2, tmp_path)
    survivors_lose_their_peer(outcomes, 1, silence_seconds=0.0)


@every_transport
def test_misuse_is_refused_before_anything_is_on_the_wire(transport: str, tmp_path: Path) -> None:
    first, second = all_well(run(transport, misuse, 2, tmp_path))
    expected = [
        ("17 tokens was announced: expected 1 to 16", 0),
        ("0 tokens was announced", 0),
        ("has 25 bytes: at most 24", 0),
        ("micro-batch 1 was to be sent, but it is the turn of micro-batch 0", 0),
        ("expected", 0),
    ]
    assert len(first.value) == 8 and len(second.value) == 2
    assert all(text in said for (text, _), said in zip(expected[:4], first.value, strict=False))
    assert "'hidden_states' as contiguous torch.float32[3, 8], but got torch.float32[4, 8]" in first.value[4]
    assert "carries 'hidden_states', 'residual', but got 'hidden_states'" in first.value[5]
    assert "'residual' as contiguous torch.bfloat16[3, 2, 3], but got torch.float16" in first.value[6]
    assert "strides [1, 3]" in first.value[7]
    assert "micro-batch 1 was to be received, but it is the turn of micro-batch 0" in second.value[0]
    assert "but got torch.float32[4, 8]" in second.value[1]


@every_transport
def test_all_ranks_raise_the_same_error_when_plans_differ(transport: str, tmp_path: Path) -> None:
    outcomes = run(transport, other_plans, 3, tmp_path)
    assert {outcome.error for outcome in outcomes} == {"PlanMismatch"}
    (message,) = {outcome.message for outcome in outcomes}
    for difference in (
        "torch_version is",
        '"1.0" on rank 1',
        "buckets_tokens is [1, 2, 4, 8, 16] on ranks 0, 1, [1, 16] on rank 2",
        "outputs of rank 0 are",
        "torch.float16",
        "inputs of rank 1 are",
    ):
        assert difference in message
    assert all(outcome.exit_code != 0 for outcome in outcomes)


@between_processes
@pytest.mark.parametrize("victim", [0, 1, 3])
@pytest.mark.parametrize("kind", ["exit", "SIGKILL", "SIGSTOP"])
def test_a_rank_that_dies_or_stops_is_lost_to_all(kind: str, victim: int, transport: str, tmp_path: Path) -> None:
    outcomes = run(transport, fault, 4, tmp_path, SILENCE_SECONDS, kind=kind, victim=victim)
    for outcome in survivors_lose_their_peer(outcomes, victim, SILENCE_SECONDS):
        assert f"rank {victim}" in outcome.message
        assert ("silent" in outcome.message or "has sent nothing" in outcome.message) is (kind == "SIGSTOP")


@between_processes
def test_without_feedback_a_loss_travels_along_the_chain(transport: str, tmp_path: Path) -> None:
    outcomes = run(transport, fault, 4, tmp_path, SILENCE_SECONDS, kind="SIGSTOP", victim=3, no_feedback=True)
    lost = survivors_lose_their_peer(outcomes, 3, SILENCE_SECONDS)
    assert "rank 3 failed (silent), as rank 1 reports" in lost[0].message


@between_processes
def test_long_silence_is_allowed_but_death_is_noticed_at_once(transport: str, tmp_path: Path) -> None:
    outcomes = run(transport, fault, 3, tmp_path, silence_seconds=50.0, kind="SIGKILL", victim=1)
    survivors_lose_their_peer(outcomes, 1, silence_seconds=0.0)


@between_processes
def test_a_rank_in_code_of_its_own_learns_of_a_loss(transport: str, tmp_path: Path) -> None:
    outcomes = run(transport, sends_while_idle_receiver_dies, 2, tmp_path, silence_seconds=20.0)
    (first,) = survivors_lose_their_peer(outcomes, 1, silence_seconds=0.0)
    assert "announcing micro-batch 0 (1 tokens)" in first.message


@every_transport
@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("wrong n", "has number of tokens 17, expected 1 to 16"),
        ("wrong bucket", "has bucket of 5 tokens 16, expected 8"),
        ("wrong plan", "has plan "),
        ("wrong order", "has sequence number 5, expected 4"),
        ("wrong rank", "has rank 8, expected 1"),
    ],
)
def test_a_rank_that_breaks_the_plan_is_lost(transport: str, kind: str, what: str, tmp_path: Path) -> None:
    outcomes = run(transport, fault, 3, tmp_path, 20.0, kind=kind, victim=1)
    survivors_lose_their_peer(outcomes, 1, silence_seconds=0.0)
    assert outcomes[1].error == "PeerLost"
    assert f"rank 1 does not keep to the plan: its header {what}" in outcomes[2].message
    assert "rank 1 failed (bad header)" in outcomes[0].message


@every_transport
def test_a_rank_whose_step_raises_tells_the_others(transport: str, tmp_path: Path) -> None:
    outcomes = run(transport, fault, 4, tmp_path, 20.0, kind="raise", victim=2)
    assert outcomes[2].error == "ArithmeticError"
    for outcome in survivors_lose_their_peer(outcomes, 2, silence_seconds=0.0):
        assert "rank 2 failed (ArithmeticError)" in outcome.message


def test_a_stage_that_hangs_up_is_lost_to_all_threads(tmp_path: Path) -> None:
    outcomes = run("local", fault, 3, tmp_path, 20.0, kind="hang up", victim=1)
    survivors_lose_their_peer(outcomes, 1, silence_seconds=0.0)

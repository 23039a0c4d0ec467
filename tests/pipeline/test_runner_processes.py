"""The runner with real processes over gloo: steady state, seen by observers, feedback, and ranks that leave early."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import pp_piecewise_backend as ppb
from runner_ranks import (
    TIMEOUT_SECONDS,
    all_well,
    autoregressive,
    group_inputs,
    in_one_process,
    leaves,
    own_inputs,
    paused,
    run,
    sizes,
    steady,
)
from tiers import slow_but

pytestmark = [
    pytest.mark.process,
    pytest.mark.usefixtures("fresh_backend", "no_gradients"),
]


@pytest.fixture
def many_stages_in_one_process() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


# ------------------------------------------------------------------------------- what goes right


@pytest.mark.usefixtures("many_stages_in_one_process")
@pytest.mark.parametrize(
    ("count", "transport", "microbatches"),
    slow_but(
        [(2, "p2p", 25), (2, "shared_memory", 25)],
        [(2, "p2p", 25), (2, "shared_memory", 25), (2, "p2p", 100), (4, "p2p", 100), (4, "shared_memory", 100)],
    ),
)
def test_nothing_lies_between_the_wire_and_captured_memory(
    count: int, transport: str, microbatches: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    in_one_program = microbatches < 100  # the slow ones have those that Dynamo makes
    if in_one_program:
        request.getfixturevalue("one_program")
    num_layers = 1 if in_one_program else 2
    chosen = sizes(microbatches)
    options = {"microbatches": microbatches, "num_layers": num_layers, "transport": transport}
    options["in_one_program"] = in_one_program
    outcomes = all_well(run(steady, count, tmp_path, **options))
    for number, outcome in enumerate(outcomes):
        is_first, is_last = number == 0, number == count - 1
        counted, observed = outcome.value["counted"], outcome.value["observed"]
        for name in ("proxy_copies", "recv_allocations", "pickles", "graph_misses"):
            assert counted[name] == 0, (number, name, counted[name])
        assert counted["programs"] == counted["stage_input_copies"] == 0
        assert counted["direct_entries"] == microbatches
        assert counted["microbatches"] == microbatches and counted["replays"] == (num_layers + 1) * microbatches
        assert counted["stage_inputs_in_place"] == (0 if is_first else 2 * microbatches)

        # Now without our counters. The first rank receives next tokens, in as many places as the reader has.
        assert (observed["pickles"], observed["object_calls"]) == (0, 0)
        if transport == "shared_memory":
            # The one write per tensor goes into landing memory of the next rank, and nothing is received elsewhere.
            assert observed["writes"] == microbatches * (1 if is_last else 2)
            assert (observed["writes_elsewhere"], observed["receives"]) == (0, 0)
            assert outcome.value["is_landing_shared"] == [True] * (0 if is_first else 2)
        else:
            assert observed["receives"] == microbatches * (1 if is_first else 2)
            assert observed["writes"] == 0
            if is_first:
                assert len(outcome.value["receive_addresses"]) <= 2 * count
            else:
                assert observed["outside"] == 0
                assert outcome.value["receive_addresses"] == outcome.value["landing_addresses"]
        assert outcome.value["copies_of_proxies"] == []
        assert outcome.value["ops"] > outcome.value["other_copies"] > 0, "a mode that sees nothing proves nothing"
        if not is_last:
            assert 2 <= outcome.value["sent_storages"] <= 2 * 3, "results lie in static memory of three buckets"

    forward = in_one_process(count, num_layers)
    with ppb.expect(graph_misses=0, programs=0, replays=(num_layers + 1) * count * microbatches):
        logits, told = [], []
        for step, num_tokens in enumerate(chosen):
            tag = str(step).encode()
            results = forward(lambda index, n=num_tokens, tag=tag: own_inputs(index == 0, n, tag))
            logits.append(results["logits"].clone())
            told.append([tag.decode(), results["next_tokens"].tolist()])
    assert outcomes[0].value["told"] == told
    received = torch.load(tmp_path / f"logits_{count - 1}.pt")
    assert len(received) == microbatches
    for step, (got, expected) in enumerate(zip(received, logits, strict=True)):
        assert torch.equal(got, expected), f"micro-batch {step} of {chosen[step]} tokens"


@pytest.mark.usefixtures("many_stages_in_one_process", "one_program")
@pytest.mark.slow  # the default tier has the demo, whose tokens come back over processes
@pytest.mark.parametrize("groups", [1, 3])
def test_next_tokens_come_back_with_as_many_in_flight_as_allowed(groups: int, tmp_path: Path) -> None:
    steps = 5
    outcomes = all_well(run(autoregressive, 2, tmp_path, groups=groups, steps=steps))
    assert [outcome.value["started"] for outcome in outcomes] == [groups * steps] * 2
    for outcome in outcomes:
        assert set(outcome.value["counted"].values()) == {0}, outcome.value["counted"]

    forward = in_one_process(2, num_layers=1)
    for group in range(groups):
        tokens = [[group]]
        for position in range(steps):
            ids, tag = torch.tensor(tokens[-1]), f"{group} {position}".encode()
            results = forward(lambda index, ids=ids, tag=tag: group_inputs(index == 0, tag, ids))
            tokens.append(results["next_tokens"].tolist())
        assert outcomes[0].value["tokens"][str(group)] == tokens


def test_a_first_stage_with_nothing_to_do_is_not_taken_for_lost(tmp_path: Path) -> None:
    outcomes = all_well(run(paused, 3, tmp_path, TIMEOUT_SECONDS))
    assert [outcome.value for outcome in outcomes] == [2, 2, 2]


@pytest.mark.parametrize(
    ("victim", "how"),
    slow_but(
        [(0, "close"), (1, "close before run"), (2, "break")],
        itertools.product([0, 1, 2], ["break", "close", "close before run"]),
    ),
)
def test_a_rank_that_leaves_early_ends_all_in_order(victim: int, how: str, tmp_path: Path) -> None:
    outcomes = all_well(run(leaves, 3, tmp_path, victim=victim, how=how))
    passed = [outcome.value for outcome in outcomes]
    if how == "close before run":
        assert passed[victim] == 0
    else:
        assert passed[victim] == 3 and all(other >= 3 for other in passed[:victim])
        assert passed == sorted(passed, reverse=True), "no stage runs what the one before did not"

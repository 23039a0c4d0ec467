"""Stages in threads with full graphs, asked for or by default: two proxies, decode and prefill sizes in turn."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import pp_piecewise_backend as ppb
from captured import DEVICES
from models.small_pipeline import OPTIONS, one_after_the_other, one_layer
from pp_piecewise_backend.runtime.ownership import Boundary, find_boundary
from pp_piecewise_backend.runtime.warmup import PROOFS
from stages_in_threads import all_well, in_threads, play_all

pytestmark = pytest.mark.usefixtures("fresh_backend", "one_program")

FULL = {
    **OPTIONS,
    "mode": "full_and_piecewise",
    "full_max_tokens": 4,
    "capture_sizes": "1,2,3,4,8",
    "graph_safe_ops": "toy::*",
}


def mixed(count: int, largest: int = 8) -> list[int]:
    return random.Random(0).choices([n for n in (1, 2, 3, 4, 5, 6, 8) if n <= largest], k=count)


def compare_with_eager(chosen: list[int], device: str = "cpu", options: dict[str, Any] = FULL) -> list[dict[str, Any]]:
    """The counters of each of three stages, once the outputs were found equal."""
    outcomes = all_well(in_threads(3, play_all(chosen), options=options, delay_seconds=0.004, device=device))
    outputs, _ = outcomes[-1]
    assert len(outputs) == len(chosen)
    full = sum(n <= 4 for n in chosen)
    assert ppb.stats().replays == 3 * (full + 2 * (len(chosen) - full))
    assert ppb.stats().graph_misses == 0
    torch._dynamo.reset()
    ppb.reset()
    expected = one_after_the_other(chosen, 3, None, device, one_layer)
    for got, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(got["logits"], wanted["logits"], rtol=1e-4, atol=1e-4)
        assert torch.equal(got["next_tokens"], wanted["next_tokens"])
    return [stats for _, stats in outcomes]


@pytest.mark.parametrize("is_asked_for", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_results_are_those_of_eager_in_both_kinds_of_graphs(device: str, is_asked_for: bool) -> None:
    chosen = mixed(60)
    options = FULL if is_asked_for else {name: value for name, value in FULL.items() if name != "mode"}
    for stage, stats in enumerate(compare_with_eager(chosen, device, {**options, "strict": True})):
        assert stats["proxy_copies"] == 0
        # What is compared reads it again at the end.
        compared = sum(min(chosen.count(n), PROOFS) for n in (1, 2, 3, 4))
        assert stats["early_releases"] == (0 if stage == 0 else len(chosen) - compared)


def test_a_full_graph_waits_for_the_send_of_the_results_that_it_overwrites(monkeypatch: pytest.MonkeyPatch) -> None:
    compare_with_eager(mixed(60, largest=4))
    ppb.reset()
    torch._dynamo.reset()
    monkeypatch.setattr(ppb.StageRunner, "results_are_written", lambda self: None)
    with pytest.raises(AssertionError):
        compare_with_eager(mixed(60, largest=4))


def test_a_full_graph_that_declares_landing_memory_free_before_it_gives_wrong_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def too_early(split: Any, table: Any) -> Boundary:
        found = find_boundary(split, table)
        if found.last_reader is None or sum(piece.kind == "compute" for piece in split.pieces) > 1:
            return found
        return Boundary(found.last_reader - 1, found.first_writer, found.landing_storages)

    monkeypatch.setattr("pp_piecewise_backend.runtime.capture_plan.find_boundary", too_early)
    with pytest.raises(AssertionError):
        compare_with_eager(mixed(60, largest=4))

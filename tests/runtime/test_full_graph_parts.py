"""Full graphs in parts: landing memory is overwritten, and results are looked at, as soon as the listener is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_early_release import CASES, attend, plain
from test_results_in_flight import told_last
from torch import Tensor

import pp_piecewise_backend as ppb
from captured import DEVICES
from pp_piecewise_backend.runtime import program as programs
from pp_piecewise_backend.runtime.bucket import GRAPH_POOL, OUTPUT_POOL, BucketCapture
from pp_piecewise_backend.runtime.instructions import Notices
from pp_piecewise_backend.runtime.ownership import LandingWatch

pytestmark = pytest.mark.usefixtures("fresh_backend")

LIBRARY = torch.library.Library("partstest", "DEF")
LIBRARY.define("same(Tensor x) -> Tensor")
LIBRARY.impl("same", lambda x: x, "CompositeExplicitAutograd")
LIBRARY.impl("same", lambda x: torch.empty_like(x), "Meta")


def full_graphs() -> list[Any]:
    (program,) = ppb.programs()
    assert program.full is not None
    return [graph for bucket, _ in program.full.buckets for graph in bucket.graphs.values()]


def two_results(self: Any, hidden_states: Tensor, residual: Tensor) -> Any:
    x = attend(hidden_states @ self.w + residual)
    x = attend(x @ self.w)
    return x @ self.w, x + 1


forwards = pytest.mark.parametrize("forward", [*CASES, two_results], ids=lambda forward: forward.__name__)


@forwards
@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("device", DEVICES)
def test_results_are_right_and_stay_until_they_may_be_overwritten(
    forward: Callable[..., Any], compiler: str, device: str
) -> None:
    told = told_last(forward, device, compiler=compiler)
    assert sorted(told) == ["mark_landing_read", "results_are_written"]
    (program,) = ppb.programs()
    writes_at_once = program.boundary.first_writer == 0
    """Then its first part waits for the last results."""
    assert [len(graph.parts) for graph in full_graphs()] == [2 if writes_at_once else 3] * 2


def test_results_that_are_the_caller_s_are_no_part_of_their_own() -> None:
    assert told_last(plain, static_outputs=False) == ["results_are_written", "mark_landing_read"]
    assert [len(graph.parts) for graph in full_graphs()] == [2, 2]


def test_where_nobody_listens_a_graph_is_one_part() -> None:
    told_last(two_results, listens=False)
    assert [len(graph.parts) for graph in full_graphs()] == [1, 1]


# ------------------------------------------------------------------- without a defence, results are wrong


def test_a_mark_one_piece_too_early_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = programs._notices

    def too_early(split: Any, plan: Any) -> Notices | None:
        found = original(split, plan)
        assert found is not None
        shifted = {at - ("mark_landing_read" in told): told for at, told in found.before.items()}
        return replace(found, before=shifted)

    monkeypatch.setattr(programs, "_notices", too_early)
    with pytest.raises(AssertionError):
        told_last(plain)


@pytest.mark.parametrize("pool", [GRAPH_POOL, OUTPUT_POOL])
def test_results_in_the_pool_of_earlier_parts_are_overwritten(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BucketCapture, "_pool_after", lambda self, instruction, told: self._pool(pool))
    with pytest.raises(AssertionError, match="overwritten while they were sent"):
        told_last(two_results)


# --------------------------------------------------------------------------- what no op says


def hides_a_reader(self: Any, hidden_states: Tensor, residual: Tensor) -> Any:
    hidden = torch.ops.partstest.same(hidden_states)
    x = attend(residual @ self.w)
    return attend(x @ self.w) @ self.w + hidden


def hides_a_result(self: Any, hidden_states: Tensor, residual: Tensor) -> Any:
    x = attend(hidden_states @ self.w + residual)
    y = attend(attend(x @ self.w) @ self.w)
    return torch.ops.partstest.same(x), y @ self.w


def test_a_hidden_reader_of_landing_memory_keeps_it_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "mark_landing_read" not in told_last(hides_a_reader, clones=False)
    assert [len(graph.parts) for graph in full_graphs()] == [2, 2]
    torch._dynamo.reset()
    ppb.reset()
    monkeypatch.setattr(LandingWatch, "look_at", lambda self, values, specs: None)
    with pytest.raises(AssertionError):
        told_last(hides_a_reader, clones=False)


def test_a_result_that_hides_in_memory_of_an_earlier_piece_is_left_to_the_pieces() -> None:
    told_last(hides_a_result)
    (program,) = ppb.programs()
    assert program.full is not None and not full_graphs()
    obstacles = [reason for bucket, _ in program.full.buckets for reason in bucket.obstacles.values()]
    assert obstacles and all("memory of an earlier piece" in reason.sentence for reason in obstacles)
    assert ppb.stats().replays > 0

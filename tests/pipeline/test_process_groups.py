"""``StageRunner(group=...)`` takes in the ranks of the group and nobody else, and says how the user numbers them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import group_ranks
from rank_processes import run_ranks

pytestmark = [pytest.mark.process, pytest.mark.compat]


def run(scenario: Callable[..., Any], count: int, folder: Path, transport: str = "auto") -> list[Any]:
    """What each rank returned."""
    job = {"scenario": scenario.__name__, "transport": transport}
    ended = run_ranks("group_ranks:one_rank", count, folder, job)
    assert [end.exit_code for end in ended] == [0] * count, "\n".join(end.log for end in ended)
    return [json.loads((folder / f"value_{rank}.json").read_text()) for rank in range(count)]


WHAT_COMES = [8.0] * 3


@pytest.mark.parametrize("transport", ["auto", "p2p"])
def test_groups_of_the_user_work_before_between_and_after_runners(transport: str, tmp_path: Path) -> None:
    outside, *pipeline = run(group_ranks.in_a_group, 3, tmp_path, transport)
    assert outside == {"came": [], "sums": [True] * 4}
    for rank in pipeline:
        assert rank == {"came": [WHAT_COMES] * 2, "sums": [True] * 3}


@pytest.mark.parametrize("transport", ["auto", "p2p"])
def test_a_rank_outside_of_the_group_is_not_waited_for(transport: str, tmp_path: Path) -> None:
    assert run(group_ranks.never_looked_after, 3, tmp_path, transport) == [None, WHAT_COMES, WHAT_COMES]


@pytest.mark.parametrize("transport", ["auto", "p2p"])
def test_nor_is_one_outside_of_tensor_parallel_stages(transport: str, tmp_path: Path) -> None:
    assert run(group_ranks.tensor_parallel, 5, tmp_path, transport) == [None, *[WHAT_COMES] * 4]


def test_a_rank_that_does_not_come_is_named_as_the_user_does_and_may_come_later(tmp_path: Path) -> None:
    _, (said, came), (_, came_late) = run(group_ranks.comes_late, 3, tmp_path)
    assert said.startswith("rank 1 could not set up its pipeline of ranks 1, 2 within 1 s: rank 2 did not come. "), said
    assert came == came_late == WHAT_COMES


def test_a_rank_that_fails_is_named_as_the_user_does(tmp_path: Path) -> None:
    _, lost, failed = run(group_ranks.fails, 3, tmp_path)
    assert lost.startswith("PeerLost: the pipeline is broken: rank 2 failed (ArithmeticError)"), lost
    assert "rank 1 was " in lost and "rank 0" not in lost, lost
    assert failed == "ArithmeticError: the caller fails"

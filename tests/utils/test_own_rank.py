from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pp_piecewise_backend.utils.ranks import own_rank

pytestmark = pytest.mark.usefixtures("no_gradients", "fresh_backend")


@pytest.fixture
def rank_1_of_2() -> object:
    """Rank 1 of a group whose other rank is never asked."""
    dist.init_process_group("fake", rank=1, world_size=2, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def test_the_rank_of_the_process_group_beats_that_of_the_launcher(
    rank_1_of_2: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "5")
    assert own_rank() == 1


def test_without_a_process_group_the_launcher_says_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")
    assert own_rank() == 5
    monkeypatch.delenv("RANK")
    assert own_rank() == 0


def test_dumps_and_summaries_have_the_rank_of_the_process_group(rank_1_of_2: object, tmp_path: Path) -> None:
    """As in the workers of an engine, which have no launcher's variables."""
    options = {"compiler": "eager", "dump_dir": tmp_path}
    torch.compile(lambda x: x.sin() + 1, backend="pp_piecewise", options=options)(torch.ones(3))
    (summary,) = tmp_path.glob("rank_1/*/summary.json")
    assert json.loads(summary.read_text())["rank"] == 1

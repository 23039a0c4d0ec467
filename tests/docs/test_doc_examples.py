"""The programs in docs/examples do what they say; each checks its own results."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from checkout import CHECKOUT
from rank_processes import run_ranks

EXAMPLES = CHECKOUT / "docs" / "examples"
PIPELINE = EXAMPLES / "pipeline.py"
ALONE = {
    "plain_stage.py": "Layers#0: 5 compute pieces (3 distinct), 4 eager steps, 4 calls",
    "engine_stage.py": "12 tokens: replayed, and no proxy was copied",
    "huggingface_decoder.py": "as model.generate() says",
}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix == ".py"} == {*ALONE, PIPELINE.name}


@pytest.mark.usefixtures("fresh_backend")
@pytest.mark.parametrize("name", ALONE)
def test_in_one_process(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert ALONE[name] in capsys.readouterr().out


@pytest.mark.process
@pytest.mark.parametrize("count", [1, 2])
def test_pipeline(count: int, tmp_path: Path) -> None:
    ended = run_ranks("doc_ranks:one_rank", count, tmp_path, {"program": str(PIPELINE), "environment": {}})
    assert [rank.exit_code for rank in ended] == [0] * count, "\n".join(rank.log for rank in ended)
    assert all(f"rank {number}: 0 proxies copied" in rank.log for number, rank in enumerate(ended))
    assert (ended[0].log.count("as eager says") == 4) == (count > 1)

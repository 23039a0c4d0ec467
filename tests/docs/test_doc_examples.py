"""The programs in docs/examples do what they say; each checks its own results."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch

from checkout import CHECKOUT
from rank_processes import run_ranks

EXAMPLES = CHECKOUT / "docs" / "examples"
PIPELINE = EXAMPLES / "pipeline.py"
SCHEDULER = EXAMPLES / "scheduler.py"
ALONE = {
    "plain_stage.py": "Layers#0: 5 compute pieces (3 distinct), 4 eager steps, 4 calls",
    "engine_stage.py": "12 tokens: replayed, and no proxy was copied",
    "huggingface_decoder.py": "as model.generate() says",
}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix == ".py"} == {*ALONE, PIPELINE.name, SCHEDULER.name}


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


@pytest.mark.process
@pytest.mark.parametrize("count", [2, 3])
def test_scheduler(count: int, tmp_path: Path) -> None:
    ended = run_ranks("doc_ranks:one_rank", count, tmp_path, {"program": str(SCHEDULER), "environment": {}})
    assert [rank.exit_code for rank in ended] == [0] * count, "\n".join(rank.log for rank in ended)
    assert "10 prompts in" in ended[0].log and "each as eager says alone" in ended[0].log
    assert all(f"rank {number}: 0 graph misses, 0 proxies copied" in rank.log for number, rank in enumerate(ended))


@pytest.mark.slow  # two interpreters import torch
@pytest.mark.process
def test_scheduler_starts_its_ranks_itself() -> None:
    done = subprocess.run([sys.executable, str(SCHEDULER)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "each as eager says alone" in done.stdout, done.stdout + done.stderr


class OldestFirst:
    """A runner whose last stage answers each sequence with its slot."""

    def __init__(self) -> None:
        self.asked: deque[list[int]] = deque()

    def feedback(self) -> tuple[bytes, dict[str, torch.Tensor]]:
        return b"", {"next_tokens": torch.tensor(self.asked.popleft())}


@pytest.fixture(scope="module")
def scheduling() -> dict[str, Any]:
    return runpy.run_path(str(SCHEDULER))


def planned(scheduling: dict[str, Any], lengths: list[int], depth: int) -> list[tuple[Any, list[Any]]]:
    """The micro-batches for prompts of these lengths, with the parts in their tags."""
    sequences = [scheduling["Sequence"]([0] * length, length) for length in lengths]
    runner, taken = OldestFirst(), []
    for microbatch in scheduling["micro_batches"](runner, scheduling["Scheduler"](sequences, depth)):
        parts = scheduling["Part"].from_tag(microbatch.tag)
        slots = [part.slot for part in parts if part.yields]
        runner.asked.extend([slots] if microbatch.feedback else [])
        assert microbatch.feedback == bool(slots)
        taken.append((microbatch, parts))
    new_tokens = scheduling["NEW_TOKENS"]
    assert [len(sequence.tokens) for sequence in sequences] == [length + new_tokens for length in lengths]
    return taken


def test_scheduler_splits_decoding_sequences_evenly(scheduling: dict[str, Any]) -> None:
    taken = planned(scheduling, [1] * 8, depth=3)
    # 6 parts fit into a tag, so the prompts go out as 6 and 2; all 8 are in flight from then on, but for the last ones.
    rows = [microbatch.num_tokens for microbatch, _ in taken]
    assert rows[:2] == [6, 2]
    assert {*rows[2:10]} == {2, 3} and all(sum(rows[at : at + 3]) == 8 for at in range(2, 10))


def test_scheduler_keeps_to_its_budget_and_chunks_ask_for_nothing(scheduling: dict[str, Any]) -> None:
    most = scheduling["MAX_TOKENS"]
    taken = planned(scheduling, [2, 3 * most], depth=2)
    assert all(microbatch.num_tokens <= most for microbatch, _ in taken)
    # The short prompt fills up with the long one, and decodes while its chunks go on.
    chunks = [part for _, parts in taken for part in parts if part.slot == 1 and part.rows > 1]
    assert chunks[0].rows == most - 2 and len(chunks) == 4
    assert [part.yields for part in chunks] == [False, False, False, True]
    assert [part.start for part in chunks] == [0, *(sum(p.rows for p in chunks[:n]) for n in (1, 2, 3))]
    assert any(not microbatch.feedback for microbatch, _ in taken)
    assert any({part.slot for part in parts} == {0, 1} and not parts[-1].yields for _, parts in taken[1:])

"""Ranks that torchrun starts, and starts again when one of them has died."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from checkout import TESTS
from rank_processes import run_ranks

RANK = TESTS / "torchrun_rank.py"
LONGEST_SECONDS = 200.0
"""Three times torch is imported, one after the other; that takes long where many tests run at once."""


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(RANK.parent), str(RANK.parent.parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


def report(folder: Path, life: int, rank: int) -> Any:
    return json.loads((folder / f"life_{life}_rank_{rank}.json").read_text())


def test_ranks_that_torchrun_restarts_complete_in_their_second_life(tmp_path: Path) -> None:
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.05"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, str(RANK), str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LONGEST_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "life_0_rank_1.json").exists(), "rank 1 was to die in its first life"
    seen = [report(tmp_path, 1, rank)["value"]["seen"] for rank in range(2)]
    assert len(seen[0]) == 20 and seen[0] == seen[1]


def test_a_rank_that_lost_its_peer_ends_by_itself(tmp_path: Path) -> None:
    """Nobody ends it, and no thread keeps its interpreter from ending."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ended = run_ranks("torchrun_rank:one_rank", 2, tmp_path, {"port": port, "ends_itself": True})
    assert [rank.exit_code for rank in ended] == [1, 3], "\n".join(rank.log for rank in ended)
    assert report(tmp_path, 0, 0)["error"] == "PeerLost", ended[0].log

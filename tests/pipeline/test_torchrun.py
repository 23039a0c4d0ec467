"""Ranks that torchrun starts, and starts again when one of them has died; each in an interpreter of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from checkout import TESTS

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
        port = str(free.getsockname()[1])
    setting = environment(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_RESTART_COUNT="0")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(RANK), str(tmp_path)],
            env={**setting, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        logs = [process.communicate(timeout=LONGEST_SECONDS)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [1, 3], "\n".join(logs)
    assert report(tmp_path, 0, 0)["error"] == "PeerLost", logs[0]

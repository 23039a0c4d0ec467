"""What stands for ``integrations.ranks.run_ranks`` in tests: ranks that are forked, which start at once."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rank_processes import run_ranks


def forked(folder: Path) -> Callable[[str, int, Any, Callable[[int, Any], None]], None]:
    """What the ranks print goes to stderr, and what they emit is heard when all have ended."""

    def run(target: str, count: int, job: Any, on_event: Callable[[int, Any], None]) -> None:
        own = folder / f"ranks_{sum(1 for _ in folder.iterdir())}"
        own.mkdir()
        for ended in run_ranks("started_in_tests:one_rank", count, own, {"target": target, "job": job}):
            print(ended.log, file=sys.stderr)
            assert ended.exit_code == 0, ended.log
        for rank in range(count):
            for line in (own / f"events_{rank}").read_text().splitlines():
                on_event(rank, json.loads(line))

    return run


def one_rank(rank: int, count: int, folder: Path, job: Mapping[str, Any]) -> int:
    module, _, function = job["target"].partition(":")
    run = getattr(importlib.import_module(module), function)
    with (folder / f"events_{rank}").open("w") as events:
        run(rank, count, folder, job["job"], lambda event: events.write(json.dumps(event) + "\n"))
    return 0

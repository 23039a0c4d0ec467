"""The demo's ranks in processes that are forked instead of spawned."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pp_piecewise_backend.demo.rank import Job, RankReport, read_reports, run_rank
from rank_processes import run_ranks


def forked(folder: Path) -> Callable[[Job], list[RankReport]]:
    """What stands for ``demo.rank.run_ranks``; what the ranks print goes to stderr."""

    def run(job: Job) -> list[RankReport]:
        for ended in run_ranks("demo_ranks:one_rank", job.ranks, folder, job.model_dump()):
            print(ended.log, file=sys.stderr)
            assert ended.exit_code == 0
        return read_reports(job, folder)

    return run


def one_rank(rank: int, count: int, folder: Path, job: Mapping[str, Any]) -> int:
    run_rank(rank, Job.model_validate(job), folder)
    return 0

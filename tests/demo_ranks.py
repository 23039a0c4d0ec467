"""The demo's ranks in processes that are forked instead of started by torchrun's launcher."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pp_piecewise_backend.demo import rank as demo_rank
from pp_piecewise_backend.demo.job import Job, RankReport, report_path
from rank_processes import run_ranks


def forked(folder: Path) -> Callable[[Job], list[RankReport]]:
    """What stands for ``demo.job.run_ranks``; what the ranks print goes to stderr."""

    def run(job: Job) -> list[RankReport]:
        (folder / "job.json").write_text(job.model_dump_json())
        for ended in run_ranks("demo_ranks:one_rank", job.ranks, folder, {}):
            print(ended.log, file=sys.stderr)
            assert ended.exit_code == 0
        return [RankReport.model_validate_json(report_path(folder, r).read_text()) for r in range(job.ranks)]

    return run


def one_rank(rank: int, count: int, folder: Path, job: Mapping[str, Any]) -> int:
    init_process_group, store = dist.init_process_group, dist.FileStore(str(folder / "rendezvous"), count)
    dist.init_process_group = lambda backend: init_process_group(backend, store=store, rank=rank, world_size=count)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count))
    sys.argv[1:] = [str(folder / "job.json"), str(folder)]
    demo_rank.main()
    return 0

"""One rank of a program from the documents, as torchrun would start it."""

from __future__ import annotations

import os
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def one_rank(rank: int, count: int, folder: Path, job: Mapping[str, Any]) -> int:
    import torch.distributed as dist

    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(count), **job["environment"]})
    store = dist.FileStore(str(folder / "rendezvous"), count)
    init_process_group = dist.init_process_group
    # A file instead of torchrun's port: no two tests can meet there.
    dist.init_process_group = lambda backend: init_process_group(backend, store=store, rank=rank, world_size=count)
    runpy.run_path(job["program"], run_name="__main__")
    return 0

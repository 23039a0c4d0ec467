"""A job for the demo's ranks, which run as processes on this machine, and what each reports; both are JSON files."""

from __future__ import annotations

import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

from pydantic import BaseModel


class Job(BaseModel, frozen=True):
    """Prompts to continue greedily with a pipeline of ``ranks`` stages."""

    model_dir: str
    ranks: int
    device: str
    """``cpu`` or ``cuda`` (one GPU per rank)."""
    options: dict[str, str]
    """Those of the backend."""
    prompts: list[list[int]]
    """Tokens; all rows have the same length."""
    max_new_tokens: int
    end_tokens: list[int]
    """A row that generated one of these is finished."""


class RankReport(BaseModel, frozen=True):
    """What one rank did."""

    rank: int
    layers: list[int]
    counters: dict[str, Any]
    """``ppb.stats()``, in which the calls of the warm-up do not count."""
    eager_parts: dict[str, int]
    """How often which ops run eagerly between the compiled pieces, and why; layers that differ only in their
    number count as one."""
    calls: int
    calls_without_program: int
    """Calls of the stage in which the backend's program did not run (Dynamo fell back to plain Python)."""
    load_seconds: float
    compile_seconds: float
    generate_seconds: float
    generated: list[list[int]] | None
    """New tokens per prompt, the end token included; on the first and the last rank, which know them."""


def report_path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.json"


class RankFailed(RuntimeError):
    """A rank ended with an error; the others were stopped."""


def run_ranks(job: Job) -> list[RankReport]:
    """Runs ``job.ranks`` processes to their end, with a rendezvous on this machine only.

    Their output goes to this process's. Raises `RankFailed` when one fails.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="pp_piecewise_demo_") as name:
        folder = Path(name)
        job_path = folder / "job.json"
        job_path.write_text(job.model_dump_json())
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=job.ranks,
            run_id=str(uuid.uuid4()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=name),
        )
        command = ["-m", "pp_piecewise_backend.demo.rank", str(job_path), name]
        try:
            elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            raise RankFailed(
                f"rank {rank} of {job.ranks} failed with exit code {failure.exitcode}: {_last_line(failure.message)}"
            ) from error
        texts = [report_path(folder, rank).read_text() for rank in range(job.ranks)]
        return [RankReport.model_validate_json(text) for text in texts]


def _last_line(message: object) -> str:
    text = message.get("message", "") if isinstance(message, dict) else message
    return str(text).strip().rpartition("\n")[2]

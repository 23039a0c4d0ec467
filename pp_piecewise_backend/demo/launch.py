"""Starts the demo's ranks on this machine with torchrun's machinery and collects their reports."""

from __future__ import annotations

import sys
import tempfile
import uuid
from pathlib import Path

from .job import Job, RankReport


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
        job.write(folder / "job.json")
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
        command = ["-m", "pp_piecewise_backend.demo.rank", str(folder / "job.json"), name]
        try:
            elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            raise RankFailed(
                f"rank {rank} of {job.ranks} failed with exit code {failure.exitcode}: {_last_line(failure.message)}"
            ) from error
        return [RankReport.read(folder, rank) for rank in range(job.ranks)]


def _last_line(message: object) -> str:
    text = message.get("message", "") if isinstance(message, dict) else message
    return str(text).strip().rpartition("\n")[2]

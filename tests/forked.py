"""Programs in a process of their own that need no import of torch: forked from the server of ``rank_processes``."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rank_processes import Ended, run_ranks


def run_program(
    program: Path, *arguments: str, environment: Mapping[str, str] | None = None, ends_itself: bool = False
) -> Ended:
    """Run a Python file as a script: how it ended, and all that it printed.

    Args:
        environment: set before ``torch`` sets up its logs again, as it does when it is imported.
        ends_itself: by the ordinary end of the interpreter, and not by ``os._exit``.
    """
    job = {"program": str(program), "arguments": arguments, "environment": dict(environment or {})}
    (ended,) = run_ranks("forked:one_rank", 1, program.parent, {**job, "ends_itself": ends_itself})
    return ended


def one_rank(rank: int, count: int, folder: Path, job: Mapping[str, Any]) -> int:
    import torch._logging._internal

    os.environ.update(job["environment"])
    torch._logging._internal.LOG_TRACE_HANDLER = None
    torch._logging._internal._init_logs()
    sys.argv[:] = [job["program"], *job["arguments"]]
    sys.path.insert(0, str(folder))
    try:
        runpy.run_path(job["program"], run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0

"""What ranks do that ``test_ranks.py`` starts; each takes what ``integrations.ranks`` calls its targets with."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from pp_piecewise_backend.errors import PeerLost
from pp_piecewise_backend.integrations.ranks import Emit


def count_up(rank: int, count: int, folder: Path, job: Any, emit: Emit) -> None:
    print("a line for people")
    for number in range(job["up_to"]):
        emit({"number": number, "of": count})


def raise_on_one(rank: int, count: int, folder: Path, job: Any, emit: Emit) -> None:
    if rank == 1:
        time.sleep(0.3)  # the others are first to say what it means for them
        raise KeyError("the cause")
    raise PeerLost("what follows")


def kill_one(rank: int, count: int, folder: Path, job: Any, emit: Emit) -> None:
    emit(os.getpid())
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)


def leave(rank: int, count: int, folder: Path, job: Any, emit: Emit) -> None:
    os._exit(3)


def sleep_with_a_child(rank: int, count: int, folder: Path, job: Any, emit: Emit) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # and so needs to be killed
    child = subprocess.Popen(["sleep", "3600"])
    emit([os.getpid(), child.pid])
    time.sleep(3600)

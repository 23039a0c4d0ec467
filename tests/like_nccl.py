"""Stand-ins for groups over NCCL, which end when a GPU lets them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pp_piecewise_backend.pipeline.transports import torch_distributed
from pp_piecewise_backend.pipeline.transports.torch_distributed import P2P


class Communicator:
    """One on whose transfers a GPU works until it is aborted.

    Args:
        behind: communicators that must be asked to abort for the streams of this one to go on.
        is_idle: nothing is under way.
        hangs: its last transfer never ends, whatever anybody does.
    """

    def __init__(self, behind: Sequence[Communicator] = (), is_idle: bool = False, hangs: bool = False) -> None:
        self.behind = behind
        self.asked = threading.Event()
        self.has_run = threading.Event()
        if is_idle:
            self.has_run.set()
        self.hangs = hangs
        self.calls: list[str] = []
        """What was called, and what of it has returned."""
        self.destroyed_by: list[str] = []
        """The thread in which this ended; it outlives this."""

    def name(self) -> str:
        return "nccl"

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 0

    def abort(self) -> None:
        self.calls.append("abort")
        self.asked.set()
        for other in self.behind:
            other.asked.wait()
        if not self.hangs:
            self.has_run.set()
        self.calls.append("aborted")

    def shutdown(self) -> None:
        self.calls.append("shutdown")
        if self.hangs:
            threading.Event().wait()
        self.has_run.wait()
        self.calls.append("shut down")

    def __del__(self) -> None:
        self.destroyed_by.append(threading.current_thread().name)


class GlooGroup(dist.ProcessGroupGloo):
    """Moves tensors over gloo, and is released like a group over NCCL. Its ranks are two."""

    releases = True
    """Whether it can be shut down at all."""

    def name(self) -> str:
        return "nccl"

    def abort(self) -> None:
        nothing = torch.zeros(1, dtype=torch.uint8)
        with contextlib.suppress(RuntimeError):
            self.recv([nothing], 1 - self.rank(), torch_distributed._BREAK).wait(timedelta(milliseconds=1))

    def shutdown(self) -> None:
        if not self.releases:
            threading.Event().wait()


class P2PLikeNccl(P2P):
    """Tensors on the CPU go as if they lay on a GPU."""

    def _new_group(self, name: str, rank: int, size: int, device_type: str) -> Any:
        if not name.startswith("tensors of "):
            return super()._new_group(name, rank, size, device_type)
        self._groups.append(GlooGroup(dist.PrefixStore(name, self._store), rank, size, self._setup))
        return self._groups[-1]

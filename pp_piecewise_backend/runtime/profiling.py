"""Names of steps for profilers: ``torch.profiler`` and NVTX show ``ppb.piece[3]`` and ``ppb.eager[attention]``.

A program asks ``profiler_is_running()`` once per call, and only then runs steps that ``named`` has wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ..compilation.split import Piece
from ..utils import torch_compat

Result = TypeVar("Result")

_ATTENTION = ("attention", "attn", "sdpa", "mla", "fmha")


def step_name(piece: Piece) -> str:
    """The name under which a profiler shows a step; it does not depend on the layer for eager steps."""
    if piece.kind == "compute":
        return f"ppb.piece[{piece.index}]"
    return f"ppb.eager[{eager_label(piece.ops)}]"


def eager_label(ops: Sequence[str]) -> str:
    """A short name for an eager step with these ops: "attention", else its last op."""
    names = [name.replace("::", ".").split(".")[-1] for name in ops]
    if any(word in name.lower() for name in names for word in _ATTENTION):
        return "attention"
    return names[-1] if names else "results"


def profiler_is_running() -> bool:
    """Whether someone would see the names: ``torch.profiler``, the autograd profiler or ``emit_nvtx``."""
    return torch_compat.profiler_is_enabled()


def named(call: Callable[..., Result], name: str) -> Callable[..., Result]:
    """The same callable, shown under a name by a profiler."""

    def run(*args: object) -> Result:
        with torch.profiler.record_function(name):
            return call(*args)

    return run

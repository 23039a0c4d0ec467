"""What the ranks of a pipeline are asked to generate, and what each says that it did; both as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

GROUPS_PER_RANK = 2
"""Micro-batches under way at once, for each rank."""


class Job(BaseModel, frozen=True):
    """Prompts to continue with a pipeline of ``ranks`` stages."""

    model_dir: str
    ranks: int
    layer_counts: list[int]
    """Layers of each rank's stage."""
    device: str
    """``cpu`` or ``cuda`` (one GPU per rank)."""
    options: dict[str, Any]
    """Those of the backend."""
    prompts: list[list[int]]
    """Tokens."""
    max_new_tokens: int
    end_tokens: list[int]
    """A sequence that generated one of these is finished."""
    max_tokens: int
    """Rows of a micro-batch, at most."""
    sequences: int = 1
    """Sequences of a micro-batch, at most."""
    dtype: str | None = None
    """Name of a torch dtype; None: as the weights are stored."""
    temperature: float = 0.0
    """0: the likeliest token; else tokens are drawn."""
    top_p: float = 1.0
    seed: int = 0
    trace: bool = False
    """Whether each rank notes what it does when."""

    @property
    def groups(self) -> int:
        """Micro-batches under way at once; the sequences of each have a cache of their own."""
        return min(GROUPS_PER_RANK * self.ranks, len(self.prompts))

    @property
    def max_cache_tokens(self) -> int:
        return max(map(len, self.prompts)) + self.max_new_tokens

    @staticmethod
    def rows(prompts: Sequence[Sequence[int]], ranks: int, sequences: int, max_tokens: int) -> tuple[int, int]:
        """Sequences and rows of a micro-batch, no more than these prompts can use: ``sequences, max_tokens``."""
        groups = min(GROUPS_PER_RANK * ranks, len(prompts))
        sequences = min(sequences, -(-len(prompts) // groups))
        return sequences, max(sequences, min(max_tokens, sequences * max(map(len, prompts))))


class RankReport(BaseModel, frozen=True):
    """What one rank did."""

    rank: int
    layers: list[int]
    counters: dict[str, Any]
    """``ppb.stats()``, in which the calls of the warm-up do not count."""
    eager_parts: dict[str, int]
    """How often which ops run eagerly between the compiled pieces, and why; layers that differ only in their
    number count as one."""
    load_seconds: float
    compile_seconds: float
    generate_seconds: float
    times: str
    """Where the time of all ranks went, and the verdict."""

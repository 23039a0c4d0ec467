"""Token buckets: which sizes graphs are captured for, and which of them a call of n tokens runs in. Integers only."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from ...config import SizeRange


@dataclass(frozen=True)
class Ladder:
    """Ascending bucket sizes, in tokens; the last one is the largest call that runs with graphs.

    Raises:
        ValueError: no sizes, sizes that do not ascend, or a size below 1.
    """

    sizes_tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = self.sizes_tokens
        if not sizes or sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
            raise ValueError(f"bucket sizes must ascend from at least 1, got {sizes}")

    @classmethod
    def from_ranges(cls, ranges: Iterable[SizeRange], max_tokens: int) -> Ladder:
        """The sizes of ``ranges`` below ``max_tokens``, and ``max_tokens`` itself, which is always the last."""
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        sizes: set[int] = {max_tokens}
        for r in ranges:
            last = max_tokens if r.last is None else min(r.last, max_tokens)
            sizes.update(range(r.first, last + 1, r.step))
        return cls(tuple(sorted(sizes)))

    @property
    def max_tokens(self) -> int:
        return self.sizes_tokens[-1]

    def bucket(self, num_tokens: int) -> int | None:
        """The smallest bucket that holds ``num_tokens`` tokens; None if none does."""
        if not 1 <= num_tokens <= self.max_tokens:
            return None
        return self.sizes_tokens[bisect_left(self.sizes_tokens, num_tokens)]

    def cut_at(self, max_tokens: int) -> Ladder:
        """The ladder for calls of at most ``max_tokens`` tokens, which becomes its last bucket."""
        if max_tokens >= self.max_tokens:
            return self
        return Ladder((*(size for size in self.sizes_tokens if size < max_tokens), max_tokens))

    def smallest_call(self, bucket: int) -> int:
        """The smallest number of tokens that runs in ``bucket``."""
        at = self.sizes_tokens.index(bucket)
        return self.sizes_tokens[at - 1] + 1 if at else 1

    def __str__(self) -> str:
        shown = [str(size) for size in self.sizes_tokens]
        if len(shown) > 8:
            shown = [*shown[:4], "...", *shown[-3:]]
        return ", ".join(shown)

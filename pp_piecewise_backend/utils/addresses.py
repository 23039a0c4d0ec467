"""What lies where: memory is told apart by its addresses, not by storage objects, several of which may hold one byte.

Slices of a numpy array, buffers, dlpack and shared memory make such storages.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch

Span: TypeAlias = tuple[int, int]
"""Addresses of the first byte of some memory, and of the first one after it; equal where there is none."""


def span(tensor: torch.Tensor) -> Span:
    """All memory of the tensor's storage, which views of it can reach; none for a tensor without elements."""
    if not tensor.numel():
        return 0, 0
    storage = tensor.untyped_storage()
    begin = storage.data_ptr()
    return begin, begin + storage.nbytes()


def overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


class MemoryMap:
    """Which storages lie where.

    Args:
        placed: spans, each with the number of the storage that, as the graph has it, lies there (None: no matter
            which). They may overlap.
    """

    def __init__(self, placed: Iterable[tuple[Span, int | None]] = ()) -> None:
        known = [(place, number) for place, number in placed if place[0] < place[1]]
        self._edges = sorted({edge for place, _ in known for edge in place})
        self._numbers: list[frozenset[int | None]] = [frozenset()] * len(self._edges)
        """Which storages lie between each edge and the next."""
        for (begin, end), number in known:
            for at in range(bisect_left(self._edges, begin), bisect_left(self._edges, end)):
                self._numbers[at] |= {number}

    def __bool__(self) -> bool:
        return bool(self._edges)

    @classmethod
    def of(cls, values: Iterable[Any]) -> MemoryMap:
        """Where the tensors among these values lie."""
        return cls((span(value), None) for value in values if isinstance(value, torch.Tensor))

    def numbers_in(self, place: Span) -> frozenset[int | None]:
        """Numbers of all storages that lie there, wholly or in part."""
        begin, end = place
        first = max(0, bisect_right(self._edges, begin) - 1)
        return frozenset().union(*self._numbers[first : bisect_left(self._edges, end)]) if begin < end else frozenset()

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor begins in this memory: all there is to ask where that was allocated by itself."""
        at = bisect_right(self._edges, tensor.data_ptr())
        return at > 0 and bool(self._numbers[at - 1])

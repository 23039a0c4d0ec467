"""Inputs that must not share memory: asked in each call, since no guard of Dynamo's tells when they do."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import product
from typing import Any

import torch

from ..compilation.placeholders import GraphInput
from ..utils.addresses import MemoryMap, Span, overlap, span
from .cudagraphs.memory import extent_bytes, geometry
from .instructions import picker


class Apart:
    """Inputs that are written, and inputs that must not lie in their memory unless they did when the graph was traced.

    Args:
        written, others: positions; one input may be among both.
        known: positions of those whose addresses callers tell.
    """

    def __init__(
        self, inputs: Sequence[GraphInput], written: Sequence[int], others: Sequence[int], known: Collection[int] = ()
    ) -> None:
        specs = {at: i.spec for at, i in enumerate(inputs) if i.spec is not None}
        # What outlives a call lies, as a rule, where it lay in the last one. It is looked at again where it moved.
        lasting = {at for at, spec in specs.items() if inputs[at].outlives_the_call and not spec.symbols}
        self._lasting = picker(sorted(lasting & {*written, *others} - {*known}))
        self._lasting_written = [(at, specs[at].storage) for at in written if at in lasting]
        self._lasting_others = [(at, specs[at].storage) for at in others if at in lasting]
        self._passed_written = [(at, specs[at].storage) for at in written if at not in lasting]
        self._passed_others = [(at, specs[at].storage) for at in others if at not in lasting]
        self._known: tuple[tuple[object, ...], MemoryMap, MemoryMap, bool] | None = None
        """Where lasting inputs lie, the maps of the written and the other ones, and whether these share memory."""
        self._smallest_bytes = 0
        """No written input is smaller; 0 where this is not known before the call."""
        if not self._passed_written and not self._lasting_others:
            sizes_bytes = [extent_bytes(*geometry(specs[at], {}), specs[at].dtype) for at in written]
            self._smallest_bytes = min(sizes_bytes, default=0)

    def are_broken(self, args: Sequence[Any], addresses: object = ()) -> bool:
        """Whether, in a call with these arguments, one lies in written memory in which it did not lie when traced.

        Args:
            addresses: equal to those of the last call if no ``known`` input moved.
        """
        if self._smallest_bytes and all(self._is_small(args[at]) for at, _ in self._passed_others):
            return False
        pointers = tuple(map(torch.Tensor.data_ptr, self._lasting(args)))
        known = self._known
        if known is None or known[0] != (addresses, pointers):
            others, in_written = _placed(args, self._lasting_others), MemoryMap(_placed(args, self._lasting_written))
            shares = any(not in_written.numbers_in(place) <= {number} for place, number in others)
            self._known = known = (addresses, pointers), in_written, MemoryMap(others), shares
        _, in_written, in_others, is_broken = known
        if is_broken:
            return True
        written = _placed(args, self._passed_written)
        others = _placed(args, self._passed_others)
        return (
            any(not in_written.numbers_in(place) <= {number} for place, number in others)
            or any(not in_others.numbers_in(place) <= {number} for place, number in written)
            or any(a != b and overlap(one, two) for (one, a), (two, b) in product(written, others))
        )

    def _is_small(self, tensor: torch.Tensor) -> bool:
        """Whether no written input lies in the tensor's memory, nor around it: PyTorch allocated all there is of it."""
        storage = tensor.untyped_storage()
        return storage.nbytes() < self._smallest_bytes and storage.resizable()


def _placed(args: Sequence[Any], numbered: Sequence[tuple[int, int]]) -> list[tuple[Span, int]]:
    return [(span(args[at]), number) for at, number in numbered]

"""Who holds landing memory and the memory of results, and when it changes hands.

Results belong to the caller: memory of their own, shared exactly where eager's results share theirs.

Note [early release]
The landing memory of a stage may be filled again as soon as the last step that reads it has run. Which step that is
follows from storages, not from who names the stage input: a slice that one piece returns and a later one reads keeps
the memory alive. The analysis says so; where a step that runs un-captured returns a tensor that lies in landing
memory although its facts say otherwise, the memory is released at the end of that call. Replayed pieces cannot do so:
their outputs have addresses of their own, and eager steps between them are given copies (see ``replay.py``). A full
graph was seen to do so or not when it was captured.

Note [undeclared sharing]
The graph says which values share a storage: each spec has its number, the declared storage. What runs may know better
or do otherwise: a compiler merges equal outputs, an op returns its argument although it says that it does not, a caller
passes one tensor twice, or two slices of one array. Two tensors share undeclared if the addresses of their storages
overlap although their declared storages differ (``MemoryMap``). About the inputs of a call, ``Apart`` asks that.

Note [static results that are kept]
The results of a stage that sends them stay where graphs write them, and the next call overwrites them. But what the
graph gives is more than what the module returns: Dynamo also puts new state where the module keeps it, in attributes
or in caches among the arguments. So each static result is lent as a tensor of its own, and once what is sent is sent,
those that are still alive are kept by somebody: they get memory of their own, before any code of the user runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from ..compilation.placeholders import GraphInput, InputTable
from ..compilation.split import Split
from ..utils.addresses import MemoryMap, Span, overlap, span
from .cudagraphs.memory import address, extent_bytes


@dataclass(frozen=True)
class Boundary:
    """Steps of one program, counted from 0."""

    last_reader: int | None
    """The last one that reads landing memory, itself or through a view; None where a result may lie there."""
    first_writer: int | None
    """The first one that makes memory in which results lie; None without any."""
    landing_storages: frozenset[int]
    """Numbers of the storages of the stage inputs."""


def find_boundary(split: Split, table: InputTable) -> Boundary:
    landing = frozenset(i.spec.storage for i in table.of_kind("stage-input") if i.spec is not None)
    readers = [
        piece.index
        for piece in split.pieces
        if any(getattr(spec, "storage", None) in landing for spec in piece.input_specs)
    ]
    results = {storage for storage in split.result_storages if storage is not None}
    writers = [
        piece.index
        for piece in split.pieces
        if any(spec is not None and spec.storage in results for spec in piece.output_specs)
    ]
    return Boundary(
        last_reader=max(readers) if readers and not results & landing else None,
        first_writer=min(writers, default=None),
        landing_storages=landing,
    )


def shares_undeclared(value: Any, storage: int | None, declared: MemoryMap) -> bool:
    """Whether a value lies in known memory that its declared storage does not lie in; see Note [undeclared sharing]."""
    if not isinstance(value, torch.Tensor):
        return False
    found = declared.numbers_in(span(value))
    return bool(found) and storage not in found


class LandingWatch:
    """Looks for steps whose outputs lie in landing memory although their facts say otherwise: they hide readers of it.

    See Note [early release].
    """

    def __init__(self, split: Split, boundary: Boundary, landing_spans: Sequence[Span]) -> None:
        self._split = split
        self._landing = MemoryMap(product(landing_spans, boundary.landing_storages))
        self.found = False

    def look_at(self, values: Iterable[Any], specs: Iterable[Any]) -> None:
        """``specs``: what is known of each value; None for what is no tensor."""
        self.found = self.found or any(
            shares_undeclared(value, None if spec is None else spec.storage, self._landing)
            for value, spec in zip(values, specs, strict=True)
        )

    def after_step(self, step: int, outputs: Sequence[Any]) -> None:
        """See ``run_steps``."""
        self.look_at(outputs, self._split.pieces[step].output_specs)


def undeclared_sharing(
    values: Iterable[tuple[Any, int | None]], given: Iterable[tuple[Any, int | None]] = ()
) -> tuple[int, ...]:
    """Indices of those ``values`` that share memory undeclared with ``given`` ones, or with earlier values.

    Args:
        values, given: each with the number of its declared storage; None for what is no tensor.
    """
    known = MemoryMap((span(value), storage) for value, storage in given if isinstance(value, torch.Tensor))
    earlier: list[tuple[Span, int | None]] = []
    found = []
    for index, (value, storage) in enumerate(values):
        if not isinstance(value, torch.Tensor):
            continue
        place = span(value)
        declared = known.numbers_in(place).union(number for other, number in earlier if overlap(place, other))
        if declared and storage not in declared:
            found.append(index)
        else:
            earlier.append((place, storage))
    return tuple(found)


def merged_results(
    inputs: Sequence[GraphInput], args: Sequence[Any], results: Sequence[Any], split: Split
) -> tuple[int, ...]:
    """Indices of results that share memory with an input or an earlier result although eager's would not.

    What eager steps make is not among them: it lies where eager's does.
    """
    given = [(value, i.spec.storage) for i, value in zip(inputs, args, strict=True) if i.spec is not None]
    found = undeclared_sharing(zip(results, split.result_storages, strict=True), given)
    outputs = [spec for piece in split.pieces if piece.kind == "compute" for spec in piece.output_specs]
    compiled = {spec.storage for spec in outputs if spec is not None}
    return tuple(index for index in found if split.result_storages[index] in compiled)


def hand_over(results: list[Any], static: Iterable[Sequence[int]]) -> int:
    """Replace, in ``results``, what lies in static memory by copies that belong to the caller.

    Results that share memory in eager share the memory of one copy. Returns the number of tensors copied.

    Args:
        static: which these are, as ``results_in`` says.
    """
    copied = 0
    for members in static:
        tensors = [results[index] for index in members]
        copies = dict(zip(map(id, tensors), _copies(tensors), strict=True))  # one tensor returned twice stays one
        for index in members:
            results[index] = copies[id(results[index])]
        copied += len(members)
    return copied


Lent = list[weakref.ref[torch.Tensor]]
"""Results that share one memory, which is static."""


def lend(results: list[Any], static: Iterable[Sequence[int]]) -> list[Lent]:
    """Replace, in ``results``, what lies in static memory by other tensors there, which nobody else has.

    The arguments are those of ``hand_over``; see Note [static results that are kept].
    """
    lent = []
    for members in static:
        tensors = {id(results[at]): results[at] for at in members}
        own = {key: tensor[...] for key, tensor in tensors.items()}
        for at in members:
            results[at] = own[id(results[at])]
        lent.append([weakref.ref(tensor) for tensor in own.values()])
    return lent


def own_what_is_kept(lent: list[Lent]) -> None:
    """Give what is still alive of these results memory of its own, in the very same tensors; nothing is lent then."""
    for references in lent:
        if kept := [tensor for reference in references if (tensor := reference()) is not None]:
            with torch.no_grad():
                for tensor, copy in zip(kept, _copies(kept), strict=True):
                    tensor.set_(copy)  # type: ignore[call-overload]
    lent.clear()


def results_in(
    static: MemoryMap, results: Sequence[Any], storages: Sequence[int | None], input_storages: Collection[int]
) -> list[list[int]]:
    """Indices of the results there; those that share memory in eager are together.

    Args:
        static: memory that later calls overwrite.
        input_storages: numbers of the storages of graph inputs; a result that is a view of one stays a view.
    """
    groups: dict[tuple[int, int | None], list[int]] = {}
    for index, (value, storage) in enumerate(zip(results, storages, strict=True)):
        if not isinstance(value, torch.Tensor) or storage in input_storages:
            continue
        if static.holds(value) or not value.numel():  # no address tells where what has no elements is from
            groups.setdefault((address(value), storage), []).append(index)
    return list(groups.values())


def _copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies with the geometry of ``tensors``, all in one storage."""
    first = tensors[0]
    if len(tensors) == 1 and first.is_contiguous() and first.storage_offset() == 0:
        return [first.clone()]  # the usual case, in one op
    if any(tensor.dtype != first.dtype for tensor in tensors):
        return [_copies([tensor])[0] for tensor in tensors]
    extents_bytes = [extent_bytes(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]
    ends = [t.storage_offset() + extent // t.itemsize for t, extent in zip(tensors, extents_bytes, strict=True)]
    flat = torch.empty(max(ends), dtype=first.dtype, device=first.device)
    begin = min(tensor.storage_offset() for tensor in tensors)
    window = (max(ends) - begin,), (1,), begin
    flat.as_strided(*window).copy_(first.as_strided(*window))
    return [flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()) for tensor in tensors]

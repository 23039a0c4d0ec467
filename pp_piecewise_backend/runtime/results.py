"""What a call hands to its caller: memory of its own, shared exactly where eager's results share theirs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from ..compilation.placeholders import GraphInput
from .instructions import address


def merged_results(
    inputs: Sequence[GraphInput], args: Sequence[Any], results: Sequence[Any], storages: Sequence[int | None]
) -> tuple[int, ...]:
    """Indices of results that share memory with an input or an earlier result although eager's would not.

    Args:
        storages: per result, the number of its storage in eager; None for what is no tensor.
    """
    owner: dict[int, int | None] = {}
    for graph_input, value in zip(inputs, args, strict=True):
        if isinstance(value, torch.Tensor) and graph_input.spec is not None and value.numel():
            owner.setdefault(address(value), graph_input.spec.storage)
    return tuple(
        index
        for index, (value, storage) in enumerate(zip(results, storages, strict=True))
        if isinstance(value, torch.Tensor) and value.numel() and owner.setdefault(address(value), storage) != storage
    )


def hand_over(
    results: list[Any], storages: Sequence[int | None], input_storages: Collection[int], static: Collection[int]
) -> int:
    """Replace, in ``results``, what lies in static memory by copies that belong to the caller.

    Results that share memory in eager share the memory of one copy. Returns the number of tensors copied.

    Args:
        input_storages: numbers of the storages of graph inputs; a result that is a view of one stays a view.
        static: addresses of memory that later calls overwrite.
    """
    groups: dict[tuple[int, int | None], list[int]] = {}
    for index, (value, storage) in enumerate(zip(results, storages, strict=True)):
        if isinstance(value, torch.Tensor) and storage not in input_storages:
            where = address(value)
            if where in static:
                groups.setdefault((where, storage), []).append(index)
    copied = 0
    for members in groups.values():
        tensors = [results[index] for index in members]
        for index, copy in zip(members, _copies(tensors), strict=True):
            results[index] = copy
        copied += len(members)
    return copied


def _copies(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies with the geometry of ``tensors``, all in one storage."""
    first = tensors[0]
    if len(tensors) == 1 and first.is_contiguous() and first.storage_offset() == 0:
        return [first.clone()]  # the usual case, in one op
    if any(tensor.dtype != first.dtype for tensor in tensors):
        return [_copies([tensor])[0] for tensor in tensors]
    ends = [tensor.storage_offset() + _extent(tensor) for tensor in tensors]
    flat = torch.empty(max(ends), dtype=first.dtype, device=first.device)
    begin = min(tensor.storage_offset() for tensor in tensors)
    window = (max(ends) - begin,), (1,), begin
    flat.as_strided(*window).copy_(first.as_strided(*window))
    return [flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()) for tensor in tensors]


def _extent(tensor: torch.Tensor) -> int:
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))

"""Where within a program a stage's memory changes hands: the landing memory, and the memory of what it returns.

Note [early release]
The landing memory of a stage may be filled again as soon as the last step that reads it has run. Which step that is
follows from storages, not from who names the stage input: a slice that one piece returns and a later one reads keeps
the memory alive. Facts tell the storages; where a step that runs un-captured returns a tensor that lies in landing
memory although its facts say otherwise, the memory is released at the end of that call. Replayed steps cannot do so:
their outputs have addresses of their own, and eager steps between them are given copies (see ``replay.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..compilation.placeholders import InputTable
from ..compilation.split import Split
from .instructions import address


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


def lies_in(outputs: Sequence[Any], addresses: Collection[int]) -> bool:
    """Whether one of these is a tensor in memory that begins at one of these addresses."""
    return any(isinstance(output, torch.Tensor) and address(output) in addresses for output in outputs)

"""What is known of a tensor or an integer without having it: shapes with symbols, strides, dtype, device.

A dimension is a plain ``int`` or a sympy expression over the symbols of one program. Symbols serve as
names: nothing here adds a guard to Dynamo's shape environment, and each piece is compiled in one of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import sympy
import torch

from ..utils import torch_compat

Dim: TypeAlias = int | sympy.Expr
"""One size, stride or offset: a number, or an expression over the program's symbols."""


@dataclass(frozen=True)
class TensorSpec:
    """Geometry of a tensor. ``storage`` numbers its storage: equal numbers mean shared memory."""

    shape: tuple[Dim, ...]
    stride: tuple[Dim, ...]
    storage_offset: Dim
    dtype: torch.dtype
    device: torch.device
    storage: int

    @classmethod
    def of(cls, tensor: torch.Tensor, storage: int) -> TensorSpec:
        return cls(
            shape=tuple(map(as_dim, tensor.shape)),
            stride=tuple(map(as_dim, tensor.stride())),
            storage_offset=as_dim(tensor.storage_offset()),
            dtype=tensor.dtype,
            device=tensor.device,
            storage=storage,
        )

    @property
    def symbols(self) -> frozenset[sympy.Symbol]:
        return symbols_of((*self.shape, *self.stride, self.storage_offset))

    def renamed(self, symbols: Mapping[sympy.Symbol, sympy.Symbol]) -> TensorSpec:
        """The same geometry with some symbols replaced by others."""

        def rename(dim: Dim) -> Dim:
            return dim if isinstance(dim, int) else dim.xreplace(dict(symbols))

        shape, stride = tuple(map(rename, self.shape)), tuple(map(rename, self.stride))
        return replace(self, shape=shape, stride=stride, storage_offset=rename(self.storage_offset))

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class SymbolSpec:
    """One symbol of a program: the integer that a size may take, in an inclusive range (None: unbounded).

    ``hint`` is its value in the traced call; None for an unbacked symbol, about which a compiler may assume nothing.
    """

    symbol: sympy.Symbol
    hint: int | None
    lower: int | None
    upper: int | None

    def __str__(self) -> str:
        lower = "-inf" if self.lower is None else str(self.lower)
        upper = "inf" if self.upper is None else str(self.upper)
        return f"{self.symbol} in [{lower}, {upper}]"


def as_dim(value: int | torch.SymInt) -> Dim:
    """``value`` as a ``Dim``: symbolic integers with a known value become plain ones."""
    expression = torch_compat.symint_expression(value)
    if isinstance(expression, int):
        return expression
    return int(expression) if expression.is_number else expression


def symbols_of(dims: Iterable[object]) -> frozenset[sympy.Symbol]:
    """All symbols in these dimensions."""
    found: set[sympy.Symbol] = set()
    for dim in dims:
        if isinstance(dim, sympy.Basic):
            found |= dim.free_symbols
    return frozenset(found)


def evaluate(dim: Dim, values: Mapping[sympy.Symbol, int]) -> int:
    """The number that a dimension stands for once its symbols have these values."""
    return dim if isinstance(dim, int) else int(torch_compat.build_expression(dim, values))

"""What is known of a tensor or an integer without having it: shapes with symbols, strides, dtype, device.

A dimension is a plain ``int`` or a sympy expression over the symbols of one program. Symbols serve as
names: nothing here adds a guard to Dynamo's shape environment, and each piece is compiled in one of its own.

Note [private shapes]
Compilers add guards to the shape environment under which they trace: ``s <= 4096`` for a softmax, ``Eq(s, 10)`` for a
pooling [ran]. In Dynamo's environment these would break the user's ``mark_dynamic`` or cost a recompile. Each piece
is therefore compiled in an environment of its own, and what the compiler came to rely on is kept as data: where it
does not hold, the piece runs as plain FX.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

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

    @property
    def is_dense(self) -> bool:
        """Whether its elements fill its memory from the start, each once: then a clone has the same strides."""
        dims = [(size, step) for size, step in zip(self.shape, self.stride, strict=True) if size != 1]
        extent: Dim = 1
        while dims:
            if (found := next((dim for dim in dims if dim[1] == extent), None)) is None:
                return False
            dims.remove(found)
            extent = extent * found[0]
        return self.storage_offset == 0

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


@dataclass(frozen=True)
class ObjectSpec:
    """An object such as the name of a layer: for the pieces that take it a constant, compared in each call."""

    type_name: str
    example: Any = field(compare=False, repr=False)
    """What stands for it while a graph is traced."""

    def __str__(self) -> str:
        return self.type_name


InputSpec: TypeAlias = TensorSpec | SymbolSpec | ObjectSpec | None
"""What is known of an input of a step; None for one that only eager steps can take."""


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


class FakeInputs:
    """Fake inputs for one piece in a shape environment of its own; see Note [private shapes]."""

    def __init__(self, specs: Sequence[InputSpec], odd: bool = False) -> None:
        """``odd``: give symbols sizes at which nothing is equal by chance, instead of those of the traced call."""
        self._env = torch_compat.new_shape_env()
        self.fake_mode = torch_compat.FakeTensorMode(shape_env=self._env)
        symbols = [spec for spec in specs if isinstance(spec, SymbolSpec)]
        self._given = [replace(s, hint=_odd_size(s, index)) if odd else s for index, s in enumerate(symbols)]
        symints = {
            spec.symbol: torch_compat.new_symbol(self._env, f"s{index}", spec.hint, spec.lower, spec.upper)
            for index, spec in enumerate(self._given)
        }
        self._irrelevant: set[sympy.Basic] = set()
        self._hints = {spec.symbol: spec.hint for spec in self._given if spec.hint is not None}
        self._private = {symbol: torch_compat.symint_expression(symint) for symbol, symint in symints.items()}
        with self.fake_mode:
            self.inputs = [
                symints[spec.symbol] if isinstance(spec, SymbolSpec) else self._input(spec)
                for spec in specs
                if spec is not None
            ]

    def _input(self, spec: TensorSpec | ObjectSpec) -> Any:
        if isinstance(spec, ObjectSpec):
            return spec.example
        shape = [self._integer(dim) for dim in spec.shape]
        stride = [self._integer(dim) for dim in spec.stride]
        return torch.empty_strided(shape, stride, dtype=spec.dtype, device=spec.device)

    def _integer(self, dim: Dim) -> int | torch.SymInt:
        if isinstance(dim, int):
            return dim
        hint = evaluate(dim, self._hints) if dim.free_symbols <= self._hints.keys() else None
        return torch_compat.symint_from_expression(self._env, dim.xreplace(self._private), hint)

    def private_symbol(self, symbol: sympy.Symbol) -> sympy.Symbol | None:
        """What stands for a symbol of the program in these inputs; None if they do not depend on it."""
        return self._private.get(symbol)

    @contextlib.contextmanager
    def ignoring_conditions(self) -> Iterator[None]:
        """What runs within may go another way for other sizes: it does the same."""
        before = set(torch_compat.shape_env_conditions(self._env))
        yield
        self._irrelevant |= set(torch_compat.shape_env_conditions(self._env)) - before

    def goes_one_way(self, symbol: sympy.Symbol) -> bool:
        """Whether what ran on these inputs would have gone the same way for any other value of a symbol.

        That a size is not equal to another one (as to 1) is no way of its own.
        """
        (spec,) = (spec for spec in self._given if spec.symbol == symbol)
        values = {self._private[other]: hint for other, hint in self._hints.items()}
        relevant = set(torch_compat.shape_env_conditions(self._env)) - self._irrelevant
        conditions = [condition for condition in relevant if not isinstance(condition, sympy.Ne)]
        smallest, largest = max(spec.lower or 0, 2), min(spec.upper or _LARGEST, _LARGEST)
        return all(
            condition.xreplace({**values, self._private[symbol]: sympy.Integer(size)}) == sympy.true
            for condition in conditions
            if self._private[symbol] in condition.free_symbols
            for size in (smallest, largest)
        )

    def conditions(self) -> tuple[sympy.Basic, ...]:
        """What the compiler relied on beyond the ranges that it was given."""
        found = list(torch_compat.shape_env_conditions(self._env))
        ranges = torch_compat.shape_env_ranges(self._env)
        canonical = {}
        for index, spec in enumerate(self._given):
            symbol = self._private[spec.symbol]
            canonical[symbol] = sympy.Symbol(f"s{index}")
            lower, upper = ranges[symbol]
            if lower is not None and (spec.lower is None or lower > spec.lower):
                found.append(sympy.Ge(symbol, lower, evaluate=False))
            if upper is not None and (spec.upper is None or upper < spec.upper):
                found.append(sympy.Le(symbol, upper, evaluate=False))
        renamed = dict.fromkeys(condition.xreplace(canonical) for condition in found)
        return tuple(condition for condition in renamed if condition != sympy.true)


_LARGEST = 2**16
"""Of sizes that have no upper bound."""
_ODD_SIZES = (89, 97, 101, 103, 107, 109, 113, 127)


def _odd_size(spec: SymbolSpec, index: int) -> int:
    size = _ODD_SIZES[index % len(_ODD_SIZES)]
    return max(spec.lower or 0, size if spec.upper is None else min(size, spec.upper - 1))

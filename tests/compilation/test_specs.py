"""Geometry with symbols: what a dimension is, and what it stands for once the symbols have values."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from pp_piecewise_backend.compilation.specs import SymbolSpec, TensorSpec, as_dim, evaluate, symbols_of
from pp_piecewise_backend.utils import torch_compat

pytestmark = pytest.mark.compat


def symbol_and_tensor() -> tuple[sympy.Symbol, torch.SymInt, torch.Tensor]:
    """A symbol for 5 tokens and a fake float32 tensor `[tokens, 3, 8]`, of which the middle one is a slice."""
    env = torch_compat.new_shape_env()
    tokens = torch_compat.new_symbol(env, "s0", 5, 2, 64)
    with torch_compat.FakeTensorMode(shape_env=env):
        base = torch.empty_strided((tokens, 4, 8), (32, 8, 1))
        return as_dim(tokens), tokens, base[:, 1:]  # type: ignore[return-value]


def test_spec_of_a_tensor_with_a_symbol() -> None:
    symbol, _, tensor = symbol_and_tensor()
    spec = TensorSpec.of(tensor, storage=7)
    assert spec == TensorSpec((symbol, 3, 8), (32, 8, 1), 8, torch.float32, torch.device("cpu"), 7)
    assert spec.symbols == {symbol}
    assert all(type(dim) is int for dim in (*spec.shape[1:], *spec.stride, spec.storage_offset))
    assert str(spec) == f"float32[{symbol}, 3, 8]"


def test_spec_of_a_real_tensor() -> None:
    spec = TensorSpec.of(torch.zeros(6, dtype=torch.int64)[2:5], storage=0)
    assert (spec.shape, spec.stride, spec.storage_offset, spec.dtype) == ((3,), (1,), 2, torch.int64)
    assert spec.symbols == frozenset() and str(spec) == "int64[3]"
    assert str(TensorSpec.of(torch.tensor(1.0), 0)) == "float32[]"


def test_specs_with_other_storages_differ() -> None:
    tensor = torch.zeros(3)
    assert TensorSpec.of(tensor, 0) != TensorSpec.of(tensor, 1)
    assert len({TensorSpec.of(tensor, 0), TensorSpec.of(tensor.clone(), 0)}) == 1


def test_symbols_in_strides_count() -> None:
    env = torch_compat.new_shape_env()
    tokens = torch_compat.new_symbol(env, "s0", 5, 2, 64)
    with torch_compat.FakeTensorMode(shape_env=env):
        tensor = torch.empty_strided((3, 4), (tokens, 1))
    spec = TensorSpec.of(tensor, 0)
    assert spec.shape == (3, 4) and spec.symbols == {as_dim(tokens)}


def test_as_dim() -> None:
    symbol, tokens, _ = symbol_and_tensor()
    assert as_dim(3) == 3 and as_dim(tokens * 2 + 1) == symbol * 2 + 1
    constant = as_dim(tokens - tokens + 4)
    assert constant == 4 and type(constant) is int


def test_symbols_of() -> None:
    first, second = sympy.symbols("s0 s1")
    assert symbols_of((1, first * 2, second + first, 4)) == {first, second}
    assert symbols_of(()) == symbols_of((1, "text", None)) == frozenset()


@given(st.integers(0, 10_000), st.integers(1, 10_000))
def test_evaluate(first_value: int, second_value: int) -> None:
    first, second = sympy.symbols("s0 s1", integer=True)
    values = {first: first_value, second: second_value}
    result = evaluate(first * 3 + second**2 - 1, values)
    assert result == first_value * 3 + second_value**2 - 1 and type(result) is int
    assert evaluate(12, values) == 12


@given(st.integers(4, 64))  # below 4 the slice has one row, whose stride torch derives otherwise, under a guard
def test_evaluate_agrees_with_the_shapes_that_torch_derives(value: int) -> None:
    symbol, _, tensor = symbol_and_tensor()
    derived = TensorSpec.of(tensor[1::2].flatten(1).t(), 0)
    real = torch.empty(value, 4, 8)[:, 1:][1::2].flatten(1).t()
    assert tuple(evaluate(dim, {symbol: value}) for dim in derived.shape) == real.shape
    assert tuple(evaluate(dim, {symbol: value}) for dim in derived.stride) == real.stride()


@pytest.mark.parametrize(
    ("lower", "upper", "text"), [(2, 64, "s0 in [2, 64]"), (2, None, "s0 in [2, inf]"), (None, 3, "s0 in [-inf, 3]")]
)
def test_symbol_spec_as_text(lower: int | None, upper: int | None, text: str) -> None:
    assert str(SymbolSpec(sympy.Symbol("s0"), 5, lower, upper)) == text

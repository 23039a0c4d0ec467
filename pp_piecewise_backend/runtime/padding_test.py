"""The witness of rule R3: a piece is run with poison in the padded rows, and its real rows must not notice.

The rules prove this from the ops (see Note [padding rules] in ``padding_rules.py``); here it is seen. The real rows are
made for the test: those of the call may all be alike, as in a warm-up with zeros, and would hide what mixes. They must
agree bit for bit in all runs, whatever the padded rows hold, and with the same rows without padding up to rounding.
Every instance of a piece is tested: a gate that is zero in one layer hides what another one leaks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .cudagraphs.memory import first_rows, like, same_bits, without_repeats

# How far the same rows may differ between two numbers of rows, relative to the largest of them. Matrix products of
# other sizes add up in another order, and float32 may go through TF32 (10 bits of mantissa).
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_OTHER_TOLERANCE = 0.25

_POISONS = ("zero", "zero", "nan", "big", "-big")
"""Contents of the padded rows; the first two runs must agree or the piece is not deterministic."""


@dataclass(frozen=True)
class Trial:
    """A piece as this test needs it."""

    call: Callable[[Sequence[Any]], Sequence[Any]]
    """The compiled piece: takes its inputs, returns its outputs."""
    call_unpadded: Callable[[Sequence[Any]], Sequence[Any]]
    """The same on the real rows; plain FX where the compiled code does not hold for them."""
    input_token_dims: Sequence[tuple[int, ...]]
    """For each input the dimensions that count tokens."""
    output_token_dims: Sequence[tuple[int, ...]]
    compared: Sequence[bool]
    """For each output, whether its contents mean anything."""
    written: Sequence[int]
    """Positions of the inputs that it writes."""
    unpadded_inputs: Callable[[Sequence[Any]], list[Any]]
    """From inputs as wide as the bucket to fresh ones of the real rows, with the strides traced for these."""


def examine(trial: Trial, inputs: Sequence[Any], real_tokens: int) -> str | None:
    """Why padded rows may not be added to this piece, as far as a test can tell; None if it found nothing.

    Args:
        inputs: as wide as the bucket; the first ``real_tokens`` rows are real. They are left as they are: integers
            of the test are mixed from them, and floats are random.
        real_tokens: at least 1, below the bucket.
    """
    inputs = [
        _made_rows(value, dims, real_tokens, seed=index) if dims else value
        for index, (value, dims) in enumerate(zip(inputs, trial.input_token_dims, strict=True))
    ]
    first: list[torch.Tensor | None] = []
    for number, poison in enumerate(_POISONS):
        given = [
            _poisoned(value, dims, real_tokens, poison, number) if dims or index in trial.written else value
            for index, (value, dims) in enumerate(zip(inputs, trial.input_token_dims, strict=True))
        ]
        try:
            outputs = trial.call(given)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return f"R3: it fails with {poison} in the padded rows ({type(error).__name__}: {error})"
        rows = _real_rows(trial, outputs, given, real_tokens)
        if number == 0:
            first = [None if r is None else r.clone() for r in rows]
        elif (index := _first_difference(first, rows)) is not None:
            if poison == "zero":
                return f"R3: two runs on the same rows differ in {_name(trial, index)}"
            return f"R3: {_name(trial, index)} changes in the real rows with {poison} in the padded rows"
    given = trial.unpadded_inputs(inputs)
    rows = _real_rows(trial, trial.call_unpadded(given), given, real_tokens)
    for index, (one, other) in enumerate(zip(first, rows, strict=True)):
        if one is not None and other is not None and not agree(one, other):
            return f"R3: {_name(trial, index)} of the real rows depends on how many padded rows there are"
    return None


def agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two results are the same up to the rounding of their dtype."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.is_complex():
        return agree(*(torch.view_as_real(tensor.resolve_conj()) for tensor in (one, other)))
    if not one.is_floating_point() or not one.numel():
        return torch.equal(one, other)
    a, b = one.double(), other.double()
    finite = torch.isfinite(a)
    if not torch.equal(finite, torch.isfinite(b)) or not same_bits(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return False
    a, b = a[finite], b[finite]
    if not a.numel():
        return True
    scale = max(float(b.abs().max()), 1e-30)
    return float((a - b).abs().max()) <= TOLERANCES.get(one.dtype, _OTHER_TOLERANCE) * scale


def first_differing_row(one: torch.Tensor, other: torch.Tensor, token_dim: int | None) -> int | None:
    """Index along the token dimension of the first row in which two tensors are not equal bit for bit."""
    if same_bits(one, other):
        return None
    if token_dim is None or one.dim() == 0:
        return 0
    for row in range(one.shape[token_dim]):
        if not same_bits(one.select(token_dim, row), other.select(token_dim, row)):
            return row
    return None


def _made_rows(value: torch.Tensor, dims: tuple[int, ...], real_tokens: int, seed: int) -> torch.Tensor:
    """A tensor with real rows that differ from one another, as far as its values are free; equal on all ranks."""
    made = like(value)
    random = torch.Generator(value.device).manual_seed(seed)
    rows = without_repeats(first_rows(made, dims, real_tokens))
    if rows.is_floating_point() or rows.is_complex():
        dtype = torch.complex64 if rows.is_complex() else torch.float32
        rows.copy_(torch.randn(rows.shape, generator=random, device=rows.device, dtype=dtype))
    else:
        # Integers may index something: only values of the same batch are sure to be valid.
        for dim in dims:
            if rows.shape[dim] > 1:
                order = torch.randint(rows.shape[dim], (rows.shape[dim],), generator=random, device=rows.device)
                rows.copy_(rows.index_select(dim, order))
    return made


def _poisoned(value: torch.Tensor, dims: tuple[int, ...], real_tokens: int, poison: str, number: int) -> torch.Tensor:
    copy = like(value)
    for dim in dims:
        padded = copy.shape[dim] - real_tokens
        if padded <= 0 or copy.stride(dim) == 0:
            continue
        tail = without_repeats(copy.narrow(dim, real_tokens, padded))
        if copy.is_floating_point() or copy.is_complex():
            big = torch.finfo(copy.dtype).max
            tail.fill_({"zero": 0.0, "nan": float("nan"), "big": big, "-big": -big}[poison])
        else:
            # Integers may index something: only values of the same batch are sure to be valid.
            row = 0 if poison == "zero" else (number * real_tokens // len(_POISONS)) % real_tokens
            tail.copy_(without_repeats(copy.narrow(dim, row, 1)).expand_as(tail))
    return copy


def _real_rows(trial: Trial, outputs: Sequence[Any], inputs: Sequence[Any], real: int) -> list[torch.Tensor | None]:
    rows: list[torch.Tensor | None] = []
    for output, dims, is_compared in zip(outputs, trial.output_token_dims, trial.compared, strict=True):
        rows.append(first_rows(output, dims, real) if is_compared and isinstance(output, torch.Tensor) else None)
    return rows + [first_rows(inputs[at], trial.input_token_dims[at], real) for at in trial.written]


def _first_difference(one: Sequence[torch.Tensor | None], other: Sequence[torch.Tensor | None]) -> int | None:
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        if a is not None and b is not None and not same_bits(a, b):
            return index
    return None


def _name(trial: Trial, index: int) -> str:
    outputs = len(trial.output_token_dims)
    return f"output {index}" if index < outputs else f"what it writes to input {trial.written[index - outputs]}"

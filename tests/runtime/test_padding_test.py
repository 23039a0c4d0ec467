"""The poison run: what it finds in small pieces, and what it must not mind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pp_piecewise_backend.runtime import padding_test
from pp_piecewise_backend.runtime.cudagraphs.memory import like
from pp_piecewise_backend.runtime.padding_test import Trial, agree, examine, first_differing_row

BUCKET, REAL = 6, 4
ROWS = (0,)


def examined(
    call: Callable[..., Sequence[Any]],
    *inputs: Any,
    dims: Sequence[tuple[int, ...]] | None = None,
    outputs: Sequence[tuple[int, ...]] = (ROWS,),
    compared: Sequence[bool] | None = None,
    written: Sequence[int] = (),
    real_tokens: int = REAL,
    unpadded: Callable[..., Sequence[Any]] | None = None,
) -> str | None:
    """What the poison run says of a piece; tensors have their tokens in dimension 0 unless told otherwise."""
    if dims is None:
        dims = [ROWS if isinstance(value, Tensor) and value.dim() and len(value) == BUCKET else () for value in inputs]

    def real_rows(values: Sequence[Any]) -> list[Any]:
        cut = []
        for value, token_dims in zip(values, dims, strict=True):
            if isinstance(value, Tensor):
                for dim in token_dims:
                    value = value.narrow(dim, 0, real_tokens)
                value = value.clone()
            cut.append(value)
        return cut

    trial = Trial(
        call=lambda given: call(*given),
        call_unpadded=lambda given: (unpadded or call)(*given),
        input_token_dims=dims,
        output_token_dims=outputs,
        compared=[True] * len(outputs) if compared is None else compared,
        written=written,
        unpadded_inputs=real_rows,
    )
    before = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
    found = examine(trial, inputs, real_tokens)
    for value, copy in zip(inputs, before, strict=True):
        assert not isinstance(value, Tensor) or torch.equal(value, copy), "examine() changed an input"
    return found


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


def rows(*shape: int) -> Tensor:
    return torch.randn(BUCKET, *shape)


# -------------------------------------------------------------------------- what keeps to itself


def test_rows_that_keep_to_themselves() -> None:
    weight = torch.randn(8, 8)
    assert examined(lambda x, w: [(x @ w).softmax(-1)], rows(8), weight) is None
    assert examined(lambda x: [x.cumsum(0)], rows(8)) is None  # later rows do not reach earlier ones
    assert examined(lambda x: [x[None].transpose(1, 2)], rows(8), outputs=[(2,)]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_real_rows_are_made_for_the_test(dtype: torch.dtype) -> None:
    """Rows of the call may all be alike, and then a mean over them is a row like any other."""
    seen: list[Tensor] = []

    def mix(x: Tensor) -> list[Tensor]:
        seen.append(x.clone())
        return [x.to(torch.complex128).mean(0).expand_as(x)]

    x = torch.ones(BUCKET, 2, dtype=dtype)
    assert examined(mix, x) is not None
    real = [given[:REAL] for given in seen]
    assert all(torch.equal(rows, real[0]) for rows in real)
    assert len(set(real[0].flatten().tolist())) == real[0].numel()  # no number is there twice


def test_complex_rows_agree_up_to_rounding() -> None:
    x = torch.randn(4, 3, dtype=torch.complex64)
    assert agree(x, x * (1 + 1e-6)) and agree(x.conj(), x.conj() * (1 + 1e-6j))
    assert not agree(x, x * 1.1) and not agree(x, x * 1.1j)


def test_padded_rows_hold_poison() -> None:
    seen: list[Tensor] = []

    def call(x: Tensor) -> list[Tensor]:
        seen.append(x.clone())
        return [x * 2]

    x = rows(2)
    assert examined(call, x) is None
    tails = [given[REAL:] for given in seen[:-1]]
    assert [len(given) for given in seen] == [BUCKET] * 5 + [REAL]
    assert tails[0].eq(0).all() and tails[1].eq(0).all() and tails[2].isnan().all()
    big = torch.finfo(torch.float32).max
    assert tails[3].eq(big).all() and tails[4].eq(-big).all()


def test_padded_integers_are_values_of_the_same_batch() -> None:
    seen: list[Tensor] = []

    def call(at: Tensor, table: Tensor) -> list[Tensor]:
        seen.append(at.clone())
        return [table[at]]

    at = torch.tensor([3, 1, 4, 1, 99, -7])  # the padded rows index nothing
    assert examined(call, at, torch.randn(5, 2)) is None
    assert all(set(given[REAL:].tolist()) <= {3, 1, 4} for given in seen)
    assert len({tuple(given[REAL:].tolist()) for given in seen[:-1]}) > 1


def test_tokens_in_another_dimension_and_in_two() -> None:
    assert examined(lambda x: [x * 2], torch.randn(3, BUCKET), dims=[(1,)], outputs=[(1,)]) is None
    found = examined(lambda x: [x + x[:, -1:]], torch.randn(3, BUCKET), dims=[(1,)], outputs=[(1,)])
    assert found == "R3: output 0 changes in the real rows with nan in the padded rows"
    square = torch.randn(BUCKET, BUCKET)
    assert examined(lambda x: [x * 2], square, dims=[(0, 1)], outputs=[(0, 1)]) is None


# --------------------------------------------------------------------------- what does not


@pytest.mark.parametrize(
    "call",
    [
        lambda x: [x - x.mean(0)],
        lambda x: [x + x[-1]],
        lambda x: [x.flip(0)],
        lambda x: [x / x.abs().amax(0)],
        lambda x: [x.cumsum(0).flip(0).contiguous()],
    ],
    ids=["mean", "last-row", "flip", "maximum", "sum-from-the-end"],
)
def test_rows_that_reach_others(call: Callable[[Tensor], list[Tensor]]) -> None:
    assert examined(call, rows(4)) == "R3: output 0 changes in the real rows with nan in the padded rows"


def test_what_only_a_large_value_shows() -> None:
    found = examined(lambda x: [x + x.nan_to_num(0, 0, 0).clamp(min=0).amax(0)], rows(4).neg().abs().neg())
    assert found == "R3: output 0 changes in the real rows with big in the padded rows"
    found = examined(lambda x: [x + x.nan_to_num(0, 0, 0).clamp(max=0).amin(0)], rows(4).abs())
    assert found == "R3: output 0 changes in the real rows with -big in the padded rows"


def test_an_output_without_tokens_that_depends_on_padding() -> None:
    found = examined(lambda x: [x * 2, x.sum()], rows(4), outputs=[ROWS, ()])
    assert found == "R3: output 1 changes in the real rows with nan in the padded rows"


def test_integers_that_reach_other_rows() -> None:
    at = torch.tensor([0, 1, 2, 3, 0, 0])
    found = examined(lambda at: [at - at.sum()], at)
    assert found is not None and found.startswith("R3: output 0 changes in the real rows")


def test_what_depends_on_the_number_of_rows_alone() -> None:
    expected = "R3: output 0 of the real rows depends on how many padded rows there are"
    assert examined(lambda x: [x / x.shape[0]], rows(4)) == expected
    assert examined(lambda x: [x[:, :1] * 0 + len(x)], rows(4)) == expected


def test_a_piece_that_is_not_deterministic() -> None:
    numbers = iter(range(100))
    found = examined(lambda x: [x + next(numbers)], rows(4))
    assert found == "R3: two runs on the same rows differ in output 0"


def test_what_a_piece_writes_is_compared_too() -> None:
    def adds(x: Tensor, residual: Tensor) -> list[Tensor]:
        residual.add_(x)
        return [residual * 2]

    def leaks(x: Tensor, residual: Tensor) -> list[Tensor]:
        residual.add_(x.sum(0))
        return [x * 2]

    assert examined(adds, rows(4), rows(4), written=[1]) is None
    found = examined(leaks, rows(4), rows(4), written=[1])
    assert found == "R3: what it writes to input 1 changes in the real rows with nan in the padded rows"


def test_outputs_without_meaning_are_not_compared() -> None:
    def call(x: Tensor) -> list[Tensor]:
        return [x * 2, torch.randn_like(x)]

    assert examined(call, rows(4), outputs=[ROWS, ROWS], compared=[True, False]) is None
    assert examined(call, rows(4), outputs=[ROWS, ROWS]) == "R3: two runs on the same rows differ in output 1"


def test_one_real_row() -> None:
    assert examined(lambda x: [x * 2], rows(4), real_tokens=1) is None
    assert examined(lambda at: [at * 2], torch.arange(BUCKET), real_tokens=1) is None
    assert examined(lambda x: [x - x.mean(0)], rows(4), real_tokens=1) is not None


def test_another_call_serves_the_real_rows_alone() -> None:
    assert examined(lambda x: [x * 2], rows(4), unpadded=lambda x: [x + x]) is None
    assert examined(lambda x: [x * 2], rows(4), unpadded=lambda x: [x * 2.1]) is not None


# ------------------------------------------------------------------------------- comparing


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (torch.tensor([1.0, 100.0]), torch.tensor([1.1, 100.0]), True),  # relative to the largest
        (torch.tensor([1.0, 1.0]), torch.tensor([1.01, 1.0]), False),
        (torch.tensor([1.0, 1.0]).double(), torch.tensor([1.0 + 1e-8, 1.0], dtype=torch.float64), False),
        (torch.tensor([1.0, 1.0]).double(), torch.tensor([1.0 + 1e-10, 1.0], dtype=torch.float64), True),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0]), True),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, 1.0]), False),
        (torch.tensor([float("inf"), 1.0]), torch.tensor([float("-inf"), 1.0]), False),
        (torch.tensor([float("inf"), 1.0]), torch.tensor([float("nan"), 1.0]), False),
        (torch.tensor([0.0]), torch.tensor([0.0]), True),
        (torch.tensor([1.0]), torch.tensor([0.0]), False),
        (torch.tensor([3]), torch.tensor([3]), True),
        (torch.tensor([300]), torch.tensor([301]), False),
        (torch.tensor([True]), torch.tensor([False]), False),
        (torch.tensor([1.0]), torch.tensor([1]), False),
        (torch.zeros(2), torch.zeros(3), False),
        (torch.zeros(0), torch.zeros(0), True),
    ],
)
def test_agreement_up_to_rounding(one: Tensor, other: Tensor, expected: bool) -> None:
    assert agree(one, other) is expected


@pytest.mark.parametrize("dtype", padding_test.TOLERANCES)
def test_each_dtype_has_its_tolerance(dtype: torch.dtype) -> None:
    tolerance = padding_test.TOLERANCES[dtype]
    one = torch.ones(2, dtype=dtype)
    assert agree(one, (one.double() * (1 + tolerance / 4)).to(dtype))
    assert not agree(one, (one.double() * (1 + tolerance * 4)).to(dtype))


def test_the_first_row_that_differs() -> None:
    one = torch.zeros(4, 3)
    other = one.clone()
    assert first_differing_row(one, other, 0) is None
    other[2, 1] = other[3, 0] = 1
    assert first_differing_row(one, other, 0) == 2
    assert first_differing_row(one, other, 1) == 0
    assert first_differing_row(one, other, None) == 0
    assert first_differing_row(torch.tensor(1.0), torch.tensor(2.0), None) == 0
    assert first_differing_row(torch.tensor(float("nan")), torch.tensor(float("nan")), None) is None


def test_a_copy_keeps_strides() -> None:
    for tensor in (
        torch.randn(3, 4).t(),
        torch.randn(3, 4)[:, ::2],
        torch.randn(2, 1, 4).permute(1, 0, 2).expand(3, 2, 4),
    ):
        copy = like(tensor)
        assert torch.equal(copy, tensor) and copy.data_ptr() != tensor.data_ptr()
        assert copy.stride() == tensor.stride()


def test_the_real_rows_are_made_for_the_test() -> None:
    """Rows that are all alike, as in a warm-up with zeros, would hide that rows change places."""
    seen: list[Tensor] = []

    def swap(x: Tensor, ids: Tensor) -> list[Tensor]:
        seen.extend((x[:REAL].clone(), ids[:REAL].clone()))
        return [x.roll(1, 0)]

    ids = torch.tensor([4, 4, 7, 9, 4, 4])
    assert "changes in the real rows" in str(examined(swap, torch.zeros(BUCKET, 3), ids))
    x, mixed = seen[:2]
    assert len({tuple(row) for row in x.tolist()}) == REAL
    assert set(mixed.tolist()) <= {4, 7, 9}

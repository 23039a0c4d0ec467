"""Over 200 functions of tokens, in many of which rows mix: what is padded is right, whatever rows warmed it up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import pp_piecewise_backend as ppb
from paddings import UNDECIDED
from pp_piecewise_backend.runtime.program import Program
from row_programs import FEATURES, LAYOUTS, PROGRAMS, WEIGHT
from tiers import slow_but

pytestmark = [pytest.mark.usefixtures("fresh_backend", "no_gradients")]

_ALL = list(product(PROGRAMS, LAYOUTS))
_FOUND: Counter[str] = Counter()


@torch.library.custom_op("rowstest::attention", mutates_args=())
def attention(x: Tensor) -> Tensor:
    return torch.tanh(x.cumsum(0) + x.mean(0))


@attention.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.fixture(scope="module", autouse=True)
def _share(pytestconfig: pytest.Config) -> Iterator[None]:
    """Prints which share of the programs was padded."""
    yield
    total = sum(_FOUND.values())
    print(f"\nof {total} functions {_FOUND['padded']} were padded")


def test_there_are_at_least_200() -> None:
    assert len(PROGRAMS) >= 200 and len(_ALL) >= 600


@pytest.mark.parametrize(("name", "layout"), slow_but(_ALL[::37], _ALL))
def test_padded_rows_change_nothing(name: str, layout: str) -> None:
    """Warmed up with equal rows; then random rows, at sizes that are padded."""
    function, (lay_out, t, d) = PROGRAMS[name], LAYOUTS[layout]

    def forward(x: Tensor, y: Tensor, i: Tensor) -> Any:
        x, y = attention(x @ WEIGHT) @ WEIGHT, y @ WEIGHT
        return function(lay_out(x), lay_out(y), i, t, d), x

    def arguments(n: int, equal: bool) -> tuple[Tensor, ...]:
        random = torch.Generator().manual_seed(n)
        made = [torch.randn(n, FEATURES, generator=random) for _ in range(2)]
        made.append(torch.randint(0, FEATURES, (n,), generator=random))
        made = [a[:1].expand_as(a).contiguous() for a in made] if equal else made
        for tensor in made:
            torch._dynamo.mark_dynamic(tensor, 0)
        return tuple(made)

    options = {
        "graphs": "emulate",
        "compiler": "eager",
        "split_ops": "+rowstest::*",
        "capture_sizes": "16",
        "max_tokens": 16,
    }
    compiled = torch.compile(forward, backend="pp_piecewise", options=options)
    for n in (16, 13, 13, 16):  # none of them FEATURES
        compiled(*arguments(n, equal=True))
    for n in (9, 13, 11):
        given = arguments(n, equal=False)
        (expected, _), (found, _) = forward(*given), compiled(*given)
        assert found.shape == expected.shape and found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    program = ppb.programs()[-1]  # of two where PyTorch goes another way from 16 rows up
    assert isinstance(program, Program), program.explain()
    last = [piece.padding for piece in program.pieces if piece.kind == "compute"][-1]
    assert last != UNDECIDED
    _FOUND["padded" if last == "safe" else "not padded"] += 1

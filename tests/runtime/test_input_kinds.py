"""What an input is does not follow from where it comes from: sizes, members and numbers that vary, and what is said."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import pp_piecewise_backend as ppb
from captured import HIDDEN, Pair, rows

pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")

TABLE = torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(7)) / 4


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True)[0]


def ids(num_tokens: int) -> Tensor:
    return torch.arange(num_tokens) * 5 % 64


# ------------------------------------------------------------- several sizes that count tokens


def embed(input_ids: Tensor, positions: Tensor, rotary: Tensor, sizes_only: Tensor) -> tuple[Tensor, ...]:
    x = attend(TABLE[input_ids] @ TABLE.t()[:, :HIDDEN])
    return x.sigmoid(), TABLE[positions] @ TABLE.t(), rotary.sum(0) * 2, torch.arange(sizes_only.shape[0])


def call_embed(pair: Pair, num_tokens: int, num_positions: int | None = None, num_rotary: int | None = None) -> None:
    rotary = ids(3 * (num_rotary or num_tokens)).view(3, -1)
    pair(ids(num_tokens), ids(num_positions or num_tokens), rotary, ids(num_tokens))


@pytest.mark.compat
def test_arguments_that_are_marked_each_on_its_own() -> None:
    pair = Pair(embed, "cpu", dims=(0, 0, 1, 0))
    for num_tokens in (7, 6, 8, 5, 7):
        call_embed(pair, num_tokens)
    (program,) = ppb.programs()
    assert {i.expression for i in program.inputs if i.spec is None} == {program.table.token_count}
    dims = {i.label: i.token_dim for i in program.inputs if i.kind == "per-token"}
    assert dims == {"input_ids": 0, "positions": 0, "rotary": 1}
    assert set(pair.padding.values()) == {"safe"}
    assert ppb.stats().miss_reasons == {"first-call": 2} and ppb.stats().replays == 2 * 4
    # Equal by chance, after all: another graph in which they stay apart.
    for num_positions, num_rotary in [(6, 5), (3, 2)]:
        call_embed(pair, 7, num_positions, num_rotary)
    call_embed(pair, 6)
    assert len(ppb.programs()) == 2


def test_a_size_that_no_compute_piece_takes_is_left_alone() -> None:
    def forward(x: Tensor, lengths: Tensor) -> Tensor:
        return torch.ops.kindtest.attention((x + 1) @ TABLE.t()[:, :HIDDEN], lengths) @ TABLE[:HIDDEN]

    pair = Pair(forward, "cpu", split_ops="+kindtest::*")
    for num_tokens, num_lengths in [(7, 7), (6, 2), (8, 3), (5, 5)]:
        pair(rows(num_tokens, "cpu"), ids(num_lengths) + 1)
    assert len(ppb.programs()) == 1 and ppb.stats().replays == 2 * 3


@torch.library.custom_op("kindtest::attention", mutates_args=())
def attention(x: Tensor, lengths: Tensor) -> Tensor:
    return x.cumsum(0) / lengths.sum()


@attention.register_fake
def _(x: Tensor, lengths: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize("bounds", [(8, 16), (None, 8)])
def test_bounds_that_the_user_gave_are_kept(bounds: tuple[int | None, int | None]) -> None:
    """Where two differ, Dynamo would refuse a guard that makes them one."""

    def forward(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return attend(x @ TABLE[:HIDDEN]) + 1, TABLE[positions] @ TABLE.t()

    pair = Pair(forward, "cpu", mark=False)
    for num_tokens in (7, 6, 8, 5, 7):
        given = rows(num_tokens, "cpu"), ids(num_tokens)
        for tensor, largest in zip(given, bounds, strict=True):
            torch._dynamo.mark_dynamic(tensor, 0, **({} if largest is None else {"min": 2, "max": largest}))
        pair(*given)
    assert set(ppb.stats().miss_reasons) == {"other-dynamic-dimension" if all(bounds) else "first-call"}


def test_what_lies_in_another_object_may_have_the_token_count_by_chance() -> None:
    def forward(x: Tensor, cache: list[Tensor]) -> Tensor:
        return attend(x @ TABLE[:HIDDEN]) @ TABLE[:HIDDEN] + (cache[0] @ TABLE[:HIDDEN]).sum(0)

    compiled = torch.compile(forward, backend="pp_piecewise", options={"graphs": "emulate", "compiler": "eager"})
    for num_tokens, length in [(7, 7), (6, 8), (6, 6), (5, 9)]:
        x, cache = rows(num_tokens, "cpu"), [rows(length, "cpu", seed=1)]
        for tensor in (x, cache[0]):
            torch._dynamo.mark_dynamic(tensor, 0)
        torch.testing.assert_close(compiled(x, cache), forward(x, cache), rtol=1e-5, atol=1e-5)
    assert len(ppb.programs()) == 1

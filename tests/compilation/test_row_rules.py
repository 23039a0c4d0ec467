"""Ops in which rows of tokens stay apart, ops that mix them, and ops of which nobody says."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import pp_piecewise_backend as ppb
from paddings import HIDDEN, UNDECIDED, WEIGHT, paddings, paddings_of

pytestmark = [pytest.mark.compat, pytest.mark.usefixtures("fresh_backend", "no_gradients")]

Body = Callable[[Tensor], Tensor]


def ids(x: Tensor) -> Tensor:
    """Integers, one per token."""
    return x.argmax(-1)


MIXING: dict[str, Body] = {
    "sum": lambda x: x + x.sum(0),
    "mean of integers": lambda x: x + ids(x).float().mean(),
    "max": lambda x: x + x.max(dim=0).values,
    "amax": lambda x: x + x.amax(0, keepdim=True),
    "any": lambda x: x + (ids(x) == 3).any(),
    "count": lambda x: x + (ids(x) != 0).sum(),
    "norm": lambda x: F.normalize(x, dim=0),
    "variance": lambda x: x / x.var(0),
    "softmax": lambda x: x.softmax(0),
    "log_softmax": lambda x: F.log_softmax(x, dim=-2),
    "transposed product": lambda x: x @ (x.t() @ x),
    "linear of columns": lambda x: x @ F.linear(x.t(), x.t()),
    "linear over a batch of tokens": lambda x: x + F.linear((torch.ones(2, 1, 1) * x).mT, x.t()).sum((0, 1)),
    "two products": lambda x: (x @ x.t()) @ x,
    "einsum": lambda x: x @ torch.einsum("nd,ne->de", x, x),
    "flip": lambda x: x + x.flip(0),
    "flip of rows and columns": lambda x: x + x.flip([1, 0]),
    "roll": lambda x: x + x.roll(1, 0),
    "roll of all": lambda x: x + x.roll(1),
    "last row": lambda x: x + x[-1],
    "last row by select": lambda x: x + x.select(0, -1),
    "last rows": lambda x: x + x[-2:].sum(),
    "joined with one row": lambda x: torch.cat([x, torch.zeros(0, HIDDEN), torch.ones(1, HIDDEN)])[1:],
    "shift up": lambda x: torch.cat([x[1:], x[:1]]),
    "differences": lambda x: x + (x[1:] - x[:-1]).sum(),
    "rows by number": lambda x: x[ids(x)],
    "rows by index_select": lambda x: x.index_select(0, ids(x)),
    "rows by gather": lambda x: x.gather(0, ids(x)[:, None].expand(-1, HIDDEN)),
    "convolution": lambda x: x + F.conv1d(x.t()[None], torch.ones(HIDDEN, HIDDEN, 3), padding=1)[0].t(),
    "pooling": lambda x: x + F.avg_pool1d(x.t()[None], 3, stride=1, padding=1)[0].t(),
    "causal attention, which multiplies later rows by zero": lambda x: F.scaled_dot_product_attention(
        x[None], x[None], x[None], is_causal=True
    )[0],
    "attention without causal mask": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None])[0],
    "running variance in training": lambda x: F.batch_norm(x, None, None, training=True),
    "sort": lambda x: x.sort(0).values,
    "order": lambda x: x[x[:, 0].argsort()],
    "topk": lambda x: x + x[:, 0].topk(1).values,
    "median": lambda x: x + x.median(0).values,
    "kthvalue": lambda x: x + x.flatten().kthvalue(1).values,
    "index_put": lambda x: torch.zeros_like(x).index_put((ids(x),), x),
    "scatter": lambda x: torch.zeros_like(x).scatter(0, ids(x)[:, None].expand(-1, HIDDEN), x),
    "renorm of columns": lambda x: x.renorm(2, 1, 1.0),
    "ids twice, in pairs": lambda x: x + WEIGHT[ids(x).repeat(2).view(-1, 2)[:, 1]],
    "rows twice, in pairs": lambda x: torch.cat([x, x]).view(-1, 2, HIDDEN)[:, 1],
    "columns as rows": lambda x: x.t().reshape(-1, HIDDEN),
    "a fixed number of rows": lambda x: x + x[:3].sum(),
    "windows": lambda x: x + x.unfold(0, 2, 1).sum(),
    "diagonal": lambda x: x + x.diagonal().sum(),
    "rows added up": lambda x: x + torch.zeros(HIDDEN, HIDDEN).index_add(0, ids(x), x)[:1],
    "rows at places of the tokens": lambda x: x + torch.zeros(HIDDEN, HIDDEN).index_copy(0, ids(x), x)[:1],
    "rows in the memory of others": lambda x: x + _written_among_others(x)[0],
}


def _with_first_column(x: Tensor, column: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = column
    return x


def _written_among_others(x: Tensor) -> Tensor:
    """Rows of x in front of others, the last of which is then read."""
    table = torch.zeros(64, HIDDEN)
    table[: x.shape[0]] = x
    return table.sum(0, keepdim=True)


APART: dict[str, Body] = {
    "linear": lambda x: F.linear(x, torch.ones(HIDDEN, HIDDEN)),
    "addmm": lambda x: torch.addmm(x, x, torch.ones(HIDDEN, HIDDEN)),
    "heads": lambda x: (x.view(-1, 2, 2).transpose(0, 1) @ torch.ones(2, 2, 2)).transpose(0, 1).reshape(-1, HIDDEN),
    "norm of rows": lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt(),
    "layer norm": lambda x: F.layer_norm(x, (HIDDEN,)),
    "softmax of rows": lambda x: x.softmax(-1),
    "sum of rows": lambda x: x + x.sum(-1, keepdim=True),
    "prefix": lambda x: x.cumsum(0),
    "first row": lambda x: x + x[0],
    "positions": lambda x: x + torch.arange(x.shape[0])[:, None],
    "rows of a table, counted from its front": lambda x: x + torch.ones(64, HIDDEN)[: x.shape[0]],
    "two per token": lambda x: (x.view(-1, 2) * 2).view(-1, HIDDEN),
    "every second column": lambda x: x + (x[:, ::2] * x[:, 1::2]).repeat(1, 2),
    "triangle": lambda x: x + (x[:, 0] * x[:, 1][:, None]).tril()[:, 0][:, None],
    "rows of weights": lambda x: x + torch.zeros_like(x).scatter(1, ids(x)[:, None], 1.0),
    "written columns": lambda x: _with_first_column(x, x[:, 1]),
    "complex pairs": lambda x: torch.view_as_real(torch.view_as_complex(x.view(-1, 2, 2)) * 1j).view(-1, HIDDEN),
    "gate": lambda x: x[:, :2].repeat(1, 2) * x.chunk(2, -1)[1].repeat(1, 2),
    "experts": lambda x: x * x.topk(2, dim=-1).values.sum(-1, keepdim=True),
    "embedding": lambda x: x + torch.ones(HIDDEN, HIDDEN)[ids(x)],
    "windows of columns": lambda x: x + x.unfold(1, 2, 1).sum((1, 2))[:, None],
    "diagonal of columns": lambda x: x + (x[:, :, None] * WEIGHT).diagonal(0, 1, 2),
    "columns added up": lambda x: x.index_add(1, torch.tensor([3, 1]), x[:, :2]),
    "columns copied": lambda x: x.index_copy(1, torch.tensor([3, 1]), x[:, :2]),
    "columns filled": lambda x: x.index_fill(-1, torch.tensor([3, 1]), 0.5),
    "gather of columns": lambda x: x + x.gather(1, ids(x)[:, None]),
    "einsum with weights": lambda x: torch.einsum("nd,de->ne", x, torch.ones(HIDDEN, HIDDEN)),
    "einsum of rows": lambda x: x + torch.einsum("...d,...d->...", x, x)[:, None],
    "angles": lambda x: x + (torch.ones(1, HIDDEN, 1) @ ids(x)[None, None].float())[0].t().cos(),
    "dtype of another": lambda x: x + torch.ones(HIDDEN, dtype=torch.float64).type_as(x),
    "memory like it": lambda x: x + x.new_zeros(HIDDEN),
    "evaluated batch norm": lambda x: F.batch_norm(x, torch.zeros(HIDDEN), torch.ones(HIDDEN)),
    "joined with an empty vector": lambda x: torch.cat([torch.tensor([]), x]),
    "joined with an empty cache": lambda x: torch.cat([torch.zeros(0, HIDDEN), x, torch.zeros(0, HIDDEN)]),
    "linear of several sequences": lambda x: F.linear(torch.ones(2, 1, 1) * x, WEIGHT, WEIGHT[0]).sum(0),
    "product of several sequences": lambda x: torch.matmul((torch.ones(2, 1, 1) * x) @ WEIGHT, WEIGHT).sum(0),
}


def padding(body: Body, **options: str) -> str:
    """What is said of the padding of ``body``; attention that torch has is no border here."""
    return paddings(
        lambda x: torch.ops.traitstest.attention(body(x @ WEIGHT)),
        torch.randn(5, HIDDEN),
        split_ops="traitstest::*",
        **options,
    )[0]


@functools.cache
def said_of_all() -> dict[str, str]:
    bodies = {**MIXING, **APART}
    assert len(bodies) == len(MIXING) + len(APART)
    return paddings_of(bodies)


@pytest.mark.parametrize("name", MIXING)
def test_tokens_mix(name: str) -> None:
    assert "tokens mix in" in said_of_all()[name]


@pytest.mark.parametrize("name", APART)
def test_tokens_stay_apart(name: str) -> None:
    assert said_of_all()[name] == UNDECIDED


@torch.library.custom_op("rulestest::rows", mutates_args=())
def rows(x: Tensor) -> Tensor:
    return x * 2


@rows.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_op_without_a_rule_is_refused_by_name() -> None:
    assert "no rule says whether rows stay apart in aten::_cdist_forward" in padding(lambda x: torch.cdist(x, WEIGHT))
    ppb.reset()
    assert "aten::linalg_pinv" in padding(lambda x: x + torch.linalg.pinv(x).t())


def test_custom_ops_are_refused_until_they_are_declared() -> None:
    def body(x: Tensor) -> Tensor:
        return torch.ops.rulestest.rows(x)  # type: ignore[no-any-return]

    assert "rows may mix in the custom op rulestest::rows; name it in row_wise_ops if" in padding(body)
    torch._dynamo.reset()
    assert padding(body, row_wise_ops="rulestest::*") == UNDECIDED


@pytest.mark.parametrize(
    "body",
    [
        lambda x: x + torch.ones(9, HIDDEN)[(x[:, 0].abs() * 8).long() % 9],
        lambda x: x + F.embedding((x[:, 0].sigmoid() * 8).to(torch.int64).clamp(0, 8), torch.ones(9, HIDDEN)),
        lambda x: x + x.gather(1, (x[:, :1].abs() % HIDDEN).int().long()),
        lambda x: x + F.one_hot(x[:, 0].long() % HIDDEN, HIDDEN),
    ],
    ids=["index", "embedding", "gather", "one_hot"],
)
def test_indices_made_from_floats(body: Body) -> None:
    assert "index by them" in padding(body)


def test_rows_that_mix_are_told_before_ops_that_branch() -> None:
    """The op behind the branch is what a reader can change; that ops go another way at other sizes comes second."""
    assert "tokens mix in" in padding(lambda x: x[:, : min(x.shape[0], 3)].sum() + x + x.sum(0))


@pytest.mark.parametrize(
    "body",
    [
        lambda x: x + x[:, : x.shape[0] // 2].sum(-1, keepdim=True),
        lambda x: x + x[:, : min(x.shape[0], 3)].sum(-1, keepdim=True),
        lambda x: x + torch.ones(64, HIDDEN)[: x.shape[0] // 2].sum(),
    ],
    ids=["half as many columns", "at most 3 columns", "half as many rows of a table"],
)
def test_parts_whose_length_is_the_token_count(body: Body) -> None:
    assert padding(body) != UNDECIDED


def test_following_ops_leaves_no_mode_behind() -> None:
    """Ops that fix sizes are followed twice, the second time with decompositions in Python."""
    assert padding(lambda x: x + torch.fft.rfft(x, dim=-1).abs().sum(-1, keepdim=True)) == UNDECIDED
    assert not torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PythonDispatcher)
    torch._dynamo.reset()
    ppb.reset()
    assert "tokens mix" in padding(lambda x: x + torch.fft.rfft(x, dim=0).abs().sum(0))
    assert not torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PythonDispatcher)

"""Which pieces must not be padded, as far as their graph shows: each rule on the smallest graph that breaks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

import pp_piecewise_backend as ppb
from paddings import HIDDEN, UNDECIDED, WEIGHT, paddings
from pp_piecewise_backend.compilation.padding_rules import PADDING_RULES, Traits, padding_reason, token_dims
from pp_piecewise_backend.compilation.specs import TensorSpec
from switches import RULES, switch_off

pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")

TOKENS = sympy.Symbol("s0", integer=True, positive=True)


def padding(body: Callable[[Tensor], Tensor]) -> str:
    """The same for one piece, ``body`` on ``[tokens, hidden]``, in front of an attention."""
    return paddings(lambda x: torch.ops.traitstest.attention(body(x @ WEIGHT)), torch.randn(5, HIDDEN))[0]


@pytest.mark.parametrize(
    "body",
    [
        lambda x: x.relu(),
        lambda x: x.view(x.shape[0], 2, 2).transpose(1, 2),
        lambda x: x.reshape(-1, 2, 2),
        lambda x: x + x.new_zeros(x.shape[0], 1),
        lambda x: x + torch.arange(x.shape[0])[:, None],
        lambda x: x + x.cumsum(0),
        lambda x: x.sort(-1).values,
        lambda x: x.topk(2, dim=-1).values.repeat(1, 2),
        lambda x: x[:, [2, 0, 1, 3]],
        lambda x: x.expand(x.shape[0], HIDDEN) * 2,
    ],
)
def test_what_only_a_test_can_decide(body: Callable[[Tensor], Tensor]) -> None:
    assert padding(body) == UNDECIDED


@pytest.mark.parametrize(
    "body",
    [
        lambda x: torch.cat([x, x]),
        lambda x: x.flatten(),
        lambda x: x[1:],
        lambda x: torch.nn.functional.pad(x, (0, 0, 0, 1)),
    ],
    ids=["cat", "flatten", "slice", "pad"],
)
def test_r1_other_sizes_than_the_token_count(body: Callable[[Tensor], Tensor]) -> None:
    assert padding(body).startswith("R1: float32[")


def test_r1_holds_for_inputs_too() -> None:
    first, second = paddings(
        lambda x: torch.ops.traitstest.attention(torch.cat([x, x]) @ WEIGHT) @ WEIGHT, torch.randn(5, HIDDEN)
    )
    assert "whose size 2*s" in first and "crosses its border" in second


@pytest.mark.parametrize(
    "body",
    [
        lambda x: x / x.shape[0],
        lambda x: x + torch.full((1,), x.shape[0]),
        lambda x: x * (torch.arange(HIDDEN) < x.shape[0]),
        lambda x: x.roll(x.shape[0] - 1, 1),
        lambda x: x + x.shape[0] ** 0.5,
        lambda x: x + torch.arange(x.shape[0], 2 * x.shape[0])[:, None],
    ],
    ids=["division", "full", "mask", "roll", "root", "arange-start"],
)
def test_r4_the_token_count_as_a_value(body: Callable[[Tensor], Tensor]) -> None:
    assert padding(body).startswith("R4: the token count is used as a value by ")


@pytest.mark.parametrize(
    "body",
    [
        lambda x: x.sort(0).values,
        lambda x: x[x[:, 0].argsort()],
        lambda x: x + x[:, 0].topk(1).values,
        lambda x: x + x.median(0).values,
        lambda x: torch.zeros_like(x).index_put((x[:, 0].long(),), x),
        lambda x: torch.zeros_like(x).scatter(0, x.long().abs() % x.shape[1], x),
        lambda x: torch.zeros(HIDDEN, HIDDEN).index_add(0, x[:, 0].long() * 0, x)[0] + x,
        lambda x: x + x.flatten().kthvalue(1).values,
    ],
    ids=["sort", "argsort", "topk", "median", "index_put", "scatter", "index_add", "kthvalue"],
)
def test_rows_chosen_by_their_values(body: Callable[[Tensor], Tensor]) -> None:
    assert "rows are chosen by their values by" in padding(body)


def test_random_pieces() -> None:
    assert padding(lambda x: x + torch.rand_like(x)) == "it draws random numbers, as many as there are rows"
    torch._dynamo.reset()
    ppb.reset()
    assert padding(lambda x: torch.nn.functional.dropout(x, 0.5, training=False)) == UNDECIDED


def test_a_static_token_count() -> None:
    x = torch.randn(5, HIDDEN)
    torch.compile(
        lambda x: torch.ops.traitstest.attention(x @ WEIGHT),
        backend="pp_piecewise",
        options={"compiler": "eager", "graphs": "emulate", "split_ops": "+traitstest::*"},
        dynamic=False,
    )(x)
    (program,) = ppb.programs()
    assert program.split.pieces[0].padding == "the token count is static, so no call is padded"


# ------------------------------------------------------------------------ the rules by themselves


def spec(*shape: Any, offset: Any = 0) -> TensorSpec:
    return TensorSpec(shape, tuple(1 for _ in shape), offset, torch.float32, torch.device("cpu"), 0)


def test_r2_what_outlives_the_call() -> None:
    writes = Traits(writes=("hidden_states", "cache"))
    specs = [spec(TOKENS, 4)]
    reason = padding_reason(writes, specs, specs, TOKENS, ["hidden_states"])
    assert reason == "R2: it writes cache, which outlives the call"
    assert padding_reason(writes, specs, specs, TOKENS, ["hidden_states", "cache"]) is None


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (spec(TOKENS, 4), None),
        (spec(3, TOKENS), None),
        (spec(TOKENS, TOKENS), None),
        (spec(7, 4), None),
        (spec(sympy.Symbol("s1"), 4), None),
        (spec(TOKENS * 4), "whose size 4*s0 is not the token count itself"),
        (spec(TOKENS + 1, 4), "whose size s0 + 1 is not the token count itself"),
        (spec(TOKENS, 4, offset=TOKENS * 4), "which begins at 4*s0 in its memory"),
    ],
)
def test_r1_on_a_border(given: TensorSpec, why: str | None) -> None:
    for inputs, outputs in (([given], []), ([], [given])):
        reason = padding_reason(Traits(), inputs, outputs, TOKENS, [])
        assert reason is None if why is None else reason == f"R1: {given} crosses its border, {why}"


BROKEN: dict[str, tuple[Traits, list[TensorSpec | None]]] = {
    "random": (Traits(random=True), []),
    "R1": (Traits(), [spec(TOKENS * 2)]),
    "R2": (Traits(writes=("cache",)), []),
    "R4": (Traits(token_values=("div", "div")), []),
    "selection": (Traits(selects_tokens=("sort",)), []),
    "mixing": (Traits(mixes_tokens=("cumsum",)), []),
    "float indices": (Traits(float_indices=("index_select",)), []),
}


@pytest.mark.parametrize("rule", [name for name, _ in PADDING_RULES])
def test_each_rule_can_be_switched_off_alone(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, specs = BROKEN[rule]
    assert padding_reason(broken, [], specs, TOKENS, []) is not None
    with monkeypatch.context() as patches:
        switch_off(RULES - {rule}, patches)
        assert padding_reason(broken, [], specs, TOKENS, []) is not None
    switch_off({rule}, monkeypatch)
    assert padding_reason(broken, [], specs, TOKENS, []) is None


def test_an_op_is_named_once() -> None:
    reason = padding_reason(BROKEN["R4"][0], [], [], TOKENS, [])
    assert reason == "R4: the token count is used as a value by div"


def test_token_dims() -> None:
    assert token_dims(spec(TOKENS, 4, TOKENS), TOKENS) == (0, 2)
    assert token_dims(spec(TOKENS * 2, 4), TOKENS) == ()
    assert token_dims(spec(5, 4), 5) == () and token_dims(spec(5, 4), None) == ()

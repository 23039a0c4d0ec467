"""Which pieces must not be padded, as far as their graph shows: each rule on the smallest graph that breaks it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

import pp_piecewise_backend as ppb
from paddings import HIDDEN, UNDECIDED, WEIGHT, paddings, paddings_of
from pp_piecewise_backend.compilation.padding_rules import PaddedGraph, PaddedStep, Traits, padding_reason, token_dims
from pp_piecewise_backend.compilation.specs import SymbolSpec, TensorSpec
from switches import RULES, switch_off

pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")

TOKENS = sympy.Symbol("s0", integer=True, positive=True)


def padding(body: Callable[[Tensor], Tensor]) -> str:
    """The same for one piece, ``body`` on ``[tokens, hidden]``, in front of an attention."""
    return paddings(lambda x: torch.ops.traitstest.attention(body(x @ WEIGHT)), torch.randn(5, HIDDEN))[0]


ONLY_A_TEST: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.relu(),
    "view": lambda x: x.view(x.shape[0], 2, 2).transpose(1, 2),
    "reshape": lambda x: x.reshape(-1, 2, 2),
    "new_zeros": lambda x: x + x.new_zeros(x.shape[0], 1),
    "positions": lambda x: x + torch.arange(x.shape[0])[:, None],
    "prefix": lambda x: x + x.cumsum(0),
    "sort": lambda x: x.sort(-1).values,
    "topk": lambda x: x.topk(2, dim=-1).values.repeat(1, 2),
    "columns": lambda x: x[:, [2, 0, 1, 3]],
    "expand": lambda x: x.expand(x.shape[0], HIDDEN) * 2,
}
OTHER_SIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "cat": lambda x: torch.cat([x, x]),
    "flatten": lambda x: x.flatten(),
    "slice": lambda x: x[1:],
    "pad": lambda x: torch.nn.functional.pad(x, (0, 0, 0, 1)),
}
COUNT_AS_A_VALUE: dict[str, Callable[[Tensor], Tensor]] = {
    "division": lambda x: x / x.shape[0],
    "full": lambda x: x + torch.full((1,), x.shape[0]),
    "mask": lambda x: x * (torch.arange(HIDDEN) < x.shape[0]),
    "roll": lambda x: x.roll(x.shape[0] - 1, 1),
    "root": lambda x: x + x.shape[0] ** 0.5,
    "arange-start": lambda x: x + torch.arange(x.shape[0], 2 * x.shape[0])[:, None],
}


@functools.cache
def said_of_all() -> dict[str, str]:
    return paddings_of({**ONLY_A_TEST, **OTHER_SIZES, **COUNT_AS_A_VALUE})


@pytest.mark.parametrize("name", ONLY_A_TEST)
def test_what_only_a_test_can_decide(name: str) -> None:
    assert said_of_all()[name] == UNDECIDED


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_r1_other_sizes_than_the_token_count(name: str) -> None:
    assert said_of_all()[name].startswith("R1: float32[")


@pytest.mark.parametrize("name", COUNT_AS_A_VALUE)
def test_r4_the_token_count_as_a_value(name: str) -> None:
    assert said_of_all()[name].startswith("R4: the token count is used as a value by ")


def test_r1_holds_for_inputs_too() -> None:
    first, second = paddings(
        lambda x: torch.ops.traitstest.attention(torch.cat([x, x]) @ WEIGHT) @ WEIGHT, torch.randn(5, HIDDEN)
    )
    assert "whose size 2*s" in first and "crosses its border" in second


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


def reason(
    traits: Traits, inputs: Sequence[Any], outputs: Sequence[Any], stage_inputs: Sequence[str] = ()
) -> str | None:
    """What the rules say of a step that does nothing with its inputs."""
    nothing = torch.fx.GraphModule({}, torch.fx.Graph())
    symbols = [SymbolSpec(symbol, 8, 2, None) for symbol in (TOKENS, sympy.Symbol("s1"))]
    return padding_reason(
        PaddedStep(nothing, "", traits, [*symbols, *inputs], outputs, PaddedGraph(TOKENS, tuple(stage_inputs), (), {}))
    )


def test_r2_what_outlives_the_call() -> None:
    writes = Traits(writes=("hidden_states", "cache"))
    specs = [spec(TOKENS, 4)]
    assert reason(writes, specs, specs, ["hidden_states"]) == "R2: it writes cache, which outlives the call"
    assert reason(writes, specs, specs, ["hidden_states", "cache"]) is None


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
        found = reason(Traits(), inputs, outputs)
        assert found is None if why is None else found == f"R1: {given} crosses its border, {why}"


BROKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda x: x + torch.rand_like(x),
    "R1": lambda x: torch.cat([x, x]),
    "R4": lambda x: x / x.shape[0],
    "mixing": lambda x: x - x.mean(0),
    "float indices": lambda x: x + WEIGHT[x[:, 0].abs().long() % HIDDEN],
}
NEEDED = {"R1": {"R1", "mixing"}, "random": {"random", "mixing"}}
"""Rule -> what else refuses its body."""


@pytest.mark.parametrize("rule", BROKEN)
def test_each_rule_can_be_switched_off_alone(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = NEEDED.get(rule, {rule})
    with monkeypatch.context() as patches:
        switch_off(RULES - {rule}, patches)
        assert padding(BROKEN[rule]) != UNDECIDED
    torch._dynamo.reset()
    ppb.reset()
    switch_off(needed, monkeypatch)
    assert padding(BROKEN[rule]) == UNDECIDED


def test_token_dims() -> None:
    assert token_dims(spec(TOKENS, 4, TOKENS), TOKENS) == (0, 2)
    assert token_dims(spec(TOKENS * 2, 4), TOKENS) == ()
    assert token_dims(spec(5, 4), 5) == () and token_dims(spec(5, 4), None) == ()

"""What of a program can be captured, and why not: each reason by the smallest program that has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pp_piecewise_backend as ppb
from pp_piecewise_backend.runtime.bucket import hoist_buffers
from pp_piecewise_backend.runtime.capture_plan import SMALL_TENSOR_BYTES, GraphPlan
from pp_piecewise_backend.runtime.cudagraphs.ladder import Ladder
from pp_piecewise_backend.runtime.program import Program

pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")

HIDDEN = 4
WEIGHT = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0))


WATCHING: list[Callable[[], Any]] = []
"""Called in each attention."""


@torch.library.custom_op("plantest::attention", mutates_args=())
def attention(x: Tensor) -> Tensor:
    for watch in WATCHING:
        watch()
    return x.softmax(-1)


@attention.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("plantest::attention_into", mutates_args=("out",))
def attention_into(x: Tensor, out: Tensor) -> None:
    out.copy_(x.softmax(-1))


@torch.library.custom_op("plantest::attention_expanded", mutates_args=())
def attention_expanded(x: Tensor) -> Tensor:
    return x[:1].clone().expand(x.shape)


@attention_expanded.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(1, x.shape[1]).expand(x.shape)


def run_twice(function: Callable[..., Any], *calls: tuple[Any, ...], mark: bool = True, **options: Any) -> GraphPlan:
    """Run each call three times and compare with eager; the plan of the last program comes back."""
    options = {"compiler": "eager", "graphs": "emulate", "split_ops": "+plantest::*", "capture_sizes": "1,4,8",
               "max_tokens": 8, **options}  # fmt: skip
    compiled = torch.compile(function, backend="pp_piecewise", options=options, fullgraph=True)
    for index, arguments in enumerate(calls * 3):
        if index == 0 and mark:
            for tensor in arguments:
                if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape[0] == arguments[0].shape[0]:
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
        got, expected = compiled(*arguments), function(*arguments)
        for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, expected)), strict=True):
            torch.testing.assert_close(one, other)
            assert one.stride() == other.stride()
    program = ppb.programs()[-1]
    assert isinstance(program, Program) and program.graphs is not None
    return program.graphs.plan


def codes(plan: GraphPlan) -> list[str | None]:
    """For each compute step why it is never captured."""
    return [plan.obstacles[step].code if step in plan.obstacles else None for step in plan.compute_steps]


def rows(n: int = 4) -> Tensor:
    return torch.randn(n, HIDDEN)


# ----------------------------------------------------------------------------------- obstacles


def test_plain_pieces_are_captured_and_replayed() -> None:
    plan = run_twice(lambda x: torch.ops.plantest.attention(x @ WEIGHT) @ WEIGHT, (rows(),))
    assert codes(plan) == [None, None] and plan.capturable == plan.compute_steps == (0, 2)
    assert ppb.stats().replays == 4 and ppb.stats().miss_reasons == {"first-call": 2}


def test_random_pieces_are_not() -> None:
    def function(x: Tensor) -> Tensor:
        return torch.ops.plantest.attention(x @ WEIGHT) @ WEIGHT * (torch.rand_like(x) * 0 + 1)

    assert codes(run_twice(function, (rows(),))) == [None, "random"]
    assert ppb.stats().miss_reasons["random"] == 3


def test_another_dynamic_dimension() -> None:
    table = torch.randn(6, HIDDEN)
    torch._dynamo.mark_dynamic(table, 0)
    plan = run_twice(
        lambda x, table: torch.ops.plantest.attention(x @ WEIGHT + (table @ WEIGHT).sum(0)) @ WEIGHT, (rows(), table)
    )
    assert codes(plan) == ["other-dynamic-dimension", None]


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (
            lambda x, y: torch.ops.plantest.attention(x @ WEIGHT + y) @ WEIGHT,
            lambda n: (rows(n), torch.randn(1, HIDDEN).expand(n, HIDDEN)),
        ),
        (
            lambda x, y: torch.ops.plantest.attention(x @ WEIGHT + y) @ WEIGHT,
            lambda n: (rows(n), torch.randn(n, 1).expand(n, HIDDEN)),
        ),
        (
            lambda x, y: torch.ops.plantest.attention(x @ WEIGHT + y) @ WEIGHT,
            lambda n: (rows(n), torch.randn(1).expand(HIDDEN)),
        ),
        (lambda x: torch.ops.plantest.attention_expanded(x @ WEIGHT) @ WEIGHT, lambda n: (rows(n),)),
        (
            lambda x: (torch.ops.plantest.attention(x @ WEIGHT), (x @ WEIGHT)[:, :1].relu().expand(-1, 3)),
            lambda n: (rows(n),),
        ),
    ],
    ids=["rows", "columns", "without-tokens", "from-attention", "result"],
)
def test_expanded_tensors(function: Callable[..., Any], arguments: Callable[[int], tuple[Tensor, ...]]) -> None:
    plan = run_twice(function, arguments(4), arguments(3), arguments(8))
    assert codes(plan) == [None, None]
    assert ppb.stats().replays >= 10 and ppb.stats().padded_tokens >= 1


def test_an_integer_made_in_the_middle_of_a_call() -> None:
    def function(x: Tensor, at: Tensor) -> Tensor:
        n = at.max().item()
        torch._check(n >= 0)
        torch._check(n <= 8)
        return torch.ops.plantest.attention(x @ WEIGHT) @ WEIGHT * n

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        plan = run_twice(function, (rows(), torch.tensor([2, 3])), (rows(), torch.tensor([5, 1])))
    assert codes(plan) == [None, "no-tensor"]


def test_stage_inputs_that_disagree_on_the_tokens() -> None:
    def function(hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.plantest.attention(hidden_states @ WEIGHT) @ WEIGHT, residual @ WEIGHT

    plan = run_twice(function, (rows(4), rows(3)), mark=False)
    assert set(codes(plan)) == {"no-token-count"} and not plan.capturable
    assert ppb.stats().miss_reasons == {"no-token-count": 3 * len(plan.compute_steps)}
    assert "the stage inputs disagree on the token dimension" in ppb.explain()


def test_a_tensor_of_another_device() -> None:
    """The meta device stands for it; only the shape of its tensor is used."""

    def function(x: Tensor, template: Tensor) -> Tensor:
        return torch.ops.plantest.attention(x @ WEIGHT + torch.zeros_like(template, device=x.device)) @ WEIGHT

    plan = run_twice(function, (rows(), torch.empty(HIDDEN, device="meta")))
    assert "mixed-devices" in codes(plan)
    assert ppb.stats().miss_reasons["mixed-devices"] == 3 * codes(plan).count("mixed-devices")


# ------------------------------------------------------------------------------------ arrivals


def arrivals(plan: GraphPlan) -> dict[str, str]:
    return {plan.inputs[at].label: how for at, how in plan.arrivals.items() if at < len(plan.inputs)}


def test_how_each_input_arrives() -> None:
    large = torch.randn(SMALL_TENSOR_BYTES // (HIDDEN * 4) + 1, HIDDEN)
    small = torch.randn(HIDDEN)
    layer = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)

    def function(hidden_states: Tensor, positions: Tensor, large: Tensor, small: Tensor) -> Tensor:
        return torch.ops.plantest.attention(layer(hidden_states + large[positions] + small)) @ WEIGHT

    plan = run_twice(function, (rows(), torch.arange(4), large, small))
    assert arrivals(plan) == {
        "hidden_states": "landing",
        "positions": "copied",
        "large": "address",
        "small": "copied",
        "weight": "parameter",
        "WEIGHT": "copied",
    }
    assert plan.address_positions and all(plan.arrivals[at] == "address" for at in plan.address_positions)


def test_what_tells_the_number_of_tokens() -> None:
    plan = run_twice(lambda x: torch.ops.plantest.attention(x @ WEIGHT) @ WEIGHT, (rows(4),), (rows(3),))
    assert plan.token_symbol is not None
    position, dim = plan.token_source or (None, None)
    assert position is not None
    args: list[Any] = [None] * len(plan.inputs)
    args[position] = 7 if dim is None else rows(7)
    assert plan.count_tokens(args) == 7 and plan.symbols(7) == {plan.token_symbol: 7}
    assert [plan.bucket(n) for n in (1, 2, 4, 5, 8, 9)] == [1, 4, 4, 8, 8, None]


def test_a_static_graph_has_one_bucket() -> None:
    def function(hidden_states: Tensor) -> Tensor:
        return torch.ops.plantest.attention(hidden_states @ WEIGHT) @ WEIGHT

    plan = run_twice(function, (rows(5),), mark=False, max_tokens=6)
    assert plan.token_symbol is None and plan.count_tokens([]) == 5
    assert plan.bucket(5) == 5 and plan.bucket(7) is None and plan.symbols(5) == {}
    assert ppb.stats().padded_tokens == 0 and ppb.stats().replays == 4


def test_the_ladder_is_cut_where_the_graph_ends() -> None:
    def function(x: Tensor) -> Tensor:
        torch._check(x.shape[0] <= 6)
        return torch.ops.plantest.attention(x @ WEIGHT) @ WEIGHT

    plan = run_twice(function, (rows(5),), (rows(3),))
    assert plan.ladder == Ladder((1, 4, 6)) and plan.smallest_tokens == 2


# -------------------------------------------------------------------------------- given buffers


def test_an_output_argument_costs_no_copy() -> None:
    def function(x: Tensor) -> Tensor:
        h = x @ WEIGHT
        out = torch.empty_like(h)
        torch.ops.plantest.attention_into(h, out)
        return out @ WEIGHT

    plan = run_twice(function, (rows(),))
    ((step, (_, specs)),) = hoist_buffers(plan).items()
    assert plan.instructions[step].piece.kind == "eager" and len(specs) == 1
    assert ppb.stats().replays == 4 and ppb.stats().input_copies == 2  # x, in two calls


def test_a_returned_tensor_costs_one() -> None:
    plan = run_twice(lambda x: torch.ops.plantest.attention(x @ WEIGHT) @ WEIGHT, (rows(),))
    assert hoist_buffers(plan) == {}
    assert ppb.stats().replays == 4 and ppb.stats().input_copies == 4 - 1  # capturing counts no copies


# ------------------------------------------------------------------------------- static outputs


def test_static_outputs_of_every_dtype_are_spoiled_under_strict() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.ops.plantest.attention(x @ WEIGHT) @ WEIGHT
        return y, y > 0, (y * 10).long()

    options = {"compiler": "eager", "graphs": "emulate", "split_ops": "+plantest::*", "static_outputs": 1, "strict": 1}
    compiled = torch.compile(function, backend="pp_piecewise", options=options, fullgraph=True)
    x = rows()
    for _ in range(3):
        results = compiled(x)
        for one, other in zip(results, function(x), strict=True):
            torch.testing.assert_close(one, other)
    seen: list[bool] = []
    WATCHING.append(lambda: seen.append(
        results[0].isnan().all() and results[1].all() and (results[2] == torch.iinfo(torch.int64).max).all()
    ))  # fmt: skip
    try:
        later = compiled(rows())
    finally:
        WATCHING.clear()
    assert seen == [True]  # in the middle of the next call the results are gone
    assert not later[0].isnan().any()


def test_static_outputs_that_are_views_of_inputs_are_left_alone() -> None:
    options = {"compiler": "eager", "graphs": "emulate", "split_ops": "+plantest::*", "static_outputs": 1, "strict": 1}

    def function(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.plantest.attention(x @ WEIGHT + table[0]) @ WEIGHT, table[1:]

    compiled = torch.compile(function, backend="pp_piecewise", options=options, fullgraph=True)
    table = torch.randn(3, HIDDEN)
    before = table.clone()
    for _ in range(4):
        x = rows()
        for one, other in zip(compiled(x, table), function(x, table), strict=True):
            torch.testing.assert_close(one, other)
        assert torch.equal(table, before)
    assert ppb.stats().replays > 0

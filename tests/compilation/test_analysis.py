"""What each node of a graph is found to do: what it writes, shares and creates, and what numbers it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

import pp_piecewise_backend as ppb
from against_eager import check, steps, tokens
from pp_piecewise_backend.compilation.analysis import RANDOM, GraphFacts, collect_facts
from pp_piecewise_backend.errors import SplitError

WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))


pytestmark = pytest.mark.usefixtures("no_gradients")


def facts_of(function: Callable[..., Any], *arguments: Any) -> GraphFacts:
    """The facts about the graph that Dynamo makes of ``function``."""
    found: list[GraphFacts] = []

    def backend(graph_module: GraphModule, example_inputs: list[Any]) -> Any:
        found.append(collect_facts(graph_module, example_inputs))
        return graph_module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*arguments)
    return found[0]


def the_node(facts: GraphFacts, name: str) -> Node:
    (node,) = [node for node in facts.nodes if name in (node.target, getattr(node.target, "__name__", None))]
    return node


# ------------------------------------------------------------------------- memory that an op hands on

# Functions whose result is, or is not, memory of their argument. Decided by running them.
HANDING_ON: dict[str, Callable[[Tensor], Tensor]] = {
    "adjoint": lambda y: y.mH.mH,
    "alias": lambda y: torch.ops.aten.alias(y),
    "alpha_dropout in eval": lambda y: F.alpha_dropout(y, 0.5, False),
    "as_strided": lambda y: y.as_strided((2, 8), (8, 1)),
    "atleast_2d": torch.atleast_2d,
    "broadcast_tensors": lambda y: torch.broadcast_tensors(y, y[:1])[0],
    "broadcast_to": lambda y: torch.broadcast_to(y, y.shape),
    "cat of one": lambda y: torch.cat([y]),
    "channel_shuffle of one group": lambda y: F.channel_shuffle(y[None, :, :, None], 1)[0, :, :, 0],
    "chunk": lambda y: y.chunk(2, 1)[1],
    "clone": torch.clone,
    "conj": torch.conj,
    "conj_physical": torch.conj_physical,
    "contiguous": lambda y: y.contiguous(),
    "contiguous of a transpose": lambda y: y.t().contiguous(),
    "cpu": lambda y: y.cpu(),
    "data": lambda y: y.data,
    "detach": lambda y: y.detach(),
    "diagonal": lambda y: y.diagonal(),
    "dropout in eval": lambda y: F.dropout(y, 0.5, False),
    "dropout of nothing": lambda y: F.dropout(y, 0.0, True),
    "dropout2d in eval": lambda y: F.dropout2d(y[None, None], 0.5, False)[0, 0],
    "einsum": lambda y: torch.einsum("ij->ij", y),
    "expand_as": lambda y: y.expand_as(y),
    "feature_alpha_dropout in eval": lambda y: F.feature_alpha_dropout(y, 0.5, False),
    "flatten": lambda y: y.flatten(0, 0),
    "float": lambda y: y.float(),
    "imag": lambda y: torch.view_as_complex(y.view(-1, 4, 2)).imag,
    "index": lambda y: y[torch.arange(2)],
    "masked_fill": lambda y: y.masked_fill(y > 100, 0),
    "max": lambda y: y.max(0)[0],
    "narrow": lambda y: y.narrow(0, 0, 1),
    "new_zeros": lambda y: y.new_zeros(3),
    "pad by nothing": lambda y: F.pad(y, (0, 0)),
    "permute": lambda y: y.permute(1, 0),
    "positive": lambda y: +y,
    "real": torch.real,
    "repeat": lambda y: y.repeat(1, 1),
    "reshape": lambda y: y.reshape(-1, 2, 4),
    "reshape of a transpose": lambda y: y.t().reshape(-1),
    "resolve_conj": lambda y: y.resolve_conj(),
    "slice": lambda y: y[1:, 2:],
    "sort": lambda y: y.sort(0)[0],
    "split": lambda y: y.split(4, 1)[0],
    "squeeze": lambda y: y.squeeze(0),
    "sum_to_size": lambda y: y.sum_to_size(y.shape),
    "to another dtype": lambda y: y.to(torch.float64),
    "to the same dtype": lambda y: y.to(torch.float32),
    "to, copying": lambda y: y.to(torch.float32, copy=True),
    "topk": lambda y: y.topk(2)[0],
    "type_as": lambda y: y.type_as(y),
    "unbind": lambda y: y.unbind(1)[3],
    "unfold": lambda y: y.unfold(0, 1, 1),
    "view_as_complex": lambda y: torch.view_as_complex(y.view(-1, 4, 2)),
}


@pytest.mark.parametrize("name", HANDING_ON)
def test_a_write_through_what_an_op_returned_is_seen_where_eager_sees_it(name: str) -> None:
    hand_on = HANDING_ON[name]

    def function(x: Tensor) -> tuple[Tensor, ...]:
        y = x @ WEIGHT
        z = hand_on(y)
        attention = x.softmax(-1)
        z.add_(1)
        return y @ WEIGHT, attention, z, y

    program = check(function, *tokens(5, 9), split_ops="softmax")
    assert "e" in steps(program)


def test_an_output_of_a_tuple_is_renamed() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        values, indices = (x @ WEIGHT).topk(2)
        attention = x.softmax(-1)
        values.add_(1)
        return attention @ WEIGHT, values, indices

    check(function, *tokens(5, 9), split_ops="softmax")


# --------------------------------------------------------------------------------------- what is written


def write_by_method(x: Tensor, y: Tensor) -> None:
    y.add_(x)


def write_by_out(x: Tensor, y: Tensor) -> None:
    torch.add(x, 1, out=y)


def write_by_setitem(x: Tensor, y: Tensor) -> None:
    y[1:] = x[1:]


def write_by_mask(x: Tensor, y: Tensor) -> None:
    y[x > 0] = 0


def write_by_operator(x: Tensor, y: Tensor) -> None:
    y += x


def write_by_index_copy(x: Tensor, y: Tensor) -> None:
    y.index_copy_(0, torch.arange(x.shape[0]), x)


def write_through_a_view(x: Tensor, y: Tensor) -> None:
    y.view(-1)[2:].copy_(x.view(-1)[2:])


def write_through_detach(x: Tensor, y: Tensor) -> None:
    y.detach().mul_(x)


def write_by_functional_argument(x: Tensor, y: Tensor) -> None:
    F.relu(y, inplace=True)


def write_by_foreach(x: Tensor, y: Tensor) -> None:
    torch._foreach_add_([y], [x])


WRITERS = [
    write_by_method, write_by_out, write_by_setitem, write_by_mask, write_by_operator, write_by_index_copy,
    write_through_a_view, write_through_detach, write_by_functional_argument, write_by_foreach,
]  # fmt: skip


@pytest.mark.compat
@pytest.mark.parametrize("write", WRITERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("inference", [False, True], ids=["no-grad", "inference"])
def test_writes_are_found(write: Callable[[Tensor, Tensor], None], inference: bool) -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        write(x, y)
        return x + 1

    with torch.inference_mode(inference):
        facts = facts_of(function, torch.randn(5, 8), torch.randn(5, 8))
    memory = {node.name: facts.nodes[node].storages for node in facts.nodes if node.op == "placeholder"}
    written = {storage for node in facts.nodes.values() for storage in node.writes if storage >= 0}
    assert written == memory["l_y_"]
    assert written.isdisjoint(memory.get("l_x_", frozenset()))


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_are_a_write_in_training_only(training: bool) -> None:
    def function(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return F.batch_norm(x, mean, variance, training=training)

    facts = facts_of(function, torch.randn(5, 8), torch.zeros(8), torch.ones(8))
    memory = {node.name: facts.nodes[node].storages for node in facts.nodes if node.op == "placeholder"}
    statistics = memory["l_mean_"] | memory["l_variance_"]
    assert facts.nodes[the_node(facts, "batch_norm")].writes == (statistics if training else frozenset())


@pytest.mark.parametrize("function", [torch.rand_like, F.dropout, torch.bernoulli], ids=lambda f: f.__name__)
def test_random_ops_write_the_generator(function: Any) -> None:
    facts = facts_of(lambda x: function(x), torch.rand(5, 8))
    assert any(RANDOM in node.writes for node in facts.nodes.values())


def test_random_numbers_come_in_the_order_of_eager() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        first = torch.rand_like(x)
        y = (x @ WEIGHT).softmax(-1)
        second = torch.rand(x.shape[0], 8)
        z = F.dropout(y @ WEIGHT).softmax(-1)
        return first, second, torch.randn(3), z

    check(function, *tokens(5, 9, 1), split_ops="softmax")


# ----------------------------------------------------------------------------------------- sharing memory


def test_two_inputs_over_one_storage_count_as_one_memory() -> None:
    base = torch.randn(10, 8)
    facts = facts_of(lambda a, b, c: a.add_(1) + b + c, base[:5], base[5:], torch.randn(5, 8))
    a, b, c = [facts.nodes[node].storages for node in facts.nodes if node.op == "placeholder"]
    assert a == b != c


def test_what_is_born_and_what_is_a_view() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        product = torch.matmul(x, WEIGHT)
        return product.transpose(0, 1), torch.relu(product), product.to(torch.float32)

    facts = facts_of(function, torch.randn(5, 8))
    product = facts.nodes[the_node(facts, "matmul")]
    assert product.heavy
    assert product.born == product.storages
    transposed = facts.nodes[the_node(facts, "transpose")]
    assert (transposed.born, transposed.storages) == (frozenset(), product.born)
    assert facts.nodes[the_node(facts, "relu")].born.isdisjoint(product.born)
    assert facts.nodes[the_node(facts, "to")].returns_argument is the_node(facts, "matmul")


def test_gradients_are_noticed() -> None:
    x = torch.randn(5, 8, requires_grad=True)
    with torch.enable_grad():
        assert len(facts_of(lambda t: t * 2, x).needs_gradient) == 1
        assert facts_of(lambda t: t.detach() * 2, x).needs_gradient == ()
    assert facts_of(lambda t: t * 2, x).needs_gradient == ()


def test_a_shape_changed_in_place_is_not_followed() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ WEIGHT
        attention = y.softmax(-1)
        y.transpose_(0, 1)
        return y, attention

    program = check(function, *tokens(5, 9, 1), split_ops="softmax", unsplit=True)
    assert "transpose_" in program.explain()


def test_the_wrong_number_of_inputs_is_an_error() -> None:
    graph_module = torch.fx.symbolic_trace(lambda x: x + 1)
    with pytest.raises(SplitError, match="1 placeholders but 0 example inputs"):
        collect_facts(graph_module, [])


# ----------------------------------------------------------------------------------------------- numbers


def test_symbols_have_dynamos_hints_and_ranges() -> None:
    x = torch.randn(5, 8)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
    facts = facts_of(lambda t: t * 2, x)
    (symbol,) = facts.symbols.values()
    assert (symbol.hint, symbol.lower, symbol.upper) == (5, 2, 64)


def test_dynamos_own_shape_environment_gets_no_guard() -> None:
    """A padded call at any size in range must not recompile."""

    def function(x: Tensor) -> Tensor:
        return F.adaptive_avg_pool1d((x.softmax(-1) @ WEIGHT).t()[None], 10)

    program = check(function, *tokens(5, 9, 20, 10, 30), split_ops="softmax", compiler="aot_eager", tolerance=1e-6)
    assert program.stats.calls == 5
    assert ppb.stats().recompiles == 0

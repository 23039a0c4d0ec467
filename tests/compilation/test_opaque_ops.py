"""Ops with a kernel in Python (rule R8): whatever they read, a graph must not freeze it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library import opaque_object
from torch.utils.checkpoint import checkpoint

import pp_piecewise_backend as ppb
from against_eager import check, compute_ops, eager_ops
from tiers import slow_but

pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")

OPAQUE_BASE: Any = getattr(opaque_object, "OpaqueBase", None) or opaque_object.CustomClassBase  # since 2.14

STATE = {"scale": 1.0}
"""What an engine would call its forward context."""


def _scaled(x: Tensor) -> Tensor:
    return x * STATE["scale"]


@torch.library.custom_op("opaquetest::scaled", mutates_args=())
def scaled(x: Tensor) -> Tensor:
    return _scaled(x)


scaled.register_fake(torch.empty_like)


@torch.library.triton_op("opaquetest::with_triton", mutates_args=())
def with_triton(x: Tensor) -> Tensor:
    return _scaled(x)


@torch.library.custom_op("opaquetest::scale_", mutates_args=("x",))
def scale_(x: Tensor) -> None:
    x.mul_(STATE["scale"])


@torch.library.custom_op("opaquetest::set_scale", mutates_args=())
def set_scale(x: Tensor, scale: float) -> None:
    STATE["scale"] = scale


set_scale.register_fake(lambda x, scale: None)

_LIBRARY = torch.library.Library("opaquetest", "FRAGMENT")
_LIBRARY.define("composite(Tensor x) -> Tensor")
_LIBRARY.impl("composite", _scaled, "CompositeImplicitAutograd")


@torch.compiler.allow_in_graph
def left_alone(x: Tensor) -> Tensor:
    return _scaled(x)


def in_place(x: Tensor) -> Tensor:
    x = x.clone()  # lives in this call only
    scale_(x)
    return x


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "opaquetest::scaled": scaled,
    "tag_activation_checkpoint": lambda x: checkpoint(lambda y: scaled(y) + 1, x, use_reentrant=False),
    "opaquetest::with_triton": with_triton,
    "opaquetest::composite": torch.ops.opaquetest.composite,
    "opaquetest::scale_": in_place,
    "left_alone": left_alone,
}
WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) / 4
OPTIONS = {"compiler": "eager", "graphs": "emulate", "capture_sizes": "4", "max_tokens": 4}


def every_kind(x: Tensor) -> tuple[Tensor, ...]:
    return tuple(kind(x @ WEIGHT) @ WEIGHT for kind in KINDS.values())


def wrong_after_a_change(function: Callable[[Tensor], tuple[Tensor, ...]], **options: str) -> list[int]:
    """Which results are not those of eager once the state has changed."""
    STATE["scale"] = 1.0
    compiled = torch.compile(function, backend="pp_piecewise", options={**OPTIONS, **options}, fullgraph=True)
    x = torch.randn(4, 8)
    for _ in range(3):
        compiled(x)
    STATE["scale"] = 3.0
    pairs = zip(compiled(x), function(x), strict=True)
    return [index for index, (got, expected) in enumerate(pairs) if not torch.allclose(got, expected)]


def test_what_an_op_in_python_reads_is_read_in_each_call() -> None:
    assert not wrong_after_a_change(every_kind)
    (program,) = ppb.programs()
    assert set(KINDS) <= set(eager_ops(program)) and ppb.stats().replays > 0
    reasons = "; ".join(piece.reason for piece in program.pieces)
    for name in KINDS.keys() - {"tag_activation_checkpoint"}:
        assert f"{name} runs Python code, which may read what a graph would freeze; name it in graph_safe" in reasons
    assert "opaquetest::scale_ runs Python code" in " ".join(ppb.explain().split())


def test_declared_ops_are_captured_with_what_they_read() -> None:
    assert wrong_after_a_change(every_kind, graph_safe_ops="opaquetest::*,left_alone") == list(range(len(KINDS)))
    (program,) = ppb.programs()
    assert not eager_ops(program) and "opaquetest::scaled" in compute_ops(program)


def test_an_op_that_reads_state_stays_after_one_that_writes_it() -> None:
    """Although it needs no matrix product, and would be moved to the front."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        y = x @ WEIGHT
        set_scale(y, 5.0)
        y = y @ WEIGHT
        return scaled(x) @ WEIGHT, y

    assert not wrong_after_a_change(function)


def test_full_graphs_are_refused_over_ops_that_may_read_a_context() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return (scaled(x @ WEIGHT) @ WEIGHT,)

    assert not wrong_after_a_change(function, mode="full")
    (program,) = ppb.programs()
    assert not program.pieces
    assert "opaquetest::scaled runs Python code" in program.reason and "graph_safe_ops" in program.reason


def test_a_full_graph_is_compared_under_another_context_before_it_serves() -> None:
    """Declared wrongly: the op reads more than its arguments."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return (scaled(x @ WEIGHT) @ WEIGHT,)

    options = {"mode": "full", "graph_safe_ops": "opaquetest::scaled"}
    assert not wrong_after_a_change(function, **options)  # the first replay after the two that agreed
    assert ppb.stats().replays == 3
    text = " ".join(ppb.explain().split())
    assert "differs from the graph itself" in text and "take that op out of graph_safe_ops" in text
    ppb.reset()
    torch._dynamo.reset()

    contexts = itertools.count(1)

    def make_inputs(num_tokens: int) -> Any:
        STATE["scale"] = float(next(contexts))
        return (torch.randn(num_tokens, 8),), {}

    compiled = torch.compile(function, backend="pp_piecewise", options={**OPTIONS, **options}, fullgraph=True)
    ppb.warmup(compiled, make_inputs, progress=False)
    assert {tuple(p.graphs.dropped) for p in ppb.programs()} == {(4,), ()}  # one is for calls of 1 token only
    x = torch.randn(4, 8)
    with ppb.expect(replays=0):
        torch.testing.assert_close(compiled(x), function(x))


@pytest.mark.parametrize("op", ["vllm::moe_forward", "vllm::unified_attention_of_mine"])
def test_the_ops_of_engines_that_may_be_captured_are_known(op: str) -> None:
    namespace, name = op.split("::")
    with torch.library._scoped_library(namespace, "FRAGMENT") as library:
        library.define(f"{name}(Tensor x) -> Tensor")
        library.impl(name, torch.sin, "CPU")
        library.impl(name, torch.empty_like, "Meta")
        function: Any = getattr(getattr(torch.ops, namespace), name)
        program = check(lambda x: function(x @ WEIGHT) @ WEIGHT, (torch.randn(4, 8),))
    assert (op in compute_ops(program)) == (op == "vllm::moe_forward")


# ------------------------------------------------------------------------------------------ objects


class LayerName(OPAQUE_BASE):  # type: ignore[misc, valid-type]
    """As vLLM has it: each call makes new ones."""

    def __init__(self, value: str) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerName) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)

    def __fx_repr__(self) -> tuple[str, dict[str, type]]:
        return f"LayerName({self.value!r})", {"LayerName": LayerName}


class Handle(OPAQUE_BASE):  # type: ignore[misc, valid-type]
    """Equal to itself only."""

    def __init__(self, value: str) -> None:
        self.value = value


opaque_object.register_opaque_type(LayerName, typ="value", hoist=True)
opaque_object.register_opaque_type(Handle, typ="reference")

SCALES = {"a": 2.0, "b": 3.0, "c": 4.0}


def _expert(x: Tensor, layer: Any) -> Tensor:
    return x * SCALES[layer.value]


def _define(name: str, layer_type: type) -> Any:
    _expert.__annotations__["layer"] = layer_type
    _LIBRARY.define(name + torch.library.infer_schema(_expert, mutates_args=()))
    _LIBRARY.impl(name, _expert, "CPU")
    torch.library.register_fake(f"opaquetest::{name}", lambda x, layer: torch.empty_like(x), lib=_LIBRARY)
    return getattr(torch.ops.opaquetest, name)


of_layer, of_handle = _define("of_layer", LayerName), _define("of_handle", Handle)
SAFE = {"graph_safe_ops": "opaquetest::*", "row_wise_ops": "opaquetest::*"}


class Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in SCALES)
        self.handles = [Handle("c") for _ in SCALES]

    def forward(self, x: Tensor) -> Tensor:
        for layer, handle, name in zip(self.layers, self.handles, SCALES, strict=True):
            x = layer(x)
            x = x + torch.nn.functional.scaled_dot_product_attention(x[None], x[None], x[None])[0]
            x = of_handle(of_layer(x, LayerName(name)) @ WEIGHT, handle)
        return x


@pytest.mark.parametrize("compiler", slow_but(["eager"], ["eager", "inductor"]))
def test_pieces_that_take_objects_replay_and_share_a_compilation(compiler: str) -> None:
    model = Layers()
    options: Any = {**OPTIONS, "compiler": compiler, **SAFE}
    compiled = torch.compile(model, backend="pp_piecewise", options=options, fullgraph=True)
    for index, num_tokens in enumerate((4, 4, 3, 4)):
        x = torch.randn(num_tokens, 8)
        if index == 0:
            torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    (program,) = ppb.programs()
    keys = [piece.key for piece in program.pieces if piece.kind == "compute"]
    assert len(keys) == 4 and len(set(keys)) == 3  # before the first attention, between two, after the last
    assert all(compiled.failure is None for compiled in program.compiled if compiled is not None)
    assert ppb.stats().miss_reasons == {"first-call": 4} and ppb.stats().padded_tokens == 1
    assert "scalar l_self_handles_0_" not in ppb.explain() and "Handle: an object" in ppb.explain()


def test_another_object_is_no_longer_the_one_that_was_captured() -> None:
    def function(x: Tensor, layer: LayerName, handle: Handle) -> tuple[Tensor, Tensor]:
        return of_layer(x @ WEIGHT, layer) @ WEIGHT, of_handle(x @ WEIGHT, handle)

    compiled = torch.compile(function, backend="pp_piecewise", options={**OPTIONS, **SAFE}, fullgraph=True)
    x, one, other = torch.randn(4, 8), Handle("a"), Handle("b")
    compiled(x, LayerName("a"), one)
    program = ppb.programs()[-1]

    def replays(layer: LayerName, handle: Handle) -> int:
        before = ppb.stats().replays
        given = {"x": x, "layer": layer, "handle": handle}  # to the program itself, past the guards of Dynamo
        results = program(*(given.get(i.label, WEIGHT) for i in program.inputs))
        torch.testing.assert_close(list(results), list(function(x, layer, handle)))
        return int(ppb.stats().replays - before)

    assert [replays(LayerName("a"), one) for _ in range(2)] == [1, 1]
    assert replays(LayerName("b"), one) == 0 and replays(LayerName("a"), other) == 0
    assert replays(LayerName("a"), Handle("a")) == 0
    assert ppb.stats().miss_reasons["scalar-changed"] == 3
    assert replays(LayerName("a"), one) == 1

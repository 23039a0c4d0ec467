"""Ops with a kernel in Python (rule R8): whatever they read, a graph must not freeze it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pp_piecewise_backend as ppb
from against_eager import check, compute_ops, eager_ops

pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")

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
    ppb.reset()
    torch._dynamo.reset()
    assert wrong_after_a_change(function, mode="full", graph_safe_ops="opaquetest::scaled")
    assert ppb.stats().replays > 0


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

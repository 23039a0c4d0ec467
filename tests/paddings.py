"""What the graph of a small function says of padding its pieces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import pp_piecewise_backend as ppb
from pp_piecewise_backend.runtime.program import Program

HIDDEN = 4
WEIGHT = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0))


@torch.library.custom_op("traitstest::attention", mutates_args=())
def attention(x: Tensor) -> Tensor:
    return x.softmax(-1)


@attention.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def paddings(
    function: Callable[..., Any], *inputs: Tensor, split_ops: str = "+traitstest::*", **more: str
) -> list[str]:
    """What the graph says of padding each compute piece of a function; all sizes of dimension 0 are one symbol."""
    for tensor in inputs:
        torch._dynamo.mark_dynamic(tensor, 0)
    options = {"compiler": "eager", "graphs": "emulate", "split_ops": split_ops, "graph_safe_ops": "*::*", **more}
    torch.compile(function, backend="pp_piecewise", options=options, fullgraph=True)(*inputs)
    (program,) = ppb.programs()
    assert isinstance(program, Program), ppb.explain()
    return [piece.padding for piece in program.split.pieces if piece.kind == "compute"]


def paddings_of(bodies: Mapping[str, Callable[[Tensor], Tensor]]) -> dict[str, str]:
    """The same for bodies on ``[tokens, hidden]``, each a piece in front of an attention: all in one program.

    Attention that torch has is no border here.
    """

    def all_of_them(x: Tensor) -> list[Tensor]:
        return [torch.ops.traitstest.attention(body(x @ WEIGHT)) for body in bodies.values()]

    found = paddings(all_of_them, torch.randn(5, HIDDEN), split_ops="traitstest::*")
    return dict(zip(bodies, found, strict=True))


UNDECIDED = "not tested yet"

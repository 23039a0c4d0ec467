"""Which pieces share one compilation: all that mean the same, and no others."""

from __future__ import annotations

import contextlib
import os
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pp_piecewise_backend as ppb
from against_eager import check, tokens
from forked import run_program

WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))


pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")


def softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


def distinct_pieces(program: Any) -> int:
    return len({piece.key for piece in program.pieces if piece.kind == "compute"})


def make_scaling(factor: int) -> Callable[[Tensor], Tensor]:
    @torch.compiler.allow_in_graph
    def scaling(x: Tensor) -> Tensor:
        return x * factor

    return scaling


DOUBLE, TRIPLE = make_scaling(2), make_scaling(3)
FLAG = torch.tensor(False)


def equal_layers(x: Tensor) -> Tensor:
    for _ in range(4):
        x = softmax((x @ WEIGHT).relu())
    return x


def equal_layers_with_own_weights(x: Tensor) -> Tensor:
    for index in range(4):
        x = softmax((x @ WEIGHTS[index]).relu())
    return x


WEIGHTS = [torch.randn(8, 8) for _ in range(4)]


def two_closures_of_one_name(x: Tensor) -> Tensor:
    return DOUBLE(softmax(TRIPLE(softmax(DOUBLE(x @ WEIGHT)) @ WEIGHT)) @ WEIGHT)


def constants_of_several_types(x: Tensor) -> Tensor:
    x = softmax((x @ WEIGHT) * 2)
    x = softmax((x @ WEIGHT) * 2.0)
    x = softmax((x @ WEIGHT) * 3)
    return softmax((x @ WEIGHT) * True)


def keyword_arguments(x: Tensor) -> Tensor:
    y = softmax((x @ WEIGHT).sum(0, keepdim=True) + x)
    y = softmax((y @ WEIGHT).sum(0) + x)
    return softmax(torch.sum(y @ WEIGHT, dim=0) + x)


def slices(x: Tensor) -> Tensor:
    x = softmax((x @ WEIGHT)[1:])
    x = softmax((x @ WEIGHT)[:-1])
    return softmax((x @ WEIGHT)[0:2])


def dtypes(x: Tensor) -> Tensor:
    x = softmax((x @ WEIGHT).to(torch.float64).float())
    return softmax((x @ WEIGHT).to(torch.bfloat16).float())


def the_same_input_twice(x: Tensor) -> Tensor:
    y = softmax(torch.matmul(x, x.t()) @ x)
    return softmax(torch.matmul(y, x.t()) @ x)


def other_outputs(x: Tensor) -> tuple[Tensor, ...]:
    y = x @ WEIGHT
    a, b = y + 1, y + 2
    y = softmax(a) @ WEIGHT
    c, d = y + 1, y + 2
    return b, c, softmax(d)


def branches(x: Tensor) -> Tensor:
    x = softmax(torch.cond(FLAG, lambda t: t.sin(), lambda t: t.cos(), (x @ WEIGHT,)))
    x = softmax(torch.cond(FLAG, lambda t: t.sin(), lambda t: t.exp(), (x @ WEIGHT,)))
    return softmax(torch.cond(FLAG, lambda t: t.sin(), lambda t: t.cos(), (x @ WEIGHT,)))


def branches_with_numbers(x: Tensor) -> Tensor:
    n = x.shape[0]
    x = softmax(torch.cond(FLAG, lambda t: t.sin() * n, lambda t: t * (n + 1), (x @ WEIGHT,)))
    return softmax(torch.cond(FLAG, lambda t: t.sin() * n, lambda t: t * (n + 2), (x @ WEIGHT,)))


def checkpoints(x: Tensor) -> Tensor:
    x = softmax(checkpoint(lambda t: (t @ WEIGHT).sin(), x, use_reentrant=False))
    x = softmax(checkpoint(lambda t: (t @ WEIGHT).cos(), x, use_reentrant=False))
    return softmax(checkpoint(lambda t: (t @ WEIGHT).sin(), x, use_reentrant=False))


def autocast(x: Tensor) -> Tensor:
    x = softmax((x @ WEIGHT).float())
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            x = softmax((x @ WEIGHT).float())
    return x


@pytest.mark.parametrize(
    ("function", "distinct"),
    [
        (equal_layers, 1),
        (equal_layers_with_own_weights, 1),
        (two_closures_of_one_name, 2),
        (constants_of_several_types, 4),
        (keyword_arguments, 3),
        (slices, 3),
        (dtypes, 2),
        (the_same_input_twice, 2),
        (other_outputs, 2),
        (branches, 2),
        (branches_with_numbers, 2),
        (checkpoints, 2),
        (autocast, 3),
    ],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_layers_of_one_program(function: Any, distinct: int) -> None:
    program = check(function, *tokens(5), split_ops="softmax", graph_safe_ops="scaling",
                    exact_strides=function is not autocast)  # fmt: skip
    assert distinct_pieces(program) == distinct
    assert ppb.stats().pieces_compiled == distinct


def compile_once(function: Callable[[Tensor], Tensor], x: Tensor, **options: Any) -> str:
    """The key of the first piece of ``function`` for this input."""
    options = {"compiler": "eager", "split_ops": "softmax", **options}
    torch.compile(function, backend="pp_piecewise", options=options)(x)
    return ppb.programs()[-1].pieces[0].key


def layer(x: Tensor) -> Tensor:
    return softmax(x * 2)


def same_layer_again(x: Tensor) -> Tensor:
    return softmax(x * 2)


INPUTS = {
    "contiguous": lambda: torch.randn(8, 8),
    "transposed": lambda: torch.randn(8, 8).t(),
    "part of a row": lambda: torch.randn(8, 16)[:, :8],
    "expanded": lambda: torch.randn(1, 8).expand(8, 8),
    "later in its storage": lambda: torch.randn(9, 8)[1:],
    "bfloat16": lambda: torch.randn(8, 8).bfloat16(),
    "other size": lambda: torch.randn(9, 8),
}


@pytest.mark.parametrize("name", INPUTS)
def test_geometry_of_inputs_is_part_of_the_key(name: str) -> None:
    reference = compile_once(layer, torch.randn(8, 8))
    torch._dynamo.reset()
    assert (compile_once(same_layer_again, INPUTS[name]()) == reference) == (name == "contiguous")


@pytest.mark.parametrize(("largest", "equal"), [(16, True), (64, False)])
def test_ranges_of_symbols_are_part_of_the_key(largest: int, equal: bool) -> None:
    keys = []
    for function, maximum in ((layer, 16), (same_layer_again, largest)):
        x = torch.randn(5, 8)
        torch._dynamo.mark_dynamic(x, 0, min=2, max=maximum)
        keys.append(compile_once(function, x))
    assert (keys[0] == keys[1]) == equal
    assert ppb.stats().pieces_compiled == (1 if equal else 2)


def ambient_layer(x: Tensor) -> Tensor:
    return softmax(x @ WEIGHT) @ WEIGHT + torch.full((8,), 0.5)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_what_is_ambient_is_never_shared(compiler: str) -> None:
    options = {"compiler": compiler, "split_ops": "softmax"}
    compiled = torch.compile(ambient_layer, backend="pp_piecewise", options=options)
    x = torch.randn(5, 8)
    for surroundings, pieces in (
        (contextlib.nullcontext(), 2),
        (default_dtype(torch.float64), 4),
        (torch.autocast("cpu", torch.bfloat16), 6),
        (contextlib.nullcontext(), 6),
        (torch.autocast("cpu", torch.float16), 8),
    ):
        with surroundings:
            expected = ambient_layer(x)
            torch.testing.assert_close(compiled(x), expected, rtol=1e-2, atol=1e-2)
        assert ppb.stats().pieces_compiled == pieces


def test_the_compiler_is_part_of_what_is_shared() -> None:
    x = torch.randn(5, 8)
    key = compile_once(layer, x)
    assert compile_once(same_layer_again, x, compiler="aot_eager") == key
    assert ppb.stats().pieces_compiled == 2


SCRIPT = """
import torch, pp_piecewise_backend as ppb
model = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
x = torch.randn(1, 5, 8)
torch._dynamo.mark_dynamic(x, 1)
with torch.no_grad():
    torch.compile(model, backend="pp_piecewise", options={"compiler": "eager"})(x)
    torch.compile(lambda t: (t @ t.mT).softmax(-1).cumsum(0) + 1.5, backend="pp_piecewise",
                  options={"compiler": "eager", "split_ops": "softmax"})(x)
print([piece.key for program in ppb.programs() for piece in program.pieces])
"""


def test_keys_are_equal_in_another_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that was started on its own, with addresses and hashes of its own."""
    (tmp_path / "program.py").write_text(f"print(hash('hash'))\n{SCRIPT}")
    runpy.run_path(str(tmp_path / "program.py"))
    hash_here, keys_here = capsys.readouterr().out.splitlines()
    other = run_program(tmp_path / "program.py")
    hash_there, keys_there = other.log.splitlines()
    assert hash_here != hash_there or "PYTHONHASHSEED" in os.environ
    assert keys_here == keys_there
    assert keys_here.count("'") >= 8

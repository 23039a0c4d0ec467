"""A split graph as instructions over registers: numbering, lifetimes, and where compiled code may not run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

import pp_piecewise_backend as ppb
from pp_piecewise_backend.compilation.inductor import CompiledPiece
from pp_piecewise_backend.runtime.cudagraphs.memory import address
from pp_piecewise_backend.runtime.instructions import Layout, lay_out
from pp_piecewise_backend.runtime.program import Program

pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")

WEIGHT = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


@torch.library.custom_op("stepstest::attention", mutates_args=())
def attention(x: Tensor) -> Tensor:
    return x.softmax(-1)


@attention.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("stepstest::attention_in_place", mutates_args=("x",))
def attention_in_place(x: Tensor) -> None:
    x.copy_(x.softmax(-1))


def program_of(function: Callable[..., Any], *arguments: Any) -> Program:
    torch._dynamo.mark_dynamic(arguments[0], 0)
    options = {"compiler": "eager", "split_ops": "+stepstest::*"}
    torch.compile(function, backend="pp_piecewise", options=options, fullgraph=True)(*arguments)
    (program,) = ppb.programs()
    assert isinstance(program, Program)
    return program


def two_layers(x: Tensor) -> tuple[Tensor, Tensor, int]:
    first = torch.ops.stepstest.attention(x @ WEIGHT)
    second = torch.ops.stepstest.attention(first @ WEIGHT + x)
    return second, first, 7


def inputs_of(program: Program, x: Tensor) -> list[Any]:
    given = {"x": x, "WEIGHT": WEIGHT}
    return [given[i.label] if i.spec is not None else len(x) for i in program.inputs]


# ------------------------------------------------------------------------------- numbering


def test_registers_are_inputs_then_constants_then_values_made() -> None:
    program = program_of(two_layers, torch.randn(5, 4))
    layout = program.layout
    names = [i.name for i in program.inputs]
    assert [layout.registers[name] for name in names] == list(range(len(names)))
    assert sorted(layout.registers.values()) == list(range(len(layout.registers)))
    assert layout.values_made == len(layout.registers) - len(names) - len(layout.constants)
    made = [register for instruction in layout.instructions for register in instruction.outputs]
    assert len(made) == len(set(made)) and min(made) >= len(names) + len(layout.constants)


def test_nothing_is_read_before_it_is_made_nor_after_its_end() -> None:
    program = program_of(two_layers, torch.randn(5, 4))
    layout = program.layout
    alive = set(range(len(program.inputs) + len(layout.constants)))
    for instruction in layout.instructions:
        for source in instruction.arguments:
            assert (source if isinstance(source, int) else source[0]) in alive
        alive |= set(instruction.outputs)
        assert set(instruction.ends) <= alive
        alive -= set(instruction.ends)
    results = set(layout.results)
    assert results <= alive
    # What is neither an input, a constant nor a result has ended.
    assert alive <= results | set(range(len(program.inputs) + len(layout.constants)))


def test_results_are_registers_or_constants() -> None:
    x = torch.randn(5, 4)
    program = program_of(two_layers, x)
    results, plain = program.layout.run(inputs_of(program, x))
    expected = two_layers(x)
    assert plain == {}
    tensors = [result for result in results if isinstance(result, Tensor)]
    assert torch.equal(tensors[0], expected[0]) and torch.equal(tensors[1], expected[1])


# ---------------------------------------------------------------------- where code does not hold


def test_a_step_runs_plain_where_its_code_does_not_hold_and_says_for_which_sizes() -> None:
    x = torch.randn(5, 4)
    program = program_of(lambda x: torch.ops.stepstest.attention((x @ WEIGHT).view(x.shape[0], 2, 2)), x)
    symbol = program.table.token_count
    assert isinstance(symbol, sympy.Symbol)
    calls: list[int] = []

    def code(*arguments: Any) -> Any:
        calls.append(1)
        return program.split.pieces[0].graph_module.forward(*arguments)

    compiled: list[CompiledPiece | None] = [None] * len(program.split.pieces)
    symbols = [spec.symbol for spec in program.split.pieces[0].input_specs if type(spec).__name__ == "SymbolSpec"]
    assert symbols == [symbol]
    compiled[0] = CompiledPiece((), code, (sympy.Symbol("s0") <= 5,), 0.0)
    layout = lay_out(program.split, program.table, compiled, pieces_are_exact=True)
    assert layout.instructions[0].symbol_positions != ()
    _, plain = layout.run(inputs_of(program, x))
    assert plain == {} and calls == [1]
    longer = torch.randn(6, 4)
    (result, *_), plain = layout.run(inputs_of(program, longer))
    assert plain == {0: [6]} and calls == [1]
    assert torch.equal(result, (longer @ WEIGHT).view(6, 2, 2).softmax(-1))


# --------------------------------------------------------------------------------- own memory


def merged_layout(program: Program, code: Callable[..., Any], exact: bool) -> Layout:
    compiled: list[CompiledPiece | None] = [None] * len(program.split.pieces)
    compiled[0] = CompiledPiece((), code, (), 0.0)
    return lay_out(program.split, program.table, compiled, pieces_are_exact=exact)


def test_outputs_that_compiled_code_merged_with_inputs_get_memory_of_their_own() -> None:
    x = torch.randn(5, 4)

    def function(x: Tensor) -> Tensor:
        h = (x @ WEIGHT).relu()
        torch.ops.stepstest.attention_in_place(h)
        return h

    program = program_of(function, x)
    piece = program.split.pieces[0]
    assert piece.own_memory == (True,)
    at = next(i for i, spec in enumerate(piece.input_specs) if spec is not None and spec == program.inputs[
        next(k for k, one in enumerate(program.inputs) if one.label == "x")].spec)  # fmt: skip

    def code(*arguments: Any) -> Any:
        return [arguments[at]]  # as if the compiler knew that nothing changes

    arguments = [x if i == at else WEIGHT for i in range(len(piece.input_specs))]
    instruction = merged_layout(program, code, exact=False).instructions[0]
    for _ in range(2):
        (output,) = instruction.run(arguments)
        assert torch.equal(output, x) and address(output) != address(x)
    assert instruction.cloned_outputs == (0,)
    trusted = merged_layout(program, code, exact=True).instructions[0]
    assert trusted.run(arguments)[0] is x and trusted.cloned_outputs == ()


def test_address() -> None:
    x = torch.randn(4, 4)
    assert address(x) == address(x[2:]) == address(x.t()) != address(x.clone())

"""How a program runs: whose memory is whose, how long it lives, what is counted, and who may call it when."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pp_piecewise_backend as ppb
from models.toy_stage import NAMED_OPS, ToyStage
from pp_piecewise_backend.runtime.program import Program

HIDDEN = 8


@torch.library.custom_op("programtest::attention", mutates_args=())
def attention(x: Tensor) -> Tensor:
    return x.softmax(-1) + 1


@attention.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


OBSERVED: dict[str, Any] = {"live": None, "watched": [], "fail": False}


@torch.library.custom_op("programtest::attention_that_observes", mutates_args=())
def attention_that_observes(x: Tensor) -> Tensor:
    """Counts which of the tensors that it saw before are still alive; raises when told to."""
    OBSERVED["live"] = [reference() is not None for reference in OBSERVED["watched"]]
    OBSERVED["watched"].append(weakref.ref(x.untyped_storage()))
    if OBSERVED["fail"]:
        raise ValueError("told to fail")
    return x * 2


@attention_that_observes.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    ppb.reset()
    OBSERVED.update(live=None, watched=[], fail=False)
    with torch.no_grad():
        yield
    ppb.reset()


def compiled(function: Callable[..., Any], compiler: str = "eager", **more: Any) -> Callable[..., Any]:
    options = {"compiler": compiler, "split_ops": "+programtest::*"}
    return torch.compile(function, backend="pp_piecewise", options=options, **more)


def the_program() -> Program:
    (program,) = ppb.programs()
    assert isinstance(program, Program)
    return program


class Layers(nn.Module):
    def __init__(self, num_layers: int = 2) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.linears:
            x = torch.ops.programtest.attention(linear(x)).relu()
        return x


# ------------------------------------------------------------------------------- memory


@pytest.mark.compat
def test_outputs_belong_to_the_caller() -> None:
    model = Layers()
    run = compiled(model)
    inputs = [torch.randn(3, HIDDEN) for _ in range(3)]
    outputs = [run(x) for x in inputs]
    for x, output in zip(inputs, outputs, strict=True):  # later calls changed nothing
        torch.testing.assert_close(output, model(x), rtol=0, atol=0)
    outputs[0].zero_()
    torch.testing.assert_close(run(inputs[0]), model(inputs[0]), rtol=0, atol=0)
    assert the_program().stats.calls == 4


@pytest.mark.compat
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_no_tensor_outlives_the_call(compiler: str) -> None:
    run = compiled(Layers(), compiler)
    run(torch.randn(3, HIDDEN))
    x = torch.randn(3, HIDDEN)
    output = run(x)
    references = [weakref.ref(x.untyped_storage()), weakref.ref(output.untyped_storage())]
    count_before = len(_tensors_alive())
    del x, output
    assert [reference() for reference in references] == [None, None]
    assert len(_tensors_alive()) <= count_before - 2
    run(torch.randn(3, HIDDEN))
    assert len(_tensors_alive()) <= count_before - 2  # nor does anything made inside


def _tensors_alive() -> list[int]:
    gc.collect()
    return [id(item) for item in gc.get_objects() if type(item) is Tensor]


def test_memory_is_freed_after_its_last_use() -> None:
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        for _ in range(4):
            x = torch.ops.programtest.attention_that_observes(x @ weight)
        return x

    run = compiled(forward)
    weight = torch.randn(HIDDEN, HIDDEN)
    run(torch.randn(3, HIDDEN), weight)
    assert the_program().stats.pieces == 4
    OBSERVED.update(live=None, watched=[])
    run(torch.randn(3, HIDDEN), weight)
    # In the fourth attention, what the first and the second one took is gone.
    assert OBSERVED["live"][:2] == [False, False]


def test_inputs_of_a_failed_call_are_freed_and_the_program_goes_on() -> None:
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.programtest.attention_that_observes(x @ weight) @ weight

    run = compiled(forward)
    x, weight = torch.randn(3, HIDDEN), torch.randn(HIDDEN, HIDDEN)
    wanted = run(x, weight)
    OBSERVED["fail"] = True
    with pytest.raises(ValueError, match="told to fail"):
        run(x, weight)
    OBSERVED["fail"] = False
    assert not torch.is_grad_enabled()
    torch.testing.assert_close(run(x, weight), wanted, rtol=0, atol=0)
    reference = weakref.ref(x)
    del x
    gc.collect()
    assert reference() is None
    assert the_program().stats.calls == 2  # the one that failed is no finished call


def test_grad_mode_is_restored_after_a_call_and_after_a_failure() -> None:
    def forward(x: Tensor) -> Tensor:
        return torch.ops.programtest.attention_that_observes(x * 2)

    run = compiled(forward)
    with torch.enable_grad():
        run(torch.randn(3))
        assert torch.is_grad_enabled()
        OBSERVED["fail"] = True
        with pytest.raises(ValueError, match="told to fail"):
            run(torch.randn(3))
        assert torch.is_grad_enabled()


# ------------------------------------------------------------------ aliases, strides, sizes


@pytest.mark.compat
def test_aliases_and_strides_as_eager() -> None:
    def forward(x: Tensor, weight: Tensor) -> tuple[Any, ...]:
        y = torch.ops.programtest.attention(x @ weight)
        z = (y @ weight).t()
        return x, x[1:], y, y.t(), z, z[2:], y, {"again": [y.view(-1)]}, 3, None

    run = compiled(forward)
    x, weight = torch.randn(4, HIDDEN), torch.randn(HIDDEN, HIDDEN)
    want, got = forward(x, weight), run(x, weight)
    wanted, outputs = (torch.utils._pytree.tree_flatten(value) for value in (want, got))
    assert outputs[1] == wanted[1]
    for output, expected in zip(outputs[0], wanted[0], strict=True):
        if isinstance(expected, Tensor):
            torch.testing.assert_close(output, expected, rtol=0, atol=0)
            assert output.stride() == expected.stride() and output.storage_offset() == expected.storage_offset()
        else:
            assert output == expected
    assert _memory_groups([x, *outputs[0]]) == _memory_groups([x, *wanted[0]])
    assert got[0] is x and got[2] is got[6]


def _memory_groups(values: list[Any]) -> list[int]:
    pointers = [value.untyped_storage().data_ptr() if isinstance(value, Tensor) else -1 for value in values]
    return [pointers.index(pointer) for pointer in pointers]


def test_two_results_that_inductor_merges_are_separate_again() -> None:
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.ops.programtest.attention(x)
        y = torch.nn.functional.dropout(x, 0.5, training=False)
        return y + 1, (x + 1).clone()

    run = compiled(forward, "inductor")
    x = torch.randn(4, HIDDEN)
    for _ in range(2):
        first, second = run(x)
        torch.testing.assert_close(first, second)
        assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    assert the_program().stats.pieces == 1


@pytest.mark.parametrize("shape", [(0, HIDDEN), (3, 0), (0, 0)])
def test_zero_size_tensors(shape: tuple[int, int]) -> None:
    def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.ops.programtest.attention(x @ weight)
        return y @ weight.t(), y

    x, weight = torch.randn(shape), torch.randn(shape[1], 5)
    for output, expected in zip(compiled(forward)(x, weight), forward(x, weight), strict=True):
        assert output.shape == expected.shape and output.stride() == expected.stride()
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
    assert the_program().stats.calls == 1


@pytest.mark.compat
def test_constants_of_the_graph() -> None:
    table = torch.arange(HIDDEN, dtype=torch.float32)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        offset = torch.tensor([1.0, 2.0])
        y = torch.ops.programtest.attention(x @ torch.eye(HIDDEN) + table)
        return y + offset[0], offset

    x = torch.randn(3, HIDDEN)
    run = compiled(forward)
    for _ in range(2):
        output, offset = run(x)
        torch.testing.assert_close(output, forward(x)[0], rtol=0, atol=0)
        torch.testing.assert_close(offset, torch.tensor([1.0, 2.0]))
        offset.zero_()  # ours: the next call must not see it


def test_constants_of_a_symbolically_traced_graph_stay_as_they_are() -> None:
    from pp_piecewise_backend.backend import backend

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(2))
            self.linear = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            self.count.add_(x.sum() * 0 + 1)  # of the traced x, or tracing would run it
            return torch.relu(self.linear(x)) + self.count, self.count

    module = Module().requires_grad_(False)
    reference = copy.deepcopy(module)
    x = torch.randn(3, 2)
    program = backend(torch.fx.symbolic_trace(module), [x], options={"compiler": "eager"})
    for _ in range(2):
        output, count = program(x)
        expected, expected_count = reference(x)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(count, expected_count)
        assert count.untyped_storage().data_ptr() == module.count.untyped_storage().data_ptr()


# ------------------------------------------------------------------------------ counters


class _CountAttention(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += "toy::attention" in func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.compat
def test_counters_against_an_observer() -> None:
    stage = ToyStage(3)
    run = torch.compile(stage, backend="pp_piecewise", options={"compiler": "eager", **NAMED_OPS})
    with ppb.expect(programs=1, calls=1, eager_steps=3, pieces=4, pieces_compiled=3, pieces_reused=1, recompiles=0):
        run(**stage.make_inputs(5))
    program = the_program()
    ran: list[int] = []
    for instruction in program.layout.instructions:
        instruction.call = _recording(ran, instruction.piece.index, instruction.call)
    with ppb.expect(programs=0, calls=3, eager_steps=9, pieces=0, pieces_compiled=0):
        for seed in range(3):
            run(**stage.make_inputs(5, seed=seed))
    assert ran == [piece.index for piece in program.pieces] * 3
    eager = [index for index in ran if program.pieces[index].kind == "eager"]
    assert len(eager) == 9

    observer = _CountAttention()
    with observer:  # Dynamo leaves compiled code alone under a dispatch mode, so the program is called itself
        program(*_program_arguments(program, stage, stage.make_inputs(5)))
    assert observer.calls == 3
    assert program.stats.calls == 5 and program.stats.eager_steps == 15


def _recording(ran: list[int], index: int, call: Callable[..., Any]) -> Callable[..., Any]:
    def recorded(*args: Any) -> Any:
        ran.append(index)
        return call(*args)

    return recorded


def _program_arguments(program: Program, stage: nn.Module, inputs: dict[str, Any]) -> list[Any]:
    return [eval(graph_input.source, {"L": {"self": stage, **inputs}}) for graph_input in program.inputs]


@pytest.mark.compat
def test_totals_keep_what_a_dead_program_counted() -> None:
    run = compiled(Layers())
    run(torch.randn(3, HIDDEN))
    before = ppb.stats()
    reference = weakref.ref(the_program())
    del run
    torch._dynamo.reset()
    gc.collect()
    assert reference() is None and ppb.programs() == ()
    assert ppb.stats() == before and before.calls == 1


# --------------------------------------------------------------------- threads and instances


def test_threads_call_one_program() -> None:
    linears = Layers(3)
    run = compiled(linears)
    run(torch.randn(4, HIDDEN))
    program = the_program()
    arguments = [_program_arguments(program, linears, {"x": torch.randn(4, HIDDEN)}) for _ in range(4)]
    x_at = next(index for index, graph_input in enumerate(program.inputs) if graph_input.label == "x")
    wanted = [linears(values[x_at]) for values in arguments]
    failures: list[str] = []
    barrier = threading.Barrier(4)

    def work(index: int) -> None:
        barrier.wait(timeout=60)
        for _ in range(50):
            (output,) = program(*arguments[index])
            if not torch.equal(output, wanted[index]):
                failures.append(f"thread {index}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
    assert program.stats.calls == 201 and program.stats.eager_steps == 201 * 3


@pytest.mark.compat
def test_two_instances_through_one_program() -> None:
    torch.manual_seed(0)
    first, second = Layers(), Layers()

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        return model(x)

    run = compiled(forward)
    x = torch.randn(3, HIDDEN)
    for model in (first, second, first):
        torch.testing.assert_close(run(model, x), model(x), rtol=0, atol=0)
    assert not torch.equal(first(x), second(x))
    assert sum(program.stats.calls for program in ppb.programs()) == 3


def test_two_compiled_instances_of_one_class() -> None:
    stages = [ToyStage(1, seed=seed) for seed in range(3)]
    references = copy.deepcopy(stages)
    runs = [torch.compile(s, backend="pp_piecewise", options={"compiler": "eager", **NAMED_OPS}) for s in stages]
    for start in (0, 4):
        for run, stage, reference in zip(runs, stages, references, strict=True):
            inputs = stage.make_inputs(4, start)
            for got, want in zip(run(**inputs), reference(**inputs), strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=0)
            torch.testing.assert_close(stage.layers[0].attention.k_cache, reference.layers[0].attention.k_cache)
    assert sum(program.stats.calls for program in ppb.programs()) == 6
    assert ppb.stats().pieces_compiled == 2


# --------------------------------------------------------------------- what compilers rely on


def test_a_piece_runs_plain_where_its_compiled_code_does_not_hold() -> None:
    from pp_piecewise_backend.compilation.inductor import CompiledPiece

    run = compiled(Layers(1))
    for tokens in (4, 5):
        run(torch.randn(tokens, HIDDEN))
    program = ppb.programs()[-1]
    assert isinstance(program, Program)
    (instruction,) = (i for i in program.layout.instructions if i.compiled is not None and i.piece.index == 0)

    def must_not_run(*args: Any) -> Any:
        raise AssertionError("compiled code ran outside its conditions")

    instruction.compiled = CompiledPiece((), must_not_run, (sympy.Symbol("s0") <= 6,), 0.0)
    kept, instruction.call = instruction.call, must_not_run
    specs = instruction.piece.input_specs
    instruction.symbol_positions = tuple(i for i, spec in enumerate(specs) if type(spec).__name__ == "SymbolSpec")
    assert instruction.symbol_positions
    x = torch.randn(7, HIDDEN)
    torch.testing.assert_close(run(x), _uncompiled(run)(x), rtol=0, atol=0)
    assert program.plain_runs == {0: "the compiled code does not hold for sizes [7]"}
    assert "ran as plain FX" in program.explain() and "sizes [7]" in program.explain()
    instruction.call = kept
    torch.testing.assert_close(run(torch.ones(6, HIDDEN)), _uncompiled(run)(torch.ones(6, HIDDEN)), rtol=0, atol=0)


def _uncompiled(run: Any) -> nn.Module:
    return run._orig_mod


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_two_written_proxies_that_overlap_in_a_later_call_only(compiler: str) -> None:
    weight = torch.randn(8, 8)

    def function(hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        hidden_states.add_(1)
        residual.mul_(2)
        return (hidden_states @ weight).softmax(-1) @ weight

    compiled = torch.compile(function, backend="pp_piecewise", options={"compiler": compiler, "split_ops": "softmax"})
    compiled(torch.randn(5, 8), torch.randn(5, 8))
    memory = torch.randn(6, 8)
    expected_memory = memory.clone()
    got = compiled(memory[:5], memory[1:])
    expected = function(expected_memory[:5], expected_memory[1:])
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(memory, expected_memory)
    assert sum(program.stats.calls for program in ppb.programs()) == 2
    assert any("share memory" in (p.whole_plain_run or "") for p in ppb.programs())

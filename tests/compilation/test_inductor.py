"""Compiling pieces: guards kept as data, failures that fall back, memory that a compiler merged."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._sympy.functions import FloorDiv, Mod

import pp_piecewise_backend as ppb
from against_eager import check, steps, tokens
from captured import DEVICES
from pp_piecewise_backend.compilation import inductor
from pp_piecewise_backend.compilation.inductor import CompiledPiece, PieceCompiler
from pp_piecewise_backend.compilation.specs import SymbolSpec, TensorSpec

WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))


pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")


def softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


def plain_layer(x: Tensor) -> Tensor:
    return softmax(x @ WEIGHT) @ WEIGHT


# ------------------------------------------------------------------------------------------ guards as data


def pooled(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool1d((softmax(x) @ WEIGHT).t()[None], 10)


def softmax_over_tokens(x: Tensor) -> Tensor:
    return torch.softmax(softmax(x) @ WEIGHT, 0)


def sorted_tokens(x: Tensor) -> Tensor:
    return (softmax(x) @ WEIGHT).sort(0)[0]


@pytest.mark.parametrize(
    ("function", "sizes"),
    [(pooled, (10, 20, 7, 30)), (softmax_over_tokens, (5, 5000, 9)), (sorted_tokens, (5, 40_000, 9))],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_sizes_on_both_sides_of_a_guard(function: Any, sizes: tuple[int, ...]) -> None:
    """Sizes that the compiled code does not hold for run as plain FX; Dynamo never recompiles."""
    program = check(function, *tokens(*sizes), split_ops="Tensor.softmax", compiler="inductor", tolerance=1e-5,
                    exact_strides=False)  # fmt: skip
    assert ppb.stats().programs == 1
    assert ppb.stats().recompiles == 0
    guarded = [compiled for compiled in program.compiled if compiled is not None and compiled.conditions]
    assert bool(guarded) or function is sorted_tokens  # not every torch guards a sort on this device
    for compiled in guarded:
        refused = [size for size in sizes if not compiled.accepts([size])]
        assert bool(refused) == bool(program.plain_runs)
    for index, reason in program.plain_runs.items():
        assert program.pieces[index].kind == "compute"
        assert "does not hold for sizes" in reason
        assert f"piece[{index}]" in program.explain()


def test_a_guard_of_the_traced_size_makes_other_sizes_plain() -> None:
    program = check(pooled, *tokens(10, 20, 10), split_ops="softmax", compiler="inductor", tolerance=1e-5)
    (reason,) = program.plain_runs.values()
    assert "[20]" in reason
    assert ppb.stats().recompiles == 0


def test_conditions_are_evaluated_on_the_pieces_symbols() -> None:
    first, second = sympy.symbols("s0 s1")
    piece = CompiledPiece((), lambda: (), (sympy.Le(first, 16), sympy.Eq(second, 2 * first)), 0.0)
    assert piece.accepts([4, 8])
    assert not piece.accepts([4, 9])
    assert not piece.accepts([17, 34])


def test_conditions_that_compilers_write() -> None:
    """Guards come with torch's own functions, and with symbols that Python must not confuse: s1 and s10."""
    s = [sympy.Symbol(f"s{index}") for index in range(11)]
    conditions = (
        sympy.Eq(Mod(s[0], 4), 0),
        sympy.Ne(FloorDiv(s[1], 2), 3),
        sympy.Or(sympy.Not(sympy.Eq(s[10], 1)), s[2] > 8),
    )
    sizes = [8, 9, 5, 0, 0, 0, 0, 0, 0, 0, 2]
    piece = CompiledPiece((), lambda: (), conditions, 0.0)
    assert piece.accepts(sizes)
    for at, size in ((0, 9), (1, 7), (10, 1)):
        assert not piece.accepts([*sizes[:at], size, *sizes[at + 1 :]])
    assert piece.accepts([8, 9, 9, *sizes[3:10], 1])


def test_a_piece_for_all_sizes_has_no_conditions() -> None:
    """No bound is no condition: torch's infinite integer says that it is finite."""
    program = check(plain_layer, *tokens(5, 9, 2), split_ops="softmax", compiler="inductor", tolerance=1e-5)
    compiled = [one for one in program.compiled if one is not None]
    assert len(compiled) == 2
    assert all(any(isinstance(spec, SymbolSpec) for spec in piece.input_specs) for piece in program.pieces[::2])
    assert [(one.failure, one.conditions) for one in compiled] == [(None, ())] * 2


# ------------------------------------------------------------------------------------- memory that was merged


def two_zeros_written_later(x: Tensor) -> tuple[Tensor, ...]:
    a, b = torch.zeros_like(x), torch.zeros_like(x)
    y = softmax(x @ WEIGHT)
    a[:1].copy_(y[:1])
    a.view(-1)[1:2] = 5
    y = softmax(y @ WEIGHT)
    b[:1].copy_(y[:1] * 2)
    b.view(-1)[1:2] = 6
    return a, b, softmax(a @ WEIGHT), softmax(b)


def equal_results(x: Tensor) -> tuple[Tensor, ...]:
    y = softmax(x @ WEIGHT) @ WEIGHT
    return y + 1, y + 1, F.dropout(y, 0.5, False), y, y.clone(), x.clone()


def one_of_two_equal_is_written(x: Tensor) -> tuple[Tensor, ...]:
    y = softmax(x @ WEIGHT) @ WEIGHT
    a, b = y + 1, y + 1
    tail = a[1:]
    second = softmax(a)
    a.mul_(2)
    return tail + 1, b, second @ WEIGHT


MERGED = [two_zeros_written_later, equal_results, one_of_two_equal_is_written]


@pytest.mark.parametrize("function", MERGED, ids=lambda f: f.__name__)
def test_what_inductor_merges_is_taken_apart(function: Any) -> None:
    check(function, *tokens(5, 9, 1), split_ops="softmax", compiler="inductor", tolerance=1e-5)


# ------------------------------------------------------------------------------------------------- failures


def failing_backend(graph_module: Any, inputs: Any) -> Callable[..., Any]:
    raise ZeroDivisionError("this compiler always fails")


def test_a_piece_that_cannot_be_compiled_runs_as_plain_fx(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: failing_backend)
    with caplog.at_level(logging.WARNING, logger="pp_piecewise_backend"):
        program = check(plain_layer, *tokens(5, 9, 1), split_ops="softmax", compiler="aot_eager")
    assert steps(program) == "cec"
    failures = [compiled.failure for compiled in program.compiled if compiled is not None]
    assert all(failure is not None and "ZeroDivisionError: this compiler always fails" in failure
               for failure in failures)  # fmt: skip
    assert "this compiler always fails" in program.explain()
    assert any("this compiler always fails" in record.getMessage() for record in caplog.records)


_LIBRARY = torch.library.Library("test_inductor", "FRAGMENT")
_LIBRARY.define("fails_under_inductor(Tensor x) -> Tensor")
_LIBRARY.impl("fails_under_inductor", lambda x: x * 2, "CPU")
_in_piece_compiler = False


def _fake(x: Tensor) -> Tensor:
    if _in_piece_compiler:
        raise ZeroDivisionError("no fake in a compiler")
    return torch.empty_like(x)


torch.library.register_fake("test_inductor::fails_under_inductor", _fake, lib=_LIBRARY)


def test_one_failing_piece_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_piece = inductor._compile

    def compile_with_broken_fake(*arguments: Any) -> CompiledPiece:
        global _in_piece_compiler
        _in_piece_compiler = True
        try:
            return compile_piece(*arguments)
        finally:
            _in_piece_compiler = False

    monkeypatch.setattr(inductor, "_compile", compile_with_broken_fake)

    def function(x: Tensor) -> Tensor:
        y = torch.ops.test_inductor.fails_under_inductor(softmax(x @ WEIGHT) @ WEIGHT)
        return softmax(y) @ WEIGHT

    program = check(function, *tokens(5, 9), split_ops="softmax", compiler="aot_eager", tolerance=1e-6,
                    graph_safe_ops="test_inductor::*")  # fmt: skip
    failures = [compiled.failure for compiled in program.compiled if compiled is not None]
    assert [failure is None for failure in failures] == [True, False, True]
    assert "no fake in a compiler" in str(failures[1])


# --------------------------------------------------------------------------------------- the shared compiler


def piece_of(function: Callable[[Tensor], Tensor]) -> Any:
    torch.compile(function, backend="pp_piecewise", options={"compiler": "eager", "split_ops": "softmax"})(
        torch.randn(5, 8)
    )
    return ppb.programs()[-1].pieces[0]


def test_a_piece_is_compiled_once_and_forgotten_at_reset() -> None:
    piece, config = piece_of(plain_layer), ppb.Config(compiler="aot_eager")
    compiler = PieceCompiler()
    first, known = compiler.compile(piece, config)
    assert not known
    assert first.failure is None
    assert compiler.compile(piece, config) == (first, True)
    compiler.reset()
    assert compiler.compile(piece, config)[1] is False


@pytest.mark.timeout(60)
def test_threads_wait_for_the_one_that_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    piece, config = piece_of(plain_layer), ppb.Config(compiler="aot_eager")
    compiler = PieceCompiler()
    compilations = []
    compile_piece = inductor._compile
    monkeypatch.setattr(inductor, "_compile", lambda *a: compilations.append(1) or compile_piece(*a))
    known: list[bool] = []
    threads = [threading.Thread(target=lambda: known.append(compiler.compile(piece, config)[1])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(known) == [False, True, True, True]
    assert len(compilations) == 1


def test_compiling_leaves_dynamos_shapes_and_the_callers_modes_alone() -> None:
    with torch.inference_mode():
        x = torch.randn(5, 8)
        torch._dynamo.mark_dynamic(x, 0)
        compiled = torch.compile(
            pooled, backend="pp_piecewise", options={"compiler": "aot_eager", "split_ops": "softmax"}
        )
        before = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        torch.testing.assert_close(compiled(x), pooled(x))
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
        for size in (9, 20):
            y = torch.randn(size, 8)
            torch.testing.assert_close(compiled(y), pooled(y))
    assert ppb.stats().recompiles == 0


# ------------------------------------------------------------------------------------ sums beside a product


def products_and_sums(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return (
        torch.addmm(residual, x, weight),
        torch.addmm(bias, x, weight),
        torch.addmm(residual, x, weight, alpha=2),
        torch.addmm(residual, x, weight, beta=0.5),
    )


def test_only_an_addend_of_the_size_of_the_product_is_taken_apart() -> None:
    given = (torch.randn(5, 8), torch.randn(5, 8), WEIGHT, WEIGHT[0])
    traced = make_fx(products_and_sums, tracing_mode="fake")(*given)
    assert inductor.take_sums_apart(traced.graph) == 1
    traced.recompile()
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.aten.addmm.default) == 3 and called.count(torch.ops.aten.mm.default) == 1
    for got, expected in zip(traced(*given), products_and_sums(*given), strict=True):
        torch.testing.assert_close(got, expected)


def residual_of_a_layer(x: Tensor) -> Tensor:
    y = softmax(x)
    y = y + x @ WEIGHT.to(x.device)
    # A sum that nobody but the norm reads is no product's on a GPU: Inductor takes that apart itself.
    return softmax(y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)) + y


@pytest.mark.parametrize("device", DEVICES)
def test_sums_of_a_layer_are_not_made_by_the_product(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    original = inductor.take_sums_apart

    def counted(graph: torch.fx.Graph) -> int:
        taken.append(original(graph))
        return taken[-1]

    monkeypatch.setattr(inductor, "take_sums_apart", counted)
    if device == "cpu":  # where Inductor is left alone, as nothing was measured there
        check(residual_of_a_layer, *tokens(5), split_ops="Tensor.softmax", compiler="inductor", tolerance=1e-5)
        assert not taken
        monkeypatch.setattr(
            inductor, "_patches", lambda piece: {"post_grad_custom_post_pass": inductor._pass_for_sums()}
        )
    given = [(given.to(device),) for (given,) in tokens(5, 9)]
    with torch._inductor.config.patch(fx_graph_cache=False):  # what an earlier run has cached is compiled no more
        check(residual_of_a_layer, *given, split_ops="Tensor.softmax", compiler="inductor", tolerance=1e-5)
    assert sum(taken) == 1


def test_passes_and_tuning_of_the_user_are_left_alone() -> None:
    import torch._inductor.config as settings

    (piece,) = check(plain_layer, *tokens(5), split_ops="Tensor.nothing").pieces
    gpu = torch.device("cuda")
    specs = [replace(spec, device=gpu) if isinstance(spec, TensorSpec) else spec for spec in piece.input_specs]
    on_a_gpu = replace(piece, input_specs=tuple(specs))
    assert "post_grad_custom_post_pass" in inductor._patches(on_a_gpu)
    for name, value in (("max_autotune", True), ("max_autotune_gemm", True), ("post_grad_custom_post_pass", print)):
        with settings.patch({name: value}):
            assert "post_grad_custom_post_pass" not in inductor._patches(on_a_gpu)

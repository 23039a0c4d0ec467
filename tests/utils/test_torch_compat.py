"""The private torch API that the package leans on, helper by helper: what a new torch release may break."""

from __future__ import annotations

import functools
import logging
import math
import operator
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn

from pp_piecewise_backend.utils import torch_compat

pytestmark = pytest.mark.compat


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------ Dynamo


def during_compilation(function: Callable[..., Any], *args: Any, look: Callable[[Any], Any], **kwargs: Any) -> Any:
    """What ``look(graph_module)`` gives while Dynamo compiles ``function``."""
    seen: list[Any] = []

    def backend(graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        seen.append(look(graph_module))
        return graph_module.forward

    torch.compile(function, backend=backend, **kwargs)(*args)
    (found,) = seen
    return found


def _sources(graph_module: torch.fx.GraphModule) -> list[str | None]:
    return [torch_compat.placeholder_source(node) for node in graph_module.graph.nodes if node.op == "placeholder"]


def test_placeholder_source() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2, bias=False)
            self.caches = [torch.zeros(2)]

        def forward(self, x: Tensor, **kwargs: Tensor) -> Tensor:
            return self.linear(x) + self.caches[0] + kwargs["y"]

    model = Model()
    seen: list[Any] = []

    def backend(graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        seen.extend(_sources(graph_module))
        return graph_module.forward

    torch.compile(model, backend=backend)(torch.randn(3, 2), y=torch.randn(2))
    assert set(seen) == {
        "L['x']", "L['kwargs']['y']", "L['self']._modules['linear']._parameters['weight']", "L['self'].caches[0]",
    }  # fmt: skip


def test_placeholder_source_without_dynamo() -> None:
    assert _sources(torch.fx.symbolic_trace(lambda x: x + 1)) == [None]


def test_frame_being_compiled() -> None:
    scale = torch.ones(2)

    def outer(x: Tensor, *args: Tensor) -> Tensor:
        return inner(x) * scale + args[0]

    def inner(x: Tensor) -> Tensor:
        return x + 1

    code, values = during_compilation(
        outer, torch.zeros(2), torch.ones(2), look=lambda graph: torch_compat.frame_being_compiled()
    )
    assert code is outer.__code__  # the frame that the user called, not the one that was inlined last
    assert values["scale"] is scale and len(values["args"]) == 1 and "x" in values
    assert torch_compat.frame_being_compiled() is None


def test_frames_given_up_and_graph_breaks() -> None:
    before = torch_compat.frames_given_up_and_graph_breaks()

    def function(x: Tensor, kind: str) -> Tensor:
        x = x + len(kind)
        torch._dynamo.graph_break()
        return x * 2

    with torch._dynamo.config.patch(recompile_limit=1):
        run = torch.compile(function, backend="eager")
        for kind in ("a", "bb", "ccc"):
            run(torch.zeros(2), kind)
    given_up, breaks = torch_compat.frames_given_up_and_graph_breaks()
    assert given_up > before[0] and breaks > before[1]


# ------------------------------------------------------------------------------ shapes


def test_symbols_of_our_own() -> None:
    env = torch_compat.new_shape_env()
    tokens = torch_compat.new_symbol(env, "s0", 5, 2, 64)
    other = torch_compat.new_symbol(env, "s1", 5, None, None)
    assert isinstance(torch_compat.symint_expression(tokens), sympy.Symbol)
    assert torch_compat.symint_expression(tokens) != torch_compat.symint_expression(other)  # no duck shaping
    assert torch_compat.symbol_range(tokens) == (2, 64)
    assert torch_compat.symbol_range(other)[1] is None
    assert torch_compat.symbolic_hint(tokens) == 5 and torch_compat.symbolic_hint(tokens * 2 + 1) == 11
    assert torch_compat.symint_expression(7) == 7


@pytest.mark.parametrize("hint", [0, 1])
def test_symbols_are_not_specialised_at_zero_and_one(hint: int) -> None:
    env = torch_compat.new_shape_env()
    symint = torch_compat.new_symbol(env, "s0", hint, 0, None)
    assert isinstance(symint, torch.SymInt) and isinstance(torch_compat.symint_expression(symint), sympy.Symbol)
    assert torch_compat.shape_env_conditions(env) == ()


def test_unbacked_symbols() -> None:
    env = torch_compat.new_shape_env()
    symint = torch_compat.new_symbol(env, "s0", None, 1, 8)
    assert torch_compat.symbolic_hint(symint) is None
    assert torch_compat.symbol_range(symint) == (1, 8)


def test_symint_from_expression() -> None:
    env = torch_compat.new_shape_env()
    tokens = torch_compat.new_symbol(env, "s0", 5, 2, 64)
    symbol = torch_compat.symint_expression(tokens)
    assert torch_compat.symint_from_expression(env, sympy.Integer(3), 3) == 3
    doubled = torch_compat.symint_from_expression(env, symbol * 2, 10)
    assert torch_compat.symint_expression(doubled) == symbol * 2 and torch_compat.symbolic_hint(doubled) == 10


def test_conditions_are_what_was_asked_about() -> None:
    env = torch_compat.new_shape_env()
    tokens = torch_compat.new_symbol(env, "s0", 5, 2, 64)
    symbol = torch_compat.symint_expression(tokens)
    assert bool(tokens <= 64)  # follows from the range: nothing new is relied on
    assert torch_compat.shape_env_conditions(env) == ()
    assert not bool(tokens > 32)
    conditions = torch_compat.shape_env_conditions(env)
    assert conditions
    assert all(condition.subs(symbol, 20) == sympy.true for condition in conditions)
    assert any(condition.subs(symbol, 40) == sympy.false for condition in conditions)


def test_an_equality_is_a_condition() -> None:
    env = torch_compat.new_shape_env()
    first, second = (torch_compat.new_symbol(env, name, 5, 2, 64) for name in ("s0", "s1"))
    symbols = torch_compat.symint_expression(first), torch_compat.symint_expression(second)
    assert bool(first == second)
    conditions = torch_compat.shape_env_conditions(env)
    equal, different = ({symbols[0]: 5, symbols[1]: value} for value in (5, 6))
    assert all(condition.subs(equal) == sympy.true for condition in conditions)
    assert any(condition.subs(different) == sympy.false for condition in conditions)


def test_a_deferred_assert_is_a_condition() -> None:
    env = torch_compat.new_shape_env()
    first = torch_compat.new_symbol(env, "s0", None, 0, None)
    second = torch_compat.new_symbol(env, "s1", None, 0, None)
    symbols = torch_compat.symint_expression(first), torch_compat.symint_expression(second)
    torch._check(first * 2 <= second + 7)
    conditions = torch_compat.shape_env_conditions(env)
    assert any(c.subs({symbols[0]: 100, symbols[1]: 1}) == sympy.false for c in conditions)


def test_ranges_narrow_with_what_is_learned() -> None:
    env = torch_compat.new_shape_env()
    tokens = torch_compat.new_symbol(env, "s0", None, 0, 100)
    symbol = torch_compat.symint_expression(tokens)
    assert torch_compat.shape_env_ranges(env)[symbol] == (0, 100)
    torch._check(tokens <= 10)
    _, upper = torch_compat.shape_env_ranges(env)[symbol]
    conditions = torch_compat.shape_env_conditions(env)
    assert upper == 10 or any(c.subs(symbol, 11) == sympy.false for c in conditions)


def test_build_expression_on_numbers_and_proxies() -> None:
    s0, s1 = sympy.symbols("s0 s1", integer=True, positive=True)
    expression = (s0 * 3 + s1) * s1
    assert torch_compat.build_expression(expression, {s0: 2, s1: 5}) == 55
    assert torch_compat.build_expression(sympy.Integer(4), {}) == 4
    graph = torch.fx.Graph()
    proxies = {symbol: torch.fx.Proxy(graph.placeholder(str(symbol))) for symbol in (s0, s1)}
    graph.output(torch_compat.build_expression(expression, proxies).node)
    assert torch.fx.GraphModule({}, graph)(2, 5) == 55


def test_build_expression_of_floor_division_and_remainder() -> None:
    env = torch_compat.new_shape_env()
    tokens = torch_compat.new_symbol(env, "s0", 5, 2, 64)
    symbol = torch_compat.symint_expression(tokens)
    for made, wanted in ((tokens // 4, 17 // 4), (tokens % 4, 17 % 4), (-(-tokens // 4), -(-17 // 4))):
        assert torch_compat.build_expression(torch_compat.symint_expression(made), {symbol: 17}) == wanted


def test_private_tracing_keeps_guards_out_of_the_outer_environment() -> None:
    env = torch_compat.new_shape_env()
    fake_mode = torch_compat.FakeTensorMode(shape_env=env)
    before = torch._guards.TracingContext.try_get()
    with torch_compat.private_tracing(fake_mode):
        context = torch._guards.TracingContext.try_get()
        assert context is not None and context.fake_mode is fake_mode
    assert torch._guards.TracingContext.try_get() is before


# ------------------------------------------------------------------------------ tensors


def test_storage_identity() -> None:
    base = torch.zeros(4)
    assert (
        torch_compat.storage_identity(base)
        == torch_compat.storage_identity(base[1:])
        == torch_compat.storage_identity(base.t())
    )
    assert torch_compat.storage_identity(base) != torch_compat.storage_identity(base.clone())
    reference = weakref.ref(base)
    del base
    assert reference() is None  # asking keeps nothing alive


def test_storage_identity_of_fake_tensors() -> None:
    with torch_compat.FakeTensorMode():
        base = torch.zeros(4)
        assert isinstance(base, torch_compat.FakeTensor)
        assert torch_compat.storage_identity(base) == torch_compat.storage_identity(base.view(2, 2))
        assert torch_compat.storage_identity(base) != torch_compat.storage_identity(torch.zeros(4))


def test_storage_identity_and_level_inside_a_transform() -> None:
    seen: list[Any] = []

    def body(row: Tensor) -> Tensor:
        seen.append((torch_compat.storage_identity(row), torch_compat.functorch_level()))
        return row * 2

    rows = torch.zeros(3, 4)
    assert torch_compat.functorch_level() == 0
    torch.vmap(body)(rows)
    assert seen == [(torch_compat.storage_identity(rows), 1)]
    assert torch_compat.functorch_level() == 0


def test_leave_functorch() -> None:
    for _ in range(3):
        torch._C._functorch._vmap_increment_nesting(3, "error")
    torch_compat.leave_functorch(1)
    assert torch_compat.functorch_level() == 1
    torch_compat.leave_functorch(0)
    assert torch_compat.functorch_level() == 0


def test_wrapper_subclasses() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    assert torch_compat.is_traceable_wrapper_subclass(TwoTensor(torch.zeros(2), torch.zeros(2)))
    assert not torch_compat.is_traceable_wrapper_subclass(torch.zeros(2))
    assert not torch_compat.is_traceable_wrapper_subclass(nn.Parameter(torch.zeros(2)))


# ---------------------------------------------------------------------------------- ops


@torch.library.custom_op("compattest::write", mutates_args=("out",))
def write(x: Tensor, out: Tensor, scale: float = 1.0) -> None:
    out.copy_(x * scale)


@pytest.mark.parametrize(
    ("op", "written"),
    [
        (torch.ops.aten.add_.Tensor, ("self",)),
        (torch.ops.aten.add.Tensor, ()),
        (torch.ops.aten.add.out, ("out",)),
        (torch.ops.compattest.write.default, ("out",)),
        (torch.ops.aten.view.default, ()),
    ],
)
def test_schema_writes(op: Any, written: tuple[str, ...]) -> None:
    assert torch_compat.schema_writes(op) == written


def test_schema_and_overload_names() -> None:
    assert torch_compat.schema_name(torch.ops.aten.add_.Tensor) == "aten::add_"
    assert torch_compat.overload_name(torch.ops.aten.add_.Tensor) == "Tensor"
    assert (
        torch_compat.schema_name(torch.ops.compattest.write) == torch_compat.schema_name(write) == "compattest::write"
    )
    assert torch_compat.schema_name(torch.nn.functional.softmax) is None
    assert torch_compat.overload_name(torch.ops.aten.add_) is None


# -------------------------------------------------------------------------------- state


def test_autocast_state() -> None:
    outside = torch_compat.autocast_state()
    assert outside == ()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch_compat.autocast_state()
    with torch.autocast("cpu", dtype=torch.float16):
        other = torch_compat.autocast_state()
    assert len({outside, inside, other}) == 3
    assert torch_compat.autocast_state() == outside


def test_entering_and_leaving_autocast_by_hand() -> None:
    entered = torch_compat.enter_autocast("cpu", torch.bfloat16, True, None)
    try:
        assert torch.is_autocast_enabled("cpu")
    finally:
        torch_compat.exit_autocast(entered)
    assert not torch.is_autocast_enabled("cpu")


def test_entering_and_leaving_inference_mode_by_hand() -> None:
    entered = torch_compat.enter_inference_mode(True)
    try:
        assert torch.is_inference_mode_enabled()
    finally:
        torch_compat.exit_inference_mode(entered)
    assert not torch.is_inference_mode_enabled()


# ------------------------------------------------------------------------------------- dumps


def test_profiler_is_enabled() -> None:
    assert not torch_compat.profiler_is_enabled()
    with torch.profiler.profile():
        assert torch_compat.profiler_is_enabled()
    assert not torch_compat.profiler_is_enabled()


def test_a_trace_artifact_is_not_made_without_a_trace() -> None:
    made: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Any:
        torch_compat.trace_artifact("name", lambda: str(made.append(True)))  # type: ignore[func-returns-value]
        return graph.forward

    run = torch.compile(lambda x: x + 1, backend=backend)
    run(torch.ones(2))
    assert not made
    # It must be able to fail: where somebody listens, it is made.
    trace, listener = logging.getLogger("torch.__trace"), logging.NullHandler()
    trace.addHandler(listener)
    try:
        run(torch.ones(2, 2))
    finally:
        trace.removeHandler(listener)
    assert made


def test_expression_text_is_python() -> None:
    s0 = sympy.Symbol("s0", positive=True, integer=True)
    from torch.utils._sympy.functions import FloorDiv, Mod

    for expression, wanted in ((s0 * 4 + 1, 41), (FloorDiv(s0, 3), 3), (Mod(s0, 4), 2), (sympy.Integer(7), 7), (5, 5)):
        assert eval(torch_compat.expression_text(expression), {"s0": 10}) == wanted


def test_the_bytecode_and_guards_of_a_frame() -> None:
    told: list[Any] = []

    def function(x: Tensor) -> Tensor:
        return x + 1

    def look(graph: object) -> None:
        frame = torch_compat.frame_being_compiled()
        assert frame is not None
        torch_compat.when_bytecode_is_ready(frame[0], told.append)
        assert torch_compat.guards_of(frame[0], frame[0]) is None  # not there yet

    during_compilation(function, torch.zeros(2), look=look)
    (transformed,) = told
    guards = torch_compat.guards_of(function.__code__, transformed)
    assert guards is not None and "TENSOR_MATCH" in guards and "L['x']" in guards
    torch.compile(lambda y: y * 2, backend="eager")(torch.zeros(2))
    assert len(told) == 1  # told once, of this frame only
    torch._dynamo.reset()
    assert torch_compat.guards_of(function.__code__, transformed) is None


# ------------------------------------------------------------------------ graphs, emulated and real


@torch.library.custom_op("compattest::in_python", mutates_args=())
def in_python(x: Tensor) -> Tensor:
    return x.sin() + 1


@torch.library.custom_op("compattest::on_cpu", mutates_args=(), device_types="cpu")
def on_cpu(x: Tensor) -> Tensor:
    return x.cos()


_LIBRARY = torch.library.Library("compattest", "FRAGMENT")
_LIBRARY.define("by_hand(Tensor x) -> Tensor")
_LIBRARY.impl("by_hand", lambda x: x.tan(), "CPU")
_LIBRARY.define("composite(Tensor x) -> Tensor")
_LIBRARY.impl("composite", lambda x: x.neg(), "CompositeExplicitAutograd")


class _Noting(torch_compat.TorchDispatchMode):
    """Notes the ops that it sees, and takes custom ops apart."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kernel = torch_compat.kernel_in_python(func, "cpu")
        if kernel is not None:
            with self:
                return kernel(*args, **(kwargs or {}))
        self.seen.append(str(torch_compat.schema_name(func)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("op", "expected", "inner"),
    [
        (torch.ops.compattest.in_python, lambda x: x.sin() + 1, ["aten::sin", "aten::add"]),
        (torch.ops.compattest.on_cpu, torch.cos, ["aten::cos"]),
        (torch.ops.compattest.by_hand, torch.tan, ["aten::tan"]),
        (torch.ops.compattest.composite, torch.neg, ["aten::neg"]),
    ],
)
def test_kernel_in_python_shows_the_ops_inside(op: Any, expected: Any, inner: list[str]) -> None:
    x = torch.randn(4)
    with torch.no_grad(), _Noting() as noting:
        result = op(x)
    assert torch.equal(result, expected(x))
    assert noting.seen == inner


def test_kernel_in_python_of_an_op_that_writes() -> None:
    x, out = torch.randn(4), torch.zeros(4)
    with torch.no_grad(), _Noting() as noting:
        torch.ops.compattest.write(x, out, 3.0)
    assert torch.equal(out, x * 3) and noting.seen == ["aten::mul", "aten::copy_"]


@pytest.mark.parametrize(
    "op",
    [
        torch.ops.aten.add.Tensor,
        torch.ops.aten.add,
        torch.add,
        torch.ops.prims.sin.default,
        torch.ops._c10d_functional.all_reduce.default,  # C++, which no mode looks into
    ],
)
def test_kernel_in_python_of_what_has_none(op: Any) -> None:
    assert torch_compat.kernel_in_python(op, "cpu") is None


_LIBRARY.define("of_others(Tensor x) -> Tensor")
_LIBRARY.impl("of_others", lambda x: x.tan(), "CompositeImplicitAutograd")
_LIBRARY.define("without_kernel(Tensor x) -> Tensor")
torch.library.register_fake("compattest::without_kernel", lambda x: x, lib=_LIBRARY)


@torch.library.triton_op("compattest::with_triton", mutates_args=())
def with_triton(x: Tensor) -> Tensor:
    return x + 1


@pytest.mark.parametrize(
    "function",
    [
        *(torch.ops.compattest.in_python, torch.ops.compattest.on_cpu.default, on_cpu, torch.ops.compattest.by_hand),
        *(torch.ops.compattest.composite.default, torch.ops.compattest.of_others, with_triton),
        *(torch.ops.compattest.without_kernel.default, lambda x: x, functools.partial(torch.add, 1)),
        torch._dynamo.variables.misc.produce_trampoline_autograd_apply(torch.autograd.Function),
        torch.ops.higher_order.call_torchbind,
    ],
)
def test_what_may_run_python(function: Any) -> None:
    assert torch_compat.runs_python(function)


@pytest.mark.parametrize(
    "function",
    [
        *(torch.ops.aten.mm, torch.ops.aten.add.Tensor, torch.ops.aten.bmm.default, torch.ops.prims.sin.default),
        torch.ops._c10d_functional.all_reduce.default,  # C++, with a formula for gradients in Python
        *(torch.add, torch.nn.functional.linear, torch.einsum, torch.nn.functional.max_pool2d, torch.Tensor.view),
        *(operator.add, getattr, math.sqrt, torch.sym_max, torch.ops.higher_order.wrap, torch.ops.higher_order.cond),
    ],
)
def test_what_runs_no_python_but_that_of_torch(function: Any) -> None:
    assert not torch_compat.runs_python(function)


@pytest.mark.filterwarnings("ignore:.*Overriding")
def test_an_op_of_torch_that_somebody_replaced() -> None:
    op = torch.ops.aten.special_bessel_j1.default
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("special_bessel_j1", torch.clone, "CPU")
        assert torch_compat.runs_python(op)
    assert not torch_compat.runs_python(op)


def test_arguments_of_a_call() -> None:
    op = torch.ops.compattest.write.default
    assert torch_compat.bound_arguments(op, ("x", "out", 2.0), {}) == {"x": "x", "out": "out", "scale": 2.0}
    assert torch_compat.bound_arguments(op, ("x", "out"), {"scale": 3.0})["scale"] == 3.0
    assert torch_compat.bound_arguments(op, ("x", "out"), {})["scale"] == 1.0


def test_tensor_without_ownership() -> None:
    base = torch.arange(12.0).view(3, 4)
    for tensor in (base, base.t(), base[1:, 2:], base[:0]):
        alias = torch_compat.tensor_without_ownership(tensor)
        assert (alias.shape, alias.stride(), alias.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
        assert alias.storage_offset() == tensor.storage_offset()
        assert torch.equal(alias, tensor)
        if tensor.numel():
            assert alias.data_ptr() == tensor.data_ptr()
    alias = torch_compat.tensor_without_ownership(base)
    alias.fill_(7.0)
    assert base.eq(7.0).all()
    reference = weakref.ref(base.untyped_storage())
    del base, tensor
    assert reference() is None  # the alias, which must not be read any more, keeps nothing alive
    assert alias.shape == (3, 4)


def test_a_tensor_without_ownership_reads_its_memory_as_the_other_one_does() -> None:
    """Parts of complex tensors may be negated or conjugated by a bit of theirs."""
    base = torch.randn(3, 4, dtype=torch.complex64)
    for tensor in (base.conj(), base.imag, base.conj().imag, torch._neg_view(base.conj())):
        alias = torch_compat.tensor_without_ownership(tensor)
        assert alias.data_ptr() == tensor.data_ptr() and torch.equal(alias, tensor)


def test_tensor_without_ownership_in_inference_mode() -> None:
    with torch.inference_mode():
        base = torch.zeros(3)
        alias = torch_compat.tensor_without_ownership(base)
    assert not alias.is_inference()
    alias.fill_(1.0)
    assert base.sum() == 3.0


@pytest.mark.parametrize("enabled", [False, True])
def test_no_autocast(enabled: bool) -> None:
    x = torch.randn(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        with pytest.raises(KeyError), torch_compat.no_autocast():
            assert (x @ x).dtype == torch.float32
            raise KeyError
        assert torch.is_autocast_enabled("cpu") is enabled
        assert (x @ x).dtype == (torch.bfloat16 if enabled else torch.float32)

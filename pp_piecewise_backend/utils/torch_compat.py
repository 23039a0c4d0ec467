"""Every use of private torch API, in one place.

Tested on torch 2.11.0, 2.13.0 and 2.14.1. When a torch release moves one of these names, this file is the only one
to mend; the rest of the package uses documented API and what is defined here.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import CodeType
from typing import Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher as enable_python_dispatcher
from torch._dynamo.exc import Unsupported, UserError
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext, tracing
from torch._library.fake_class_registry import FakeScriptObject
from torch._library.opaque_object import is_opaque_type, is_opaque_value_type
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, GuardOnDataDependentSymNode, ShapeEnv
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.reference import PythonReferenceAnalysis
from torch.utils._sympy.value_ranges import ValueRanges

GUARDS_PARAMETER_STRIDES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)
"""Whether Dynamo notices that a parameter was given other strides at its old address; 2.11 does not [ran]."""

DATA_DEPENDENT_ERRORS = (DataDependentOutputException, DynamicOutputShapeException)
"""What a fake tensor raises where a shape or number depends on contents that it has not."""

GRAPH_BREAK_ERRORS = (Unsupported, UserError, GuardOnDataDependentSymNode)
"""What Dynamo raises under ``fullgraph=True`` where it would break the graph: the latter two where a number of a tensor
decides, as in ``if x[0].item() > 5``."""

OpOverload = torch._ops.OpOverload
OpOverloadPacket = torch._ops.OpOverloadPacket
HigherOrderOperator = torch._ops.HigherOrderOperator

set_grad_enabled = torch._C._set_grad_enabled
log_api_usage_once = torch._C._log_api_usage_once
lazy_load_decompositions = torch._functorch.predispatch.lazy_load_decompositions
enter_autocast = torch.amp.autocast_mode._enter_autocast
exit_autocast = torch.amp.autocast_mode._exit_autocast
enter_inference_mode = torch.autograd.grad_mode._enter_inference_mode
exit_inference_mode = torch.autograd.grad_mode._exit_inference_mode


def placeholder_source(node: torch.fx.Node) -> str | None:
    """The Python expression, in the traced frame, of what Dynamo feeds to a placeholder; None without Dynamo."""
    source = getattr(node, "_dynamo_source", None)
    return None if source is None else str(source.name)


def placeholder_sizes(graph_module: torch.fx.GraphModule) -> dict[sympy.Basic, torch.SymInt]:
    """The symbolic sizes among what Dynamo feeds to a graph. To compare two of them adds a guard of Dynamo's."""
    examples = [node.meta.get("example_value") for node in graph_module.graph.nodes if node.op == "placeholder"]
    sizes = [n for e in examples for n in (e.shape if isinstance(e, torch.Tensor) else (e,))]
    return {size.node.expr: size for size in sizes if isinstance(size, torch.SymInt)}


def is_python_float(node: torch.fx.Node) -> bool:
    """Whether a placeholder is a Python float that Dynamo passes as a 0-d tensor, as ``dynamic=True`` makes it do."""
    return bool(getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False))


def frame_being_compiled() -> tuple[CodeType, Mapping[str, object]] | None:
    """Code object and local variables of the frame that Dynamo is compiling in this thread, if any."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    with contextlib.suppress(Exception):
        translator = InstructionTranslator.current_tx()
        root = translator.output.root_tx
        values = dict(root.f_locals)
        for name, cell in zip(root.f_code.co_freevars, root.closure or (), strict=False):
            with contextlib.suppress(ValueError):
                values.setdefault(name, cell.cell_contents)
        return root.f_code, values
    with contextlib.suppress(Exception):
        return _frame_compiled_ahead_of_time()
    return None


def module_in_wrapper(code: CodeType, values: Mapping[str, object]) -> object:
    """The module of PyTorch, such as ``nn.Sequential``, that Dynamo calls in a wrapper of its own; None without one."""
    from torch._dynamo import external_utils

    return values.get("fn") if code.co_filename == external_utils.__file__ else None


def _frame_compiled_ahead_of_time() -> tuple[CodeType, Mapping[str, object]] | None:
    """The same for ``aot_compile``, which calls the backend when it has left the frame; its caller knows the model."""
    from torch._dynamo.aot_compile import aot_compile_fullgraph
    from torch._dynamo.convert_frame import _get_frame

    frame = sys._getframe()
    while frame.f_code is not aot_compile_fullgraph.__code__:
        if frame.f_back is None:
            return None
        frame = frame.f_back
    traced = _get_frame(frame.f_locals["model"], frame.f_locals["args"], frame.f_locals["kwargs"])
    return traced.code, traced.locals


def allow_ahead_of_time(kind: type) -> None:
    """Have ``aot_compile`` take instances of ``kind`` from a backend.

    It saves one by ``kind.serialize_compile_artifacts(instance)``, and only if it is asked to.
    """
    from torch._dynamo.aot_compile_types import SerializableCallable

    SerializableCallable.register(kind)


def storage_identity(tensor: torch.Tensor) -> int:
    """A number that two tensors share exactly if they share their storage, valid while one of them lives.

    A tensor inside a functorch transform has no storage of its own; the one that it wraps counts.
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return int(StorageWeakRef(tensor.untyped_storage()).cdata)


def opaque_type(value: Any) -> type | None:
    """The registered type of the object for which ``value`` stands in a trace; None if it stands for none.

    Objects of such a type are interchangeable if they are equal: they are registered as values, or equal nothing but
    themselves.
    """
    if not isinstance(value, FakeScriptObject):
        return None
    found = type(value.real_obj)
    return found if is_opaque_value_type(found) or (is_opaque_type(found) and found.__eq__ is object.__eq__) else None


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors of a value, however nested, in order."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def symint_expression(value: int | torch.SymInt | torch.SymBool | torch.SymFloat) -> sympy.Basic | int:
    """The sympy expression behind a symbolic number; a plain number comes back as it is."""
    return value.node.expr if isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat)) else value


def symbolic_hint(value: torch.SymInt | torch.SymFloat) -> int | float | None:
    """The value that a symbolic number had in the traced call; None for an unbacked one."""
    return value.node.hint if value.node.has_hint() else None


def symbol_range(value: torch.SymInt) -> tuple[int | None, int | None]:
    """Smallest and largest value that the tracer allows for a symbolic integer; None where unbounded."""
    return _bounds(value.node.shape_env.bound_sympy(value.node.expr))


def new_shape_env() -> ShapeEnv:
    """A shape environment of our own: no duck shaping, so equal sizes never become one symbol by chance."""
    return ShapeEnv(duck_shape=False)


def new_symbol(env: ShapeEnv, name: str, hint: int | None, lower: int | None, upper: int | None) -> torch.SymInt:
    """A fresh symbolic integer in ``env``: backed by ``hint``, or unbacked when ``hint`` is None."""
    if hint is None:
        symint: torch.SymInt = env.create_unbacked_symint()
        expression = symint.node.expr
    else:
        source = ConstantSource(f"__ppb_{name}")
        expression = env.create_symbol(
            hint,
            source,
            dynamic_dim=DimDynamic.DYNAMIC,
            constraint_dim=None,
            positive=None if lower is None or lower < 0 else True,
            do_not_specialize_zero_one=True,
        )
        symint = env.create_symintnode(expression, hint=hint, source=source)  # type: ignore[assignment]
    env.constrain_symbol_range(
        expression,
        compiler_min=-int_oo if lower is None else lower,
        compiler_max=int_oo if upper is None else upper,
    )
    return symint


def symint_from_expression(env: ShapeEnv, expression: sympy.Expr, hint: int | None) -> torch.SymInt | int:
    """The symbolic integer in ``env`` with this value."""
    if expression.is_number:
        return int(expression)
    return env.create_symintnode(expression, hint=hint)


def shape_env_conditions(env: ShapeEnv) -> tuple[sympy.Basic, ...]:
    """What a compiler has come to rely on about the symbols of ``env``: guards, replacements, run-time asserts."""
    conditions: list[sympy.Basic] = [guard.expr for guard in env.guards]
    conditions += [sympy.Eq(symbol, value, evaluate=False) for symbol, value in env.replacements.items()]
    for asserts in env.deferred_runtime_asserts.values():
        conditions += [runtime_assert.expr for runtime_assert in asserts]
    return tuple(conditions)


def shape_env_ranges(env: ShapeEnv) -> dict[sympy.Symbol, tuple[int | None, int | None]]:
    """The smallest and largest value of each symbol of ``env``, as far as is known now; None where unbounded."""
    return {symbol: _bounds(values) for symbol, values in env.var_to_range.items()}


def _bounds(values: ValueRanges) -> tuple[int | None, int | None]:
    # torch's int_oo says that it is finite [ran].
    lower, upper = values.lower, values.upper
    return (
        int(lower) if lower.is_finite and lower != -int_oo else None,
        int(upper) if upper.is_finite and upper != int_oo else None,
    )


def build_expression(expression: sympy.Basic, symbols: Mapping[sympy.Symbol, Any]) -> Any:
    """Evaluate a shape expression with Python operators: on ints it gives a number, on FX proxies graph nodes."""
    return sympy_interp(PythonReferenceAnalysis, dict(symbols), expression)


def functorch_level() -> int:
    """How many functorch transforms (vmap, grad, ...) are active in this thread."""
    stack = torch._C._functorch.get_interpreter_stack()
    return 0 if stack is None else len(stack)


def leave_functorch(level: int) -> None:
    """Leave functorch transforms, whichever kind they are, until no more than ``level`` are active."""
    while functorch_level() > level:
        torch._C._functorch.pop_dynamic_layer_stack()


def schema_name(op: Callable[..., object]) -> str | None:
    """``namespace::name`` of a library op in any of its forms (overload, packet, custom op); None for others."""
    op = getattr(op, "_opoverload", op)
    if isinstance(op, OpOverload):
        return str(op._schema.name)
    return str(op._qualified_op_name) if isinstance(op, OpOverloadPacket) else None


def overload_name(op: Callable[..., object]) -> str | None:
    """The overload's own name, ``default`` or ``Tensor``; None for all but overloads."""
    return str(op._overloadname) if isinstance(op, OpOverload) else None


def schema_writes(op: OpOverload) -> tuple[str, ...]:
    """Names of the arguments that the op's schema declares as mutated."""
    return tuple(a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write)


def bound_arguments(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Name of each argument of the op, in order -> what a call gives for it, or its default."""
    defaults = {declared.name: declared.default_value for declared in op._schema.arguments}
    return defaults | dict(zip(defaults, args, strict=False)) | dict(kwargs)


@functools.cache
def decompositions() -> Mapping[OpOverload, Callable[..., Any]]:
    """Op -> a function of other ops that does the same."""
    from torch._decomp import core_aten_decompositions

    return core_aten_decompositions()  # type: ignore[return-value]


def autocast_state() -> tuple[object, ...]:
    """What the ambient autocast state of this thread does to an op, for every device type in use."""
    devices = ["cpu", *(d for d in ("cuda", "xpu", "mps") if getattr(torch, d).is_available())]
    enabled = [(d, torch.get_autocast_dtype(d)) for d in devices if torch.is_autocast_enabled(d)]
    return (torch.is_autocast_cache_enabled(), tuple(enabled)) if enabled else ()


def private_tracing(fake_mode: FakeTensorMode) -> AbstractContextManager[object]:
    """Compile under a tracing context of our own, so that nothing reaches Dynamo's shape environment."""
    return tracing(TracingContext(fake_mode))


def frames_given_up_and_graph_breaks() -> tuple[int, int]:
    """How often Dynamo, in this process, gave up on a frame for having too many programs, and broke a graph."""
    from torch._dynamo.utils import counters

    given_up = (count for text, count in counters["unimplemented"].items() if "recompile limit exceeded" in text)
    return sum(given_up), sum(counters["graph_break"].values())


def profiler_is_enabled() -> bool:
    """Whether a profiler records in this thread, NVTX ranges included."""
    return torch.autograd._profiler_enabled()


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Add a text to torch's structured trace (``TORCH_TRACE``, read by tlparse); without one it is not even made."""
    torch._logging.trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text
    )


def expression_text(expression: sympy.Basic | int) -> str:
    """A shape expression as Python, with ``//`` and ``%``, over names of its symbols."""
    return PythonPrinter().doprint(expression) if isinstance(expression, sympy.Basic) else str(expression)


def when_bytecode_is_ready(code: CodeType, tell: Callable[[CodeType], None]) -> None:
    """Call ``tell``, once, with the code that Dynamo makes from ``code``; what Dynamo runs stays as it is."""
    _waiting_for_bytecode()[code] = tell


@functools.cache
def _waiting_for_bytecode() -> dict[CodeType, Callable[[CodeType], None]]:
    waiting: dict[CodeType, Callable[[CodeType], None]] = {}

    def hook(code: CodeType, new_code: CodeType) -> None:
        if (tell := waiting.pop(code, None)) is not None:
            tell(new_code)

    # For good: a hook that removed itself would change what Dynamo iterates over.
    torch._dynamo.convert_frame.register_bytecode_hook(hook)
    return waiting


def guards_of(code: CodeType, transformed: CodeType) -> str | None:
    """The guards under which Dynamo runs ``transformed`` in place of ``code``; None if it does not hold it."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    return next((str(e.guard_manager) for e in _debug_get_cache_entry_list(code) if e.code is transformed), None)


def stock_backend(name: str) -> Callable[..., Any]:
    """The backend that ``torch.compile`` knows under this name."""
    return torch._dynamo.lookup_backend(name)


def generated_code(call: Callable[..., Any]) -> str | None:
    """The Python code that Inductor generated for what a backend returned; None if it generated none.

    What Inductor compiled knows its code, wherever it came from, and most of what is wrapped around it says the same.
    """
    waiting: list[Any] = [call]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if not callable(one) or isinstance(one, type) or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(code := getattr(one, "source_code", None), str):
            return code
        waiting.append(getattr(one, "__wrapped__", None))
        for cell in getattr(one, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # an empty one
                waiting.append(cell.cell_contents)
    return None


def kernel_in_python(op: Callable[..., Any], device_type: str) -> Callable[..., Any] | None:
    """The kernel of a custom or higher-order op as a callable that skips the dispatcher.

    None for PyTorch's own ops and C++ kernels. A mode that calls it instead of the op sees the ops inside of it.
    """
    if isinstance(op, HigherOrderOperator):
        return op.py_kernels.get(torch._C.DispatchKey.CompositeExplicitAutograd)
    if not isinstance(op, OpOverload) or op.namespace in _OWN_NAMESPACES:
        return None
    if not _kernels_in_python(op) & {device_type.upper(), "CompositeExplicitAutograd", "CompositeImplicitAutograd"}:
        return None
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device_type.upper()))
    return lambda *args, **kwargs: op.redispatch(keys, *args, **kwargs)


def runs_python(function: Any) -> bool:
    """Whether a call of a function or library op may run Python code that is not PyTorch's own.

    Such code may read anything. What is not known to be native counts as Python: kernels are known by the file that
    registered them, other functions by their module.
    """
    function = getattr(function, "_opoverload", function)
    if isinstance(function, OpOverloadPacket):
        return any(runs_python(getattr(function, overload)) for overload in function.overloads())
    if isinstance(function, OpOverload):
        return bool(_kernels_in_python(function))
    if isinstance(function, HigherOrderOperator):
        return function.name() not in _RUN_NOTHING_BUT_GRAPHS
    module = getattr(function, "__module__", None) or type(function).__module__
    calls_others = module.startswith("torch._dynamo.variables")  # what allow_in_graph and nonstrict_trace put there
    return calls_others or module.partition(".")[0] not in ("torch", "operator", "_operator", "builtins", "math")


def reads_arguments_only(function: Any) -> bool:
    """Whether a call of a function or library op is known to read and write nothing but its arguments.

    Only PyTorch's own is known. Control flow is not: which of its graphs runs is decided by a tensor, on the host.
    """
    function = getattr(function, "_opoverload", function)
    if isinstance(function, HigherOrderOperator):
        return function.name() in _RUN_NOTHING_BUT_GRAPHS - _CHOOSE_GRAPHS
    if isinstance(function, (OpOverload, OpOverloadPacket)):
        namespace = str(schema_name(function)).partition("::")[0]
        return namespace in _OWN_NAMESPACES | _COLLECTIVES and not runs_python(function)
    return not runs_python(function)


_OWN_NAMESPACES = frozenset(
    {"aten", "prim", "prims", "inductor", "quantized", "mkldnn", "mkl", "_quantized", "profiler"}
)
_KERNEL = re.compile(r"^(\w+)(?:\[alias\])?: registered at (.*):\d+ ::", re.MULTILINE)
_NATIVE_SOURCES = (".c", ".cc", ".cpp", ".cxx", ".cu", ".cuh", ".h", ".hpp", ".hip", ".mm")
_TORCH_FOLDER = os.path.dirname(torch.__file__) + os.sep
_FOR_USERS = os.path.join(_TORCH_FOLDER, "library.py")
"""Where torch registers kernels for others."""
_ONLY_WHILE_TRACING = frozenset({"Meta", "FuncTorchBatched", "Batched", "Functionalize"})
_RUN_NOTHING_BUT_GRAPHS = frozenset(
    {"associative_scan", "autograd_function_apply", "cond", "flex_attention", "flex_attention_backward", "scan"}
    | {"hints_wrapper", "inline_asm_elementwise", "invoke_subgraph", "map_impl", "strict_mode", "switch", "wrap"}
    | {"tag_activation_checkpoint", "wrap_activation_checkpoint", "wrap_with_autocast", "wrap_with_set_grad_enabled"}
    | {"triton_kernel_wrapper_functional", "triton_kernel_wrapper_mutation", "while_loop", "while_loop_stack_output"}
)
"""Higher-order ops that run the graphs among their arguments, or a kernel that is compiled, and nothing else."""
_CHOOSE_GRAPHS = frozenset({"cond", "switch", "while_loop", "while_loop_stack_output"})
_COLLECTIVES = frozenset({"_c10d_functional"})
"""Of the collectives that ``torch.compile`` makes, which are native; their process group is found by its name."""


def _kernels_in_python(op: OpOverload) -> set[str]:
    """Dispatch keys of the op's kernels that are not known to be native, nor PyTorch's own."""
    found = _KERNEL.findall(torch._C._dispatch_dump(op.name()))
    kernels = [(key, file) for key, file in found if key not in _ONLY_WHILE_TRACING]
    others = {key for key, file in kernels if not file.endswith(_NATIVE_SOURCES)}
    if op.namespace in _OWN_NAMESPACES:
        return others & {key for key, file in kernels if not file.startswith(_TORCH_FOLDER) or file == _FOR_USERS}
    # Wrappers around the other kernels, which ``register_autograd`` and ``register_autocast`` make.
    others -= {key for key, file in kernels if key.startswith("Auto") and file == _FOR_USERS}
    return others if kernels else {"none is known"}


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """Run ops as they were recorded below autocast, whatever the caller's autocast state."""
    with contextlib.ExitStack() as stack:
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


@contextlib.contextmanager
def no_cached_casts() -> Iterator[None]:
    """Autocast casts each weight in the body itself, and keeps no cast beyond it.

    Else a capture would read a cast that was made before, until the caller leaves autocast and its memory is freed, or
    whatever runs afterwards would read one that the capture did not compute.
    """
    is_enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(is_enabled)
        torch.clear_autocast_cache()


def tensor_without_ownership(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor at the same address and with the same geometry that does not keep the memory alive.

    Reading it is right only while somebody else guarantees the memory, as a graph pool does during a replay.
    """
    storage = tensor.untyped_storage()
    weak = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), tensor.device, storage.nbytes())
    with torch.inference_mode(False), torch.no_grad():
        alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        alias.set_(weak, tensor.storage_offset(), tensor.shape, tensor.stride())
        # Parts of complex tensors say by a bit of theirs that memory holds the negative or conjugate of each element.
        alias = torch._neg_view(alias) if tensor.is_neg() else alias
        return torch._conj(alias) if tensor.is_conj() else alias


def current_raw_stream(index: int) -> int:
    """The handle of this thread's stream on a GPU, without an object for it. Tested on 2.11."""
    return int(torch._C._cuda_getCurrentRawStream(index))


def end_failed_capture(pool: tuple[int, int]) -> None:
    """Ends for the allocator what ``CUDAGraph.capture_end`` could not end on the current device.

    Where it raises, PyTorch 2.11 takes the capture for one that goes on (pytorch/pytorch#180395): ``empty_cache()``
    raises from there on, and so does the end of the process, which it aborts. Nor does it count the graph among those
    that left the pool. PyTorch 2.12 and 2.13 do the former, 2.14 does both (pytorch/pytorch#190348).
    """
    device = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)


def shared_cuda_memory(tensor: torch.Tensor) -> list[int | str | bool]:
    """What another process needs to open the memory of a CUDA tensor, ready for JSON. Tested on 2.11.

    The memory stays in use until the other process has let go of it, or for as long as PyTorch takes it to be alive.
    """
    # Its number of the device comes first, which may be another one over there.
    _, *values = tensor.untyped_storage()._share_cuda_()
    return [value.hex() if isinstance(value, bytes) else value for value in values]


def opened_cuda_memory(values: Sequence[int | str | bool], device: torch.device) -> torch.Tensor:
    """Memory that another process shares, as flat uint8 of ``device``: where it lies, or a GPU that reaches it."""
    decoded = [bytes.fromhex(value) if isinstance(value, str) else value for value in values]
    torch.cuda.init()
    storage = torch.UntypedStorage._new_shared_cuda(device.index, *decoded)
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def serving() -> contextlib.AbstractContextManager[object]:
    """The mode of every call of a stage: Dynamo would compile again for tensors of another one."""
    return _not_in_inference_mode() if torch.is_inference_mode_enabled() else torch.no_grad()


@contextlib.contextmanager
def _not_in_inference_mode() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield

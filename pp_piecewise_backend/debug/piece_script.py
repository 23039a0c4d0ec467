"""A compute piece as a Python script that runs on its own: a bug report in one file, which needs torch only.

The script holds the piece's graph, builds inputs of the recorded geometry, runs the piece eagerly and through Inductor,
compares and times. ``_HARNESS`` is the part that is the same in every script.
"""

from __future__ import annotations

import builtins
import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from ..compilation.cache_key import look_up
from ..compilation.fx_utils import op_names
from ..compilation.partition import is_allocation
from ..compilation.specs import SymbolSpec, TensorSpec
from ..compilation.split import Piece, SizeOf
from ..utils import torch_compat

_VIEWS = frozenset(
    {"view", "view_as", "reshape", "unsqueeze", "squeeze", "flatten", "transpose", "permute", "getitem", "chunk"}
    | {"split", "unbind", "narrow", "select", "slice", "expand", "t", "detach", "unflatten", "as_strided"}
)
_SIZE_WITHOUT_HINT = 7
"""A size at which no dimension degenerates, for symbols that had none in the traced call."""

_KNOWN_GLOBALS = {"torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree"}


def piece_script(piece: Piece, program_name: str, integer_ranges: Mapping[str, tuple[int, int]]) -> str:
    """The text of the script.

    Args:
        integer_ranges: smallest and largest value, in the traced call, of integer tensors by value name. Other integer
            tensors are filled with zeros, which index anything.
    """
    needs = _Needs(piece.graph_module)
    classes = "\n\n".join(_classes(piece.graph_module, "Piece"))
    names = [node.name for node in piece.graph_module.graph.nodes if node.op == "placeholder"]
    specs = dict(zip(names, piece.input_specs, strict=True))
    tensors = {name: spec for name, spec in specs.items() if isinstance(spec, TensorSpec)}
    sizes = {spec.symbol: spec for spec in piece.input_specs if isinstance(spec, SymbolSpec)}
    lines = [
        f'"""{_header(piece, program_name)}"""',
        "import argparse",
        "import importlib",
        "import statistics",
        "import sys",
        "import time",
        "",
        "import torch",
        "from torch import device, inf, nan  # names that FX uses",
        "",
        f"PIECE = {f'{program_name} piece[{piece.index}]'!r}",
        f"CUSTOM_OPS = {tuple(sorted(needs.custom_ops))!r}  # must be registered: --import the module that does it",
        f"MODULES = {tuple(sorted(needs.modules))!r}  # of torch, that hold functions used below",
        f"DEVICES = {tuple(sorted({spec.device.type for spec in tensors.values()}))!r}",
        f"MISSING = {needs.missing!r}  # what is used below and cannot be imported from anywhere",
        f"SIZES = {{{', '.join(f'{str(symbol)!r}: {_size(spec)}' for symbol, spec in sizes.items())}}}"
        "  # of the traced call; give others as s0=16",
        f"UNINITIALISED = {uninitialised_outputs(piece.graph_module)!r}  # outputs that hold garbage by contract",
        "",
        "",
        "def import_functions():",
        *[f"    globals()[{local!r}] = look_up({where!r}, {path!r})" for local, where, path in needs.functions],
        "    return None",
        "",
        "",
        classes,
        "",
        "",
        f"def make_inputs({', '.join(['tensor', *map(str, sizes)])}):",
        '    """Name: tensor(shape, stride, offset, dtype, device, memory, integers). Equal memory is shared."""',
        "    return {",
        *[f"        {name!r}: {_tensor_text(spec, integer_ranges.get(name))}," for name, spec in tensors.items()],
        "    }",
        "",
        "",
        "def call(piece, t, sizes):",
        f"    return piece({', '.join(_argument_text(name, spec, tensors) for name, spec in specs.items())})",
        "",
        "",
        f"DYNAMIC_DIMS = {_dynamic_dims(tensors)!r}",
        _HARNESS,
    ]
    return "\n".join(lines)


def step_text(piece: Piece, program_name: str) -> str:
    """An eager step as text: why it is one, what goes in and out, its graph."""
    inputs = "\n".join(
        f"  {source_text(source)}: {spec}" for source, spec in zip(piece.inputs, piece.input_specs, strict=True)
    )
    outputs = "\n".join(f"  {name}: {spec}" for name, spec in zip(piece.outputs, piece.output_specs, strict=True))
    graph = "\n\n".join(_classes(piece.graph_module, "EagerStep"))
    return (
        f"{program_name} piece[{piece.index}]: eager step\nwhy: {piece.reason}\n\n"
        f"inputs\n{inputs}\n\noutputs\n{outputs}\n\n{graph}\n"
    )


def parent_text(program_name: str, inputs: list[str], pieces: tuple[Piece, ...], files: list[str], results: str) -> str:
    """The split parent, readable: one line per step, with the values that travel between the steps."""
    lines = [f"# {program_name}: the steps in the order in which they run", f"def forward(self, {', '.join(inputs)}):"]
    for piece, file in zip(pieces, files, strict=True):
        why = f": {piece.reason}" if piece.reason else ""
        proxies = f"; reads {', '.join(piece.reads_stage_inputs)}" if piece.reads_stage_inputs else ""
        gives = "; returns results" if piece.writes_stage_outputs else ""
        lines.append(f"    # piece[{piece.index}] {piece.kind}{why}{proxies}{gives}")
        outputs = f"{', '.join(piece.outputs)}, = " if piece.outputs else ""
        arguments = ", ".join(source_text(source) for source in piece.inputs)
        lines.append(f"    {outputs}self.{file.partition('.')[0]}({arguments})")
    return "\n".join((*lines, f"    return {results}", ""))


def source_text(source: str | SizeOf) -> str:
    """Where an input comes from: the name of a value, or ``x.size(0)``."""
    return f"{source.value}.size({source.dim})" if isinstance(source, SizeOf) else source


def uninitialised_outputs(graph_module: GraphModule) -> tuple[int, ...]:
    """Positions of the outputs that come straight from ``empty`` and its kin, so that they hold garbage."""
    (output,) = (node for node in graph_module.graph.nodes if node.op == "output")
    results = output.args[0]
    return tuple(
        index
        for index, result in enumerate(results if isinstance(results, (tuple, list)) else (results,))
        if isinstance(result, Node) and _is_garbage(result)
    )


def _is_garbage(node: Node) -> bool:
    while _is_named(node, _VIEWS) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return is_allocation(node) and not _is_filled(node)


def _is_filled(node: Node) -> bool:
    """Whether anything but views takes the value, and so may write into it."""
    return any(
        user.op != "output" and (not _is_named(user, _VIEWS) or _is_filled(user)) and not is_allocation(user)
        for user in node.users
    )


def _is_named(node: Node, names: frozenset[str]) -> bool:
    return any(name in names for name in op_names(node))


# ------------------------------------------------------------------------------- what it needs


class _Needs:
    """What a graph uses that a fresh process with torch may not have."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.custom_ops: set[str] = set()
        self.modules: set[str] = set()
        self.functions: list[tuple[str, str, str]] = []
        """Name in the script, module, path within the module."""
        self.missing: list[str] = []
        self._add(graph_module)

    def _add(self, graph_module: GraphModule) -> None:
        for node in graph_module.graph.nodes:
            if node.op == "call_function":
                self._add_function(node)
            elif node.op in ("get_attr", "call_module"):
                value = operator.attrgetter(str(node.target))(graph_module)
                if isinstance(value, GraphModule):
                    self._add(value)
                else:
                    self.missing.append(f"{type(value).__name__} {node.target}")
        for name, value in graph_module.graph.python_code("self").globals.items():
            if name not in _KNOWN_GLOBALS and getattr(builtins, name, None) is not value:
                self._add_global(name, value)

    def _add_function(self, node: Node) -> None:
        target = node.target
        schema = torch_compat.schema_name(target)  # type: ignore[arg-type]
        if schema is not None:
            if schema.partition("::")[0] not in ("aten", "prim", "prims"):
                self.custom_ops.add(schema)
        elif (module := getattr(target, "__module__", None) or "").startswith("torch."):
            self.modules.add(module)

    def _add_global(self, name: str, value: Any) -> None:
        module, path = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        if isinstance(value, type(builtins)):
            self.functions.append((name, value.__name__, ""))
        elif module and path and look_up(module, path) is value:
            self.functions.append((name, module, path))
        else:
            self.missing.append(name)


# ---------------------------------------------------------------------------------------- text


def _header(piece: Piece, program_name: str) -> str:
    header = (
        f"{program_name} piece[{piece.index}], as pp_piecewise_backend compiled it with torch {torch.__version__}.\n\n"
        f"{len(piece.ops)} ops, key {piece.key}. Needs torch only:\n\n"
        f"    python FILE                      run it eagerly and through Inductor, compare, time\n"
        f"    python FILE s0=16                with other sizes\n"
        f"    python FILE --import MODULE      after importing what registers its custom ops\n"
        f"    python FILE --backend aot_eager  with another backend of torch.compile\n\n"
        f"Exit code 0: equal, or it says why it cannot run here. 1: different, or it could not be compiled.\n"
    )
    return header.replace("\\", "\\\\").replace('"""', "'''")


def _classes(graph_module: GraphModule, name: str) -> Iterator[str]:
    """The graph as a module class, after the classes of the bodies that it passes to higher-order ops."""
    bodies: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        target = str(node.target)
        if node.op in ("get_attr", "call_module") and target not in bodies:
            body = operator.attrgetter(target)(graph_module)
            if isinstance(body, GraphModule):
                bodies[target] = f"{name}_{target.replace('.', '_')}"
                yield from _classes(body, bodies[target])
    init = ["    def __init__(self):", "        super().__init__()"] if bodies else []
    # Ops with bodies want them as FX graphs.
    init += [f"        self.{target} = torch.fx.symbolic_trace({body}())" for target, body in bodies.items()]
    yield "\n".join([f"class {name}(torch.nn.Module):", *init, *[""][: len(init)], _forward(graph_module.graph)])


def _forward(graph: Graph) -> str:
    source = graph.python_code("self", verbose=True).src
    lines = []
    for line in source.strip("\n").splitlines():
        if line.strip() == "# No stacktrace found for following nodes":
            continue
        if not line.lstrip().startswith("#"):
            line = re.sub(r";  (?:\w+ = )+None$", "", line)
        lines.append(f"    {line}".rstrip())
    return re.sub(r"\n{2,}", "\n\n", "\n".join(lines)).rstrip()


def _size(spec: SymbolSpec) -> int:
    if spec.hint is not None:
        return spec.hint
    size = max(_SIZE_WITHOUT_HINT, spec.lower or 0)
    return size if spec.upper is None else min(size, spec.upper)


def _tensor_text(spec: TensorSpec, integers: tuple[int, int] | None) -> str:
    shape, stride = (
        f"({''.join(f'{torch_compat.expression_text(d)}, ' for d in dims)})" for dims in (spec.shape, spec.stride)
    )
    offset = torch_compat.expression_text(spec.storage_offset)
    known = "" if integers is None else f", integers={integers}"
    return f"tensor({shape}, {stride}, {offset}, {spec.dtype}, {str(spec.device)!r}, memory={spec.storage}{known})"


def _argument_text(name: str, spec: object, tensors: Mapping[str, TensorSpec]) -> str:
    if isinstance(spec, TensorSpec):
        return f"t[{name!r}]"
    if not isinstance(spec, SymbolSpec):
        return "None"
    # Taken from a tensor, the size stays dynamic when Dynamo traces the call.
    for tensor_name, tensor in tensors.items():
        if spec.symbol in tensor.shape:
            return f"t[{tensor_name!r}].size({tensor.shape.index(spec.symbol)})"
    return f"sizes[{str(spec.symbol)!r}]"


def _dynamic_dims(tensors: Mapping[str, TensorSpec]) -> tuple[tuple[str, int], ...]:
    return tuple(
        (name, dim)
        for name, spec in tensors.items()
        for dim, size in enumerate(spec.shape)
        if isinstance(size, sympy.Symbol)
    )


HARNESS_MARK = "# ------------------------------------------------------------ the same in every piece's script"

_HARNESS = (
    f"\n\n{HARNESS_MARK}\n"
    + '''


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # others: 0.1


def look_up(module, path):
    found = importlib.import_module(module)
    for part in filter(None, path.split(".")):
        found = getattr(found, part)
    return found


def why_not():
    """Why the piece cannot run here; None if it can."""
    if MISSING:
        return f"it uses {', '.join(MISSING)}, which cannot be imported from anywhere"
    for name in DEVICES:
        if name != "cpu" and not getattr(torch, name).is_available():
            return f"it needs the device {name!r}, and torch sees none"
    for name in CUSTOM_OPS:
        namespace, _, op = name.partition("::")
        if not hasattr(getattr(torch.ops, namespace), op):
            return f"the custom op {name} is not registered; give the module that registers it as --import MODULE"
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ImportError:
            pass  # its functions are reached in another way, or the run says so
    try:
        import_functions()
    except (ImportError, AttributeError) as error:
        return f"{error}; give the folder of that module in PYTHONPATH, or a module that provides it as --import MODULE"
    return None


def build(sizes):
    """Name -> tensor, with the recorded geometry; tensors with equal memory share it."""
    recorded = make_inputs(lambda *args, **kwargs: (args, kwargs), **sizes)
    length_bytes, first = {}, {}
    for name, ((shape, stride, offset, dtype, where), more) in recorded.items():
        memory = more["memory"]
        empty = 0 in shape
        extent = 0 if empty else offset + 1 + sum((size - 1) * step for size, step in zip(shape, stride))
        length_bytes[memory] = max(length_bytes.get(memory, 0), extent * dtype.itemsize)
        first.setdefault(memory, (dtype, shape, where, more.get("integers")))
    generator = torch.Generator().manual_seed(0)
    storages = {}
    for memory, (dtype, shape, where, integers) in first.items():
        length = -(-length_bytes[memory] // dtype.itemsize)
        storages[memory] = values(length, dtype, shape, integers, generator).to(where).untyped_storage()
    return {
        name: torch.empty(0, dtype=dtype, device=where).set_(storages[more["memory"]], offset, shape, stride)
        for name, ((shape, stride, offset, dtype, where), more) in recorded.items()
    }


def values(length, dtype, shape, integers, generator):
    if dtype == torch.bool:
        return torch.rand(length, generator=generator) < 0.5
    if dtype.is_floating_point or dtype.is_complex:
        made = torch.randn(length, generator=generator, dtype=torch.complex64 if dtype.is_complex else torch.float32)
        if len(shape) > 1:
            made *= max(shape[-1], 1) ** -0.5  # as weights are, so that products stay of one size
        return (made if shape else made.abs() + 0.1).to(dtype)
    low, high = integers or (0, 0)
    return torch.randint(low, high + 1, (length,), generator=generator, dtype=torch.int64).to(dtype)


def clone(tensors):
    """Fresh tensors that share memory among themselves as the given ones do."""
    storages = {}
    for tensor in tensors.values():
        storage = tensor.untyped_storage()
        storages.setdefault(storage.data_ptr(), storage.clone())
    return {
        name: torch.empty(0, dtype=t.dtype, device=t.device).set_(
            storages[t.untyped_storage().data_ptr()], t.storage_offset(), t.shape, t.stride()
        )
        for name, t in tensors.items()
    }


def run(function, piece, tensors, sizes, seed=0):
    """What the caller can see afterwards: the outputs, and the inputs, which may have been written."""
    tensors = clone(tensors)
    for name, dim in DYNAMIC_DIMS:
        torch._dynamo.maybe_mark_dynamic(tensors[name], dim)
    torch.manual_seed(seed)
    outputs = function(piece, tensors, sizes)
    seen = {f"output {i}": value for i, value in enumerate(outputs) if i not in UNINITIALISED}
    return {**seen, **{f"input {name}": tensor for name, tensor in tensors.items()}}


def differences(wanted, got):
    """One line for each value that differs, and the largest relative difference of those that do not."""
    lines, largest = [], 0.0
    for name, right in wanted.items():
        value = got[name]
        if not isinstance(right, torch.Tensor):
            if right != value:
                lines.append(f"{name}: eager {right!r}, compiled {value!r}")
            continue
        if (right.shape, right.dtype) != (value.shape, value.dtype):
            lines.append(f"{name}: eager {right.dtype}{list(right.shape)}, compiled {value.dtype}{list(value.shape)}")
            continue
        if not right.numel():
            continue
        if not (right.dtype.is_floating_point or right.dtype.is_complex):
            wrong = (right != value).sum().item()
            lines += [f"{name}: {wrong} of {right.numel()} elements differ"] if wrong else []
            continue
        wide = torch.complex128 if right.dtype.is_complex else torch.float64
        a, b = right.to(wide), value.to(wide)
        same = (a == b) | (a.isnan() & b.isnan())
        scale = 1 + torch.where(a.abs().isfinite(), a.abs(), 0.0).max().item()
        relative = torch.where(same, 0.0, (a - b).abs() / scale).nan_to_num(nan=float("inf")).max().item()
        if relative > TOLERANCE.get(right.dtype, 0.1):
            lines.append(f"{name}: largest difference {relative:.3g} of {scale:.3g}")
        else:
            largest = max(largest, relative)
    return lines, largest


def equal(one, other):
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, torch.Tensor) and not a.is_complex()
               else isinstance(a, torch.Tensor) or a == b for a, b in zip(one.values(), other.values()))


def microseconds(function, piece, tensors, sizes):
    """Median time of a call."""
    synchronize = torch.cuda.synchronize if "cuda" in DEVICES else lambda: None
    tensors, taken, stop = clone(tensors), [], time.perf_counter() + 0.3
    while len(taken) < 5 or (time.perf_counter() < stop and len(taken) < 200):
        synchronize()
        begin = time.perf_counter()
        function(piece, tensors, sizes)
        synchronize()
        taken.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(taken)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", metavar="s0=16", help=f"recorded: {SIZES}")
    parser.add_argument("--import", dest="modules", action="append", default=[], metavar="MODULE")
    parser.add_argument("--backend", default="inductor")
    options = parser.parse_args()
    for name in options.modules:
        importlib.import_module(name)
    sizes = dict(SIZES)
    for text in options.sizes:
        name, _, size = text.partition("=")
        if name not in SIZES or not size.isdigit():
            parser.error(f"got {text!r}, expected NAME=NUMBER with one of the names {', '.join(SIZES) or '(none)'}")
        sizes[name] = int(size)
    reason = why_not()
    if reason is not None:
        print(f"{PIECE}: cannot run here: {reason}")
        return 0
    with torch.no_grad():
        piece, tensors = Piece(), build(sizes)
        try:
            eager = run(call, piece, tensors, sizes)
        except Exception as error:
            print(f"{PIECE}: cannot run here: even eagerly: {type(error).__name__}: {error}")
            return 0
        if not equal(eager, run(call, piece, tensors, sizes, seed=1)):
            print(f"{PIECE}: cannot be compared: it draws random numbers, or reads memory that nothing has written")
            return 0
        function = torch.compile(call, backend=options.backend)
        begin = time.perf_counter()
        try:
            compiled = run(function, piece, tensors, sizes)
        except Exception as error:
            print(f"{PIECE}: {options.backend} failed: {type(error).__name__}: {error}")
            return 1
        compile_seconds = time.perf_counter() - begin
        lines, largest = differences(eager, compiled)
        if lines:
            print(f"{PIECE}: DIFFERENT, eager against {options.backend}:")
            print("\\n".join(f"  {line}" for line in lines))
            return 1
        outputs = sum(name.startswith("output") for name in eager)
        print(f"{PIECE}: equal: {outputs} outputs and {len(tensors)} inputs afterwards, {len(UNINITIALISED)} "
              f"uninitialised outputs left out; largest relative difference {largest:.2g}")
        print(f"  eager {microseconds(call, piece, tensors, sizes):.1f} us, {options.backend} "
              f"{microseconds(function, piece, tensors, sizes):.1f} us, compiled in {compile_seconds:.2f} s; "
              f"sizes {sizes}; torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
'''
)

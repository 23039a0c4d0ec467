"""A compute piece as a Python script that runs on its own: a bug report in one file, which needs torch only.

The script holds the piece's graph, builds inputs of the recorded geometry, runs the piece eagerly and through Inductor,
compares and times. It is ``piece_harness.py``, a script of its own, with other lines between the two marks.
"""

from __future__ import annotations

import builtins
import functools
import operator
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule

from ..compilation.cache_key import look_up
from ..compilation.fx_utils import is_custom_op, op_name
from ..compilation.placeholders import InputTable
from ..compilation.specs import ObjectSpec, SymbolSpec, TensorSpec
from ..compilation.split import Piece, ResultValue, SizeOf, Split
from ..utils import torch_compat
from ..utils.counters import counted

_SIZE_WITHOUT_HINT = 7
"""A size at which no dimension degenerates, for symbols that had none in the traced call."""

PIECE_MARK = "# --------------------------------------------------------------------------------------- this piece"
HARNESS_MARK = "# ------------------------------------------------------------ the same in every piece's script"

_KNOWN_GLOBALS = {"torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree"}


def piece_script(piece: Piece, program_name: str, integer_ranges: Mapping[str, tuple[int, int]]) -> str:
    """The text of the script.

    Args:
        integer_ranges: smallest and largest value, in the traced call, of integer tensors by value name. Other integer
            tensors are filled with zeros, which index anything.
    """
    top, bottom = _harness()
    needs = _Needs(piece.graph_module)
    names = [node.name for node in piece.graph_module.graph.nodes if node.op == "placeholder"]
    specs = dict(zip(names, piece.input_specs, strict=True))
    tensors = {name: spec for name, spec in specs.items() if isinstance(spec, TensorSpec)}
    sizes = {str(spec.symbol): _size(spec) for spec in piece.input_specs if isinstance(spec, SymbolSpec)}
    dims = [(name, dim, size) for name, spec in tensors.items() for dim, size in enumerate(spec.shape)]
    dynamic_dims = tuple((name, dim) for name, dim, size in dims if isinstance(size, sympy.Symbol))
    uninitialised = tuple(index for index, is_garbage in enumerate(piece.traits.uninitialised) if is_garbage)
    inputs = [f"        {name!r}: {_tensor_text(spec, integer_ranges.get(name))}," for name, spec in tensors.items()]
    objects = {f"an object of type {spec}": None for spec in specs.values() if isinstance(spec, ObjectSpec)}
    lines = [
        f'"""{_title(piece, program_name)}{top}',
        "from torch import device, inf, nan  # names that FX uses",
        "",
        f"PIECE = {f'{program_name} piece[{piece.index}]'!r}",
        f"FUNCTIONS = {needs.functions!r}  # name below: module and path within it",
        f"MODULES = {tuple(sorted(needs.modules))!r}  # of torch, that hold functions used below",
        f"CUSTOM_OPS = {tuple(sorted(needs.custom_ops))!r}  # must be registered: --import the module that does it",
        f"MISSING = {[*needs.missing, *objects]!r}  # what is used below and cannot be imported from anywhere",
        f"DEVICES = {tuple(sorted({spec.device.type for spec in tensors.values()}))!r}",
        f"SIZES = {sizes!r}  # of the traced call; give others as s0=16",
        f"DYNAMIC_DIMS = {dynamic_dims!r}",
        f"UNINITIALISED = {uninitialised!r}  # outputs that hold garbage by contract",
        "\n",
        "\n\n\n".join(_classes(piece.graph_module, "Piece")),
        "\n",
        f"def make_inputs({', '.join(['tensor', *sizes])}):",
        "    return {",
        *inputs,
        "    }",
        "\n",
        "def call(piece, t, sizes):",
        f"    return piece({', '.join(_argument_text(name, spec, tensors) for name, spec in specs.items())})",
        "\n",
        bottom,
    ]
    return "\n".join(lines)


@functools.cache
def _harness() -> tuple[str, str]:
    """What comes before and after the lines of a piece, without the title."""
    text = Path(__file__).with_name("piece_harness.py").read_text(encoding="utf-8")
    top, mark, rest = text.partition(PIECE_MARK)
    return top[top.index("\n") :] + mark + "\n", HARNESS_MARK + rest.partition(HARNESS_MARK)[2]


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


def piece_files(pieces: Sequence[Piece]) -> list[str]:
    """Per piece the file of the first one with its key."""
    first: dict[tuple[str, str], str] = {}
    ends = {"compute": "compute.py", "eager": "eager.txt"}
    return [first.setdefault((p.kind, p.key), f"piece_{p.index:02d}_{ends[p.kind]}") for p in pieces]


def parent_text(program_name: str, split: Split, table: InputTable) -> str:
    """The split parent, readable: one line per step, with the values that travel between the steps."""
    inputs = ", ".join(graph_input.name for graph_input in table.inputs)
    results = ", ".join(r.value if isinstance(r, ResultValue) else repr(r) for r in split.results)
    lines = [f"# {program_name}: the steps in the order in which they run", f"def forward(self, {inputs}):"]
    for piece, file in zip(split.pieces, piece_files(split.pieces), strict=True):
        why = f": {piece.reason}" if piece.reason else ""
        proxies = f"; reads {', '.join(piece.reads_stage_inputs)}" if piece.reads_stage_inputs else ""
        gives = "; returns results" if piece.writes_stage_outputs else ""
        lines.append(f"    # piece[{piece.index}] {piece.kind}{why}{proxies}{gives}")
        outputs = f"{', '.join(piece.outputs)}, = " if piece.outputs else ""
        arguments = ", ".join(source_text(source) for source in piece.inputs)
        lines.append(f"    {outputs}self.{file.partition('.')[0]}({arguments})")
    return "\n".join((*lines, f"    return ({results},)", ""))


def source_text(source: str | SizeOf) -> str:
    """Where an input comes from: the name of a value, or ``x.size(0)``."""
    return f"{source.value}.size({source.dim})" if isinstance(source, SizeOf) else source


# ------------------------------------------------------------------------------- what it needs


class _Needs:
    """What a graph uses that a fresh process with torch may not have."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.custom_ops: set[str] = set()
        self.modules: set[str] = set()
        self.functions: dict[str, tuple[str, str]] = {}
        """Name in the script -> module, path within the module."""
        self.missing: list[str] = []
        self._add(graph_module)

    def _add(self, graph_module: GraphModule) -> None:
        for node in graph_module.graph.nodes:
            if node.op == "call_function":
                module = getattr(node.target, "__module__", None) or ""
                if is_custom_op(node):
                    self.custom_ops.add(op_name(node))
                elif module.startswith("torch.") and torch_compat.schema_name(node.target) is None:
                    self.modules.add(module)
            elif node.op in ("get_attr", "call_module"):
                value = operator.attrgetter(str(node.target))(graph_module)
                if isinstance(value, GraphModule):
                    self._add(value)
                else:
                    self.missing.append(f"{type(value).__name__} {node.target}")
        for name, value in graph_module.graph.python_code("self").globals.items():
            if name not in _KNOWN_GLOBALS and getattr(builtins, name, None) is not value:
                self._add_global(name, value)

    def _add_global(self, name: str, value: Any) -> None:
        module, path = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
        if isinstance(value, type(builtins)):
            self.functions[name] = value.__name__, ""
        elif module and path and look_up(module, path) is value:
            self.functions[name] = module, path
        else:
            self.missing.append(name)


# ---------------------------------------------------------------------------------------- text


def _title(piece: Piece, program_name: str) -> str:
    title = (
        f"{program_name} piece[{piece.index}], as pp_piecewise_backend compiled it with torch {torch.__version__}.\n\n"
        f"{counted(len(piece.ops), 'op')}, key {piece.key}. Needs torch only:"
    )
    return title.replace("\\", "\\\\").replace('"""', "'''")


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
    source = graph.python_code("self", verbose=True).src.strip("\n")
    source = re.sub(
        r"^ *# No stacktrace found for following nodes *\n|;  (?:\w+ = )+None$", "", source, flags=re.MULTILINE
    )
    return textwrap.indent(re.sub(r"\n\s*\n", "\n\n", source), "    ").rstrip()


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

"""Text of a piece in which names do not matter: two pieces may share one compilation only if their texts agree.

Note [what a piece's key holds]
Everything that changes what the piece computes: ops and their arguments with types, bodies of higher-order ops,
functions by identity unless their qualified name leads back to them, geometry and aliasing of inputs, symbols with
their ranges. Constants and objects are inputs of a piece, so their contents need no place here. What is ambient
(default dtype, autocast, Inductor's settings, versions) is added in ``inductor.py``, where the piece is compiled.
"""

from __future__ import annotations

import hashlib
import importlib
import operator
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from ..utils import torch_compat
from .specs import InputSpec, SymbolSpec, TensorSpec

_SETTINGS = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_LITERALS = (type(None), type(Ellipsis), bool, int, float, complex, str, *_SETTINGS)


def piece_text(graph_module: GraphModule, inputs: Sequence[InputSpec]) -> str:
    """Canonical text of a piece: its inputs with renumbered symbols and storages, then its nodes, renumbered."""
    symbols = {spec.symbol: f"s{i}" for i, spec in enumerate(s for s in inputs if isinstance(s, SymbolSpec))}
    storages: dict[int, int] = {}
    lines = []
    for spec in inputs:
        if isinstance(spec, SymbolSpec):
            backing = "unbacked" if spec.hint is None else "backed"
            lines.append(f"{symbols[spec.symbol]}: {backing} [{spec.lower}, {spec.upper}]")
        elif isinstance(spec, TensorSpec):
            storage = storages.setdefault(spec.storage, len(storages))
            dims = [
                ",".join(_dim_text(dim, symbols) for dim in dims)
                for dims in (spec.shape, spec.stride, (spec.storage_offset,))
            ]
            lines.append(f"{spec.dtype} {spec.device} [{dims[0]}] stride [{dims[1]}] offset {dims[2]} memory {storage}")
        else:
            lines.append(str(spec))
    return "\n".join((*lines, graph_text(graph_module)))


def graph_text(graph_module: GraphModule) -> str:
    """Canonical text of a graph, bodies of higher-order ops included."""
    numbers: dict[Node, str] = {}
    lines = []
    for node in graph_module.graph.nodes:
        numbers[node] = f"%{len(numbers)}"
        if node.op == "placeholder":
            lines.append(f"{numbers[node]} = input")
        elif node.op == "get_attr":
            lines.append(f"{numbers[node]} = {_attribute_text(graph_module, node)}")
        else:
            if node.op == "call_module":
                target = _attribute_text(graph_module, node)
            else:
                target = _function_text(node.target) if node.op == "call_function" else str(node.target)
            arguments = _argument_text((node.args, dict(node.kwargs)), numbers)
            lines.append(f"{numbers[node]} = {node.op} {target} {arguments}")
    return "\n".join(lines)


def digest(text: str) -> str:
    """A short name for a text, equal for equal texts."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _dim_text(dim: Any, symbols: dict[sympy.Symbol, str]) -> str:
    if isinstance(dim, int):
        return str(dim)
    return str(dim.xreplace({symbol: sympy.Symbol(name) for symbol, name in symbols.items()}))


def _attribute_text(graph_module: GraphModule, node: Node) -> str:
    value = operator.attrgetter(str(node.target))(graph_module)
    if isinstance(value, GraphModule):
        return "{\n" + graph_text(value) + "\n}"
    return _identity_text(value)


def _function_text(function: Any) -> str:
    if isinstance(function, (torch_compat.OpOverload, torch_compat.OpOverloadPacket)):
        return str(function)
    if isinstance(function, torch_compat.HigherOrderOperator):
        return f"higher_order::{function.name()}"
    name = getattr(function, "__name__", "")
    module = getattr(function, "__module__", None)
    # Builtins of torch have qualified names such as _VariableFunctionsClass.arange that lead nowhere.
    for path in dict.fromkeys((getattr(function, "__qualname__", name), name)):
        if module and path and look_up(module, path) is function:
            return f"{module}.{path}"
    return _identity_text(function)


def look_up(module: str, path: str) -> object:
    """What a qualified name leads to; None if it leads nowhere."""
    try:
        return operator.attrgetter(path)(importlib.import_module(module))
    except (ImportError, AttributeError, ValueError):
        return None


def _identity_text(value: object) -> str:
    # The graph that holds the text's subject keeps it alive, so its address stays its own as long as the text is used.
    return f"{type(value).__module__}.{type(value).__qualname__}@{id(value):x}"


def _argument_text(value: Any, numbers: dict[Node, str]) -> str:
    if isinstance(value, Node):
        return numbers[value]
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({', '.join(_argument_text(item, numbers) for item in value)})"
    if isinstance(value, dict):
        items = (f"{key}={_argument_text(item, numbers)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(value, slice):
        return f"slice{_argument_text((value.start, value.stop, value.step), numbers)}"
    if isinstance(value, _LITERALS):
        return f"{type(value).__name__}:{value!r}"
    if callable(value):
        return _function_text(value)
    return _identity_text(value)

"""Nodes of FX graphs: every name of an op, what class of op it is by name, and the graphs inside an op."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch.fx import GraphModule, Node

from ..utils import torch_compat

_MATMUL_CLASS = ("mm", "matmul", "linear", "gemm", "conv", "moe", "expert", "mlp", "lstm", "gru", "einsum")


def op_names(node: Node) -> tuple[str, ...]:
    """Every spelling under which a user may name the op of this node, the usual one first.

    ``vllm::unified_attention.default`` and ``vllm.unified_attention`` for ops of a library,
    ``torch.nn.functional.softmax`` and ``softmax`` for functions, ``Tensor.view`` and ``view`` for methods.
    """
    if node.op == "call_method":
        return (f"Tensor.{node.target}", str(node.target))
    if node.op == "call_module":
        return (str(node.target),)
    return function_names(node.target) if node.op == "call_function" else ()


def function_names(target: Any) -> tuple[str, ...]:
    """The same for a function or library op, wherever it is called."""
    if isinstance(target, torch_compat.HigherOrderOperator):
        return (target.name(), f"higher_order::{target.name()}", f"torch.ops.higher_order.{target.name()}")
    if (schema_name := torch_compat.schema_name(target)) is not None:
        namespace, name = schema_name.split("::", 1)
        names: tuple[str, ...] = (schema_name, name, f"{namespace}.{name}", f"torch.ops.{namespace}.{name}")
        if (overload := torch_compat.overload_name(target)) is not None:
            names += tuple(f"{spelling}.{overload}" for spelling in names if spelling != name)
        return names
    name = getattr(target, "__name__", None) or type(target).__name__
    qualified = getattr(target, "__qualname__", name)
    module = getattr(target, "__module__", None) or ""
    return (name, qualified, f"{module}.{name}", f"{module}.{qualified}")


def op_name(node: Node) -> str:
    """The name of the node's op, as a report shows it."""
    names = op_names(node)
    if not names:
        return node.op
    return str(node.target) if node.op == "call_method" else names[0]


def matching_pattern(names: Iterable[str], patterns: Iterable[str]) -> str | None:
    """The first of these names or globs that is a spelling of the op with these ``names``; None if none is."""
    return next((pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)), None)


def plain_op_name(node: Node) -> str:
    """The name of the node's op without the library or module that it comes from."""
    return op_name(node).rpartition("::")[2].rpartition(".")[2]


def is_custom_op(node: Node) -> bool:
    """Whether the op comes from a library other than PyTorch's own."""
    name = torch_compat.schema_name(node.target) if callable(node.target) else None
    return name is not None and name.split("::", 1)[0] not in ("aten", "prim", "prims")


def runs_python(node: Node) -> bool:
    """Whether the node itself may run Python code that is not PyTorch's; ops that it runs are not looked at."""
    if node.op == "call_module" and node.graph.owning_module is not None:
        module = node.graph.owning_module.get_submodule(str(node.target))
        return not type(module).__module__.startswith("torch.nn.")
    return node.op == "call_function" and torch_compat.runs_python(node.target)


def reads_arguments_only(node: Node) -> bool:
    """Whether the node itself is known to read and write nothing but its arguments; likewise."""
    if node.op == "call_function":
        return torch_compat.reads_arguments_only(node.target)
    return not runs_python(node)


def named_like_matmul(name: str) -> bool:
    """Whether an op is of the class of matrix products and convolutions, judged by its name."""
    words = name.lower().replace("::", "_").replace(".", "_").split("_")
    return any(word in _MATMUL_CLASS or word.startswith(("conv", "linear")) or word.endswith("mm") for word in words)


def is_getitem(node: Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem


def nested_nodes(node: Node) -> Iterator[Node]:
    """The nodes of the bodies that a higher-order op takes as arguments, and of those inside these."""
    owner = node.graph.owning_module
    for argument in node.all_input_nodes:
        if argument.op == "get_attr" and owner is not None:
            value = operator.attrgetter(str(argument.target))(owner)
            if isinstance(value, GraphModule):
                for inner in value.graph.nodes:
                    yield inner
                    yield from nested_nodes(inner)


def reachable(nodes: Iterable[Node], edges: Mapping[Node, Collection[Node]]) -> set[Node]:
    """These nodes and all that edges lead to from them."""
    found: set[Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += edges[node]
    return found

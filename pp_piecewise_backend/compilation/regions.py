"""Nodes of a graph that only make sense in pairs, and nodes that set a state for those that follow.

Note [paired nodes]
A cut must never fall between ``enter`` and ``exit``, so the pairs are taken out of the graph before it is cut:

- grad mode (outside the transforms below) and inference mode: dropped. A program runs without gradients from end to
  end, and an inference-mode guard object cannot cross from one piece to another.
- profiler labels, usage logging: dropped. They change no value.
- autocast: each node in between remembers its enclosing ``enter`` nodes, and every piece enters and leaves them again
  around the nodes that need them.
- functorch transforms (vmap, grad, jvp) and any other state, such as the backends that attention may choose from:
  everything from the first such node to the one that undoes it stays together, in one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from ..utils import torch_compat
from .fx_utils import op_names

_DROPPED_FUNCTIONS: tuple[object, ...] = (
    torch_compat.log_api_usage_once,
    torch_compat.lazy_load_decompositions,
    torch_compat.enter_inference_mode,
    torch_compat.exit_inference_mode,
)
_DROPPED_NAMES = ("profiler::_record_function_enter_new", "profiler::_record_function_exit")

_OPENING = ("_increment_nesting", "_enter_dual_level", "_saved_tensors_hooks_disable")
_CLOSING = ("_decrement_nesting", "_exit_dual_level", "_saved_tensors_hooks_enable")


@dataclass(frozen=True)
class Regions:
    """How the nodes of one graph are bound together."""

    dropped: frozenset[Node]
    """Paired nodes that no piece contains."""
    contexts: Mapping[Node, tuple[Node, ...]]
    """Enclosing autocast ``enter`` nodes, outermost first; nodes outside any are absent."""
    bound: Mapping[Node, int]
    """Number of the inseparable group that a node belongs to; nodes that stand alone are absent."""
    bound_reasons: Sequence[str]
    """Per group: why it must run eagerly; "" for one that a compute piece may contain."""


@dataclass
class _Interval:
    """Nodes from ``first`` to ``last``, by position, that must stay together."""

    first: int
    last: int
    reason: str


def find_regions(graph: Graph) -> Regions:
    """Find the pairs of ``graph``; it is not changed."""
    nodes = list(graph.nodes)
    intervals = _merged([*_transforms(nodes), *_settings(nodes)])
    inside = {node for interval in intervals for node in nodes[interval.first : interval.last + 1]}
    dropped: set[Node] = set()
    contexts: dict[Node, tuple[Node, ...]] = {}
    open_autocast: list[Node] = []
    for node in nodes:
        if node.target is torch_compat.enter_autocast:
            open_autocast.append(node)
            dropped.add(node)
        elif node.target is torch_compat.exit_autocast:
            open_autocast.remove(node.args[0])  # type: ignore[arg-type]
            dropped.add(node)
        elif _is_dropped(node) or (node.target is torch_compat.set_grad_enabled and node not in inside):
            dropped.add(node)
        elif open_autocast:
            contexts[node] = tuple(open_autocast)
    bound = {
        node: number
        for number, interval in enumerate(intervals)
        for node in nodes[interval.first : interval.last + 1]
        if node not in dropped and node.op not in ("placeholder", "get_attr", "output")
    }
    return Regions(frozenset(dropped), contexts, bound, [interval.reason for interval in intervals])


def _transforms(nodes: Sequence[Node]) -> Iterator[_Interval]:
    """Outermost functorch transforms. Those that take gradients must run eagerly: pieces run without gradients."""
    depth, first, reason = 0, 0, ""
    for position, node in enumerate(nodes):
        name = _function_name(node)
        if name.endswith(_OPENING):
            if depth == 0:
                first, reason = position, ""
            depth += 1
            if "vmap" not in name:
                reason = "takes gradients inside the graph"
        elif name.endswith(_CLOSING):
            depth -= 1
            if depth == 0:
                yield _Interval(first, position, reason)


def _settings(nodes: Sequence[Node]) -> Iterator[_Interval]:
    """From the first call of each setter to its last, which restores what was there before."""
    positions: dict[object, list[int]] = {}
    for position, node in enumerate(nodes):
        if _sets_state(node):
            positions.setdefault(node.target, []).append(position)
    for target, found in positions.items():
        yield _Interval(found[0], found[-1], f"{getattr(target, '__name__', target)} sets a state and restores it")


def _merged(intervals: list[_Interval]) -> list[_Interval]:
    merged: list[_Interval] = []
    for interval in sorted(intervals, key=lambda i: i.first):
        if merged and interval.first <= merged[-1].last:
            last = merged[-1]
            last.last = max(last.last, interval.last)
            last.reason = "; ".join(dict.fromkeys(reason for reason in (last.reason, interval.reason) if reason))
        else:
            merged.append(interval)
    return merged


def _is_dropped(node: Node) -> bool:
    if node.op != "call_function":
        return False
    return node.target in _DROPPED_FUNCTIONS or any(name in _DROPPED_NAMES for name in op_names(node))


def _function_name(node: Node) -> str:
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _sets_state(node: Node) -> bool:
    """Whether the node changes a setting of the process or thread; grad mode has rules of its own."""
    if node.op != "call_function" or node.target is torch_compat.set_grad_enabled:
        return False
    if isinstance(node.target, torch_compat.OpOverload):
        return False
    name, module = _function_name(node), getattr(node.target, "__module__", None) or ""
    is_setter = name.startswith(("_set_", "set_")) and not node.all_input_nodes
    return module.startswith("torch") and (is_setter or name == "_sdpa_kernel")

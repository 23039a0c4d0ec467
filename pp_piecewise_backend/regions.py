"""Nodes of a graph that only make sense in pairs, and nodes that set a state for those that follow.

Note [paired nodes]
A cut must never fall between ``enter`` and ``exit``, so the pairs are taken out of the graph before it is cut:

- grad mode and inference mode: dropped. A program runs without gradients from end to end, and an inference-mode
  guard object cannot cross from one piece to another.
- profiler labels and usage logging: dropped. They change no value.
- autocast: each node in between remembers its enclosing ``enter`` nodes, and every piece enters and leaves them anew
  around the nodes that need them.
- functorch transforms (vmap, grad, jvp) and any other state, such as the backends that attention may choose from:
  everything from the first such node to the one that undoes it stays together, in one step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from . import _compat
from .split_ops import op_names

_DROPPED_FUNCTIONS: tuple[object, ...] = (
    _compat.set_grad_enabled,
    _compat.log_api_usage_once,
    _compat.enter_inference_mode,
    _compat.exit_inference_mode,
)
_DROPPED_NAMES = ("profiler::_record_function_enter_new", "profiler::_record_function_exit")

_OPENING = ("_increment_nesting", "_enter_dual_level")
_CLOSING = ("_decrement_nesting", "_exit_dual_level")


@dataclass(frozen=True)
class Regions:
    """How the nodes of one graph are bound together."""

    dropped: frozenset[Node]
    """Paired nodes that no piece contains."""
    contexts: dict[Node, tuple[Node, ...]]
    """Enclosing autocast ``enter`` nodes, outermost first; nodes outside any are absent."""
    bound: dict[Node, int]
    """Number of the inseparable group that a node belongs to; nodes that stand alone are absent."""
    bound_reasons: dict[int, str]
    """Why such a group is inseparable, and must run eagerly; "" for one that a compute piece may contain."""


def find_regions(graph: Graph) -> Regions:
    """Find the pairs of ``graph``; it is not changed."""
    dropped: set[Node] = set()
    contexts: dict[Node, tuple[Node, ...]] = {}
    bound: dict[Node, int] = {}
    bound_reasons: dict[int, str] = {}
    open_autocast: list[Node] = []
    transforms = 0
    setters: dict[object, list[int]] = {}
    nodes = list(graph.nodes)
    for position, node in enumerate(nodes):
        if is_dropped(node):
            dropped.add(node)
        elif is_autocast_enter(node):
            dropped.add(node)
            open_autocast.append(node)
        elif is_autocast_exit(node):
            dropped.add(node)
            open_autocast.remove(node.args[0])  # type: ignore[arg-type]
        else:
            if open_autocast:
                contexts[node] = tuple(open_autocast)
            name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
            if name.endswith(_OPENING):
                if transforms == 0:
                    bound_reasons[len(bound_reasons)] = ""
                transforms += 1
            if transforms:
                bound[node] = len(bound_reasons) - 1
            if name.endswith(_CLOSING):
                transforms -= 1
            if sets_state(node):
                setters.setdefault(node.target, []).append(position)
    for target, positions in setters.items():
        # The last call of a setter restores what was there before the first.
        group = len(bound_reasons)
        bound_reasons[group] = f"{getattr(target, '__name__', target)} sets a state that must be restored"
        for node in nodes[positions[0] : positions[-1] + 1]:
            if node not in dropped and node.op not in ("placeholder", "output"):
                bound[node] = group
    return Regions(frozenset(dropped), contexts, bound, bound_reasons)


def is_dropped(node: Node) -> bool:
    if node.op != "call_function":
        return False
    return node.target in _DROPPED_FUNCTIONS or any(name in _DROPPED_NAMES for name in op_names(node))


def is_autocast_enter(node: Node) -> bool:
    return node.op == "call_function" and node.target is _compat.enter_autocast


def is_autocast_exit(node: Node) -> bool:
    return node.op == "call_function" and node.target is _compat.exit_autocast


def sets_state(node: Node) -> bool:
    """Whether the node changes a state of the process or thread rather than a tensor."""
    if node.op != "call_function" or isinstance(node.target, _compat.OpOverload):
        return False
    target: Callable[..., Any] = node.target  # type: ignore[assignment]
    name = getattr(target, "__name__", "")
    module = getattr(target, "__module__", None) or ""
    return name == "_sdpa_kernel" or (name.startswith(("_set_", "set_")) and module.startswith("torch") and
                                      not node.all_input_nodes)  # fmt: skip

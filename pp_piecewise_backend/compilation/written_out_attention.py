"""Attention that a model writes out in plain ops: a matrix product, a softmax, a second matrix product.

Models without a fused attention op do so (Gemma2 in transformers, many of one's own). The scores grow with the KV
cache, so they have to stay out of the pieces like any attention op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch.fx import Node

from .analysis import GraphFacts
from .placeholders import GraphInput
from .split_ops import plain_op_name

_SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum", "__matmul__", "__rmatmul__"})
_LONGEST_WAY = 64


def find_written_out_attention(facts: GraphFacts, inputs: Sequence[GraphInput]) -> frozenset[Node]:
    """The nodes of every written-out attention, from the product that gives the scores to the one that uses them.

    A softmax counts when its input comes from a product of two activations, through ops that are no products, and its
    result reaches another such product in the same way. The softmax of a router, whose input comes from a weight,
    does not.
    """
    # A KV cache that is used as it comes has heads and batch in front; what has two dimensions or fewer is a weight.
    weights = {
        i.spec.storage for i in inputs if i.spec is not None and (i.kind == "parameter" or len(i.spec.shape) <= 2)
    }
    users: dict[Node, list[Node]] = {}
    for node in facts.nodes:
        for argument in node.all_input_nodes:
            users.setdefault(argument, []).append(node)

    def is_product(node: Node) -> bool:
        if not facts.nodes[node].heavy or plain_op_name(node) not in _PRODUCTS:
            return False
        return not any(facts.nodes[argument].storages & weights for argument in node.all_input_nodes)

    def sources(node: Node) -> Iterable[Node]:
        return (argument for argument in node.all_input_nodes if argument.op.startswith("call_"))

    def targets(node: Node) -> Iterable[Node]:
        return (user for user in users.get(node, ()) if user.op.startswith("call_"))

    found: set[Node] = set()
    for node in facts.nodes:
        if node.op.startswith("call_") and plain_op_name(node) in _SOFTMAX:
            before = _ways(node, sources, is_product, facts)
            after = _ways(node, targets, is_product, facts)
            if before and after:
                found |= before | after
    return frozenset(found)


def _ways(
    start: Node, neighbours: Callable[[Node], Iterable[Node]], is_end: Callable[[Node], bool], facts: GraphFacts
) -> set[Node]:
    """All nodes on ways from ``start`` to the nearest ends, over nodes that are no matrix products; {} without any."""
    came_from: dict[Node, set[Node]] = {start: set()}
    waiting = [start]
    ends: set[Node] = set()
    while waiting and len(came_from) < _LONGEST_WAY:
        node = waiting.pop(0)
        for neighbour in neighbours(node):
            if neighbour not in facts.nodes:
                continue
            known = neighbour in came_from
            came_from.setdefault(neighbour, set()).add(node)
            if is_end(neighbour):
                ends.add(neighbour)
            elif not known and not facts.nodes[neighbour].heavy:
                waiting.append(neighbour)
    found: set[Node] = set()
    back = list(ends)
    while back:
        node = back.pop()
        if node not in found:
            found.add(node)
            back += came_from[node]
    return found

"""What the graph is cut at: attention ops, by name, and attention that a model writes out in plain ops.

Models without a fused attention op write it out (Gemma2 in transformers, many of one's own): a matrix product, a
softmax, a second matrix product. The scores grow with the KV cache, so they have to stay out of the pieces like any
attention op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from operator import attrgetter

from torch.fx import Node

from ..config import SplitOps
from .analysis import GraphFacts
from .fx_utils import matching_pattern, nested_nodes, op_names, plain_op_name, reachable
from .placeholders import GraphInput

BUILTIN_SPLIT_OPS: tuple[str, ...] = (
    # PyTorch. Dynamo writes the same op as a function, as a builtin of torch._C._nn and as an ATen overload.
    "scaled_dot_product_attention",
    "_scaled_dot_product_*",
    "_native_multi_head_attention",
    "multi_head_attention_forward",
    "_transformer_encoder_layer_fwd",
    "flex_attention",
    "flex_attention_backward",
    "torch_attn::*",
    "varlen_attn",
    "varlen_attn_out",
    "_varlen_attn",
    "_flash_attention_forward",
    "_efficient_attention_forward",
    "_cudnn_attention_forward",
    # flash-attn
    "flash_attn::*",
    "flash_attn_*::*",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "flash_attn_gpu.*",
    # xFormers
    "xformers*::*attention*",
    "xformers*::*fmha*",
    "xformers_flash*::*",
    "memory_efficient_attention*",
    # FlashInfer
    "flashinfer*::*attention*",
    "flashinfer*::*prefill*",
    "flashinfer*::*decode*",
    "flashinfer*::*mla*",
    "single_prefill_with_kv_cache*",
    "single_decode_with_kv_cache*",
    "batch_prefill_with_*kv_cache*",
    "batch_decode_with_*kv_cache*",
    "trtllm_batch_*_with_kv_cache*",
    # The engines' own
    "vllm::unified_attention*",
    "vllm::unified_mla*",
    "vllm::unified_kv_cache_update*",
    "sglang::unified_attention_with_output",
    "sglang::unified_attention*",
)
"""Names or globs, matched against every spelling in ``op_names``; see docs/options.md for how to add to them."""

GRAPH_SAFE_OPS: tuple[str, ...] = (
    # vLLM and SGLang capture these themselves: experts, quantised products, and what ranks do together.
    "vllm::moe_forward*",
    "vllm::*fused_experts*",
    "vllm::*gemm*",
    "vllm::*scaled_mm*",
    "vllm::*quant*",
    "vllm::*rms_norm*",
    "vllm::all_reduce",
    "vllm::all_gather",
    "vllm::reduce_scatter",
    "sglang::*place_all_reduce",
    "sglang::reg_all_gather_into_tensor",
    # Kernels that see their arguments only. ``mode="full"`` captures attention, too.
    "flash_attn::*",
    "flash_attn_*::*",
    "xformers*::*",
    "flashinfer*::*norm*",
    "flashinfer*::*_and_mul*",
    "flashinfer*::*rope*",
    "torch_attn::*",
    "torchao::*",
    "quantized_decomposed::*",
    "einops.einops.*",
)
"""Ops with a kernel in Python that a graph may hold; ``graph_safe_ops`` adds to them."""

_LOOKS_LIKE_ATTENTION = ("*attention*", "*attn*", "*sdpa*", "*mla*", "*fmha*")


@dataclass(frozen=True)
class SplitOpMatcher:
    """Decides whether a node is an op to cut at."""

    patterns: tuple[str, ...]
    required: tuple[str, ...]
    """The patterns that the user gave: one that matches nothing is reported."""
    written_out: bool
    """Whether attention written out in plain ops counts too."""
    graph_safe: tuple[str, ...]
    """The ops in Python, by name or glob, that read nothing but their arguments, and what never changes."""

    @classmethod
    def from_config(cls, split_ops: SplitOps, graph_safe_ops: Sequence[str] = ()) -> SplitOpMatcher:
        builtin = BUILTIN_SPLIT_OPS if split_ops.extends_builtin else ()
        return cls(
            (*builtin, *split_ops.patterns),
            split_ops.patterns,
            written_out=split_ops.extends_builtin,
            graph_safe=(*GRAPH_SAFE_OPS, *graph_safe_ops),
        )

    def match(self, node: Node) -> str | None:
        """The pattern that matches this node, or an op inside a graph that it takes as an argument."""
        patterns = (matching_pattern(op_names(each), self.patterns) for each in (node, *nested_nodes(node)))
        return next((pattern for pattern in patterns if pattern is not None), None)

    def undeclared_op(self, node: Node, ops: Iterable[Sequence[str]]) -> str | None:
        """The first of these ops, given by all their names, that is not named as graph-safe; None if all are.

        Args:
            ops: some of those that the node runs; all of them count as named where the node is.
        """
        if matching_pattern(op_names(node), self.graph_safe) is not None:
            return None
        return next((names[0] for names in ops if matching_pattern(names, self.graph_safe) is None), None)


def looks_like_attention(node: Node) -> bool:
    """Whether the op's name suggests attention, for the report on split ops that matched nothing."""
    return any(fnmatchcase(name.lower(), p) for name in op_names(node) for p in _LOOKS_LIKE_ATTENTION)


def unknown_op(facts: GraphFacts, matcher: SplitOpMatcher) -> str | None:
    """The first op of a graph that is neither known nor declared to read nothing but its arguments; None without one.

    It may have been captured in pieces, as kernels in C++ are: a graph of everything that nobody asked for takes none.
    """
    found = (
        matcher.undeclared_op(node, known.unknown)
        for node, known in facts.nodes.items()
        if known.unknown and node not in facts.regions.dropped
    )
    return next((name for name in found if name is not None), None)


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

    def is_product(node: Node) -> bool:
        if not facts.nodes[node].heavy or plain_op_name(node) not in _PRODUCTS:
            return False
        return not any(facts.nodes[argument].storages & weights for argument in node.all_input_nodes)

    found: set[Node] = set()
    for node in facts.nodes:
        if node.op.startswith("call_") and plain_op_name(node) in _SOFTMAX:
            before = _ways(node, attrgetter("all_input_nodes"), is_product, facts)
            after = _ways(node, attrgetter("users"), is_product, facts)
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
            if neighbour not in facts.nodes or not neighbour.op.startswith("call_"):
                continue
            known = neighbour in came_from
            came_from.setdefault(neighbour, set()).add(node)
            if is_end(neighbour):
                ends.add(neighbour)
            elif not known and not facts.nodes[neighbour].heavy:
                waiting.append(neighbour)
    return reachable(ends, came_from)

"""Which ops the graph is cut at, and which are worth compiling: decided by name, for every spelling of an op."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch.fx import GraphModule, Node

from ..config import SplitOps
from ..utils import torch_compat

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
"""Names or globs, matched against every spelling in ``op_names``; see the README for how to add to them."""

_LOOKS_LIKE_ATTENTION = ("*attention*", "*attn*", "*sdpa*", "*mla*", "*fmha*")

_MATMUL_CLASS = ("mm", "matmul", "linear", "gemm", "conv", "moe", "expert", "mlp", "lstm", "gru", "einsum")


@dataclass(frozen=True)
class SplitOpMatcher:
    """Decides whether a node is an op to cut at."""

    patterns: tuple[str, ...]
    required: tuple[str, ...]
    """The patterns that the user gave: one that matches nothing is reported."""
    written_out: bool
    """Whether attention written out in plain ops counts too."""

    @classmethod
    def from_config(cls, split_ops: SplitOps) -> SplitOpMatcher:
        builtin = BUILTIN_SPLIT_OPS if split_ops.extends_builtin else ()
        return cls((*builtin, *split_ops.patterns), split_ops.patterns, written_out=split_ops.extends_builtin)

    def match(self, node: Node) -> str | None:
        """The pattern that matches this node, or an op inside a graph that it takes as an argument."""
        names = op_names(node)
        for pattern in self.patterns:
            if any(fnmatchcase(name, pattern) for name in names):
                return pattern
        for body in nested_graphs(node):
            for inner in body.graph.nodes:
                if (pattern_inside := self.match(inner)) is not None:
                    return pattern_inside
        return None


def looks_like_attention(node: Node) -> bool:
    """Whether the op's name suggests attention, for the report on split ops that matched nothing."""
    return any(fnmatchcase(name.lower(), p) for name in op_names(node) for p in _LOOKS_LIKE_ATTENTION)


def op_names(node: Node) -> tuple[str, ...]:
    """Every spelling under which a user may name the op of this node, the usual one first.

    ``vllm::unified_attention.default`` and ``vllm.unified_attention`` for ops of a library,
    ``torch.nn.functional.softmax`` and ``softmax`` for functions, ``Tensor.view`` and ``view`` for methods.
    """
    target = node.target
    if node.op == "call_method":
        return (f"Tensor.{target}", str(target))
    if node.op == "call_module":
        return (str(target),)
    if node.op != "call_function":
        return ()
    if isinstance(target, torch_compat.HigherOrderOperator):
        return (target.name(), f"higher_order::{target.name()}", f"torch.ops.higher_order.{target.name()}")
    if (schema_name := torch_compat.schema_name(target)) is not None:  # type: ignore[arg-type]
        namespace, name = schema_name.split("::", 1)
        names: tuple[str, ...] = (schema_name, name, f"{namespace}.{name}", f"torch.ops.{namespace}.{name}")
        if (overload := torch_compat.overload_name(target)) is not None:  # type: ignore[arg-type]
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


def plain_op_name(node: Node) -> str:
    """The name of the node's op without the library or module that it comes from."""
    return op_name(node).rpartition("::")[2].rpartition(".")[2]


def is_custom_op(node: Node) -> bool:
    """Whether the op comes from a library other than PyTorch's own."""
    name = torch_compat.schema_name(node.target) if callable(node.target) else None
    return name is not None and name.split("::", 1)[0] not in ("aten", "prim", "prims")


def named_like_matmul(name: str) -> bool:
    """Whether an op is of the class of matrix products and convolutions, judged by its name."""
    words = name.lower().replace("::", "_").replace(".", "_").split("_")
    return any(word in _MATMUL_CLASS or word.startswith(("conv", "linear")) or word.endswith("mm") for word in words)


def is_getitem(node: Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem


def nested_graphs(node: Node) -> Iterator[GraphModule]:
    """The bodies that a higher-order op takes as arguments."""
    owner = node.graph.owning_module
    for argument in node.all_input_nodes:
        if argument.op == "get_attr" and owner is not None:
            value = attribute(owner, str(argument.target))
            if isinstance(value, GraphModule):
                yield value


def attribute(module: torch.nn.Module, path: str) -> object:
    """What a ``get_attr`` node with this target refers to."""
    value: object = module
    for part in path.split("."):
        value = getattr(value, part)
    return value

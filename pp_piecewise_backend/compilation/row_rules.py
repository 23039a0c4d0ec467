"""For each op that PyTorch runs: do rows of tokens stay apart in it?

Note [rows stay apart]
Token dimensions of a tensor are those whose size is the token count n, or k * n with k entries for each token one after
the other. Padding adds rows at their end. It changes no real row if every op makes each entry at indices of real tokens
from nothing but entries at indices of real tokens and numbers that do not depend on n. Each rule here answers this for
one op; so it holds for a piece if it holds for each of its ops. A prefix is allowed for this reason (``cumsum``, the
first row); a sum over tokens, an order of tokens, or a view that puts rows in another order is not. Nor is causal
attention: it multiplies later rows by zero, and they may hold NaN.

Nothing is allowed because no rule forbids it: an op without a rule is refused by name. Pointwise ops are those that
PyTorch tags so, and an op without a rule is followed into the ops of which PyTorch says that it consists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor

from ..utils import torch_compat
from .specs import symbols_of


class Call:
    """One call of an op on fake tensors, and what rules ask about it."""

    def __init__(
        self, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, token_count: sympy.Symbol
    ) -> None:
        namespace, _, name = str(torch_compat.schema_name(op)).partition("::")
        self.op = op
        self.result = result
        self.token_count = token_count
        self.is_custom = namespace not in ("aten", "prim", "prims")
        written = torch_compat.schema_writes(op)
        self.name = name.removesuffix("_") if written else name
        """Without library, overload and the mark of an in-place op."""
        self.arguments = torch_compat.bound_arguments(op, args, kwargs)
        self.written = [self.arguments[name] for name in written]
        """The arguments that it writes."""

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    @cached_property
    def tensors(self) -> list[Tensor]:
        """The tensors that it takes, in order."""
        return torch_compat.tensors_in(list(self.arguments.values()))

    @property
    def first(self) -> Tensor:
        """The tensor that it works on."""
        return self.tensors[0]

    def counts_tokens(self, size: object) -> bool:
        """Whether a number depends on the token count."""
        return self.token_count in symbols_of((torch_compat.symint_expression(size),))  # type: ignore[arg-type]

    def token_dims(self, value: object) -> frozenset[int]:
        """The token dimensions of a tensor; none for anything else."""
        if not isinstance(value, Tensor):
            return frozenset()
        return frozenset(dim for dim, size in enumerate(value.shape) if self.counts_tokens(size))

    def dims(self, name: str, default: Any = None) -> frozenset[int]:
        """The dimensions of the first tensor that an argument names, counted from the front; all if it names none."""
        given, rank = self[name], self.first.dim()
        given = default if given is None else given
        if given is None or given == []:
            return frozenset(range(rank))
        return frozenset(dim % max(rank, 1) for dim in (given if isinstance(given, list | tuple) else (given,)))

    def has_tokens_along(self, dims: Collection[int], tensor: Tensor | None = None) -> bool:
        return not self.token_dims(self.first if tensor is None else tensor).isdisjoint(dims)

    def have_tokens(self, tensors: Sequence[object]) -> bool:
        return any(self.token_dims(tensor) for tensor in tensors)


Rule: TypeAlias = Callable[[Call], bool]
"""Whether rows stay apart in a call."""


def _always(call: Call) -> bool:
    return True


# ------------------------------------------------------------------------- along some dimensions


def _not_along(name: str, default: Any = None) -> Rule:
    """Entries along the dimensions that an argument names mix."""
    return lambda call: not call.has_tokens_along(call.dims(name, default))


def _not_along_both(call: Call) -> bool:
    """Entries along two dimensions mix."""
    return not call.has_tokens_along(call.dims("dim1", 0) | call.dims("dim2", 1))


def _not_along_last(count: int) -> Rule:
    """Entries along this many last dimensions mix, as in images."""

    def rule(call: Call) -> bool:
        rank = call.first.dim()
        return not call.has_tokens_along(range(rank - count, rank)) and not call.have_tokens(call.tensors[1:])

    return rule


def _batch_only(call: Call) -> bool:
    """All but the first dimension of the first tensor mixes, and there is nothing per token besides."""
    return not call.has_tokens_along(range(1, call.first.dim())) and not call.have_tokens(call.tensors[1:])


def _normalizes(call: Call) -> bool:
    rank = call.first.dim()
    along = range(rank - len(call["normalized_shape"]), rank)
    return not call.has_tokens_along(along) and not call.have_tokens(call.tensors[1:])


def _evaluates_batch_norm(call: Call) -> bool:
    return call["training"] is not True and not call.has_tokens_along({1}) and not call.have_tokens(call.tensors[1:])


def _renorms(call: Call) -> bool:
    return not call.has_tokens_along(frozenset(range(call.first.dim())) - call.dims("dim"))


# ----------------------------------------------------------------------------------------- views


def _keeps_order(call: Call) -> bool:
    """Each token dimension of a view has as many entries in front of it as before: rows stand in the same order."""
    before, after = (_entries_in_front(call, tensor) for tensor in (call.first, call.result))
    return before == after


def _entries_in_front(call: Call, tensor: Tensor) -> list[Any]:
    sizes = [sympy.sympify(torch_compat.symint_expression(size)) for size in tensor.shape]
    return [sympy.expand(math.prod(sizes[:dim])) for dim in sorted(call.token_dims(tensor))]


def _repeats(call: Call) -> bool:
    added = len(call["repeats"]) - call.first.dim()
    return all(_is(call["repeats"][dim + added], 1) for dim in call.token_dims(call.first))


def _slices(call: Call) -> bool:
    """Of tokens all; of anything else a part that begins where it does however many tokens there are."""
    (dim,) = call.dims("dim")
    if not call.has_tokens_along({dim}):
        # As many rows as tokens, and not as many columns as there are anyway.
        return not call.counts_tokens(call["end"]) or (_is(call["step"], 1) and dim in call.token_dims(call.result))
    sizes = [torch_compat.symint_expression(tensor.shape[dim]) for tensor in (call.first, call.result)]
    return (call["start"] is None or _is(call["start"], 0)) and _is(call["step"], 1) and sizes[0] == sizes[1]


def _selects(call: Call) -> bool:
    return _is(call["index"], 0) or not (call.has_tokens_along(call.dims("dim")))


def _is(value: object, number: int) -> bool:
    return isinstance(value, int) and value == number


def _joins(call: Call) -> bool:
    # Empty ones, such as a new cache, add nothing: beside them, one tensor alone is copied.
    joined = [tensor for tensor in call["tensors"] if not any(_is(size, 0) for size in tensor.shape)]
    return len(joined) == 1 or all(not call.has_tokens_along({call["dim"] % tensor.dim()}, tensor) for tensor in joined)


def _pads(call: Call) -> bool:
    pad, last = call["pad"], call.first.dim() - 1
    return not call.has_tokens_along({last - at // 2 for at, size in enumerate(pad) if not _is(size, 0)})


def _reinterprets(call: Call) -> bool:
    return call["dtype"].itemsize == call.first.dtype.itemsize or not call.has_tokens_along({call.first.dim() - 1})


# ------------------------------------------------------------------------------ products of matrices


def _multiplies(left: str, right: str) -> Rule:
    """The last dimension of one factor is summed with the last but one of the other, or the only one of a vector."""

    def rule(call: Call) -> bool:
        one, other = call[left], call[right]
        return not call.has_tokens_along({one.dim() - 1}, one) and not call.has_tokens_along(
            {max(other.dim() - 2, 0)}, other
        )

    return rule


def _attends(call: Call) -> bool:
    """Tokens are a batch. Where they are the sequence, even a mask that hides later ones multiplies them by zero."""
    rank = call["query"].dim()
    dims = [call.token_dims(call[name]) for name in ("query", "key", "value")]
    mask = call["attn_mask"] if call["attn_mask"] is not None else call["attn_bias"]
    return not call.token_dims(mask) and all(found.isdisjoint({rank - 1, rank - 2}) for found in dims)


# -------------------------------------------------------------------------------------------- indices


def _gathers(call: Call) -> bool:
    """Rows line up one to one but along ``dim``; there, each entry is taken from what is not per token."""
    dims = call.token_dims(call.first)
    return dims.isdisjoint(call.dims("dim")) and call.token_dims(call["index"]) - call.dims("dim") == dims


def _scatters(call: Call) -> bool:
    """Rows of all tensors line up one to one, and entries change places within them."""
    dims = {call.token_dims(tensor) for tensor in call.tensors if tensor.dim()}
    return len(dims) == 1 and not call.has_tokens_along(call.dims("dim"))


def _moves(call: Call) -> bool:
    """Entries are written at other places along ``dim``, the same ones in each row."""
    source = call["value"] if call["source"] is None else call["source"]
    lined_up = call.token_dims(source) <= call.token_dims(call.first) - call.dims("dim")
    return lined_up and not call.has_tokens_along(call.dims("dim")) and not call.have_tokens([call["index"]])


def _indexed_dims(call: Call) -> list[int] | None:
    """The dimensions that are indexed; None where rows would be chosen or counted."""
    given = {dim: index for dim, index in enumerate(call["indices"]) if index is not None}
    counted = any(index.dtype in (torch.bool, torch.uint8) for index in given.values())
    return None if counted or call.has_tokens_along(given.keys()) else list(given)


def _indexes(call: Call) -> bool:
    return _indexed_dims(call) is not None


def _puts(call: Call) -> bool:
    """Rows may be written at the same last dimensions, but not each token where an index of its own says."""
    at = _indexed_dims(call)
    kept = call.first.dim() - len(at or ())
    indices = torch_compat.tensors_in(call["indices"])
    if at is None or at != list(range(kept, call.first.dim())) or call.have_tokens(indices):
        return False
    in_front = kept + max(index.dim() for index in indices) - call["values"].dim()
    return {dim + in_front for dim in call.token_dims(call["values"])} <= call.token_dims(call.first)


def _searches(*known: str) -> Rule:
    """Each entry is looked for in tensors that are no rows."""
    return lambda call: not call.have_tokens([call[name] for name in known])


def _named(rule: Rule, *names: str) -> dict[str, Rule]:
    return dict.fromkeys(names, rule)


_RULES: Mapping[str, Rule] = {
    # Entries at the same indices, which PyTorch does not tag as pointwise.
    **_named(_always, "_to_copy", "_conj", "_neg_view", "alias", "complex", "copy", "detach", "fill", "imag", "lift"),
    **_named(_always, "lift_fresh", "lift_fresh_copy", "log_sigmoid_forward", "polar", "real", "view_as_real", "zero"),
    **_named(_always, "_prelu_kernel", "empty_like", "full_like", "ones_like", "zeros_like", "is_same_size"),
    **_named(_always, "_assert_tensor_metadata", "convert_element_type", "device", "floor_divide", "hardswish", "size"),
    # New tensors, of which each entry is the same however many there are.
    **_named(_always, "empty", "empty_permuted", "empty_strided", "full", "ones", "scalar_tensor", "zeros", "arange"),
    **_named(_always, "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros"),
    # Dimensions change places, appear or vanish, and rows stand in the same order.
    **_named(_always, "expand", "permute", "squeeze", "stack", "t", "transpose", "unsqueeze"),
    # What comes before a token does not change.
    **_named(_always, "cummax", "cummin", "cumprod", "cumsum", "logcumsumexp", "tril", "triu"),
    **_named(_not_along("dim"), "all", "amax", "amin", "aminmax", "any", "argmax", "argmin", "count_nonzero", "max"),
    **_named(_not_along("dim"), "kthvalue", "linalg_vector_norm", "logsumexp", "mean", "median", "min", "mode"),
    **_named(_not_along("dim"), "nanmedian", "nansum", "norm", "prod", "std", "std_mean", "sum", "var", "var_mean"),
    **_named(_not_along("dim", -1), "argsort", "glu", "sort", "topk"),
    **_named(_not_along("dim"), "_log_softmax", "_safe_softmax", "_softmax", "log_softmax", "softmax"),
    **_named(_not_along("dim"), "_fft_c2c", "_fft_c2r", "_fft_r2c", "split", "split_with_sizes", "unbind"),
    **_named(_not_along("dims"), "flip", "roll"),
    **_named(_not_along_both, "diagonal", "diagonal_copy", "trace"),
    **_named(_not_along("dimension"), "unfold", "unfold_copy"),
    **_named(_moves, "index_add", "index_copy", "index_fill", "index_reduce"),
    **_named(_keeps_order, "_reshape_copy", "_unsafe_view", "reshape", "view"),
    **_named(_multiplies("self", "mat2"), "_int_mm", "bmm", "mm"),
    "linear": lambda call: not any(call.has_tokens_along({call[t].dim() - 1}, call[t]) for t in ("input", "weight")),
    "matmul": _multiplies("self", "other"),
    **_named(_searches("boundaries"), "bucketize"),
    **_named(_searches("sorted_sequence", "sorter"), "searchsorted"),
    **_named(_searches("test_elements"), "isin"),
    **_named(_scatters, "scatter", "scatter_add", "scatter_reduce"),
    **_named(_indexes, "_unsafe_index", "index"),
    **_named(_puts, "_index_put_impl", "_unsafe_index_put", "index_put"),
    **_named(_normalizes, "_fused_rms_norm", "native_layer_norm"),
    **_named(_evaluates_batch_norm, "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
    **_named(_evaluates_batch_norm, "cudnn_batch_norm", "native_batch_norm"),
    **_named(_batch_only, "convolution", "native_group_norm"),
    **_named(_not_along_last(1), "max_pool1d", "reflection_pad1d", "replication_pad1d", "upsample_nearest1d"),
    **_named(_not_along_last(2), "_adaptive_avg_pool2d", "avg_pool2d", "max_pool2d_with_indices", "upsample_nearest2d"),
    **_named(_not_along_last(2), "reflection_pad2d", "replication_pad2d", "upsample_bicubic2d", "upsample_bilinear2d"),
    **_named(_not_along_last(3), "_adaptive_avg_pool3d", "avg_pool3d", "max_pool3d_with_indices"),
    **_named(_attends, "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_efficient_attention"),
    **_named(_attends, "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    "scaled_dot_product_attention": _attends,
    "addmm": _multiplies("mat1", "mat2"),
    "addmv": _multiplies("mat", "vec"),
    "baddbmm": _multiplies("batch1", "batch2"),
    "cat": _joins,
    "constant_pad_nd": _pads,
    "dot": _multiplies("self", "tensor"),
    "embedding": _searches("weight"),
    "gather": _gathers,
    "index_select": _not_along("dim"),
    "mv": _multiplies("self", "vec"),
    "renorm": _renorms,
    "repeat": _repeats,
    "select": _selects,
    "slice": _slices,
    "view_as_complex": lambda call: not call.has_tokens_along({call.first.dim() - 1}),
}

_SIZES: Mapping[str, Collection[str]] = {
    **dict.fromkeys(("_unsafe_view", "expand", "reshape", "view", "_reshape_copy"), ("size", "shape", "implicit")),
    **dict.fromkeys(("empty", "empty_permuted", "full", "ones", "zeros"), ("size",)),
    **dict.fromkeys(("new_empty", "new_full", "new_ones", "new_zeros"), ("size",)),
    **dict.fromkeys(("empty_strided", "new_empty_strided"), ("size", "stride")),
    "arange": ("end",),
    "native_group_norm": ("N",),
    "repeat": ("repeats",),
    "slice": ("end",),
}
"""Arguments that may hold the token count: as sizes, more of which only append rows."""


def rule_for(call: Call) -> Rule | None:
    """The rule for an op of PyTorch; None if there is none."""
    if torch.Tag.pointwise in call.op.tags or (call.written and _is_pointwise_out_of_place(call)):
        return _always
    return _reinterprets if call.name == "view" and "dtype" in call.arguments else _RULES.get(call.name)


def _is_pointwise_out_of_place(call: Call) -> bool:
    """Not every in-place op has the tag of the op that it does in place, such as ``masked_fill_``."""
    overload = torch_compat.overload_name(call.op)
    op = getattr(getattr(torch.ops.aten, call.name, None), overload or "", None)
    return op is not None and torch.Tag.pointwise in op.tags


def uses_token_count(call: Call) -> bool:
    """Whether it takes the token count other than as a size (R4)."""
    sizes = _SIZES.get(call.name, ())
    values = [value for name, value in call.arguments.items() if name not in sizes]
    return any(call.counts_tokens(leaf) for leaf in torch_compat.tree_leaves(values))


def has_odd_sizes(call: Call) -> bool:
    """Whether a result has a size with the token count in it that is no multiple of it: rows were cut off or added."""
    sizes = [
        size for tensor in torch_compat.tensors_in(call.result) for size in tensor.shape if call.counts_tokens(size)
    ]
    per_token = [sympy.cancel(torch_compat.symint_expression(size) / call.token_count) for size in sizes]
    return any(call.token_count in entries.free_symbols or not entries.is_integer for entries in per_token)


def writes_rows_into_other_memory(call: Call) -> bool:
    """Whether it writes rows into memory whose size does not depend on their number: padded ones stay in it."""
    return any(
        call.token_dims(tensor) and not call.counts_tokens(tensor.untyped_storage().nbytes())
        for tensor in torch_compat.tensors_in(call.written)
    )


_SAFE_INTEGERS = frozenset(
    {"argmax", "argmin", "argsort", "bucketize", "count_nonzero", "cummax", "cummin", "kthvalue", "max", "median"}
    | {"min", "max_pool2d_with_indices", "mode", "nanmedian", "searchsorted", "sort", "topk"}
    | {"empty_like", "full_like", "ones_like", "zeros_like", "new_empty", "new_full", "new_ones", "new_zeros"}
)
"""Ops whose integers are valid indices, or constants, whatever the floats are that they take."""

_TAKES_INDICES = frozenset(
    {"_index_put_impl", "_unsafe_index", "_unsafe_index_put", "embedding", "gather", "index", "index_put"}
    | {"index_add", "index_copy", "index_fill", "index_reduce", "index_select"}
    | {"scatter", "scatter_add", "scatter_reduce"}
)


def makes_integers_from_floats(call: Call) -> bool:
    """Whether the integers that it returns may be anything, as the floats in padded rows may."""
    return call.name not in _SAFE_INTEGERS and any(tensor.dtype.is_floating_point for tensor in call.tensors)


def indices_of(call: Call) -> list[Tensor]:
    """The integer tensors by which it indexes."""
    if call.name not in _TAKES_INDICES:
        return []
    return torch_compat.tensors_in([call[name] for name in ("index", "indices")])

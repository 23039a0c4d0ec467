"""What ops do with tokens, by the name of the op: along which dimension, and which arguments are sizes or indices.

Note [tokens that mix]
An op mixes tokens when its result for one token depends on other tokens, or on how many there are. The test with
poisoned rows (rule R3) sees this only if the padded rows differ from the real ones. Rows of integers are padded with
other rows of the same call, and these may all be alike, as in a warm-up with zeros: then the mean over all tokens is
the same with padded rows, and wrong in the next call. So what the graph shows is refused before any test: an op that
gives up the token dimension or sums over it, orders, shifts, halves or picks along it. A prefix (``cumsum``, causal
attention, rows counted from the front) is none of these, as padded rows come last. Custom ops show nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

import sympy
import torch
from torch.fx import Node

from ..utils import torch_compat
from .analysis import GraphFacts
from .fx_utils import is_custom_op, op_name, plain_op_name
from .partition import is_allocation
from .specs import Dim, TensorSpec, symbols_of


class Op:
    """One node of a graph, and the questions about it that the rules of the table ask."""

    def __init__(self, facts: GraphFacts, node: Node, token_count: sympy.Symbol) -> None:
        self.facts = facts
        self.node = node
        self.token_count = token_count
        self.label = op_name(node)
        self.name = plain_op_name(node).rstrip("_")
        """Without library, overload and the mark of an in-place op."""

    def spec(self, value: object) -> TensorSpec | None:
        """Geometry of an argument that is one tensor, else None."""
        return self.facts.spec(value) if isinstance(value, Node) and value in self.facts.nodes else None

    def argument(self, position: int, keyword: str, default: Any = None) -> Any:
        """An argument by its position, the tensor of a method included, or by its keyword."""
        return self.node.args[position] if len(self.node.args) > position else self.node.kwargs.get(keyword, default)

    @cached_property
    def operands(self) -> list[TensorSpec]:
        """The tensors that it takes."""
        return [spec for node in self.node.all_input_nodes if (spec := self.spec(node)) is not None]

    @cached_property
    def counting(self) -> list[TensorSpec]:
        """The tensors with a dimension that counts tokens that it takes."""
        return [spec for spec in self.operands if self.token_dims(spec)]

    @property
    def first(self) -> TensorSpec | None:
        """The tensor that it works on; None if its first argument is none."""
        if self.node.args and isinstance(self.node.args[0], Node):
            return self.spec(self.node.args[0])
        return next(iter(self.counting), None)

    @cached_property
    def results(self) -> list[TensorSpec]:
        leaves = torch_compat.tree_leaves(self.facts.nodes[self.node].value)
        return [leaf for leaf in leaves if isinstance(leaf, TensorSpec)]

    def has_tokens(self, size: Dim) -> bool:
        return self.token_count in symbols_of((size,))

    def token_dims(self, spec: TensorSpec) -> list[int]:
        """The dimensions with the token count in their size."""
        return [dim for dim, size in enumerate(spec.shape) if self.has_tokens(size)]

    def along_tokens(self, spec: TensorSpec | None, dims: object) -> bool:
        """Whether one of these dimensions counts tokens; where they are not known, whether any one does."""
        if spec is None:
            return False
        rank, given = len(spec.shape), dims if isinstance(dims, list | tuple) else (dims,)
        if not all(isinstance(dim, int) for dim in given):
            return bool(self.token_dims(spec))
        return any(-rank <= dim < rank and self.has_tokens(spec.shape[dim]) for dim in given)


Rule: TypeAlias = Callable[[Op], bool]


def ops_of(facts: GraphFacts, nodes: Sequence[Node], token_count: Dim | None) -> list[Op]:
    """The nodes as the rules look at them; [] where the token count does not vary."""
    return [Op(facts, node, token_count) for node in nodes] if isinstance(token_count, sympy.Symbol) else []


def _along(position: int, keyword: str, default: Any) -> Rule:
    """Works along the dimension or dimensions of this argument."""
    return lambda op: op.along_tokens(op.first, op.argument(position, keyword, default))


def _along_fixed(*dims: int) -> Rule:
    return lambda op: op.along_tokens(op.first, dims)


def _named(rule: Rule, *names: str) -> dict[str, Rule]:
    return dict.fromkeys(names, rule)


# ------------------------------------------------------------------------------ sizes and indices

# Ops whose integers are sizes, all but the arguments named here by position (counted with the tensor) and keyword.
_SIZE_OPS: Mapping[str, tuple[tuple[int, str], ...]] = {
    **dict.fromkeys(("view", "reshape", "expand", "broadcast_to", "unflatten", "repeat", "tile", "as_strided"), ()),
    **dict.fromkeys(("empty", "zeros", "ones", "empty_strided", "empty_permuted"), ()),
    **dict.fromkeys(("new_empty", "new_zeros", "new_ones", "new_empty_strided"), ()),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "tensor_split"), ()),
    **dict.fromkeys(("_check", "_check_is_size", "sym_constrain_range", "sym_constrain_range_for_size"), ()),
    "full": ((1, "fill_value"),),
    "new_full": ((2, "fill_value"),),
    "narrow": ((2, "start"),),
}


def size_arguments(op: Op) -> Iterator[Node]:
    """The numbers that it takes as sizes: more of them only append rows at the end."""
    node = op.node
    if op.name == "getitem":
        index = node.args[1]
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, slice) and isinstance(part.stop, Node):
                yield part.stop
    elif op.name == "arange":
        yield from nodes_in(node.args[0] if len(node.args) == 1 else op.argument(1, "end"))
    elif op.name in _SIZE_OPS:
        values = [op.argument(position, keyword) for position, keyword in _SIZE_OPS[op.name]]
        excepted = set(nodes_in(values))
        yield from (n for n in nodes_in((node.args, dict(node.kwargs))) if n not in excepted)


def nodes_in(value: Any) -> list[Node]:
    """The nodes in an argument, however deep."""
    found: list[Node] = []
    torch.fx.node.map_arg(value, lambda node: found.append(node) or node)  # type: ignore[func-returns-value]
    return found


CASTS = frozenset({"to", "type", "long", "int", "short", "char", "byte", "type_as", "_to_copy", "convert_element_type"})
INDEXING = frozenset(
    {"embedding", "embedding_bag", "index", "_unsafe_index", "index_select", "gather", "take", "take_along_dim"}
    | {"getitem", "scatter", "scatter_add", "scatter_reduce", "index_put", "index_add", "index_copy", "index_fill"}
    | {"one_hot", "bincount", "nll_loss", "cross_entropy"}
)
"""Ops that take integers as indices."""


# ------------------------------------------------------------------- choosing rows by their values


def _takes_tokens(op: Op) -> bool:
    return any(op.token_count in spec.symbols for spec in op.operands)


def _scatters_over_tokens(op: Op) -> bool:
    dim = op.argument(1, "dim")
    # Rows that line up one to one, as in a scatter over experts, do not mix.
    return any(op.along_tokens(spec, dim if len(spec.shape) > 1 else 0) for spec in op.operands[1:])


def _is_indexed_by_tokens(op: Op) -> bool:
    chosen = (op.spec(node) for node in nodes_in(op.argument(1, "indices")))
    return any(spec is not None and op.token_count in spec.symbols for spec in chosen)


_SELECTING: Mapping[str, Rule] = {
    **_named(_along(1, "dim", -1), "sort", "argsort", "mode"),
    **_named(_along(2, "dim", -1), "topk", "kthvalue"),
    **_named(_along(1, "dim", None), "median", "nanmedian"),
    "msort": _along_fixed(0),
    **_named(_takes_tokens, "unique", "unique_consecutive", "_unique2", "unique_dim", "nonzero", "argwhere"),
    **_named(_takes_tokens, "masked_select", "bincount", "masked_scatter", "put", "histc"),
    **_named(_scatters_over_tokens, "scatter", "scatter_add", "scatter_reduce"),
    **_named(_scatters_over_tokens, "index_add", "index_copy", "index_fill", "index_reduce"),
    **_named(_is_indexed_by_tokens, "index_put", "_index_put_impl", "setitem", "_unsafe_index_put"),
}


def selects_tokens(op: Op) -> bool:
    """Whether it chooses rows along the tokens by their values."""
    rule = _SELECTING.get(op.name)
    return rule is not None and bool(op.operands) and rule(op)


# --------------------------------------------------------------------------------- mixing tokens

_READS_NO_VALUES = frozenset({"type_as", "to", "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "new"})
"""Ops that look at some argument for its dtype and device only."""


def mixes_tokens(op: Op) -> bool:
    """Whether tokens mix in it, as far as the graph shows."""
    if op.node.op not in ("call_function", "call_method") or is_custom_op(op.node) or is_allocation(op.node):
        return False
    if not op.counting or not op.results or op.name in _READS_NO_VALUES:
        return False
    if any(_is_cut(op, size) for spec in op.results for size in spec.shape):
        return True
    return _mixing_rule(op.name)(op)


def _mixing_rule(name: str) -> Rule:
    if name in _MIXING:
        return _MIXING[name]
    return next((rule for prefix, rule in _MIXING_BY_PREFIX.items() if name.startswith(prefix)), _gives_up_tokens)


def _is_cut(op: Op, size: Dim) -> bool:
    """Whether a size is neither the token count nor a multiple of it: of a shifted, halved or extended dimension."""
    if size == op.token_count or not op.has_tokens(size):
        return False
    factor = sympy.cancel(size / op.token_count)
    return op.token_count in factor.free_symbols or not factor.is_integer


def _gives_up_tokens(op: Op) -> bool:
    """Whether an operand has more dimensions that count tokens than the result, although no view took them together."""
    kept = max(len(op.token_dims(spec)) for spec in op.results)
    shrinking = [spec for spec in op.counting if len(op.token_dims(spec)) > kept]
    return any(_elements(spec) not in map(_elements, op.results) for spec in shrinking)


def _elements(spec: TensorSpec) -> Any:
    return sympy.expand(math.prod(spec.shape))


def _works_on_space(op: Op) -> bool:
    return any(dim >= 2 for dim in op.token_dims(op.counting[0]))


def _trains_on_batch(op: Op) -> bool:
    return bool(op.argument(5, "training", False)) and op.token_dims(op.counting[0]) != [1]


def _normalizes_tokens(op: Op) -> bool:
    shape = op.argument(1, "normalized_shape")
    dims = [-1 - at for at in range(len(shape))] if isinstance(shape, list | tuple) else None
    return op.along_tokens(op.counting[0], dims)


def _is_not_causal(op: Op) -> bool:
    return op.argument(5, "is_causal", False) is not True


def _solves_over_tokens(op: Op) -> bool:
    if op.name.endswith("norm"):
        return _gives_up_tokens(op)
    return op.along_tokens(op.counting[0], (-2, -1))


# ---------------------------------------------------------------------------------- picking rows


def _picks(at_dim: int, at_picked: int) -> Rule:
    """Picks along the dimension at the first position what stands at the second one."""

    def rule(op: Op) -> bool:
        dim = op.argument(at_dim, "dim", 0)
        if op.first is None or not isinstance(dim, int):
            return op.first is not None
        keyword = next((k for k in ("index", "indices", "start") if k in op.node.kwargs), "start")
        picked = op.argument(at_picked, keyword, 0)
        return op.along_tokens(op.first, dim) and not _is_from_the_front(picked, is_row=op.name == "select")

    return rule


def _is_from_the_front(picked: Any, is_row: bool) -> bool:
    """Whether it is a row, or the beginning of rows, that padded rows after it do not move."""
    return picked is None or (isinstance(picked, int) and (picked >= 0 if is_row else picked == 0))


def _picks_by_index(op: Op) -> bool:
    spec, index = op.first, op.argument(1, "indices")
    if spec is None:
        return False
    for dim, part in _parts_by_dim(index if isinstance(index, list | tuple) else (index,), len(spec.shape)):
        if not op.along_tokens(spec, dim):
            continue
        if isinstance(part, slice):
            if not _is_from_the_front(part.start, is_row=False) or part.step not in (None, 1):
                return True
        elif not _is_from_the_front(part, is_row=True):
            return True
    return False


def _parts_by_dim(parts: Sequence[Any], rank: int) -> Iterator[tuple[int, Any]]:
    """Each part of an index with the dimension that it is for; dimensions without a part are left out."""
    taken = sum(1 for part in parts if part is not None and part is not Ellipsis)
    dim = 0
    for part in parts:
        if part is Ellipsis:
            dim += rank - taken
        elif part is not None:
            yield dim, part
            dim += 1


# ---------------------------------------------------------------------------- products of matrices


def _sums_over_tokens(op: Op) -> bool:
    added = op.name in ("addmm", "baddbmm")  # their first argument is added to the product
    left, right = (*map(op.spec, op.node.args[added : added + 2]), None, None)[:2]
    if left is None or right is None:
        return True
    summed_right = -1 if op.name in ("linear", "inner") or len(right.shape) == 1 else -2
    return op.along_tokens(left, -1) or op.along_tokens(right, summed_right)


def _einsum_sums_over_tokens(op: Op) -> bool:
    equation, *rest = op.node.args
    if not isinstance(equation, str) or "->" not in equation:
        return True
    sources, _, target = equation.replace(" ", "").partition("->")
    factors = rest[0] if len(rest) == 1 and isinstance(rest[0], list | tuple) else rest
    for letters, factor in zip(sources.split(","), factors, strict=False):
        spec = op.spec(factor)
        if spec is None:
            return True
        front, dots, back = letters.partition("...")
        named = {at: letter for at, letter in enumerate(front)}
        named |= {len(spec.shape) - len(back) + at: letter for at, letter in enumerate(back)} if dots else {}
        if any(named.get(dim, "...") not in target for dim in op.token_dims(spec)):
            return True
    return False


_MIXING: Mapping[str, Rule] = {
    **_named(_along(1, "dim", -1), "softmax", "_softmax", "log_softmax", "_log_softmax", "softmin", "gumbel_softmax"),
    **_named(_along(2, "dim", 0), "chunk", "unsafe_chunk", "split", "unsafe_split", "split_with_sizes", "tensor_split"),
    **_named(_along(2, "dim", -1), "fft", "ifft", "rfft", "irfft", "hfft", "ihfft", "fft_fft", "fft_ifft", "fft_rfft"),
    "normalize": _along(2, "dim", 1),
    "flip": _along(1, "dims", None),
    "roll": _along(2, "dims", None),
    "rot90": _along(2, "dims", (0, 1)),
    "unfold": _along(1, "dimension", None),
    "renorm": _along(2, "dim", None),
    **_named(_along_fixed(0), "flipud", "vsplit"),
    **_named(_along_fixed(1), "fliplr", "hsplit"),
    "dsplit": _along_fixed(2),
    **_named(_picks_by_index, "getitem", "index"),
    **_named(_picks(1, 2), "index_select", "gather", "select", "narrow", "slice"),
    "take_along_dim": _picks(2, 1),
    **_named(lambda op: True, "lstm", "gru", "rnn_tanh", "rnn_relu", "_cudnn_rnn"),
    **_named(_works_on_space, "instance_norm", "group_norm", "native_group_norm"),
    **_named(_trains_on_batch, "batch_norm", "native_batch_norm", "cudnn_batch_norm"),
    **_named(_normalizes_tokens, "layer_norm", "native_layer_norm", "rms_norm"),
    "scaled_dot_product_attention": _is_not_causal,
    **_named(_sums_over_tokens, "mm", "bmm", "matmul", "mv", "dot", "vdot", "inner", "linear", "addmm", "baddbmm"),
    "einsum": _einsum_sums_over_tokens,
}
_SPATIAL = ("conv", "_conv", "avg_pool", "max_pool", "lp_pool", "adaptive_", "interpolate", "upsample", "fractional_")
_MIXING_BY_PREFIX: Mapping[str, Rule] = {**_named(_works_on_space, *_SPATIAL), "linalg_": _solves_over_tokens}

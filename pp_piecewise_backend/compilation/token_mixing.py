"""Ops in which tokens meet: whose result for one token depends on other tokens, or on how many there are.

Note [tokens that meet]
The test with poisoned rows (rule R3) sees rows meet only if the padded rows differ from the real ones. Rows of integers
are padded with other rows of the same call, and these may all be alike, as in a warm-up with zeros: then the mean over
all tokens is the same with padded rows, and wrong in the next call. So what the graph shows is refused before any test:
an op that gives up the token dimension or sums over it, orders, shifts, halves or picks along it. A prefix (``cumsum``,
causal attention, rows counted from the front) is none of these, as padded rows come last. Custom ops show nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import sympy
from torch.fx import Node

from ..utils import torch_compat
from .analysis import GraphFacts
from .fx_utils import is_custom_op, is_getitem, op_name, plain_op_name
from .partition import is_allocation
from .specs import Dim, TensorSpec, symbols_of

# Ops that keep the dimension along which rows meet: (position of the dimension or dimensions, keyword, default).
_ALONG: Mapping[str, tuple[int, str, Any]] = {
    **dict.fromkeys(
        ("softmax", "_softmax", "log_softmax", "_log_softmax", "softmin", "gumbel_softmax"), (1, "dim", -1)
    ),
    "normalize": (2, "dim", 1),
    "flip": (1, "dims", None),
    "roll": (2, "dims", None),
    "rot90": (2, "dims", (0, 1)),
    "unfold": (1, "dimension", None),
    "renorm": (2, "dim", None),
    **dict.fromkeys(
        ("chunk", "unsafe_chunk", "split", "unsafe_split", "split_with_sizes", "tensor_split"), (2, "dim", 0)
    ),
    **dict.fromkeys(
        ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft", "fft_fft", "fft_ifft", "fft_rfft"), (2, "dim", -1)
    ),
}
_FIXED_DIMENSION: Mapping[str, int] = {"flipud": 0, "fliplr": 1, "vsplit": 0, "hsplit": 1, "dsplit": 2}
_SPATIAL = ("conv", "_conv", "avg_pool", "max_pool", "lp_pool", "adaptive_", "interpolate", "upsample", "fractional_")
_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu", "_cudnn_rnn"})
_READS_NO_VALUES = frozenset({"type_as", "to", "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor", "new"})
"""Ops that look at some argument for its dtype and device only."""
_PICKING: Mapping[str, tuple[int, int]] = {
    "index_select": (1, 2),
    "gather": (1, 2),
    "take_along_dim": (2, 1),
    "select": (1, 2),
    "narrow": (1, 2),
    "slice": (1, 2),
}
"""Ops that pick along one dimension: positions of that dimension and of what is picked."""
_PICKED_KEYWORDS = ("index", "indices", "start")
_PRODUCTS = frozenset({"mm", "bmm", "matmul", "mv", "dot", "vdot", "inner", "linear", "addmm", "baddbmm"})
_SUMMANDS = frozenset({"addmm", "baddbmm"})
"""Products whose first argument is added."""
_CASTS = frozenset(
    {"to", "type", "long", "int", "short", "char", "byte", "type_as", "_to_copy", "convert_element_type"}
)
_INDEXING = frozenset(
    {"embedding", "embedding_bag", "index", "_unsafe_index", "index_select", "gather", "take", "take_along_dim"}
    | {"getitem", "scatter", "scatter_add", "scatter_reduce", "index_put", "index_add", "index_copy", "index_fill"}
    | {"one_hot", "bincount", "nll_loss", "cross_entropy"}
)


def tokens_that_meet(facts: GraphFacts, nodes: Iterable[Node], token_count: Dim | None) -> tuple[str, ...]:
    """The ops among ``nodes`` in which tokens meet, as far as the graph shows."""
    if not isinstance(token_count, sympy.Symbol):
        return ()
    return tuple(op_name(node) for node in nodes if _meet(facts, node, token_count))


def _meet(facts: GraphFacts, node: Node, token_count: sympy.Symbol) -> bool:
    if node.op not in ("call_function", "call_method") or is_custom_op(node) or is_allocation(node):
        return False
    name = plain_op_name(node).rstrip("_")
    operands = [s for n in node.all_input_nodes if n in facts.nodes and (s := facts.spec(n)) is not None]
    counting = [spec for spec in operands if _token_dims(spec, token_count)]
    results = [leaf for leaf in torch_compat.tree_leaves(facts.nodes[node].value) if isinstance(leaf, TensorSpec)]
    if not counting or not results or name in _READS_NO_VALUES:
        return False
    if any(_is_cut(size, token_count) for spec in results for size in spec.shape):
        return True
    first = facts.spec(node.args[0]) if node.args and isinstance(node.args[0], Node) else counting[0]
    if is_getitem(node) or name == "index":
        return first is not None and _picks_by_index(facts, node, first, token_count)
    if name in _PICKING:
        return first is not None and _picks(node, name, first, token_count)
    if name in _ALONG:
        position, keyword, default = _ALONG[name]
        dims = _argument(node, position, keyword, default)
        return first is not None and any(_counts(first, dim, token_count) for dim in _all_dims(first, dims))
    if name in _FIXED_DIMENSION:
        return first is not None and _counts(first, _FIXED_DIMENSION[name], token_count)
    if name in _RECURRENT:
        return True
    if name.startswith(_SPATIAL) or name in ("instance_norm", "group_norm", "native_group_norm"):
        return any(dim >= 2 for dim in _token_dims(counting[0], token_count))
    if name in ("batch_norm", "native_batch_norm", "cudnn_batch_norm"):
        return bool(_argument(node, 5, "training", False)) and _token_dims(counting[0], token_count) != [1]
    if name in ("layer_norm", "native_layer_norm", "rms_norm"):
        normalized = _argument(node, 1, "normalized_shape", ())
        return not isinstance(normalized, list | tuple) or any(
            _counts(counting[0], -1 - at, token_count) for at in range(len(normalized))
        )
    if name.startswith("linalg_") and not name.endswith("norm"):
        return any(_counts(counting[0], dim, token_count) for dim in (-2, -1))
    if name == "scaled_dot_product_attention":
        return _argument(node, 5, "is_causal", False) is not True
    if name in _PRODUCTS:
        return _sums_over_tokens(facts, node, name, token_count)
    if name == "einsum":
        return _einsum_sums_over_tokens(facts, node, token_count)
    return _gives_up(counting, results, token_count)


def _token_dims(spec: TensorSpec, token_count: sympy.Symbol) -> list[int]:
    return [dim for dim, size in enumerate(spec.shape) if token_count in symbols_of((size,))]


def _counts(spec: TensorSpec, dim: int, token_count: sympy.Symbol) -> bool:
    return -len(spec.shape) <= dim < len(spec.shape) and token_count in symbols_of((spec.shape[dim],))


def _is_cut(size: Dim, token_count: sympy.Symbol) -> bool:
    """Whether a size is neither the token count nor a multiple of it: of a shifted, halved or extended dimension."""
    if size == token_count or token_count not in symbols_of((size,)):
        return False
    factor = sympy.cancel(size / token_count)
    return token_count in factor.free_symbols or not factor.is_integer


def _gives_up(operands: Sequence[TensorSpec], results: Sequence[TensorSpec], token_count: sympy.Symbol) -> bool:
    """Whether an operand has more dimensions that count tokens than the result, although no view took them together."""
    kept = max(len(_token_dims(spec, token_count)) for spec in results)
    shrinking = [spec for spec in operands if len(_token_dims(spec, token_count)) > kept]
    return any(_elements(spec) not in map(_elements, results) for spec in shrinking)


def _elements(spec: TensorSpec) -> Any:
    return sympy.expand(math.prod(spec.shape))


# ------------------------------------------------------------------------------------- arguments


def _argument(node: Node, position: int, keyword: str, default: Any) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(keyword, default)


def _all_dims(spec: TensorSpec, dims: Any) -> Sequence[int]:
    """Dimensions as they were given; all of them where that cannot be told."""
    if isinstance(dims, int):
        return (dims,)
    if isinstance(dims, list | tuple) and all(isinstance(dim, int) for dim in dims):
        return dims
    return range(len(spec.shape))


# --------------------------------------------------------------------------------------- picking


def _picks(node: Node, name: str, spec: TensorSpec, token_count: sympy.Symbol) -> bool:
    at_dim, at_picked = _PICKING[name]
    dim = _argument(node, at_dim, "dim", 0)
    if not isinstance(dim, int):
        return True
    if not _counts(spec, dim, token_count):
        return False
    keyword = next((k for k in _PICKED_KEYWORDS if k in node.kwargs), "start")
    return not _is_from_the_front(_argument(node, at_picked, keyword, 0), name == "select")


def _is_from_the_front(picked: Any, is_row: bool) -> bool:
    """Whether it is a row, or the beginning of rows, that padded rows behind do not move."""
    return picked is None or (isinstance(picked, int) and (picked >= 0 if is_row else picked == 0))


def _picks_by_index(facts: GraphFacts, node: Node, spec: TensorSpec, token_count: sympy.Symbol) -> bool:
    index = node.args[1] if len(node.args) > 1 else node.kwargs.get("indices")
    for dim, part in _parts_by_dim(index if isinstance(index, list | tuple) else (index,), len(spec.shape)):
        if not _counts(spec, dim, token_count):
            continue
        if isinstance(part, slice):
            if not _is_from_the_front(part.start, False) or part.step not in (None, 1):
                return True
        elif not _is_from_the_front(part, True):
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


# ------------------------------------------------------------------------------ products of matrices


def _sums_over_tokens(facts: GraphFacts, node: Node, name: str, token_count: sympy.Symbol) -> bool:
    factors = node.args[1:3] if name in _SUMMANDS else node.args[:2]
    specs = [facts.spec(n) for n in factors if isinstance(n, Node) and n in facts.nodes]
    if len(specs) < 2 or any(spec is None for spec in specs):
        return True
    left, right = specs[0], specs[1]
    assert left is not None and right is not None
    summed_right = -1 if name in ("linear", "inner") or len(right.shape) == 1 else -2
    return _counts(left, -1, token_count) or _counts(right, summed_right, token_count)


def _einsum_sums_over_tokens(facts: GraphFacts, node: Node, token_count: sympy.Symbol) -> bool:
    equation = node.args[0]
    if not isinstance(equation, str) or "->" not in equation:
        return True
    sources, _, target = equation.replace(" ", "").partition("->")
    rest = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], list | tuple) else node.args[1:]
    for letters, factor in zip(sources.split(","), rest, strict=False):
        spec = facts.spec(factor) if isinstance(factor, Node) and factor in facts.nodes else None
        if spec is None:
            return True
        front, dots, back = letters.partition("...")
        named = {at: letter for at, letter in enumerate(front)}
        named |= {len(spec.shape) - len(back) + at: letter for at, letter in enumerate(back)} if dots else {}
        for dim in _token_dims(spec, token_count):
            if named.get(dim, "...") not in target:
                return True
    return False


# ------------------------------------------------------------------------------- indices from floats


def indices_from_floats(facts: GraphFacts, nodes: Sequence[Node]) -> tuple[str, ...]:
    """Ops that index by integers which these nodes made from floats: poison would send them anywhere.

    On a GPU an index that is out of range ends all work of the process, so no test may try.
    """
    made: set[Node] = set()
    found = []
    for node in nodes:
        name = plain_op_name(node).rstrip("_")
        if name in _INDEXING and any(argument in made for argument in node.all_input_nodes):
            found.append(op_name(node))
        spec = facts.spec(node) if node in facts.nodes else None
        if spec is None or spec.dtype.is_floating_point or spec.dtype.is_complex:
            continue
        operands = [facts.spec(n) for n in node.all_input_nodes if n in facts.nodes]
        is_cast = name in _CASTS and any(s is not None and s.dtype.is_floating_point for s in operands[:1])
        if is_cast or any(n in made for n in node.all_input_nodes):
            made.add(node)
    return tuple(found)

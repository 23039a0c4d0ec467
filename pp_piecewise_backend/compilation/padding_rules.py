"""What a step does beyond its geometry: whether it is random, what it writes, whether padded rows could change it.

Note [padding rules]
A piece may run on more rows than are real only if no real row can tell. What the graph alone shows is decided here:

R1  every tensor that crosses its border has the bare token count in its shape, or no token count at all;
R2  it writes nothing that outlives the call, stage inputs excepted;
R4  it uses the token count as a size only, never as a value: not in ``x / n``, nor to build a mask.

Ops that choose rows by their values (sort, top-k or scatter along the tokens), ops in which tokens meet (see
``token_mixing.py``), and indices that are made from floats are refused too. All else is put to the test with poisoned
padded rows (rule R3, see ``padding_test.py``). A test is no proof, hence these rules before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import sympy
import torch
from torch.fx import Node

from .analysis import RANDOM, GraphFacts
from .fx_utils import is_getitem, op_name, plain_op_name
from .partition import is_allocation
from .specs import Dim, SymbolSpec, TensorSpec, symbols_of


@dataclass(frozen=True)
class Traits:
    """What capture and padding must know of one step."""

    random: bool = False
    """Whether it draws random numbers."""
    writes: tuple[str, ...] = ()
    """Names of its inputs whose memory it writes."""
    written_storages: frozenset[int] = frozenset()
    """Storages of these inputs."""
    token_values: tuple[str, ...] = ()
    """Ops that use the token count as a value (R4)."""
    selects_tokens: tuple[str, ...] = ()
    """Ops that choose rows among the tokens by their values."""
    meeting_tokens: tuple[str, ...] = ()
    """Ops in which tokens meet."""
    float_indices: tuple[str, ...] = ()
    """Ops that index by integers made from floats."""
    allocations: Mapping[str, TensorSpec] = field(default_factory=dict)
    """Uninitialised tensors made in the step that it hands on, by node name: usual for the output of attention."""
    uninitialised: tuple[bool, ...] = ()
    """For each output, whether its contents mean nothing."""


def token_dims(spec: TensorSpec, token_count: Dim | None) -> tuple[int, ...]:
    """The dimensions whose size is the bare token count, where that varies."""
    if not isinstance(token_count, sympy.Symbol):
        return ()
    return tuple(dim for dim, size in enumerate(spec.shape) if size == token_count)


def padding_reason(
    traits: Traits,
    input_specs: Sequence[TensorSpec | SymbolSpec | None],
    output_specs: Sequence[TensorSpec | None],
    token_count: Dim | None,
    stage_inputs: Sequence[str],
) -> str | None:
    """Why a step must not run on padded rows, as far as the graph shows; None if nothing speaks against it."""
    if not isinstance(token_count, sympy.Symbol):
        return "the token count is static, so no call is padded"
    step = _Padded(traits, (*input_specs, *output_specs), token_count, stage_inputs)
    return next((reason for _, check in PADDING_RULES if (reason := check(step)) is not None), None)


class _Padded(NamedTuple):
    """A step as the padding rules look at it."""

    traits: Traits
    border_specs: Sequence[TensorSpec | SymbolSpec | None]
    token_count: sympy.Symbol
    stage_inputs: Sequence[str]


def outliving_writes(traits: Traits, stage_inputs: Iterable[str]) -> list[str]:
    """Names of the inputs that a step writes and that outlive the call (R2)."""
    return [name for name in traits.writes if name not in stage_inputs]


def _randomness(step: _Padded) -> str | None:
    return "it draws random numbers, as many as there are rows" if step.traits.random else None


def _outliving_writes(step: _Padded) -> str | None:
    names = outliving_writes(step.traits, step.stage_inputs)
    return f"R2: it writes {', '.join(names)}, which outlives the call" if names else None


def _uncuttable_border(step: _Padded) -> str | None:
    for spec in step.border_specs:
        if isinstance(spec, TensorSpec) and (why := _uncuttable(spec, step.token_count)):
            return f"R1: {spec} crosses its border, {why}"
    return None


def _ops(trait: str, sentence: str) -> Callable[[_Padded], str | None]:
    """A rule that refuses every step with ops of this trait; ``sentence`` names them."""

    def check(step: _Padded) -> str | None:
        ops = dict.fromkeys(getattr(step.traits, trait))
        return sentence.format(", ".join(ops)) if ops else None

    return check


PADDING_RULES: tuple[tuple[str, Callable[[_Padded], str | None]], ...] = (
    ("random", _randomness),
    ("R2", _outliving_writes),
    ("R1", _uncuttable_border),
    ("R4", _ops("token_values", "R4: the token count is used as a value by {}")),
    ("selection", _ops("selects_tokens", "rows are chosen by their values by {}")),
    ("meeting", _ops("meeting_tokens", "tokens meet in {}")),
    ("float indices", _ops("float_indices", "padded rows may hold any float, and {} index by them")),
)
"""Name and check of each rule, in the order in which they are asked; the first that refuses gives the reason."""


def _uncuttable(spec: TensorSpec, token_count: sympy.Symbol) -> str | None:
    for size in spec.shape:
        if size != token_count and token_count in symbols_of((size,)):
            return f"whose size {size} is not the token count itself"
    if token_count in symbols_of((spec.storage_offset,)):
        return f"which begins at {spec.storage_offset} in its memory"
    return None


# --------------------------------------------------------------------------------- reading nodes


def random_or_written(facts: GraphFacts, nodes: Iterable[Node], renamed: Mapping[Node, Any]) -> tuple[bool, set[int]]:
    """Whether these nodes draw random numbers, and the storages that they write.

    An in-place op that was renamed to a value writes only its own fresh copy.
    """
    writes: set[int] = set()
    random = False
    for node in nodes:
        random |= RANDOM in facts.nodes[node].writes
        if node not in renamed:
            writes |= facts.nodes[node].writes
    return random, writes


def token_values(facts: GraphFacts, nodes: Iterable[Node], token_count: Dim | None) -> tuple[str, ...]:
    """The ops among ``nodes`` that use the token count other than as a size (R4)."""
    if not isinstance(token_count, sympy.Symbol):
        return ()
    found = []
    for node in nodes:
        counted = {
            argument
            for argument in node.all_input_nodes
            if argument in facts.nodes
            and not isinstance(facts.nodes[argument].value, TensorSpec)
            and token_count in facts.symbols_of_value(facts.nodes[argument].value)
        }
        if counted and not counted <= set(_size_arguments(node)):
            found.append(op_name(node))
    return tuple(found)


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


def _size_arguments(node: Node) -> Iterator[Node]:
    """The numbers that a node takes as sizes: more of them only append rows at the end."""
    name = plain_op_name(node)
    if is_getitem(node):
        index = node.args[1]
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, slice) and isinstance(part.stop, Node):
                yield part.stop
    elif name == "arange":
        ends = (node.args[:1] if len(node.args) == 1 else node.args[1:2]) or (node.kwargs.get("end"),)
        yield from _nodes(ends)
    elif name in _SIZE_OPS:
        values = {position: value for position, value in enumerate(node.args)}
        keywords = dict(node.kwargs)
        excepted: set[Node] = set()
        for position, keyword in _SIZE_OPS[name]:
            excepted |= set(_nodes(values.pop(position, None))) | set(_nodes(keywords.pop(keyword, None)))
        yield from (n for n in _nodes([*values.values(), *keywords.values()]) if n not in excepted)


def _nodes(value: Any) -> list[Node]:
    found: list[Node] = []
    torch.fx.node.map_arg(value, lambda node: found.append(node) or node)  # type: ignore[func-returns-value]
    return found


# Ops that order or pick elements along one dimension by their values: (position of the dimension, its default).
_ORDERING: Mapping[str, tuple[int | None, int | None]] = {
    "sort": (1, -1),
    "argsort": (1, -1),
    "msort": (None, 0),
    "topk": (2, -1),
    "kthvalue": (2, -1),
    "mode": (1, -1),
    "median": (1, None),
    "nanmedian": (1, None),
}
_ANY_DIMENSION = frozenset(
    {"unique", "unique_consecutive", "_unique2", "unique_dim", "nonzero", "argwhere", "masked_select", "bincount"}
    | {"masked_scatter", "masked_scatter_", "put", "put_", "histc"}
)
_SCATTERING = frozenset(
    {"scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", "index_reduce"}
)
_INDEXED_WRITES = frozenset({"index_put", "_index_put_impl", "setitem", "_unsafe_index_put"})


def selects_tokens(facts: GraphFacts, nodes: Iterable[Node], token_count: Dim | None) -> tuple[str, ...]:
    """The ops among ``nodes`` that choose rows along the tokens by their values."""
    if not isinstance(token_count, sympy.Symbol):
        return ()
    return tuple(op_name(node) for node in nodes if _selects(facts, node, token_count))


def _selects(facts: GraphFacts, node: Node, token_count: sympy.Symbol) -> bool:
    name = plain_op_name(node)
    plain = name.rstrip("_")
    specs = [s for n in node.all_input_nodes if n in facts.nodes and (s := facts.spec(n)) is not None]
    if not specs:
        return False
    if name in _ANY_DIMENSION:
        return any(token_count in s.symbols for s in specs)
    if plain in _ORDERING:
        position, default = _ORDERING[plain]
        dim = _integer(node, position, "dim", default)
        return _counts_tokens(specs[0], dim, token_count)
    if plain in _SCATTERING:
        dim = _integer(node, 1, "dim", None)
        # Rows that line up one to one, as in a scatter over experts, do not meet.
        return any(_counts_tokens(s, dim if len(s.shape) > 1 else 0, token_count) for s in specs[1:])
    if plain in _INDEXED_WRITES:
        index = node.args[1] if len(node.args) > 1 else node.kwargs.get("indices")
        chosen = [facts.spec(n) for n in _nodes(index) if n in facts.nodes]
        return any(s is not None and token_count in s.symbols for s in chosen)
    return False


def _integer(node: Node, position: int | None, keyword: str, default: int | None) -> int | None:
    value: Any = node.kwargs.get(keyword, default)
    if position is not None and len(node.args) > position:
        value = node.args[position]
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def _counts_tokens(spec: TensorSpec, dim: int | None, token_count: sympy.Symbol) -> bool:
    sizes = spec.shape if dim is None or not -len(spec.shape) <= dim < len(spec.shape) else (spec.shape[dim],)
    return token_count in symbols_of(sizes)


def handed_on_allocations(
    facts: GraphFacts, copies: Mapping[Node, Node], exported: Mapping[str, frozenset[int]], token_count: Dim | None
) -> dict[str, TensorSpec]:
    """Uninitialised tensors of a step that later steps read, with a dimension that counts tokens.

    Args:
        copies: node of the step's graph -> the node of the whole graph that it copies.
        exported: name of each value that the step hands on -> its storages.
    """
    storages = frozenset().union(*exported.values()) if exported else frozenset()
    found = {}
    for copy, node in copies.items():
        spec = facts.spec(node) if node in facts.nodes else None
        if spec is None or not is_allocation(node) or spec.storage not in storages:
            continue
        if token_count is not None and token_count in spec.shape and spec.storage_offset == 0:
            found[copy.name] = spec
    return found


def is_meaningless(node: Any) -> bool:
    """Whether a node of a step's graph gives memory that the step hands on without having filled it."""
    return isinstance(node, Node) and is_allocation(node) and all(user.op == "output" for user in node.users)

"""What a step does beyond its geometry: whether it is random, what it writes, whether padded rows could change it.

Note [padding rules]
A piece may run on more rows than are real only if no real row changes. What the graph alone shows is decided here:

R1  every tensor that crosses its border has the bare token count in its shape, or no token count at all;
R2  it writes nothing that outlives the call, stage inputs excepted;
R4  it uses the token count as a size only, never as a value: not in ``x / n``, nor to build a mask.

Ops that choose rows by their values (sort, top-k or scatter along the tokens), ops that mix tokens (see
``op_table.py``), and indices that are made from floats are refused too. All else is put to the test with poisoned
padded rows (rule R3, see ``padding_test.py``). A test is no proof, hence these rules before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import sympy
from torch.fx import Node

from .analysis import RANDOM, GraphFacts
from .op_table import CASTS, INDEXING, Op, size_arguments
from .partition import is_allocation
from .specs import Dim, SymbolSpec, TensorSpec, symbols_of


@dataclass(frozen=True)
class Traits:
    """What capture and padding ask about one step."""

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
    mixes_tokens: tuple[str, ...] = ()
    """Ops whose result for one token depends on other tokens."""
    float_indices: tuple[str, ...] = ()
    """Ops that index by integers made from floats."""
    allocations: Mapping[str, TensorSpec] = field(default_factory=dict)
    """Uninitialised tensors made in the step that later steps read, by node name: usual for the output of attention."""
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
    ("mixing", _ops("mixes_tokens", "tokens mix in {}")),
    ("float indices", _ops("float_indices", "padded rows may hold any float, and {} index by them")),
)
"""Name and check of each rule, in the order in which they are asked; the first that refuses says why."""


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


def labels(ops: Iterable[Op], rule: Callable[[Op], bool]) -> tuple[str, ...]:
    """The names of the ops for which a rule holds."""
    return tuple(op.label for op in ops if rule(op))


def uses_token_count(op: Op) -> bool:
    """Whether it takes the token count other than as a size (R4)."""
    counted = {
        argument
        for argument in op.node.all_input_nodes
        if argument in op.facts.nodes
        and op.spec(argument) is None
        and op.token_count in op.facts.symbols_of_value(op.facts.nodes[argument].value)
    }
    return bool(counted) and not counted <= set(size_arguments(op))


def indices_from_floats(ops: Iterable[Op]) -> tuple[str, ...]:
    """Ops that index by integers which these ops made from floats: poison would send them anywhere.

    On a GPU an index that is out of range ends all work of the process, so no test may try.
    """
    made: set[Node] = set()
    found = []
    for op in ops:
        takes_made = any(argument in made for argument in op.node.all_input_nodes)
        if op.name in INDEXING and takes_made:
            found.append(op.label)
        spec = op.spec(op.node)
        if spec is None or spec.dtype.is_floating_point or spec.dtype.is_complex:
            continue
        is_cast = op.name in CASTS and any(operand.dtype.is_floating_point for operand in op.operands[:1])
        if is_cast or takes_made:
            made.add(op.node)
    return tuple(found)


def handed_on_allocations(
    facts: GraphFacts, copies: Mapping[Node, Node], exported: Mapping[str, frozenset[int]], token_count: Dim | None
) -> dict[str, TensorSpec]:
    """Uninitialised tensors of a step that later steps read, with a dimension that counts tokens.

    Args:
        copies: node of the step's graph -> the node of the whole graph that it copies.
        exported: name of each value that later steps read -> its storages.
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
    """Whether a node of a step's graph returns memory that later steps read although the step did not fill it."""
    return isinstance(node, Node) and is_allocation(node) and all(user.op == "output" for user in node.users)

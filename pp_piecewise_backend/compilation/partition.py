"""Where a graph is cut: which nodes form eager steps, which form compute pieces, and why.

The rules M1 to M4, by which a cut keeps its meaning:

M1  A cut makes an in-place op visible across pieces, so an op that writes memory born outside its own piece is an
    eager step. Stage inputs are the exception: their memory is ours to write, and the caller sees the write. In-place
    ops on activations of this call are renamed to values instead, where no other alias is read later.
M2  Views of memory that is written across pieces are never passed on; whoever needs one recomputes it (``split.py``).
M3  What lies between two eager steps without a matrix product is not worth a piece; the steps absorb it.
M4  An eager step that needs nothing from a compute piece moves to the front, with the small ops that it needs.

Each new cut can separate a birth from a write, so the rules are applied until nothing changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch.fx import Node

from ..errors import SplitError
from ..utils import torch_compat
from .analysis import EFFECT, GraphFacts
from .attention import SplitOpMatcher, find_written_out_attention, looks_like_attention
from .fx_utils import is_getitem, op_name, plain_op_name, reachable
from .placeholders import GraphInput
from .specs import TensorSpec

Kind = Literal["compute", "eager"]

WRITTEN_OUT = "attention written out as matmul, softmax, matmul"
_FLOATS = (float, torch.SymFloat)
_SETTINGS = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_PLAIN = (bool, int, float, complex, str, slice, torch.SymInt, torch.SymBool, torch.SymFloat, *_SETTINGS)
_ALLOCATIONS = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"})


_REACH_BEYOND = frozenset({"as_strided", "as_strided_", "as_strided_copy", "as_strided_scatter"})
"""Ops that may read or write memory around the tensor that they are given, which no copy of it has."""

_CHECKS = frozenset({"_assert_scalar", "_check", "_check_is_size", "_check_value"})
"""Ops that check numbers and do nothing else."""


class Value(NamedTuple):
    """One thing that a step can use: what ``node`` returns or, following ``path``, an element of it."""

    node: Node
    path: tuple[int, ...] = ()
    version: Node | None = None
    """The renamed in-place op (see M1) that gave it its last contents, where that matters; None before any."""

    @property
    def name(self) -> str:
        name = "_".join((self.node.name, *map(str, self.path)))
        return name if self.version is None else f"{name}__after_{self.version.name}"

    @property
    def made_at(self) -> Node:
        """The node that makes it."""
        return self.node if self.version is None else self.version


@dataclass(frozen=True)
class Step:
    """Nodes that run together, in order."""

    kind: Kind
    nodes: tuple[Node, ...]
    reason: str
    """Why they are an eager step; "" for a compute step."""


_Run: TypeAlias = tuple[Kind, tuple[Node, ...]]
"""Neighbours that are to be in one step."""


@dataclass(frozen=True)
class Cuts:
    """The steps of a graph in the order in which they run, and what the split ops matched."""

    steps: tuple[Step, ...]
    renamed: Mapping[Node, tuple[Value, ...]]
    """In-place ops turned into values: the arguments that each gets a fresh copy of, used from there on."""
    matches: Mapping[str, int]
    """Pattern of a split op -> number of nodes that it cut at."""
    attention_like: tuple[str, ...]
    """Names of the ops that were not cut at although their names suggest attention."""
    exclusive_inputs: tuple[str, ...]
    """Names of the inputs whose writes were moved, or given to a compiler: right only while no other input overlaps
    them."""
    scalars: frozenset[Node]
    """Nodes that give numbers; see ``find_scalars``."""


def find_scalars(facts: GraphFacts) -> frozenset[Node]:
    """The nodes whose value consists of numbers known from the inputs, and whose computation has no effect.

    Numbers are recomputed at each use, so that they are right for the real n.
    """
    return frozenset(node for node in facts.nodes if _is_scalar(facts, node))


def _is_scalar(facts: GraphFacts, node: Node) -> bool:
    known = facts.nodes[node]
    if known.writes or known.region is not None or known.value is None or node.op == "get_attr":
        return False
    if not all(_is_plain(leaf) for leaf in torch_compat.tree_leaves(known.value)):
        return False
    if node.op == "placeholder" or reads_input(facts, node):
        return True
    sources = facts.symbol_sources
    return all(symbol in sources and sources[symbol][0] is not node for symbol in facts.symbols_of_value(known.value))


def reads_input(facts: GraphFacts, node: Node) -> bool:
    """Whether the node reads a number out of an input that nothing writes, as Dynamo does for varying floats."""
    if node.op != "call_method" or node.target != "item" or not isinstance(facts.nodes[node].value, _FLOATS):
        return False
    (argument,) = node.all_input_nodes
    return argument.op == "placeholder" and not facts.nodes[argument].storages & facts.written


def canonical(facts: GraphFacts, node: Node) -> Value:
    """The value behind a node: in-place ops and no-ops stand for their argument, ``getitem`` for an element."""
    path: tuple[int, ...] = ()
    while node in facts.nodes:
        if (argument := facts.nodes[node].returns_argument) is not None:
            node = argument
        elif is_getitem(node) and _is_sequence(facts.nodes[node.args[0]].value):  # type: ignore[index]
            index = node.args[1]
            if not isinstance(index, int):
                break
            path = (index, *path)
            node = node.args[0]  # type: ignore[assignment]
        else:
            break
    return Value(node, path)


def is_allocation(node: Node) -> bool:
    """Whether the node returns memory whose contents mean nothing yet."""
    return op_name(node).split("::")[-1] in _ALLOCATIONS


def does_nothing(facts: GraphFacts, node: Node) -> bool:
    """Whether the node only returns what another made: an element of a tuple, or an argument left unchanged."""
    if facts.nodes[node].region is not None and not is_getitem(node):
        return False  # such as marking a tensor for a gradient transform
    return canonical(facts, node).node is not node and not facts.nodes[node].writes


def find_cuts(facts: GraphFacts, inputs: Sequence[GraphInput], matcher: SplitOpMatcher, whole: bool = False) -> Cuts:
    """Apply the rules to a graph.

    Args:
        whole: make one step of everything that a compiler can be given.

    Raises:
        SplitError: the graph changes the shape of a tensor in place, which a cut cannot follow.
    """
    cutter = _Cutter(facts, inputs, matcher)
    cutter.find_split_ops()
    return cutter.run_whole() if whole else cutter.run()


class _Cutter:
    def __init__(self, facts: GraphFacts, inputs: Sequence[GraphInput], matcher: SplitOpMatcher) -> None:
        self._facts = facts
        self._scalars = find_scalars(facts)
        self._inputs = {graph_input.name: graph_input for graph_input in inputs}
        self._matches: dict[str, int] = {}
        self._attention_like: dict[str, None] = {}
        self._matcher = matcher
        self._split_ops: dict[Node, str] = {}
        """The nodes to cut at, and what this is called as a reason."""
        self._reasons: dict[Node, str] = {}
        """Why a node must be eager."""
        self._renamed: dict[Node, tuple[Value, ...]] = {}
        self._sinking: set[Node] = set()
        self._nodes = list(facts.graph_module.graph.nodes)
        self._position = {node: index for index, node in enumerate(self._nodes)}
        self._order = self._schedulable()
        unsafe = {node: matcher.undeclared_op(node, facts.nodes[node].in_python) for node in self._order}
        self._unsafe = {node: name for node, name in unsafe.items() if name is not None}
        """The nodes that run Python code which may read anything, and the op that does."""
        # A stage input that shares its memory with another input is treated like any other: the compiler of a piece
        # would not see that they are one.
        shared = [s for n, f in facts.nodes.items() if n.op == "placeholder" for s in f.storages]
        self._stage_storages = {
            i.spec.storage
            for i in inputs
            if i.kind == "stage-input" and i.spec is not None and shared.count(i.spec.storage) == 1
        }

    def find_split_ops(self) -> None:
        matcher = self._matcher
        for node in self._order:
            if (pattern := matcher.match(node)) is not None:
                self._split_ops[node] = f"split op {op_name(node)}"
                self._matches[pattern] = self._matches.get(pattern, 0) + 1
            elif looks_like_attention(node):
                self._attention_like[op_name(node)] = None
        if matcher.written_out:
            for node in find_written_out_attention(self._facts, tuple(self._inputs.values())):
                self._split_ops.setdefault(node, f"split op {WRITTEN_OUT}")
                is_softmax = "softmax" in op_name(node)
                self._matches[WRITTEN_OUT] = self._matches.get(WRITTEN_OUT, 0) + is_softmax

    def run(self) -> Cuts:
        self._reasons.update(self._split_ops)
        self._mark_opaque()
        while True:
            steps, front = self._arrange()
            if not self._cut_at_visible_writes(steps):
                return self._cuts(steps, [*front, *(n for step in steps if step.kind == "compute" for n in step.nodes)])

    def run_whole(self) -> Cuts:
        self._mark_opaque()
        steps = self._steps(self._runs(self._order))
        cuts = [n for step in steps if step.kind == "eager" for n in step.nodes if not self._checks_inputs(n)]
        if cuts and len(steps) > 1:
            raise SplitError(f"a full graph needs a graph that can be compiled as one: {self._reason(cuts)}")
        return self._cuts(steps, self._order)

    def _cuts(self, steps: list[Step], reordered: Sequence[Node]) -> Cuts:
        """The result; writes of the ``reordered`` nodes may come at another time than in the graph."""
        writes = {storage for node in reordered for storage in self._facts.nodes[node].writes}
        exclusive = [i.name for i in self._inputs.values() if i.spec is not None and i.spec.storage in writes]
        attention_like = tuple(self._attention_like)
        return Cuts(tuple(steps), self._renamed, self._matches, attention_like, tuple(exclusive), self._scalars)

    # ------------------------------------------------------------ what must be eager

    def _schedulable(self) -> list[Node]:
        """The nodes that steps consist of, in order.

        Checks of the inputs' sizes come first, so that they cut nothing; memory allocations and their views come where
        they are first used.
        """
        facts = self._facts
        nodes = []
        for node in facts.graph_module.graph.nodes:
            if node.op not in ("call_function", "call_method", "call_module") or node in facts.regions.dropped:
                continue
            if facts.nodes[node].reshapes_in_place:
                raise SplitError(
                    f"{op_name(node)} (node {node.name}) changes the shape or strides of a tensor in place, which a "
                    f"cut cannot follow; the whole graph goes to the stock backend"
                )
            if node not in self._scalars and not does_nothing(facts, node):
                nodes.append(node)
        return self._sink_allocations(sorted(nodes, key=lambda node: not self._checks_inputs(node)))

    def _checks_inputs(self, node: Node) -> bool:
        """Whether it does nothing but check numbers that inputs are or have as sizes."""
        facts = self._facts
        if plain_op_name(node) not in _CHECKS or not all(a in self._scalars for a in node.all_input_nodes):
            return False
        symbols = {s for a in node.all_input_nodes for s in facts.symbols_of_value(facts.nodes[a].value)}
        return all(facts.symbol_sources[symbol][0].op == "placeholder" for symbol in symbols)

    def _sink_allocations(self, nodes: list[Node]) -> list[Node]:
        """Move uninitialised memory, and views of it, to where it is first used.

        The usual output buffer of an attention op is then born in the eager step that fills it.
        """
        sinking = self._sinking
        for node in nodes:
            facts = self._facts.nodes[node]
            if facts.region is not None or facts.writes:
                continue
            origins = self._arguments(node)
            is_view = facts.storages and not facts.born
            if is_allocation(node) or (is_view and origins and all(n in sinking for n in origins)):
                sinking.add(node)
        order: list[Node] = []
        placed: set[Node] = set()

        def place(node: Node) -> None:
            for argument in self._arguments(node):
                if argument in sinking and argument not in placed:
                    place(argument)
            placed.add(node)
            order.append(node)

        # What sinks and is left for the end is used by nothing but the graph's output.
        for node in sorted(nodes, key=lambda n: n in sinking):
            if node not in placed:
                place(node)
        return order

    def _arguments(self, node: Node) -> list[Node]:
        """The scheduled nodes whose results this one takes, those that its numbers come from included."""
        found: dict[Node, None] = {}
        for argument in node.all_input_nodes:
            if argument not in self._facts.nodes:
                continue
            if argument in self._scalars:
                for symbol in self._facts.symbols_of_value(self._facts.nodes[argument].value):
                    source, _ = self._facts.symbol_sources[symbol]
                    if source not in self._scalars:
                        found[canonical(self._facts, source).node] = None
            else:
                found[canonical(self._facts, argument).node] = None
        return [n for n in found if n.op not in ("placeholder", "get_attr")]

    def _mark_opaque(self) -> None:
        """Eager for other reasons than a name: unknown objects, effects on the world, inseparable groups."""
        facts = self._facts
        for node in self._order:
            node_facts = facts.nodes[node]
            if node in self._reasons:
                continue
            if EFFECT in node_facts.writes:
                self._reasons[node] = f"{op_name(node)} acts on something other than tensors"
            elif not all(
                _is_plain(leaf) or isinstance(leaf, TensorSpec) for leaf in torch_compat.tree_leaves(node_facts.value)
            ):
                self._reasons[node] = f"{op_name(node)} returns an object that is no tensor"
            elif plain_op_name(node) in _REACH_BEYOND and node_facts.reads & facts.input_storages:
                self._reasons[node] = f"{op_name(node)} may reach memory around an input, which no graph was given"
            elif node in self._unsafe:
                self._reasons[node] = (
                    f"{self._unsafe[node]} runs Python code, which may read what a graph would freeze; name it in "
                    f"graph_safe_ops if it reads nothing but its arguments"
                )
        self._keep_groups_together()

    def _keep_groups_together(self) -> None:
        """Where one node of an inseparable group must be eager, all are."""
        for group, why in enumerate(self._facts.regions.bound_reasons):
            members = [node for node in self._order if self._facts.nodes[node].region == group]
            inside = next((self._reasons[node] for node in members if node in self._reasons), "")
            if why or inside:
                for node in members:
                    self._reasons.setdefault(node, why or f"cannot be separated from: {inside}")

    def _cut_at_visible_writes(self, steps: Sequence[Step]) -> bool:
        """M1: rename each write to memory born in another step, or make it eager. True if a new cut is needed."""
        step_of = {node: index for index, step in enumerate(steps) for node in step.nodes}
        born_in = {storage: step_of.get(node) for storage, node in self._facts.births.items()}
        new_cut = False
        for index, step in enumerate(steps):
            for node in step.nodes:
                foreign = [
                    storage
                    for storage in self._facts.nodes[node].writes
                    if storage >= 0 and storage not in self._stage_storages and born_in[storage] != index
                ]
                if step.kind == "eager" or not foreign:
                    continue
                copies = self._renamed.get(node) or self._rename(node, foreign)
                if isinstance(copies, str):
                    new_cut = True
                    owners = ", ".join(dict.fromkeys(self._owner(storage) for storage in foreign))
                    self._reasons[node] = f"{op_name(node)} writes {owners}{copies and f' ({copies})'}"
                else:
                    self._renamed[node] = copies
                    born_in.update(dict.fromkeys(foreign, index))
        self._keep_groups_together()
        return new_cut

    def _owner(self, storage: int) -> str:
        birth = self._facts.births[storage]
        if birth.op == "placeholder":
            return f"graph input {self._inputs[birth.name].label}"
        return f"{birth.name}, made in another step"

    def _rename(self, node: Node, foreign: Sequence[int]) -> tuple[Value, ...] | str:
        """The arguments that may become fresh values at this in-place op, or why that is not sound.

        Sound means: the memory was made in this call, and once the op has run it is read through one name only.
        """
        copies: list[Value] = []
        for storage in foreign:
            if storage in self._facts.input_storages:
                return ""
            targets = set(self._values_in(storage, node))
            if len(targets) != 1:
                return "it takes several views of this memory"
            (target,) = targets
            spec = self._facts.nodes[target.node].element(target.path)
            if not isinstance(spec, TensorSpec) or not spec.is_dense:
                return f"a copy of {target.name} would have other strides"
            if self._results_in(storage) > 1:
                return "several results lie in this memory"
            for later in self._nodes[self._position[node] + 1 :]:
                for value in self._values_in(storage, later):
                    if value != target and self._position[value.node] < self._position[node]:
                        return f"{value.name}, another view of this memory, is read later"
            copies.append(target)
        return tuple(copies)

    def _values_in(self, storage: int, node: Node) -> list[Value]:
        """The arguments of a node that lie in this memory."""
        given = [argument for argument in node.all_input_nodes if argument in self._facts.nodes]
        return [canonical(self._facts, a) for a in given if storage in self._facts.nodes[a].storages]

    def _results_in(self, storage: int) -> int:
        """How many different results of the graph lie in this memory."""
        return len(set(self._values_in(storage, self._nodes[-1])))

    # ------------------------------------------------------------------- arranging

    def _arrange(self) -> tuple[list[Step], list[Node]]:
        """Cut the current order into steps (M4, then runs of equal kind, then M3); also the nodes that M4 moved.

        No two pieces follow one another, so there are as few graphs to launch as there can be.
        """
        front, rest = self._move_to_front()
        return self._steps(_joined([("eager", tuple(front)), *_absorb(self._runs(rest), self._facts)])), front

    def _runs(self, nodes: Sequence[Node]) -> list[_Run]:
        kinds: dict[Node, Kind] = {}
        following: Kind = "compute"
        for node in reversed(nodes):
            if node not in self._sinking:
                following = "eager" if node in self._reasons else "compute"
            kinds[node] = following
        return _joined([(kinds[node], (node,)) for node in nodes])

    def _steps(self, runs: Sequence[_Run]) -> list[Step]:
        return [Step(kind, nodes, self._reason(nodes) if kind == "eager" else "") for kind, nodes in runs]

    def _move_to_front(self) -> tuple[list[Node], list[Node]]:
        """M4: eager runs that depend on no matrix product, with all that they depend on."""
        needs = self._dependencies()
        front: set[Node] = set()
        # Runs are formed after M3, so that a fragment between two eager ops does not hide that they belong together.
        for kind, nodes in _absorb(self._runs(self._order), self._facts)[1:]:
            if kind == "compute":
                continue
            closure = reachable(nodes, needs)
            if not any(self._facts.nodes[node].heavy or node in self._split_ops for node in closure):
                front |= closure
        return [n for n in self._order if n in front], [n for n in self._order if n not in front]

    def _dependencies(self) -> dict[Node, set[Node]]:
        """For each node the earlier nodes that must run before it: what it reads, and the order of writes."""
        needs: dict[Node, set[Node]] = {}
        last_write: dict[int, Node] = {}
        reads_since: dict[int, set[Node]] = {}
        group_first: dict[int, Node] = {}
        for node in self._order:
            facts = self._facts.nodes[node]
            needed = set(self._arguments(node))
            reads, writes = facts.reads, facts.writes
            if node in self._unsafe:  # what one reads, another may write
                reads, writes = reads | {EFFECT}, writes | {EFFECT}
            for storage in reads | writes:
                if storage in last_write:
                    needed.add(last_write[storage])
            for storage in writes:
                needed |= reads_since.get(storage, set())
            for storage in reads:
                reads_since.setdefault(storage, set()).add(node)
            for storage in writes:
                last_write[storage] = node
                reads_since[storage] = {node}
            needs[node] = needed - {node}
            if facts.region is not None:
                first = group_first.setdefault(facts.region, node)
                needs[node].add(first)
                needs[first].add(node)
        return needs

    def _reason(self, nodes: Sequence[Node]) -> str:
        reasons = dict.fromkeys(self._reasons[node] for node in nodes if node in self._reasons)
        return "; ".join(reasons) or "too small for a piece of its own"


def _joined(runs: Sequence[_Run]) -> list[_Run]:
    """Neighbours of equal kind as one run; empty ones are left out."""
    return [
        (kind, tuple(node for _, nodes in group for node in nodes))
        for kind, group in groupby((run for run in runs if run[1]), key=itemgetter(0))
    ]


def _absorb(runs: list[_Run], facts: GraphFacts) -> list[_Run]:
    """M3: merge compute runs that are not worth a piece into the eager runs around them."""
    if not any(kind == "eager" for kind, _ in runs):
        return runs

    def is_small(index: int, nodes: Sequence[Node]) -> bool:
        if 0 < index < len(runs) - 1:
            return not any(facts.nodes[node].heavy for node in nodes)
        return not any(facts.nodes[node].born or facts.nodes[node].writes for node in nodes)  # views only

    return _joined([("eager" if is_small(at, nodes) else kind, nodes) for at, (kind, nodes) in enumerate(runs)])


def _is_sequence(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and not isinstance(value, torch.Size)


def _is_plain(leaf: Any) -> bool:
    """Whether FX can write this value into a graph as it is."""
    return leaf is None or leaf is Ellipsis or isinstance(leaf, _PLAIN)

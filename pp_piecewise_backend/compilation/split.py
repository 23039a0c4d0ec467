"""Cutting the Dynamo graph into pieces: one small graph per step, with exactly what crosses each border.

Note [what crosses a border]
- Tensors, each as one value. Views of memory that another step writes, or that the caller could see through two
  results, do not cross: their base does, and whoever needs the view recomputes it (rule M2).
- Bare symbols of the inputs, as integers. Every other number is an expression over these and is computed where it is
  used, so that in an eager step it is right for the real n whatever the pieces were padded to.
- Constants and attributes of the graph cross like inputs; bodies of higher-order ops are copied into the piece.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, NamedTuple, TypeAlias

import sympy
import torch
from torch import fx
from torch.fx import GraphModule, Node

from ..errors import SplitError
from ..utils import torch_compat
from ..utils.reasons import Reason, miss
from .analysis import RANDOM, GraphFacts
from .attention import SplitOpMatcher
from .cache_key import digest, piece_text
from .fx_utils import is_custom_op, op_name, reachable
from .padding_rules import (
    PaddedGraph,
    PaddedStep,
    Traits,
    handed_on_allocations,
    is_meaningless,
    padding_reason,
)
from .partition import Cuts, Kind, Step, Value, canonical, find_cuts, reads_input
from .placeholders import InputTable
from .specs import InputSpec, ObjectSpec, TensorSpec


class SizeOf(NamedTuple):
    """The size, in one dimension, of the tensor value with this name."""

    value: str
    dim: int


class ResultValue(NamedTuple):
    """A result of the graph that is the value with this name."""

    value: str


Source: TypeAlias = str | SizeOf
"""Where a piece's input comes from: a value by name, or the size of one."""


@dataclass(frozen=True)
class Piece:
    """One step of a program as a graph of its own. Owns no memory but the graph."""

    index: int
    kind: Kind
    ops: tuple[str, ...]
    """Names of its ops, in order."""
    reason: str
    """Why it is a step of its own."""
    key: str
    """Equal for pieces with equal meaning; see Note [what a piece's key holds]."""
    reads_stage_inputs: tuple[str, ...]
    """Names of the proxies whose memory it takes as input."""
    writes_stage_outputs: bool
    """Whether it makes memory in which a result of the graph lies, itself or a view that a later step returns."""
    padding: str
    """Whether it may run on padded rows: "safe", or why not. Eager steps never do: they see the real rows."""
    padding_reason: Reason | None = field(repr=False)
    """Why not, as far as its graph shows; None if a test may decide."""
    graph_module: GraphModule = field(repr=False, compare=False)
    inputs: tuple[Source, ...] = field(repr=False)
    input_specs: tuple[InputSpec, ...] = field(repr=False)
    """What is known of each input."""
    outputs: tuple[str, ...] = field(repr=False)
    """Names of the values that it returns, in order."""
    output_specs: tuple[TensorSpec | None, ...] = field(repr=False)
    """Geometry of each output; None for one that is no tensor."""
    own_memory: tuple[bool, ...] = field(repr=False)
    """For each output, whether another step writes it or a view of it is made later, so that its memory must be its
    own whatever a compiler would like to merge."""
    traits: Traits = field(repr=False, compare=False)


@dataclass(frozen=True)
class Split:
    """A graph as a sequence of pieces that give the same results in the same order."""

    pieces: tuple[Piece, ...]
    results: tuple[Any, ...]
    """Per result of the graph: ``ResultValue``, or a constant."""
    result_storages: tuple[int | None, ...]
    """Per result, the number of its storage in eager: equal numbers share memory. None for constants and numbers."""
    constants: Mapping[str, object]
    """Attributes of the graph that pieces take as inputs, by value name."""
    cuts: Cuts
    in_one: Split | str | None = field(default=None, repr=False, compare=False, kw_only=True)
    """The same graph as one compute step, for a full graph of all the pieces, or why it cannot be one; None where
    nobody asked."""
    whole: GraphModule = field(repr=False)
    """The graph before it was cut; right, too, for calls in which one of ``cuts.exclusive_inputs`` overlaps another."""


def split_graph(
    facts: GraphFacts,
    table: InputTable,
    matcher: SplitOpMatcher,
    whole: bool,
    row_wise_ops: tuple[str, ...],
    row_verdicts: dict[object, str | None],
) -> Split:
    """Cut ``facts.graph_module``, which is not changed, into pieces.

    Args:
        whole: make one piece of all of it, attention and writes to state included.
        row_wise_ops: names or globs of custom ops in which rows of tokens stay apart.
        row_verdicts: what the padding rules found of pieces; graphs that share it are not asked twice about equal ones.

    Raises:
        SplitError: the graph cannot be cut without changing what it means; the message says why.
    """
    return _Splitter(facts, table, find_cuts(facts, table.inputs, matcher, whole), row_wise_ops, row_verdicts).run()


class _Input(NamedTuple):
    """What a step takes from an earlier one, or from the caller."""

    source: Source
    spec: InputSpec
    value: Value
    """The value that it is, or whose size it is."""


class _Splitter:
    """What the steps of one graph share."""

    def __init__(
        self,
        facts: GraphFacts,
        table: InputTable,
        cuts: Cuts,
        row_wise_ops: tuple[str, ...],
        row_verdicts: dict[object, str | None],
    ) -> None:
        self.facts = facts
        self.cuts = cuts
        self.token_count = table.token_count
        stage_inputs = tuple(i.name for i in table.inputs if i.kind == "stage-input")
        self.padding = PaddedGraph(table.token_count, stage_inputs, row_wise_ops, row_verdicts)
        order = [node for step in cuts.steps for node in step.nodes]
        self.position = {node: index for index, node in enumerate(order)}
        self.end = len(order)
        self._renames: dict[Value, list[Node]] = {}
        self._renamed_storages: dict[int, list[Node]] = {}
        for node in sorted(cuts.renamed, key=self.position.__getitem__):
            for value in cuts.renamed[node]:
                self._renames.setdefault(value, []).append(node)
                for storage in facts.nodes[value.node].storages_at(value.path):
                    self._renamed_storages.setdefault(storage, []).append(node)
        (output,) = (node for node in facts.graph_module.graph.nodes if node.op == "output")
        results = output.args[0]
        self._results: Sequence[Any] = results if isinstance(results, (tuple, list)) else (results,)
        self.shared = self._shared_storages()
        self.stage_labels = {
            i.spec.storage: i.label for i in table.inputs if i.kind == "stage-input" and i.spec is not None
        }

    def run(self) -> Split:
        builders = [_StepBuilder(self, step) for step in self.cuts.steps]
        builder_of = {node: builder for builder in builders for node in builder.step.nodes}
        for builder in builders:
            builder.build()
        last = _StepBuilder(self, Step("eager", (), "recomputes results from the memory that they share"))
        found = [self._result(item, last) for item in self._results]
        wanted = [value for _, value, _ in found if value is not None]
        for builder in (last, *reversed(builders)):
            for value in wanted:
                if value.made_at.op not in ("placeholder", "get_attr"):
                    builder_of[value.made_at].export(value)
            wanted = builder.close()
        results = tuple(result for result, _, _ in found)
        storages = frozenset(storage for _, _, storage in found if storage is not None)
        filled = [builder for builder in (*builders, last) if not builder.is_empty]
        constants = {
            node.name: operator.attrgetter(str(node.target))(self.facts.graph_module)
            for node in self.facts.nodes
            if node.op == "get_attr"
        }
        return Split(
            pieces=tuple(builder.piece(index, storages) for index, builder in enumerate(filled)),
            results=results,
            result_storages=tuple(storage for _, _, storage in found),
            constants=constants,
            cuts=self.cuts,
            whole=self.facts.graph_module,
        )

    def _result(self, item: Any, last: _StepBuilder) -> tuple[Any, Value | None, int | None]:
        """One result of the graph: what it is, the value that a step must return for it, its storage."""
        if not isinstance(item, Node):
            return item, None, None
        if item in self.cuts.scalars:
            number = self.facts.nodes[item].value
            if not self.facts.symbols_of_value(number) and not reads_input(self.facts, item):
                return last.number(number), None, None
            if item.op == "placeholder":
                return ResultValue(item.name), None, None
            return ResultValue(last.make_number(item)), None, None
        value = self.as_of(self.end, canonical(self.facts, item))
        storage = next(iter(self.storages_of(value)), None)
        if self.is_remade(value):
            return ResultValue(last.export(value)), None, storage
        return ResultValue(value.name), value, storage

    # ------------------------------------------------------------------- aliasing

    def _shared_storages(self) -> frozenset[int]:
        """Storages of which no view may cross a border: written across steps, or seen through several results."""
        facts = self.facts
        step_of = {node: index for index, step in enumerate(self.cuts.steps) for node in step.nodes}
        shared = {
            storage
            for node, index in step_of.items()
            for storage in facts.nodes[node].writes
            if storage >= 0 and step_of.get(facts.births[storage]) != index
        }
        seen: dict[int, Value] = {}
        for item in self._results:
            if isinstance(item, Node) and item in facts.nodes and item not in self.cuts.scalars:
                value = canonical(facts, item)
                for storage in self.storages_of(value):
                    if storage in facts.input_storages or seen.setdefault(storage, value) != value:
                        shared.add(storage)
        return frozenset(shared)

    def storages_of(self, value: Value) -> frozenset[int]:
        if value.version is not None:
            return frozenset((self._storage_of_version(value.version),))
        return self.facts.nodes[value.node].storages_at(value.path)

    def _storage_of_version(self, version: Node) -> int:
        return -10 - self.position[version]  # memory of its own; numbers below EFFECT are free

    def written_by(self, node: Node) -> frozenset[int]:
        """Storages that a node writes: where an in-place op up to it was renamed, the copy that this one got."""
        written = set()
        for storage in self.facts.nodes[node].writes:
            renamed = [r for r in self._renamed_storages.get(storage, ()) if self.position[r] <= self.position[node]]
            written.add(self._storage_of_version(renamed[-1]) if renamed else storage)
        return frozenset(written)

    def as_of(self, position: int, value: Value) -> Value:
        """The value as the last renamed in-place op before ``position``, in the order of execution, left it."""
        versions = [node for node in self._renames.get(value, ()) if self.position[node] < position]
        return value._replace(version=versions[-1]) if versions else value

    def is_remade(self, value: Value) -> bool:
        """Whether the value is a view that is recomputed in each step that uses it."""
        if value.version is not None or value.node.op in ("placeholder", "get_attr"):
            return False
        storages = self.storages_of(value) & self.shared
        return bool(storages) and not storages & self.facts.nodes[value.node].born

    def spec(self, value: Value) -> TensorSpec | None:
        spec = self.facts.nodes[value.node].element(value.path)
        if not isinstance(spec, TensorSpec):
            return None
        return replace(spec, storage=next(iter(self.storages_of(value))))


class _StepBuilder:
    """Builds the graph of one step: first its nodes, then, once later steps have asked, its outputs."""

    def __init__(self, splitter: _Splitter, step: Step) -> None:
        self.step = step
        self._splitter = splitter
        self._facts = splitter.facts
        self._graph = fx.Graph()
        self._tracer = fx.proxy.GraphAppendingTracer(self._graph)
        self._attributes: dict[str, object] = {}
        self._made: dict[Value, Any] = {}
        """What stands for a value, without its version, in this step's graph from here on."""
        self._numbers: dict[Node, Any] = {}
        self._expressions: dict[sympy.Basic, Any] = {}
        self._inputs: dict[Node, _Input] = {}
        self._input_nodes: dict[Any, Node] = {}
        self._exports: dict[str, tuple[Any, TensorSpec | None]] = {}
        self._copies: dict[Node, Node] = {}
        """Node of this step's graph -> the node of the whole graph that it copies."""
        self._acting: set[Node] = set()
        """Nodes that count even if nobody uses what they return."""
        self._open_autocast: list[tuple[Node, Node]] = []
        self._position = splitter.end

    # ---------------------------------------------------------------- nodes

    def build(self) -> None:
        for node in self.step.nodes:
            self._position = self._splitter.position[node]
            self._match_autocast(self._facts.regions.contexts.get(node, ()))
            for value in self._splitter.cuts.renamed.get(node, ()):
                self._made[value] = self._graph.call_method("clone", (self._resolve(value),))
            copy = self._made[Value(node)] = self._copy(node)
            if self._facts.nodes[node].writes or self._facts.nodes[node].region is not None:
                self._acting.add(copy)
        self._match_autocast(())
        if self.step.nodes:
            self._position += 1  # what later steps ask for is asked for as it stands at the end of this one

    def make_number(self, node: Node) -> str:
        """Compute a number in this step and return its name; later steps may ask for it."""
        self._exports[node.name] = (self._scalar(node), None)
        return node.name

    def export(self, value: Value) -> str:
        """Make a value one of this step's outputs, and return its name."""
        if value.name not in self._exports:
            self._exports[value.name] = (self._resolve(value._replace(version=None)), self._splitter.spec(value))
        return value.name

    def _copy(self, node: Node) -> Node:
        args = fx.node.map_arg(node.args, self._argument)
        kwargs = fx.node.map_arg(node.kwargs, self._argument)
        target = self._attach(str(node.target)) if node.op == "call_module" else node.target
        copy = self._graph.create_node(node.op, target, args, kwargs, name=node.name)
        copy.meta.update({key: node.meta[key] for key in ("stack_trace", "custom") if key in node.meta})
        self._copies[copy] = node
        return copy

    def _argument(self, node: Node) -> Any:
        if node in self._splitter.cuts.scalars:
            return self._scalar(node)
        if node.op == "get_attr" and not isinstance(self._facts.nodes[node].value, torch.Tensor):
            return self._graph.get_attr(self._attach(str(node.target)))
        return self._resolve(canonical(self._facts, node))

    def _resolve(self, value: Value) -> Any:
        """What stands for ``value`` in this step's graph; an input is added if it comes from elsewhere."""
        if value in self._made:
            return self._made[value]
        latest = self._splitter.as_of(self._position, value)
        if latest.version is None:
            leaf = self._facts.nodes[value.node].element(value.path)
            if value.path and Value(value.node) in self._made:
                return self._element(value)
            if isinstance(leaf, (tuple, list)) and not isinstance(leaf, torch.Size):
                return tuple(self._resolve(Value(value.node, (*value.path, i))) for i in range(len(leaf)))
            if leaf is None or (value.path and isinstance(leaf, (int, float, torch.SymInt))):
                return self.number(leaf)
            if self._splitter.is_remade(value):
                return self._remake(value)
        if latest not in self._input_nodes:
            known = self._facts.nodes[latest.node].value
            spec = known if isinstance(known, ObjectSpec) else self._splitter.spec(latest)
            self._add_input(latest, latest.name, _Input(latest.name, spec, latest))
        return self._input_nodes[latest]

    def _element(self, value: Value) -> Any:
        holder = self._resolve(Value(value.node, value.path[:-1]))
        index = value.path[-1]
        if isinstance(holder, (tuple, list)):
            return holder[index]
        self._made[value] = self._graph.call_function(operator.getitem, (holder, index))
        return self._made[value]

    def _remake(self, value: Value) -> Any:
        node = value.node
        if self._facts.nodes[node].writes:
            raise SplitError(
                f"{op_name(node)} (node {node.name}) both writes memory and returns a view of it that another step "
                f"uses; the whole graph goes to the stock backend"
            )
        self._made[Value(node)] = self._copy(node)
        return self._element(value) if value.path else self._made[value]

    def _add_input(self, handle: Any, name: str, step_input: _Input) -> None:
        last = next(reversed(self._inputs), None)
        with self._graph.inserting_before() if last is None else self._graph.inserting_after(last):
            node = self._graph.placeholder(name)
        self._input_nodes[handle] = node
        self._inputs[node] = step_input

    def _attach(self, path: str) -> str:
        """Give this step's graph an attribute of the whole graph, such as the body of a higher-order op."""
        value = operator.attrgetter(path)(self._facts.graph_module)
        known = (name for name, attribute in self._attributes.items() if attribute is value)
        name = next(known, f"body_{len(self._attributes)}")
        self._attributes[name] = value
        return name

    # ----------------------------------------------------------------- numbers

    def _scalar(self, node: Node) -> Any:
        """The number that a node of the whole graph gives, computed in this step from the bare symbols.

        Arithmetic is copied as Dynamo wrote it; the sizes of tensors, where it starts, become expressions.
        """
        if node not in self._numbers:
            facts = self._facts.nodes[node]
            is_arithmetic = node.op != "placeholder" and self._splitter.cuts.scalars.issuperset(node.all_input_nodes)
            if reads_input(self._facts, node) or (is_arithmetic and self._facts.symbols_of_value(facts.value)):
                self._numbers[node] = self._copy(node)
            else:
                self._numbers[node] = self.number(facts.value)
        return self._numbers[node]

    def number(self, value: Any) -> Any:
        """Sizes, or sizes nested in tuples, computed in this step from the bare symbols."""
        if isinstance(value, (tuple, list)):
            items = [self.number(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        expression = self._facts.expression(value)
        if not isinstance(expression, sympy.Basic):
            return value
        if not expression.free_symbols:
            return torch_compat.build_expression(expression, {})
        if isinstance(expression, sympy.Symbol):
            return self._symbol(expression)
        if expression not in self._expressions:
            symbols = {s: fx.Proxy(self._symbol(s), self._tracer) for s in sorted(expression.free_symbols, key=str)}
            try:
                self._expressions[expression] = torch_compat.build_expression(expression, symbols).node
            except Exception as error:
                raise SplitError(
                    f"the size {expression} cannot be computed outside its piece: {error}; the whole graph goes to the "
                    f"stock backend"
                ) from error
        return self._expressions[expression]

    def _symbol(self, symbol: sympy.Symbol) -> Node:
        if symbol not in self._input_nodes:
            if symbol not in self._facts.symbol_sources:
                raise SplitError(f"no value gives the size {symbol}; the whole graph goes to the stock backend")
            node, dim = self._facts.symbol_sources[symbol]
            if node.op != "placeholder" and node in self._splitter.cuts.scalars:
                return self._scalar(node)
            value = canonical(self._facts, node)
            if Value(value.node) in self._made:
                made = self._resolve(value)
                self._input_nodes[symbol] = (
                    made if dim is None else self._graph.call_function(torch.ops.aten.sym_size.int, (made, dim))
                )
            else:
                source = value.name if dim is None else SizeOf(value.name, dim)
                self._add_input(symbol, str(symbol), _Input(source, self._facts.symbols.get(symbol), value))
        return self._input_nodes[symbol]

    # ---------------------------------------------------------------- autocast

    def _match_autocast(self, wanted: tuple[Node, ...]) -> None:
        """Leave and enter autocast regions until exactly those around the next node are open."""
        pairs = zip(self._open_autocast, wanted, strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0][0] is pair[1], pairs))
        while len(self._open_autocast) > common:
            _, opened = self._open_autocast.pop()
            self._acting.add(self._graph.call_function(torch_compat.exit_autocast, (opened,)))
        for enter in wanted[common:]:
            opened = self._graph.call_function(torch_compat.enter_autocast, enter.args)
            self._acting.add(opened)
            self._open_autocast.append((enter, opened))

    # ----------------------------------------------------------------- closing

    def close(self) -> list[Value]:
        """Finish the graph once its outputs are known; returns the values that it needs from earlier steps."""
        self._drop_dead_nodes([made for made, _ in self._exports.values() if isinstance(made, Node)])
        if self.step.kind == "compute":
            # A compiler must be able to name every size that it sees.
            for symbol in sorted({s for _, spec in self._tensor_inputs() for s in spec.symbols}, key=str):
                self._symbol(symbol)
        return [] if self.is_empty else [i.value for i in self._inputs.values()]

    @property
    def is_empty(self) -> bool:
        """Whether a closed step has nothing to do."""
        return not self._exports and all(node.op == "placeholder" for node in self._graph.nodes)

    def piece(self, index: int, result_storages: frozenset[int]) -> Piece:
        """The closed step as the piece of this number."""
        outputs = [made for made, _ in self._exports.values()]
        self._graph.output(tuple(outputs))
        graph_module = GraphModule(self._attributes, self._graph)
        inputs = self._inputs.values()
        input_specs = tuple(i.spec for i in inputs)
        shared, stage_labels = self._splitter.shared, self._splitter.stage_labels
        reads = dict.fromkeys(stage_labels.get(spec.storage) for spec in input_specs if isinstance(spec, TensorSpec))
        output_specs = tuple(spec for _, spec in self._exports.values())
        traits = self._traits(outputs, output_specs)
        key = digest(piece_text(graph_module, (*input_specs, *self._made_from_objects())))
        step = PaddedStep(graph_module, key, traits, input_specs, output_specs, self._splitter.padding)
        why_not_padded: str | None = "never padded: an eager step sees the real rows"
        if self.step.kind == "compute":
            why_not_padded = padding_reason(step)
        return Piece(
            index=index,
            kind=self.step.kind,
            ops=tuple(op_name(node) for node in self.step.nodes),
            reason=self.step.reason,
            key=key,
            reads_stage_inputs=tuple(label for label in reads if label is not None),
            writes_stage_outputs=any(spec is not None and spec.storage in result_storages for spec in output_specs),
            padding="not tested yet" if why_not_padded is None else why_not_padded,
            padding_reason=None if why_not_padded is None else miss("padding-unsafe", why_not_padded),
            graph_module=graph_module,
            inputs=tuple(i.source for i in inputs),
            input_specs=input_specs,
            outputs=tuple(self._exports),
            output_specs=output_specs,
            own_memory=tuple(spec is not None and spec.storage in shared for spec in output_specs),
            traits=traits,
        )

    def _made_from_objects(self) -> list[TensorSpec]:
        """What the ops that take an object return: its geometry does not follow from the other inputs."""
        objects = {node for node, i in self._inputs.items() if isinstance(i.spec, ObjectSpec)}
        made = [node for copy, node in self._copies.items() if not objects.isdisjoint(copy.all_input_nodes)]
        leaves = torch_compat.tree_leaves([self._facts.nodes[node].value for node in made])
        return [leaf for leaf in leaves if isinstance(leaf, TensorSpec)]

    def _tensor_inputs(self) -> Iterator[tuple[Value, TensorSpec]]:
        return ((i.value, i.spec) for i in self._inputs.values() if isinstance(i.spec, TensorSpec))

    def _traits(self, outputs: Sequence[Any], output_specs: Sequence[TensorSpec | None]) -> Traits:
        facts, token_count = self._facts, self._splitter.token_count
        copies = {copy: self._copies[copy] for copy in self._graph.nodes if copy in self._copies}
        written = frozenset().union(*map(self._splitter.written_by, copies.values()))
        writes = {value.name: spec.storage for value, spec in self._tensor_inputs() if spec.storage in written}
        exported = {
            name: frozenset((spec.storage,))
            for name, spec in zip(self._exports, output_specs, strict=True)
            if spec is not None
        }
        is_compute = self.step.kind == "compute"
        return Traits(
            random=RANDOM in written,
            opaque=any(map(is_custom_op, copies.values())),
            writes=tuple(writes),
            written_storages=frozenset(writes.values()),
            allocations={} if is_compute else handed_on_allocations(facts, copies, exported, token_count),
            uninitialised=tuple(is_meaningless(output) for output in outputs),
        )

    def _drop_dead_nodes(self, live: list[Node]) -> None:
        """Remove views, sizes and inputs that only other steps need."""
        alive = reachable([*live, *self._acting], {node: node.all_input_nodes for node in self._graph.nodes})
        for node in reversed(self._graph.nodes):
            if node not in alive:
                self._graph.erase_node(node)
                self._inputs.pop(node, None)
        self._input_nodes = {handle: node for handle, node in self._input_nodes.items() if node in alive}

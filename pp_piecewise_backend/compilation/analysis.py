"""What every node of a Dynamo graph does: the value it gives, the memory it shares, reads, writes and creates.

Note [two sources of facts]
Geometry comes from Dynamo: each node carries a fake tensor whose sizes are expressions over symbols. What happens to
memory is seen by running the graph once, node by node, on fake tensors with the sizes of the traced call. Schemas do
not say enough (methods and ``setitem`` have none, ``.to()`` may return its input), and symbolic sizes would send some
ops through Python decompositions that copy where the kernel returns its input [ran: dropout in eval mode].
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Interpreter, Node

from ..errors import SplitError
from ..utils import torch_compat
from ..utils.addresses import Span, overlap, span
from .fx_utils import (
    function_names,
    is_custom_op,
    named_like_matmul,
    nested_nodes,
    op_name,
    op_names,
    plain_op_name,
    reads_arguments_only,
    runs_python,
)
from .regions import Regions, find_regions
from .specs import ObjectSpec, SymbolSpec, TensorSpec, as_dim

RANDOM = -1
"""Stands for the state of the random generators, as if it were a storage that random ops write."""
EFFECT = -2
"""Stands for the world outside: what ops without a result (asserts, prints, unknown calls) write."""

_MATMUL_OPS = frozenset(
    {"mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "linear", "matmul", "einsum", "tensordot"}
    | {"convolution", "_convolution", "cudnn_convolution", "mkldnn_convolution", "bilinear", "_trilinear"}
    | {"_scaled_mm", "_scaled_grouped_mm", "_grouped_mm", "_int_mm", "_weight_int8pack_mm", "_weight_int4pack_mm"}
    | {"_sparse_mm", "lstm", "gru", "rnn_tanh", "rnn_relu", "_cudnn_rnn", "mkldnn_rnn_layer"}
)

# Ops that update running statistics although their schema does not say so. [ran: no version counter moves either]
_UPDATE_STATISTICS = frozenset(
    {"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "batch_norm", "instance_norm"}
)

_RANDOM_WORDS = ("rand", "dropout", "bernoulli", "multinomial", "normal")

# Ops whose kernel copies although on fake tensors they may return a view [ran].
_ALWAYS_COPY = frozenset({"channel_shuffle", "native_channel_shuffle"})


@dataclass(frozen=True)
class NodeFacts:
    """What one node does. Storages are numbered per graph; negative numbers are ``RANDOM`` and ``EFFECT``."""

    value: Any
    """What it returns, nested as it returns it: a ``TensorSpec`` for each tensor, numbers with symbols."""
    storages: frozenset[int] = frozenset()
    """Storages of the tensors that it returns."""
    born: frozenset[int] = frozenset()
    """Those of them that did not exist before."""
    reads: frozenset[int] = frozenset()
    """Storages of the tensors that it takes."""
    writes: frozenset[int] = frozenset()
    """Storages whose contents it changes."""
    returns_argument: Node | None = None
    """The argument that it returns as the very same tensor, as in-place ops do."""
    heavy: bool = False
    """Whether it is of the class of matrix products: worth a compiled piece."""
    reshapes_in_place: bool = False
    """Whether it changes the shape or strides of one of its arguments, as ``transpose_`` does."""
    region: int | None = None
    """Inseparable group of nodes (see ``regions.py``), if any."""
    in_python: tuple[tuple[str, ...], ...] = ()
    """All names of each op that it runs and that may run Python code of others, which may read anything."""
    unknown: tuple[tuple[str, ...], ...] = ()
    """All names of each op that it runs and that is not known to read nothing but its arguments, on their device."""

    def element(self, path: tuple[int, ...]) -> Any:
        """The part of the value at ``path``."""
        element = self.value
        for index in path:
            element = element[index]
        return element

    def storages_at(self, path: tuple[int, ...]) -> frozenset[int]:
        """Storages of the part at ``path``; of everything that the node returns for ``()``."""
        leaves = torch_compat.tree_leaves(self.element(path))
        return frozenset(leaf.storage for leaf in leaves if isinstance(leaf, TensorSpec))


@dataclass(frozen=True)
class GraphFacts:
    """Facts about one graph. Holds no tensor."""

    graph_module: GraphModule
    nodes: Mapping[Node, NodeFacts]
    regions: Regions
    symbols: Mapping[sympy.Symbol, SymbolSpec]
    symbol_sources: Mapping[sympy.Symbol, tuple[Node, int | None]]
    """Where the value of a symbol comes from: a node that gives the integer, or a tensor node and its dimension."""
    needs_gradient: tuple[str, ...]
    """Names of the inputs through which a result would require gradients; () when none does."""
    equal_symbols: Mapping[sympy.Symbol, sympy.Symbol] = field(default_factory=dict)
    """Symbol -> the one that stands for it: both count the same thing, which each call has to check."""

    @functools.cached_property
    def births(self) -> Mapping[int, Node]:
        """Storage -> the node that it comes from: an input, a constant, or the op that makes it."""
        return {storage: node for node, facts in self.nodes.items() for storage in facts.born}

    @functools.cached_property
    def input_storages(self) -> frozenset[int]:
        """Storages that exist before the graph runs: graph inputs and constants."""
        return frozenset(s for s, node in self.births.items() if node.op in ("placeholder", "get_attr"))

    @functools.cached_property
    def written(self) -> frozenset[int]:
        """Storages that some node writes."""
        return frozenset(storage for facts in self.nodes.values() for storage in facts.writes)

    def with_equal_symbols(self, equal: Mapping[sympy.Symbol, sympy.Symbol]) -> GraphFacts:
        """These facts with some symbols replaced, in all tensors, by others that must have the same value."""
        if not equal:
            return self
        nodes = {node: replace(f, value=_renamed(f.value, equal)) for node, f in self.nodes.items()}
        return replace(self, nodes=nodes, equal_symbols=equal)

    def symbols_of_value(self, value: Any) -> set[sympy.Symbol]:
        """The symbols in the numbers that a value consists of."""
        leaves = torch_compat.tree_leaves(value)
        numbers = (leaf for leaf in leaves if isinstance(leaf, (torch.SymInt, torch.SymBool, torch.SymFloat)))
        return {self.equal_symbols.get(s, s) for number in numbers for s in number.node.expr.free_symbols}

    def expression(self, value: Any) -> Any:
        """The expression behind a symbolic number; a plain number unchanged."""
        expression = torch_compat.symint_expression(value)
        return expression.xreplace(dict(self.equal_symbols)) if isinstance(expression, sympy.Basic) else expression

    def spec(self, node: Node) -> TensorSpec | None:
        """Geometry of the node's value when it is one tensor, else None."""
        value = self.nodes[node].value
        return value if isinstance(value, TensorSpec) else None


def collect_facts(graph_module: GraphModule, example_inputs: Sequence[object]) -> GraphFacts:
    """Run ``graph_module`` on fake tensors and note what each node does.

    Args:
        graph_module: the graph as Dynamo made it; it is not changed.
        example_inputs: one per placeholder. Tensors may be real or fake; their contents are never read.

    Raises:
        SplitError: the graph has something that cannot be followed (tensor subclasses, unknown sizes).
    """
    return _Walk(graph_module, example_inputs).facts()


class _OpRecorder(torch_compat.TorchDispatchMode):
    """Sees the ATen ops that one node runs: is one a matrix product, is one random, what do they write."""

    def __init__(self, storage_of: Callable[[torch.Tensor], int | None]) -> None:
        super().__init__()
        self._storage_of = storage_of
        self._in_python: dict[Any, tuple[tuple[str, ...], ...]] = {}
        """What is known of each op seen so far."""
        self._unknown: dict[Any, tuple[tuple[str, ...], ...]] = {}
        self.clear()

    def clear(self) -> None:
        self.heavy = False
        self.random = False
        self.writes: set[int] = set()
        self.in_python: dict[tuple[str, ...], None] = {}
        self.unknown: dict[tuple[str, ...], None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self._in_python:
            names = (function_names(func),)
            self._in_python[func] = names if torch_compat.runs_python(func) else ()
            self._unknown[func] = () if torch_compat.reads_arguments_only(func) else names
        self.in_python.update(dict.fromkeys(self._in_python[func]))
        self.unknown.update(dict.fromkeys(self._unknown[func]))
        name = torch_compat.schema_name(func)
        if name is not None:
            namespace, name = name.split("::", 1)
            self.heavy |= namespace == "aten" and name in _MATMUL_OPS
            given = torch_compat.bound_arguments(func, args, kwargs).get
            draws = torch.Tag.nondeterministic_seeded in func.tags
            self.random |= draws and given("dropout_p") != 0
            written = [given(argument) for argument in torch_compat.schema_writes(func)]
            if name in _UPDATE_STATISTICS and (given("training") or given("use_input_stats")):
                written += [given("running_mean"), given("running_var")]
            for tensor in torch_compat.tensors_in(written):
                if (storage := self._storage_of(tensor)) is not None:
                    self.writes.add(storage)
        try:
            return func(*args, **kwargs)
        except torch_compat.DATA_DEPENDENT_ERRORS:
            self.unknown[function_names(func)] = None  # it brings a number or size to the host
            raise


class _Walk(Interpreter):
    """One run of a graph on fake tensors with the sizes of the traced call."""

    env: dict[Node, Any]
    """Fake tensors and plain numbers, as each node returns them; None for nodes that are not run."""

    def __init__(self, graph_module: GraphModule, example_inputs: Sequence[object]) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.extra_traceback = False
        self._graph_module = graph_module
        self._example_inputs = example_inputs
        self._regions = find_regions(graph_module.graph)
        self._fake_mode = torch_compat.FakeTensorMode(allow_non_fake_inputs=True)
        self._facts: dict[Node, NodeFacts] = {}
        self._recorder = _OpRecorder(self._known_storage)
        self._open_autocast: dict[Node, object] = {}
        self._grad_modes: list[bool] = []
        """Before each inference mode that is open."""
        self._sizes: dict[sympy.Symbol, int] = {}
        """The number that each symbol stands for in this run."""
        self._symbols: dict[sympy.Symbol, SymbolSpec] = {}
        self._symbol_sources: dict[sympy.Symbol, tuple[Node, int | None]] = {}
        self._storage_numbers: dict[int, int] = {}
        self._keep_alive: list[object] = []
        self._has_history = False

    def facts(self) -> GraphFacts:
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        if len(placeholders) != len(self._example_inputs):
            raise SplitError(
                f"the graph has {len(placeholders)} placeholders but {len(self._example_inputs)} example inputs "
                f"were given; pass one per placeholder, in order"
            )
        with contextlib.ExitStack() as stack:
            # Inference tensors have no version counter, by which writes are seen. Leaving inference mode switches
            # gradients on [ran], so the caller's grad mode is set again.
            grad_mode = torch.is_grad_enabled()
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(grad_mode))
            stack.callback(torch_compat.leave_functorch, torch_compat.functorch_level())
            stack.enter_context(self._fake_mode)
            self._read_inputs(placeholders)
            stack.enter_context(self._recorder)
            stack.callback(leave_autocast, self._open_autocast)
            self.run(initial_env=self.env, enable_io_processing=False)
            needs_gradient = self._gradient_inputs(placeholders)
        return GraphFacts(
            graph_module=self._graph_module,
            nodes=self._facts,
            regions=self._regions,
            symbols=self._symbols,
            symbol_sources=self._symbol_sources,
            needs_gradient=needs_gradient,
        )

    def run_node(self, n: Node) -> Any:
        """Run one node as what it is in this walk; what it returns is what later nodes take."""
        if n.op == "get_attr":
            return self._read_attribute(n)
        if n.target is torch_compat.enter_autocast:
            self._open_autocast[n] = torch_compat.enter_autocast(*n.args)
        elif n.target is torch_compat.exit_autocast:
            torch_compat.exit_autocast(self._open_autocast.pop(n.args[0]))  # type: ignore[arg-type]
        elif n.target is torch_compat.set_grad_enabled and n in self._regions.dropped:
            torch_compat.set_grad_enabled(n.args[0])
        elif n.target is torch_compat.enter_inference_mode and n in self._regions.dropped:
            self._grad_modes.append(torch.is_grad_enabled())
            torch_compat.set_grad_enabled(torch.is_grad_enabled() and not n.args[0])
        elif n.target is torch_compat.exit_inference_mode and n in self._regions.dropped:
            torch_compat.set_grad_enabled(self._grad_modes.pop())
        elif n.op.startswith("call_") and n not in self._regions.dropped:
            return self._call_and_note(n)
        return None

    # ------------------------------------------------------------------ inputs

    def _read_inputs(self, placeholders: Sequence[Node]) -> None:
        examples = [
            node.meta.get("example_value", given)
            for node, given in zip(placeholders, self._example_inputs, strict=True)
        ]
        for example, given in zip(examples, self._example_inputs, strict=True):
            self._learn_sizes(example, given)
        # Integers first: they are the simplest source of a symbol.
        pairs = zip(placeholders, examples, strict=True)
        for node, example in sorted(pairs, key=lambda pair: isinstance(pair[1], torch.Tensor)):
            self._note_symbols(node, example)
        real: list[tuple[Span, int]] = []
        for node, example, given in zip(placeholders, examples, self._example_inputs, strict=True):
            if not isinstance(example, torch.Tensor):
                self.env[node] = self._concrete(example)
                kind = torch_compat.opaque_type(example)
                self._facts[node] = NodeFacts(example if kind is None else ObjectSpec(kind.__qualname__, example))
                continue
            fake = self._fake_input(node, example)
            number = self._number(fake)
            # Two inputs in one memory must count as one, or a write through one would go unseen.
            if isinstance(given, torch.Tensor) and not isinstance(given, torch_compat.FakeTensor):
                with contextlib.suppress(RuntimeError, NotImplementedError):
                    if given.data_ptr():  # none on the meta device
                        place = span(given)
                        number = next((other for taken, other in real if overlap(place, taken)), number)
                        self._storage_numbers[torch_compat.storage_identity(fake)] = number
                        real.append((place, number))
            self.env[node] = fake
            self._facts[node] = _given(TensorSpec.of(example, number))

    def _fake_input(self, node: Node, example: torch.Tensor) -> torch.Tensor:
        if torch_compat.is_traceable_wrapper_subclass(example):
            raise SplitError(
                f"graph input {node.name} is a tensor subclass ({type(example).__name__}); the backend follows plain "
                f"tensors only, so the whole graph goes to the stock backend"
            )
        if example.layout is not torch.strided:
            raise SplitError(
                f"graph input {node.name} has layout {example.layout}; the backend follows strided tensors only, so "
                f"the whole graph goes to the stock backend"
            )
        fake = self._adopt(example)
        if example.requires_grad and torch.is_grad_enabled():
            if example.grad_fn is not None:
                self._has_history = True
            else:
                fake.requires_grad_(True)
        return fake

    def _read_attribute(self, node: Node) -> Any:
        value: Any = operator.attrgetter(str(node.target))(self.module)
        if not isinstance(value, torch.Tensor):
            self._facts[node] = NodeFacts(value)
            return value
        fake = self._fake_mode.from_tensor(value, static_shapes=True)
        self._facts[node] = _given(TensorSpec.of(fake, self._number(fake)))
        return fake

    # ------------------------------------------------------------------- nodes

    def _call_and_note(self, node: Node) -> Any:
        recorder = self._recorder
        arguments = {n: self.env[n] for n in node.all_input_nodes}
        before = torch_compat.tensors_in(list(arguments.values()))
        versions = [tensor._version for tensor in before]
        shapes = [(tensor.shape, tensor.stride()) for tensor in before]
        recorder.clear()
        inside = [op_name(inner) for inner in nested_nodes(node)]
        value = self._call_or_adopt(node)
        if plain_op_name(node) in _ALWAYS_COPY:
            value = value.clone()
        example = node.meta.get("example_value")
        reads = {s for tensor in before if (s := self._known_storage(tensor)) is not None}
        writes = set(recorder.writes)
        for tensor, version in zip(before, versions, strict=True):
            if tensor._version != version and (storage := self._known_storage(tensor)) is not None:
                writes.add(storage)
        if isinstance(node.target, torch_compat.HigherOrderOperator) and "mutation" in op_name(node) and not inside:
            writes |= reads  # user-written triton kernels: which argument is written is not known
        if recorder.random or any(word in name for name in inside for word in _RANDOM_WORDS):
            writes.add(RANDOM)
        if value is None and not writes:
            writes.add(EFFECT)
        known = set(self._storage_numbers.values())
        storages = {number for tensor in torch_compat.tensors_in(value) if (number := self._number(tensor)) is not None}
        self._note_symbols(node, example)
        run = (node, *nested_nodes(node))
        in_python = dict.fromkeys(op_names(n) for n in run if runs_python(n))
        unknown = dict.fromkeys(op_names(n) for n in run if not reads_arguments_only(n))
        by_name = [*inside, op_name(node)] if is_custom_op(node) else inside
        same = [n for n, v in arguments.items() if v is value and isinstance(v, torch.Tensor)]
        self._facts[node] = NodeFacts(
            value=self._describe(value, example),
            storages=frozenset(storages),
            born=frozenset(storages - known),
            reads=frozenset(reads),
            writes=frozenset(writes),
            returns_argument=same[0] if same else None,
            heavy=recorder.heavy or node.op == "call_module" or any(map(named_like_matmul, by_name)),
            reshapes_in_place=shapes != [(tensor.shape, tensor.stride()) for tensor in before],
            region=self._regions.bound.get(node),
            in_python=tuple(in_python | recorder.in_python),
            unknown=tuple(unknown | recorder.unknown),
        )
        return value

    def _call_or_adopt(self, node: Node) -> Any:
        """Run the node; where its result depends on data that a fake tensor has not, take what Dynamo found."""
        try:
            return super().run_node(node)
        except Exception as error:
            depends_on_data = isinstance(error, torch_compat.DATA_DEPENDENT_ERRORS)
            is_higher_order = isinstance(node.target, torch_compat.HigherOrderOperator)
            if "example_value" not in node.meta or not (depends_on_data or is_higher_order):
                raise SplitError(
                    f"node {node.name} ({op_name(node)}) could not be followed on fake tensors: "
                    f"{type(error).__name__}: {error}; the whole graph goes to the stock backend"
                ) from error
        # Dynamo forbids the bodies of higher-order ops to return their inputs or views of these.
        example = node.meta["example_value"]
        for leaf in torch_compat.tree_leaves(example):
            self._learn_sizes(leaf, None)

        def adopted(leaf: Any) -> Any:
            return self._adopt(leaf) if isinstance(leaf, torch.Tensor) else self._concrete(leaf)

        return torch_compat.tree_map(adopted, example)

    def _adopt(self, example: torch.Tensor) -> torch.Tensor:
        """A fake tensor of ours with the geometry of Dynamo's."""
        shape = [self._concrete(size) for size in example.shape]
        stride = [self._concrete(step) for step in example.stride()]
        offset = self._concrete(example.storage_offset())
        with torch.no_grad():
            if not offset:
                return torch.empty_strided(shape, stride, dtype=example.dtype, device=example.device)
            extent = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1 + offset
            base = torch.empty((max(extent, 0),), dtype=example.dtype, device=example.device)
            return base.as_strided(shape, stride, offset)

    def _describe(self, value: Any, example: Any) -> Any:
        """What a node returns, as ``NodeFacts.value`` keeps it: Dynamo's geometry, storages as this run saw them."""
        if isinstance(value, torch.Tensor):
            number = self._number(value)
            return TensorSpec.of(example if isinstance(example, torch.Tensor) else value, number)
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            examples = (
                example if isinstance(example, (tuple, list)) and len(example) == len(value) else [None] * len(value)
            )
            items = [self._describe(item, at) for item, at in zip(value, examples, strict=True)]
            return items if isinstance(value, list) else tuple(items)
        return value if example is None else example

    # ----------------------------------------------------------------- symbols

    def _learn_sizes(self, example: Any, given: Any) -> None:
        """Fix the number that each new symbol of a value stands for: its size in the traced call."""
        if isinstance(example, torch.Tensor):
            sizes = (*example.shape, *example.stride(), example.storage_offset())
            is_real = isinstance(given, torch.Tensor) and given.dim() == example.dim()
            real = (*given.shape, *given.stride(), given.storage_offset()) if is_real else (None,) * len(sizes)
            for size, number in zip(sizes, real, strict=True):
                self._learn_sizes(size, number)
        elif isinstance(example, (torch.SymInt, torch.SymFloat)):
            symbol = example.node.expr
            if not isinstance(symbol, sympy.Symbol) or symbol in self._sizes:
                return
            hint = torch_compat.symbolic_hint(example)
            is_backed = hint is not None
            if not is_backed and isinstance(given, (int, float)) and not isinstance(given, bool):
                hint = given
            if isinstance(example, torch.SymFloat):
                self._sizes[symbol] = 1.5 if hint is None else hint  # type: ignore[assignment]
                return
            lower, upper = torch_compat.symbol_range(example)
            if hint is None or (not is_backed and hint < 2):
                # Without a hint, a size at which no dimension degenerates, as far as its range allows.
                hint = max(lower or 0, min(7, 7 if upper is None else upper))
            self._sizes[symbol] = int(hint)
            self._symbols[symbol] = SymbolSpec(symbol, int(hint) if is_backed else None, lower, upper)

    def _concrete(self, value: Any) -> Any:
        """A number in place of a symbolic one."""
        if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return value
        expression = value.node.expr
        unknown = expression.free_symbols - self._sizes.keys()
        if unknown:
            raise SplitError(
                f"the size {expression} depends on {', '.join(sorted(map(str, unknown)))}, which no input of the graph "
                f"gives; the whole graph goes to the stock backend"
            )
        return torch_compat.build_expression(expression, self._sizes)

    def _note_symbols(self, node: Node, example: Any) -> None:
        """Remember where symbols get their value: inputs, or nodes in whose results they are born."""
        if isinstance(example, torch.Tensor):
            for dim, size in enumerate(example.shape):
                expression = as_dim(size)
                if isinstance(expression, sympy.Symbol):
                    self._symbol_sources.setdefault(expression, (node, dim))
        elif isinstance(example, (torch.SymInt, torch.SymFloat)) and isinstance(example.node.expr, sympy.Symbol):
            self._symbol_sources.setdefault(example.node.expr, (node, None))

    # ---------------------------------------------------------------- storages

    def _number(self, tensor: torch.Tensor) -> int:
        self._keep_alive.append(tensor)
        return self._storage_numbers.setdefault(torch_compat.storage_identity(tensor), len(self._storage_numbers))

    def _known_storage(self, tensor: torch.Tensor) -> int | None:
        return self._storage_numbers.get(torch_compat.storage_identity(tensor))

    def _gradient_inputs(self, placeholders: Sequence[Node]) -> tuple[str, ...]:
        written = {storage for facts in self._facts.values() for storage in facts.writes}
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        results = torch_compat.tensors_in([self.env[node] for node in output.all_input_nodes])
        results += torch_compat.tensors_in(
            [self.env[node] for node in placeholders if self._facts[node].storages & written]
        )
        if not self._has_history and not any(tensor.grad_fn is not None for tensor in results):
            return ()
        return tuple(
            node.name
            for node, given in zip(placeholders, self._example_inputs, strict=True)
            if isinstance(given, torch.Tensor) and given.requires_grad
        )


def _renamed(value: Any, symbols: Mapping[sympy.Symbol, sympy.Symbol]) -> Any:
    return torch_compat.tree_map(
        lambda leaf: leaf.renamed(symbols) if isinstance(leaf, TensorSpec) else leaf,
        value,
        is_leaf=lambda part: isinstance(part, torch.Size),
    )


def _given(spec: TensorSpec) -> NodeFacts:
    """Facts about a tensor that exists before the graph runs."""
    storages = frozenset((spec.storage,))
    return NodeFacts(spec, storages=storages, born=storages)


def leave_autocast(open_autocast: dict[Any, object]) -> None:
    """Leave these autocast regions, the innermost one first."""
    while open_autocast:
        torch_compat.exit_autocast(open_autocast.popitem()[1])

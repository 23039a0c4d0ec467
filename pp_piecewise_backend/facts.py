"""What every node of a Dynamo graph does: the value it gives, the memory it shares, reads, writes and creates.

The graph is run once, node by node, on fake tensors of a shape environment of our own. Schemas alone do not tell
enough: methods and ``setitem`` have none, custom ops return views, ``.to()`` may return its input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from . import _compat
from .errors import SplitError
from .regions import Regions, find_regions, is_autocast_enter, is_autocast_exit
from .specs import SymbolSpec, TensorSpec, as_dim
from .split_ops import attribute, is_custom_op, named_like_matmul, nested_graphs, op_name

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

# Ops that update running statistics although their schema does not say so, with the positions of what they write
# and of the flag that turns the update on. [ran: no version counter moves either]
_UNDECLARED_WRITES: Mapping[str, tuple[tuple[int, ...], int]] = {
    "native_batch_norm": ((3, 4), 5),
    "cudnn_batch_norm": ((3, 4), 5),
    "miopen_batch_norm": ((3, 4), 5),
    "batch_norm": ((3, 4), 5),
    "instance_norm": ((3, 4), 5),
}


@dataclass(frozen=True)
class NodeFacts:
    """What one node does. Storages are numbered per graph; negative numbers are ``RANDOM`` and ``EFFECT``."""

    value: Any
    """Fake tensors and symbolic numbers, nested as the node returns them."""
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
    element_storages: Mapping[tuple[int, ...], int] = field(default_factory=dict, repr=False)
    """For a node that returns several tensors, the storage of each by its path."""

    def storages_at(self, path: tuple[int, ...]) -> frozenset[int]:
        """Storages of the element at ``path``; of everything that the node returns for ``()``."""
        if not path:
            return self.storages
        return frozenset(s for at, s in self.element_storages.items() if at[: len(path)] == path)


@dataclass(frozen=True)
class GraphFacts:
    """Facts about one graph. Owned by one program build; fake tensors in it are never run again."""

    graph_module: GraphModule
    nodes: Mapping[Node, NodeFacts]
    regions: Regions
    symbols: Mapping[sympy.Symbol, SymbolSpec]
    symbol_sources: Mapping[sympy.Symbol, tuple[Node, int | None]]
    """Where the value of a symbol comes from: a node that gives the integer, or a tensor node and its dimension."""
    input_storages: frozenset[int]
    """Storages that exist before the graph runs: graph inputs and constants."""
    needs_gradient: tuple[str, ...]
    """Names of the inputs through which a result would require gradients; () when none does."""
    example_inputs: Sequence[object] = field(default=(), repr=False)

    def spec(self, node: Node) -> TensorSpec | None:
        """Geometry of the node's value when it is one tensor, else None."""
        value = self.nodes[node].value
        if not isinstance(value, torch.Tensor):
            return None
        (storage,) = self.nodes[node].storages or (EFFECT,)
        return TensorSpec.of(value, storage)


def collect_facts(graph_module: GraphModule, example_inputs: Sequence[object]) -> GraphFacts:
    """Run ``graph_module`` on fake tensors and note what each node does.

    Args:
        graph_module: the graph as Dynamo made it; it is not changed.
        example_inputs: one per placeholder. Tensors may be real or fake; their contents are never read.

    Raises:
        SplitError: the graph has something that cannot be followed (tensor subclasses, unknown symbols).
    """
    return _Walk(graph_module, example_inputs).run()


class _OpRecorder(_compat.TorchDispatchMode):
    """Sees the ATen ops that one node runs: is one a matrix product, is one random, what do they write."""

    def __init__(self, storage_of: Callable[[torch.Tensor], int | None]) -> None:
        super().__init__()
        self._storage_of = storage_of
        self.clear()

    def clear(self) -> None:
        self.heavy = False
        self.random = False
        self.writes: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, _compat.OpOverload):
            name = str(_compat.schema_name(func)).split("::", 1)[1]
            if func.namespace == "aten":
                self.heavy |= name in _MATMUL_OPS
            self.random |= torch.Tag.nondeterministic_seeded in func.tags
            written: list[Any] = []
            for where in _compat.schema_writes(func):
                if isinstance(where, int):
                    written += args[where : where + 1]
                elif where in kwargs:
                    written.append(kwargs[where])
            if name in _UNDECLARED_WRITES:
                positions, flag = _UNDECLARED_WRITES[name]
                if len(args) > flag and args[flag]:
                    written += [args[position] for position in positions]
            for tensor in _tensors(written):
                if (storage := self._storage_of(tensor)) is not None:
                    self.writes.add(storage)
        return func(*args, **kwargs)


class _Walk:
    """One run of a graph on fake tensors."""

    def __init__(self, graph_module: GraphModule, example_inputs: Sequence[object]) -> None:
        self._module = graph_module
        self._example_inputs = example_inputs
        self._regions = find_regions(graph_module.graph)
        self._env = _compat.new_shape_env()
        self._fake_mode = _compat.FakeTensorMode(shape_env=self._env, allow_non_fake_inputs=True)
        self._facts: dict[Node, NodeFacts] = {}
        self._symbols: dict[sympy.Symbol, SymbolSpec] = {}
        self._symbol_sources: dict[sympy.Symbol, tuple[Node, int | None]] = {}
        self._from_outer: dict[sympy.Symbol, sympy.Expr] = {}
        self._storage_numbers: dict[int, int] = {}
        self._keep_alive: list[object] = []
        self._has_history = False

    def run(self) -> GraphFacts:
        placeholders = [node for node in self._module.graph.nodes if node.op == "placeholder"]
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
            stack.callback(_leave_functorch, _compat.functorch_level())
            stack.enter_context(_compat.enable_python_dispatcher())
            stack.enter_context(self._fake_mode)
            self._read_inputs(placeholders)
            recorder = stack.enter_context(_OpRecorder(self._known_storage))
            open_autocast: dict[Node, object] = {}
            stack.callback(_leave_autocast, open_autocast)
            for node in self._module.graph.nodes:
                if node.op == "get_attr":
                    self._facts[node] = self._read_attribute(node)
                elif is_autocast_enter(node):
                    open_autocast[node] = _compat.enter_autocast(*node.args)
                elif is_autocast_exit(node):
                    _compat.exit_autocast(open_autocast.pop(node.args[0]))  # type: ignore[index]
                elif getattr(node.target, "__name__", "") == "_set_grad_enabled":
                    _compat.set_grad_enabled(node.args[0])
                elif node.op.startswith("call_") and node not in self._regions.dropped:
                    self._facts[node] = self._run_node(node, recorder)
        return GraphFacts(
            graph_module=self._module,
            nodes=self._facts,
            regions=self._regions,
            symbols=self._symbols,
            symbol_sources=self._symbol_sources,
            input_storages=frozenset(
                storage
                for node, facts in self._facts.items()
                if node.op in ("placeholder", "get_attr")
                for storage in facts.storages
            ),
            needs_gradient=self._gradient_inputs(placeholders),
            example_inputs=self._example_inputs,
        )

    # ------------------------------------------------------------------ inputs

    def _read_inputs(self, placeholders: Sequence[Node]) -> None:
        examples = [
            node.meta.get("example_value", given)
            for node, given in zip(placeholders, self._example_inputs, strict=True)
        ]
        for node, example in zip(placeholders, examples, strict=True):
            if isinstance(example, torch.SymInt):
                expression = self._translate(example.node.expr, hint_of=example)
                self._facts[node] = NodeFacts(value=self._integer(expression))
                if isinstance(expression, sympy.Symbol):
                    self._symbol_sources.setdefault(expression, (node, None))
        real_storages: dict[int, int] = {}
        for node, example, given in zip(placeholders, examples, self._example_inputs, strict=True):
            if node in self._facts:
                continue
            if not isinstance(example, torch.Tensor):
                self._facts[node] = NodeFacts(value=example)
                continue
            if _compat.is_traceable_wrapper_subclass(example):
                raise SplitError(
                    f"graph input {node.name} is a tensor subclass ({type(example).__name__}); the backend "
                    f"follows plain tensors only, so the whole graph goes to stock Inductor"
                )
            fake = self._fake_input(node, example)
            number = self._number(fake)
            # Two inputs over one storage must count as one memory, or a write through one would go unseen.
            if isinstance(given, torch.Tensor) and not isinstance(given, _compat.FakeTensor):
                with contextlib.suppress(RuntimeError, NotImplementedError):
                    number = real_storages.setdefault(_compat.storage_identity(given), number)
                    self._storage_numbers[_compat.storage_identity(fake)] = number
            self._facts[node] = NodeFacts(fake, storages=frozenset((number,)), born=frozenset((number,)))

    def _fake_input(self, node: Node, example: torch.Tensor) -> torch.Tensor:
        if example.layout is not torch.strided:
            raise SplitError(
                f"graph input {node.name} has layout {example.layout}; the backend follows strided tensors only, "
                f"so the whole graph goes to stock Inductor"
            )
        geometry = [
            self._outer_integer(value) for value in (*example.shape, *example.stride(), example.storage_offset())
        ]
        rank = example.dim()
        shape, stride, offset = geometry[:rank], geometry[rank : 2 * rank], geometry[-1]
        with torch.no_grad():
            if offset == 0:
                fake = torch.empty_strided(shape, stride, dtype=example.dtype, device=example.device)
            else:
                extent = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1 + offset
                base = torch.empty((extent,), dtype=example.dtype, device=example.device)
                fake = base.as_strided(shape, stride, offset)
        for dim, value in enumerate(shape):
            if isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol):
                self._symbol_sources.setdefault(value.node.expr, (node, dim))
        if example.requires_grad and torch.is_grad_enabled():
            if example.grad_fn is not None:
                self._has_history = True
            else:
                fake.requires_grad_(True)
        return fake

    def _read_attribute(self, node: Node) -> NodeFacts:
        value = attribute(self._module, str(node.target))
        if not isinstance(value, torch.Tensor):
            return NodeFacts(value)
        fake = self._fake_mode.from_tensor(value, static_shapes=True)
        number = self._number(fake)
        return NodeFacts(fake, storages=frozenset((number,)), born=frozenset((number,)))

    # ------------------------------------------------------------------- nodes

    def _run_node(self, node: Node, recorder: _OpRecorder) -> NodeFacts:
        arguments = {n: self._facts[n].value for n in node.all_input_nodes if n in self._facts}
        before = _tensors(list(arguments.values()))
        versions = [tensor._version for tensor in before]
        shapes = [(tuple(tensor.shape), tuple(tensor.stride())) for tensor in before]
        recorder.clear()
        bodies = list(nested_graphs(node))
        try:
            value = self._call(node)
        except Exception as error:
            if not isinstance(node.target, _compat.HigherOrderOperator):
                raise SplitError(
                    f"node {node.name} ({op_name(node)}) could not be followed on fake tensors: {error}; the whole "
                    f"graph goes to stock Inductor"
                ) from error
            # Bodies of higher-order ops may need machinery of their own; Dynamo has already found their result, and
            # forbids them to return their inputs or views of these.
            value = _compat.tree_map(self._adopt, node.meta.get("example_value"))
        reads = {s for tensor in before if (s := self._known_storage(tensor)) is not None}
        writes = set(recorder.writes)
        for tensor, version in zip(before, versions, strict=True):
            if tensor._version != version and (storage := self._known_storage(tensor)) is not None:
                writes.add(storage)
        if "mutation" in op_name(node) and bodies == [] and isinstance(node.target, _compat.HigherOrderOperator):
            writes |= reads  # triton kernels and auto-functionalised ops: which argument is written is not told
        results = _tensors(value)
        known = set(self._storage_numbers.values())
        storages = {number for tensor in results if (number := self._number(tensor)) is not None}
        if recorder.random or (bodies and _has_random_op(bodies)):
            writes.add(RANDOM)
        if value is None and not writes:
            writes.add(EFFECT)
        self._keep_alive += [*results, value]
        self._note_new_symbols(node, value)
        same = [n for n, v in arguments.items() if v is value and isinstance(v, torch.Tensor)]
        return NodeFacts(
            value=value,
            storages=frozenset(storages),
            born=frozenset(storages - known),
            reads=frozenset(reads),
            writes=frozenset(writes),
            returns_argument=same[0] if same else None,
            heavy=recorder.heavy or _named_heavy(node) or any(_body_is_heavy(body) for body in bodies),
            reshapes_in_place=shapes != [(tuple(t.shape), tuple(t.stride())) for t in before],
            region=self._regions.bound.get(node),
            element_storages=dict(self._elements(value)) if isinstance(value, (tuple, list)) else {},
        )

    def _call(self, node: Node) -> Any:
        def value_of(n: Node) -> Any:
            return self._facts[n].value

        args = torch.fx.node.map_arg(node.args, value_of)
        kwargs = torch.fx.node.map_arg(node.kwargs, value_of)
        if node.op == "call_method":
            receiver, *rest = args
            return getattr(receiver, str(node.target))(*rest, **kwargs)
        if node.op == "call_module":
            return attribute(self._module, str(node.target))(*args, **kwargs)  # type: ignore[operator]
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _adopt(self, value: Any) -> Any:
        """Rebuild a value of Dynamo's fake mode in ours."""
        if isinstance(value, torch.Tensor):
            shape = [self._outer_integer(size) for size in value.shape]
            stride = [self._outer_integer(step) for step in value.stride()]
            return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
        return self._outer_integer(value) if isinstance(value, torch.SymInt) else value

    # ----------------------------------------------------------------- symbols

    def _outer_integer(self, value: int | torch.SymInt) -> int | torch.SymInt:
        if not isinstance(value, torch.SymInt):
            return value
        return self._integer(self._translate(value.node.expr, hint_of=value))

    def _translate(self, expression: sympy.Expr, hint_of: torch.SymInt) -> sympy.Expr:
        """Rewrite an expression over Dynamo's symbols into one over ours, making the symbols that are new."""
        for symbol in sorted(expression.free_symbols, key=str):
            if symbol in self._from_outer:
                continue
            if symbol is not expression:
                bare = hint_of.node.shape_env.create_symintnode(symbol, hint=_hint_in(hint_of, symbol))
            else:
                bare = hint_of
            lower, upper = _compat.symbol_range(bare)
            hint = _compat.symint_hint(bare)
            private = _compat.new_symbol(self._env, str(symbol), hint, lower, upper).node.expr
            self._from_outer[symbol] = private
            if isinstance(private, sympy.Symbol):
                self._symbols[private] = SymbolSpec(private, hint, lower, upper)
        return expression.xreplace(self._from_outer)

    def _integer(self, expression: sympy.Expr) -> int | torch.SymInt:
        hints = {symbol: spec.hint for symbol, spec in self._symbols.items()}
        known = all(hints.get(symbol) is not None for symbol in expression.free_symbols)
        hint = int(_compat.build_expression(expression, hints)) if known else None
        return _compat.symint_from_expression(self._env, expression, hint)

    def _note_new_symbols(self, node: Node, value: Any) -> None:
        """Remember where symbols that are born in the graph (by ``item``, ``nonzero``) get their value."""
        if isinstance(value, (torch.SymInt, torch.SymFloat)):
            expression = value.node.expr
            if isinstance(expression, sympy.Symbol) and expression not in self._symbol_sources:
                self._symbol_sources[expression] = (node, None)
                if isinstance(value, torch.SymInt):
                    self._symbols[expression] = SymbolSpec(expression, None, *_compat.symbol_range(value))
        elif isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                expression = as_dim(size)
                if isinstance(expression, sympy.Symbol) and expression not in self._symbol_sources:
                    self._symbol_sources[expression] = (node, dim)
                    self._symbols[expression] = SymbolSpec(expression, None, *_compat.symbol_range(size))  # type: ignore[arg-type]

    # ---------------------------------------------------------------- storages

    def _number(self, tensor: torch.Tensor) -> int:
        identity = _compat.storage_identity(tensor)
        self._keep_alive.append(tensor)
        return self._storage_numbers.setdefault(identity, len(self._storage_numbers))

    def _elements(self, value: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], int]]:
        if isinstance(value, (tuple, list)):
            for index, item in enumerate(value):
                yield from self._elements(item, (*path, index))
        elif isinstance(value, torch.Tensor):
            yield path, self._number(value)

    def _known_storage(self, tensor: torch.Tensor) -> int | None:
        try:
            return self._storage_numbers.get(_compat.storage_identity(tensor))
        except (RuntimeError, NotImplementedError):
            return None

    def _gradient_inputs(self, placeholders: Sequence[Node]) -> tuple[str, ...]:
        (output,) = (node for node in self._module.graph.nodes if node.op == "output")
        results = _tensors([self._facts[node].value for node in output.all_input_nodes if node in self._facts])
        written = {s for facts in self._facts.values() for s in facts.writes}
        results += [
            tensor
            for node in placeholders
            if self._facts[node].storages & written
            for tensor in _tensors(self._facts[node].value)
        ]
        if not self._has_history and not any(tensor.grad_fn is not None for tensor in results):
            return ()
        return tuple(
            node.name
            for node, given in zip(placeholders, self._example_inputs, strict=True)
            if isinstance(given, torch.Tensor) and given.requires_grad
        )


def _hint_in(value: torch.SymInt, symbol: sympy.Symbol) -> int | None:
    environment = value.node.shape_env
    hints = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
    hint = hints.get(symbol)
    return None if hint is None else int(hint)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in _compat.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _named_heavy(node: Node) -> bool:
    if node.op == "call_module":
        return True
    return is_custom_op(node) and named_like_matmul(op_name(node))


def _body_is_heavy(body: GraphModule) -> bool:
    return any(
        named_like_matmul(op_name(node)) or any(_body_is_heavy(inner) for inner in nested_graphs(node))
        for node in body.graph.nodes
        if node.op.startswith("call_")
    )


def _has_random_op(bodies: Sequence[GraphModule]) -> bool:
    words = ("rand", "dropout", "bernoulli", "multinomial", "normal")
    return any(
        any(word in op_name(node) for word in words) or _has_random_op(list(nested_graphs(node)))
        for body in bodies
        for node in body.graph.nodes
    )


def _leave_functorch(level: int) -> None:
    while _compat.functorch_level() > level:
        _compat.pop_functorch_level()


def _leave_autocast(open_autocast: dict[Node, object]) -> None:
    while open_autocast:
        _compat.exit_autocast(open_autocast.popitem()[1])

"""What each graph input is, and how that is known: the token count, proxies, per-token tensors, parameters, state."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import sympy
import torch
from torch.fx import Node

from ..utils import torch_compat
from .analysis import GraphFacts
from .sources import AccessPath, argument_path, readable
from .specs import Dim, ObjectSpec, SymbolSpec, TensorSpec, as_dim, symbols_of

InputKind = Literal["token-count", "stage-input", "per-token", "parameter", "state", "other-tensor", "scalar"]

_SURE_NAMES = ("input_ids", "inputs_embeds", "hidden_states", "positions", "position_ids", "input_embeds", "tokens")
_PER_TOKEN_NAMES = (*_SURE_NAMES, "x")
"""Names that engines and Hugging Face give to per-token inputs, the surest first; the last one says little."""

_REGISTERED = ("_modules", "_parameters", "_buffers")


@dataclass(frozen=True)
class GraphInput:
    """One placeholder of the graph. Owns no memory."""

    name: str
    """Name of the placeholder."""
    source: str
    """Where Dynamo takes it from, as a Python expression in the traced frame; "" when it did not say."""
    label: str
    """The last component of the source: the name of the argument, dict entry or attribute."""
    kind: InputKind
    reason: str
    spec: TensorSpec | None
    """Geometry of a tensor; None for numbers."""
    expression: Dim | ObjectSpec | None = None
    """Symbol or value of an integer, or an object; None for tensors."""
    token_dim: int | None = None
    """The dimension that counts tokens, for stage inputs and per-token tensors."""
    readable: str = ""
    """The source for readers: ``self.layers.0.weight``."""

    @property
    def outlives_the_call(self) -> bool:
        return self.kind in ("parameter", "state")


@dataclass(frozen=True)
class InputTable:
    """All inputs of one graph, in order, and what counts its tokens."""

    inputs: tuple[GraphInput, ...]
    token_count: Dim | None
    """The symbol that counts tokens, the number itself in a static graph, or None when no input says it."""
    token_reason: str
    unmatched_stage_inputs: tuple[str, ...]
    """Registered names that no input of this graph has."""
    equal_symbols: Mapping[sympy.Symbol, sympy.Symbol] = field(default_factory=dict)
    """Symbol of an input's rows -> the token count, where the graph itself does not say that they agree. Opaque ops
    leave that open; each call has to check it."""
    equal_rows: tuple[tuple[int, int], ...] = ()
    """Positions of the inputs to check, and the dimension that must have the size of the token count."""
    likely_equal: tuple[sympy.Symbol, ...] = ()
    """Other sizes that were the token count in the traced call, of tensors that seem to be per-token."""
    likely_fixed: tuple[sympy.Symbol, ...] = ()
    """Strides of such tensors that seem to be those of one buffer, of which each call takes a slice."""
    may_lack_tokens: bool = False
    """Whether ``token_count`` is a number, the size of a static graph, that may well count something else."""

    @cached_property
    def tensors(self) -> tuple[int, ...]:
        """Positions of all tensors."""
        return tuple(at for at, i in enumerate(self.inputs) if i.spec is not None)

    @cached_property
    def but_parameters(self) -> tuple[int, ...]:
        """Positions of the tensors of which nobody compares the addresses from call to call."""
        return tuple(at for at in self.tensors if self.inputs[at].kind != "parameter")

    @cached_property
    def passed_in_the_call(self) -> tuple[int, ...]:
        """Positions of the tensors that do not outlive the call, as weights and state do."""
        return tuple(at for at in self.tensors if not self.inputs[at].outlives_the_call)

    def with_checked_rows(self) -> InputTable:
        """The same, with rows that each call has to check. Dynamo guards them, but an engine may drop all guards."""
        rows = [(at, i.token_dim) for at, i in enumerate(self.inputs) if i.token_dim is not None]
        return replace(self, equal_rows=tuple(rows))

    def of_kind(self, kind: InputKind) -> tuple[GraphInput, ...]:
        return tuple(graph_input for graph_input in self.inputs if graph_input.kind == kind)


@dataclass(frozen=True)
class _Candidate:
    node: Node
    source: str
    readable: str
    path: AccessPath
    label: str
    spec: TensorSpec | None
    in_module: bool
    """Whether it belongs to a module: a parameter, a buffer, or any other tensor that hangs on it."""
    is_stage_input: bool
    tail_rank: int | None
    """Of a stage input: how many dimensions it was declared to have after the token dimension, if it was."""


def classify_inputs(facts: GraphFacts, tail_ranks: Mapping[str, int | None]) -> InputTable:
    """Find the kind of each placeholder of ``facts.graph_module``.

    Args:
        tail_ranks: names of the stage inputs, matched on the last component of an input's source -> how many
            dimensions come after the token dimension; None where nobody declared it.
    """
    candidates = _candidates(facts, tail_ranks)
    equal = _equal_symbols(facts, candidates)
    if equal:
        facts = facts.with_equal_symbols(equal)
        candidates = _candidates(facts, tail_ranks)
    token_count, token_reason = _token_count(facts, candidates)
    inputs = tuple(_classify(facts, c, token_count) for c in candidates)
    certain = {*tail_ranks, *_SURE_NAMES}
    may_lack_tokens = isinstance(token_count, int) and certain.isdisjoint(
        i.label for i in inputs if i.token_dim is not None
    )
    if may_lack_tokens:
        token_reason += ", which may count something else: no capture is refused for its size"
    likely_equal = _likely_equal(facts, candidates, token_count)
    found = {c.label for c in candidates if c.is_stage_input}
    table = InputTable(
        inputs,
        token_count,
        token_reason,
        tuple(n for n in tail_ranks if n not in found),
        equal,
        (),
        likely_equal,
        _likely_fixed(facts, candidates, {token_count, *equal, *likely_equal}),
        may_lack_tokens,
    )
    return table.with_checked_rows() if equal else table


def _classify(facts: GraphFacts, candidate: _Candidate, token_count: Dim | None) -> GraphInput:
    def result(kind: InputKind, reason: str, **more: Any) -> GraphInput:
        return GraphInput(
            candidate.node.name,
            candidate.source,
            candidate.label,
            kind,
            reason,
            candidate.spec,
            readable=candidate.readable,
            **more,
        )

    spec = candidate.spec
    if spec is None:
        value = facts.nodes[candidate.node].value
        if isinstance(value, ObjectSpec):
            return result("scalar", "an object, compared in each call", expression=value)
        expression = as_dim(value) if isinstance(value, torch.SymInt) else value
        if isinstance(expression, sympy.Symbol):
            expression = facts.equal_symbols.get(expression, expression)
        if isinstance(expression, sympy.Symbol) and expression == token_count:
            return result("token-count", "sizes the token dimension", expression=expression)
        return result("scalar", "a number that is no token count", expression=expression)
    token_dim = _dim_of(candidate, spec, token_count)
    is_written = spec.storage in facts.written
    if candidate.is_stage_input:
        also = " and written by the graph" if is_written else ""
        return result("stage-input", f"registered as {candidate.label!r}{also}", token_dim=token_dim)
    if torch_compat.is_python_float(candidate.node):
        return result("scalar", "a Python float, which Dynamo passes as a 0-d tensor")
    what = _member_kind(candidate) if candidate.in_module else ""
    if is_written:
        return result("state", f"{what} that the graph writes" if what else "the graph writes it")
    # A static size matches by chance all too often; then only what is passed to forward itself counts.
    is_certain = not isinstance(token_count, int) or (not what and _is_passed_itself(candidate.path))
    if token_dim is not None and is_certain:
        return result("per-token", f"dimension {token_dim} is the token count", token_dim=token_dim)
    return result("parameter", what) if what else result("other-tensor", "no dimension is the token count")


# ------------------------------------------------------------------------------- token count


def _token_count(facts: GraphFacts, candidates: Sequence[_Candidate]) -> tuple[Dim | None, str]:
    """The size that counts tokens: of the stage inputs or, without any, of the per-token inputs."""
    if stage := [c for c in candidates if c.is_stage_input]:
        found = [(_token_dim_size(c), c) for c in stage]
        sizes = {size for size, _ in found}
        if len(sizes) > 1:
            shapes = ", ".join(f"{c.label} {c.spec}" for _, c in found)
            return None, f"the stage inputs disagree on the token dimension: {shapes}"
        (size,) = sizes
        return size, _token_reason(facts, size, stage[0])

    def order(candidate: _Candidate) -> tuple[int, int]:
        if candidate.label in _PER_TOKEN_NAMES:
            return 0, _PER_TOKEN_NAMES.index(candidate.label)
        # What is passed as such comes before what is nested, and of these what varies first.
        return 1 if len(candidate.path) == 1 else 2, not isinstance(_token_dim_size(candidate), sympy.Symbol)

    for candidate in sorted(_only_read(facts, candidates), key=order):
        if (size := _token_dim_size(candidate)) is not None:
            return size, _token_reason(facts, size, candidate)
    return None, "no stage input and no per-token input was found"


def _equal_symbols(facts: GraphFacts, candidates: Sequence[_Candidate]) -> dict[sympy.Symbol, sympy.Symbol]:
    """Symbols of the stage inputs' rows that had the same value while tracing -> the first of them.

    Of unbacked symbols no value is known; then inputs with the names of per-token ones count too.
    """
    stage = [c for c in candidates if c.is_stage_input]
    named = [c for c in _only_read(facts, candidates) if c.label in _SURE_NAMES and not c.is_stage_input]
    unbacked = {symbol for symbol, spec in facts.symbols.items() if spec.hint is None}
    if unbacked.issuperset(_token_dim_size(c) for c in (*stage, *named)):
        stage += named
    sizes = list(dict.fromkeys(_token_dim_size(candidate) for candidate in stage))
    symbols = [size for size in sizes if isinstance(size, sympy.Symbol) and size in facts.symbols]
    if len(symbols) < 2 or len(symbols) < len(sizes) or len({facts.symbols[s].hint for s in symbols}) > 1:
        return {}
    return dict.fromkeys(symbols[1:], symbols[0])


def _likely_equal(
    facts: GraphFacts, candidates: Sequence[_Candidate], token_count: Dim | None
) -> tuple[sympy.Symbol, ...]:
    """See ``InputTable.likely_equal``: of arguments and attributes of modules, in which nothing else varies."""
    if not isinstance(token_count, sympy.Symbol) or facts.symbols[token_count].hint is None:
        return ()
    excluded = {token_count}
    for c in candidates:
        if c.spec is not None and (c.spec.storage in facts.written or len(symbols_of(c.spec.shape)) > 1):
            excluded |= c.spec.symbols
    passed = [c for c in candidates if c.path[-2:-1] == ("size",) and _may_count_tokens(c)]
    sizes = dict.fromkeys(facts.expression(facts.nodes[c.node].value) for c in passed)
    hint, bounds = facts.symbols[token_count].hint, _bounds(facts.symbols[token_count])
    found = []
    for size in sizes:
        spec = None if size in excluded else facts.symbols.get(size)
        # Dynamo refuses to narrow bounds that the user gave.
        if spec is not None and spec.hint == hint and (not bounds or _bounds(spec) in ((), bounds)):
            bounds = bounds or _bounds(spec)
            found.append(size)
    return tuple(found)


def _likely_fixed(
    facts: GraphFacts, candidates: Sequence[_Candidate], counts: Collection[Dim | None]
) -> tuple[sympy.Symbol, ...]:
    """See ``InputTable.likely_fixed``: of tensors in which nothing varies but the token count and the stride.

    Dynamo gives a stride that no size explains, as of ``[3, tokens]`` cut from ``[3, most]``, a symbol of its own.
    """
    found: dict[sympy.Symbol, None] = {}
    excluded: set[sympy.Symbol] = set()
    for c in candidates:
        if c.spec is not None:
            strides = symbols_of(c.spec.stride) - symbols_of(c.spec.shape)
            is_per_token = bool(symbols_of(c.spec.shape)) and symbols_of(c.spec.shape) <= set(counts)
            if is_per_token and c.spec.storage not in facts.written and not c.is_stage_input:
                found |= dict.fromkeys(sorted(strides, key=str))
            else:
                excluded |= strides
            excluded |= symbols_of((*c.spec.shape, c.spec.storage_offset))
    known = (s for s in found if s not in excluded and s in facts.symbols)
    return tuple(s for s in known if facts.symbols[s].hint is not None)


def _may_count_tokens(size: _Candidate) -> bool:
    path = size.path[:-2]  # of the tensor
    return _is_passed_itself(path) or (size.in_module and isinstance(path[-1], str))


def _bounds(spec: SymbolSpec) -> tuple[int | None, ...]:
    """The range of a size; () if it is that of every size which varies."""
    return () if (spec.lower or 0) <= 2 and spec.upper is None else (spec.lower, spec.upper)


def _only_read(facts: GraphFacts, candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """The tensors that the caller passes and the graph does not write."""
    return [c for c in candidates if c.spec is not None and not c.in_module and c.spec.storage not in facts.written]


def _token_dim_size(candidate: _Candidate) -> Dim | None:
    """Size of the dimension that counts tokens in a proxy or per-token input; None if it is no bare symbol."""
    assert candidate.spec is not None
    dim = _usual_token_dim(candidate, candidate.spec)
    size = None if dim is None else candidate.spec.shape[dim]
    return size if isinstance(size, (int, sympy.Symbol)) else None


def _usual_token_dim(candidate: _Candidate, spec: TensorSpec) -> int | None:
    """The dimension that counts tokens, or usually does.

    If a ``Proxy`` declares what comes after it, that decides. Else it is the last one that varies, as the sequence in
    ``[batch, tokens, hidden]``; if none does, the one before the hidden size (stage inputs, floats) or the last one
    (ids and positions).
    """
    rank = len(spec.shape)
    if candidate.tail_rank is not None and candidate.tail_rank < rank:
        return rank - 1 - candidate.tail_rank
    varying = [dim for dim, size in enumerate(spec.shape) if not isinstance(size, int)]
    if varying:
        return varying[-1]
    if rank == 0:
        return None
    has_hidden_size = rank > 1 and (candidate.is_stage_input or spec.dtype.is_floating_point)
    return rank - 2 if has_hidden_size else rank - 1


def _dim_of(candidate: _Candidate, spec: TensorSpec, token_count: Dim | None) -> int | None:
    """The dimension of a tensor that is the token count, if any; several may be where sizes are static."""
    dims = [dim for dim, size in enumerate(spec.shape) if size == token_count]
    usual = _usual_token_dim(candidate, spec)
    return usual if usual in dims else next(iter(dims), None)


def _token_reason(facts: GraphFacts, size: Dim | None, candidate: _Candidate) -> str:
    where = f"{candidate.label} {candidate.spec}"
    if size is None:
        return f"{where} has no dimension that could count tokens"
    if isinstance(size, int):
        return f"static {size}, from {where}"
    others = sorted({str(s) for s in candidate.spec.symbols if s != size} if candidate.spec is not None else set())
    also = f"; {', '.join(others)} varies too" if others else ""
    return f"{facts.symbols.get(size, size)}, from {where}{also}"


def _is_passed_itself(path: AccessPath) -> bool:
    """Whether it is an argument of forward, and not a part of one."""
    return len(path) < 2 or path[-1] in _PER_TOKEN_NAMES


def _candidates(facts: GraphFacts, tail_ranks: Mapping[str, int | None]) -> list[_Candidate]:
    frame = torch_compat.frame_being_compiled()
    sources = {
        node: torch_compat.placeholder_source(node) or ""
        for node in facts.graph_module.graph.nodes
        if node.op == "placeholder"
    }
    paths = {node: argument_path(source, frame) for node, source in sources.items()}
    # Dynamo writes registered members as ``model._buffers['k']`` and plain attributes as ``model.k``, so one registered
    # member shows that everything under the same ``model`` belongs to a module, whatever the frame calls this.
    modules = {path[:i] for path in paths.values() for i, part in enumerate(path) if part in _REGISTERED and i > 0}
    modules.add(("self",))
    candidates = []
    for node, path in paths.items():
        source, spec = sources[node], facts.spec(node)
        label = next((str(part) for part in reversed(path) if isinstance(part, str)), node.name)
        if path and isinstance(path[-1], int):
            label = f"{label}[{path[-1]}]"
        in_module = _is_parameter(node) or any(path[:i] in modules for i in range(1, len(path)))
        is_stage_input = spec is not None and label in tail_ranks and not in_module
        tail_rank = tail_ranks[label] if is_stage_input else None
        text = readable(source, path, frame)
        candidates.append(_Candidate(node, source, text, path, label, spec, in_module, is_stage_input, tail_rank))
    return candidates


def _member_kind(candidate: _Candidate) -> str:
    if "_parameters" in candidate.path:
        return "module parameter"
    if _is_parameter(candidate.node):
        return "torch.nn.Parameter"
    return "module buffer" if "_buffers" in candidate.path else "attribute of a module"


def _is_parameter(node: Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.nn.Parameter)

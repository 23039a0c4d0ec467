"""What a step does beyond its geometry: whether it is random, what it writes, whether padded rows could change it.

Note [padding rules]
A piece may run on more rows than are real only if no real row changes, and this must be known:

R1  every tensor that crosses its border has the bare token count in its shape, or no token count at all;
R2  it writes nothing that outlives the call, stage inputs excepted;
R3  rows stay apart in each of its ops, by a rule for that op (see Note [rows stay apart]);
R4  it uses the token count as a size only, never as a value: not in ``x / n``, nor to build a mask.

Nor may it draw random numbers, as many as there are rows, or index by integers made from floats, which may be anything
in padded rows. What is proven so is then tried: padded rows are poisoned in ``padding_test.py``.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from ..utils import torch_compat
from .analysis import GraphFacts, leave_autocast
from .fx_utils import matching_pattern, op_name, op_names
from .partition import is_allocation
from .row_rules import (
    Call,
    has_odd_sizes,
    indices_of,
    makes_integers_from_floats,
    rule_for,
    uses_token_count,
    writes_rows_into_other_memory,
)
from .specs import Dim, FakeInputs, InputSpec, TensorSpec, symbols_of


@dataclass(frozen=True)
class Traits:
    """What capture and padding ask about one step."""

    random: bool = False
    """Whether it draws random numbers."""
    opaque: bool = False
    """Whether ops of other libraries than PyTorch's run in it, which may return other memory than they say."""
    writes: tuple[str, ...] = ()
    """Names of its inputs whose memory it writes."""
    written_storages: frozenset[int] = frozenset()
    """Storages of these inputs."""
    allocations: Mapping[str, TensorSpec] = field(default_factory=dict)
    """Uninitialised tensors made in the step that later steps read, by node name: usual for the output of attention."""
    uninitialised: tuple[bool, ...] = ()
    """For each output, whether its contents mean nothing."""


def token_dims(spec: TensorSpec, token_count: Dim | None) -> tuple[int, ...]:
    """The dimensions whose size is the bare token count, where that varies."""
    if not isinstance(token_count, sympy.Symbol):
        return ()
    return tuple(dim for dim, size in enumerate(spec.shape) if size == token_count)


class PaddedGraph(NamedTuple):
    """What the padding rules know of the graph that a step is from."""

    token_count: Dim | None
    stage_inputs: tuple[str, ...]
    row_wise_ops: tuple[str, ...]
    """Names or globs of the user's, besides ``ROW_WISE_OPS``."""
    verdicts: dict[object, str | None]
    """What the rules for ops said of equal steps before."""


class PaddedStep(NamedTuple):
    """A step as the padding rules look at it."""

    graph_module: GraphModule
    key: str
    """Equal for steps with equal meaning."""
    traits: Traits
    input_specs: Sequence[InputSpec]
    output_specs: Sequence[TensorSpec | None]
    graph: PaddedGraph

    @property
    def token_count(self) -> sympy.Symbol:
        assert isinstance(self.graph.token_count, sympy.Symbol)
        return self.graph.token_count


def padding_reason(step: PaddedStep) -> str | None:
    """Why a step must not run on padded rows; None if none of the real ones can change."""
    if not isinstance(step.graph.token_count, sympy.Symbol):
        return "the token count is static, so no call is padded"
    return next((reason for _, check in PADDING_RULES if (reason := check(step)) is not None), None)


def outliving_writes(traits: Traits, stage_inputs: Iterable[str]) -> list[str]:
    """Names of the inputs that a step writes and that outlive the call (R2)."""
    return [name for name in traits.writes if name not in stage_inputs]


def _randomness(step: PaddedStep) -> str | None:
    return "it draws random numbers, as many as there are rows" if step.traits.random else None


def _outliving_writes(step: PaddedStep) -> str | None:
    names = outliving_writes(step.traits, step.graph.stage_inputs)
    return f"R2: it writes {', '.join(names)}, which outlives the call" if names else None


def _uncuttable_border(step: PaddedStep) -> str | None:
    for spec in (*step.input_specs, *step.output_specs):
        if isinstance(spec, TensorSpec) and (why := _uncuttable(spec, step.token_count)):
            return f"R1: {spec} crosses its border, {why}"
    return None


def _uncuttable(spec: TensorSpec, token_count: sympy.Symbol) -> str | None:
    for size in spec.shape:
        if size != token_count and token_count in symbols_of((size,)):
            return f"whose size {size} is not the token count itself"
    if token_count in symbols_of((spec.storage_offset,)):
        return f"which begins at {spec.storage_offset} in its memory"
    return None


def _rows_that_mix(step: PaddedStep) -> str | None:
    dims = (isinstance(spec, TensorSpec) and token_dims(spec, step.token_count) for spec in step.input_specs)
    key, verdicts = (step.key, step.graph.row_wise_ops, *dims), step.graph.verdicts
    if key not in verdicts:
        verdicts[key] = _follow_ops(step)
    return verdicts[key]


def _follow_ops(step: PaddedStep) -> str | None:
    # Some ops fix symbolic sizes unless they are decomposed in Python [ran], which takes half as long again.
    reason, is_certain = _follow(step, in_python=False)
    return reason if is_certain else _follow(step, in_python=True)[0]


def _follow(step: PaddedStep, in_python: bool) -> tuple[str | None, bool]:
    """Why rows may mix in one of the ops, and whether they could all be followed up to there."""
    fakes = FakeInputs(step.input_specs, odd=True)
    token_count = fakes.private_symbol(step.token_count)
    if token_count is None:
        return None, True  # it takes no tokens, and makes none
    follow = _Follow(token_count, fakes)
    walk = _Walk(step.graph_module, follow, (*ROW_WISE_OPS, *step.graph.row_wise_ops))
    reason = None
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch_compat.private_tracing(fakes.fake_mode))
            stack.callback(torch_compat.leave_functorch, torch_compat.functorch_level())
            stack.callback(leave_autocast, walk.open_autocast)
            if in_python:  # made here: leaving ``inference_mode(False)`` restores which dispatch keys are set
                stack.enter_context(torch_compat.enable_python_dispatcher())
            stack.enter_context(fakes.fake_mode)
            stack.enter_context(follow)
            walk.run(*fakes.inputs)
    except _Refused as refused:
        reason = str(refused)
    except Exception as error:
        return f"R3: {follow.label} cannot be followed on fake tensors: {type(error).__name__}: {error}", False
    if not fakes.goes_one_way(step.token_count):
        return reason or "R4: the token count is used as a value: some op does something else at other sizes", False
    return reason, True


PADDING_RULES: tuple[tuple[str, Callable[[PaddedStep], str | None]], ...] = (
    ("random", _randomness),
    ("R2", _outliving_writes),
    ("R1", _uncuttable_border),
    ("ops", _rows_that_mix),
)
"""Name and check of each rule, in the order in which they are asked; the first that refuses says why."""


# ----------------------------------------------------------------------------- following the ops


ROW_WISE_OPS: tuple[str, ...] = (
    # What engines call their fused norms, activations and rotary embeddings, whichever library they come from.
    "*::*rms_norm*",
    "*::*rmsnorm*",
    "*::*silu_and_mul*",
    "*::*gelu*_and_mul*",
    "*::*rotary_embedding*",
    # vLLM: products on its packed or quantised weights, and experts.
    "_C::*scaled_mm*",
    "_C::*gemm*",
    "_C::onednn_mm",
    "_C::weight_packed_linear",
    "_C::cpu_fused_moe",
    "_C::*quant*",
    "_moe_C::topk_softmax",
    "vllm::moe_forward*",
    # Sums over tensor-parallel ranks.
    "vllm::all_reduce",
    "_C::shm_allreduce",
    "_C_custom_ar::*all_reduce*",
    "_c10d_functional::all_reduce*",
    "_c10d_functional::wait_tensor",
)
"""Custom ops in which rows stay apart, by name or glob; ``row_wise_ops`` adds to them."""


class _Refused(Exception):
    """An op does not let rows stay apart, or nobody says that it does; the message names it."""


class _Walk(Interpreter):
    """One run of a piece on fake tensors whose token count is a symbol."""

    def __init__(self, graph_module: GraphModule, follow: _Follow, row_wise_ops: Sequence[str]) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self.follow = follow
        self.open_autocast: dict[Any, object] = {}
        self._row_wise_ops = row_wise_ops

    def run_node(self, n: Node) -> Any:
        self.follow.label = op_name(n)
        self.follow.is_row_wise = matching_pattern(op_names(n), self._row_wise_ops) is not None
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.nn.functional.scaled_dot_product_attention:
            # Asked as a whole: of which ops it consists depends on the machine.
            op = torch.ops.aten.scaled_dot_product_attention.default
            return self.follow.checked(op, args, kwargs, _like_attention)
        if target in _ASKED_AS_A_WHOLE:
            op = _ASKED_AS_A_WHOLE[target]
            return self.follow.checked(op, args, kwargs, op)
        if isinstance(target, torch_compat.HigherOrderOperator) and target.name() in _RUN_THEIR_BODY:
            body, *rest = args
            inner = _Walk(body, self.follow, self._row_wise_ops)
            inner.open_autocast = self.open_autocast
            return inner.run(*rest)
        if target is torch.nn.functional.one_hot:
            self.follow.check_indices(args[:1])  # on fake tensors it compares, on real ones it indexes
        if target is torch_compat.enter_autocast:
            opened = torch_compat.enter_autocast(*args)
            self.open_autocast[opened] = opened
            return opened
        if target is torch_compat.exit_autocast:
            return torch_compat.exit_autocast(self.open_autocast.pop(args[0]))
        return super().call_function(target, args, kwargs)


def _like_attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A fake result of attention."""
    same = query.shape == value.shape
    return torch.empty_like(query) if same else query.new_empty(*query.shape[:-1], value.shape[-1])


_ASKED_AS_A_WHOLE = {
    torch.nn.functional.linear: torch.ops.aten.linear.default,
    **dict.fromkeys((operator.matmul, torch.matmul), torch.ops.aten.matmul.default),
}
"""Functions whose ops fold the sequences of a batch into one dimension with their tokens, and the op that is asked."""

_RUN_THEIR_BODY = frozenset({"tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint"})
"""Higher-order ops that run the graph that they take on their other arguments, and nothing else."""


class _Follow(torch_compat.TorchDispatchMode):
    """Asks, for each ATen op that a node runs, whether rows stay apart; see Note [rows stay apart]."""

    def __init__(self, token_count: sympy.Symbol, fakes: FakeInputs) -> None:
        super().__init__()
        self._token_count = token_count
        self._fakes = fakes
        self.label = ""
        """The op of the graph that runs, as messages name it."""
        self.is_row_wise = False
        self._asks = True
        self._from_floats: set[int] = set()
        """Ids of integer tensors that were made from floats."""
        self._keep_alive: list[Tensor] = []
        self._decompositions = torch_compat.decompositions()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.checked(func, args, kwargs or {}, func) if self._asks else func(*args, **(kwargs or {}))

    def checked(self, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], run: Callable[..., Any]) -> Any:
        """Run an op; ``run`` is what runs it, and none of the ops of which it consists is asked about.

        Raises:
            _Refused: rows may not stay apart in it.
        """
        self._asks = False
        try:
            # Which kernel a convolution takes depends on its sizes, and what it does not.
            is_convolution = torch_compat.schema_name(op) == "aten::convolution"
            with self._fakes.ignoring_conditions() if is_convolution else contextlib.nullcontext():
                result = run(*args, **kwargs)
        finally:
            self._asks = True
        call = Call(op, args, kwargs, result, self._token_count)
        if self.is_row_wise and call.is_custom:
            return result
        rule = None if call.is_custom else rule_for(call)
        if rule is None and (pieces := self._decompositions.get(op)) is not None:
            with self:
                return pieces(*args, **kwargs)
        self._note_integers(call)
        if uses_token_count(call):
            raise _Refused(f"R4: the token count is used as a value by {self.label}")
        if rule is None:
            raise _Refused(self._nobody_knows(call))
        self.check_indices(indices_of(call))
        if not rule(call) or has_odd_sizes(call) or writes_rows_into_other_memory(call):
            raise _Refused(f"tokens mix in {self.label}")
        return result

    def check_indices(self, indices: Sequence[Tensor]) -> None:
        """Refuse indices made from floats: poison would send them anywhere.

        On a GPU an index that is out of range ends all work of the process, so no test may try.
        """
        if any(id(index) in self._from_floats for index in indices):
            raise _Refused(f"padded rows may hold any float, and {self.label} index by them")

    def _nobody_knows(self, call: Call) -> str:
        if call.is_custom:
            return (
                f"R3: rows may mix in the custom op {self.label}; name it in row_wise_ops if each row of its results "
                f"is made from the same row of its arguments only"
            )
        part = "" if call.name == self.label else f" in {self.label}"
        return f"R3: no rule says whether rows stay apart in aten::{call.name}{part}"

    def _note_integers(self, call: Call) -> None:
        takes = any(id(tensor) in self._from_floats for tensor in call.tensors)
        for tensor in torch_compat.tensors_in(call.result):
            is_integer = not (tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool)
            if is_integer and (takes or makes_integers_from_floats(call)):
                self._from_floats.add(id(tensor))
                self._keep_alive.append(tensor)


# --------------------------------------------------------------------------------- reading nodes


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

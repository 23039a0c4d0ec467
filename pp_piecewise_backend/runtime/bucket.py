"""One bucket of a program: its captured graphs and the static memory they read, captured in a single pass.

Note [one pass per bucket]
All pieces of a bucket are captured in one pass over the program, in the order in which they replay. Memory whose last
reader has been captured serves what is captured later, of this bucket and of all others of the same stage; that is
sound only because a call replays in that very order and nothing but what it returns outlives it. An early step of the
next call may take it while results are being sent. So whatever lies in one storage with a result, such as what a piece
leaves for the next one and a view of it is returned, is in pools and blocks of its own, which only steps take that come
when results are written. A static result that lies elsewhere all the same is copied.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import fx

from ..compilation.padding_rules import token_dims
from ..compilation.specs import SymbolSpec, TensorSpec
from ..utils.addresses import MemoryMap, Span, overlap, span
from ..utils.reasons import Missed, Reason, miss
from . import padding_test
from .capture_plan import GraphPlan
from .cudagraphs.device import CapturedGraph, Device
from .cudagraphs.memory import (
    StaticTensor,
    assign,
    extent_bytes,
    geometry,
    like,
    memory_of,
    tensor_in,
    undo_writes,
    without_repeats,
)
from .hooks import Notice
from .instructions import Instruction, gather, run_steps
from .stage import StageMemory, first_found
from .warmup import Proofs

GRAPH_POOL, OUTPUT_POOL = "graphs", "outputs"
"""What makes memory of results has a pool of its own, see Note [one pass per bucket]."""

_LOG = logging.getLogger(__name__)


@dataclass
class Verdicts:
    """What the poison runs found for the pieces of one set of parameters (rule R3)."""

    by_step: dict[int, Reason | None] = field(default_factory=dict)
    """Step -> why it must not be padded; None if nothing was found."""
    tested_tokens: tuple[int, int] | None = None
    """Smallest and largest bucket in which all were tested: buckets between them need no test of their own."""
    mutations_checked: set[int] = field(default_factory=set)
    """Steps that were seen to leave their by-address inputs alone."""

    @property
    def refused(self) -> set[int]:
        """Steps that must not be padded."""
        return {step for step, reason in self.by_step.items() if reason is not None}

    def covers(self, bucket: int) -> bool:
        return self.tested_tokens is not None and self.tested_tokens[0] <= bucket <= self.tested_tokens[1]

    def extend_to(self, bucket: int) -> None:
        low, high = self.tested_tokens or (bucket, bucket)
        self.tested_tokens = (min(low, bucket), max(high, bucket))


class Hoisted(NamedTuple):
    """An eager step that takes its uninitialised output buffers after its arguments instead of making them."""

    call: Callable[..., Sequence[Any]]
    specs: tuple[TensorSpec, ...]
    """Of the buffers."""


class GivenBuffers(NamedTuple):
    """Static memory for the output buffers of an eager step."""

    call: Callable[..., Sequence[Any]]
    """The step, which takes them after its arguments."""
    buffers: list[StaticTensor]

    def views(self, num_tokens: int) -> list[torch.Tensor]:
        """What a call with so many real rows takes; nothing where a buffer would have other strides than traced."""
        found = [buffer.exact(num_tokens) for buffer in self.buffers]
        views = [view for view in found if view is not None]
        return views if len(views) == len(found) else []


@dataclass
class Bucket:
    """The captured graphs of one bucket, for one set of parameters."""

    tokens: int
    graphs: dict[int, CapturedGraph] = field(default_factory=dict)
    """Step -> its graph."""
    static: dict[int, StaticTensor] = field(default_factory=dict)
    """Register -> the memory in which captured pieces find or leave its value."""
    given_buffers: dict[int, GivenBuffers] = field(default_factory=dict)
    """Eager step -> the static output buffers that it is given."""
    obstacles: dict[int, Reason] = field(default_factory=dict)
    """Steps that could not be captured in this bucket."""
    fixed: tuple[Any, ...] = ()
    """Addresses, integers and objects at capture, in the order of ``GraphPlan.fixed_sources``."""
    memory: Sequence[weakref.ref[torch.UntypedStorage]] = ()
    """Of the tensors among these, which it does not keep alive."""
    calls: int = 0
    """Calls in which all that is captured could replay."""
    seconds: float = 0.0
    step_seconds: dict[int, float] = field(default_factory=dict)
    """How long each step took in the call that captured the bucket, replays included."""
    graph_bytes: int = 0
    static_memory: frozenset[Span] = frozenset()
    """Where captured pieces and eager steps of this bucket write."""
    taken_early: MemoryMap = field(default_factory=MemoryMap)
    """What of it a call may overwrite before the first step that writes results, see Note [one pass per bucket]."""
    overwritten: MemoryMap = field(default_factory=MemoryMap)
    """All memory that later calls overwrite: the static memory, and where stage inputs land."""
    proofs: Proofs | None = None
    """Of a full graph."""
    programs: OrderedDict[Any, Any] = field(default_factory=OrderedDict)
    """Flat programs, by number of tokens and what misses (see ``replay.py``); the one used last at the end."""

    def release(self) -> None:
        """See Note [release order]."""
        self.programs.clear()
        for graph in self.graphs.values():
            graph.release()
        self.graphs.clear()
        self.given_buffers.clear()
        self.static.clear()


def hoist_buffers(plan: GraphPlan) -> dict[int, Hoisted]:
    """The eager steps whose output buffers can be given to them: only captured pieces read what they write there."""
    found = {}
    for step, instruction in enumerate(plan.instructions):
        allocations = instruction.piece.traits.allocations
        wanted = {
            spec.storage
            for register, spec in zip(instruction.outputs, instruction.piece.output_specs, strict=True)
            if spec is not None and register in plan.captured_readers and spec.storage not in plan.result_storages
        }
        specs = {
            name: spec
            for name, spec in allocations.items()
            if spec.storage in wanted and spec.symbols <= {plan.token_symbol}
        }
        if specs:
            call = _with_given_buffers(instruction.piece.graph_module, list(specs))
            found[step] = Hoisted(call, tuple(specs.values()))
    return found


def _with_given_buffers(graph_module: fx.GraphModule, names: Sequence[str]) -> Any:
    """The step as a callable that takes these uninitialised tensors as further arguments instead of making them."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    given: dict[str, fx.Node] = {}
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for node in placeholders:
        copies[node] = graph.node_copy(node)
    for name in names:
        given[name] = graph.placeholder(f"given_{name}")
    for node in graph_module.graph.nodes:
        if node.op != "placeholder":
            copies[node] = given[node.name] if node.name in given else graph.node_copy(node, copies.__getitem__)
    return fx.GraphModule(graph_module, graph).forward


@dataclass
class _Lease:
    """Memory that must not be reused while one of these registers is still to be read."""

    place: Span
    registers: set[int]
    ends: list[Callable[[], None]]
    """What makes it free."""
    is_of_results: bool = False
    """Whether only steps that write results take it."""

    def end(self) -> None:
        for end in self.ends:
            end()


class BucketCapture:
    """Runs one call and captures a bucket on the way. The call's results are right whatever is captured."""

    def __init__(
        self,
        plan: GraphPlan,
        device: Device,
        memory: StageMemory,
        verdicts: Verdicts,
        tokens: int,
        hoisted: Mapping[int, Hoisted],
    ) -> None:
        self._plan = plan
        self._hoisted = hoisted
        self._device = device
        self._memory = memory
        self._verdicts = verdicts
        self.bucket = Bucket(tokens, proofs=Proofs() if plan.is_full else None)
        self._leases: list[_Lease] = []
        """Of all static memory, in the order in which it was taken: one place may serve one value after the other."""
        self._last_reader = {register: max(steps) for register, steps in plan.captured_readers.items()}
        self._registers: list[Any] = []
        self._real_tokens = 0
        self.copied_back = 0
        """Stage inputs that captured pieces wrote and that were copied back to where the caller has them."""

    def run(self, args: Sequence[Any], real_tokens: int, fixed: tuple[Any, ...]) -> tuple[Bucket, list[Any]]:
        """Capture every step that can be captured; the bucket and the graph's results come back.

        Args:
            fixed: see ``Bucket.fixed``.
        """
        started = time.perf_counter()
        plan, layout = self._plan, self._plan.layout
        self._real_tokens = real_tokens
        self._registers = layout.fill(args)
        pools = [self._pool(name) for name in (GRAPH_POOL, OUTPUT_POOL)]
        held_before = sum(pool.held_bytes for pool in pools)
        self.bucket.fixed = fixed
        self.bucket.memory = memory_of([args[at] for at in plan.address_positions])
        self._admit_inputs()
        needs_test = self._needs_test()

        def run_step(instruction: Instruction) -> Sequence[Any]:
            step = instruction.piece.index
            if step in plan.capturable:
                self._capture(step, instruction, needs_test)
            self._device.synchronize()
            began = time.perf_counter()
            may_replay = step in self.bucket.graphs and self._may_replay(step)
            outputs = (self._replay if may_replay else self._run_on_real_rows)(step, instruction)
            self._device.synchronize()
            self.bucket.step_seconds[step] = time.perf_counter() - began
            return outputs

        def end_leases(step: int, outputs: Sequence[Any]) -> None:
            for register in plan.instructions[step].ends:
                self._end(register)

        try:
            run_steps(plan.instructions, self._registers, run_step, end_leases)
            results = gather(layout.results, self._registers)
        except BaseException:
            self._end_all()
            self.bucket.release()
            raise
        self._end_all()
        if needs_test:
            self._verdicts.extend_to(self.bucket.tokens)
        self.bucket.static_memory = frozenset(lease.place for lease in self._leases)
        early = (lease.place for lease in self._leases if not lease.is_of_results)
        self.bucket.taken_early = MemoryMap(product(early, [None]))
        self.bucket.overwritten = MemoryMap(product((*self.bucket.static_memory, *plan.landing_spans), [None]))
        self.bucket.graph_bytes = max(0, sum(pool.held_bytes for pool in pools) - held_before)
        if self.bucket.proofs is not None:
            self.bucket.proofs.add(results, True, True)
        self.bucket.seconds = time.perf_counter() - started
        return self.bucket, results

    # ------------------------------------------------------------------- values and memory

    def _pool(self, name: str) -> Any:
        if name not in self._memory.pools:
            self._memory.pools[name] = self._device.new_pool()
        return self._memory.pools[name]

    def _pool_after(self, instruction: Instruction, given: Sequence[tuple[Notice, ...]]) -> Any:
        """For the part of a step after these notices, in order."""
        is_before_results = "results_are_written" in instruction.notices.difference(*given)
        has_results = instruction.piece.writes_stage_outputs and not is_before_results
        return self._pool(OUTPUT_POOL if has_results else GRAPH_POOL)

    def _static_tensor(self, spec: TensorSpec, block: torch.Tensor) -> StaticTensor:
        shape, stride = geometry(spec, self._plan.symbols(self.bucket.tokens))
        return self._placed(tensor_in(block, shape, stride, spec.dtype), spec, block)

    def _placed(self, tensor: torch.Tensor, spec: TensorSpec, block: torch.Tensor | None = None) -> StaticTensor:
        return StaticTensor(tensor, spec, token_dims(spec, self._plan.token_symbol), self._plan.symbols, block)

    def _take(self, register: int, spec: TensorSpec) -> StaticTensor:
        """Static memory for a value, until its last reader has run."""
        shape, stride = geometry(spec, self._plan.symbols(self.bucket.tokens))
        is_of_results = spec.storage in self._plan.result_storages
        memory = self._memory.result_blocks if is_of_results else self._memory.blocks
        block = memory.take(extent_bytes(shape, stride, spec.dtype), self._plan.device)
        static = self._static_tensor(spec, block)
        self.bucket.static[register] = static
        self._leases.append(_Lease(span(block), {register}, [lambda: memory.give_back(block)], is_of_results))
        return static

    def _lease_of(self, tensor: torch.Tensor) -> _Lease | None:
        """Who still reads the static memory that a tensor lies in."""
        where = span(tensor)
        return next((lease for lease in self._leases if lease.registers and overlap(lease.place, where)), None)

    def _end(self, register: int) -> None:
        for lease in self._leases:
            if register in lease.registers:
                lease.registers.discard(register)
                if not lease.registers:
                    lease.end()

    def _end_all(self) -> None:
        self._registers = []
        for lease in self._leases:
            lease.end()

    def _admit_inputs(self) -> None:
        """Bring the graph inputs that captured pieces read into static memory."""
        plan = self._plan
        for register, arrival in plan.arrivals.items():
            spec, value = plan.specs[register], self._registers[register]
            if arrival == "landing":
                assert plan.stage is not None
                block = plan.stage.landing(plan.inputs[register].label)
                self.bucket.static[register] = static = self._static_tensor(spec, block)
                if value.data_ptr() != static.tensor.data_ptr():
                    self._fill(static, value)
            elif arrival == "copied":
                self._fill(self._take(register, spec), value)

    def _fill(self, static: StaticTensor, value: torch.Tensor) -> None:
        rows = static.rows(self._real_tokens)
        if rows.shape != value.shape:
            # Its size is no bare token count (R1): nothing that reads it replays in this call, but what is captured
            # needs valid values.
            rows = without_repeats(rows)
            rows.copy_(value.reshape(-1)[:1].expand(rows.shape) if value.numel() else torch.zeros_like(rows))
            return
        assign(rows, value)
        for tail, first_row in static.tails(self._real_tokens):
            tail.copy_(first_row)

    # --------------------------------------------------------------------------- capturing

    def _needs_test(self) -> bool:
        plan, bucket = self._plan, self.bucket.tokens
        if plan.token_symbol is None or not plan.pads or self._verdicts.covers(bucket):
            return False
        return self._test_rows() is not None

    def _test_rows(self) -> int | None:
        """How many of the real rows the poison runs take for real; None where no call is ever padded."""
        plan = self._plan
        smallest = max(plan.smallest_tokens, plan.ladder.smallest_call(self.bucket.tokens))
        if smallest >= self.bucket.tokens:
            return None
        most = min(self._real_tokens, self.bucket.tokens - 1)
        return max(min(most, max(plan.smallest_tokens, self.bucket.tokens // 2)), 1)

    def _capture(self, step: int, instruction: Instruction, needs_test: bool) -> None:
        bucket, plan = self.bucket, self._plan
        is_examined = self._is_to_be_examined(step, needs_test)
        is_concluded = False
        verdict: Reason | None = None
        obstacle: Reason | None = None
        graph: CapturedGraph | None = None
        places: list[StaticTensor] = []
        try:
            inputs = inputs_as_wide_as_the_bucket(plan, bucket, instruction, self._registers)
            if not instruction.holds(inputs):
                raise Missed(miss("guard", f"the compiled code does not hold for sizes {instruction.sizes(inputs)}"))
            self._warm_up(step, instruction, inputs)
            if is_examined:
                verdict, is_concluded = self._examine(step, instruction, inputs), True
            pool = partial(self._pool_after, instruction)
            graph = self._device.capture(instruction.run_in_parts, inputs, pool([]), pool)
            places = self._places(graph, instruction)
        except Missed as missed:
            obstacle = missed.reason
        except Exception as error:
            # Out of memory, or an op that refuses a size for which nobody asked: the call goes on without this graph.
            obstacle = miss("capture-failed", f"{type(error).__name__}: {error}")
        concluded, verdicts, obstacles = zip(*plan.exchanged((is_concluded, verdict, obstacle)), strict=True)
        if all(concluded):
            self._verdicts.by_step[step] = first_found(verdicts)
        if (obstacle := first_found(obstacles)) is not None:
            bucket.obstacles[step] = obstacle
            if graph is not None:
                graph.release()
            return
        assert graph is not None
        bucket.graphs[step] = graph
        given = MemoryMap.of(inputs)  # what lies elsewhere, the graph allocated
        for index, (register, static) in enumerate(zip(instruction.outputs, places, strict=True)):
            bucket.static[register] = static
            if not static.tensor.numel():
                continue
            is_given, lease = given.holds(static.tensor), self._lease_of(static.tensor)
            if lease is not None:
                lease.registers.add(register)  # an alias: of an input, or of an output before it
            elif not is_given:
                lease = _Lease(span(static.tensor), {register}, [], instruction.piece.writes_stage_outputs)
                self._leases.append(lease)
            if lease is not None and not is_given:
                lease.ends.append(partial(graph.release_output, index))

    def _places(self, graph: CapturedGraph, instruction: Instruction) -> list[StaticTensor]:
        """Where the outputs of a graph lie; raises ``Missed`` where it has others than were traced."""
        places = []
        for register, output, spec in zip(
            instruction.outputs, graph.outputs, instruction.piece.output_specs, strict=True
        ):
            assert spec is not None
            shape, _ = geometry(spec, self._plan.symbols(self.bucket.tokens))
            if not isinstance(output, torch.Tensor) or tuple(output.shape) != shape or output.dtype != spec.dtype:
                graph.release()
                detail = f"output {register} is {described(output)} where {spec} was traced"
                raise Missed(miss("capture-failed", detail))
            places.append(self._placed(output, spec))
        return places

    def _is_to_be_examined(self, step: int, needs_test: bool) -> bool:
        if not self._plan.pads or self._plan.instructions[step].piece.padding_reason is not None:
            return False
        verdicts = self._verdicts.by_step
        return step not in verdicts or (needs_test and verdicts[step] is None)

    def _warm_up(self, step: int, instruction: Instruction, inputs: Sequence[Any]) -> None:
        """Run the piece once outside of a capture, leaving no trace, and see that it leaves alone what it should."""
        written = self._written_positions(step, instruction)
        given = [like(value) if at in written else value for at, value in enumerate(inputs)]
        before = []
        if step not in self._verdicts.mutations_checked:
            left_alone = [given[at] for at in self._seen_left_alone(instruction) if at not in written]
            before = [(value, value.clone()) for value in left_alone]
        self._device.warm_up(lambda: instruction.run(given))
        if undo_writes(before):
            raise Missed(miss("writes-state", "it writes an input although no op of it says so"))
        self._verdicts.mutations_checked.add(step)

    def _seen_left_alone(self, instruction: Instruction) -> list[int]:
        """Positions of the tensors of which it is seen that the step does not write them, unless it says so.

        A full graph beside pieces has all parameters of the stage, of which there is no room for copies: its pieces
        see to them.
        """
        arrivals = self._plan.arrivals if self._plan.is_beside_pieces else {}
        return [
            at
            for at, (source, spec) in enumerate(zip(instruction.arguments, instruction.piece.input_specs, strict=True))
            if isinstance(spec, TensorSpec) and (not isinstance(source, int) or arrivals.get(source) != "parameter")
        ]

    def _written_positions(self, step: int, instruction: Instruction) -> tuple[int, ...]:
        written = self._plan.written_registers[step]
        return tuple(at for at, register in enumerate(instruction.arguments) if register in written)

    def _examine(self, step: int, instruction: Instruction, inputs: Sequence[Any]) -> Reason | None:
        rows = self._test_rows()
        if rows is None:
            return None
        plan = self._plan
        symbol, specs = plan.token_symbol, instruction.piece.input_specs
        dims = [token_dims(spec, symbol) if isinstance(spec, TensorSpec) else () for spec in specs]

        def unpadded(values: Sequence[Any]) -> list[Any]:
            found: list[Any] = []
            for value, spec, token in zip(values, specs, dims, strict=True):
                if isinstance(spec, TensorSpec) and token:
                    shape, stride = geometry(spec, plan.symbols(rows))
                    copy = torch.empty_strided(shape, stride, dtype=spec.dtype, device=spec.device)
                    found.append(assign(copy, self._placed(value, spec).rows(rows)))
                else:
                    found.append(rows if isinstance(spec, SymbolSpec) and spec.symbol == symbol else value)
            return found

        trial = padding_test.Trial(
            call=instruction.run,
            call_unpadded=lambda values: instruction.run_where_valid(values)[0],
            input_token_dims=dims,
            output_token_dims=[token_dims(s, symbol) if s is not None else () for s in instruction.piece.output_specs],
            compared=[not meaningless for meaningless in instruction.piece.traits.uninitialised],
            written=self._written_positions(step, instruction),
            unpadded_inputs=unpadded,
        )
        why_not = self._device.warm_up(lambda: padding_test.examine(trial, inputs, rows))
        if why_not is None:
            return None
        _LOG.warning(
            "piece[%d] is not padded: by their rules its ops keep rows apart, yet %s. Unless row_wise_ops names an op "
            "wrongly, please report this.",
            instruction.piece.index,
            why_not,
        )
        return miss("padding-unsafe", why_not)

    # ----------------------------------------------------------------------------- running

    def _may_replay(self, step: int) -> bool:
        return self._real_tokens == self.bucket.tokens or may_pad(self._plan, self._verdicts, step) is None

    def _replay(self, step: int, instruction: Instruction) -> list[Any]:
        self.bucket.graphs[step].replay()
        for register in self._plan.written_registers[step]:
            self._copy_back(register)
        return [real_rows(self.bucket.static[register], self._real_tokens) for register in instruction.outputs]

    def _copy_back(self, register: int) -> None:
        value, static = self._registers[register], self.bucket.static.get(register)
        if static is not None and value.data_ptr() != static.tensor.data_ptr():
            value.copy_(static.rows(self._real_tokens))
            self.copied_back += 1

    def _run_on_real_rows(self, step: int, instruction: Instruction) -> list[Any]:
        plan = self._plan
        arguments = instruction.gather(self._registers)
        views: list[torch.Tensor] = []
        if step in self._hoisted:
            given = self.bucket.given_buffers[step] = self._given_buffers(instruction, self._hoisted[step])
            views = given.views(self._real_tokens)
        if views:
            outputs = self._hoisted[step].call(*arguments, *views)
        else:
            outputs, _ = instruction.run_where_valid(arguments)
        kept = []
        for register, output in zip(instruction.outputs, outputs, strict=True):
            kept.append(self._separated(register, output))
            self._admit(step, register, kept[-1])
        for register in plan.written_registers[step]:
            # Memory of what no captured piece reads any more may serve another value by now.
            static = self.bucket.static.get(register) if self._last_reader.get(register, -1) > step else None
            if static is not None and not shares_memory(self._registers[register], static.tensor):
                self._fill(static, self._registers[register])
        return kept

    def _given_buffers(self, instruction: Instruction, hoisted: Hoisted) -> GivenBuffers:
        """Static memory for the output buffers of an eager step, and for the values that lie in it."""
        buffers = []
        for spec in hoisted.specs:
            users = [
                (register, output_spec)
                for register, output_spec in zip(instruction.outputs, instruction.piece.output_specs, strict=True)
                if output_spec is not None and output_spec.storage == spec.storage
            ]
            static = self._take(users[0][0], spec)
            self._leases[-1].registers.update(register for register, _ in users)
            for register, output_spec in users:
                assert static.block is not None
                self.bucket.static[register] = self._static_tensor(output_spec, static.block)
            buffers.append(static)
        return GivenBuffers(hoisted.call, buffers)

    def _separated(self, register: int, output: Any) -> Any:
        """The output, copied if it lies in static memory although its facts say that it does not."""
        if not isinstance(output, torch.Tensor) or not output.numel():
            return output
        lease, spec = self._lease_of(output), self._plan.specs.get(register)
        if lease is None or spec is None:
            return output
        if any(self._plan.specs[other].storage == spec.storage for other in lease.registers):
            lease.registers.add(register)
            return output
        return like(output)

    def _admit(self, step: int, register: int, value: Any) -> None:
        """Bring a value that was made on the real rows to where captured pieces read it."""
        plan, last = self._plan, self._last_reader.get(register)
        if last is None or last <= step:
            return
        spec = plan.specs[register]
        shape, _ = geometry(spec, plan.symbols(self._real_tokens))
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape or value.dtype != spec.dtype:
            return  # its readers find no static input and say so
        static = self.bucket.static.get(register) or self._take(register, spec)
        if not shares_memory(value, static.tensor):
            self._fill(static, value)


# ----------------------------------------------------------------------- shared with ``replay.py``


def inputs_as_wide_as_the_bucket(
    plan: GraphPlan, bucket: Bucket, instruction: Instruction, registers: Sequence[Any]
) -> list[Any]:
    """The arguments with which a step is captured: static tensors, tensors read by address, the bucket's size."""
    inputs: list[Any] = []
    for source, spec in zip(instruction.arguments, instruction.piece.input_specs, strict=True):
        if isinstance(spec, SymbolSpec) and spec.symbol == plan.token_symbol:
            inputs.append(bucket.tokens)
            continue
        if not isinstance(spec, TensorSpec):
            inputs.append(bucket.fixed[plan.fixed_sources.index(source)])
            continue
        assert isinstance(source, int)
        if source in bucket.static:
            inputs.append(bucket.static[source].tensor)
        elif plan.arrivals.get(source) in ("parameter", "address", "constant"):
            inputs.append(registers[source])
        else:
            name = plan_name(plan, source)
            raise Missed(miss("unexpected-tensor", f"{name} was not of the traced size and dtype"))
    return inputs


def may_pad(plan: GraphPlan, verdicts: Verdicts, step: int) -> Reason | None:
    """Why a step does not replay in padded calls; None if it does."""
    if not plan.pads:
        return miss("padding-off")
    return plan.instructions[step].piece.padding_reason or verdicts.by_step.get(step)


def real_rows(static: StaticTensor, num_tokens: int) -> torch.Tensor:
    """The real rows with the strides that were traced: a view where it can have them, else a copy."""
    view = static.exact(num_tokens)
    if view is not None:
        return view
    rows = static.rows(num_tokens)
    shape, stride = geometry(static.spec, static.symbols(num_tokens))
    return assign(torch.empty_strided(shape, stride, dtype=rows.dtype, device=rows.device), rows)


def shares_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether writes to one of two tensors of the same value show in the other."""
    return one.data_ptr() == other.data_ptr()


def plan_name(plan: GraphPlan, register: int) -> str:
    return next((name for name, at in plan.layout.registers.items() if at == register), str(register))


def described(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__

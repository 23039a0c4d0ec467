"""The flat program of one bucket and one number of tokens: a list of bound steps, everything decided beforehand.

Which pieces replay, which run on the real rows, what is copied where, and all views are fixed when it is built. A call
fills a list of registers and walks the steps; it makes no tensor but what eager steps return and what the caller owns.
"""

from __future__ import annotations

import copy as shallow
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from itertools import product
from operator import attrgetter, is_
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from .. import errors
from ..utils.addresses import MemoryMap, Span, span
from ..utils.counters import Amounts
from ..utils.reasons import Missed, Reason, miss
from . import padding_test
from .bucket import Bucket, described, inputs_as_wide_as_the_bucket, plan_name, real_rows, shares_memory
from .capture_plan import GraphPlan
from .cudagraphs.memory import StaticTensor, like, without_repeats
from .hooks import StageListener
from .instructions import Instruction, picker, run_steps
from .ownership import results_in, shares_undeclared
from .tracing import Timeline, profiler_is_running, step_name, wrap

_NOTHING: Mapping[Any, Any] = MappingProxyType({})

_COUNTED = (
    *("eager_steps", "replays", "padded_tokens", "input_copies", "input_bytes_copied", "stage_inputs_in_place"),
    *("stage_input_copies", "border_copies", "output_copies", "foreign_captures"),
)


class StaticResults(NamedTuple):
    """Indices of results that later calls overwrite; those that share memory in eager are together."""

    early: Sequence[Sequence[int]]
    """Those that a step overwrites before the results of the last call have left, see ``Bucket.taken_early``."""
    others: Sequence[Sequence[int]]


def static_results(plan: GraphPlan, bucket: Bucket, results: Sequence[Any]) -> StaticResults:
    """Which of these results of a call lie in static memory of the bucket."""
    storages, inputs = plan.split.result_storages, plan.input_storages
    early = results_in(bucket.taken_early, results, storages, inputs) if bucket.taken_early else []
    others = results_in(bucket.overwritten, results, storages, inputs)
    return StaticResults(early, [members for members in others if members not in early])


class Call:
    """What one call of a program counts, and which of its stage inputs came from elsewhere.

    Most calls have nothing to say here, so all but the registers begin as values that the class holds.
    """

    foreign: Collection[int] = ()
    """Registers of the stage inputs that replays read and that did not lie in landing memory."""
    # Those of ``_COUNTED``; the first three are the same in all calls of a flat program in which nothing misses.
    eager_steps = 0
    replays = 0
    padded_tokens = 0
    input_copies = 0
    input_bytes_copied = 0
    stage_inputs_in_place = 0
    stage_input_copies = 0
    border_copies = 0
    output_copies = 0
    foreign_captures = 0
    misses: Mapping[Reason, int] = _NOTHING
    plain: Mapping[int, Sequence[Any]] = _NOTHING

    def __init__(self, registers: list[Any]) -> None:
        self.registers = registers

    @property
    def amounts(self) -> Amounts:
        """What it adds to the counters: the only place where a call of a split graph becomes numbers."""
        return _amounts(_counts_of(self))

    def note_miss(self, reason: Reason) -> None:
        """A piece that was to replay ran un-captured."""
        self.replays -= 1
        self.misses = {**self.misses, reason: self.misses.get(reason, 0) + 1}


_counts_of = attrgetter(*_COUNTED)


@lru_cache(1024)
def _amounts(counts: tuple[int, ...]) -> Amounts:
    """Made once for all calls that count the same."""
    return Amounts({"calls": 1, **{name: count for name, count in zip(_COUNTED, counts, strict=True) if count}})


class _Row(NamedTuple):
    """What the loop over the steps does next: ``replay()``, or else ``run(call)``, or else a body without a frame."""

    replay: Callable[[], None] | None = None
    run: Callable[..., Any] | None = None
    """Takes the call, or, where there is ``take``, what that picks from the registers."""
    take: Callable[[list[Any]], Sequence[Any]] | None = None
    given: torch.Tensor | None = None
    """What the body returns, as a rule: a buffer that it was given, and which only replays read."""
    keep: Callable[[Call, Sequence[Any]], None] | None = None
    """Takes the body's outputs where they are not what was given."""

    def shown_as(self, name: str, timeline: Timeline | None) -> _Row:
        def shown(call: Any) -> Any:
            return None if call is None else wrap(call, name, timeline)

        return self._replace(replay=shown(self.replay), run=shown(self.run))


class _Step:
    """What a flat program runs for one instruction. It does not hold the program, which holds it."""

    def __init__(self, program: FlatProgram, step: int) -> None:
        self.step = step
        self.instruction = program.plan.instructions[step]
        self.name = step_name(self.instruction.piece)

    def run(self, call: Call) -> None:
        raise NotImplementedError

    notices: Sequence[str] = ()
    """Those to the listener of the stage in the middle of it."""

    def row(self) -> _Row:
        return _Row(run=self.run)

    def rows(self, listener: StageListener | None) -> list[tuple[str | None, _Row]]:
        """With what a profiler shows; None for what is no step."""
        return [(self.name, self.row())]


class UnexpectedTensor(Missed):
    """An eager step gave a tensor that its captured readers cannot take; the rest of the call runs without graphs."""

    def __init__(self, step: int, detail: str) -> None:
        super().__init__(miss("unexpected-tensor", detail))
        self.step = step


class NoMemoryToCompare(Missed):
    """Of a full graph with its pieces; nothing but copies was written yet."""


class _Copy:
    """Brings a value from a register to static memory."""

    __slots__ = ("dtype", "lands", "num_bytes", "pointer", "register", "repeats", "rows", "shape", "stride", "tails")

    def __init__(self, register: int, static: StaticTensor, num_tokens: int, lands: bool = False) -> None:
        self.register = register
        self.lands = lands
        """Whether the static memory is the landing memory of a stage input."""
        rows = static.rows(num_tokens)
        self.rows = without_repeats(rows)
        self.repeats = self.rows.shape != rows.shape
        """Whether the value is one whose elements lie in memory several times, as ``expand`` makes them."""
        self.tails = static.tails(num_tokens)
        self.shape, self.dtype = rows.shape, rows.dtype
        traced = static.exact(num_tokens)  # unlike ``rows`` in the strides of dimensions of size 1
        self.pointer, self.stride = rows.data_ptr(), (rows if traced is None else traced).stride()
        self.num_bytes = self.rows.numel() * self.rows.element_size()

    def is_in_place(self, value: torch.Tensor) -> bool:
        return value.data_ptr() == self.pointer and value.stride() == self.stride

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"

    def fits(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.shape == self.shape and value.dtype is self.dtype

    def taken(self, value: torch.Tensor) -> torch.Tensor:
        """What of the value is to be copied to ``rows``."""
        return value[tuple(slice(size) for size in self.rows.shape)] if self.repeats else value

    def run(self, call: Call, value: torch.Tensor) -> None:
        if not self.is_in_place(value):
            self.rows.copy_(self.taken(value))
            if self.lands:
                call.stage_input_copies += 1
            else:
                call.input_copies += 1
                call.input_bytes_copied += self.num_bytes
        for tail, first_row in self.tails:
            tail.copy_(first_row)


class _Replay(_Step):
    """A replay, and what there is to do after it."""

    def __init__(self, program: FlatProgram, step: int) -> None:
        super().__init__(program, step)
        static = program.bucket.static
        self.num_tokens = program.num_tokens
        graph = program.bucket.graphs[step]
        self.replay, self.parts, self._borders = graph.replay, graph.parts, graph.borders
        written = [register for register in program.plan.written_registers[step] if register in static]
        self.back = [(register, static[register].rows(self.num_tokens)) for register in written]
        """Stage inputs that the piece writes: their registers, and where the truth is."""
        self.border: list[tuple[int, StaticTensor]] = []
        """Outputs that an eager step can only take as copies, see Note [strides of padded values]."""
        for register in self.instruction.outputs:
            if static[register].exact(self.num_tokens) is not None:
                program.template[register] = real_rows(static[register], self.num_tokens)
            elif register in program.plan.result_registers or register in program.last_use_outside:
                self.border.append((register, static[register]))
        if not (self.back or self.border):
            self.notices = [name for names in self._borders for name in names]

    def row(self) -> _Row:
        return super().row() if self.back or self.border else _Row(self.replay)

    def rows(self, listener: StageListener | None) -> list[tuple[str | None, _Row]]:
        if listener is None or not self.notices:
            return super().rows(listener)
        rows: list[tuple[str | None, _Row]] = []
        for number, part in enumerate(self.parts):
            rows += [(None, _Row(getattr(listener, name))) for name in (self._borders[number - 1] if number else ())]
            rows.append((f"{self.name}.part[{number}]", _Row(part)))
        return rows

    def run(self, call: Call) -> None:
        self.replay()
        for register, rows in self.back:
            if register in call.foreign:
                call.registers[register].copy_(rows)
                call.stage_input_copies += 1
        for register, static in self.border:
            call.registers[register] = real_rows(static, self.num_tokens)
            call.border_copies += 1


class _Output(NamedTuple):
    """Where an output of a step that runs on the real rows goes."""

    at: int
    register: int | None
    """None where nothing outside of graphs reads it."""
    copy: _Copy | None
    """To the static memory from which captured pieces read it."""
    given: torch.Tensor | None
    """The buffer that it is, if the step does with it what it did when it was traced."""


class _OnRealRows(_Step):
    """An eager step, or a piece that does not replay: it sees the real rows only."""

    def __init__(self, program: FlatProgram, step: int) -> None:
        super().__init__(program, step)
        plan, instruction = program.plan, self.instruction
        self.body: Callable[..., Any] | None = instruction.call if instruction.piece.kind == "eager" else None
        """What to run in place of the instruction; None where sizes decide whether the compiled code may run."""
        buffers: list[torch.Tensor] = []
        given = program.bucket.given_buffers.get(step)
        if given is not None and (buffers := given.views(program.num_tokens)):
            self.body = given.call
        first_buffer = len(program.template)
        program.template += buffers
        self.take = picker((*instruction.arguments, *range(first_buffer, len(program.template))))
        last = program.last_use_outside
        held = [register for register, at in last.items() if at == step and program.template[register] is None]
        self.outputs = []
        for at, register in enumerate(instruction.outputs):
            copy = program.copy_after(step, register)
            usual = [b for b in buffers if copy and copy.fits(b) and copy.is_in_place(b) and not copy.tails]
            self.outputs.append(_Output(at, None if register in held else register, copy, usual[-1] if usual else None))
        self.ends = tuple(register for register in held if register not in instruction.outputs)
        """Registers that nothing outside of graphs reads after this step."""
        copies = [program.copy_after(step, register) for register in plan.written_registers[step]]
        self.refreshed = [copy for copy in copies if copy is not None]
        """Of what it writes; into landing memory only where the caller's tensor lies elsewhere."""
        self.memory, self.specs = program.declared_memory, plan.specs
        self.is_opaque = instruction.piece.traits.opaque and any(out.register is not None for out in self.outputs)
        """Whether each call may keep an output in other memory than the last one."""
        self.copied_outputs: tuple[int, ...] | None = None
        """Outputs that lie in static memory although their facts say otherwise; None if a call has to look."""

    def row(self) -> _Row:
        if len(self.outputs) == 1 and not (self.body is None or self.refreshed or self.ends):
            output = self.outputs[0]
            if output.given is not None and output.register is None:
                return _Row(None, self.body, self.take, output.given, self.keep)
        return super().row()

    def run(self, call: Call) -> None:
        body = self.body
        self.keep(call, _run_where_valid(self.instruction, call) if body is None else body(*self.take(call.registers)))

    def keep(self, call: Call, outputs: Sequence[Any]) -> None:
        """Bring the outputs to where later steps read them."""
        registers = call.registers
        if self.copied_outputs != ():
            outputs = self._with_memory_of_their_own(outputs)
        for index, register, copy, given in self.outputs:
            output = outputs[index]
            if register is not None:
                registers[register] = output
            if copy is not None and output is not given:
                if not copy.fits(output):
                    raise self._unexpected(registers, outputs, f"gave {described(output)}, expected {copy}")
                copy.run(call, output)
        for copy in self.refreshed:
            if not copy.lands or copy.register in call.foreign:
                copy.run(call, registers[copy.register])
        for register in self.ends:
            registers[register] = None

    def _unexpected(self, registers: list[Any], outputs: Sequence[Any], what: str) -> UnexpectedTensor:
        for register, output in zip(self.instruction.outputs, outputs, strict=True):
            registers[register] = output
        return UnexpectedTensor(self.step, f"piece[{self.step}], an eager step, {what}")

    def _with_memory_of_their_own(self, outputs: Sequence[Any]) -> Sequence[Any]:
        copied = self.copied_outputs
        if copied is None:
            copied = self._hidden_aliases(outputs)
            self.copied_outputs = None if self.is_opaque else copied
        outputs = list(outputs)
        for index in copied:
            outputs[index] = like(outputs[index])
        return outputs

    def _hidden_aliases(self, outputs: Sequence[Any]) -> tuple[int, ...]:
        found = []
        for index, (register, output) in enumerate(zip(self.instruction.outputs, outputs, strict=True)):
            spec = self.specs.get(register)
            if spec is not None and shares_undeclared(output, spec.storage, self.memory):
                found.append(index)
        return tuple(found)


def _run_where_valid(instruction: Instruction, call: Call) -> Sequence[Any]:
    arguments = instruction.gather(call.registers)
    outputs, was_compiled = instruction.run_where_valid(arguments)
    if not was_compiled:
        call.plain = {**call.plain, instruction.piece.index: instruction.sizes(arguments)}
    return outputs


class FlatProgram:
    """What a call of ``num_tokens`` tokens runs in a bucket, given which steps do not replay."""

    def __init__(self, plan: GraphPlan, bucket: Bucket, num_tokens: int, misses: Mapping[int, Reason]) -> None:
        self.plan = plan
        self.bucket = bucket
        self.num_tokens = num_tokens
        self.replayed = frozenset(step for step in bucket.graphs if step not in misses)
        self.miss_counts: Mapping[Reason, int] = Counter(misses.values())
        """Why pieces do not replay, and how many for each reason."""
        self.merged_results: tuple[int, ...] | None = None
        """Results to be copied since they share memory that eager's do not; None before the first call."""
        self.last_reader = {
            register: max(reading)
            for register, steps in plan.captured_readers.items()
            if (reading := [step for step in steps if step in self.replayed])
        }
        self.last_use_outside = self._uses_outside()
        """Register of a value made in the call -> the last step that does not replay and uses it."""
        self.declared_memory = self._declared_memory()
        """Static memory and landing memory, with the storages that, by their facts, may lie in it."""
        self.template: list[Any] = plan.layout.fill([None] * len(plan.inputs))
        """What is in the registers before the first step; static output buffers of eager steps come after them."""
        arriving = [copy for register in plan.arrivals if (copy := self.copy_after(-1, register)) is not None]
        self.landing = [copy for copy in arriving if copy.lands]
        """Stage inputs, which need no copy where the caller passes the landing memory."""
        self.admitted = [copy for copy in arriving if not copy.lands]
        """Inputs that are always copied."""
        self.brought = (*self.admitted, *self.landing)
        """All inputs for which there is static memory."""
        self._admitted_rows = [copy.rows for copy in self.admitted]
        self._admitted_bytes = sum(copy.num_bytes for copy in self.admitted)
        self._tails = [pair for copy in self.brought for pair in copy.tails]
        steps = range(len(plan.instructions))
        self.bind([_Replay(self, at) if at in self.replayed else _OnRealRows(self, at) for at in steps])
        self._results = picker(plan.layout.results)
        self._made_in_call = self.template[len(plan.inputs) :]
        self._usual_results = self._results(self.template)
        """Those that are the same tensors in every call, as a rule all; None for the others."""
        self._usual_static_results = static_results(plan, bucket, self._usual_results)
        self._counted = (
            len(plan.instructions) - len(plan.compute_steps),
            len(self.replayed),
            bucket.tokens - num_tokens if self.replayed else 0,
        )

    # ------------------------------------------------------------------------- building

    def bind(self, steps: Sequence[_Step], may_release: bool = True) -> None:
        """Let calls run these steps, one per instruction.

        Args:
            may_release: whether the landing memory may be declared free before the end of the call.
        """
        self.steps = steps
        listener, boundary = self.plan.listener, self.plan.boundary
        self._named_rows: list[tuple[str | None, _Row]] = []
        """With what a profiler shows; None for what is no step."""
        for number, step in enumerate(steps):
            if listener is not None:
                if may_release and boundary.last_reader == number - 1:
                    self._named_rows.append((None, _Row(listener.landing_was_read)))
                if boundary.first_writer == number and "results_are_written" not in step.notices:
                    self._named_rows.append((None, _Row(listener.results_are_written)))
            self._named_rows += step.rows(listener)
        self._rows = [tuple(row) for _, row in self._named_rows]  # which a loop unpacks in half the time

    def copy_after(self, step: int, register: int) -> _Copy | None:
        """Brings a value to the static memory from which replays after a step read it; None if none does."""
        if self.last_reader.get(register, -1) <= step or register not in self.bucket.static:
            return None
        lands = self.plan.arrivals.get(register) == "landing"
        return _Copy(register, self.bucket.static[register], self.num_tokens, lands)

    def _declared_memory(self) -> MemoryMap:
        placed: list[tuple[Span, int | None]] = [(place, None) for place in self.bucket.static_memory]
        placed += [(span(static.tensor), static.spec.storage) for static in self.bucket.static.values()]
        return MemoryMap([*placed, *product(self.plan.landing_spans, self.plan.boundary.landing_storages)])

    def _uses_outside(self) -> dict[int, int]:
        given = len(self.plan.inputs) + len(self.plan.layout.constants)
        uses: dict[int, int] = {}
        for step, instruction in enumerate(self.plan.instructions):
            if step not in self.replayed:
                taken = [source if isinstance(source, int) else source[0] for source in instruction.arguments]
                uses.update(dict.fromkeys((*taken, *instruction.outputs), step))
        return {r: s for r, s in uses.items() if r >= given and r not in self.plan.result_registers}

    # --------------------------------------------------------------------------- running

    def admits(self, args: Sequence[Any]) -> bool:
        """Whether the inputs that would be copied have the sizes and dtypes that were captured."""
        for copy in self.brought:
            value = args[copy.register]
            if value.shape != copy.shape or value.dtype is not copy.dtype:
                return False
        return True

    def begin(self, args: Sequence[Any]) -> Call:
        """A call with these inputs, of which those are noted that must be brought to landing memory."""
        call = Call([*args, *self._made_in_call])
        call.eager_steps, call.replays, call.padded_tokens = self._counted
        call.foreign = [copy.register for copy in self.landing if not copy.is_in_place(args[copy.register])]
        call.stage_input_copies = foreign = len(call.foreign)
        call.stage_inputs_in_place = len(self.landing) - foreign
        return call

    def run(self, args: Sequence[Any], call: Call) -> list[Any]:
        """The graph's results, some of them in static memory."""
        registers = call.registers
        self._stage_inputs(args, call)
        rows: Sequence[Any] = self._watched_rows() or self._rows
        try:
            for replay, run, take, given, keep in rows:
                if replay is not None:
                    replay()
                elif take is None:
                    run(call)
                else:
                    outputs = run(*take(registers))
                    if outputs[0] is not given:
                        keep(call, outputs)
        except UnexpectedTensor as unexpected:
            self._finish_without_graphs(unexpected.step + 1, call, unexpected.reason)
        return list(self._results(registers))

    def static_results(self, results: Sequence[Any]) -> StaticResults:
        """Which results of a call lie in static memory."""
        if all(map(is_, results, self._usual_results)):
            return self._usual_static_results
        return static_results(self.plan, self.bucket, results)

    def _watched_rows(self) -> list[_Row] | None:
        """The rows as a profiler, or the timeline of the stage, shows them; None where neither is there."""
        listener = self.plan.listener
        timeline = None if listener is None else listener.timeline
        if timeline is None and not profiler_is_running():
            return None
        return [row if name is None else row.shown_as(name, timeline) for name, row in self._named_rows]

    def _stage_inputs(self, args: Sequence[Any], call: Call) -> None:
        """Bring the inputs that replays read to where they read them."""
        targets = self._admitted_rows
        values = [copy.taken(args[copy.register]) for copy in self.admitted]
        if targets:
            call.input_copies = len(targets)
            call.input_bytes_copied = self._admitted_bytes
        if call.foreign:
            copies = [copy for copy in self.landing if copy.register in call.foreign]
            targets = [*targets, *(copy.rows for copy in copies)]
            values += [copy.taken(args[copy.register]) for copy in copies]
        if len(targets) == 1:
            targets[0].copy_(values[0])
        elif targets:
            torch._foreach_copy_(targets, values)
        for tail, first_row in self._tails:
            tail.copy_(first_row)

    def _finish_without_graphs(self, first: int, call: Call, reason: Reason) -> None:
        registers = call.registers
        for register, static in self.bucket.static.items():
            if registers[register] is None:  # only replays were to read it
                registers[register] = real_rows(static, self.num_tokens)
        for step in self.replayed:
            if step >= first:
                call.note_miss(reason)
        run_steps(self.plan.instructions[first:], registers, lambda instruction: _run_where_valid(instruction, call))

    # ------------------------------------------------------------------------- verifying

    def run_verified(self, args: Sequence[Any], call: Call, report: Callable[[str], None]) -> list[Any]:
        """As ``run``, comparing each replay with its piece on the same inputs; differences go to ``report``."""
        steps = [_Verified(self, step, args, report) if isinstance(step, _Replay) else step for step in self.steps]
        twin = shallow.copy(self)
        twin.bind(steps, may_release=False)  # the comparison reads stage inputs again
        return twin.run(args, call)


class _Verified(_Step):
    """A replay next to its un-captured piece, bit for bit at the same bucket."""

    def __init__(
        self, program: FlatProgram, normal: _Replay, args: Sequence[Any], report: Callable[[str], None]
    ) -> None:
        super().__init__(program, normal.step)
        self.program, self.normal, self.args, self.report = program, normal, args, report

    @property
    def _written_positions(self) -> list[int]:
        written = self.program.plan.written_registers[self.step]
        return [at for at, source in enumerate(self.instruction.arguments) if source in written]

    def _expected(self, call: Call) -> list[Any]:
        """What the un-captured piece returns, and leaves in copies of what it writes.

        Raises:
            NoMemoryToCompare: there is none for it, and the graph gives way.
        """
        plan, instruction = self.program.plan, self.instruction
        try:
            inputs = inputs_as_wide_as_the_bucket(plan, self.program.bucket, instruction, call.registers)
            for at in self._written_positions:
                inputs[at] = like(inputs[at])
            expected = list(instruction.run(inputs)) + [inputs[at] for at in self._written_positions]
            # A copy, since a piece may return one of its inputs, which the replay may write.
            return [value.clone() if isinstance(value, torch.Tensor) else value for value in expected]
        except torch.OutOfMemoryError:
            if not plan.gives_way or not plan.is_held_alone:
                raise
            raise NoMemoryToCompare(miss("graph-memory", errors.NO_MEMORY_TO_COMPARE)) from None

    def run(self, call: Call) -> None:
        program, plan, bucket = self.program, self.program.plan, self.program.bucket
        instruction = self.instruction
        positions = self._written_positions
        expected = self._expected(call)
        self.normal.run(call)
        registers = [*instruction.outputs, *(instruction.arguments[at] for at in positions)]
        meaningless = [*instruction.piece.traits.uninitialised, *([False] * len(positions))]
        for register, value, is_meaningless in zip(registers, expected, meaningless, strict=True):
            if is_meaningless or not isinstance(register, int):
                continue
            static = bucket.static.get(register)
            if static is None:  # a tensor that the piece writes at its own address
                got, wanted, token_dim = call.registers[register], value, None
            else:
                got = static.rows(program.num_tokens)
                wanted = StaticTensor(value, static.spec, static.token_dims, static.symbols).rows(program.num_tokens)
                token_dim = next(iter(static.token_dims), None)
            row = padding_test.first_differing_row(got, wanted, token_dim)
            if row is not None:
                self.report(f"piece[{self.step}], tensor {plan_name(plan, register)}, row {row}")
                got.copy_(wanted)
                self._hand_out(call, register, static)

    def _hand_out(self, call: Call, register: int, static: StaticTensor | None) -> None:
        """Let the corrected value be seen where the wrong one had been copied to."""
        seen = call.registers[register]
        if static is None or seen is None or shares_memory(seen, static.tensor):
            return
        if register < len(self.args):
            seen.copy_(static.rows(self.program.num_tokens))
        else:
            call.registers[register] = real_rows(static, self.program.num_tokens)

"""The flat program of one bucket and one number of tokens: a list of bound steps, everything decided beforehand.

Which pieces replay, which run on the real rows, what is copied where, and all views are fixed when it is built. A call
fills a list of registers and walks the steps; it makes no tensor but what eager steps return and what the caller owns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Protocol

import torch

from . import poison
from .bucket import Bucket, fills_tail, inputs_as_wide_as_the_bucket, plan_name, real_rows, shares_memory
from .buffers import StaticTensor, without_repeats
from .plan import GraphPlan
from .steps import Instruction, address


class Call:
    """What one call of a flat program counts, and which of its stage inputs came from elsewhere."""

    __slots__ = ("border_copies", "bytes_copied", "copies", "foreign", "misses", "plain", "registers", "stage_copies")

    def __init__(self, registers: list[Any]) -> None:
        self.registers = registers
        self.foreign: set[int] = set()
        self.copies = 0
        self.stage_copies = 0
        self.bytes_copied = 0
        self.border_copies = 0
        self.misses: dict[str, int] = {}
        self.plain: dict[int, Sequence[Any]] = {}


class _Step(Protocol):
    def run(self, call: Call) -> None: ...


class UnexpectedTensor(Exception):
    """An eager step gave a tensor that its captured readers cannot take; the rest of the call runs without graphs."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


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
        self.tails = static.tails(num_tokens) if fills_tail(static) else []
        self.shape, self.dtype = rows.shape, rows.dtype
        traced = static.exact(num_tokens)  # unlike ``rows`` in the strides of dimensions of size 1
        self.pointer, self.stride = rows.data_ptr(), (rows if traced is None else traced).stride()
        self.num_bytes = self.rows.numel() * self.rows.element_size()

    def is_in_place(self, value: torch.Tensor) -> bool:
        return value.data_ptr() == self.pointer and value.stride() == self.stride

    def fits(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.shape == self.shape and value.dtype is self.dtype

    def taken(self, value: torch.Tensor) -> torch.Tensor:
        """What of the value is to be copied to ``rows``."""
        return value[tuple(slice(size) for size in self.rows.shape)] if self.repeats else value

    def run(self, call: Call) -> None:
        value = call.registers[self.register]
        if not self.is_in_place(value):
            self.rows.copy_(self.taken(value))
            if self.lands:
                call.stage_copies += 1
            else:
                call.copies += 1
                call.bytes_copied += self.num_bytes
        for tail, first_row in self.tails:
            tail.copy_(first_row)


class _Replay:
    """A replay with something to do behind it."""

    __slots__ = ("back", "border", "replay")

    def __init__(
        self,
        replay: Callable[[], None],
        back: Sequence[tuple[int, torch.Tensor]],
        border: Sequence[tuple[int, StaticTensor]],
    ) -> None:
        self.replay = replay
        self.back = back
        """Stage inputs that the piece writes: their registers, and where the truth is."""
        self.border = border
        """Outputs that an eager step can only take as copies, see Note [strides of padded values]."""

    def run(self, call: Call) -> None:
        self.replay()
        for register, rows in self.back:
            if register in call.foreign:
                call.registers[register].copy_(rows)
                call.stage_copies += 1

    def run_border(self, call: Call, num_tokens: int) -> None:
        for register, static in self.border:
            call.registers[register] = real_rows(static, num_tokens)
            call.border_copies += 1


class _ReplayWithBorder(_Replay):
    __slots__ = ("num_tokens",)

    def __init__(self, replay: Any, back: Any, border: Any, num_tokens: int) -> None:
        super().__init__(replay, back, border)
        self.num_tokens = num_tokens

    def run(self, call: Call) -> None:
        super().run(call)
        self.run_border(call, self.num_tokens)


class _OnRealRows:
    """An eager step, or a piece that does not replay: it sees the real rows only."""

    def __init__(
        self,
        step: int,
        instruction: Instruction,
        call: Callable[..., Any] | None,
        buffers: Sequence[torch.Tensor],
        copies: Sequence[tuple[int, _Copy]],
        refreshed: Sequence[tuple[_Copy, bool]],
        memory: Mapping[int, frozenset[int]],
        ends: Sequence[int],
        specs: Mapping[int, Any],
    ) -> None:
        self.step = step
        self.instruction = instruction
        self.direct = call
        self.buffers = tuple(buffers)
        self.copies = tuple(copies)
        """Pairs (index of an output, the copy to static memory that its captured readers need)."""
        self.refreshed = tuple(refreshed)
        """Static copies of registers that it writes; whether only where the caller's tensor lies elsewhere."""
        self.ends = tuple(ends)
        self.memory = memory
        self.specs = specs
        self.copied_outputs: tuple[int, ...] | None = None
        """Outputs that lie in static memory although their facts say otherwise; None before the first call."""
        positions = instruction.arguments
        self.take: Callable[[list[Any]], Sequence[Any]] = instruction.gather
        if len(positions) > 1 and all(isinstance(position, int) for position in positions):
            self.take = itemgetter(*positions)  # type: ignore[assignment]

    def run(self, call: Call) -> None:
        registers = call.registers
        arguments = self.take(registers)
        if self.direct is not None:
            outputs = self.direct(*arguments, *self.buffers)
        else:
            outputs, was_compiled = self.instruction.run_where_valid(arguments)
            if not was_compiled:
                call.plain[self.step] = [arguments[at] for at in self.instruction.symbol_positions]
        if self.copied_outputs is None:
            self.copied_outputs = self._hidden_aliases(outputs)
        if self.copied_outputs:
            outputs = list(outputs)
            for index in self.copied_outputs:
                outputs[index] = poison.like(outputs[index])
        for register, output in zip(self.instruction.outputs, outputs, strict=True):
            registers[register] = output
        for index, copy in self.copies:
            if not copy.fits(outputs[index]):
                raise UnexpectedTensor(self.step)
            copy.run(call)
        for copy, only_foreign in self.refreshed:
            if not only_foreign or copy.register in call.foreign:
                copy.run(call)
        for register in self.ends:
            registers[register] = None

    def _hidden_aliases(self, outputs: Sequence[Any]) -> tuple[int, ...]:
        found = []
        for index, (register, output) in enumerate(zip(self.instruction.outputs, outputs, strict=True)):
            if isinstance(output, torch.Tensor) and output.numel():
                declared = self.memory.get(address(output))
                spec = self.specs.get(register)
                if declared is not None and spec is not None and spec.storage not in declared:
                    found.append(index)
        return tuple(found)


class FlatProgram:
    """What a call of ``num_tokens`` tokens runs in a bucket, given which steps do not replay."""

    def __init__(self, plan: GraphPlan, bucket: Bucket, num_tokens: int, misses: Mapping[int, str]) -> None:
        self.plan = plan
        self.bucket = bucket
        self.num_tokens = num_tokens
        self.replayed = frozenset(step for step in bucket.graphs if step not in misses)
        self.miss_counts: dict[str, int] = {}
        for code in misses.values():
            self.miss_counts[code] = self.miss_counts.get(code, 0) + 1
        self.merged_results: tuple[int, ...] | None = None
        """Results to be copied since they share memory that eager's do not; None before the first call."""
        self._last_reader = {
            register: max(reading)
            for register, steps in plan.captured_readers.items()
            if (reading := [step for step in steps if step in self.replayed])
        }
        self.template: list[Any] = [None] * len(plan.layout.registers)
        given = len(plan.inputs)
        for offset, constant in enumerate(plan.layout.constants):
            self.template[given + offset] = constant
        self.landing: list[tuple[int, _Copy]] = []
        self.admitted: list[_Copy] = []
        self._memory = self._declared_memory()
        self._last_use_outside = self._uses_outside()
        self._admit_inputs()
        self.steps: list[tuple[Callable[[], None] | None, _Step | None]] = []
        for step, instruction in enumerate(plan.instructions):
            if step in self.replayed:
                self.steps.append(self._replay(step, instruction))
            else:
                self.steps.append((None, self._on_real_rows(step, instruction)))
        eager = len(plan.instructions) - len(plan.compute_steps)
        padded = bucket.tokens - num_tokens if self.replayed else 0
        self.counts = {"calls": 1, "eager_steps": eager, "replays": len(self.replayed), "padded_tokens": padded}

    # ------------------------------------------------------------------------- building

    def _declared_memory(self) -> dict[int, frozenset[int]]:
        """Address of static memory -> numbers of the storages that, by their facts, may lie in it."""
        found: dict[int, set[int]] = {where: set() for where in self.bucket.static_memory}
        for static in self.bucket.static.values():
            found.setdefault(address(static.tensor), set()).add(static.spec.storage)
        return {where: frozenset(storages) for where, storages in found.items()}

    def _uses_outside(self) -> dict[int, int]:
        """Register of a value made in the call -> the last step that does not replay and uses it."""
        given = len(self.plan.inputs) + len(self.plan.layout.constants)
        uses: dict[int, int] = {}
        for step, instruction in enumerate(self.plan.instructions):
            if step not in self.replayed:
                taken = [source if isinstance(source, int) else source[0] for source in instruction.arguments]
                uses.update(dict.fromkeys((*taken, *instruction.outputs), step))
        return {r: s for r, s in uses.items() if r >= given and r not in self.plan.result_registers}

    def _admit_inputs(self) -> None:
        for register, arrival in self.plan.arrivals.items():
            if register not in self._last_reader or arrival not in ("landing", "copied"):
                continue
            copy = _Copy(register, self.bucket.static[register], self.num_tokens, lands=arrival == "landing")
            if copy.lands:
                self.landing.append((register, copy))
            else:
                self.admitted.append(copy)
        self._tails = [pair for copy in self.admitted for pair in copy.tails]
        self._landing_tails = [pair for _, copy in self.landing for pair in copy.tails]

    def _replay(self, step: int, instruction: Instruction) -> tuple[Callable[[], None] | None, _Step | None]:
        graph = self.bucket.graphs[step]
        back = [
            (register, self.bucket.static[register].rows(self.num_tokens))
            for register in self.plan.written_registers[step]
            if register in self.bucket.static
        ]
        border = []
        for register in instruction.outputs:
            static = self.bucket.static[register]
            if static.exact(self.num_tokens) is not None:
                self.template[register] = real_rows(static, self.num_tokens)
            elif self._is_read_outside(register):
                border.append((register, static))
        if border:
            return None, _ReplayWithBorder(graph.replay, back, border, self.num_tokens)
        return (None, _Replay(graph.replay, back, border)) if back else (graph.replay, None)

    def _is_read_outside(self, register: int) -> bool:
        """Whether anybody but a replayed piece uses the value."""
        return register in self.plan.result_registers or register in self._last_use_outside

    def _on_real_rows(self, step: int, instruction: Instruction) -> _OnRealRows:
        bucket, plan, n = self.bucket, self.plan, self.num_tokens
        call: Callable[..., Any] | None = instruction.call if instruction.piece.kind == "eager" else None
        buffers: list[torch.Tensor] = []
        if step in bucket.given_buffers:
            views = [static.exact(n) for static in bucket.given_buffers[step]]
            if all(view is not None for view in views):
                buffers = [view for view in views if view is not None]
                call = plan.hoisted[step][0]
        copies = [
            (index, _Copy(register, bucket.static[register], n))
            for index, register in enumerate(instruction.outputs)
            if self._last_reader.get(register, -1) > step and register in bucket.static
        ]
        refreshed = []
        for register in plan.written_registers[step]:
            if self._last_reader.get(register, -1) > step and register in bucket.static:
                lands = plan.arrivals.get(register) == "landing"
                refreshed.append((_Copy(register, bucket.static[register], n, lands), lands))
        held = [r for r, last in self._last_use_outside.items() if last == step and self.template[r] is None]
        return _OnRealRows(step, instruction, call, buffers, copies, refreshed, self._memory, held, plan.specs)

    # --------------------------------------------------------------------------- running

    def admits(self, args: Sequence[Any]) -> bool:
        """Whether the inputs that would be copied have the sizes and dtypes that were captured."""
        return all(copy.fits(args[copy.register]) for copy in self.admitted) and all(
            copy.fits(args[register]) for register, copy in self.landing
        )

    def run(self, args: Sequence[Any]) -> tuple[list[Any], Call, int]:
        """The graph's results, some of them in static memory; what to count; stage inputs that lay in place."""
        registers = self.template.copy()
        registers[: len(args)] = args
        call = Call(registers)
        in_place = 0
        targets: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for register, copy in self.landing:
            value = args[register]
            if copy.is_in_place(value):
                in_place += 1
            else:
                call.foreign.add(register)
                call.stage_copies += 1
                targets.append(copy.rows)
                values.append(copy.taken(value))
        for copy in self.admitted:
            targets.append(copy.rows)
            values.append(copy.taken(args[copy.register]))
            call.copies += 1
            call.bytes_copied += copy.num_bytes
        if targets:
            torch._foreach_copy_(targets, values)
        for tail, first_row in self._tails:
            tail.copy_(first_row)
        for tail, first_row in self._landing_tails:
            tail.copy_(first_row)
        try:
            for replay, step in self.steps:
                if step is None:
                    replay()  # type: ignore[misc]
                else:
                    step.run(call)
        except UnexpectedTensor as unexpected:
            self._finish_without_graphs(unexpected.step + 1, call)
        return self.plan.layout.collect(registers), call, in_place

    def _finish_without_graphs(self, first: int, call: Call) -> None:
        registers = call.registers
        for step, instruction in enumerate(self.plan.instructions[first:], first):
            outputs, was_compiled = instruction.run_where_valid(instruction.gather(registers))
            if not was_compiled:
                call.plain[step] = []
            for register, output in zip(instruction.outputs, outputs, strict=True):
                registers[register] = output
            if step in self.replayed:
                call.misses["unexpected-tensor"] = call.misses.get("unexpected-tensor", 0) + 1

    # ------------------------------------------------------------------------- verifying

    def run_verified(self, args: Sequence[Any], report: Callable[[str], None]) -> tuple[list[Any], Call, int]:
        """As ``run``, comparing each replay with its piece on the same inputs; differences go to ``report``."""
        steps = self.steps
        verified = list(steps)
        for step in sorted(self.replayed):
            verified[step] = (None, _Verified(self, step, steps[step], args, report))
        twin = object.__new__(FlatProgram)
        twin.__dict__.update(self.__dict__, steps=verified)
        return twin.run(args)


class _Verified:
    """A replay next to its un-captured piece, bit for bit at the same bucket."""

    def __init__(
        self, program: FlatProgram, step: int, normal: Any, args: Sequence[Any], report: Callable[[str], None]
    ) -> None:
        self.program, self.step, self.normal, self.args, self.report = program, step, normal, args, report

    def run(self, call: Call) -> None:
        program, plan, bucket = self.program, self.program.plan, self.program.bucket
        instruction = plan.instructions[self.step]
        inputs = inputs_as_wide_as_the_bucket(plan, bucket, self.step, instruction, call.registers)
        written = plan.written_registers[self.step]
        positions = [at for at, source in enumerate(instruction.arguments) if source in written]
        for at in positions:
            inputs[at] = poison.like(inputs[at])
        expected = list(instruction.run(inputs)) + [inputs[at] for at in positions]
        # A copy, since a piece may give back one of its inputs, which the replay may write.
        expected = [value.clone() if isinstance(value, torch.Tensor) else value for value in expected]
        replay, step = self.normal
        replay() if step is None else step.run(call)
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
            row = poison.first_differing_row(got, wanted, token_dim)
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

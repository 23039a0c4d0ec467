"""A split graph as instructions over numbered registers: what a program runs, and what graphs are captured from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch

from .. import errors
from ..compilation.placeholders import InputTable
from ..compilation.specs import SymbolSpec
from ..compilation.split import Piece, ResultValue, SizeOf, Split
from ..utils.addresses import MemoryMap
from .cudagraphs.device import CaptureError
from .cudagraphs.memory import like, memory_of, still_held
from .hooks import Notice
from .ownership import LandingWatch, undeclared_sharing
from .tracing import Timeline, profiler_is_running, step_name, wrap

if TYPE_CHECKING:
    from ..compilation.inductor import CompiledPiece


Parts = Generator[tuple[Notice, ...], None, Sequence[Any]]
"""A call in parts: which notices come between them, and its outputs."""


@dataclass
class Instruction:
    """One step: what to call, on which registers, and which of them end here."""

    piece: Piece
    compiled: CompiledPiece | None
    call: Callable[..., Sequence[Any]]
    arguments: tuple[int | tuple[int, int], ...]
    """A register, or a register and the dimension whose size is meant."""
    symbol_positions: tuple[int, ...]
    """Which arguments are the piece's symbols, if the compiled code relies on anything about them."""
    outputs: tuple[int, ...]
    ends: tuple[int, ...]
    """Registers that nothing reads after this step, so that their memory is free for the next."""
    cloned_outputs: tuple[int, ...] | None = None
    """Outputs that a compiler merged with other memory although they must have their own; None: not looked at."""
    parts: Callable[..., Parts] | None = None
    """The same as ``call`` in parts, if it has several."""
    notices: frozenset[Notice] = frozenset()
    """Those that may come between these."""

    def run(self, arguments: Sequence[Any]) -> Sequence[Any]:
        """The step's outputs; of a compute piece, by its compiled code."""
        return self._apart(arguments, self.call(*arguments))

    def run_in_parts(self, arguments: Sequence[Any]) -> Parts:
        """The same, leaving off wherever a notice is due."""
        outputs = self.call(*arguments) if self.parts is None else (yield from self.parts(*arguments))
        return self._apart(arguments, outputs)

    def _apart(self, arguments: Sequence[Any], outputs: Sequence[Any]) -> Sequence[Any]:
        """The outputs, each in memory of its own that must have it."""
        if self.cloned_outputs is None:
            self.cloned_outputs = _merged_outputs(self.piece, arguments, outputs)
        if self.cloned_outputs:
            outputs = list(outputs)
            for index in self.cloned_outputs:
                outputs[index] = like(outputs[index])
        return outputs

    def run_where_valid(self, arguments: Sequence[Any]) -> tuple[Sequence[Any], bool]:
        """The step's outputs, and whether compiled code made them rather than plain FX."""
        if self.holds(arguments):
            return self.run(arguments), True
        return self.piece.graph_module.forward(*arguments), False

    def holds(self, arguments: Sequence[Any]) -> bool:
        """Whether the compiled code of the step may run on these sizes."""
        if not self.symbol_positions or self.compiled is None:
            return True
        return self.compiled.accepts(self.sizes(arguments))

    def sizes(self, arguments: Sequence[Any]) -> list[Any]:
        """Those of the step's arguments on which it depends whether the compiled code may run."""
        return [arguments[position] for position in self.symbol_positions]

    def gather(self, registers: Sequence[Any]) -> list[Any]:
        """The step's arguments."""
        return gather(self.arguments, registers)


@dataclass(frozen=True)
class Layout:
    """A program's registers: graph inputs first, constants after them, then one for each value that pieces make."""

    instructions: tuple[Instruction, ...]
    registers: Mapping[str, int]
    """Name of a value -> its register."""
    constants: tuple[object, ...]
    values_made: int
    """How many registers are empty when a call begins."""
    results: tuple[int, ...]
    """The register of each result of the graph."""

    def run(
        self,
        args: Sequence[Any],
        watch: Callable[[int, Sequence[Any]], None] | None = None,
        timeline: Timeline | None = None,
    ) -> tuple[list[Any], dict[int, Sequence[Any]]]:
        """The graph's results without any graph replayed, and the sizes for which a step ran as plain FX.

        Args:
            watch: see ``run_steps``.
            timeline: notes when steps ran.
        """
        registers = self.fill(args)
        plain: dict[int, Sequence[Any]] = {}
        is_watched = timeline is not None or profiler_is_running()

        def run_step(instruction: Instruction) -> Sequence[Any]:
            arguments = instruction.gather(registers)
            run = instruction.run_where_valid
            if is_watched:
                run = wrap(run, step_name(instruction.piece), timeline)
            outputs, was_compiled = run(arguments)
            if not was_compiled:
                plain[instruction.piece.index] = instruction.sizes(arguments)
            return outputs

        run_steps(self.instructions, registers, run_step, watch)
        return gather(self.results, registers), plain

    def fill(self, args: Sequence[Any]) -> list[Any]:
        """The registers as a call begins with them."""
        return [*args, *self.constants, *([None] * self.values_made)]


def lay_out(
    split: Split, table: InputTable, compiled: Sequence[CompiledPiece | None], *, pieces_are_exact: bool
) -> Layout:
    """Number the values of a split graph.

    Args:
        pieces_are_exact: whether compiled pieces alias exactly as eager does, as plain FX does.
    """
    result_names = [r.value if isinstance(r, ResultValue) else f"result {at}" for at, r in enumerate(split.results)]
    fixed = {name: r for name, r in zip(result_names, split.results, strict=True) if not isinstance(r, ResultValue)}
    constants = {**split.constants, **fixed}
    made = [output for piece in split.pieces for output in piece.outputs]
    registers = {name: at for at, name in enumerate([*(i.name for i in table.inputs), *constants, *made])}
    results = tuple(registers[name] for name in result_names)
    last_use: dict[int, int] = {}
    for index, piece in enumerate(split.pieces):
        for source in piece.inputs:
            last_use[registers[source.value if isinstance(source, SizeOf) else source]] = index
        for output in piece.outputs:
            last_use.setdefault(registers[output], index)
    instructions = tuple(
        Instruction(
            piece=piece,
            compiled=one,
            call=piece.graph_module.forward if one is None else one.call,
            arguments=tuple(
                (registers[s.value], s.dim) if isinstance(s, SizeOf) else registers[s] for s in piece.inputs
            ),
            symbol_positions=()
            if one is None or not one.conditions
            else tuple(i for i, spec in enumerate(piece.input_specs) if isinstance(spec, SymbolSpec)),
            outputs=tuple(registers[output] for output in piece.outputs),
            ends=tuple(r for r, last in last_use.items() if last == index and r not in results),
            cloned_outputs=() if one is None or pieces_are_exact else None,
        )
        for index, (piece, one) in enumerate(zip(split.pieces, compiled, strict=True))
    )
    return Layout(instructions, registers, tuple(constants.values()), len(made), results)


@dataclass(frozen=True)
class Notices:
    """Which notices are due while the pieces of a full graph run."""

    before: Mapping[int, tuple[Notice, ...]]
    """Piece -> those before it."""
    first_with_results: int
    """The first piece that makes memory of results, if there is a notice before it; else 0."""
    watch: Callable[[], LandingWatch]
    """Looks, in one call, for hidden readers of landing memory; where it finds one, there is no notice of reads."""


def lay_out_in_one(
    split: Split, pieces: Layout, table: InputTable, notices: Notices | None = None, *, is_exact: bool
) -> Layout | str:
    """The registers of the graph as one step, which runs the pieces; or why it cannot be one.

    Args:
        pieces: how the steps of ``split`` are laid out.
        notices: if there is somebody for them.
        is_exact: see ``pieces_are_exact`` of ``lay_out``.
    """
    in_one = split.in_one
    if not isinstance(in_one, Split):
        return str(in_one)
    if all(piece.kind == "compute" for piece in split.pieces) and len(split.pieces) == 1:
        return "the graph is one piece, whose graphs are full ones already"
    layout = lay_out(in_one, table, [None] * len(in_one.pieces), pieces_are_exact=is_exact)
    compute = [at for at, piece in enumerate(in_one.pieces) if piece.kind == "compute"]
    if len(compute) != 1:
        return "nothing in it can be captured"
    step = layout.instructions[compute[0]]
    in_one_step = _running_all(step, in_one, split, pieces, len(table.inputs), notices, is_exact)
    if isinstance(in_one_step, str):
        return in_one_step
    steps = list(layout.instructions)
    steps[compute[0]] = in_one_step
    return replace(layout, instructions=tuple(steps))


def _running_all(
    step: Instruction,
    in_one: Split,
    split: Split,
    pieces: Layout,
    num_inputs: int,
    notices: Notices | None,
    is_exact: bool,
) -> Instruction | str:
    """The step with a body that runs all pieces; or why there can be none."""
    given = [(at, source) for at, source in enumerate(step.arguments) if isinstance(source, int)]
    given = [(at, source) for at, source in given if source < num_inputs]
    taken = [s if isinstance(s, int) else s[0] for one in pieces.instructions for s in one.arguments]
    missing = {register for register in taken if register < num_inputs}.difference(source for _, source in given)
    results = {r.value: at for at, r in enumerate(in_one.results) if isinstance(r, ResultValue)}
    hidden = [name for name in step.piece.outputs if name not in results]
    if missing or hidden or not all(isinstance(split.results[at], ResultValue) for at in results.values()):
        return "its results share memory in a way that a graph of all pieces cannot keep"
    chosen = [results[name] for name in step.piece.outputs]

    def graph_inputs(arguments: Sequence[Any]) -> list[Any]:
        args: list[Any] = [None] * num_inputs
        for at, source in given:
            args[source] = arguments[at]
        return args

    def run_all(*arguments: Any) -> list[Any]:
        found, _ = pieces.run(graph_inputs(arguments))
        return [found[at] for at in chosen]

    step = replace(step, call=run_all, cloned_outputs=() if is_exact else None)
    if notices is None:
        return step
    bounds = [0, *sorted(notices.before), len(pieces.instructions)]

    def in_parts(*arguments: Any) -> Parts:
        registers = pieces.fill(graph_inputs(arguments))
        watch, earlier = notices.watch(), list[Any]()

        def run_step(instruction: Instruction) -> Sequence[Any]:
            return instruction.run_where_valid(instruction.gather(registers))[0]

        def after(number: int, outputs: Sequence[Any]) -> None:
            watch.after_step(number, outputs)
            if number < notices.first_with_results:
                earlier.extend(memory_of([output for output in outputs if isinstance(output, torch.Tensor)]))

        for first, end in itertools.pairwise(bounds):
            due = [what for what in notices.before.get(first, ()) if what != "mark_landing_read" or not watch.found]
            if due:
                yield tuple(due)
            run_steps(pieces.instructions[first:end], registers, run_step, after)
        found = [registers[pieces.results[at]] for at in chosen]
        made_earlier, given = still_held(earlier), MemoryMap.of(arguments)
        if any(isinstance(r, torch.Tensor) and made_earlier.holds(r) and not given.holds(r) for r in found):
            raise CaptureError(errors.RESULT_OF_AN_EARLIER_PIECE)
        return found

    return replace(step, parts=in_parts, notices=frozenset(itertools.chain(*notices.before.values())))


def run_steps(
    instructions: Sequence[Instruction],
    registers: list[Any],
    run: Callable[[Instruction], Sequence[Any]],
    after: Callable[[int, Sequence[Any]], None] | None = None,
) -> None:
    """Run steps in order, each on what the registers hold then. Memory that nothing reads any more becomes free.

    Args:
        run: returns the outputs of a step.
        after: is called after each step with its index and outputs, before registers that end there are emptied.
    """
    for instruction in instructions:
        outputs = run(instruction)
        for register, output in zip(instruction.outputs, outputs, strict=True):
            registers[register] = output
        if after is not None:
            after(instruction.piece.index, outputs)
        del outputs
        for register in instruction.ends:
            registers[register] = None


def gather(sources: Sequence[int | tuple[int, int]], registers: Sequence[Any]) -> list[Any]:
    """What is in these registers, or the sizes that are meant."""
    return [registers[a] if isinstance(a, int) else registers[a[0]].size(a[1]) for a in sources]


def picker(sources: Sequence[int | tuple[int, int]]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """``gather`` for these sources, for who asks in every call."""
    if len(sources) > 1 and all(isinstance(source, int) for source in sources):
        return itemgetter(*sources)
    return lambda registers: gather(sources, registers)


def _merged_outputs(piece: Piece, arguments: Sequence[Any], outputs: Sequence[Any]) -> tuple[int, ...]:
    """Outputs that must have memory of their own but share it with an input or an earlier output."""
    values = [
        (output, getattr(spec, "storage", None)) for output, spec in zip(outputs, piece.output_specs, strict=True)
    ]
    given = [(a, getattr(spec, "storage", None)) for a, spec in zip(arguments, piece.input_specs, strict=True)]
    return tuple(index for index in undeclared_sharing(values, given) if piece.own_memory[index])

"""What Dynamo gets back for one graph: a callable that runs its pieces in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch

from .placeholders import GraphInput, InputTable
from .specs import SymbolSpec
from .split import Piece, ResultValue, SizeOf, Split
from .stats import TOTALS, Stats

if TYPE_CHECKING:
    from .config import Config
    from .inductor import CompiledPiece


@dataclass
class _Instruction:
    """One step of the flat program: what to call, on which registers, and which of them end here."""

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

    def run(self, arguments: Sequence[Any]) -> Sequence[Any]:
        outputs = self.call(*arguments)
        if self.cloned_outputs is None:
            self.cloned_outputs = _merged_outputs(self.piece, arguments, outputs)
        if self.cloned_outputs:
            outputs = list(outputs)
            for index in self.cloned_outputs:
                outputs[index] = outputs[index].clone()
        return outputs


class Program:
    """One graph, split and compiled, as the callable that Dynamo runs. Threads may call it at the same time.

    It keeps no tensor between calls but the graph's own constants. Outputs belong to the caller.
    """

    def __init__(
        self, name: str, split: Split, table: InputTable, compiled: Sequence[CompiledPiece | None], config: Config
    ) -> None:
        self.name = name
        self.split = split
        self.table = table
        self.config = config
        self.compiled = tuple(compiled)
        self.stage = None
        self.stats = Stats(parent=TOTALS)
        self.plain_runs: dict[int, str] = {}
        """Compute pieces that ran as plain FX at least once, with the reason; -1 stands for the whole graph."""
        self._registers: dict[str, int] = {}
        self._instructions = self._assemble()
        tensors = [(at, i.spec.storage, i) for at, i in enumerate(table.inputs) if i.spec is not None]
        self._exclusive = {at: storage for at, storage, i in tensors if i.name in split.exclusive_inputs}
        """Position -> storage number of the inputs that must not overlap with another storage."""
        storages = set(self._exclusive.values())
        self._others = tuple(at for at, storage, i in tensors if i.kind != "parameter" and storage not in storages)
        self._cloned_results: tuple[int, ...] | None = None
        self._eager_steps = sum(piece.kind == "eager" for piece in split.pieces)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Its steps in order, compute pieces and eager steps."""
        return self.split.pieces

    @property
    def inputs(self) -> tuple[GraphInput, ...]:
        """Its graph inputs, in the order in which it is called with them."""
        return self.table.inputs

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        if self._exclusive and self._overlap(args):
            return self._run_whole(args)
        registers = [*args, *self.split.constants.values(), *self._empty]
        all_compiled = True
        with torch.no_grad():
            for instruction in self._instructions:
                arguments = [
                    registers[a] if isinstance(a, int) else registers[a[0]].size(a[1]) for a in instruction.arguments
                ]
                if self._holds(instruction, arguments):
                    outputs = instruction.run(arguments)
                else:
                    outputs = instruction.piece.graph_module.forward(*arguments)
                    all_compiled = False
                for register, output in zip(instruction.outputs, outputs, strict=True):
                    registers[register] = output
                for register in instruction.ends:
                    registers[register] = None
            results = [registers[r.register] if isinstance(r, _Register) else r for r in self._results]
            self._separate_results(args, results, all_compiled)
        self.stats.add_many({"calls": 1, "eager_steps": self._eager_steps})
        return tuple(results)

    def release(self) -> None:
        """Give back what the program holds on devices; a later call takes it again. It holds nothing yet."""

    @property
    def __code__(self) -> CodeType:
        """What debuggers of compiled code, such as ``depyf.prepare_debug``, ask every compiled function for."""
        return type(self).__call__.__code__

    def explain(self) -> str:
        """What was split where and why, and what each input is."""
        from .explanation import explain_program

        return explain_program(self)

    # ---------------------------------------------------------------------- running

    def _holds(self, instruction: _Instruction, arguments: Sequence[Any]) -> bool:
        """Whether the compiled code of a step may run on these sizes."""
        if not instruction.symbol_positions or instruction.compiled is None:
            return True
        sizes = [arguments[position] for position in instruction.symbol_positions]
        if instruction.compiled.accepts(sizes):
            return True
        self.plain_runs[instruction.piece.index] = f"the compiled code does not hold for sizes {sizes}"
        return False

    def _overlap(self, args: Sequence[Any]) -> bool:
        """Whether an input whose writes were moved shares memory with another input; no guard of Dynamo's tells."""
        owner: dict[int, int] = {}
        for position, storage in self._exclusive.items():
            if owner.setdefault(_memory(args[position]), storage) != storage:
                return True
        return any(_memory(args[position]) in owner for position in self._others)

    def _run_whole(self, args: Sequence[Any]) -> tuple[Any, ...]:
        names = ", ".join(self.inputs[position].label for position in self._exclusive)
        self.plain_runs[-1] = f"inputs that the graph writes ({names}) share memory with other inputs"
        with torch.no_grad():
            results = self.split.whole(*args)
        self.stats.add_many({"calls": 1})
        return tuple(results)

    def _separate_results(self, args: Sequence[Any], results: list[Any], all_compiled: bool) -> None:
        """Copy results that share memory although eager's would not.

        Which ones they are shows at the first call in which only compiled code ran.
        """
        cloned = self._cloned_results
        if cloned is None:
            owner: dict[int, int | None] = {}
            for graph_input, value in zip(self.inputs, args, strict=True):
                if isinstance(value, torch.Tensor) and graph_input.spec is not None and value.numel():
                    owner.setdefault(_memory(value), graph_input.spec.storage)
            cloned = tuple(
                index
                for index, (value, storage) in enumerate(zip(results, self.split.result_storages, strict=True))
                if isinstance(value, torch.Tensor)
                and value.numel()
                and owner.setdefault(_memory(value), storage) != storage
            )
            self._cloned_results = cloned if all_compiled else None
        for index in cloned:
            results[index] = results[index].clone()

    # ------------------------------------------------------------------- assembling

    def _assemble(self) -> tuple[_Instruction, ...]:
        names = [*(i.name for i in self.inputs), *self.split.constants]
        names += [output for piece in self.pieces for output in piece.outputs]
        self._registers = {name: index for index, name in enumerate(names)}
        given = len(self.inputs) + len(self.split.constants)
        self._empty: list[Any] = [None] * (len(names) - given)
        self._results = [
            _Register(self._registers[r.value]) if isinstance(r, ResultValue) else r for r in self.split.results
        ]
        kept = {r.register for r in self._results if isinstance(r, _Register)}
        last_use: dict[int, int] = {}
        for index, piece in enumerate(self.pieces):
            for source in piece.inputs:
                last_use[self._registers[source.value if isinstance(source, SizeOf) else source]] = index
            for output in piece.outputs:
                last_use.setdefault(self._registers[output], index)
        return tuple(
            _Instruction(
                piece=piece,
                compiled=compiled,
                call=piece.graph_module.forward if compiled is None else compiled.call,
                arguments=tuple(
                    (self._registers[s.value], s.dim) if isinstance(s, SizeOf) else self._registers[s]
                    for s in piece.inputs
                ),
                symbol_positions=()
                if compiled is None or not compiled.conditions
                else tuple(i for i, spec in enumerate(piece.input_specs) if isinstance(spec, SymbolSpec)),
                outputs=tuple(self._registers[output] for output in piece.outputs),
                ends=tuple(r for r, last in last_use.items() if last == index and r not in kept),
                cloned_outputs=() if compiled is None or self.config.compiler == "eager" else None,
            )
            for index, (piece, compiled) in enumerate(zip(self.pieces, self.compiled, strict=True))
        )


class UnsplitProgram:
    """A graph that was given to a stock backend whole. It answers the same questions as a Program."""

    pieces: tuple[Piece, ...] = ()
    inputs: tuple[GraphInput, ...] = ()
    stage = None

    def __init__(
        self, name: str, call: Callable[..., Any], config: Config, reason: str, counter: str | None = None
    ) -> None:
        self.name = name
        self.config = config
        self.reason = reason
        self.stats = Stats(parent=TOTALS)
        self._call = call
        self._amounts = {"calls": 1} if counter is None else {"calls": 1, counter: 1}

    def __call__(self, *args: Any) -> Any:
        self.stats.add_many(self._amounts)
        return self._call(*args)

    def release(self) -> None:
        """It holds nothing of ours."""

    @property
    def __code__(self) -> CodeType:
        return type(self).__call__.__code__

    def explain(self) -> str:
        """Why the graph is not split."""
        from .explanation import explain_unsplit

        return explain_unsplit(self.name, self.config.compiler, self.reason)


@dataclass(frozen=True)
class _Register:
    register: int


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _merged_outputs(piece: Piece, arguments: Sequence[Any], outputs: Sequence[Any]) -> tuple[int, ...]:
    """Outputs that must have memory of their own but share it with an input or an earlier output."""
    taken = {_memory(a) for a in arguments if isinstance(a, torch.Tensor) and a.numel()}
    merged = []
    for index, (output, own) in enumerate(zip(outputs, piece.own_memory, strict=True)):
        if isinstance(output, torch.Tensor) and output.numel():
            if own and _memory(output) in taken:
                merged.append(index)
            taken.add(_memory(output))
    return tuple(merged)

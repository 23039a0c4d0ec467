"""What of a program can be captured, and how each value reaches the captured pieces. Fixed once the graph is split.

Note [one reason per miss]
Every compute piece that does not replay although graphs are on is counted under exactly one code of ``REASONS``. The
codes are for counters and tests; the sentence that goes with one says what to do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import sympy
import torch
from torch import fx

from ..compilation.padding_rules import outliving_writes, token_dims
from ..compilation.placeholders import GraphInput, InputTable
from ..compilation.specs import SymbolSpec, TensorSpec
from ..compilation.split import Split
from .cudagraphs.ladder import Ladder
from .cudagraphs.memory import address, extent_bytes, geometry
from .hooks import StageListener
from .instructions import Instruction, Layout, Register
from .ownership import Boundary, find_boundary
from .stage import Stage

SMALL_TENSOR_BYTES = 64 * 1024
"""Inputs up to this size are copied into static memory in each call; larger ones are read where they are."""

Arrival = Literal["landing", "copied", "parameter", "address", "constant"]
"""How a graph input reaches captured pieces: in landing memory, by a copy, or read at its own (checked) address."""

REASONS: Mapping[str, str] = {
    "first-call": "the first call of a bucket runs without its graph; the second one captures it",
    "not-warmed-up": "capture='warmup' captures in warmup() only, and this bucket was not warmed up",
    "over-max": "the call has more tokens than max_tokens",
    "padding-off": "padding='never', and no bucket has exactly this many tokens",
    "padding-unsafe": "padded rows could change the real ones, so padded calls run the piece on the real rows",
    "address-moved": "parameters or large tensors lie elsewhere than at capture; what stays is captured again",
    "moved-too-often": "parameters or large tensors moved so often that nothing more is captured for them",
    "scalar-changed": "an integer other than the token count differs from the one at capture",
    "scalar-made-in-call": "an integer that the piece takes is made in the middle of the call",
    "other-dynamic-dimension": "a size other than the token count varies in what the piece takes or gives",
    "no-token-count": "no input tells the number of tokens",
    "random": "the piece draws random numbers, which a graph would freeze or draw otherwise than eager",
    "writes-state": "the piece writes a tensor that outlives the call",
    "mixed-devices": "the piece takes or gives tensors of more than one device, or of another than the graphs'",
    "guard": "the compiled code does not hold for the size of the bucket",
    "capture-failed": "the piece could not be captured",
    "no-tensor": "the piece takes or gives something that is no tensor",
    "graph-memory": "graph_memory_bytes leaves no room for this bucket",
    "verify-failed": "a replay differed from its piece, so this bucket is no longer replayed",
    "concurrent-call": "another call is using the static memory of this stage",
    "outer-capture": "the call was made inside another capture",
    "rows-disagree": "an input has other sizes or another dtype than the token count and the capture say",
    "unexpected-tensor": "an eager step gave a tensor of another size or dtype than traced",
    "inputs-overlap": "inputs that the graph writes, or landing memory of another input, share memory with an input",
}


@dataclass(frozen=True)
class Obstacle:
    """Why something is not captured or replayed."""

    code: str
    sentence: str


@dataclass(frozen=True)
class GraphSettings:
    """What the options say about graphs, as far as a program has to know."""

    device: Literal["cuda", "emulate"]
    mode: Literal["piecewise", "full"]
    ladder: Ladder
    pads: bool = True
    lazy: bool = True
    strict: bool = False
    static_outputs: bool = False
    verify_every: int = 0
    memory_limit_bytes: int | None = None
    compiler_runs_ops: bool = True


@dataclass(frozen=True)
class GraphPlan:
    """What of a program can be captured. Holds no tensor but the graph's constants."""

    layout: Layout
    split: Split
    table: InputTable
    settings: GraphSettings
    stage: Stage | None

    @property
    def inputs(self) -> tuple[GraphInput, ...]:
        return self.table.inputs

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        return self.layout.instructions

    @cached_property
    def boundary(self) -> Boundary:
        return find_boundary(self.split, self.table)

    @property
    def listener(self) -> StageListener | None:
        return None if self.stage is None else self.stage.listener

    @cached_property
    def token_symbol(self) -> sympy.Symbol | None:
        """The symbol that counts tokens; None in a graph with a static token count."""
        count = self.table.token_count
        return count if isinstance(count, sympy.Symbol) else None

    @cached_property
    def token_source(self) -> tuple[int, int | None] | None:
        """Position of the argument that tells the token count, and its dimension if it is a tensor."""
        for at, graph_input in enumerate(self.inputs):
            if graph_input.expression is not None and graph_input.expression == self.token_symbol:
                return at, None
        for at, graph_input in enumerate(self.inputs):
            if graph_input.spec is not None and (dims := token_dims(graph_input.spec, self.token_symbol)):
                return at, dims[0]
        return None

    def count_tokens(self, args: Sequence[Any]) -> int | None:
        """Number of real tokens of a call; None if nothing tells it."""
        if self.token_symbol is None:
            count = self.table.token_count
            return count if isinstance(count, int) else None
        if self.token_source is None:
            return None
        position, dim = self.token_source
        return int(args[position] if dim is None else args[position].size(dim))

    def symbols(self, num_tokens: int) -> Mapping[sympy.Symbol, int]:
        return {} if self.token_symbol is None else {self.token_symbol: num_tokens}

    @cached_property
    def _token_specs(self) -> list[SymbolSpec]:
        """What the pieces know about the range of the token count."""
        specs = [spec for instruction in self.instructions for spec in instruction.piece.input_specs]
        return [spec for spec in specs if isinstance(spec, SymbolSpec) and spec.symbol == self.token_symbol]

    @cached_property
    def ladder(self) -> Ladder:
        """The buckets, cut at the largest token count that the graph is valid for."""
        upper = [spec.upper for spec in self._token_specs if spec.upper is not None]
        return self.settings.ladder.cut_at(max(1, min(upper))) if upper else self.settings.ladder

    @cached_property
    def smallest_tokens(self) -> int:
        """The smallest token count that the graph is valid for."""
        return max([1, *(spec.lower for spec in self._token_specs if spec.lower is not None)])

    def bucket(self, num_tokens: int) -> int | None:
        """The bucket for a call; a graph with a static token count has that one only."""
        if self.token_symbol is None:
            return num_tokens if num_tokens <= self.settings.ladder.max_tokens else None
        return self.ladder.bucket(num_tokens)

    # ------------------------------------------------------------------------------ pieces

    @cached_property
    def compute_steps(self) -> tuple[int, ...]:
        return tuple(i for i, instruction in enumerate(self.instructions) if instruction.piece.kind == "compute")

    @cached_property
    def obstacles(self) -> Mapping[int, Obstacle]:
        """Compute steps that no graph can hold, with the reason; whatever the bucket."""
        found = {step: self._obstacle(self.instructions[step]) for step in self.compute_steps}
        return {step: obstacle for step, obstacle in found.items() if obstacle is not None}

    @cached_property
    def capturable(self) -> tuple[int, ...]:
        return tuple(step for step in self.compute_steps if step not in self.obstacles)

    def padding_obstacle(self, step: int) -> str | None:
        """Why the piece must not be padded, as far as its graph shows; None if a test may decide."""
        padding = self.instructions[step].piece.padding
        return None if padding in ("safe", "not tested yet") else padding

    def _obstacle(self, instruction: Instruction) -> Obstacle | None:
        piece = instruction.piece
        if self.table.token_count is None or (self.token_symbol is not None and self.token_source is None):
            return Obstacle("no-token-count", self.table.token_reason)
        if piece.traits.random:
            return Obstacle("random", REASONS["random"])
        specs = (*piece.input_specs, *piece.output_specs)
        if any(spec is None for spec in specs):
            return Obstacle("no-tensor", REASONS["no-tensor"])
        tensors = [spec for spec in specs if isinstance(spec, TensorSpec)]
        foreign = {str(s) for spec in tensors for s in spec.symbols if s != self.token_symbol}
        if foreign:
            return Obstacle("other-dynamic-dimension", f"{', '.join(sorted(foreign))} varies, next to the token count")
        if any(spec.device != self.device for spec in tensors):
            devices = ", ".join(sorted({str(spec.device) for spec in tensors}))
            return Obstacle("mixed-devices", f"tensors on {devices}; the graphs are for {self.device}")
        for source, spec in zip(instruction.arguments, piece.input_specs, strict=True):
            register = source if isinstance(source, int) else source[0]
            if isinstance(spec, SymbolSpec) and spec.symbol != self.token_symbol and register >= len(self.inputs):
                return Obstacle("scalar-made-in-call", f"{spec.symbol} is known only in the middle of the call")
        if self._writes_what_two_inputs_hold(instruction):
            return Obstacle("inputs-overlap", REASONS["inputs-overlap"])
        if self.settings.mode == "piecewise":
            stage_inputs = {i.name for i in self.inputs if i.kind == "stage-input"}
            if outliving := outliving_writes(piece.traits, stage_inputs):
                return Obstacle("writes-state", f"it writes {', '.join(outliving)}")
        return None

    def _writes_what_two_inputs_hold(self, instruction: Instruction) -> bool:
        """Whether it writes a stage input that shares memory with another of its inputs: each is read from a copy."""
        written = [
            (self.inputs[source].kind, spec.storage)
            for source, spec in zip(instruction.arguments, instruction.piece.input_specs, strict=True)
            if isinstance(source, int) and source < len(self.inputs) and isinstance(spec, TensorSpec)
            if spec.storage in instruction.piece.traits.written_storages
        ]
        storages = {storage for _, storage in written}
        return len(written) > len(storages) and any(kind == "stage-input" for kind, _ in written)

    @cached_property
    def device(self) -> torch.device:
        """The device of the graph's tensors."""
        devices = [i.spec.device for i in self.inputs if i.spec is not None and i.kind in ("stage-input", "per-token")]
        devices += [i.spec.device for i in self.inputs if i.spec is not None]
        on_accelerator = [device for device in devices if device.type != "cpu"]
        return (on_accelerator or devices or [torch.device("cpu")])[0]

    # -------------------------------------------------------------------------- arrivals

    @cached_property
    def arrivals(self) -> Mapping[int, Arrival]:
        """How each register that exists before the first step reaches captured pieces, for those that one reads."""
        read = {
            register
            for step in self.capturable
            for register, spec in zip(self.instructions[step].arguments, self.piece_specs(step), strict=True)
            if isinstance(register, int) and isinstance(spec, TensorSpec)
        }
        given = len(self.inputs)
        arrivals: dict[int, Arrival] = {}
        for register in sorted(read):
            if register < given:
                arrivals[register] = self._arrival(register)
            elif register < given + len(self.layout.constants):
                arrivals[register] = "constant"
        return arrivals

    def _arrival(self, register: int) -> Arrival:
        graph_input = self.inputs[register]
        spec = graph_input.spec
        assert spec is not None
        if graph_input.kind == "parameter":
            return "parameter"
        if graph_input.kind == "stage-input":
            lands = self.stage is not None and self.stage.check(graph_input.label, spec, graph_input.token_dim) is None
            return "landing" if lands else "copied"
        if spec.storage in self._written_storages("compute"):
            return "address"
        sizes = [size for size in spec.shape if isinstance(size, int)]
        is_small = len(sizes) == len(spec.shape) and math.prod(sizes) * spec.dtype.itemsize <= SMALL_TENSOR_BYTES
        counts_tokens = self.token_symbol is not None and self.token_symbol in spec.symbols
        return "copied" if graph_input.kind == "per-token" or is_small or counts_tokens else "address"

    @cached_property
    def parameter_positions(self) -> tuple[int, ...]:
        return tuple(register for register, arrival in self.arrivals.items() if arrival == "parameter")

    @cached_property
    def address_positions(self) -> tuple[int, ...]:
        return tuple(register for register, arrival in self.arrivals.items() if arrival == "address")

    @cached_property
    def scalar_sources(self) -> tuple[int | tuple[int, int], ...]:
        """Where the integers come from, other than the token count, that captured pieces take."""
        sources: dict[int | tuple[int, int], None] = {}
        for step in self.capturable:
            for source, spec in zip(self.instructions[step].arguments, self.piece_specs(step), strict=True):
                if isinstance(spec, SymbolSpec) and spec.symbol != self.token_symbol:
                    sources[source] = None
        return tuple(sources)

    def depends_on(self, step: int) -> tuple[set[int], set[int]]:
        """Indices into ``address_positions`` and ``scalar_sources`` of what a step reads."""
        arguments = self.instructions[step].arguments
        return (
            {k for k, register in enumerate(self.address_positions) if register in arguments},
            {k for k, source in enumerate(self.scalar_sources) if source in arguments},
        )

    def piece_specs(self, step: int) -> tuple[TensorSpec | SymbolSpec | None, ...]:
        return self.instructions[step].piece.input_specs

    @cached_property
    def captured_readers(self) -> Mapping[int, tuple[int, ...]]:
        """Register of a tensor -> the capturable steps that read it."""
        readers: dict[int, list[int]] = {}
        for step in self.capturable:
            for register, spec in zip(self.instructions[step].arguments, self.piece_specs(step), strict=True):
                if isinstance(register, int) and isinstance(spec, TensorSpec):
                    readers.setdefault(register, []).append(step)
        return {register: tuple(steps) for register, steps in readers.items()}

    @cached_property
    def specs(self) -> Mapping[int, TensorSpec]:
        """Geometry of every register that holds one tensor."""
        specs = {at: i.spec for at, i in enumerate(self.inputs) if i.spec is not None}
        for instruction in self.instructions:
            for source, spec in zip(instruction.arguments, instruction.piece.input_specs, strict=True):
                if isinstance(source, int) and isinstance(spec, TensorSpec):
                    specs.setdefault(source, spec)
            for register, output_spec in zip(instruction.outputs, instruction.piece.output_specs, strict=True):
                if output_spec is not None:
                    specs[register] = output_spec
        return specs

    @cached_property
    def written_registers(self) -> Mapping[int, tuple[int, ...]]:
        """Step -> registers whose memory it writes; of an eager step also the graph inputs that share this memory."""
        registers = self.layout.registers
        found: dict[int, tuple[int, ...]] = {}
        for index, instruction in enumerate(self.instructions):
            written = [registers[name] for name in instruction.piece.traits.writes]
            if instruction.piece.kind == "eager":
                written += self._inputs_in_memory_of(instruction.piece.traits.written_storages)
            found[index] = tuple(dict.fromkeys(written))
        return found

    def _inputs_in_memory_of(self, storages: frozenset[int]) -> list[int]:
        return [at for at, i in enumerate(self.inputs) if i.spec is not None and i.spec.storage in storages]

    def _written_storages(self, kind: str) -> frozenset[int]:
        """Numbers of the storages that steps of this kind write."""
        pieces = (instruction.piece for instruction in self.instructions)
        return frozenset().union(*(piece.traits.written_storages for piece in pieces if piece.kind == kind))

    @cached_property
    def unseen_aliases(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Positions of the inputs that eager steps write, and of those that must not share memory with them.

        The latter reach captured pieces by a copy, and when the graph was traced they shared no memory with the
        former, so nothing refreshes the copy. No guard of Dynamo's tells when they do in a later call.
        """
        storages = self._written_storages("eager")
        tensors = [(at, i.spec.storage) for at, i in enumerate(self.inputs) if i.spec is not None]
        written = tuple(at for at, storage in tensors if storage in storages)
        copied = tuple(
            at for at, storage in tensors if storage not in storages and self.arrivals.get(at) in ("copied", "landing")
        )
        return (written, copied) if written and copied else ((), ())

    @cached_property
    def smallest_written_bytes(self) -> int:
        """What each storage that eager steps write holds at least: no smaller one can be among them."""
        sizes = []
        for at in self.unseen_aliases[0]:
            spec = self.specs[at]
            if spec.symbols:
                return 0
            sizes.append(extent_bytes(*geometry(spec, {}), spec.dtype))
        return min(sizes, default=0)

    @cached_property
    def result_registers(self) -> frozenset[int]:
        return frozenset(r.index for r in self.layout.results if isinstance(r, Register))

    @cached_property
    def input_storages(self) -> frozenset[int]:
        """Numbers of the storages of the graph's inputs."""
        return frozenset(i.spec.storage for i in self.inputs if i.spec is not None)

    @cached_property
    def landing_addresses(self) -> frozenset[int]:
        return self.stage.landing_addresses if self.stage else frozenset()

    def lands_elsewhere(self, args: Sequence[Any], num_tokens: int) -> bool:
        """Whether an argument lies in landing memory that this call is about to overwrite with another argument."""
        stage = self.stage
        if stage is None or not stage.is_shown:
            return False
        elsewhere = []
        for register, pointer, fixed_stride in self._landing_places:
            value, stride = args[register], fixed_stride
            if stride is None:
                _, stride = geometry(self.specs[register], self.symbols(num_tokens))
            if value.data_ptr() != pointer or value.stride() != stride:
                elsewhere.append(register)
        if not elsewhere:
            return False
        in_place = {register for register, _, _ in self._landing_places}.difference(elsewhere)
        return any(
            at not in in_place and address(args[at]) in self.landing_addresses for at in self._passed_in_the_call
        )

    @cached_property
    def _passed_in_the_call(self) -> tuple[int, ...]:
        """Tensors that may lie in landing memory: weights and state outlive a call, and landing memory does not."""
        kinds = ("stage-input", "per-token", "other-tensor")
        return tuple(at for at, i in enumerate(self.inputs) if i.spec is not None and i.kind in kinds)

    @cached_property
    def _landing_places(self) -> tuple[tuple[int, int, tuple[int, ...] | None], ...]:
        """Register of each stage input that lands, the address where captured pieces read it, its strides if fixed."""
        if self.stage is None:
            return ()
        found = []
        for at in (at for at, arrival in self.arrivals.items() if arrival == "landing"):
            stride = tuple(step for step in self.specs[at].stride if isinstance(step, int))
            is_fixed = len(stride) == len(self.specs[at].stride)
            found.append((at, self.stage.landing(self.inputs[at].label).data_ptr(), stride if is_fixed else None))
        return tuple(found)

    @cached_property
    def hoisted(self) -> Mapping[int, tuple[Any, tuple[TensorSpec, ...]]]:
        """Eager steps whose output buffers can be given to them: a callable that takes these behind its arguments."""
        found = {}
        for index, instruction in enumerate(self.instructions):
            allocations = instruction.piece.traits.allocations
            wanted = {
                spec.storage
                for register, spec in zip(instruction.outputs, instruction.piece.output_specs, strict=True)
                if spec is not None and register in self.captured_readers and register not in self.result_registers
            }
            names = [name for name, spec in allocations.items() if spec.storage in wanted]
            names = [name for name in names if allocations[name].symbols <= {self.token_symbol}]
            if names:
                found[index] = (_with_given_buffers(instruction.piece.graph_module, names),
                                tuple(allocations[name] for name in names))  # fmt: skip
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

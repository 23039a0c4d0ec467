"""What of a program can be captured, and how each value reaches the captured pieces. Fixed once the graph is split."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any, Literal

import sympy
import torch

from ..compilation.padding_rules import outliving_writes, token_dims
from ..compilation.placeholders import GraphInput, InputTable
from ..compilation.specs import ObjectSpec, SymbolSpec, TensorSpec, symbols_of
from ..compilation.split import Split
from ..config import Config
from ..utils.addresses import MemoryMap
from ..utils.reasons import Reason, miss
from .apart import Apart
from .cudagraphs.ladder import Ladder
from .cudagraphs.memory import geometry
from .hooks import StageListener
from .instructions import Instruction, Layout
from .ownership import find_boundary
from .stage import Stage

SMALL_TENSOR_BYTES = 64 * 1024
"""Inputs up to this size are copied into static memory in each call; larger ones are read where they are."""

GraphKind = Literal["cuda", "emulate"]

Arrival = Literal["landing", "copied", "parameter", "address", "constant"]
"""How a graph input reaches captured pieces: in landing memory, by a copy, or read at its own (checked) address."""


class GraphPlan:
    """What of a program can be captured, complete once it is made. It holds no tensor but the graph's constants.

    Registers and steps are numbered as in the layout.

    Args:
        kind: the device of the graphs.
        stage: whose landing memory stage inputs are read from, if anyone's.
        is_beside_pieces: whether this is the full graph next to the pieces of the same program, see Note [full graphs
            beside pieces].
    """

    def __init__(
        self,
        layout: Layout,
        split: Split,
        table: InputTable,
        config: Config,
        kind: GraphKind,
        stage: Stage | None,
        is_beside_pieces: bool = False,
    ) -> None:
        self.is_beside_pieces = is_beside_pieces
        self.is_full = is_beside_pieces or config.mode == "full"
        """Whether its graphs hold attention, too, and so have to be proven: see Note [proof of a full graph]."""
        self.gives_way = is_beside_pieces and config.mode == "auto"
        """Whether nobody asked for its graphs, see Note [full graphs by default]."""
        self.layout, self.split, self.table = layout, split, table
        self.config, self.kind, self.stage = config, kind, stage
        self.inputs, self.instructions = inputs, steps = table.inputs, layout.instructions
        self.listener: StageListener | None = None if stage is None else stage.listener
        self.landing_spans = () if stage is None else stage.landing_spans
        self.landing_memory = MemoryMap(product(self.landing_spans, [None]))
        self.pads = config.padding == "tested"
        self.boundary = find_boundary(split, table)
        self.device = _graph_device(inputs)
        """Of the tensors of the graph that pieces may be captured with."""
        self.token_symbol = symbol = table.token_count if isinstance(table.token_count, sympy.Symbol) else None
        """The symbol that counts tokens; None in a graph with a static token count."""
        self.token_source = _token_source(inputs, symbol)
        """Position of the argument that tells the token count, and its dimension if it is a tensor."""
        symbols = [spec for step in steps for spec in step.piece.input_specs if isinstance(spec, SymbolSpec)]
        counts = [spec for spec in symbols if spec.symbol == symbol]  # what the pieces know about its range
        self.smallest_tokens = max([1, *(spec.lower for spec in counts if spec.lower is not None)])
        """The smallest token count that the graph is valid for."""
        ladder = Ladder.from_ranges(config.capture_sizes, config.max_tokens if stage is None else stage.max_tokens)
        upper = [spec.upper for spec in counts if spec.upper is not None]
        self.ladder = ladder.cut_at(max(1, min(upper))) if upper else ladder
        """The buckets, cut at the largest token count that the graph is valid for."""
        self.compute_steps = tuple(at for at, step in enumerate(steps) if step.piece.kind == "compute")
        if table.token_count is None or (symbol is not None and self.token_source is None):
            found: dict[int, Reason | None] = dict.fromkeys(
                self.compute_steps, miss("no-token-count", table.token_reason)
            )
        else:
            found = {at: _obstacle(steps[at], inputs, symbol, self.device, self.is_full) for at in self.compute_steps}
        self.obstacles = {at: reason for at, reason in found.items() if reason is not None}
        """Compute steps that no graph can hold, with the reason; whatever the bucket."""
        self.capturable = tuple(at for at in self.compute_steps if at not in self.obstacles)
        """The other compute steps."""
        self.may_pad = self.pads and any(steps[at].piece.padding_reason is None for at in self.capturable)
        """Whether any of them may be padded, as far as rules tell."""
        self.specs = _specs(inputs, steps)
        """Geometry of every register that holds one tensor."""
        self.captured_readers, scalar_sources = _what_is_read(steps, self.capturable, symbol)
        """Register of a tensor -> the capturable steps that read it."""
        self.written_registers, written_storages = _what_is_written(layout, inputs)
        """Step -> registers whose memory it writes; of an eager step also the graph inputs that share this memory."""
        self.arrivals: dict[int, Arrival] = {}
        """How each register that exists before the first step reaches captured pieces, for those that one reads."""
        for register in sorted(self.captured_readers):
            if register < len(inputs):
                self.arrivals[register] = _arrival(inputs[register], written_storages["compute"], symbol, stage)
            elif register < len(inputs) + len(layout.constants):
                self.arrivals[register] = "constant"
        self.parameter_positions = self._arriving_as("parameter")
        self.address_positions = self._arriving_as("address")
        self.read_in_place = (*self.parameter_positions, *self.address_positions)
        """Positions of the inputs that captured pieces read where the caller has them."""
        self.scalar_sources = tuple(scalar_sources)
        """Objects that captured pieces take, and integers but the token count."""
        self.fixed_sources = (*self.address_positions, *scalar_sources)
        """What must be as it was at capture: addresses of these, then what the others are."""
        self.scalar_names = [_scalar_name(source, inputs) for source in scalar_sources]
        """What these objects and integers are called."""
        # What reaches captured pieces by a copy, which nothing refreshes when an eager step writes where it came from.
        self.copied_apart = self._apart(written_storages["eager"], "copied")
        self.foreign_apart = self._apart(written_storages["eager"], "landing")
        self.result_registers = frozenset(layout.results)
        self.input_storages = frozenset(i.spec.storage for i in inputs if i.spec is not None)
        """Numbers of the storages of the graph's inputs."""
        self.result_storages = frozenset(split.result_storages) - self.input_storages
        """Those in which results lie. A result that is a view of an input is taken from the caller's tensor."""
        self.landing_blocks = {
            at: stage.landing(inputs[at].label).data_ptr() for at in self._arriving_as("landing") if stage is not None
        }
        """Position of each stage input that lands -> the address at which captured pieces read it."""
        self._stage_inputs = {at for at, i in enumerate(inputs) if i.kind == "stage-input"}

    def _apart(self, written_storages: Collection[int], arrival: Arrival) -> Apart | None:
        written = inputs_in_memory_of(written_storages, self.inputs)
        copied = [at for at in self._arriving_as(arrival) if at not in written]
        return Apart(self.inputs, written, copied) if written and copied else None

    def _arriving_as(self, arrival: Arrival) -> tuple[int, ...]:
        return tuple(at for at, found in self.arrivals.items() if found == arrival)

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

    def bucket(self, num_tokens: int) -> int | None:
        """The bucket for a call; a graph with a static token count has that one only. None for too many tokens."""
        if self.token_symbol is None:
            is_one = self.table.may_lack_tokens or num_tokens <= self.ladder.max_tokens
            size = num_tokens if is_one else None
        else:
            size = self.ladder.bucket(num_tokens)
        if self.is_beside_pieces and size is not None:
            is_for_pieces = size > self.proven_tokens or (num_tokens < size and not self.may_pad)
            return None if is_for_pieces else size
        return size

    @property
    def captures_in_warmup_only(self) -> bool:
        return self.config.capture == "warmup" or (self.gives_way and not self.is_held_alone)

    @property
    def is_held_alone(self) -> bool:
        """Whether no other rank holds the stage, too, and would wait for what this one leaves out."""
        return self.stage is None or self.stage.exchange is None

    @property
    def proven_tokens(self) -> int:
        """The largest bucket that is proven before it serves alone, see Note [proof of a full graph]; 0: none is."""
        largest = self.config.full_max_tokens if self.is_beside_pieces else self.ladder.max_tokens
        return largest if self.is_full else 0

    def exchanged(self, own: Any) -> list[Any]:
        """See ``Stage.exchanged``."""
        return [own] if self.stage is None else self.stage.exchanged(own)

    def found_by_any(self, own: Reason | None) -> Reason | None:
        """See ``Stage.found_by_any``."""
        return own if self.stage is None else self.stage.found_by_any(own)

    def depends_on(self, step: int) -> list[int]:
        """Indices into ``fixed_sources`` of what a step reads."""
        arguments = self.instructions[step].arguments
        return [index for index, source in enumerate(self.fixed_sources) if source in arguments]

    def foreign_stage_inputs(self, args: Sequence[Any], num_tokens: int) -> list[int]:
        """Positions of the stage inputs that do not lie in the landing memory where captured pieces read them."""
        strides = {at: geometry(self.specs[at], self.symbols(num_tokens))[1] for at in self.landing_blocks}
        places = self.landing_blocks.items()
        return [at for at, block in places if args[at].data_ptr() != block or args[at].stride() != strides[at]]

    def overwrites_an_argument(self, args: Sequence[Any], foreign: Collection[int]) -> bool:
        """Whether bringing these stage inputs to landing memory may overwrite what the caller passes, or do no good.

        So may whoever listens, once all steps that read stage inputs have run. A copy does no good where an eager step
        writes what was copied.

        What the graph does not use is not among ``args``: where one proxy lies in the memory of another, the other one
        may lie in that of the first, so any argument in landing memory counts that is not in its own place.
        """
        if foreign and self.foreign_apart is not None and self.foreign_apart.are_broken(args):
            return True
        if not (foreign or self.listener) or self.stage is None or not self.stage.is_shown:
            return False
        # Where nothing is copied, only who listens writes there, and it waits for the last reader of any stage input.
        in_place = self.landing_blocks.keys() - foreign if foreign else self._stage_inputs
        return any(at not in in_place and self.landing_memory.holds(args[at]) for at in self.table.passed_in_the_call)


def _token_source(inputs: Sequence[GraphInput], symbol: sympy.Symbol | None) -> tuple[int, int | None] | None:
    for at, graph_input in enumerate(inputs):
        if graph_input.expression is not None and graph_input.expression == symbol:
            return at, None
    for at, graph_input in enumerate(inputs):
        if graph_input.spec is not None and (dims := token_dims(graph_input.spec, symbol)):
            return at, dims[0]
    return None


def _graph_device(inputs: Sequence[GraphInput]) -> torch.device:
    devices = [i.spec.device for i in inputs if i.spec is not None and i.kind in ("stage-input", "per-token")]
    devices += [i.spec.device for i in inputs if i.spec is not None]
    on_accelerator = [device for device in devices if device.type != "cpu"]
    return (on_accelerator or devices or [torch.device("cpu")])[0]


def _obstacle(
    step: Instruction,
    inputs: Sequence[GraphInput],
    symbol: sympy.Symbol | None,
    device: torch.device,
    is_full: bool,
) -> Reason | None:
    """Why no graph can hold the step, whatever the bucket; None if nothing speaks against it."""
    piece = step.piece
    if piece.traits.random:
        return miss("random")
    taken = [inputs[source] for source in step.arguments if isinstance(source, int) and source < len(inputs)]
    if floats := [i.label for i in taken if i.kind == "scalar" and i.spec is not None]:
        return miss(
            "float-varies",
            f"{', '.join(floats)} varies, a Python float, which a graph would freeze: pass it as a tensor, or always "
            f"the same number; torch.compile(dynamic=True) lets every float vary",
        )
    specs = (*piece.input_specs, *piece.output_specs)
    if any(spec is None for spec in specs):
        return miss("no-tensor")
    tensors = [spec for spec in specs if isinstance(spec, TensorSpec)]
    if foreign := {s for spec in tensors for s in spec.symbols if s != symbol}:
        found = ", ".join(sorted({_what_varies(s, inputs) for s in foreign}))
        return miss(
            "other-dynamic-dimension",
            f"{found} varies, next to the token count: pass it as a copy (clone()) of one size, or hold it in a "
            f"buffer of the module; torch._dynamo.mark_static makes a program for each size",
        )
    if any(spec.device != device for spec in tensors):
        devices = ", ".join(sorted({str(spec.device) for spec in tensors}))
        return miss("mixed-devices", f"tensors on {devices}; the graphs are for {device}")
    for source, spec in zip(step.arguments, piece.input_specs, strict=True):
        register = source if isinstance(source, int) else source[0]
        if isinstance(spec, SymbolSpec) and spec.symbol != symbol and register >= len(inputs):
            return miss("scalar-made-in-call", f"{spec.symbol} is known only in the middle of the call")
    if writes_what_two_inputs_hold(step, inputs):
        return miss("inputs-overlap")
    if not is_full:
        stage_inputs = {i.name for i in inputs if i.kind == "stage-input"}
        if outliving := outliving_writes(piece.traits, stage_inputs):
            return miss("writes-state", f"it writes {', '.join(outliving)}")
    return None


def _scalar_name(source: int | tuple[int, int], inputs: Sequence[GraphInput]) -> str:
    at, dim = (source, None) if isinstance(source, int) else source
    name = inputs[at].label if at < len(inputs) else "a number made in the call"
    return name if dim is None else f"dimension {dim} of {name}"


def _what_varies(symbol: sympy.Symbol, inputs: Sequence[GraphInput]) -> str:
    for i in inputs:
        if i.spec is not None and symbol in i.spec.symbols:
            dims = [dim for dim, size in enumerate(i.spec.shape) if symbol in symbols_of((size,))]
            return f"dimension {dims[0]} of {i.label}" if dims else f"the place of {i.label} in its memory"
    return next((i.label for i in inputs if i.expression == symbol), f"{symbol}, a size made in the call,")


def writes_what_two_inputs_hold(step: Instruction, inputs: Sequence[GraphInput]) -> bool:
    """Whether it writes a stage input that shares memory with another of its inputs: each is read from a copy."""
    written = [
        (inputs[source].kind, spec.storage)
        for source, spec in zip(step.arguments, step.piece.input_specs, strict=True)
        if isinstance(source, int) and source < len(inputs) and isinstance(spec, TensorSpec)
        if spec.storage in step.piece.traits.written_storages
    ]
    storages = {storage for _, storage in written}
    return len(written) > len(storages) and any(kind == "stage-input" for kind, _ in written)


def _what_is_read(
    steps: Sequence[Instruction], capturable: Sequence[int], symbol: sympy.Symbol | None
) -> tuple[dict[int, tuple[int, ...]], tuple[int | tuple[int, int], ...]]:
    """What captured pieces take: register of a tensor -> its readers, and where objects and other integers are."""
    readers: dict[int, tuple[int, ...]] = {}
    scalars: dict[int | tuple[int, int], None] = {}
    for at in capturable:
        for source, spec in zip(steps[at].arguments, steps[at].piece.input_specs, strict=True):
            if isinstance(spec, TensorSpec) and isinstance(source, int):
                readers[source] = (*readers.get(source, ()), at)
            elif isinstance(spec, ObjectSpec) or (isinstance(spec, SymbolSpec) and spec.symbol != symbol):
                scalars[source] = None
    return readers, tuple(scalars)


def _what_is_written(
    layout: Layout, inputs: Sequence[GraphInput]
) -> tuple[dict[int, tuple[int, ...]], dict[str, set[int]]]:
    """Step -> registers that it writes, and kind of step -> numbers of the storages that such steps write."""
    registers: dict[int, tuple[int, ...]] = {}
    storages: dict[str, set[int]] = {"compute": set(), "eager": set()}
    for at, step in enumerate(layout.instructions):
        traits = step.piece.traits
        written = [layout.registers[name] for name in traits.writes]
        if step.piece.kind == "eager":
            written += inputs_in_memory_of(traits.written_storages, inputs)
        registers[at] = tuple(dict.fromkeys(written))
        storages[step.piece.kind] |= traits.written_storages
    return registers, storages


def _specs(inputs: Sequence[GraphInput], steps: Sequence[Instruction]) -> dict[int, TensorSpec]:
    specs = {at: i.spec for at, i in enumerate(inputs) if i.spec is not None}
    for step in steps:
        for source, spec in zip(step.arguments, step.piece.input_specs, strict=True):
            if isinstance(source, int) and isinstance(spec, TensorSpec):
                specs.setdefault(source, spec)
        for register, output_spec in zip(step.outputs, step.piece.output_specs, strict=True):
            if output_spec is not None:
                specs[register] = output_spec
    return specs


def inputs_in_memory_of(storages: Collection[int], inputs: Sequence[GraphInput]) -> list[int]:
    """Positions of the graph inputs that lie in one of these storages."""
    return [at for at, i in enumerate(inputs) if i.spec is not None and i.spec.storage in storages]


def _arrival(
    graph_input: GraphInput, written: Collection[int], symbol: sympy.Symbol | None, stage: Stage | None
) -> Arrival:
    """How captured pieces come by a graph input; ``written``: numbers of the storages that compute pieces write."""
    spec = graph_input.spec
    assert spec is not None
    if graph_input.kind == "parameter":
        return "parameter"
    if graph_input.kind == "stage-input":
        lands = stage is not None and stage.check(graph_input.label, spec, graph_input.token_dim) is None
        return "landing" if lands else "copied"
    if spec.storage in written:
        return "address"
    sizes = [size for size in spec.shape if isinstance(size, int)]
    is_small = len(sizes) == len(spec.shape) and prod(sizes) * spec.dtype.itemsize <= SMALL_TENSOR_BYTES
    counts_tokens = symbol is not None and symbol in spec.symbols
    return "copied" if graph_input.kind == "per-token" or is_small or counts_tokens else "address"

"""What Dynamo gets back for one graph: a callable that replays captured pieces, or runs them in order.

Note [full graphs beside pieces]
A full graph is captured from one instruction that runs all steps of the split graph in order, the compiled pieces and
attention between them. So nothing is compiled twice, and replaying it gives bit for bit what the steps give. What the
instruction takes, gives, reads and writes is known from the same graph split as one step, and everything that holds for
a piece holds for it: addresses are checked and padding needs a proof. A call that it cannot serve goes on to the
pieces, which count their own misses.

Note [parts of a full graph]
Nothing inside of a graph can notify the host. So where somebody hands the memory of a stage over, a full graph is cut
into up to three, launched one right after the other: after the last piece that reads landing memory, and before the
first one that writes results. The next proxies land, and the last results leave, while the one between computes. What
would take the host long between two launches is only noted there, and done after the last one.

Note [full graphs by default] (``mode="auto"``)
Nobody asked for such a full graph. So there is one only where rule R9 is known to hold: every op of the graph, those of
pieces included, is PyTorch's own, built into the list of graph-safe ops or named in ``graph_safe_ops``, and nothing but
tensors and the token count enters. The first one of a size is captured in ``warmup()``, where calls under other
contexts compare it; those for other places of large tensors, such as another KV cache, come only once that one has
passed all its comparisons, and have their own. Wherever something speaks against it, it gives way: what differs, lacks
memory, or fails while it is captured drops that size with a reason, also under ``strict``, and the pieces go on as
without it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch

from .. import errors
from ..compilation.placeholders import GraphInput, InputTable
from ..compilation.split import Piece, Split
from ..utils import torch_compat
from ..utils.counters import TOTALS, Stats, counted
from ..utils.reasons import Reason, miss
from .apart import Apart
from .bucket import Bucket
from .capture_plan import GraphKind, GraphPlan
from .cudagraphs.foreign import capture_check
from .cudagraphs.memory import like
from .dispatch import NO_ADDRESSES, Addresses, Graphs, ParameterSet
from .hooks import NO_EVENTS, Events, Notice, StageListener
from .instructions import Layout, Notices, lay_out, lay_out_in_one
from .ownership import LandingWatch, find_boundary, merged_results
from .replay import Call
from .stage import Stage, StageMemory
from .warmup import Measured, Session, Stopwatch, current_session

if TYPE_CHECKING:
    from ..compilation.inductor import CompiledPiece
    from ..config import Config


class Program:
    """One graph, split and compiled, as the callable that Dynamo runs. Threads may call it at the same time.

    With graphs, it holds static memory and captured graphs until ``release``. What it returns belongs to the caller,
    unless ``static_outputs`` is set: then results are valid until the next call of any program of the stage.
    """

    def __init__(
        self,
        name: str,
        split: Split,
        table: InputTable,
        compiled: Sequence[CompiledPiece | None],
        config: Config,
        *,
        stage: Stage | None = None,
        graph_kind: GraphKind | None = None,
        graphs_off_reason: str = "",
        events: Events = NO_EVENTS,
        explain: Callable[[Any], str] = repr,
    ) -> None:
        self.name = name
        self._explain = explain
        self.split = split
        self.table = table
        self.inputs: tuple[GraphInput, ...] = table.inputs
        """Its graph inputs, in the order in which it is called with them."""
        self.config = config
        self.compiled = tuple(compiled)
        self.stage = stage
        self.stats = Stats(parent=TOTALS if stage is None else stage.stats)
        self.events = events
        """Who writes down what happens, if anybody does."""
        self.graphs_off_reason = graphs_off_reason
        """Why there are no graphs, if there are none."""
        self.plain_runs: dict[int, str] = {}
        """Compute pieces that ran as plain FX at least once, with the reason."""
        self.whole_plain_run: str | None = None
        """Why a call ran the graph as it came, if one did."""
        self.layout = lay_out(split, table, compiled, pieces_are_exact=config.compiler == "eager")
        self._exclusive = [at for at in table.tensors if table.inputs[at].name in split.cuts.exclusive_inputs]
        """Positions of the inputs whose writes were moved, or given to a compiler."""
        self._equal_rows = table.equal_rows
        numbers = [(at, i.expression) for at, i in enumerate(table.inputs) if i.spec is None]
        self._fixed_numbers = [(at, number) for at, number in numbers if isinstance(number, int)]
        """Positions of numbers that Dynamo guards, and their values. An engine may drop all guards."""
        self.boundary = find_boundary(split, table)
        self._merged_results: tuple[int, ...] | None = None
        self._is_captured = capture_check({i.spec.device.type for i in table.inputs if i.spec is not None})
        """Whether a call is made while somebody captures, see Note [inside a foreign capture]."""
        self._eager_steps = sum(piece.kind == "eager" for piece in split.pieces)
        self.graphs: Graphs | None = None
        self.full: FullGraphs | None = None
        """Full graphs beside the pieces, where ``mode`` asks for them."""
        if graph_kind is not None:
            plan = GraphPlan(self.layout, split, table, config, graph_kind, stage)
            memory = StageMemory() if stage is None else stage.memory
            self.graphs = Graphs(plan, memory, self.stats, name, events)
            # At interpreter exit, too, graphs go before the memory that they read.
            self._finalizer = weakref.finalize(self, self.graphs.release_unlocked)
            if split.in_one is not None:
                self.full = FullGraphs(split, self.layout, table, plan, memory, self.stats, name, events)
                if self.full.graphs is not None:
                    self._full_finalizer = weakref.finalize(self, self.full.graphs.release_unlocked)
        known = () if self.graphs is None else self.graphs.plan.read_in_place
        self._apart = Apart(table.inputs, self._exclusive, table.tensors, known) if self._exclusive else None

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Its steps in order, compute pieces and eager steps, with what is known by now about padding them."""
        graphs = self.graphs
        if graphs is None:
            return self.split.pieces
        return tuple(
            replace(piece, padding=graphs.padding_of(index)) if piece.kind == "compute" else piece
            for index, piece in enumerate(self.split.pieces)
        )

    @property
    def step_seconds(self) -> dict[int, float]:
        """Step -> seconds that it took, with all that it enqueued, when the largest bucket was captured."""
        buckets = [] if self.graphs is None else self.graphs.buckets
        return dict(buckets[0][0].step_seconds) if buckets else {}

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        session = current_session()
        is_captured = self._is_captured()
        if not torch.is_grad_enabled() and session is None and not is_captured:
            return self._run(args, None)
        with torch.no_grad():
            if is_captured:
                return self._run_inside_a_capture(args, session)
            if session is None:
                return self._run(args, None)
            session.note(self.name, self.config, self.stage, [graphs.plan for graphs in self._all_graphs])
            device = None if self.stage is None else self.stage.device
            with session.leaving_no_trace(self.inputs, args, self.stage) as restore:
                if self.full is not None and session.captures:  # next to the pieces, for calls that it cannot serve
                    self.full.capture(args, session)
                    restore()
                if self.config.keep == "if_faster" and session.stopwatch is not None:
                    self._weigh(args, session, session.stopwatch, restore)
                    restore()
                with session.timing(device):
                    return self._run(args, session)

    def release(self) -> None:
        """Release graphs and static memory; a later call takes them again. Raises inside a call of the program."""
        for graphs in self._all_graphs:
            graphs.release()

    @property
    def _all_graphs(self) -> list[Graphs]:
        """Those of pieces and, after them, the full ones, as far as it has any."""
        found = (self.graphs, None if self.full is None else self.full.graphs)
        return [graphs for graphs in found if graphs is not None]

    @property
    def all_buckets(self) -> list[tuple[Bucket, ParameterSet]]:
        """What is captured now, of pieces and as full graphs."""
        found = [] if self.graphs is None else self.graphs.buckets
        return found if self.full is None else [*found, *self.full.buckets]

    @property
    def __code__(self) -> CodeType:
        """What debuggers of compiled code, such as ``depyf.prepare_debug``, ask every compiled function for."""
        return type(self).__call__.__code__

    @classmethod
    def serialize_compile_artifacts(cls, program: Any) -> bytes:
        """What ``aot_compile`` calls to save a program; it serves without that."""
        raise errors.PPPiecewiseError(errors.program_is_not_saved(program.name))

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Any:
        """Its counterpart, for which there is nothing to load."""
        raise errors.PPPiecewiseError(errors.program_is_not_saved("A program"))

    def explain(self) -> str:
        """What was split where and why, what each input is, what is captured and why calls missed."""
        return self._explain(self)

    def __repr__(self) -> str:
        stats, keys = self.stats.snapshot(), [piece.key for piece in self.split.pieces if piece.kind == "compute"]
        steps, pieces = counted(len(self.split.pieces), "step"), counted(len(keys), "piece")
        calls, misses = counted(stats.calls, "call"), counted(stats.graph_misses, "miss", "misses")
        return f"<{self.name}: {steps}, {pieces} ({len(set(keys))} distinct), {calls}, {misses}>"

    def _weigh(self, args: Sequence[Any], session: Session, stopwatch: Stopwatch, restore: Callable[[], None]) -> None:
        """Drop the captures for calls like this one that are not faster than what would run in their place."""
        if self.graphs is None:
            return
        sides: list[tuple[Graphs, int]] = []
        alternatives: list[Callable[[], object]] = [lambda: self._run_uncaptured(args, None)]
        for graphs in self._all_graphs:
            if (size := graphs.size_to_weigh(args)) is not None:
                run = partial(graphs.run, args, graphs.addresses(args), session)
                if run() is not None:
                    sides.append((graphs, size))
                    alternatives.append(run)
        if not sides:
            return
        plan = self.graphs.plan
        found_us = stopwatch.medians_us(alternatives, restore, plan.device)
        # Of the slowest rank, see Note [ranks decide alike].
        without_us, *replays_us = (max(times_us) for times_us in zip(*plan.exchanged(found_us), strict=True))
        otherwise, otherwise_us = "the compiled pieces without graphs", without_us
        for (graphs, size), replay_us in zip(sides, replays_us, strict=True):
            if graphs.weigh(size, Measured(replay_us, otherwise_us, otherwise), session):
                otherwise, otherwise_us = "replays of the pieces", replay_us

    # ---------------------------------------------------------------------- running

    def _run(self, args: Sequence[Any], session: Session | None) -> tuple[Any, ...]:
        return self._counted(*self._results(args, session), session)

    def _run_inside_a_capture(self, args: Sequence[Any], session: Session | None) -> tuple[Any, ...]:
        """See Note [inside a foreign capture]."""
        addresses = NO_ADDRESSES if self.graphs is None else self.graphs.addresses(args)
        reason = self._rows_disagree(args) or self._inputs_overlap(args, addresses)
        if reason is None:
            results, call = self._run_uncaptured(args, None)
        else:
            self.whole_plain_run = reason.sentence
            results, call = self.split.whole(*args), Call([])
        call.foreign_captures = 1
        return self._counted(results, call, session)

    def _counted(self, results: Sequence[Any], call: Call, session: Session | None) -> tuple[Any, ...]:
        if call.plain:
            for step, sizes in call.plain.items():
                self.plain_runs[step] = f"the compiled code does not hold for sizes {list(sizes)}"
        if session is None:
            call.amounts.add_to(self.stats)
        return tuple(results)

    def _results(self, args: Sequence[Any], session: Session | None) -> tuple[Sequence[Any], Call]:
        if (reason := self._rows_disagree(args)) is not None:
            return self._run_whole(args, reason, session)
        if self.full is not None and (session is None or not session.captures):
            outcome = self.full.run(args, session)
            if outcome is not None:
                return outcome
        graphs = self.graphs
        addresses = NO_ADDRESSES if graphs is None else graphs.addresses(args)
        if (reason := self._inputs_overlap(args, addresses)) is not None:
            return self._run_whole(args, reason, session)
        if graphs is not None:
            outcome = graphs.run(args, addresses, session)
            if outcome is not None:
                return outcome
        return self._run_uncaptured(args, None if self.stage is None else self.stage.listener)

    def _rows_disagree(self, args: Sequence[Any]) -> Reason | None:
        if self._equal_rows and len({args[position].size(dim) for position, dim in self._equal_rows}) > 1:
            names = ", ".join(self.inputs[position].label for position, _ in self._equal_rows)
            return miss("rows-disagree", f"{names} have different numbers of rows")
        for at, number in self._fixed_numbers:
            if args[at] != number:
                traced = f"{number} in the call that was traced"
                return miss("rows-disagree", f"{self.inputs[at].readable} is {args[at]}, and {traced}")
        return None

    def _inputs_overlap(self, args: Sequence[Any], addresses: Addresses) -> Reason | None:
        if self._apart is None or not self._apart.are_broken(args, addresses):
            return None
        names = ", ".join(self.inputs[position].label for position in self._exclusive)
        return miss("inputs-overlap", f"inputs that the graph writes ({names}) share memory with other inputs")

    def _run_uncaptured(self, args: Sequence[Any], listener: StageListener | None) -> tuple[list[Any], Call]:
        call = Call([])
        call.eager_steps = self._eager_steps
        if listener is None:
            results, call.plain = self.layout.run(args)
        else:
            results, call.plain = self.layout.run(args, self._releasing(args, listener), listener.timeline)
        merged = self._merged_results
        if merged is None:
            merged = merged_results(self.inputs, args, results, self.split)
            # Plain FX does not merge what compiled code may.
            self._merged_results = None if call.plain else merged
        for index in merged:
            results[index] = like(results[index])
        return results, call

    def _releasing(self, args: Sequence[Any], listener: StageListener) -> Callable[[int, Sequence[Any]], None]:
        """What to do after each step of an un-captured call, see Note [early release]."""
        assert self.stage is not None
        boundary, watch = self.boundary, LandingWatch(self.split, self.boundary, self.stage.landing_spans)
        passed = [at for at in self.table.passed_in_the_call if self.inputs[at].spec is not None]
        watch.look_at([args[at] for at in passed], [self.inputs[at].spec for at in passed])

        def after_step(step: int, outputs: Sequence[Any]) -> None:
            if boundary.last_reader is None or step > boundary.last_reader:
                return
            watch.after_step(step, outputs)
            if step == boundary.last_reader and step + 1 < len(self.split.pieces) and not watch.found:
                listener.landing_was_read()

        return after_step

    def _run_whole(self, args: Sequence[Any], reason: Reason, session: Session | None) -> tuple[Sequence[Any], Call]:
        self.whole_plain_run = reason.sentence
        if self.graphs is not None:
            self.graphs.miss(reason, args, session)
        return self.split.whole(*args), Call([])


class FullGraphs:
    """The full graphs of one program.

    Args:
        split: cut into pieces; ``split.in_one`` is the same graph as one step, or why it cannot be one.
        pieces: what the graphs are captured from.
        plan: of the pieces.
        memory: that the graphs of the pieces use, too.
    """

    def __init__(
        self,
        split: Split,
        pieces: Layout,
        table: InputTable,
        plan: GraphPlan,
        memory: StageMemory,
        stats: Stats,
        name: str,
        events: Events,
    ) -> None:
        self.graphs: Graphs | None = None
        """None where there can be no full graph; see ``why_not``."""
        self.max_tokens = plan.config.full_max_tokens
        self._apart: Apart | None = None
        layout = lay_out_in_one(split, pieces, table, _notices(split, plan), is_exact=plan.config.compiler == "eager")
        self.why_not = layout if isinstance(layout, str) else ""
        """Why there can be no full graph, whatever the size."""
        if isinstance(layout, str):
            return
        assert isinstance(split.in_one, Split)
        own = GraphPlan(layout, split.in_one, table, plan.config, plan.kind, plan.stage, is_beside_pieces=True)
        if not own.capturable:
            self.why_not = "; ".join(dict.fromkeys(reason.sentence for reason in own.obstacles.values()))
            return
        if own.gives_way and own.scalar_names:
            self.why_not = errors.number_in_full_graph(own.scalar_names)
            return
        self.graphs = Graphs(own, memory, stats, name, events)
        written = [at for at in table.tensors if table.inputs[at].name in split.in_one.cuts.exclusive_inputs]
        if written:
            self._apart = Apart(table.inputs, written, table.tensors, own.read_in_place)

    def run(self, args: Sequence[Any], session: Session | None) -> tuple[list[Any], Call] | None:
        """The graph's results, or None where the call is one for the pieces; then nothing was run."""
        graphs = self.graphs
        if graphs is None:
            return None
        plan = graphs.plan
        if plan.gives_way and session is None and not graphs.was_used:
            return None
        num_tokens = plan.count_tokens(args)
        size = None if num_tokens is None else plan.bucket(num_tokens)
        if size is None:
            return None
        if size in graphs.dropped:
            graphs.miss(graphs.dropped[size], args, session)
            return None
        addresses = graphs.addresses(args)
        if self._apart is not None and self._apart.are_broken(args, addresses):
            graphs.miss(miss("inputs-overlap"), args, session)
            return None
        return graphs.run(args, addresses, session)

    def capture(self, args: Sequence[Any], session: Session) -> None:
        """Run a call of a warm-up, whose writes are undone and whose results nobody needs."""
        try:
            self.run(args, session)
        except Exception as error:
            if self.graphs is None or not (self.graphs.gives_way and self.graphs.plan.is_held_alone):
                raise
            # If it is the model's, the pieces raise it, too.
            self.graphs.give_up(args, miss("capture-failed", f"{type(error).__name__}: {error}"))

    @property
    def buckets(self) -> list[tuple[Bucket, ParameterSet]]:
        """What is captured now, largest bucket first."""
        return [] if self.graphs is None else self.graphs.buckets


def _notices(split: Split, plan: GraphPlan) -> Notices | None:
    """The notices in a full graph of these pieces, see Note [parts of a full graph]."""
    boundary, before = plan.boundary, dict[int, tuple[Notice, ...]]()
    if plan.listener is not None and boundary.last_reader is not None:
        before[boundary.last_reader + 1] = ("mark_landing_read",)
    if plan.listener is not None and boundary.first_writer and plan.config.static_outputs:
        before[boundary.first_writer] = (*before.get(boundary.first_writer, ()), "results_are_written")
    before.pop(len(split.pieces), None)
    watch = partial(LandingWatch, split, boundary, plan.landing_spans)
    with_results = next((piece for piece, due in before.items() if "results_are_written" in due), 0)
    return Notices(before, with_results, watch) if before else None


class UnsplitProgram:
    """A graph that was given to a stock backend whole. It answers the same questions as a Program."""

    pieces: tuple[Piece, ...] = ()
    inputs: tuple[GraphInput, ...] = ()
    graphs = None
    full = None
    all_buckets: tuple[tuple[Bucket, ParameterSet], ...] = ()
    events = NO_EVENTS
    __code__ = Program.__code__
    serialize_compile_artifacts = Program.serialize_compile_artifacts
    deserialize_compile_artifacts = Program.deserialize_compile_artifacts

    def __init__(
        self,
        name: str,
        call: Callable[..., Any],
        config: Config,
        reason: str,
        counter: str | None = None,
        explain: Callable[[Any], str] = repr,
        stage: Stage | None = None,
    ) -> None:
        self.name = name
        self._explain = explain
        self.config = config
        self.stage = stage
        self.reason = reason
        self.stats = Stats(parent=TOTALS if stage is None else stage.stats)
        self._call = call
        self._amounts = {"calls": 1} if counter is None else {"calls": 1, counter: 1}

    def __call__(self, *args: Any) -> Any:
        session = current_session()
        if session is None:
            self.stats.add_many(self._amounts)
        else:
            session.note(self.name, self.config, self.stage, ())
        return self._call(*args)

    def release(self) -> None:
        """It holds nothing of ours."""

    def explain(self) -> str:
        """Why the graph is not split."""
        return self._explain(self)

    def __repr__(self) -> str:
        return f"<{self.name}: not split, {counted(self.stats.calls, 'call')}>"


torch_compat.allow_ahead_of_time(Program)
torch_compat.allow_ahead_of_time(UnsplitProgram)

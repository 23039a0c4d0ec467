"""Decides for each call which graphs replay: buckets, sets of parameters, what moved, what is captured when.

Note [sets of parameters] (rule R7)
Dynamo may run several module instances through one program. Captures hang on the addresses of the parameters that the
pieces read: another instance, or a parameter that was given other memory, is another set with captures of its own.
Nothing is ever copied into a tensor that is read by address.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from threading import get_ident
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch

from .. import errors
from ..utils import torch_compat
from ..utils.counters import Stats
from ..utils.reasons import Reason, miss
from .bucket import Bucket, BucketCapture, Verdicts, addresses, hoist_buffers, may_pad, scalars
from .capture_plan import GraphPlan
from .cudagraphs.cuda import CudaDevice
from .cudagraphs.device import Device
from .cudagraphs.emulated import EmulatedDevice
from .cudagraphs.memory import address
from .hooks import NO_EVENTS, Events
from .ownership import hand_over, merged_results
from .replay import Call, FlatProgram
from .stage import StageMemory
from .warmup import Session

_LOG = logging.getLogger(__name__)

MAX_PARAMETER_SETS = 32
"""Sets of parameters with captures at one time; the one not used for longest goes first."""

MAX_CAPTURED_SETS = 128
"""Sets of parameters that are captured in a program's life."""

MAX_RECAPTURES = 4
"""How often one bucket is captured again because something that it reads by address moved and stayed."""

MAX_FLAT_PROGRAMS = 64
"""Flat programs kept per bucket; each holds the views for one number of tokens."""


WhyNot: TypeAlias = Reason | Mapping[int, Reason]
"""Why a call runs without graphs: one reason for all its pieces, or each with its own, by step."""

_NOTHING_CHECKED: tuple[tuple[int, ...], tuple[int, ...]] = (), ()
_NOTHING_MOVED: Mapping[int, Reason] = MappingProxyType({})


MAX_MISSES_LOGGED = 256


class Misses(NamedTuple):
    """Calls that missed for one reason with one number of tokens."""

    calls: int
    pieces: int
    last_call: int
    """Which call of the program was the last of them, counted from 1."""


@dataclass
class ParameterSet:
    """Captures for one tuple of parameter addresses."""

    verdicts: Verdicts = field(default_factory=Verdicts)
    buckets: dict[int, Bucket] = field(default_factory=dict)
    calls_seen: dict[int, int] = field(default_factory=dict)
    """Bucket -> calls that could have used it before it was captured."""
    recaptures: dict[int, int] = field(default_factory=dict)
    moved_to: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    """Bucket -> where a call found what it reads by address, if not where it was captured."""


class Graphs:
    """The captured side of a program. One call at a time uses it; others run without graphs meanwhile."""

    def __init__(
        self, plan: GraphPlan, memory: StageMemory, stats: Stats, name: str, events: Events = NO_EVENTS
    ) -> None:
        self.plan = plan
        self._events = events
        self.name = name
        self._memory = memory
        self._hoisted = hoist_buffers(plan)
        self._stats = stats
        self._device: Device = make_device(plan.kind, plan.config.compiler != "inductor")
        self._sets: OrderedDict[tuple[Any, ...], ParameterSet] = OrderedDict()
        self._last_set: tuple[tuple[Any, ...] | None, ParameterSet | None] = None, None
        """The set of the last call: to compare its addresses costs less than to hash them."""
        self._sets_captured = 0
        self._dropped: dict[int, Reason] = {}
        """Buckets that are captured no more, and why."""
        self.miss_log: OrderedDict[tuple[Reason, int | None], Misses] = OrderedDict()
        """Reason and number of tokens, if known -> what was missed, for reports; the latest are kept."""
        self._calls = 0
        written, self._copied = plan.unseen_aliases
        self._written = itemgetter(*written, written[0]) if written else None  # two at least, for a tuple
        self._written_pointers: tuple[int, ...] = ()
        self._written_memory: set[int] = set()
        """Storages of the inputs that eager steps write, as long as they lie at these addresses."""
        self._more_to_check = bool(plan.address_positions or plan.scalar_sources)
        positions = plan.parameter_positions
        self._parameters = itemgetter(*positions) if len(positions) > 1 else None

    # ------------------------------------------------------------------------------ calls

    def run(self, args: Sequence[Any], session: Session | None) -> tuple[list[Any], Call] | None:
        """The graph's results, or None where the call is to run without graphs; then every miss is counted.

        Args:
            session: the warm-up that makes the call, if one does: its calls are not counted.

        Raises:
            GraphMiss: under ``strict``, for a miss other than the first call of a bucket or a call above the largest.
        """
        num_tokens = self.plan.count_tokens(args)
        outcome = self._try(args, num_tokens, session)
        if isinstance(outcome, tuple):
            return outcome
        self._miss_all(outcome, num_tokens, session)
        return None

    def _try(
        self, args: Sequence[Any], num_tokens: int | None, session: Session | None
    ) -> tuple[list[Any], Call] | WhyNot:
        """The results, or why the call runs without graphs."""
        plan = self.plan
        if not plan.capturable or num_tokens is None:
            return plan.obstacles
        size = plan.bucket(num_tokens)
        if size is None:
            return miss("over-max")
        if self._device.is_capturing():
            return miss("outer-capture")
        memory = self._memory
        if not memory.lock.acquire(blocking=False):
            return miss("concurrent-call")
        try:
            memory.holder = get_ident()
            return self._run_in_bucket(args, num_tokens, size, session)
        finally:
            memory.holder = None
            memory.lock.release()

    def _run_in_bucket(
        self, args: Sequence[Any], num_tokens: int, size: int, session: Session | None
    ) -> tuple[list[Any], Call] | WhyNot:
        if self._meets_written_memory(args):
            return miss("inputs-overlap")
        parameters = self._parameter_set(args)
        if isinstance(parameters, Reason):
            return parameters
        usable = self._usable_bucket(parameters, args, size)
        if isinstance(usable, Reason):
            return usable
        if usable is not None:
            return self._run_flat(self._flat_program(parameters, *usable, num_tokens), args, session)
        foreign = self.plan.foreign_stage_inputs(args, num_tokens)
        if self.plan.overwrites_an_argument(args, foreign):
            return miss("inputs-overlap")
        why_not = self._why_not_capture(parameters, num_tokens, size, session)
        return why_not if why_not is not None else self._capture(parameters, args, num_tokens, size, session)

    def _parameter_set(self, args: Sequence[Any]) -> ParameterSet | Reason:
        """The captures for the parameters of this call, none yet if they are new."""
        key = self._parameter_addresses(args)
        last_key, parameters = self._last_set
        if key != last_key:
            parameters = self._sets.get(key)
        if parameters is None:
            if self._sets_captured >= MAX_CAPTURED_SETS:
                return miss("moved-too-often", f"{self._sets_captured} sets of parameters were captured already")
            parameters = self._new_set(key)
        elif len(self._sets) > 1:
            self._sets.move_to_end(key)
        self._last_set = key, parameters
        return parameters

    def _usable_bucket(
        self, parameters: ParameterSet, args: Sequence[Any], size: int
    ) -> tuple[Bucket, Mapping[int, Reason]] | Reason | None:
        """What was captured, and the steps that cannot replay since what they read moved; None if it is to capture."""
        if size in self._dropped:
            return self._dropped[size]
        bucket = parameters.buckets.get(size)
        if bucket is None:
            return None
        here = (addresses(self.plan, args), scalars(self.plan, args)) if self._more_to_check else _NOTHING_CHECKED
        if here == (bucket.addresses, bucket.scalars):
            return bucket, _NOTHING_MOVED
        if not self._shall_recapture(parameters, size, here):
            return bucket, self._moved(bucket, here)
        self._release_bucket(parameters, size)
        parameters.calls_seen[size] = 1
        return None

    def _run_flat(
        self, program: FlatProgram, args: Sequence[Any], session: Session | None
    ) -> tuple[list[Any], Call] | Reason:
        """The results of a call that replays, or why these inputs must not be brought to where replays read them."""
        config = self.plan.config
        if not program.admits(args):
            return miss("rows-disagree")
        call = program.begin(args)
        if call.foreign and self.plan.overwrites_an_argument(args, call.foreign):
            return miss("inputs-overlap")
        if config.strict:
            self._refuse(program.miss_counts, program.num_tokens)
        self._calls += 1
        if self._memory.given_out:
            self._memory.spoil_given_out()
        if config.verify_every and self._calls % config.verify_every == 0:
            results = self._run_verified(program, args, call)
        else:
            results = program.run(args, call)
        self._hand_over(args, results, program.bucket, call, program)
        if session is None:
            self._end(program, call)
        return results, call

    def _meets_written_memory(self, args: Sequence[Any]) -> bool:
        """Whether pieces would read a copy of what an eager step of this very call writes."""
        if self._written is None:
            return False
        smallest = self.plan.smallest_written_bytes
        if all(args[position].untyped_storage().nbytes() < smallest for position in self._copied):
            return False
        written = self._written(args)
        pointers = tuple(map(torch.Tensor.data_ptr, written))
        if pointers != self._written_pointers:
            self._written_pointers = pointers
            self._written_memory = {address(tensor) for tensor in written if tensor.numel()}
        return any(address(args[position]) in self._written_memory for position in self._copied)

    def _parameter_addresses(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Where the parameters lie and, where Dynamo does not look, how: see Note [sets of parameters]."""
        if self._parameters is not None:
            parameters = self._parameters(args)
        else:
            parameters = tuple(args[position] for position in self.plan.parameter_positions)
        found = tuple(map(torch.Tensor.data_ptr, parameters))
        return found if torch_compat.GUARDS_PARAMETER_STRIDES else (*found, *map(torch.Tensor.stride, parameters))

    def _flat_program(
        self, parameters: ParameterSet, bucket: Bucket, moved: Mapping[int, Reason], num_tokens: int
    ) -> FlatProgram:
        key = (num_tokens, tuple(moved.items())) if moved else num_tokens
        program = bucket.programs.get(key)
        if program is None:
            misses = dict(moved)
            for step in self.plan.compute_steps:
                obstacle = self.plan.obstacles.get(step) or bucket.obstacles.get(step)
                if obstacle is None and num_tokens < bucket.tokens:
                    obstacle = may_pad(self.plan, parameters.verdicts, step)
                if obstacle is not None:
                    misses[step] = obstacle
            if len(bucket.programs) >= MAX_FLAT_PROGRAMS:
                bucket.programs.pop(next(iter(bucket.programs)))
            program = bucket.programs[key] = FlatProgram(self.plan, bucket, num_tokens, misses)
        return program

    def _hand_over(
        self,
        args: Sequence[Any],
        results: list[Any],
        bucket: Bucket,
        call: Call,
        program: FlatProgram | None,
        may_be_static: bool = True,
    ) -> None:
        """Replace results by copies that belong to the caller, unless static outputs may be."""
        plan = self.plan
        storages = plan.split.result_storages
        static = bucket.overwritten
        if plan.config.static_outputs and may_be_static:
            if plan.config.strict and plan.kind == "emulate" and plan.listener is None:
                # Copies, so that they can be spoiled for good: the next call writes valid values into static memory.
                in_static_memory = list(results)
                hand_over(results, storages, plan.input_storages, static)
                pairs = zip(results, in_static_memory, strict=True)
                self._memory.given_out = [weakref.ref(given) for given, other in pairs if given is not other]
            return
        call.output_copies = hand_over(results, storages, plan.input_storages, static)
        merged = program.merged_results if program is not None else None
        if merged is None:
            merged = merged_results(plan.inputs, args, results, storages)
            if program is not None:
                program.merged_results = merged
        for index in merged:
            results[index] = results[index].clone()

    # ------------------------------------------------------------------------- capturing

    def _new_set(self, key: tuple[Any, ...]) -> ParameterSet:
        if len(self._sets) >= MAX_PARAMETER_SETS:
            _, oldest = self._sets.popitem(last=False)
            for size in list(oldest.buckets):
                self._release_bucket(oldest, size)
        parameters = self._sets[key] = ParameterSet()
        return parameters

    def _why_not_capture(
        self, parameters: ParameterSet, num_tokens: int, size: int, session: Session | None
    ) -> WhyNot | None:
        """Why this call does not capture the bucket; None if it does."""
        plan = self.plan
        if num_tokens < size:
            found = {step: may_pad(plan, parameters.verdicts, step) for step in plan.capturable}
            refused = {step: reason for step, reason in found.items() if reason is not None}
            if len(refused) == len(found):
                return refused
        if session is not None:
            return None if session.captures else miss("first-call")
        if plan.config.capture == "warmup":
            return miss("not-warmed-up")
        seen = parameters.calls_seen.get(size, 0)
        parameters.calls_seen[size] = seen + 1
        if seen:
            return None
        if len(self._sets) > 1 and not parameters.buckets and seen == 0:
            return miss("address-moved")
        return miss("first-call")

    def _capture(
        self, parameters: ParameterSet, args: Sequence[Any], num_tokens: int, size: int, session: Session | None
    ) -> tuple[list[Any], Call]:
        if not parameters.buckets:
            self._sets_captured += 1
        self._memory.spoil_given_out()
        if self.plan.listener is not None:
            self.plan.listener.results_are_written()
        refused_before = parameters.verdicts.refused
        capture = BucketCapture(self.plan, self._device, self._memory, parameters.verdicts, size, self._hoisted)
        bucket, results = capture.run(args, num_tokens)
        if parameters.verdicts.refused != refused_before:
            for other in parameters.buckets.values():  # their programs were made when padding seemed right
                other.programs.clear()
        parameters.buckets[size] = bucket
        self._memory.add_user(self)
        for step, obstacle in bucket.obstacles.items():
            _LOG.warning("%s piece[%d], bucket of %d tokens: %s", self.name, step, size, obstacle.sentence)
        limit = self.plan.config.graph_memory_bytes
        is_over_limit = limit is not None and self._memory.graph_bytes > limit
        call = Call([])
        if session is None:
            program = self._flat_program(parameters, bucket, _NOTHING_MOVED, num_tokens)
            call = program.begin(args)
            call.stage_input_copies += capture.copied_back
        # What the caller gets must not lie in graphs that are about to go.
        self._hand_over(args, results, bucket, call, None, may_be_static=not is_over_limit)
        if session is None:
            self._end(program, call)
        self._stats.add_many({"captures": len(bucket.graphs), "capture_seconds": bucket.seconds})
        self._events.captured(
            tokens=size, pieces=len(bucket.graphs), graph_bytes=bucket.graph_bytes, seconds=bucket.seconds
        )
        if limit is not None and is_over_limit:
            self._memory.drop_largest(limit)
            if session is not None:
                session.must_repeat = True
        self._memory.update_gauges(self._stats)
        return results, call

    @property
    def largest_tokens(self) -> int:
        return max((bucket.tokens for bucket, _ in self.buckets), default=0)

    def drop(self, tokens: int, held_bytes: int, limit_bytes: int) -> None:
        """See ``Captures``."""
        if any(bucket.tokens == tokens for bucket, _ in self.buckets):
            sentence = errors.bucket_dropped(self.name, tokens, held_bytes, limit_bytes)
            _LOG.warning("%s", sentence)
            self._dropped[tokens] = miss("graph-memory", sentence)
        self._release_buckets()

    def _release_buckets(self) -> None:
        """Release all graphs; the next call of a bucket captures it again."""
        for parameters in self._sets.values():
            for size in list(parameters.buckets):
                self._release_bucket(parameters, size)
                parameters.calls_seen[size] = 1

    def _moved(self, bucket: Bucket, here: tuple[tuple[int, ...], tuple[int, ...]]) -> dict[int, Reason]:
        moved: dict[int, Reason] = {}
        for step in bucket.graphs:
            by_address, by_value = self.plan.depends_on(step)
            if any(here[0][k] != bucket.addresses[k] for k in by_address):
                moved[step] = miss("address-moved")
            elif any(here[1][k] != bucket.scalars[k] for k in by_value):
                moved[step] = miss("scalar-changed")
        return moved

    def _shall_recapture(self, parameters: ParameterSet, size: int, here: tuple[Any, ...]) -> bool:
        """Whether what moved has stayed since the last call of this bucket."""
        stayed = parameters.moved_to.get(size) == here
        parameters.moved_to[size] = here
        if not stayed or parameters.recaptures.get(size, 0) >= MAX_RECAPTURES or self.plan.config.capture == "warmup":
            return False
        parameters.recaptures[size] = parameters.recaptures.get(size, 0) + 1
        return True

    # --------------------------------------------------------------------------- verifying

    def _run_verified(self, program: FlatProgram, args: Sequence[Any], call: Call) -> list[Any]:
        found: list[str] = []
        results, size = program.run_verified(args, call, found.append), program.bucket.tokens
        if found:
            sentence = errors.replay_differs(self.name, size, found[0])
            if self.plan.config.strict:
                raise errors.ReplayDiffers(sentence)
            _LOG.error("%s", sentence)
            self._dropped[size] = miss("verify-failed", sentence)
        return results

    # ----------------------------------------------------------------------------- counting

    def _end(self, program: FlatProgram, call: Call) -> None:
        program.end(call)
        if program.miss_counts or call.misses:
            for reason, pieces in (*program.miss_counts.items(), *call.misses.items()):
                self._add_miss(reason, pieces, program.num_tokens)

    def _miss_all(self, reason: WhyNot, num_tokens: int | None, session: Session | None) -> None:
        """Count every compute piece of a call that runs without graphs, each with its own reason."""
        reasons: Counter[Reason] = Counter()
        for step in self.plan.compute_steps:
            own = self.plan.obstacles.get(step)
            reasons[own or (reason if isinstance(reason, Reason) else reason[step])] += 1
        if session is not None:
            return
        if self.plan.config.strict:
            self._refuse(reasons, num_tokens)
        for own, pieces in reasons.items():
            self._add_miss(own, pieces, num_tokens)

    def miss(self, reason: Reason, args: Sequence[Any], session: Session | None) -> None:
        """Count a call that no piece of this program may run."""
        self._miss_all(reason, self.plan.count_tokens(args), session)

    def _refuse(self, reasons: Iterable[Reason], num_tokens: int | None) -> None:
        for reason in reasons:
            if reason.code not in ("first-call", "over-max"):
                raise errors.GraphMiss(errors.graph_miss(self.name, num_tokens, reason.code, reason.sentence))

    def _add_miss(self, reason: Reason, pieces: int, num_tokens: int | None) -> None:
        self._stats.add_miss(reason.code, pieces)
        call = self._stats.calls + 1
        before = self.miss_log.pop((reason, num_tokens), None)
        calls, earlier = (0, 0) if before is None else (before.calls, before.pieces)
        self.miss_log[reason, num_tokens] = Misses(calls + 1, earlier + pieces, call)
        if len(self.miss_log) > MAX_MISSES_LOGGED:
            self.miss_log.popitem(last=False)
        self._events.missed(reason, pieces=pieces, tokens=num_tokens, call=call)

    # ------------------------------------------------------------------------------ release

    def _release_bucket(self, parameters: ParameterSet, size: int) -> None:
        parameters.buckets.pop(size).release()

    def release(self) -> None:
        """Release graphs, pools and static memory, in this order; see Note [release order].

        Waits for a call that is under way in another thread.

        Raises:
            PPPiecewiseError: it was called from within such a call.
        """
        if self._memory.holder == get_ident():
            raise errors.PPPiecewiseError(errors.released_in_a_call(self.name))
        with self._memory.lock:
            self.release_unlocked()

    def release_unlocked(self) -> None:
        """The same for a program that is gone, which no call can be using."""
        self._release_buckets()
        self._sets.clear()
        self._last_set = None, None
        self._dropped.clear()
        self._sets_captured = 0
        self._memory.remove_user(self)
        self._memory.update_gauges(self._stats)

    # ------------------------------------------------------------------------------ report

    @property
    def buckets(self) -> list[tuple[Bucket, ParameterSet]]:
        """What is captured now, largest bucket first."""
        found = [(bucket, parameters) for parameters in self._sets.values() for bucket in parameters.buckets.values()]
        return sorted(found, key=lambda pair: -pair[0].tokens)

    @property
    def dropped(self) -> dict[int, Reason]:
        return dict(self._dropped)

    def padding_of(self, step: int) -> str:
        """Whether a compute step may be padded: "safe", or why not, or that no test has run yet."""
        piece = self.plan.instructions[step].piece
        if piece.padding_reason is not None:
            return piece.padding
        verdicts = [p.verdicts.by_step[step] for p in self._sets.values() if step in p.verdicts.by_step]
        for reason in filter(None, verdicts):
            return reason.sentence
        return "safe" if verdicts else piece.padding


def make_device(kind: str, compiler_runs_ops: bool) -> Device:
    """The device for ``graphs="cuda"`` or ``"emulate"``.

    Args:
        compiler_runs_ops: whether compiled pieces consist of PyTorch ops, which emulation can record one by one.
    """
    return CudaDevice() if kind == "cuda" else EmulatedDevice(compiler_runs_ops)

"""Decides for each call which graphs replay: buckets, sets of parameters, what moved, what is captured when.

Note [sets of parameters] (rule R7)
Dynamo may run several module instances through one program. Captures hang on the addresses of the parameters that the
pieces read: another instance, or a parameter that was given other memory, is another set with captures of its own.
Nothing is ever copied into a tensor that is read by address.

Note [what is kept]
A set lives as long as the memory of its parameters, however many there are. In it, a bucket is captured for each place
of large tensors, and each number, that comes again; those used least recently go first. Where captures go before they
have paid, because their memory was freed or others took their place, each time again the next wait for twice as long.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import get_ident
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from .. import errors
from ..utils import torch_compat
from ..utils.addresses import MemoryMap
from ..utils.counters import Stats
from ..utils.reasons import Missed, Reason, miss
from .bucket import Bucket, BucketCapture, Verdicts, hoist_buffers, may_pad
from .capture_plan import GraphPlan
from .cudagraphs.cuda import CudaDevice
from .cudagraphs.device import Device
from .cudagraphs.emulated import EmulatedDevice
from .cudagraphs.memory import like, memory_of, why_no_copies
from .hooks import NO_EVENTS, Events
from .instructions import gather, picker
from .ownership import hand_over, lend, merged_results
from .replay import Call, FlatProgram, NoMemoryToCompare, static_results
from .stage import StageMemory, first_found
from .warmup import Measured, Session

_LOG = logging.getLogger(__name__)

MAX_PLACES = 32
"""Captures of one bucket that a set of parameters keeps."""

CALLS_THAT_PAY = 16
"""Replays after which a capture has saved about what it cost."""

CAPTURES_ON_CREDIT = 4
"""Times in a row that captures may go before they have paid and the next does not wait for it."""

MAX_WAIT_CALLS = 1024
"""Calls that a capture waits for at most, and places without captures that are remembered."""

MAX_FLAT_STEPS = 32768
"""Steps of the flat programs kept per bucket; each program holds the views for one number of tokens."""

_NOTHING_MOVED: Mapping[int, Reason] = MappingProxyType({})

MAX_MISSES_LOGGED = 256

_IN_WARMUP = "mode='auto' makes the first full graph of each size in warmup(), and others once that one is proven"


class Misses(NamedTuple):
    """Calls that missed for one reason with one number of tokens."""

    calls: int
    pieces: int
    last_call: int
    """Which call of the program was the last of them, counted from 1."""


Place = tuple[Any, ...]
"""Where the large tensors lie and what numbers and objects are, in the order of ``GraphPlan.fixed_sources``."""


class Addresses(NamedTuple):
    """Where all lies in a call that captured pieces read at its own address."""

    parameters: tuple[Any, ...] = ()
    """And how, where Dynamo does not look: see Note [sets of parameters]."""
    large: tuple[int, ...] = ()
    """The tensors at ``GraphPlan.address_positions``."""


NO_ADDRESSES = Addresses()


@dataclass
class ParameterSet:
    """Captures for one tuple of parameter addresses."""

    memory: Sequence[weakref.ref[torch.UntypedStorage]] = ()
    verdicts: Verdicts = field(default_factory=Verdicts)
    buckets: dict[int, Bucket] = field(default_factory=dict)
    """Size -> its captures that were used last."""
    by_place: dict[int, OrderedDict[Place, Bucket]] = field(default_factory=dict)
    """Size -> all its captures, those used last at the end."""
    calls_seen: OrderedDict[tuple[int, Place], int] = field(default_factory=OrderedDict)
    """Calls of a size that could have used captures before there were any; all in one place until it has some."""

    @property
    def all_buckets(self) -> list[Bucket]:
        return [bucket for places in list(self.by_place.values()) for bucket in list(places.values())]

    def is_full(self, size: int) -> bool:
        return len(self.by_place.get(size, ())) >= MAX_PLACES

    def bucket_at(self, size: int, here: Place) -> Bucket | None:
        """The captures for a place, if there are any."""
        found = self.by_place[size].get(here)
        if found is not None:
            self.by_place[size].move_to_end(here)
            self.buckets[size] = found
            if self.is_full(size):
                self.calls_seen.clear()  # more than are kept take turns: none of those in use is to go
        return found

    def make_room(self, size: int) -> list[Bucket]:
        """Release captures whose memory is gone or, without any, the least recently used one beyond the bound."""
        places = self.by_place.setdefault(size, OrderedDict())
        gone = [bucket for bucket in places.values() if _is_gone(bucket)]
        return self.release(gone or list(places.values())[: self.is_full(size)])

    def release(self, buckets: Sequence[Bucket] | None = None) -> list[Bucket]:
        """Release these graphs, or all; the next call of a size that has none left captures it again."""
        released = self.all_buckets if buckets is None else list(buckets)
        for bucket in released:
            del self.by_place[bucket.tokens][bucket.fixed]
            if self.buckets.get(bucket.tokens) is bucket:
                del self.buckets[bucket.tokens]
                self.calls_seen[bucket.tokens, ()] = MAX_WAIT_CALLS
            bucket.release()
        return released


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
        self._sets: dict[tuple[Any, ...], ParameterSet] = {}
        self._last_set: tuple[tuple[Any, ...] | None, ParameterSet | None] = None, None
        """The set of the last call: to compare its addresses costs less than to hash them."""
        self._sets_made = 0
        self._gone_unpaid = 0
        """Times in a row that captures went before they had paid."""
        self.dropped: dict[int, Reason] = {}
        """Buckets that are captured no more, and why."""
        self.measured: dict[int, Measured] = {}
        """Buckets of which the warm-up measured whether they pay."""
        self.miss_log: OrderedDict[tuple[Reason, int | None], Misses] = OrderedDict()
        """Reason and number of tokens, if known -> what was missed, for reports; the latest are kept."""
        self._calls = 0
        self._parameters = picker(plan.parameter_positions)
        self._read_in_place = picker(plan.read_in_place)
        self._last_addresses: tuple[tuple[Any, ...], Addresses] = (), NO_ADDRESSES
        """In one, since several threads may ask."""
        self._may_verify = plan.is_full or plan.config.verify_every > 0

    # ------------------------------------------------------------------------------ calls

    def run(self, args: Sequence[Any], addresses: Addresses, session: Session | None) -> tuple[list[Any], Call] | None:
        """The graph's results, or None where the call is to run without graphs; then every miss is counted.

        Args:
            addresses: what ``addresses`` says of these arguments.
            session: the warm-up that makes the call, if one does: its calls are not counted.

        Raises:
            GraphMiss: under ``strict``, for a miss other than the first call of a bucket or a call above the largest.
        """
        num_tokens = self.plan.count_tokens(args)
        try:
            return self._run(args, addresses, num_tokens, session)
        except Missed as missed:
            self._miss_all(missed, num_tokens, session)
            return None

    def _run(
        self, args: Sequence[Any], addresses: Addresses, num_tokens: int | None, session: Session | None
    ) -> tuple[list[Any], Call]:
        """The results; raises ``Missed`` before anything was run."""
        plan, memory = self.plan, self._memory
        if not plan.capturable or num_tokens is None:
            raise Missed(miss("no-token-count"), plan.obstacles)
        size = plan.bucket(num_tokens)
        if size is None:
            raise Missed(miss("over-max"))
        if not memory.lock.acquire(blocking=False):
            raise Missed(miss("concurrent-call"))
        try:
            memory.holder = get_ident()
            return self._run_in_bucket(args, addresses, num_tokens, size, session)
        finally:
            memory.holder = None
            memory.lock.release()

    def _run_in_bucket(
        self, args: Sequence[Any], addresses: Addresses, num_tokens: int, size: int, session: Session | None
    ) -> tuple[list[Any], Call]:
        if self._meets_written_memory(args) or self._takes_what_was_given_out(args, addresses):
            raise Missed(miss("inputs-overlap"))
        parameters = self._parameter_set(args, addresses.parameters)
        if size in self.dropped:
            raise Missed(self.dropped[size])
        scalars = self.plan.scalar_sources
        here = (*addresses.large, *gather(scalars, args)) if scalars else addresses.large
        bucket = parameters.buckets.get(size)
        if bucket is not None and bucket.fixed != here:
            bucket = parameters.bucket_at(size, here)
        if bucket is not None:
            bucket.calls += 1
            return self._run_flat(self._flat_program(parameters, bucket, _NOTHING_MOVED, num_tokens), args, session)
        if self.plan.overwrites_an_argument(args, self.plan.foreign_stage_inputs(args, num_tokens)):
            raise Missed(miss("inputs-overlap"))
        try:
            self._check_may_capture(parameters, num_tokens, size, here, session)
            if self.gives_way:
                self._check_room(size, self.plan.capturable, args)
        except Missed:
            if (bucket := parameters.buckets.get(size)) is None:
                raise
            moved = self._moved(bucket, here, parameters.is_full(size))
            return self._run_flat(self._flat_program(parameters, bucket, moved, num_tokens), args, session)
        return self._capture(parameters, args, num_tokens, size, here, session)

    def _parameter_set(self, args: Sequence[Any], key: tuple[Any, ...]) -> ParameterSet:
        """The captures for parameters at these addresses, none yet if they are new."""
        last_key, last_set = self._last_set
        if last_set is not None and key == last_key:
            return last_set
        parameters = self._sets.get(key)
        if parameters is None:
            for gone in [other for other, found in self._sets.items() if _is_gone(found)]:
                self._learn_from(self._sets.pop(gone).release())
            parameters = self._sets[key] = ParameterSet(memory_of(self._parameters(args)))
            self._sets_made += 1
        self._last_set = key, parameters
        return parameters

    def _learn_from(self, released: Sequence[Bucket]) -> None:
        if released:
            has_paid = any(bucket.calls >= CALLS_THAT_PAY for bucket in released)
            self._gone_unpaid = 0 if has_paid else self._gone_unpaid + 1

    @property
    def _wait_calls(self) -> int:
        """Calls for which what moved must stay before it is captured, see Note [what is kept]."""
        return int(min(max(1, 2 ** (self._gone_unpaid - CAPTURES_ON_CREDIT)), MAX_WAIT_CALLS))

    def _run_flat(self, program: FlatProgram, args: Sequence[Any], session: Session | None) -> tuple[list[Any], Call]:
        """The results of a call that replays; raises ``Missed`` for inputs that replays must not read."""
        config = self.plan.config
        if program.miss_counts and self.plan.is_beside_pieces:
            raise Missed(next(iter(program.miss_counts)))
        if not program.admits(args):
            raise Missed(miss("rows-disagree"))
        call = program.begin(args)
        if (call.foreign or self.plan.listener) and self.plan.overwrites_an_argument(args, call.foreign):
            raise Missed(miss("inputs-overlap"))
        if config.strict:
            self._refuse(program.miss_counts, program.num_tokens)
        self._calls += 1
        if self._memory.given_out:
            self._memory.spoil_given_out()
        if self._may_verify and self._shall_verify(program.bucket, session):
            results = self._run_verified(program, args, call, session is not None)
        else:
            results = program.run(args, call)
        self._hand_over(args, results, program.bucket, call, program)
        if session is None and (program.miss_counts or call.misses):
            self._add_misses(program.miss_counts, program.num_tokens)
            self._add_misses(call.misses, program.num_tokens)
        return results, call

    def _meets_written_memory(self, args: Sequence[Any]) -> bool:
        """Whether pieces would read a copy of what an eager step of this very call writes."""
        apart = self.plan.copied_apart
        return apart is not None and apart.are_broken(args)

    def _takes_what_was_given_out(self, args: Sequence[Any], addresses: Addresses) -> bool:
        """Whether an argument, or what the module kept, is a static result of the last call: replays write there."""
        plan, memory, table = self.plan, self._memory, self.plan.table
        if not plan.config.static_outputs:
            return False
        positions = table.passed_in_the_call
        if plan.listener is None:  # else what is kept is elsewhere, see Note [static results that are kept]
            positions = table.but_parameters if addresses.parameters == self._last_set[0] else table.tensors
        given_out = MemoryMap.of(reference() for reference in memory.given_out)
        return any(
            given_out.holds(args[at])
            or (memory.overwritten.holds(args[at]) and not plan.landing_memory.holds(args[at]))
            for at in positions
        )

    def addresses(self, args: Sequence[Any]) -> Addresses:
        """Where lies what is read in place; the same object as in the last call where nothing has moved."""
        pointers: tuple[Any, ...] = tuple(map(torch.Tensor.data_ptr, self._read_in_place(args)))
        if not torch_compat.GUARDS_PARAMETER_STRIDES:
            parameters = self._parameters(args)
            # Those of contiguous tensors follow from their sizes, and to ask all for them costs a tuple each.
            if not all(map(torch.Tensor.is_contiguous, parameters)):
                pointers += tuple(map(torch.Tensor.stride, parameters))
        last_pointers, found = self._last_addresses
        if pointers != last_pointers:
            count, end = len(self.plan.parameter_positions), len(self.plan.read_in_place)
            found = Addresses((*pointers[:count], *pointers[end:]), pointers[count:end])
            self._last_addresses = pointers, found
        return found

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
            if len(bucket.programs) * len(self.plan.instructions) >= MAX_FLAT_STEPS:
                bucket.programs.popitem(last=False)
            program = bucket.programs[key] = FlatProgram(self.plan, bucket, num_tokens, misses)
        bucket.programs.move_to_end(key)
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
        early, others = static_results(plan, bucket, results) if program is None else program.static_results(results)
        if plan.config.static_outputs and may_be_static:
            self._memory.overwritten = bucket.overwritten
            call.output_copies = hand_over(results, early)
            if plan.listener is not None:
                self._memory.lent += lend(results, others)
            if plan.config.strict and plan.kind == "emulate" and plan.listener is None:
                # Copies, so that they can be spoiled for good: the next call writes valid values into static memory.
                in_static_memory = list(results)
                hand_over(results, others)
                pairs = zip(results, in_static_memory, strict=True)
                self._memory.given_out = [weakref.ref(given) for given, other in pairs if given is not other]
            return
        call.output_copies = hand_over(results, [*early, *others])
        merged = program.merged_results if program is not None else None
        if merged is None:
            merged = merged_results(plan.inputs, args, results, plan.split)
            if program is not None:
                program.merged_results = merged
        for index in merged:
            results[index] = like(results[index])

    # ------------------------------------------------------------------------- capturing

    def _check_may_capture(
        self, parameters: ParameterSet, num_tokens: int, size: int, here: Place, session: Session | None
    ) -> None:
        """Raises ``Missed`` if this call does not capture the bucket."""
        plan, latest, seen = self.plan, parameters.buckets.get(size), parameters.calls_seen
        if num_tokens < size:
            found = {step: may_pad(plan, parameters.verdicts, step) for step in plan.capturable}
            refused = {step: reason for step, reason in found.items() if reason is not None}
            if len(refused) == len(found):
                raise Missed(miss("padding-unsafe"), refused)
        if session is not None:
            if not session.captures or (any(latest is bucket for bucket in session.captured)):
                raise Missed(miss("first-call"))
            return
        if plan.captures_in_warmup_only:
            raise Missed(miss("not-warmed-up"))
        if plan.gives_way and (latest is None or latest.proofs is None or not latest.proofs.are_complete):
            raise Missed(miss("not-warmed-up", _IN_WARMUP))
        key = size, () if latest is None else here
        seen[key] = seen.pop(key, 0) + 1
        if len(seen) > MAX_WAIT_CALLS:
            seen.popitem(last=False)
        is_new_set = self._sets_made > 1 and not parameters.buckets
        if seen[key] <= (1 if latest is None and not is_new_set else self._wait_calls):
            what = "the parameters, of another instance of the module or replaced, lie elsewhere"
            raise Missed(self._why_moved(what, "address-moved") if is_new_set else miss("first-call"))

    def _capture(
        self,
        parameters: ParameterSet,
        args: Sequence[Any],
        num_tokens: int,
        size: int,
        here: Place,
        session: Session | None,
    ) -> tuple[list[Any], Call]:
        self._learn_from(parameters.make_room(size))
        self._memory.spoil_given_out()
        if self.plan.listener is not None:
            self.plan.listener.results_are_written()
        refused_before = parameters.verdicts.refused
        capture = BucketCapture(self.plan, self._device, self._memory, parameters.verdicts, size, self._hoisted)
        bucket, results = capture.run(args, num_tokens, here)
        if parameters.verdicts.refused != refused_before:
            for other in parameters.all_buckets:  # their programs were made when padding seemed right
                other.programs.clear()
        parameters.buckets[size] = parameters.by_place[size][bucket.fixed] = bucket
        parameters.calls_seen.pop((size, bucket.fixed), None)
        self._memory.add_user(self)
        for step, obstacle in bucket.obstacles.items():
            _LOG.warning("%s piece[%d], bucket of %d tokens: %s", self.name, step, size, obstacle.sentence)
        limit = self.plan.config.graph_memory_bytes
        is_over_limit = limit is not None and any(self.plan.exchanged(self._memory.graph_bytes > limit))
        program = self._flat_program(parameters, bucket, _NOTHING_MOVED, num_tokens)
        call = program.begin(args)
        call.stage_input_copies += capture.copied_back
        # What the caller gets must not lie in graphs that are about to go.
        self._hand_over(args, results, bucket, call, None, may_be_static=not is_over_limit)
        if session is None:
            self._add_misses(program.miss_counts, num_tokens)
        else:
            session.captured.append(bucket)
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
    def was_used(self) -> bool:
        """Whether a call has come since it was made or released."""
        return bool(self._sets)

    @property
    def gives_way(self) -> bool:
        """See ``Captures``."""
        return self.plan.gives_way

    @property
    def largest_tokens(self) -> int:
        return max((bucket.tokens for bucket, _ in self.buckets), default=0)

    def drop(self, tokens: int, held_bytes: int, limit_bytes: int) -> None:
        """See ``Captures``."""
        if any(bucket.tokens == tokens for bucket, _ in self.buckets):
            sentence = errors.bucket_dropped(self.name, tokens, held_bytes, limit_bytes)
            _LOG.warning("%s", sentence)
            self.dropped[tokens] = miss("graph-memory", sentence)
        self.release_buckets()

    def give_up(self, args: Sequence[Any], reason: Reason) -> None:
        """Capture no more the bucket of a call."""
        num_tokens = self.plan.count_tokens(args)
        if num_tokens is not None and (size := self.plan.bucket(num_tokens)) is not None:
            self.dropped[size] = reason

    def release_buckets(self) -> None:
        """See ``Captures``."""
        for parameters in self._sets.values():
            parameters.release()

    def retry_dropped(self) -> None:
        """See ``Captures``."""
        self.dropped = {tokens: reason for tokens, reason in self.dropped.items() if reason.code != "graph-memory"}

    def _moved(self, bucket: Bucket, here: Place, is_full: bool) -> dict[int, Reason]:
        moved: dict[int, Reason] = {}
        for step in bucket.graphs:
            changed = [index for index in self.plan.depends_on(step) if here[index] != bucket.fixed[index]]
            if changed:
                is_address = changed[0] < len(self.plan.address_positions)
                sources = [self.plan.fixed_sources[index] for index in changed]
                names = [self.plan.inputs[at if isinstance(at, int) else at[0]].label for at in sources]
                what = f"{', '.join(names)} {'lies elsewhere' if is_address else 'has another size or value'}"
                code = "address-moved" if is_address else "scalar-changed"
                moved[step] = self._why_moved(what, code, MAX_PLACES if is_full else None)
        return moved

    def _why_moved(self, what: str, code: str, most: int | None = None) -> Reason:
        call = None if self.plan.captures_in_warmup_only else self._wait_calls + 1
        is_too_often = call is not None and (call > 2 or most is not None)
        return miss("moved-too-often" if is_too_often else code, errors.moved(what, call, most))

    # --------------------------------------------------------------------------- verifying

    def _shall_verify(self, bucket: Bucket, session: Session | None) -> bool:
        if session is not None and session.measures:
            return False
        if bucket.proofs is not None and bucket.proofs.left > (session is not None):
            return True
        every = self.plan.config.verify_every
        return bool(every) and self._calls % every == 0

    def _check_room(self, size: int, steps: Iterable[int], args: Sequence[Any]) -> None:
        """Drop a size of full graphs, and raise ``Missed``, if the state that these steps write cannot be copied."""
        written = {at for step in steps for at in self.plan.written_registers[step] if at < len(args)}
        why_not = why_no_copies([args[at] for at in written], self.plan.device if self.plan.gives_way else None)
        reason = self.plan.found_by_any(None if why_not is None else miss("graph-memory", why_not))
        if reason is not None:
            self.dropped[size] = reason
            raise Missed(reason)

    def _run_verified(self, program: FlatProgram, args: Sequence[Any], call: Call, in_warmup: bool) -> list[Any]:
        found: list[str] = []
        size, is_full, proofs = program.bucket.tokens, self.plan.is_full, program.bucket.proofs
        if is_full:
            self._check_room(size, program.replayed, args)
        try:
            results = program.run_verified(args, call, found.append)
        except NoMemoryToCompare as missed:
            self.dropped[size] = missed.reason
            raise
        wrong = None
        if found:
            wrong = miss("verify-failed", self._difference(size, found[0]))
        all_wrong, all_new = zip(*self.plan.exchanged((wrong, proofs is None or proofs.is_new(results))), strict=True)
        if proofs is not None and proofs.left:
            proofs.add(results, all(all_new), in_warmup)
        if (wrong := first_found(all_wrong)) is not None:
            if self.plan.config.strict and not self.gives_way:
                raise errors.ReplayDiffers(wrong.sentence)
            _LOG.log(logging.WARNING if self.gives_way else logging.ERROR, "%s", wrong.sentence)
            self.dropped[size] = wrong
        return results

    def _difference(self, size: int, where: str) -> str:
        if self.gives_way:
            return errors.full_graph_gives_way(self.name, size, where)
        if self.plan.is_full:
            return errors.full_replay_differs(self.name, size, where, self.plan.is_beside_pieces)
        return errors.replay_differs(self.name, size, where)

    # ----------------------------------------------------------------------------- counting

    def _miss_all(self, missed: Missed, num_tokens: int | None, session: Session | None) -> None:
        """Count every compute piece of a call that runs without graphs, each with its own reason."""
        if session is not None:
            return
        own = {**missed.by_step, **self.plan.obstacles}
        reasons = Counter(own.get(step, missed.reason) for step in self.plan.compute_steps)
        if self.plan.is_beside_pieces:  # what runs without a graph now, the pieces will count
            for reason, pieces in reasons.items():
                self._log_miss(reason, pieces, num_tokens)
            return
        if self.plan.config.strict:
            self._refuse(reasons, num_tokens)
        self._add_misses(reasons, num_tokens)

    def miss(self, reason: Reason, args: Sequence[Any], session: Session | None) -> None:
        """Count a call that no piece of this program may run."""
        self._miss_all(Missed(reason), self.plan.count_tokens(args), session)

    def _refuse(self, reasons: Iterable[Reason], num_tokens: int | None) -> None:
        for reason in reasons:
            if reason.code not in ("first-call", "over-max", "not-faster"):
                sentence = errors.graph_miss(self.name, num_tokens, reason.code, reason.sentence)
                raise errors.GraphMiss(sentence) from None

    def _add_misses(self, reasons: Mapping[Reason, int], num_tokens: int | None) -> None:
        for reason, pieces in reasons.items():
            self._stats.add_miss(reason.code, pieces)
            call = self._log_miss(reason, pieces, num_tokens)
            self._events.missed(reason, pieces=pieces, tokens=num_tokens, call=call)

    def _log_miss(self, reason: Reason, pieces: int, num_tokens: int | None) -> int:
        """Note a miss for reports; the number of the call comes back."""
        call = self._stats.calls + 1
        before = self.miss_log.pop((reason, num_tokens), None)
        calls, earlier = (0, 0) if before is None else (before.calls, before.pieces)
        self.miss_log[reason, num_tokens] = Misses(calls + 1, earlier + pieces, call)
        if len(self.miss_log) > MAX_MISSES_LOGGED:
            self.miss_log.popitem(last=False)
        return call

    # ------------------------------------------------------------------------------ weighing

    def size_to_weigh(self, args: Sequence[Any]) -> int | None:
        """The bucket of a call, if it is captured and it was not measured whether it pays."""
        num_tokens = self.plan.count_tokens(args)
        size = None if num_tokens is None else self.plan.bucket(num_tokens)
        is_captured = any(bucket.tokens == size for bucket, _ in self.buckets)
        return size if is_captured and size not in self.dropped and size not in self.measured else None

    def weigh(self, size: int, measured: Measured, session: Session) -> bool:
        """Whether the bucket pays; else it is captured no more."""
        self.measured[size] = measured
        if measured.replay_us < measured.otherwise_us:
            return True
        detail = f"a replay took {measured}, so this bucket saves no time; keep='all' keeps it"
        self.dropped[size] = miss("not-faster", detail)
        session.release_all[id(self._memory)] = self._release_all
        return False

    def _release_all(self) -> None:
        with self._memory.lock:
            self._memory.release_captures()
            self._memory.update_gauges(self._stats)

    # ------------------------------------------------------------------------------ release

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
        self.release_buckets()
        self._sets.clear()
        self._last_set = None, None
        self.dropped.clear()
        self.measured.clear()
        self._sets_made, self._gone_unpaid = 0, 0
        self._memory.remove_user(self)
        self._memory.update_gauges(self._stats)

    # ------------------------------------------------------------------------------ report

    @property
    def buckets(self) -> list[tuple[Bucket, ParameterSet]]:
        """What is captured now, largest bucket first."""
        found = [(bucket, parameters) for parameters in list(self._sets.values()) for bucket in parameters.all_buckets]
        return sorted(found, key=lambda pair: -pair[0].tokens)

    def padding_of(self, step: int) -> str:
        """Whether a compute step may be padded: "safe", or why not, or that no test has run yet."""
        piece = self.plan.instructions[step].piece
        if piece.padding_reason is not None:
            return piece.padding
        verdicts = [p.verdicts.by_step[step] for p in self._sets.values() if step in p.verdicts.by_step]
        for reason in filter(None, verdicts):
            return reason.sentence
        return "safe" if verdicts else piece.padding


def _is_gone(captures: ParameterSet | Bucket) -> bool:
    """Whether some of the memory that it was captured for was freed."""
    return any(storage() is None for storage in captures.memory)


def make_device(kind: str, compiler_runs_ops: bool) -> Device:
    """The device for ``graphs="cuda"`` or ``"emulate"``.

    Args:
        compiler_runs_ops: whether compiled pieces consist of PyTorch ops, which emulation can record one by one.
    """
    return CudaDevice() if kind == "cuda" else EmulatedDevice(compiler_runs_ops)

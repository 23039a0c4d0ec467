"""``warmup()``: compile and capture everything before the first request, and leave no trace of it.

Note [order of a warm-up]
Plain ``torch.compile`` makes a program for the first size that it sees, another for all sizes from 2 up, and one for
size 1. A call of one token and one of the largest number bring all of them into being, and capture nothing yet; the
larger one is also what Inductor tunes its kernels for. Then each bucket is captured, the largest first, since it fixes
how much memory the pools hold, by a call inside the bucket and by one that fills it: a static program may take either.
Second comes the smallest bucket in which calls are padded: buckets between two in which padding was tested (rule R3)
need no test. Static programs have no ladder, so the sizes of the first two calls are among the others.

Where only what is faster is kept (``keep``), the same numbers of tokens are then called again, the largest first, to
time what replays against what runs without graphs. If some buckets are dropped, all others are captured again: pools of
graph memory shrink only as a whole. Then there may be room for buckets that ``graph_memory_bytes`` had no room for,
which are weighed in their turn.

Note [proof of a full graph] (rule R9)
A full graph holds attention, too, and froze whatever that reads besides its inputs. So a bucket of full graphs is
compared with the un-captured graph before it serves alone: at two more calls in the warm-up, and at the first call
after it, which returns what the un-captured graph gives if they differ. A comparison proves something only in another
context than that of the capture and of earlier ones. Nobody here can look at a context, but at what it makes of a call:
where the results are bit for bit those of an earlier call, as a warm-up gives them that varies nothing, the comparison
does not count, and a later call is compared in its place.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import errors
from .cudagraphs.foreign import capture_is_under_way
from .cudagraphs.memory import same_bits

if TYPE_CHECKING:
    from ..compilation.placeholders import GraphInput
    from ..config import Config
    from .capture_plan import GraphPlan
    from .stage import Stage

_LOG = logging.getLogger(__name__)

MakeInputs = Callable[[int], tuple[Sequence[Any], Mapping[str, Any]]]

_SESSION: ContextVar[Session | None] = ContextVar("pp_piecewise_backend.warmup", default=None)


PROOFS = 3
"""Contexts besides that of its capture in which a full graph is compared, the last one after the warm-up."""

MAX_UNCOUNTED = 8
"""Comparisons that did not count after which it serves alone all the same: its results may never vary."""

COMPARED_ELEMENTS = 16384
"""Of each result, the first ones, by which calls are known again."""

REPETITIONS = 7
"""Of each of the alternatives that are weighed; the median counts."""

TIMED_CALLS = 2
"""Of each bucket; the fastest counts."""


class BucketTime(NamedTuple):
    """How long a forward takes."""

    tokens: int
    """The bucket, which the forward fills."""
    forward_us: float
    """Microseconds from its first work to its last: on a GPU by the device's clock, gaps included in which the device
    waited for the host; else by the host's. Without Dynamo's entry, the caller's inputs, receives and sends."""


class Measured(NamedTuple):
    """Medians of what calls that fill a bucket took, until their results were there."""

    replay_us: float
    otherwise_us: float
    otherwise: str
    """What ran in place of the replay."""

    def __str__(self) -> str:
        return f"{self.replay_us:.0f} us, {self.otherwise} {self.otherwise_us:.0f} us (medians)"


current_session = _SESSION.get
"""The warm-up that is under way in this thread, if any."""


@dataclass
class Proofs:
    """Comparisons of one full graph, see Note [proof of a full graph]."""

    left: int = PROOFS
    uncounted: int = 0
    seen: list[list[torch.Tensor]] = field(default_factory=list)
    """How results of the capturing call, and of the comparisons that counted, begin, while more are to come."""

    @property
    def are_complete(self) -> bool:
        """Whether all counted, so that nothing is to come."""
        return not self.left and self.uncounted < MAX_UNCOUNTED

    def is_new(self, results: Sequence[Any]) -> bool:
        """Whether no call before gave these results."""
        own = _beginnings(results)
        return not any(
            all(a.shape == b.shape and same_bits(a, b) for a, b in zip(own, earlier, strict=True))
            for earlier in self.seen
        )

    def add(self, results: Sequence[Any], counts: bool, in_warmup: bool) -> None:
        """Note a comparison, or, as the first one, the call that captured."""
        if self.seen and not counts:
            self.uncounted += not in_warmup
        elif self.seen:
            self.left -= 1
        if not self.left or self.uncounted == MAX_UNCOUNTED:
            self.left, self.seen = 0, []
        elif counts:
            self.seen.append([tensor.clone() for tensor in _beginnings(results)])


def _beginnings(results: Sequence[Any]) -> list[torch.Tensor]:
    return [value.reshape(-1)[:COMPARED_ELEMENTS] for value in results if isinstance(value, torch.Tensor)]


class Stopwatch:
    """Times alternatives against one another."""

    def medians_us(
        self, alternatives: Sequence[Callable[[], object]], prepare: Callable[[], None], device: torch.device
    ) -> list[float]:
        """How long each takes, in microseconds, as who waits for its results has to: on the host until the device is
        done. They take turns, so that what disturbs one disturbs all.

        Args:
            prepare: is called before each, and not timed.
        """
        taken_us: list[list[float]] = [[] for _ in alternatives]
        for _ in range(1 + REPETITIONS):  # the first of each brings into caches what the others find there
            for run, times_us in zip(alternatives, taken_us, strict=True):
                prepare()
                _synchronize(device)
                began = time.perf_counter()
                run()
                _synchronize(device)
                times_us.append(1e6 * (time.perf_counter() - began))
        return [statistics.median(times_us[1:]) for times_us in taken_us]


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@dataclass
class Session:
    """One warm-up: calls made in it are not counted, and have their writes undone."""

    ladders: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Program -> the buckets that it can be called in."""
    smallest: dict[str, int] = field(default_factory=dict)
    """Program -> the smallest number of tokens that it can be called with."""
    has_static_programs: bool = False
    """Whether a program serves one number of tokens only."""
    calls: int = 0
    """Calls of programs."""
    max_tokens: int = 1
    """The largest call that a program is meant for."""
    captures: bool = False
    """Whether calls capture at once; before that they only bring programs into being."""
    proven_tokens: int = 0
    """The largest bucket of full graphs, which are to be compared; see Note [proof of a full graph]."""
    captured: list[object] = field(default_factory=list)
    """The buckets that it captured."""
    timed_us: float | None = None
    """What programs took since it was set to 0, in microseconds; None: calls are not timed."""
    must_repeat: bool = False
    """Whether captures were dropped on the way, so that others have to be made again."""
    weighs: bool = False
    """Whether a program keeps only what is faster than running without graphs: ``keep``."""
    stopwatch: Stopwatch | None = None
    """Given while calls weigh what is captured."""
    release_all: dict[int, Callable[[], None]] = field(default_factory=dict)
    """By memory, where captures were found too slow: releases all in it, since pools shrink only as a whole."""

    def note(self, name: str, config: Config, stage: Stage | None, plans: Sequence[GraphPlan]) -> None:
        """Learn from a program that is called how large its calls are, and which buckets it has, if any."""
        self.calls += 1
        self.max_tokens = max(self.max_tokens, config.max_tokens if stage is None else stage.max_tokens)
        for plan in plans:
            self.weighs |= plan.config.keep == "if_faster"
            self.proven_tokens = max(self.proven_tokens, plan.proven_tokens)
            if plan.token_symbol is None:
                self.has_static_programs = True
            else:
                self.ladders.setdefault(name, plan.ladder.sizes_tokens)
                self.smallest.setdefault(name, plan.smallest_tokens)

    @property
    def measures(self) -> bool:
        """Whether its calls are timed: they do nothing but what calls of serving do."""
        return self.stopwatch is not None or self.timed_us is not None

    @contextlib.contextmanager
    def timing(self, device: torch.device | None) -> Iterator[None]:
        """Add what the body takes to ``timed_us``, if calls are timed."""
        if self.timed_us is None:
            yield
        elif device is None or device.type == "cpu":
            began = time.perf_counter()
            yield
            self.timed_us += 1e6 * (time.perf_counter() - began)
        else:
            begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
            torch.accelerator.synchronize(device)
            begin.record(torch.accelerator.current_stream(device))
            yield
            end.record(torch.accelerator.current_stream(device))
            end.synchronize()
            self.timed_us += 1e3 * begin.elapsed_time(end)

    @contextlib.contextmanager
    def leaving_no_trace(
        self, inputs: Sequence[GraphInput], args: Sequence[Any], stage: Stage | None
    ) -> Iterator[Callable[[], None]]:
        """Restore what state and proxies held before the call, at its end and where the body asks for it."""
        tensors = written_tensors(inputs, args, stage)
        try:
            copies = [tensor.clone() for tensor in tensors]
        except torch.OutOfMemoryError as error:
            num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            raise errors.PPPiecewiseError(errors.no_room_for_state(num_bytes)) from error

        def restore() -> None:
            with torch.no_grad():
                for tensor, copy in zip(tensors, copies, strict=True):
                    tensor.copy_(copy)

        try:
            yield restore
        finally:
            restore()


def written_tensors(inputs: Sequence[GraphInput], args: Sequence[Any], stage: Stage | None) -> list[torch.Tensor]:
    """State that the graph writes, its stage inputs, and the landing memory."""
    tensors = [
        value
        for graph_input, value in zip(inputs, args, strict=True)
        if graph_input.kind in ("state", "stage-input") and isinstance(value, torch.Tensor)
    ]
    return tensors if stage is None else tensors + [stage.landing(name) for name in stage.inputs]


def warm_up(
    compiled: Callable[..., Any],
    make_inputs: MakeInputs,
    sizes: Sequence[int] | None,
    progress: bool | None,
    captured: Callable[[], Mapping[int, tuple[float, int]]],
) -> Mapping[int, tuple[float, int]]:
    """See ``pp_piecewise_backend.warmup``; what is captured comes back.

    Args:
        captured: bucket -> (seconds, bytes) of what all programs hold captured now.
    """
    session = Session()
    started = time.perf_counter()
    if sizes is not None and (not sizes or min(sizes) < 1):
        raise errors.ConfigError(errors.bad_warmup_sizes(sizes))
    with _in_session(session), _keeping_generators():
        _call(compiled, make_inputs, 1 if sizes is None else min(sizes))
        _call(compiled, make_inputs, session.max_tokens if sizes is None else max(sizes))
        called = _capture_all(compiled, make_inputs, session, sizes, progress)
        while session.weighs:
            session.captures, session.stopwatch = False, Stopwatch()
            for num_tokens in _with_progress(sorted(set(called), reverse=True), progress, "weighing"):
                _call(compiled, make_inputs, num_tokens)
            session.stopwatch = None
            found_too_slow, session.release_all = session.release_all, {}
            for release_all in found_too_slow.values():
                release_all()
            if not found_too_slow:
                break
            _capture_all(compiled, make_inputs, session, sizes, progress)
    if not session.calls:
        raise errors.PPPiecewiseError(errors.NO_PROGRAM_IN_WARMUP)
    found = captured()
    parts = [f"{b}: {s:.2f} s, {n} bytes" for b, (s, n) in sorted(found.items(), reverse=True)]
    in_all = f"; {sum(num_bytes for _, num_bytes in found.values())} bytes of graphs in all" if found else ""
    line = f"warmed up in {time.perf_counter() - started:.2f} s; per bucket {'; '.join(parts) or 'nothing'}{in_all}"
    _LOG.info("%s", line)
    if _is_shown(progress):
        print(line, file=sys.stderr)
    return found


def _capture_all(
    compiled: Callable[..., Any],
    make_inputs: MakeInputs,
    session: Session,
    sizes: Sequence[int] | None,
    progress: bool | None,
) -> list[int]:
    """Capture every bucket that is not captured and was not dropped; the numbers of tokens called with come back."""
    session.captures = session.must_repeat = True
    called: list[int] = []
    while session.must_repeat:
        session.must_repeat = False
        buckets = sorted({size for ladder in session.ladders.values() for size in ladder}, reverse=True)
        called = _calls(buckets, session, sizes)
        for num_tokens in _with_progress(called, progress, "capturing"):
            _call(compiled, make_inputs, num_tokens)
    return called


def time_buckets(
    compiled: Callable[..., Any], make_inputs: MakeInputs, buckets: Iterable[int]
) -> tuple[BucketTime, ...]:
    """How long calls take that fill these buckets; smallest first. They capture nothing, and no trace of them stays.

    Args:
        compiled: what ``warm_up`` got; all its work belongs to programs.
        make_inputs: as for ``warm_up``.
        buckets: in tokens.
    """
    session = Session()
    times = []
    with _in_session(session), _keeping_generators():
        for num_tokens in sorted(buckets):
            taken_us = []
            for _ in range(TIMED_CALLS):
                session.timed_us = 0.0
                _call(compiled, make_inputs, num_tokens)
                taken_us.append(session.timed_us)
            times.append(BucketTime(num_tokens, min(taken_us)))
    return tuple(times)


def _calls(buckets: Sequence[int], session: Session, sizes: Sequence[int] | None) -> list[int]:
    """Numbers of tokens to call with, in the order of Note [order of a warm-up].

    Args:
        buckets: all that a program can be called in, the largest first.
        sizes: only these numbers of tokens.
    """
    lowest = max([*session.smallest.values(), 1])
    groups: list[list[int]] = []
    padded: list[int] = []
    """Where in ``groups`` calls are that may be padded."""
    for bucket, below in pairwise([*buckets, 0]):
        inside = bucket - 1 if bucket - 1 > below and bucket - 1 >= lowest else bucket
        wanted = [inside, bucket] if inside != bucket else [bucket]
        if sizes is not None:
            wanted = sorted({size for size in sizes if below < size <= bucket}, reverse=True)
        if bucket <= session.proven_tokens:
            wanted += wanted[-1:] * (PROOFS - 1)
        if wanted and inside != bucket:
            padded.append(len(groups))
        groups.append(wanted)
    if len(padded) > 1:
        groups.insert(padded[0] + 1, groups.pop(padded[-1]))
    calls = [size for wanted in groups for size in wanted]
    first_two = {1, session.max_tokens} if session.has_static_programs else set()
    others = sorted((first_two if sizes is None else set(sizes)).difference(calls), reverse=True)
    largest = buckets[0] if buckets else 0
    return [*(size for size in others if size > largest), *calls, *(size for size in others if size <= largest)]


def _call(compiled: Callable[..., Any], make_inputs: MakeInputs, num_tokens: int) -> None:
    made = make_inputs(num_tokens)
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], Mapping)):
        raise errors.ConfigError(errors.bad_make_inputs(made))
    args, kwargs = made
    compiled(*args, **kwargs)


def _with_progress(calls: Sequence[int], progress: bool | None, what: str) -> Iterator[int]:
    from tqdm import tqdm

    with tqdm(calls, desc=what, unit="call", disable=not (_is_shown(progress) and calls)) as bar:
        for num_tokens in bar:
            bar.set_postfix(tokens=num_tokens)
            yield num_tokens


def _is_shown(progress: bool | None) -> bool:
    return sys.stderr.isatty() if progress is None else progress


@contextlib.contextmanager
def _in_session(session: Session) -> Iterator[None]:
    if current_session() is not None:
        raise errors.PPPiecewiseError(errors.NESTED_WARMUP)
    if capture_is_under_way():
        raise errors.PPPiecewiseError(errors.WARMUP_IN_A_CAPTURE)
    token = _SESSION.set(session)
    try:
        yield
    finally:
        _SESSION.reset(token)


@contextlib.contextmanager
def _keeping_generators() -> Iterator[None]:
    """Random generators end as they began, whatever the calls and ``make_inputs`` draw."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield

"""Where all ranks of a pipeline are, as far as this one knows, for the error that says that it broke.

Note [positions of all ranks]
A keep-alive says where its rank is, and who hears it passes it on, once. A rank that learns of a loss says where it is
by then, ahead of its notice and to the neighbour from which it heard of the loss, too. All that is sent by the thread
of the keep-alives, or with the notice, so nobody waits for it but who is about to raise the error, for
``_FRESH_POSITIONS_SECONDS`` at most. A rank beyond a dead one is known by its last keep-alive: each position says as of
when it holds. Clocks of two machines differ, so what travels are ages, and the number of the saying to find the latest.

Note [a device that hangs]
The host runs ahead of a GPU: it may have ended many steps, and wait for other ranks, while the GPU never ends the work
of one. So each forward is enqueued between two events, as is each part of it between waits for other ranks, which the
stream waits for, too. Work whose first event has come and whose last one does not come for too long hangs in itself.
"""

from __future__ import annotations

import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

from ..errors import Position

_FRESH_POSITIONS_SECONDS = 0.25
"""How long an error waits for where the other ranks are."""
_AGE_SECONDS = 1.0
"""What was said so shortly before a loss needs no later word."""
_LAYOUT = struct.Struct("<BIff")
_BUSY = 0x80
"""Beside the step: the rank may hold up its own threads, so its silence means nothing for a while."""


class Step(IntEnum):
    """What a rank can be at."""

    UNKNOWN = 0
    SETTING_UP = 1
    WARMING_UP = 2
    HEADER = 3
    """It waits for the header of a micro-batch."""
    TENSORS = 4
    """It waits for the tensors of a micro-batch, whose header has come."""
    INPUTS = 5
    FORWARD = 6
    FINISH = 7
    SENDING = 8
    LEAVING = 9
    """It waits until what it sent last has left."""
    FEEDBACK = 10
    """It waits for feedback, or for room in flight."""
    CALLER = 11
    """In the loop over ``run``, in the iterable of micro-batches, or not in ``run`` yet."""
    CLOSING = 12


_PHRASES = {
    Step.SETTING_UP: ("setting up", "before"),
    Step.WARMING_UP: ("compiling and capturing", "before"),
    Step.HEADER: ("waiting for the header", "of"),
    Step.TENSORS: ("receiving the tensors", "of"),
    Step.INPUTS: ("in its make_inputs", "of"),
    Step.FORWARD: ("in its forward", "of"),
    Step.FINISH: ("in its finish", "of"),
    Step.SENDING: ("sending its results", "of"),
    Step.LEAVING: ("waiting for its last send to leave", "at"),
    Step.FEEDBACK: ("waiting for feedback", "after"),
    Step.CALLER: ("in its caller's code", "after"),
    Step.CLOSING: ("closing", "after"),
}
_CODES = {step.value: step for step in Step}


class Place(NamedTuple):
    """Where a rank is."""

    step: Step
    micro_batch: int | None
    since_ns: int
    """Of ``time.perf_counter_ns()``."""

    def phrase(self, sent_names: Sequence[str] = ()) -> str:
        """In words, for who knows the names of what this rank sends."""
        if self.step is Step.UNKNOWN:
            return ""
        what, how = _PHRASES[self.step]
        if self.step is Step.SENDING and sent_names:
            what = f"sending {', '.join(sent_names)}"
        return what if self.micro_batch is None else f"{what} {how} micro-batch {self.micro_batch}"


class Saying(NamedTuple):
    """What a rank said of where it is."""

    place: Place
    number: int
    """Later ones have greater numbers: even ones are the rank's own, the odd one after each is what a neighbour saw."""
    as_of_ns: int
    """When it said so, by the clock of the rank that knows it."""

    def to_bytes(self, is_busy: bool = False) -> bytes:
        """13 bytes, without the micro-batch, as of now."""
        now_ns = time.perf_counter_ns()
        ages = (now_ns - self.place.since_ns) / 1e9, (now_ns - self.as_of_ns) / 1e9
        return _LAYOUT.pack(self.place.step | (_BUSY if is_busy else 0), self.number & 0xFFFFFFFF, *ages)

    @classmethod
    def from_bytes(cls, packed: bytes, micro_batch: int | None) -> tuple[Saying, bool]:
        """What was packed, and whether its rank is busy."""
        now_ns = time.perf_counter_ns()
        code, number, *ages = _LAYOUT.unpack(packed[: _LAYOUT.size].ljust(_LAYOUT.size, b"\0"))
        since_ns, as_of_ns = (now_ns - int(1e9 * age) for age in ages)
        place = Place(_CODES.get(code & ~_BUSY, Step.UNKNOWN), micro_batch, since_ns)
        return cls(place, number, as_of_ns), bool(code & _BUSY)


class SaysPositions(Protocol):
    """One end of a link, as far as positions concern it."""

    def pass_on(self, rank: int) -> None:
        """Say to the neighbour, soon and without a wait here, what is known of a rank."""

    def seen(self) -> tuple[int, Place] | None:
        """The neighbour, and where it was when it last announced a micro-batch."""


class Positions:
    """What this rank knows of where all are, see Note [positions of all ranks]; for any thread.

    Args:
        own_rank: this rank.
        look: says where it is, from any thread; None: it is not known.
    """

    def __init__(self, own_rank: int, look: Callable[[], Place] | None = None) -> None:
        self._own_rank = own_rank
        self._look = look or (lambda: Place(Step.UNKNOWN, None, 0))
        self.sent_names: Mapping[int, Sequence[str]] = {}
        """Rank -> the names of what it sends on, for all ranks, once they agreed."""
        self._known: dict[int, Saying] = {}
        self._number = 0
        self._last_own: Saying | None = None
        self._ends: list[SaysPositions] = []
        self._changed = threading.Condition()

    def add(self, end: SaysPositions) -> None:
        with self._changed:
            self._ends.append(end)

    def own(self) -> Saying:
        """Where this rank is now, to be said once."""
        with self._changed:
            self._number += 2
            now_ns = time.perf_counter_ns()
            return Saying(self._look(), self._number, now_ns)

    def known(self, rank: int) -> Saying | None:
        """The latest of a rank, if there is any."""
        return self._last_own or self.own() if rank == self._own_rank else self._known.get(rank)

    def known_ranks(self) -> list[int]:
        """This one first."""
        with self._changed:
            self._see()
            return [self._own_rank, *self._known]

    def _see(self) -> None:
        """A neighbour may have announced a micro-batch since it last said where it is; the lock is held."""
        for rank, place in filter(None, [end.seen() for end in self._ends]):
            known = self._known.get(rank)
            if rank in self.sent_names and (known is None or known.as_of_ns < place.since_ns):
                self._known[rank] = Saying(place, (0 if known is None else known.number) | 1, place.since_ns)

    def hear(self, rank: int, saying: Saying, end: SaysPositions) -> None:
        """``end`` was notified of where a rank is."""
        if rank == self._own_rank or rank not in self.sent_names or saying.place.step is Step.UNKNOWN:
            return
        with self._changed:
            known = self._known.get(rank)
            if known is not None and known.number >= saying.number:
                return
            self._known[rank] = saying
            self._changed.notify_all()
            ends = list(self._ends)
        for other in ends:
            if other is not end:
                other.pass_on(rank)

    def say_last(self) -> None:
        """Let all neighbours know where this rank was when it learned of a loss: from now on, it is where it was."""
        self._last_own = self.own()
        for end in list(self._ends):
            end.pass_on(self._own_rank)

    def collect(self, lost_rank: int) -> tuple[Position, ...]:
        """Of all ranks, for the error that ``lost_rank`` is lost: returns once all others have said where they are."""
        asked_ns = time.perf_counter_ns() - int(1e9 * _AGE_SECONDS)
        others = self.sent_names.keys() - {self._own_rank, lost_rank}
        with self._changed:
            self._changed.wait_for(
                lambda: all((said := self._known.get(rank)) and said.as_of_ns >= asked_ns for rank in others),
                _FRESH_POSITIONS_SECONDS,
            )
            self._see()
        return tuple(self._position(rank, self.known(rank)) for rank in sorted(self.sent_names))

    def _position(self, rank: int, said: Saying | None) -> Position:
        if said is None or said.place.step is Step.UNKNOWN:
            return Position(rank)
        started_at = time.time() - time.perf_counter_ns() / 1e9
        return Position(
            rank,
            said.place.micro_batch,
            said.place.phrase(self.sent_names[rank]),
            since=started_at + said.place.since_ns / 1e9,
            as_of=started_at + said.as_of_ns / 1e9,
        )


def last_positions(positions: Sequence[Position], at: float) -> str:
    """Ranks in the same step share a clause; what was not said shortly before ``at`` has its age."""
    alike: dict[tuple[str, bool], list[Position]] = {}
    for position in positions:
        alike.setdefault((position.step, at - position.as_of >= 1), []).append(position)
    clauses = []
    for (step, is_old), group in alike.items():
        ranks = ", ".join(str(position.rank) for position in group)
        clause = f"rank{'s' * (len(group) > 1)} {ranks}: {step or 'nothing is known'}"
        if step:
            clause += f" for {_seconds([position.as_of - position.since for position in group])}"
        if step and is_old:
            clause += f", as of {_seconds([at - position.as_of for position in group])} before"
        clauses.append(clause)
    return f"Last positions: {'; '.join(clauses)}."


def _seconds(all_seconds: Sequence[float]) -> str:
    spans = sorted({f"{max(0.0, seconds):.1f}" for seconds in all_seconds}, key=float)
    return " to ".join(dict.fromkeys((spans[0], spans[-1]))) + " s"


# ------------------------------------------------------------------------------- the device of a rank


class Event(Protocol):
    """A point in the current stream, such as ``torch.Event``."""

    def record(self) -> object: ...

    def query(self) -> bool:
        """Whether the device has come there."""


@dataclass
class _Span:
    """Work in which the device waits for no other rank."""

    micro_batch: int
    begin: Event
    end: Event
    is_closed: bool = False
    """Whether all its work is enqueued."""
    seen_ns: int = 0
    """When it was first seen to be under way."""


class DeviceWork:
    """The spans of a stream between its waits for other ranks, see Note [a device that hangs].

    One thread enqueues, another one looks.

    Args:
        make_event: for the device of the stream that is the current one where work is enqueued.
    """

    def __init__(self, make_event: Callable[[], Event]) -> None:
        self._make_event = make_event
        self._spans: deque[_Span] = deque()
        self._free: list[Event] = []

    def begins(self, micro_batch: int) -> None:
        """What is enqueued from now on waits for nobody; all waits before it are enqueued."""
        while self._spans and self._spans[0].is_closed and self._spans[0].end.query():
            over = self._spans.popleft()
            self._free += [over.begin, over.end]
        begin, end = (self._free.pop() if self._free else self._make_event() for _ in range(2))
        begin.record()
        self._spans.append(_Span(micro_batch, begin, end))

    def ends(self) -> None:
        """No more of it is enqueued; a wait for another rank may follow."""
        span = self._spans[-1]
        span.end.record()
        span.is_closed = True

    def late(self, longest_seconds: float) -> int | None:
        """The micro-batch whose work is under way, and was for longer by now; for any thread."""
        for span in list(self._spans):
            if not span.is_closed:
                return None  # the host has not ended it
            if not span.end.query():
                if not span.begin.query():
                    return None  # another rank is waited for
                now_ns = time.perf_counter_ns()
                span.seen_ns = span.seen_ns or now_ns
                return span.micro_batch if now_ns - span.seen_ns > 1e9 * longest_seconds else None
        return None

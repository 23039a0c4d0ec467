"""The receiving side of a link: headers meet free memory, and whoever comes second posts the receive.

Note [a host that waits for its device]
Once the pipeline is broken, streams are let go, as a rule within two seconds. But nobody can end a kernel that hangs,
nor what was enqueued on a communicator of NCCL while that was aborted (Note [ends of NCCL groups] in
``torch_distributed.py``), and ``synchronize()`` of an event waits for them without end. So the host looks at the event,
and at the pipeline, again and again. At first it does so without a pause, since each micro-batch waits so, as a rule
for some milliseconds; ``synchronize()`` keeps a core busy, too. Between two looks it makes a call that lets the other
threads have the interpreter: ``time.sleep(0)`` takes 60 us in Python 3.11, ``poll(0)`` about one [ran]. Then come
pauses, which grow with the wait.
"""

from __future__ import annotations

import contextlib
import math
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch

from ..runtime.stage import Stage
from ..runtime.tracing import Timeline
from ..utils.counters import Stats
from .header import Header, Kind
from .link import Receiver
from .transports.base import Pending

Views = Mapping[str, torch.Tensor]

_ON_CURRENT_STREAM = contextlib.nullcontext()

_LOOKING_SECONDS = 0.05
"""How long the host looks at its device without a pause."""
_PAUSE_SHARE = 1 / 500
"""Of the wait so far."""
_LONGEST_PAUSE_SECONDS = 1e-3
_LETTING_GO_SECONDS = 5.0
"""How long streams may take to be let go, once this rank knows of a loss, before nobody waits for them any more."""


class _Posted(NamedTuple):
    header: Header
    memory: Stage
    views: Views
    transfer: Pending
    posted_ns: int


class Inbox:
    """Landing memory of one link, for one micro-batch or several: free, being filled, or lent to who took it.

    Args:
        receiver: where headers and tensors come from.
        landing: memory for one micro-batch, lent until ``release``. What the transport has for it replaces its own, so
            nobody may have views of it yet.
        stats: counts ``recv_allocations``.
        spare_count: how much more memory of that kind is made at once. Further memory is then made, and counted,
            whenever a header finds none free; with None the header waits for ``landing``. Free memory is offered to the
            sender before it announces anything, where the transport can do that.
        hands_out: whether what is taken, or what is computed of it, leaves the runner; then ``confirm`` can be asked.
        early: whether a receive is posted as soon as memory is free and a header is there, by whichever thread learns
            of that last; else only in ``take``.
        timeline: gives the place where receives are noted, if anywhere.
        on_header: called in ``take`` once the header of a micro-batch has come, before its tensors are waited for.
    """

    def __init__(
        self,
        receiver: Receiver,
        landing: Stage,
        stats: Stats,
        *,
        spare_count: int | None = None,
        hands_out: bool = False,
        early: bool = True,
        timeline: Callable[[], Timeline | None] = lambda: None,
        on_header: Callable[[int], None] = lambda micro_batch: None,
    ) -> None:
        self._receiver = receiver
        self._stats = stats
        self._grows = spare_count is not None
        self._hands_out = hands_out
        self._early = early
        self._timeline = timeline
        self._on_header = on_header
        self._device = landing.device
        self._stream = None if self._device.type == "cpu" else torch.Stream(self._device)
        """Where receives are posted, by whichever thread, so that they wait for the last reader only."""
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._landing = self._shared(landing)
        self._lent: Stage | None = landing
        self._is_read = False
        """Whether the reader of what is lent has marked that it was read."""
        self._read: torch.Event | None = None
        """On an accelerator: when that was."""
        self._events: dict[Stage, torch.Event] = {}
        """Of each memory, to note when it was read: to make one takes longer. Whoever fills it waits for that before it
        can be lent, and read, again."""
        self._free: deque[tuple[Stage, torch.Event | None]] = deque(
            (self._spare(), None) for _ in range(spare_count or 0)
        )
        """With the event, on an accelerator, at which its last reader has run."""
        self._offered: deque[Stage] = deque()
        """Where the next micro-batches land, without an answer to their headers."""
        self._offers = self._grows and early
        self._posted: deque[_Posted] = deque()
        self._heard_count = 0
        self._has_ended = False
        self._landing_soon: _Posted | None = None
        """What was taken and is to land yet."""
        self._is_unconfirmed = False
        self._arrived: torch.Event | None = None
        """On an accelerator: when what was taken last has landed, where somebody asks for it at once."""
        self._error: BaseException | None = None
        receiver.on_news = self._hear_news
        self._offer()

    @property
    def is_lent(self) -> bool:
        """Whether the caller has memory to release."""
        return self._lent is not None

    @property
    def is_unconfirmed(self) -> bool:
        """Whether ``confirm`` has anything to wait for."""
        return self._is_unconfirmed

    def take(self, lands: bool = True, confirms: bool = True) -> tuple[Header, Views] | None:
        """The next micro-batch, for streams once it has landed; None when the sender has stopped.

        Its memory is lent to the caller, for what is enqueued on the current stream: see ``confirm``.

        Never one of which no tensors follow: ``wait_for`` alone is notified of these.

        Args:
            lands: whether to return once it has landed. Without, the caller does something else before ``land``.
            confirms: see ``land``.

        Raises:
            PeerLost: the pipeline broke.
        """
        timeline = self._timeline()
        begin_ns = time.time_ns()
        with self._lock:
            self._post(now=True)
            while not self._posted and not self._is_over():
                self._changed.wait()
                self._post(now=True)
            posted = self._posted.popleft() if self._posted else None
        if posted is None:
            if self._error is not None:
                raise self._error
            self._receiver.check(lambda: "waiting for the next micro-batch")
            return None
        self._landing_soon, self._lent, self._is_read = posted, posted.memory, False
        if timeline is not None:
            timeline.add("steps", "wait for a header", begin_ns, micro_batch=posted.header.sequence)
        self._on_header(posted.header.sequence)
        if lands:
            self.land(confirms)
        return posted.header, posted.views

    def land(self, confirms: bool = True) -> None:
        """Return once what was taken last has landed, for streams; a second call does nothing.

        Args:
            confirms: whether the caller is about to ``confirm`` it, as a rule after it has enqueued what reads it.
                Without, nothing is noted for that, and ``confirm`` waits for all that is enqueued until then.

        Raises:
            PeerLost: the pipeline broke.
        """
        posted, self._landing_soon = self._landing_soon, None
        if posted is None:
            return
        timeline, begin_ns = self._timeline(), time.time_ns()
        posted.transfer.wait()
        if self._hands_out and self._stream is not None:
            self._is_unconfirmed = True
            self._arrived = self._reached() if confirms else None
        if timeline is not None:
            timeline.add("steps", "wait for proxies", begin_ns, micro_batch=posted.header.sequence)
            timeline.add("receive", "receive", posted.posted_ns, micro_batch=posted.header.sequence)

    def confirm(self) -> None:
        """Return once what was taken last has really landed: ``take`` may return when only streams wait for it.

        Raises:
            PeerLost: the pipeline broke; streams that waited were let go, and what they computed is worthless. Where
                they cannot be let go, it comes nevertheless: see Note [a host that waits for its device].
        """
        if not self._is_unconfirmed:
            return
        self._is_unconfirmed = False
        arrived, self._arrived = self._arrived, None
        if (arrived := self._reached() if arrived is None else arrived) is not None:
            self._look_until(arrived)
        # A rank records its loss before it lets streams go.
        self._receiver.check(lambda: "waiting for tensors to land")

    def mark_read(self) -> bool:
        """What is lent was read as of now, for streams, which ``release`` is to say; False if it was marked before."""
        if self._is_read or self._lent is None:
            return False
        self._is_read, self._read = True, self._reached(self._lent)
        return True

    def release(self) -> None:
        """What is lent, if anything, may be filled once what was enqueued on this thread's stream has run.

        Or as much of it as had been enqueued at ``mark_read``.
        """
        with self._lock:
            if self._lent is not None:
                self._free.append((self._lent, self._read if self._is_read else self._reached(self._lent)))
                self._lent, self._is_read = None, False
            self._post(now=False)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """While the body runs, nothing lands; it leaves landing memory as it found it, for streams of this thread.

        What was being received when this was called has landed before the body runs, and can be taken after it.

        Raises:
            PeerLost: the pipeline broke.
        """
        assert not self._offers, "what is offered may be written at any time"
        with self._lock:
            free = [*self._free]
            self._free.clear()
            posted = [*self._posted]
        for _, read in free:
            self._wait_until(read)
        for one in posted:
            one.transfer.wait()
        try:
            yield
        finally:
            with self._lock:
                done = self._reached()
                for index, one in enumerate(posted):
                    self._posted[index] = one._replace(transfer=Pending(partial(self._wait_until, done)))
                self._free.extend((memory, done) for memory, _ in free)
                self._post(now=False)
                self._changed.notify_all()

    def close(self) -> None:
        """Forget all memory: nothing lands here any more, and nothing can be taken."""
        with self._lock:
            self._receiver.on_news = None
            self._has_ended = True
            self._lent = None
            for waiting in (self._free, self._offered, self._posted):
                waiting.clear()
            self._events.clear()
            del self._landing

    def has_heard(self, count: int) -> bool:
        """Whether ``count`` headers came in all, and found memory where tensors follow."""
        return self._heard_count >= count

    def wait_for(self, count: int) -> None:
        """Return once ``has_heard``, or no more comes."""
        with self._lock:
            self._changed.wait_for(lambda: self.has_heard(count) or self._is_over())

    def _reached(self, read: Stage | None = None) -> torch.Event | None:
        """On an accelerator: when what was enqueued on this thread's stream has run; the event is that of ``read``."""
        if self._stream is None:
            return None
        event = None if read is None else self._events.get(read)
        if event is None:
            event = torch.Event(self._device)
            if read is not None:
                self._events[read] = event
        event.record(torch.accelerator.current_stream(self._device))
        return event

    def _look_until(self, reached: torch.Event) -> None:
        """Return once the device is there, or the pipeline has been broken for too long: see the note above."""
        began = time.monotonic()
        longest, other_threads = math.inf, select.poll()
        while not reached.query():
            waited = time.monotonic() - began
            if self._receiver.is_broken:
                longest = min(longest, waited + _LETTING_GO_SECONDS)
                if waited >= longest:
                    return
            if waited < _LOOKING_SECONDS:
                other_threads.poll(0)
            else:
                time.sleep(min(waited * _PAUSE_SHARE, _LONGEST_PAUSE_SECONDS))

    def _wait_until(self, reached: torch.Event | None) -> None:
        """What this thread's stream enqueues from now on comes after that."""
        if reached is not None:
            torch.accelerator.current_stream(self._device).wait_event(reached)

    def _is_over(self) -> bool:
        """Whether nothing more comes; where all memory is lent, nothing is received that would say so."""
        return self._has_ended or self._receiver.is_broken

    def _hear_news(self) -> None:
        with self._lock:
            self._post(now=False)
            self._changed.notify_all()

    def _post(self, now: bool) -> None:
        """Receive into free memory what was announced; the lock is held."""
        try:
            # Nothing is asked that raises: see Note [who may wait for the verdict] in ``link.py``.
            is_wanted = now or self._early
            while is_wanted and self._receiver.headers_waiting and (self._free or self._grows) and not self._is_over():
                header = self._receiver.next_header()
                if header is None:
                    self._has_ended = True
                elif header.kind is Kind.DATA:
                    self._receive(header)
                self._heard_count += header is not None
            self._offer()
        except Exception as error:  # raised by take(), in the thread of the runner
            self._error = error
            self._has_ended = True

    def _receive(self, header: Header) -> None:
        if not self._free and not self._offered:
            self._free.append((self._spare(), None))
            self._stats.add("recv_allocations", len(self._landing.inputs))
        memory, read = (self._offered.popleft(), None) if self._offered else self._free.popleft()
        views = memory.views(header.num_tokens)
        with self._after(read):
            transfer = self._receiver.receive(header, views)
        self._posted.append(_Posted(header, memory, views, transfer, time.time_ns()))

    def _offer(self) -> None:
        """Name the places of free memory before anything is announced; nobody else uses this, or the lock is held."""
        while self._offers and self._free and not self._is_over():
            memory, read = self._free.popleft()
            with self._after(read):
                self._offers = self._receiver.offer(memory.views(memory.max_tokens))
            if self._offers:
                self._offered.append(memory)
            else:
                self._free.appendleft((memory, read))

    def _after(self, read: torch.Event | None) -> contextlib.AbstractContextManager[object]:
        """What is enqueued in the body comes after that event."""
        if self._stream is None or read is None or not self._early:
            return _ON_CURRENT_STREAM  # in the step, this thread's stream comes after all that was enqueued before
        self._stream.wait_event(read)
        return self._stream

    def _spare(self) -> Stage:
        return self._shared(Stage(self._landing.inputs, self._landing.max_tokens, self._device))

    def _shared(self, memory: Stage) -> Stage:
        memory.land_in(self._receiver.landing_memory(memory.max_tokens))
        return memory

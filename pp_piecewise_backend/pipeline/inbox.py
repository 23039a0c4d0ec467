"""The receiving side of a stage: headers meet free landing memory, and whoever comes second posts the receive."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from ..runtime.tracing import Timeline
from .header import Header
from .link import Receiver
from .transports.base import Pending

Views = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class _Posted:
    header: Header
    views: Views
    transfer: Pending
    posted_ns: int


class PostingStream:
    """Where receives are posted, by whichever thread, so that on an accelerator they wait for the last reader only."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.Stream | None = None

    def now(self) -> torch.Event | None:
        """What the current stream has enqueued; None on the CPU, where everything has run."""
        return None if self._device.type == "cpu" else torch.accelerator.current_stream(self._device).record_event()

    def after(self, event: torch.Event | None) -> contextlib.AbstractContextManager[object]:
        """What is enqueued inside waits for ``event``, and for nothing else of its stream."""
        return _NOTHING if event is None else self._on_own_stream(event)

    @contextlib.contextmanager
    def _on_own_stream(self, event: torch.Event) -> Iterator[None]:
        if self._stream is None:
            self._stream = torch.Stream(self._device)
        with self._stream:
            self._stream.wait_event(event)
            yield


_NOTHING: contextlib.AbstractContextManager[object] = contextlib.nullcontext()


class Inbox:
    """The landing memory of one link, which is free, being filled or being read. It is free from ``release`` on.

    Args:
        receiver: where headers and tensors come from.
        views: number of tokens -> views of the landing memory.
        device: where that memory lies.
        early: whether a receive is posted as soon as the memory is free and a header is there, by whichever thread
            learns of that last; else only in ``take``.
        timeline: gives the place where receives are noted, if anywhere.
    """

    def __init__(
        self,
        receiver: Receiver,
        views: Callable[[int], Views],
        device: torch.device,
        early: bool,
        timeline: Callable[[], Timeline | None],
    ) -> None:
        self._receiver = receiver
        self._views = views
        self._early = early
        self._timeline = timeline
        self._changed = threading.Condition()
        self._is_free = False
        self._posted: _Posted | None = None
        self._at_end = False
        self._error: BaseException | None = None
        self._posting = PostingStream(device)
        self._freed: torch.Event | None = None
        """When the last step that reads the memory has run."""
        receiver.on_news = self._hear_news

    def take(self) -> tuple[Header, Views] | None:
        """The next micro-batch once it has landed; None when the sender has stopped. The memory is then the caller's.

        Raises:
            PeerLost: the pipeline broke.
        """
        timeline = self._timeline()
        begin_ns = time.time_ns()
        with self._changed:
            self._post(now=True)
            while self._posted is None and not self._at_end and self._error is None:
                self._changed.wait()
                self._post(now=True)
            posted, self._posted = self._posted, None
        if timeline is not None and posted is not None:
            timeline.add("steps", "wait for a header", begin_ns, micro_batch=posted.header.sequence)
        if self._error is not None:
            raise self._error
        if posted is None:
            return None
        begin_ns = time.time_ns()
        posted.transfer.wait()
        if timeline is not None:
            sequence = posted.header.sequence
            timeline.add("steps", "wait for proxies", begin_ns, micro_batch=sequence)
            timeline.add("receive", "receive", posted.posted_ns, micro_batch=sequence)
        return posted.header, posted.views

    def release(self) -> None:
        """The memory may be filled again once what was enqueued on this thread's stream has run."""
        with self._changed:
            self._is_free = True
            self._freed = self._posting.now()
            self._post(now=False)

    def _hear_news(self) -> None:
        with self._changed:
            self._post(now=False)
            self._changed.notify_all()

    def _post(self, now: bool) -> None:
        """Receive into the memory if it is free and a header is there; the lock is held."""
        if not (now or self._early) or not self._is_free or self._posted is not None or self._at_end:
            return
        if self._error is not None or not self._receiver.headers_waiting:
            return
        try:
            header = self._receiver.next_header()
            if header is None:
                self._at_end = True
                return
            views = self._views(header.num_tokens)
            with self._posting.after(self._freed):
                transfer = self._receiver.receive(header, views)
        except Exception as error:  # raised by take(), in the thread of the runner
            self._error = error
            return
        self._is_free = False
        self._posted = _Posted(header, views, transfer, time.time_ns())

"""Feedback from the last stage to the first: received as it comes, so that the last stage never waits for it."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..runtime.stage import Proxy
from ..utils.counters import Stats
from .inbox import PostingStream
from .link import Receiver
from .transports.base import Pending

Tensors = Mapping[str, torch.Tensor]


@dataclass(slots=True)
class _Slot:
    tensors: Tensors
    freed: torch.Event | None = None
    """When, on an accelerator, its last reader has run."""


@dataclass(frozen=True, slots=True)
class _Unread:
    tag: bytes
    tensors: Tensors
    slot: _Slot
    transfer: Pending | None
    """None: the link carries no tensors."""


class FeedbackReader:
    """Receives every feedback, in the thread that hears of it, into a slot that is kept until somebody asks for it.

    Args:
        receiver: the feedback link.
        max_tokens: rows of each slot.
        device: where slots lie.
        slot_count: slots made at once; further ones are made, and counted, when more feedback waits.
        stats: counts ``recv_allocations``.
    """

    def __init__(
        self, receiver: Receiver, max_tokens: int, device: torch.device, slot_count: int, stats: Stats
    ) -> None:
        self._receiver = receiver
        self._max_tokens = max_tokens
        self._device = device
        self._stats = stats
        self._posting = PostingStream(device)
        self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()
        for _ in range(slot_count):
            self._free.put(self._new_slot())
        self._unread: deque[_Unread] = deque()
        self._lent: _Slot | None = None
        self._changed = threading.Condition()
        self._heard = 0
        self._has_ended = False
        self._error: BaseException | None = None
        receiver.on_news = self._hear_news
        self._hear_news()  # of what came before

    def next(self) -> tuple[bytes, Tensors] | None:
        """The oldest unread tag and tensors, when they have come; None when no more come.

        The tensors belong to the reader and hold their contents until ``next`` is called again.

        Raises:
            PeerLost: the pipeline broke.
        """
        if self._lent is not None:
            self._lent.freed = self._posting.now()
            self._free.put(self._lent)
            self._lent = None
        with self._changed:
            self._changed.wait_for(lambda: self._unread or self._has_ended)
            if not self._unread:
                if self._error is not None:
                    raise self._error
                return None
            unread = self._unread.popleft()
        self._lent = unread.slot
        if unread.transfer is not None:
            unread.transfer.wait()
        return unread.tag, unread.tensors

    def wait_for(self, count: int) -> None:
        """Return once feedback of ``count`` micro-batches has come in all, or no more comes."""
        if self._heard < count:
            with self._changed:
                self._changed.wait_for(lambda: self._heard >= count or self._has_ended)

    def _hear_news(self) -> None:
        with self._changed:
            try:
                while not self._has_ended and self._receiver.headers_waiting:
                    self._receive()
            except Exception as error:  # raised by next(), in the thread of the runner
                self._error = error
                self._has_ended = True
            self._changed.notify_all()

    def _receive(self) -> None:
        header = self._receiver.next_header()
        if header is None:
            self._has_ended = True
            return
        slot = self._take_slot()
        views = {name: tensor[: header.num_tokens] for name, tensor in slot.tensors.items()}
        transfer = None
        if views:
            with self._posting.after(slot.freed):
                transfer = self._receiver.receive(header, views)
        self._unread.append(_Unread(header.tag, views, slot, transfer))
        self._heard += 1

    def _take_slot(self) -> _Slot:
        try:
            return self._free.get_nowait()
        except queue.Empty:
            slot = self._new_slot()
            self._stats.add("recv_allocations", len(slot.tensors))
            return slot

    def _new_slot(self) -> _Slot:
        known = self._receiver.landing_memory(self._max_tokens)
        proxies = self._receiver.schema.proxies
        return _Slot({name: self._memory_for(proxy, known.get(name)) for name, proxy in proxies.items()})

    def _memory_for(self, proxy: Proxy, known: torch.Tensor | None) -> torch.Tensor:
        shape = (self._max_tokens, *proxy.shape)
        if known is None:
            return torch.zeros(shape, dtype=proxy.dtype, device=self._device)
        return known[: self._max_tokens * proxy.bytes_per_token].view(proxy.dtype).view(shape)

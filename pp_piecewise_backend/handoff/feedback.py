"""What the first stage hears from the last one, in a thread of its own, so that the last one never waits for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping

import torch

from ..handoff.link import Receiver
from ..handoff.schema import Field
from ..stats import Stats

Slot = Mapping[str, torch.Tensor]


class FeedbackReader:
    """Receives every feedback into a slot of its own and keeps it until it is asked for.

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
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for _ in range(slot_count):
            self._free.put(self._new_slot())
        self._unread: queue.SimpleQueue[tuple[bytes, Slot, Slot] | BaseException | None] = queue.SimpleQueue()
        self._lent: Slot | None = None
        self._end: BaseException | str | None = ""
        self._changed = threading.Condition()
        self._heard = 0
        self._has_ended = False
        threading.Thread(target=self._read, name="handoff feedback", daemon=True).start()

    def next(self) -> tuple[bytes, Slot] | None:
        """The oldest unread tag and tensors, when they have come; None when no more come.

        The tensors belong to the reader and hold their contents until ``next`` is called again.

        Raises:
            PeerLost: the pipeline broke.
        """
        if self._lent is not None:
            self._free.put(self._lent)
            self._lent = None
        if self._end == "":
            item = self._unread.get()
            if isinstance(item, tuple):
                tag, tensors, self._lent = item
                return tag, tensors
            self._end = item
        if isinstance(self._end, BaseException):
            raise self._end
        return None

    def wait_for(self, count: int) -> None:
        """Return once ``count`` micro-batches were told of in all, or no more come."""
        with self._changed:
            self._changed.wait_for(lambda: self._heard >= count or self._has_ended)

    def _read(self) -> None:
        end: BaseException | None = None
        try:
            while (header := self._receiver.next_header()) is not None:
                slot = self._take_slot()
                views = {name: tensor[: header.num_tokens] for name, tensor in slot.items()}
                if views:
                    self._receiver.receive(header, views).wait()
                self._unread.put((header.tag, views, slot))
                with self._changed:
                    self._heard += 1
                    self._changed.notify_all()
        except Exception as error:  # told by next(), in the thread of the runner
            end = error
        self._unread.put(end)
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def _take_slot(self) -> Slot:
        try:
            return self._free.get_nowait()
        except queue.Empty:
            slot = self._new_slot()
            self._stats.add("recv_allocations", len(slot))
            return slot

    def _new_slot(self) -> Slot:
        known = self._receiver.landing_memory(self._max_tokens)
        return {field.name: self._memory_for(field, known[field.name]) for field in self._receiver.schema.fields}

    def _memory_for(self, field: Field, known: torch.Tensor | None) -> torch.Tensor:
        shape = (self._max_tokens, *field.shape)
        if known is None:
            return torch.zeros(shape, dtype=field.dtype, device=self._device)
        return known[: self._max_tokens * field.bytes_per_token].view(field.dtype).view(shape)

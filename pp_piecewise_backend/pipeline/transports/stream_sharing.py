"""Landing memory on an accelerator: streams wait for the other process, and no host does.

Note [counters of a link]
The host waits for nothing here: streams wait for words in a page of host memory that both processes map. The receiving
end counts up ``free`` when what read its places has run, the sending end ``landed`` when it has written them, and each
waits for the number of the transfer. The receiving end may wait before the other one has even begun to compute: all it
needs to know is the number. A stream that waits for another process must not wait for a dead one, which events of
CUDA IPC cannot promise: they can be waited for once they are recorded, and a process that was killed may leave its last
event open for ever, and with it every stream that waits for it [ran, driver 580]. A word can be set by whoever waits.

Note [what is let go is worthless]
Once the pipeline is broken, streams are let go, and compute on what never landed. Nobody must take that for a result:

- A rank first breaks the links on which it sends, then those on which it receives. Breaking the sending end revokes it:
  the word ``sound`` says that what is written from now on is worthless. The receiving end waits for ``landed``, then
  for ``sound``, so a revoked transfer is never accepted, although it is counted; and so on along the pipeline.
- What leaves the runner is confirmed on the host: an event after the wait has passed, and the rank knows of no fault.
  A rank records its fault before it lets streams go.
- A sending end does not write where its neighbour may still read. Its wait for ``free`` is let go once the neighbour is
  gone, or has not noticed within ``_NOTICE_SECONDS`` (it was stopped); one that knows of the fault frees its memory.

What a killed process had enqueued may still set a word back, so streams are let go again and again, by a thread.

Note [no wait but for what was enqueued]
Streams of one process may share a hardware queue, where what was enqueued later runs later. So before a stream waits
for another rank, this rank has enqueued all that the other one may wait for: the places of earlier receives, as they
are named, and what was sent, see ``Pending.enqueued``. Then every operation waits for earlier ones only, in the order
in which all ranks enqueue them, and no circle can arise, whatever the queues.
"""

from __future__ import annotations

import contextlib
import ctypes
import select
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from .base import POLL_SECONDS, poll
from .one_machine import Sharing
from .shared_memory import HostSharing

_LANDED, _FREE, _SOUND, _KNOWN = 0, 128, 256, 384
"""Offsets of the words in their page, on cache lines of their own; the hosts write the last two."""
_PAGE_BYTES = 512
_REVOKED = 0xFFFFFFFF
"""Before ``0``, for which streams wait there: words wrap around, and a wait is for a distance."""
_AHEAD = 1 << 30
"""How far a word is set ahead to let streams go."""
_NOTICE_SECONDS = 1.0
"""How long a neighbour that lives may take to notice a fault."""
_CLOSING_SECONDS = 5.0


Word = tuple[int, int]
"""Address and value of 32 bits of host memory."""


class Streams(Protocol):
    """What a device can do. Streams and events are its own; no call waits for the device.

    What always goes together is one call: calls into a driver take the host longer than all else of a transfer.
    """

    def new(self) -> Any:
        """A stream for one end of a link."""

    def current(self) -> Any:
        """The stream of this thread."""

    def record(self, stream: Any, event: Any = None) -> Any:
        """An event at the end of a stream; this one, if it is given, for all that wait for it from now on.

        To make one, and to destroy it, takes longer than to record it.
        """

    def wait_for_event(self, stream: Any, event: Any) -> None: ...

    def wait_for_stream(self, stream: Any, other: Any) -> None:
        """For what is enqueued on the other one by now. One thread at a time."""

    def wait_for_words(self, stream: Any, words: Sequence[Word]) -> None:
        """Until each, in turn, is the value or later, as a distance: ``int32(word - value) >= 0``."""

    def write_word(self, stream: Any, word: Word) -> None:
        """Visible to all who see what the stream wrote before."""

    def copy(self, stream: Any, free: Word, copies: Sequence[tuple[int, int, int]], landed: Word) -> None:
        """Wait for ``free``, copy from addresses to addresses, which the device reaches, and write ``landed``.

        Args:
            copies: target, source and number of bytes of each.
        """

    def has_run(self, stream: Any) -> bool:
        """Whether nothing is left to do."""

    def register(self, page: torch.Tensor) -> None:
        """Let the device reach host memory, under its own address."""

    def unregister(self, page: torch.Tensor) -> None:
        """The opposite, once no stream uses it."""


class StreamSharing(Sharing):
    """One end's way to the landing memory of a link; see Note [counters of a link].

    Args:
        line: what both ends need to know of memory travels over it. It is closed when this end lets go.
        is_source: whether this is the sending end.
        streams: the device of this end's tensors.
    """

    streams_wait = True

    def __init__(self, line: socket.socket, is_source: bool, streams: Streams) -> None:
        self._line = line
        self._is_source = is_source
        self._streams = streams
        page = HostSharing(line)
        self._page = page.take() if is_source else page.make(_PAGE_BYTES)
        self._page_address = self._page.data_ptr()
        streams.register(self._page)
        self._told, self._awaited = (_LANDED, _FREE) if is_source else (_FREE, _LANDED)
        self._told_count = self._awaited_count = 0
        self._stream = streams.new()
        """Where this end writes, and counts."""
        self._waiting_streams = [self._stream]
        self._ready: Any = None
        """Recorded again for each write that follows at once."""
        self._letting_go: threading.Thread | None = None
        self._lock = threading.Lock()
        self._is_closed = False

    def free(self) -> None:
        # On one stream, so that the word only goes up.
        self._streams.wait_for_stream(self._stream, self._streams.current())
        self._streams.write_word(self._stream, self._counted_up())

    def ready(self, is_kept: bool) -> Any:
        if is_kept:
            return self._streams.record(self._streams.current())
        self._ready = self._streams.record(self._streams.current(), self._ready)
        return self._ready

    def write(self, ready: Any, writes: Sequence[tuple[torch.Tensor, int, torch.Tensor]]) -> None:
        self._awaited_count += 1
        self._streams.wait_for_event(self._stream, ready)
        copies = [(block.data_ptr() + offset, tensor.data_ptr(), tensor.nbytes) for block, offset, tensor in writes]
        self._streams.copy(self._stream, self._word(_FREE, self._awaited_count), copies, self._counted_up())

    def after(self, written: None) -> None:
        self._streams.wait_for_stream(self._streams.current(), self._stream)

    def after_landing(self, count: int) -> None:
        stream = self._streams.current()
        if stream not in self._waiting_streams:
            self._waiting_streams.append(stream)
        self._awaited_count = count
        self._streams.wait_for_words(stream, [self._word(_LANDED, count), self._word(_SOUND, 0)])

    def _counted_up(self) -> Word:
        """What this end tells the other one next."""
        self._told_count += 1
        return self._word(self._told, self._told_count)

    def _word(self, offset: int, count: int) -> Word:
        return self._page_address + offset, count & 0xFFFFFFFF

    # ------------------------------------------------------------------------------------ ending

    def finish(self, longest_seconds: float) -> None:
        poll(self._has_finished, longest_seconds)

    def _has_finished(self) -> bool:
        if self._is_finished():
            return True
        if self._letting_go is not None or (self._neighbour_is_gone() and not self._is_finished()):
            raise ConnectionError("the other end is gone, and what was under way is lost")
        return False

    def _is_finished(self) -> bool:
        if not self._streams.has_run(self._stream):
            return False
        return self._is_source or self._distance(_LANDED, self._awaited_count) >= 0

    def give_up(self) -> None:
        with self._lock:
            if self._is_source:
                self._set(_SOUND, _REVOKED)
            self._start_letting_go()

    def close(self) -> None:
        with self._lock:
            if self._is_source and not self._streams.has_run(self._stream):
                self._set(_SOUND, _REVOKED)
            self._is_closed = True
            thread = self._start_letting_go()
        thread.join(_CLOSING_SECONDS)

    def _start_letting_go(self) -> threading.Thread:
        if self._letting_go is None:
            if not self._is_source:
                self._set(_KNOWN, 1)
                self._let_go()
            self._letting_go = threading.Thread(target=self._keep_letting_go, name="handoff end", daemon=True)
            self._letting_go.start()
        return self._letting_go

    def _keep_letting_go(self) -> None:
        """Until nothing waits any more and this end is closed, see Note [what is let go is worthless]."""
        noticed_by = time.monotonic() + _NOTICE_SECONDS
        closed_by: float | None = None
        with contextlib.suppress(RuntimeError):  # of a device that has failed
            while not (self._is_closed and all(map(self._streams.has_run, self._waiting_streams))):
                now = time.monotonic()
                if self._is_closed and closed_by is None:
                    closed_by = now + _CLOSING_SECONDS / 2
                is_noticed = self._distance(_KNOWN, 1) >= 0
                if (
                    not self._is_source
                    or self._neighbour_is_gone()
                    or (now >= noticed_by and not is_noticed)
                    or (closed_by is not None and now >= closed_by)
                ):
                    self._let_go()
                time.sleep(POLL_SECONDS)
            self._streams.unregister(self._page)
        self._line.close()

    def _let_go(self) -> None:
        self._set(self._awaited, (self._awaited_count + _AHEAD) & 0xFFFFFFFF)
        if not self._is_source:
            self._set(_SOUND, 0)

    def _neighbour_is_gone(self) -> bool:
        poll = select.poll()
        try:
            poll.register(self._line, 0)  # reports nothing but that the other end hung up
            return bool(poll.poll(0))
        except (OSError, ValueError):  # ValueError: it was closed
            return True

    def _set(self, word: int, value: int) -> None:
        ctypes.c_uint32.from_address(self._page_address + word).value = value

    def _distance(self, word: int, count: int) -> int:
        return ctypes.c_int32(ctypes.c_uint32.from_address(self._page_address + word).value - count).value

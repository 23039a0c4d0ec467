"""Streams on the CPU: each is a thread that runs what is enqueued, in order. A stand-in for those of a GPU.

``EmulatedMemory`` is a kind of sharing for ``OneMachine`` whose tensors lie on the CPU, in memory that both processes
map, and whose ends wait and write by the words of ``stream_sharing``, as over CUDA IPC. What the stages themselves
compute runs on the host, which so is the current stream, unless ``enqueueing_on`` says otherwise.
"""

from __future__ import annotations

import contextlib
import ctypes
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from pp_piecewise_backend.pipeline.transports.shared_memory import HostMemory, HostSharing
from pp_piecewise_backend.pipeline.transports.stream_sharing import StreamSharing, Word

_POLL_SECONDS = 2e-4


class Stream:
    """Runs functions one after the other, in a thread of its own."""

    def __init__(self) -> None:
        self._functions: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._enqueued = self._run = 0
        threading.Thread(target=self._work, daemon=True).start()

    def enqueue(self, function: Callable[[], object]) -> None:
        self._enqueued += 1
        self._functions.put(function)

    def _work(self) -> None:
        while True:
            self._functions.get()()
            self._run += 1

    @property
    def has_run(self) -> bool:
        return self._run == self._enqueued

    def synchronize(self, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not self.has_run:
            assert time.monotonic() < deadline, "the stream is stuck"
            time.sleep(_POLL_SECONDS)


class _Host(Stream):
    """Where everything runs at once."""

    def __init__(self) -> None:
        self._enqueued = self._run = 0

    def enqueue(self, function: Callable[[], object]) -> None:
        function()


class Event:
    """May be recorded again and again."""

    reached: threading.Event


HOST = _Host()
_current = threading.local()


@contextlib.contextmanager
def enqueueing_on(stream: Stream) -> Iterator[None]:
    """Within, ``stream`` is the current stream of this thread."""
    before, _current.stream = getattr(_current, "stream", HOST), stream
    try:
        yield
    finally:
        _current.stream = before


class EmulatedStreams:
    """See ``stream_sharing.Streams``."""

    def new(self) -> Stream:
        return Stream()

    def current(self) -> Stream:
        return getattr(_current, "stream", HOST)

    def record(self, stream: Stream, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.reached = reached = threading.Event()
        stream.enqueue(reached.set)
        return event

    def wait_for_event(self, stream: Stream, event: Event) -> None:
        reached = event.reached  # as a GPU does: for where it was recorded last
        stream.enqueue(lambda: _wait(reached))

    def wait_for_stream(self, stream: Stream, other: Stream) -> None:
        self.wait_for_event(stream, self.record(other))

    def wait_for_words(self, stream: Stream, words: Sequence[Word]) -> None:
        for word in words:
            self._wait_for_word(stream, *word)

    def _wait_for_word(self, stream: Stream, address: int, value: int) -> None:
        word = ctypes.c_uint32.from_address(address)

        def wait() -> None:
            while ctypes.c_int32(word.value - value).value < 0:
                time.sleep(_POLL_SECONDS)

        stream.enqueue(wait)

    def write_word(self, stream: Stream, word: Word) -> None:
        address, value = word

        def write() -> None:
            ctypes.c_uint32.from_address(address).value = value

        stream.enqueue(write)

    def copy(self, stream: Stream, free: Word, copies: Sequence[tuple[int, int, int]], landed: Word) -> None:
        self.wait_for_words(stream, [free])
        for copy in copies:
            self.copy_one(stream, *copy)
        self.write_word(stream, landed)

    def copy_one(self, stream: Stream, target: int, source: int, num_bytes: int) -> None:
        stream.enqueue(lambda: _copy(target, source, num_bytes))

    def has_run(self, stream: Stream) -> bool:
        return stream.has_run

    def register(self, page: torch.Tensor) -> None:
        pass

    def unregister(self, page: torch.Tensor) -> None:
        pass


def _wait(event: threading.Event) -> None:
    event.wait()


def _copy(target: int, source: int, num_bytes: int) -> None:
    ctypes.memmove(target, source, num_bytes)


class EmulatedSharing(StreamSharing):
    """One end's way to landing memory on the CPU."""

    def __init__(self, line: socket.socket, is_source: bool) -> None:
        super().__init__(line, is_source, EmulatedStreams())
        self._memory = HostSharing(line)

    def make(self, num_bytes: int) -> torch.Tensor:
        return self._memory.make(num_bytes)

    def take(self) -> torch.Tensor:
        return self._memory.take()


class EmulatedMemory(HostMemory):
    """The kind of sharing."""

    name = "emulated"

    def end(self, line: socket.socket, is_source: bool) -> EmulatedSharing:  # type: ignore[override]
        return EmulatedSharing(line, is_source)


class OnTrial(EmulatedMemory):
    """The kind of sharing, where another way may be faster, and where something may fail on this rank.

    Args:
        seconds: how much longer each copy takes.
        fails: what raises: "end", "make" or "take"; or "copy", which then writes nothing.
        has_rival: whether the other way may be faster.
    """

    def __init__(self, seconds: float = 0.0, fails: str = "", has_rival: bool = True) -> None:
        self._seconds = seconds
        self._fails = fails
        self._has_rival = has_rival

    def has_rival(self, one: str, other: str) -> bool:
        return self._has_rival

    def end(self, line: socket.socket, is_source: bool) -> EmulatedSharing:  # type: ignore[override]
        if self._fails == "end":
            fails("end")
        end = EmulatedSharing(line, is_source)
        if self._fails in ("make", "take"):
            setattr(end, self._fails, lambda *_: fails(self._fails))
        end._streams.copy_one = self._copy  # type: ignore[attr-defined]
        return end

    def _copy(self, stream: Stream, target: int, source: int, num_bytes: int) -> None:
        stream.enqueue(lambda: time.sleep(self._seconds))
        if self._fails != "copy":
            stream.enqueue(lambda: _copy(target, source, num_bytes))


def fails(what: str) -> None:
    raise RuntimeError(f"{what} fails here")

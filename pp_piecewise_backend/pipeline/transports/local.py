"""All stages in one process, each in a thread of its own: for tests, and for a look at a pipeline on one device."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Sequence

import torch

from ... import errors


class LocalHub:
    """Where the stages of one process meet.

    Args:
        stage_count: how many there are.
        setup_seconds: how long they wait for one another at set-up, and for data of a stage that lives.
    """

    def __init__(self, stage_count: int, setup_seconds: float = 1800.0) -> None:
        self.stage_count = stage_count
        self.setup_seconds = setup_seconds
        self._texts: list[list[str]] = [[] for _ in range(stage_count)]
        """Stage -> what it brought, one text per round."""
        self._pipes: dict[tuple[int, int, str], _Pipe] = {}
        self._changed = threading.Condition()

    def transport(self, stage: int) -> LocalTransport:
        return LocalTransport(self, stage)

    def exchange(self, stage: int, text: str) -> list[str]:
        with self._changed:
            at = len(self._texts[stage])
            self._texts[stage].append(text)
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: all(len(own) > at for own in self._texts), self.setup_seconds):
                missing = [rank for rank, own in enumerate(self._texts) if len(own) <= at]
                what = f"the plans of ranks {missing}"
                raise errors.PeerLost(errors.ranks_missing_at_setup(stage, what, self.setup_seconds, "none came"))
            return [own[at] for own in self._texts]

    def pipe(self, source: int, target: int, name: str) -> _Pipe:
        with self._changed:
            return self._pipes.setdefault((source, target, name), _Pipe(self.setup_seconds))


class LocalTransport:
    """One stage's way to the others of its ``LocalHub``."""

    name = "local"

    def __init__(self, hub: LocalHub, stage: int) -> None:
        self.stage = stage
        self.stage_count = hub.stage_count
        self.ranks = range(hub.stage_count)
        self._hub = hub

    def exchange(self, text: str) -> list[str]:
        return self._hub.exchange(self.stage, text)

    def wire(self, source: int, target: int, name: str) -> LocalWire | None:
        if self.stage not in (source, target):
            return None
        pipe = self._hub.pipe(source, target, name)
        down, up = pipe.messages
        return LocalWire(pipe, tells=down, hears=up) if self.stage == source else LocalWire(pipe, tells=up, hears=down)

    def close(self) -> None:
        pass


_HANG_UP = None
"""Behind the last message of an end that closed."""

Messages = queue.SimpleQueue[bytes | None]


class LocalWire:
    """One end of a pipe between two threads."""

    def __init__(self, pipe: _Pipe, tells: Messages, hears: Messages) -> None:
        self._pipe = pipe
        self._tells = tells
        self._hears = hears
        self._is_broken = False

    def tell(self, message: bytes) -> None:
        if self._is_broken:
            raise ConnectionError("this end was closed")
        self._tells.put(message)

    def flush(self, timeout_seconds: float) -> None:
        pass

    def hear(self, timeout_seconds: float) -> bytes:
        try:
            message = self._hears.get(timeout=timeout_seconds)
        except queue.Empty:
            raise TimeoutError from None
        if message is _HANG_UP:
            raise ConnectionError("the other end was closed")
        return message

    def send(self, tensors: Sequence[torch.Tensor]) -> _Side:
        return self._pipe.put(self._pipe.sent, tensors)

    def landing_memory(self, num_bytes: int) -> None:
        return None  # all memory is that of one process

    def receive(self, views: Sequence[torch.Tensor]) -> _Side:
        return self._pipe.put(self._pipe.awaited, views)

    def break_data(self) -> None:
        self._pipe.break_off()

    def break_control(self) -> None:
        self._is_broken = True
        self._tells.put(_HANG_UP)
        self._hears.put(_HANG_UP)

    def close(self) -> None:
        self.break_control()
        self.break_data()


class _Side:
    """Tensors that one end offers, or the views where the other end wants them."""

    def __init__(self, pipe: _Pipe, tensors: Sequence[torch.Tensor]) -> None:
        self.tensors = tensors
        self.is_done = False
        self.ready = _event_after_current_work(tensors)
        """When the current stream has written the tensors, or no longer reads the views."""
        self.copied: torch.Event | None = None
        self._pipe = pipe

    def wait(self) -> None:
        self._pipe.wait(self)
        if self.copied is not None:
            self.copied.wait()


class _Pipe:
    """The shared part of both ends: whoever comes second copies, so that neither waits without need."""

    def __init__(self, setup_seconds: float) -> None:
        self.messages: tuple[Messages, Messages] = (queue.SimpleQueue(), queue.SimpleQueue())
        self.sent: deque[_Side] = deque()
        self.awaited: deque[_Side] = deque()
        self._setup_seconds = setup_seconds
        self._changed = threading.Condition()
        self._is_broken = False
        self._streams: dict[torch.device, torch.Stream] = {}

    def put(self, waiting: deque[_Side], tensors: Sequence[torch.Tensor]) -> _Side:
        side = _Side(self, tensors)
        with self._changed:
            if self._is_broken:
                raise ConnectionError("the link was closed")
            waiting.append(side)
            if self.sent and self.awaited:
                self._copy(self.sent.popleft(), self.awaited.popleft())
                self._changed.notify_all()
        return side

    def _copy(self, source: _Side, target: _Side) -> None:
        if source.ready is None or target.ready is None:
            _copy_all(source, target)
        else:
            stream = self._stream(target.tensors[0].device)
            with stream:
                stream.wait_event(source.ready)
                stream.wait_event(target.ready)
                _copy_all(source, target)
                source.copied = target.copied = stream.record_event()
        source.is_done = target.is_done = True

    def _stream(self, device: torch.device) -> torch.Stream:
        if device not in self._streams:
            self._streams[device] = torch.Stream(device)
        return self._streams[device]

    def wait(self, side: _Side) -> None:
        with self._changed:
            self._changed.wait_for(lambda: side.is_done or self._is_broken, self._setup_seconds)
            if not side.is_done:
                raise ConnectionError("the link was closed") if self._is_broken else TimeoutError

    def break_off(self) -> None:
        with self._changed:
            self._is_broken = True
            self._changed.notify_all()


def _copy_all(source: _Side, target: _Side) -> None:
    with torch.inference_mode(False), torch.no_grad():
        for sent, view in zip(source.tensors, target.tensors, strict=True):
            view.copy_(sent, non_blocking=True)


def _event_after_current_work(tensors: Sequence[torch.Tensor]) -> torch.Event | None:
    device = tensors[0].device
    return None if device.type == "cpu" else torch.accelerator.current_stream(device).record_event()

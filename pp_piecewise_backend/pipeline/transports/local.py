"""All stages in one process, each in a thread of its own: for tests, and for a look at a pipeline on one device.

Links are those of Note [one machine], over socket pairs of the process.
"""

from __future__ import annotations

import contextlib
import mmap
import socket
import threading
from collections import defaultdict, deque
from collections.abc import Sequence

import torch

from ... import errors
from .one_machine import OneMachineWire, Sharing


class LocalHub:
    """Where the stages of one process meet.

    Args:
        stage_count: how many there are.
        setup_seconds: how long they wait for one another at set-up, and for data of a stage that lives.
        device: where the tensors of all links lie.
    """

    def __init__(self, stage_count: int, setup_seconds: float = 1800.0, device: torch.device | str = "cpu") -> None:
        self.stage_count = stage_count
        self.setup_seconds = setup_seconds
        self.device = torch.device(device)
        self.texts: list[list[str]] = [[] for _ in range(stage_count)]
        """Stage -> what it brought, one text per round."""
        self.links: defaultdict[tuple[int, int, str], _Link] = defaultdict(_Link)
        """By source, target and name."""
        self.changed = threading.Condition()
        """Held by whoever uses texts and links."""

    def transport(self, stage: int) -> LocalTransport:
        return LocalTransport(self, stage)


class _Link:
    """What both ends of a link share."""

    def __init__(self) -> None:
        self.ends = [*zip(socket.socketpair(), socket.socketpair(), strict=True)]
        """Of the source and of the target: the sockets for messages and for data."""
        self.blocks: deque[torch.Tensor] = deque()
        """That the sending end does not know yet."""
        self.freed: deque[torch.Event | None] = deque()
        """When each of the places that were named may be written; None on the CPU: now."""
        self.landed: deque[torch.Event | None] = deque()
        """When each write has run."""


class LocalTransport:
    """One stage's way to the others of its ``LocalHub``."""

    name = "local"

    def __init__(self, hub: LocalHub, stage: int) -> None:
        self.stage = stage
        self.stage_count = hub.stage_count
        self.ranks = range(hub.stage_count)
        self._hub = hub

    def exchange(self, text: str) -> list[str]:
        texts, seconds = self._hub.texts, self._hub.setup_seconds
        with self._hub.changed:
            at = len(texts[self.stage])
            texts[self.stage].append(text)
            self._hub.changed.notify_all()
            if not self._hub.changed.wait_for(lambda: all(len(own) > at for own in texts), seconds):
                what, missing = errors.pipeline_of(self.ranks), [n for n, own in enumerate(texts) if len(own) <= at]
                cause = errors.did_not_come(missing)
                raise errors.PeerLost(errors.ranks_missing_at_setup(self.stage, what, seconds, cause))
            return [own[at] for own in texts]

    def break_off(self) -> None:
        pass  # the other stages are threads of this process

    def wire(self, source: int, target: int, name: str, sizes_bytes: Sequence[int] = ()) -> OneMachineWire | None:
        if self.stage not in (source, target):
            return None
        with self._hub.changed:
            link = self._hub.links[source, target, name]
        messages, data = link.ends[self.stage == target]
        return OneMachineWire(messages, data, InProcess(link, self._hub.device), self._hub.setup_seconds)

    def close(self) -> None:
        pass


class InProcess(Sharing):
    """One end's way to landing memory whose other end is a thread of this process: events go from end to end."""

    def __init__(self, link: _Link, device: torch.device) -> None:
        self._link = link
        self._device = device
        self._stream = None if device.type == "cpu" else torch.Stream(device)
        """Where this end writes."""
        self._landed_count = 0

    def make(self, num_bytes: int) -> torch.Tensor:
        with torch.inference_mode(False), torch.no_grad():
            if self._stream is None:
                # Of its own pages, since the CPU allocator aligns to 64 bytes only.
                tensor = torch.frombuffer(mmap.mmap(-1, max(num_bytes, 1)), dtype=torch.uint8)
            else:
                tensor = torch.zeros(max(num_bytes, 1), dtype=torch.uint8, device=self._device)
                torch.accelerator.current_stream(self._device).synchronize()
        self._link.blocks.append(tensor)
        return tensor

    def take(self) -> torch.Tensor:
        return self._link.blocks.popleft()

    def free(self) -> None:
        self._link.freed.append(self._reached())

    def ready(self, is_kept: bool) -> torch.Event | None:
        return self._reached()

    def _reached(self) -> torch.Event | None:
        """When what was enqueued on the current stream has run."""
        return None if self._stream is None else torch.accelerator.current_stream(self._device).record_event()

    def write(
        self, ready: torch.Event | None, writes: Sequence[tuple[torch.Tensor, int, torch.Tensor]]
    ) -> torch.Event | None:
        freed = self._link.freed.popleft()
        stream = contextlib.nullcontext() if self._stream is None else self._stream
        with stream, torch.inference_mode(False), torch.no_grad():
            self.after(ready)
            self.after(freed)
            for block, offset, tensor in writes:
                flat = tensor.view(-1).view(torch.uint8)
                block[offset : offset + tensor.nbytes].copy_(flat, non_blocking=True)
            written = self._reached()
        self._link.landed.append(written)
        return written

    def after(self, written: torch.Event | None) -> None:
        if written is not None:
            torch.accelerator.current_stream(self._device).wait_event(written)

    def after_landing(self, count: int) -> None:
        while self._landed_count < count:
            self.after(self._link.landed.popleft())
            self._landed_count += 1

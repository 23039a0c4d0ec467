"""Stages in processes of one machine: the sender writes into the receiver's landing memory itself.

Note [one machine]
A link is three socket pairs and the landing memory of its receiving end, which both processes can reach. The receiver
names the places where tensors shall land, as soon as they are free; the sender copies there and says so. So a tensor is
moved once, by the process that made it, and no buffer lies in between. Sockets only carry what fits in a line: they
wake the other process in microseconds, and a process that dies hangs up at once, whatever killed it.

- messages: the headers, both ways.
- data: to the sender one ``_PLACE`` per tensor, in the order of the receives, which may be named before anything is
  announced; to the receiver one byte per transfer, unless streams wait for it.
- memory: what the sender needs to reach landing memory, in the order in which that was made; places refer to it by its
  number. How memory is reached is for ``Sharing`` to know.

All ranks meet over ``torch.distributed``, over which links between machines go: see ``choosing.py``.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from ... import errors
from .base import MESSAGE_BYTES, Pending
from .ending import Ending, wait_for
from .sockets import Line, Listener, connected
from .torch_distributed import P2P

_PLACE = struct.Struct("<QQQ")
"""Number of the landing memory, offset in it, bytes that have room there."""
_LANDED = b"\x01"
_SOCKETS_PER_LINK = 3
_CLOSING_SECONDS = 1.0
_RELEASING_SECONDS = 5.0


class Sharing(ABC):
    """One end's way to the landing memory of a link: flat uint8 tensors, over memory that both ends reach.

    On an accelerator nothing here waits: what must come after something else is enqueued after it. What does nothing
    here is for accelerators only: on the CPU, everything has run.
    """

    streams_wait = False
    """Whether ``after_landing`` may be called before the other end has written, so that no host waits for it."""

    @abstractmethod
    def make(self, num_bytes: int) -> torch.Tensor:
        """At the receiving end: new memory of zeros, of which the other end is notified."""

    @abstractmethod
    def take(self) -> torch.Tensor:
        """At the sending end: the next memory that the other end made."""

    @abstractmethod
    def write(self, ready: Any, writes: Sequence[tuple[torch.Tensor, int, torch.Tensor]]) -> Any:
        """At the sending end: write each tensor to its offset, once that is free; the end of it, for ``after``."""

    def ready(self, is_kept: bool) -> Any:
        """At the sending end: when the current stream has written what is to be sent, for ``write``.

        Args:
            is_kept: whether this may be asked for the next tensors before those are written.
        """
        return None

    def after(self, written: Any) -> None:  # noqa: B027
        """At the sending end: what the current stream enqueues from now on comes after that write."""

    def free(self) -> None:  # noqa: B027
        """At the receiving end: places may be written once what the current stream has enqueued has run."""

    def after_landing(self, count: int) -> None:  # noqa: B027
        """At the receiving end: like ``after``, for the first ``count`` writes."""

    def finish(self, longest_seconds: float) -> None:  # noqa: B027
        """Return once everything enqueued here that concerns the other end has run.

        Raises:
            ConnectionError, TimeoutError: it will not, or takes longer.
        """

    def give_up(self) -> None:  # noqa: B027
        """End what is waited for on an accelerator, from any thread: the other end may be dead.

        What is computed then is worthless. No other rank takes for a result what is written from now on.
        """

    def close(self) -> None:  # noqa: B027
        """Forget the other end, before its memory is released; what is under way is given up."""


class KindOfSharing(Protocol):
    """How processes of one machine may share memory of one kind."""

    name: str

    def place(self) -> str:
        """Where the memory of this process is, in words for ``joins``; empty where nobody can share it."""

    def joins(self, one: str, other: str) -> bool:
        """Whether processes with memory at these places can share it."""

    def has_rival(self, one: str, other: str) -> bool:
        """Whether ``torch.distributed`` may be faster between such processes, so that both ways are to be measured."""

    def end(self, line: socket.socket, is_source: bool) -> Sharing:
        """One end of a link, which has ``line`` for itself; both ends are made at the same time."""


Connect = Callable[[float], "OneMachineWire"]
"""Makes this rank's end of a link, within so many seconds."""


class OneMachine:
    """One rank's way to the others of its pipeline, over the memory of the machine.

    Args:
        p2p: how ranks meet.
        kind: how memory is shared.
    """

    def __init__(self, p2p: P2P, kind: KindOfSharing) -> None:
        self.name = kind.name
        self.stage = p2p.stage
        self.stage_count = p2p.stage_count
        self.ranks: Sequence[int] = p2p.ranks
        self.exchange = p2p.exchange
        self._p2p = p2p
        self._kind = kind
        self._places: list[str] | None = None
        """Stage -> where its memory is, once all have met."""

    def wire(self, source: int, target: int, name: str, sizes_bytes: Sequence[int] = ()) -> OneMachineWire | None:
        ends = self.ranks[source], self.ranks[target]
        if not self.can_share(source, target):
            found = [*zip(ends, self._places_of(source, target), strict=True)]
            raise errors.ConfigError(errors.ranks_share_no_memory(self.name, found))
        seconds = self._p2p.setup_seconds
        with self.meeting(source, target) as connect:
            try:
                return connect and connect(seconds)
            except OSError as error:
                what, own = f"{name} from rank {ends[0]} to rank {ends[1]}", self.ranks[self.stage]
                raise errors.PeerLost(errors.ranks_missing_at_setup(own, what, seconds, error)) from error

    @contextlib.contextmanager
    def meeting(self, source: int, target: int) -> Iterator[Connect | None]:
        """Where the ends of a link find one another; None on ranks that have none. Every rank calls it."""
        listener = Listener() if self.stage == target else None
        with contextlib.nullcontext() if listener is None else contextlib.closing(listener):
            # Once all know the address, the listener is there.
            address = self.exchange("" if listener is None else listener.address)[target]
            yield partial(self._connect, listener, address) if self.stage in (source, target) else None

    def _connect(self, listener: Listener | None, address: str, seconds: float) -> OneMachineWire:
        """Raises OSError where the other end does not come, and whatever the device raises."""
        count = _SOCKETS_PER_LINK
        ends = connected(address, count, seconds) if listener is None else listener.accepted(count, seconds)
        messages, data, memory = ends
        memory.settimeout(seconds)
        try:
            return OneMachineWire(messages, data, self._kind.end(memory, listener is None), seconds)
        except BaseException:
            for end in ends:  # the other end must not wait for this one
                end.close()
            raise

    def can_share(self, source: int, target: int) -> bool:
        """Whether both ends of a link can share memory; every rank calls it."""
        one, other = self._places_of(source, target)
        return one != "" != other and self._kind.joins(one, other)

    def has_rival(self, source: int, target: int) -> bool:
        """Whether another way may be faster, where memory can be shared."""
        return self._kind.has_rival(*self._places_of(source, target))

    def _places_of(self, source: int, target: int) -> tuple[str, str]:
        if self._places is None:
            self._places = self.exchange(self._kind.place())
        return self._places[source], self._places[target]

    def break_off(self) -> None:
        self._p2p.break_off()

    def close(self) -> None:
        self._p2p.close()


def machine() -> str:
    """Equal for processes that can find one another's sockets; empty where that is not known."""
    if sys.platform != "linux":
        return ""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/net').st_ino}"  # the names of sockets belong to a network namespace
    except OSError:
        return ""


class OneMachineWire:
    """One end of a link; see Note [one machine].

    Args:
        messages, data: this end of two socket pairs.
        sharing: this end's way to the landing memory; the wire closes it.
        longest_seconds: how long the other end may take for anything but a message.
    """

    receives_take_the_device = False

    def __init__(self, messages: socket.socket, data: socket.socket, sharing: Sharing, longest_seconds: float) -> None:
        self._messages = Line(messages, longest_seconds)
        self._data = Line(data, longest_seconds)
        self._sharing = sharing
        self._longest_seconds = longest_seconds
        self._blocks: list[torch.Tensor] = []
        """Of the receiving end; at the sending end those that places have named so far."""
        # At the receiving end:
        self._offered: deque[list[int]] = deque()
        """Addresses of the places that were named before ``receive`` was called for them."""
        self._awaited_count = 0
        self._landed_count = 0
        # At the sending end:
        self._waiting: deque[_Sending] = deque()
        """What is sent before its places are known, in order."""
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._writer: threading.Thread | None = None
        self._is_broken = False

    # -------------------------------------------------------------------------------- messages

    def tell(self, message: bytes) -> None:
        self._messages.send(message)

    def flush(self, timeout_seconds: float) -> None:
        self._messages.wait_for_room(timeout_seconds)

    def hear(self, timeout_seconds: float) -> bytes:
        return self._messages.receive(MESSAGE_BYTES, timeout_seconds)

    # ----------------------------------------------------------------------------- receiving end

    def landing_memory(self, num_bytes: int) -> torch.Tensor:
        block = self._sharing.make(num_bytes)
        self._blocks.append(block)
        return block

    def offer(self, views: Sequence[torch.Tensor]) -> bool:
        self._name_places(views)
        self._offered.append([view.data_ptr() for view in views])
        return True

    def receive(self, views: Sequence[torch.Tensor]) -> Pending:
        if not self._offered:
            self._name_places(views)
        elif self._offered.popleft() != [view.data_ptr() for view in views]:
            raise ValueError(errors.OFFERED_OTHER_PLACES)
        self._awaited_count += 1
        return Pending(partial(self._wait_until_landed, self._awaited_count))

    def _name_places(self, views: Sequence[torch.Tensor]) -> None:
        places = b"".join([self._place(view) for view in views])
        self._sharing.free()
        self._data.send(places)

    def _place(self, view: torch.Tensor) -> bytes:
        start = view.data_ptr()
        for number, block in enumerate(self._blocks):
            offset = start - block.data_ptr()
            if 0 <= offset <= block.nbytes - view.nbytes:
                return _PLACE.pack(number, offset, view.nbytes)
        raise ValueError(errors.not_in_landing_memory(tuple(view.shape)))

    def _wait_until_landed(self, count: int) -> None:
        if self._sharing.streams_wait:
            if self._is_broken:
                raise ConnectionError("the link was closed")
        else:
            while self._landed_count < count:
                self._landed_count += len(self._data.receive_some(self._longest_seconds))
        self._sharing.after_landing(count)

    # ------------------------------------------------------------------------------- sending end

    def send(self, tensors: Sequence[torch.Tensor]) -> Pending:
        sending = _Sending(tensors)
        with self._lock:
            if self._is_broken:
                raise ConnectionError("the link was closed")
            # As a rule the places were named while the tensors were computed.
            places = None if self._waiting else self._data.receive_at_once(sending.places_bytes)
            sending.ready = self._sharing.ready(is_kept=places is None)
            if places is not None:
                self._write(sending, places)
            else:
                self._waiting.append(sending)
                if self._writer is None:
                    self._writer = threading.Thread(target=self._write_late, name="handoff writer", daemon=True)
                    self._writer.start()
                self._changed.notify_all()
        is_left_to_do = self._sharing.streams_wait and not sending.is_done
        enqueued = partial(self._wait_until_done, sending) if is_left_to_do else None
        return Pending(partial(self._wait_until_written, sending), enqueued)

    def _write_late(self) -> None:
        """Writes what was sent before its places were known."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_broken)
                if not self._waiting:
                    return
                sending = self._waiting[0]
            try:
                self._write(sending, self._data.receive(sending.places_bytes, self._longest_seconds))
            except Exception as error:  # raised by wait(), in the thread of the stage
                sending.error = error
            with self._changed:
                self._waiting.popleft()
                self._changed.notify_all()

    def _write(self, sending: _Sending, places: bytes) -> None:
        writes = []
        for tensor, (number, offset, num_bytes) in zip(sending.tensors, _PLACE.iter_unpack(places), strict=True):
            while len(self._blocks) <= number:
                self._blocks.append(self._sharing.take())
            block = self._blocks[number]
            if num_bytes < tensor.nbytes or offset + num_bytes > block.nbytes:
                raise ConnectionError(errors.place_differs(offset, num_bytes, block.nbytes, tensor.nbytes))
            writes.append((block, offset, tensor))
        sending.written = self._sharing.write(sending.ready, writes)
        if not self._sharing.streams_wait:
            self._data.send(_LANDED)
        sending.is_done = True

    def _wait_until_written(self, sending: _Sending) -> None:
        self._wait_until_done(sending)
        self._sharing.after(sending.written)

    def _wait_until_done(self, sending: _Sending) -> None:
        if not sending.is_done:
            with self._changed:
                ended = self._changed.wait_for(lambda: sending.is_done or sending.error, self._longest_seconds)
            if sending.error is not None:
                raise sending.error
            if not ended:
                raise TimeoutError

    # ------------------------------------------------------------------------------------ ending

    def finish(self) -> None:
        self._sharing.finish(self._longest_seconds)

    def break_data(self) -> None:
        self._hang_up()
        self._sharing.give_up()

    def _hang_up(self) -> None:
        self._data.hang_up()
        with self._changed:
            self._is_broken = True
            self._changed.notify_all()

    def break_control(self) -> None:
        self._messages.hang_up()

    def close(self) -> None:
        self.break_control()
        self._hang_up()
        if self._writer is not None:
            self._writer.join(_CLOSING_SECONDS)
        self._messages.close()
        self._data.close()
        self._sharing.close()
        if self._sharing.streams_wait:
            # Letting go of what another process shares waits for a stream.
            wait_for([Ending("memory of another process", self._blocks)], _RELEASING_SECONDS)
        self._blocks.clear()
        self._waiting.clear()


@dataclass(eq=False)
class _Sending:
    """Tensors that are sent; they are kept, and must not change, until they were written to where they land."""

    tensors: Sequence[torch.Tensor]
    ready: Any = None
    written: Any = None
    is_done: bool = False
    error: Exception | None = None

    @property
    def places_bytes(self) -> int:
        return _PLACE.size * len(self.tensors)

"""Stages in processes of one Linux machine: the sender writes into the receiver's landing memory itself.

Note [one machine]
A link is three socket pairs and the landing memory of its receiving end, which both processes map. The receiver names
the places where tensors shall land, as soon as they are free; the sender copies there and says so. So a tensor is moved
once, by the process that has it in its cache, and no buffer lies in between. Sockets only carry what fits in a line:
they wake the other process in microseconds, and a process that dies hangs up at once, whatever killed it.

- messages: the headers, both ways.
- data: to the sender one ``_PLACE`` per tensor, in the order of the receives; to the receiver one byte per transfer.
- memory: descriptors of landing memory, in the order in which it was made; places refer to it by its number.

Hops between machines, of which one pipeline may have both kinds, go over ``torch.distributed``, which all ranks also
meet with.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import secrets
import select
import socket
import struct
import sys
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import errors
from ..handoff.header import HEADER_BYTES
from ..handoff.p2p import P2P, P2PWire

_PLACE = struct.Struct("<QQQ")
"""Number of the landing memory, offset in it, bytes."""
_SIZE = struct.Struct("<Q")
_LANDED = b"\x01"
_TIMEVAL = struct.Struct("@ll")
_SOCKETS_PER_LINK = 3
_CLOSING_SECONDS = 1.0
_INTRODUCTION_SECONDS = 5.0
"""How long somebody who connects may take to show the key."""


class SharedMemory:
    """One rank's way to the others of its pipeline, over the memory of the machine where both ends are on one.

    Args:
        p2p: how ranks meet, and their way to other machines. Its tensors lie on the CPU.
        is_required: whether a hop between two machines is an error.
    """

    def __init__(self, p2p: P2P, is_required: bool = False) -> None:
        self.name = "shared_memory" if is_required else "auto"
        self.stage = p2p.stage
        self.stage_count = p2p.stage_count
        self._p2p = p2p
        self._is_required = is_required
        self._machines: list[str] | None = None
        """Rank -> the machine that it is on, once all have met."""

    @property
    def ranks(self) -> Sequence[int]:
        return self._p2p.ranks

    def exchange(self, text: str) -> list[str]:
        return self._p2p.exchange(text)

    def wire(self, source: int, target: int, name: str) -> SharedMemoryWire | P2PWire | None:
        if self._machines is None:
            self._machines = self._p2p.texts_of_all_ranks(_machine())
        if not self._are_on_one_machine(source, target):
            if self._is_required:
                found = [(rank, self._machines[rank]) for rank in (self.ranks[source], self.ranks[target])]
                raise errors.ConfigError(errors.ranks_on_two_machines(found))
            return self._p2p.wire(source, target, name)
        listener = _Listener() if self.stage == target else None
        with contextlib.nullcontext() if listener is None else listener:
            # Once all know the address, the listener is there.
            address = self.exchange("" if listener is None else listener.address)[target]
            if self.stage not in (source, target):
                return None
            seconds = self._p2p.setup_seconds
            try:
                ends = _connected(address, seconds) if listener is None else listener.accepted(seconds)
            except OSError as error:
                what = f"{name} from stage {source} to stage {target}"
                raise errors.PeerLost(errors.ranks_missing_at_setup(self.stage, what, seconds, error)) from error
        return SharedMemoryWire(ends, self.stage == source, seconds)

    def _are_on_one_machine(self, source: int, target: int) -> bool:
        # In all pipelines alike: every rank of the world takes part when one of them has a link over torch.distributed.
        assert self._machines is not None
        pairs = [(self._machines[ranks[source]], self._machines[ranks[target]]) for ranks in self._p2p.pipelines]
        return all(one == other != "" for one, other in pairs)

    def close(self) -> None:
        self._p2p.close()


def is_possible() -> bool:
    """Whether processes of this system can share memory in the way of this module."""
    return sys.platform == "linux" and hasattr(os, "memfd_create") and hasattr(socket, "send_fds")


def _machine() -> str:
    """Equal for processes that reach one another; empty where that cannot be told."""
    if not is_possible():
        return ""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/net').st_ino}"  # the names of sockets belong to a network namespace
    except OSError:
        return ""


# ---------------------------------------------------------------------------------------- meeting


class _Listener:
    """Where the sending end of one link finds the receiving one."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(16)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        name = f"\0pp_piecewise {secrets.token_hex(16)}"  # in no file system, and gone with the process
        self._socket.bind(name)
        self._socket.listen()
        self.address = json.dumps([name, self._key.hex()])

    def accepted(self, timeout_seconds: float) -> list[socket.socket]:
        """The ends of those who know the key, whose names everybody on the machine can read."""
        found: dict[int, socket.socket] = {}
        self._socket.settimeout(timeout_seconds)
        while len(found) < _SOCKETS_PER_LINK:
            end, _ = self._socket.accept()
            end.settimeout(min(_INTRODUCTION_SECONDS, timeout_seconds))
            said = b""
            with contextlib.suppress(OSError):
                said = end.recv(len(self._key) + 1)  # sent in one call, so it comes as a whole
            if len(said) == len(self._key) + 1 and secrets.compare_digest(said[:-1], self._key):
                found[said[-1]] = end
            else:
                end.close()
        return [found[number] for number in range(_SOCKETS_PER_LINK)]

    def __enter__(self) -> _Listener:
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()


def _connected(address: str, timeout_seconds: float) -> list[socket.socket]:
    name, key = json.loads(address)
    ends = []
    for number in range(_SOCKETS_PER_LINK):
        end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        end.settimeout(timeout_seconds)
        end.connect(name)
        end.sendall(bytes.fromhex(key) + bytes([number]))
        ends.append(end)
    return ends


# --------------------------------------------------------------------------------------- one link


class SharedMemoryWire:
    """One end of a link between two processes; see Note [one machine]."""

    def __init__(self, ends: Sequence[socket.socket], is_source: bool, longest_seconds: float) -> None:
        messages, data, memory = ends
        self._messages = _Line(messages, longest_seconds)
        self._data = _Line(data, longest_seconds)
        self._memory = memory
        self._memory.settimeout(longest_seconds)
        self._longest_seconds = longest_seconds
        self._blocks: list[_Block] = []
        """Of the receiving end; at the sending end those that places have named so far."""
        # At the receiving end:
        self._awaited_count = 0
        self._landed_count = 0
        # At the sending end:
        self._waiting: deque[_Sending] = deque()
        """What is sent before its places are known, in order."""
        self._changed = threading.Condition()
        self._writer: threading.Thread | None = None
        self._is_broken = False

    # -------------------------------------------------------------------------------- messages

    def tell(self, message: bytes) -> None:
        self._messages.send(message)

    def flush(self, timeout_seconds: float) -> None:
        self._messages.wait_for_room(timeout_seconds)

    def hear(self, timeout_seconds: float) -> bytes:
        return self._messages.receive(HEADER_BYTES, timeout_seconds)

    # ----------------------------------------------------------------------------- receiving end

    def landing_memory(self, num_bytes: int) -> torch.Tensor:
        block = _Block.made(num_bytes)
        try:
            socket.send_fds(self._memory, [_SIZE.pack(len(block.memory))], [block.descriptor])
        except OSError as error:
            raise _connection_error(error) from error
        finally:
            block.close_descriptor()
        self._blocks.append(block)
        return block.tensor

    def receive(self, views: Sequence[torch.Tensor]) -> _Receiving:
        self._data.send(b"".join([self._place(view) for view in views]))
        self._awaited_count += 1
        return _Receiving(self, self._awaited_count)

    def _place(self, view: torch.Tensor) -> bytes:
        start = view.data_ptr()
        for number, block in enumerate(self._blocks):
            offset = start - block.address
            if 0 <= offset <= len(block.memory) - view.nbytes:
                return _PLACE.pack(number, offset, view.nbytes)
        raise ValueError(errors.not_in_landing_memory(tuple(view.shape)))

    def wait_until_landed(self, count: int) -> None:
        while self._landed_count < count:
            self._landed_count += len(self._data.receive_some(self._longest_seconds))

    # ------------------------------------------------------------------------------- sending end

    def send(self, tensors: Sequence[torch.Tensor]) -> _Sending:
        sending = _Sending(self, tensors)
        with self._changed:
            if self._is_broken:
                raise ConnectionError("the link was closed")
            # As a rule the places were named while the tensors were computed.
            places = None if self._waiting else self._data.receive_at_once(sending.places_bytes)
            if places is not None:
                self._write(sending, places)
                return sending
            self._waiting.append(sending)
            if self._writer is None:
                self._writer = threading.Thread(target=self._write_late, name="handoff writer", daemon=True)
                self._writer.start()
            self._changed.notify_all()
        return sending

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
        for tensor, (number, offset, num_bytes) in zip(sending.tensors, _PLACE.iter_unpack(places), strict=True):
            while len(self._blocks) <= number:
                self._blocks.append(_Block.taken(self._memory))
            block = self._blocks[number]
            if num_bytes != tensor.nbytes or offset + num_bytes > len(block.memory):
                raise ConnectionError(errors.place_differs(offset, num_bytes, len(block.memory), tensor.nbytes))
            ctypes.memmove(block.address + offset, tensor.data_ptr(), num_bytes)
        self._data.send(_LANDED)
        sending.is_done = True

    def wait_until_written(self, sending: _Sending) -> None:
        with self._changed:
            ended = self._changed.wait_for(lambda: sending.is_done or sending.error, self._longest_seconds)
        if sending.error is not None:
            raise sending.error
        if not ended:
            raise TimeoutError

    # ------------------------------------------------------------------------------------ ending

    def break_data(self) -> None:
        self._data.hang_up()
        with self._changed:
            self._is_broken = True
            self._changed.notify_all()

    def break_control(self) -> None:
        self._messages.hang_up()

    def close(self) -> None:
        self.break_control()
        self.break_data()
        if self._writer is not None:
            self._writer.join(_CLOSING_SECONDS)
        self._messages.close()
        self._data.close()
        self._memory.close()
        self._blocks.clear()


class _Sending:
    """Tensors that are sent; they are kept, and must not change, until they were written to where they land."""

    def __init__(self, wire: SharedMemoryWire, tensors: Sequence[torch.Tensor]) -> None:
        self.tensors = tensors
        self.places_bytes = _PLACE.size * len(tensors)
        self.is_done = False
        self.error: Exception | None = None
        self._wire = wire

    def wait(self) -> None:
        if not self.is_done:
            self._wire.wait_until_written(self)


class _Receiving:
    """Places that the sender was told of, the ``number``-th of their link."""

    def __init__(self, wire: SharedMemoryWire, number: int) -> None:
        self._wire = wire
        self._number = number

    def wait(self) -> None:
        self._wire.wait_until_landed(self._number)


class _Block:
    """Memory that two processes map."""

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        self.descriptor = descriptor
        self.memory = mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        with torch.inference_mode(False), torch.no_grad():
            self.tensor = torch.frombuffer(self.memory, dtype=torch.uint8)
        self.address = self.tensor.data_ptr()

    @classmethod
    def made(cls, num_bytes: int) -> _Block:
        """New memory of zeros, in pages of its own."""
        padded = -(-max(num_bytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        descriptor = os.memfd_create("pp_piecewise landing memory", os.MFD_CLOEXEC)
        os.posix_fallocate(descriptor, 0, padded)  # or an error: a page that is missing later kills the process
        return cls(descriptor, padded)

    @classmethod
    def taken(cls, line: socket.socket) -> _Block:
        """Memory of the other process, which has sent its descriptor."""
        size, descriptors, _, _ = socket.recv_fds(line, _SIZE.size, 1)
        if not descriptors:
            raise ConnectionError("the other end hung up")
        block = cls(descriptors[0], *_SIZE.unpack(size))
        block.close_descriptor()
        return block

    def close_descriptor(self) -> None:
        os.close(self.descriptor)  # the mapping has its own


class _Line:
    """A connected socket, on which both sides know how much is sent. It blocks; what goes wrong is a ConnectionError.

    Each message is sent in one call and is small, so that it arrives as a whole.
    """

    def __init__(self, connected: socket.socket, longest_seconds: float) -> None:
        self._socket = connected
        connected.setblocking(True)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(longest_seconds))
        self._timeout_seconds = 0.0  # the kernel's "for ever"

    def send(self, message: bytes) -> None:
        try:
            self._socket.sendall(message)
        except OSError as error:
            raise _connection_error(error) from error

    def receive(self, num_bytes: int, timeout_seconds: float) -> bytes:
        return self._receive(num_bytes, socket.MSG_WAITALL, num_bytes, timeout_seconds)

    def receive_some(self, timeout_seconds: float) -> bytes:
        """What has arrived, at least one byte."""
        return self._receive(64, 0, 1, timeout_seconds)

    def receive_at_once(self, num_bytes: int) -> bytes | None:
        """A message that has arrived; None if none has."""
        try:
            return self._receive(num_bytes, socket.MSG_DONTWAIT, num_bytes, self._timeout_seconds)
        except TimeoutError:
            return None

    def _receive(self, most_bytes: int, flags: int, least_bytes: int, timeout_seconds: float) -> bytes:
        try:
            if timeout_seconds != self._timeout_seconds:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(timeout_seconds))
                self._timeout_seconds = timeout_seconds
            message = self._socket.recv(most_bytes, flags)
        except OSError as error:
            raise _connection_error(error) from error
        if len(message) < least_bytes:
            raise ConnectionError("the other end hung up")
        return message

    def wait_for_room(self, timeout_seconds: float) -> None:
        """Return once a message can be sent without waiting."""
        poll = select.poll()
        try:
            poll.register(self._socket, select.POLLOUT)
            if not poll.poll(timeout_seconds * 1000):
                raise TimeoutError
        except (OSError, ValueError) as error:  # ValueError: it was closed
            raise _connection_error(error) from error

    def hang_up(self) -> None:
        """Ends what either side waits for, from any thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


def _timeval(seconds: float) -> bytes:
    whole = int(seconds)
    return _TIMEVAL.pack(whole, max(int((seconds - whole) * 1e6), 0 if whole else 1))


def _connection_error(error: Exception) -> Exception:
    if isinstance(error, BlockingIOError | TimeoutError):
        return TimeoutError()
    return error if isinstance(error, ConnectionError) else ConnectionError(str(error))

"""Sockets between two processes of one machine: how they find one another, and lines that carry short messages."""

from __future__ import annotations

import contextlib
import json
import secrets
import select
import socket
import struct

_TIMEVAL = struct.Struct("@ll")
_INTRODUCTION_SECONDS = 5.0
"""How long somebody who connects may take to show the key."""


class Listener:
    """Where the other end of one link finds this one."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(16)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        name = f"\0pp_piecewise {secrets.token_hex(16)}"  # in no file system, and gone with the process
        self._socket.bind(name)
        self._socket.listen()
        self.address = json.dumps([name, self._key.hex()])

    def accepted(self, count: int, timeout_seconds: float) -> list[socket.socket]:
        """The ends of those who know the key: names everybody on the machine can read."""
        found: dict[int, socket.socket] = {}
        self._socket.settimeout(timeout_seconds)
        while len(found) < count:
            end, _ = self._socket.accept()
            end.settimeout(min(_INTRODUCTION_SECONDS, timeout_seconds))
            said = b""
            with contextlib.suppress(OSError):
                said = end.recv(len(self._key) + 1)  # sent in one call, so it comes as a whole
            if len(said) == len(self._key) + 1 and secrets.compare_digest(said[:-1], self._key):
                found[said[-1]] = end
            else:
                end.close()
        return [found[number] for number in range(count)]

    def close(self) -> None:
        self._socket.close()


def connected(address: str, count: int, timeout_seconds: float) -> list[socket.socket]:
    name, key = json.loads(address)
    ends = []
    for number in range(count):
        end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        end.settimeout(timeout_seconds)
        end.connect(name)
        end.sendall(bytes.fromhex(key) + bytes([number]))
        ends.append(end)
    return ends


def receive_exactly(line: socket.socket, num_bytes: int) -> bytes:
    """So many bytes of a socket with a timeout. Raises ConnectionError or TimeoutError."""
    received = b""
    while len(received) < num_bytes:
        part = line.recv(num_bytes - len(received))
        if not part:
            raise ConnectionError("the other end hung up")
        received += part
    return received


class Line:
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
            raise connection_error(error) from error

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
            raise connection_error(error) from error
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
            raise connection_error(error) from error

    def hang_up(self) -> None:
        """Ends what either side waits for, from any thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


def _timeval(seconds: float) -> bytes:
    whole = int(seconds)
    return _TIMEVAL.pack(whole, max(int((seconds - whole) * 1e6), 0 if whole else 1))


def connection_error(error: Exception) -> Exception:
    if isinstance(error, BlockingIOError | TimeoutError):
        return TimeoutError()
    return error if isinstance(error, ConnectionError) else ConnectionError(str(error))

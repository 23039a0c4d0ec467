"""Memory on GPUs that processes of one machine share, by CUDA IPC: on one GPU, or between peers.

Note [counters of a link]
The host waits for nothing here: streams wait for counters in a page of host memory that both processes map. The
receiving end counts up ``free`` when what read its places has run, the sending end ``landed`` when it has written them,
and each waits for the number of the transfer. A stream that waits for another process must not wait for a dead one,
which events of CUDA IPC cannot promise: a process that was killed may leave its last event open for ever, and with it
every stream that waits for it [ran, driver 580]. A counter can be set by whoever waits, so ``give_up`` ends all waits.

Note [mapped on one's own GPU]
A sender opens landing memory as memory of its own GPU, wherever it lies, and so copies within what is one device to
PyTorch. A copy between two devices would record an event on the other one and wait for it there; that is work of a
second process on the receiver's GPU, and runs only when this GPU turns from its own work to it: a round of two stages
of 2.4 ms each took 7.0 ms so, and 5.0 ms without [ran, two H200].
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

import torch

from .one_machine import Sharing, machine
from .shared_memory import HostSharing
from .sockets import receive_exactly

_LENGTH = struct.Struct("<I")
_ALIGNMENT_BYTES = 256
_MAX_VIEWS = 4096
_LANDED, _FREE = 0, 128
"""Offsets of the counters in their page, on cache lines of their own."""
_CLOSING_SECONDS = 5.0
_POLL_SECONDS = 1e-3
_AHEAD = 1 << 30
"""How far ``give_up`` sets a counter ahead; counters wrap around, and a wait is for a distance."""


class DeviceMemory:
    """The kind of sharing for tensors on a CUDA device.

    Args:
        device: where this process has its tensors.
    """

    name = "cuda_ipc"

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)

    def place(self) -> str:
        own, where = self._device.index, machine()
        if not where:
            return ""
        reachable = [i for i in range(torch.cuda.device_count()) if i == own or _are_peers(i, own)]
        # PyTorch counts who uses shared memory in files there, so containers without a common one cannot share any.
        files = os.stat("/dev/shm").st_dev if os.path.isdir("/dev/shm") else -1
        return json.dumps({"machine": f"{where} {files}", "gpu": _uuid(own), "reaches": [*map(_uuid, reachable)]})

    def joins(self, one: str, other: str) -> bool:
        a, b = json.loads(one), json.loads(other)
        return a["machine"] == b["machine"] and a["gpu"] in b["reaches"] and b["gpu"] in a["reaches"]

    def end(self, line: socket.socket, is_source: bool) -> DeviceSharing:
        return DeviceSharing(line, is_source, self._device)


def _uuid(index: int) -> str:
    # The same GPU has other numbers in other processes, as CUDA_VISIBLE_DEVICES says.
    return str(torch.cuda.get_device_properties(index).uuid)


def _are_peers(one: int, other: int) -> bool:
    return torch.cuda.can_device_access_peer(one, other) and torch.cuda.can_device_access_peer(other, one)


class DeviceSharing(Sharing):
    """One end's way to the landing memory of a link; see Note [counters of a link].

    Args:
        line: handles of memory travel over it.
        is_source: whether this is the sending end.
        device: of this end's tensors.
    """

    def __init__(self, line: socket.socket, is_source: bool, device: torch.device) -> None:
        self._line = line
        self._device = device
        page = HostSharing(line)
        self._counters = page.take() if is_source else page.make(_FREE + 8)
        _register(self._counters)
        self._told, self._awaited = (_LANDED, _FREE) if is_source else (_FREE, _LANDED)
        self._told_count = self._awaited_count = 0
        self._stream = torch.cuda.Stream(device)
        """Where this end writes, and counts."""
        self._views: dict[tuple[Any, ...], torch.Tensor] = {}

    def make(self, num_bytes: int) -> torch.Tensor:
        padded = -(-max(num_bytes, 1) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        with torch.inference_mode(False), torch.no_grad():
            tensor = torch.zeros(padded, dtype=torch.uint8, device=self._device)
        torch.accelerator.synchronize(self._device)
        from ...utils import torch_compat  # imports Dynamo, for which the choice of a transport need not wait

        _send(self._line, json.dumps(torch_compat.shared_cuda_memory(tensor)).encode())
        return tensor

    def take(self) -> torch.Tensor:
        from ...utils import torch_compat

        return torch_compat.opened_cuda_memory(json.loads(_received(self._line)), self._device)

    def free(self) -> None:
        # On one stream, so that the counter only goes up.
        self._stream.wait_event(torch.cuda.current_stream(self._device).record_event())
        self._count_up()

    def ready(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self._device).record_event()

    def write(
        self, ready: torch.cuda.Event, writes: Sequence[tuple[torch.Tensor, int, torch.Tensor]]
    ) -> torch.cuda.Event:
        self._awaited_count += 1
        with torch.cuda.stream(self._stream), torch.inference_mode(False), torch.no_grad():
            self._stream.wait_event(ready)
            self._wait_for(self._awaited_count, self._stream)
            for block, offset, tensor in writes:
                self._view(block, offset, tensor).copy_(tensor, non_blocking=True)
            self._count_up()
            return self._stream.record_event()

    def _count_up(self) -> None:
        self._told_count += 1
        address = self._counters.data_ptr() + self._told
        _call_driver("cuStreamWriteValue32_v2", self._stream.cuda_stream, address, self._told_count & 0xFFFFFFFF, 0)

    def _wait_for(self, count: int, stream: torch.cuda.Stream) -> None:
        address = self._counters.data_ptr() + self._awaited
        _call_driver("cuStreamWaitValue32_v2", stream.cuda_stream, address, count & 0xFFFFFFFF, 0)  # 0: or more

    def _view(self, block: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
        key = (block.data_ptr(), offset, like.shape, like.dtype)
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            flat = block[offset : offset + like.nbytes]
            view = self._views[key] = flat.view(like.dtype).view(like.shape)
        return view

    def after(self, written: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(written)

    def after_landing(self, count: int) -> None:
        self._awaited_count = count
        self._wait_for(count, torch.cuda.current_stream(self._device))

    def give_up(self) -> None:
        ahead = ctypes.c_uint32(self._awaited_count + _AHEAD)
        ctypes.memmove(self._counters.data_ptr() + self._awaited, ctypes.byref(ahead), 4)

    def close(self) -> None:
        self._line.close()
        self._views.clear()
        streams = (self._stream, torch.cuda.current_stream(self._device))
        deadline = time.monotonic() + _CLOSING_SECONDS
        with contextlib.suppress(RuntimeError):
            # What a killed process had enqueued may still set a counter back.
            while not all(stream.query() for stream in streams) and time.monotonic() < deadline:
                self.give_up()
                time.sleep(_POLL_SECONDS)
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._counters.data_ptr()))


def _register(page: torch.Tensor) -> None:
    """Let GPUs reach a page of host memory, under its own address."""
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(page.data_ptr(), page.nbytes, 0))


@functools.cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    for name in ("cuStreamWriteValue32_v2", "cuStreamWaitValue32_v2"):
        getattr(driver, name).argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint)
    return driver


def _call_driver(name: str, stream: int, address: int, value: int, flags: int) -> None:
    """An operation on a stream that PyTorch has no call for."""
    if error := getattr(_driver(), name)(stream, address, value, flags):
        raise RuntimeError(f"{name} failed with CUDA driver error {error}")


def _send(line: socket.socket, message: bytes) -> None:
    line.sendall(_LENGTH.pack(len(message)) + message)


def _received(line: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(receive_exactly(line, _LENGTH.size))
    return receive_exactly(line, length)

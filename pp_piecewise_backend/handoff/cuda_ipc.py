"""Memory on GPUs that processes of one machine share: CUDA IPC memory and events, on one GPU or between peers.

Note [events of a link]
Each end has one event that the other can wait for: the receiving one records it when places are free, the sending one
when it has enqueued what it writes there. A message on the link's socket goes ahead of each wait, so the record is
there by then. An event may be recorded again before the other end has waited for it; that end then waits for more than
it needs, and never for itself: a place is named only when its readers are enqueued, and nothing that is enqueued before
a place is named depends on what will land there.

Waiting on a stream of one GPU for an event that another process has on another GPU ends the process [ran, torch 2.11,
driver 580]. So it is waited for on a stream of that GPU, and an event of this process leads on from there.

Each process holds a context on the GPU of the other end, which takes some hundred MB there if it is another GPU.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

import torch

from .. import _compat
from ..handoff.one_machine import SharedBlock, machine
from ..handoff.sockets import receive_exactly

_LENGTH = struct.Struct("<I")
_ALIGNMENT_BYTES = 256
_MAX_VIEWS = 4096


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

    def end(self, line: socket.socket, is_source: bool, peer_place: str) -> DeviceSharing:
        gpu = json.loads(peer_place)["gpu"]
        peer = next(i for i in range(torch.cuda.device_count()) if _uuid(i) == gpu)
        return DeviceSharing(line, self._device, torch.device("cuda", peer))


def is_possible(device: torch.device) -> bool:
    """Whether processes of this system can share memory of that device in the way of this module."""
    return device.type == "cuda" and machine() != ""


def _uuid(index: int) -> str:
    # The same GPU has other numbers in other processes, as CUDA_VISIBLE_DEVICES says.
    return str(torch.cuda.get_device_properties(index).uuid)


def _are_peers(one: int, other: int) -> bool:
    return torch.cuda.can_device_access_peer(one, other) and torch.cuda.can_device_access_peer(other, one)


class DeviceSharing:
    """One end's way to the landing memory of a link; see Note [events of a link].

    Args:
        line: handles of memory and events travel over it.
        device: of this end's tensors.
        peer_device: of the other end's, as this process numbers it.
    """

    def __init__(self, line: socket.socket, device: torch.device, peer_device: torch.device) -> None:
        self._line = line
        self._device = device
        self._peer_device = peer_device
        with torch.cuda.device(device):
            self._ours = torch.cuda.Event(interprocess=True)
            _send(line, self._ours.ipc_handle())
        self._theirs = torch.cuda.Event.from_ipc_handle(peer_device, _received(line))
        self._bridge = torch.cuda.Stream(peer_device) if peer_device != device else None
        """Where the event of another GPU is waited for."""
        self._stream = torch.cuda.Stream(device)
        """Where this end writes."""
        self._views: dict[tuple[Any, ...], torch.Tensor] = {}

    def make(self, num_bytes: int) -> SharedBlock:
        padded = -(-max(num_bytes, 1) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        with torch.inference_mode(False), torch.no_grad():
            tensor = torch.zeros(padded, dtype=torch.uint8, device=self._device)
        torch.accelerator.synchronize(self._device)
        _send(self._line, json.dumps(_compat.shared_cuda_memory(tensor)).encode())
        return SharedBlock(tensor, tensor.data_ptr(), padded)

    def take(self) -> SharedBlock:
        tensor = _compat.opened_cuda_memory(json.loads(_received(self._line)), self._peer_device)
        return SharedBlock(tensor, tensor.data_ptr(), tensor.numel())

    def free(self) -> None:
        self._ours.record(torch.cuda.current_stream(self._device))

    def ready(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self._device).record_event()

    def write(
        self, ready: torch.cuda.Event, writes: Sequence[tuple[SharedBlock, int, torch.Tensor]]
    ) -> torch.cuda.Event:
        with torch.cuda.stream(self._stream), torch.inference_mode(False), torch.no_grad():
            self._stream.wait_event(ready)
            self._wait_for_theirs(self._stream)
            for block, offset, tensor in writes:
                self._view(block, offset, tensor).copy_(tensor, non_blocking=True)
            self._ours.record(self._stream)
            return self._stream.record_event()

    def _view(self, block: SharedBlock, offset: int, like: torch.Tensor) -> torch.Tensor:
        key = (block.address, offset, like.shape, like.dtype)
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            flat = block.tensor[offset : offset + like.nbytes]
            view = self._views[key] = flat.view(like.dtype).view(like.shape)
        return view

    def after(self, written: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(written)

    def after_landing(self) -> None:
        self._wait_for_theirs(torch.cuda.current_stream(self._device))

    def _wait_for_theirs(self, stream: torch.cuda.Stream) -> None:
        if self._bridge is None:
            stream.wait_event(self._theirs)
        else:
            self._bridge.wait_event(self._theirs)
            stream.wait_event(self._bridge.record_event())

    def close(self) -> None:
        self._views.clear()


def _send(line: socket.socket, message: bytes) -> None:
    line.sendall(_LENGTH.pack(len(message)) + message)


def _received(line: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(receive_exactly(line, _LENGTH.size))
    return receive_exactly(line, length)

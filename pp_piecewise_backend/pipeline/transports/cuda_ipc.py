"""Memory on GPUs that processes of one machine share, by CUDA IPC: on one GPU, or between peers.

Note [mapped on one's own GPU]
A sender opens landing memory as memory of its own GPU, wherever it lies, and copies on a stream of its own. What
PyTorch calls a copy between two devices would record an event on the other one and wait for it there; that is work of a
second process on the receiver's GPU, and runs only when this GPU turns from its own work to it: a round of two stages
of 2.4 ms each took 7.0 ms so, and 5.0 ms without [ran, two H200].
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from ... import errors
from .one_machine import machine
from .sockets import receive_exactly
from .stream_sharing import StreamSharing, Word

_LENGTH = struct.Struct("<I")
_ALIGNMENT_BYTES = 256


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
        if not where or _driver() is None:
            return ""
        reachable = [i for i in range(torch.cuda.device_count()) if i == own or _are_peers(i, own)]
        # PyTorch counts who uses shared memory in files there, so containers without a common one cannot share any.
        files = os.stat("/dev/shm").st_dev if os.path.isdir("/dev/shm") else -1
        return json.dumps({"machine": f"{where} {files}", "gpu": _uuid(own), "reaches": [*map(_uuid, reachable)]})

    def joins(self, one: str, other: str) -> bool:
        a, b = json.loads(one), json.loads(other)
        return a["machine"] == b["machine"] and a["gpu"] in b["reaches"] and b["gpu"] in a["reaches"]

    def has_rival(self, one: str, other: str) -> bool:
        return bool(json.loads(one)["gpu"] != json.loads(other)["gpu"])  # NCCL refuses two ranks on one GPU

    def end(self, line: socket.socket, is_source: bool) -> DeviceSharing:
        return DeviceSharing(line, is_source, self._device)


def _uuid(index: int) -> str:
    # The same GPU has other numbers in other processes, as CUDA_VISIBLE_DEVICES says.
    return str(torch.cuda.get_device_properties(index).uuid)


def _are_peers(one: int, other: int) -> bool:
    return torch.cuda.can_device_access_peer(one, other) and torch.cuda.can_device_access_peer(other, one)


class DeviceSharing(StreamSharing):
    """One end's way to landing memory on GPUs.

    Args:
        line: handles of memory travel over it.
        is_source: whether this is the sending end.
        device: of this end's tensors.
    """

    def __init__(self, line: socket.socket, is_source: bool, device: torch.device) -> None:
        self._device = device
        super().__init__(line, is_source, CudaStreams(device))

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


class CudaStreams:
    """Streams of one GPU. Any thread may call, whichever GPU is its current one.

    Args:
        device: with its index.
    """

    def __init__(self, device: torch.device) -> None:
        from ...utils import torch_compat  # see DeviceSharing

        self._device = device
        self._raw_stream = torch_compat.current_raw_stream
        self._between = torch.cuda.Event()
        """Recorded again for each wait of one stream for another: what waits for it then is a point in time."""
        self._known: dict[int, torch.cuda.Stream] = {}
        """Handle -> stream, of those that were current: to make an object for one takes long."""

    def new(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)

    def current(self) -> torch.cuda.Stream:
        raw = self._raw_stream(self._device.index)
        stream = self._known.get(raw)
        if stream is None:
            stream = self._known[raw] = torch.cuda.current_stream(self._device)
        return stream

    def record(self, stream: torch.cuda.Stream, event: torch.cuda.Event | None = None) -> torch.cuda.Event:
        return stream.record_event(event)

    def wait_for_event(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        stream.wait_event(event)

    def wait_for_stream(self, stream: torch.cuda.Stream, other: torch.cuda.Stream) -> None:
        self._between.record(other)
        stream.wait_event(self._between)

    def wait_for_words(self, stream: torch.cuda.Stream, words: Sequence[Word]) -> None:
        self._call([_wait(stream.cuda_stream, word) for word in words])

    def write_word(self, stream: torch.cuda.Stream, word: Word) -> None:
        self._call([_write(stream.cuda_stream, word)])

    def copy(self, stream: torch.cuda.Stream, free: Word, copies: Sequence[tuple[int, int, int]], landed: Word) -> None:
        handle = stream.cuda_stream
        calls = [("cuMemcpyAsync", (*copy, handle)) for copy in copies]
        self._call([_wait(handle, free), *calls, _write(handle, landed)])

    def has_run(self, stream: torch.cuda.Stream) -> bool:
        return stream.query()

    def register(self, page: torch.Tensor) -> None:
        with torch.cuda.device(self._device):
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(page.data_ptr(), page.nbytes, 0))

    def unregister(self, page: torch.Tensor) -> None:
        with torch.cuda.device(self._device):
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(page.data_ptr()))

    def _call(self, calls: Sequence[_Call]) -> None:
        """Operations on a stream that PyTorch has no calls for."""
        functions, context = self._functions, self._context
        # This thread may have no context, or that of another GPU.
        if code := functions["cuCtxPushCurrent_v2"](context):
            self._fail("cuCtxPushCurrent_v2", code)
        for name, arguments in calls:
            if code := functions[name](*arguments):
                break
        functions["cuCtxPopCurrent_v2"](_POPPED)
        if code:
            self._fail(name, code)

    @functools.cached_property
    def _functions(self) -> dict[str, Any]:
        driver = _driver()
        assert driver is not None, "place() says that nothing can be shared"
        return {name: getattr(driver, name) for name in _FUNCTIONS}

    @functools.cached_property
    def _context(self) -> ctypes.c_void_p:
        """The one that PyTorch uses, too."""
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if code := self._functions["cuDeviceGet"](ctypes.byref(device), self._device.index):
            self._fail("cuDeviceGet", code)
        if code := self._functions["cuDevicePrimaryCtxRetain"](ctypes.byref(context), device):
            self._fail("cuDevicePrimaryCtxRetain", code)
        return context

    def _fail(self, name: str, code: int) -> NoReturn:
        text = ctypes.c_char_p()
        self._functions["cuGetErrorName"](code, ctypes.byref(text))
        raise RuntimeError(errors.driver_failed(name, str(self._device), code, (text.value or b"unknown").decode()))


_Call = tuple[str, tuple[int, ...]]
"""Name of a function of the driver, and what it is called with."""


def _wait(stream: int, word: Word) -> _Call:
    return "cuStreamWaitValue32_v2", (stream, *word, 0)  # 0: value or later


def _write(stream: int, word: Word) -> _Call:
    return "cuStreamWriteValue32_v2", (stream, *word, 0)  # 0: after all writes before it


_POPPED = ctypes.byref(ctypes.c_void_p())
"""Where a context that is taken off goes, of which nothing is read."""
_WORD = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint)
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuStreamWriteValue32_v2": _WORD,
    "cuStreamWaitValue32_v2": _WORD,
    "cuMemcpyAsync": (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p),
    "cuDeviceGet": (ctypes.c_void_p, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.c_void_p, ctypes.c_int),
    "cuCtxPushCurrent_v2": (ctypes.c_void_p,),
    "cuCtxPopCurrent_v2": (ctypes.c_void_p,),
    "cuGetErrorName": (ctypes.c_int, ctypes.c_void_p),
}


@functools.cache
def _driver() -> ctypes.CDLL | None:
    """None where the driver lacks what is needed, as before CUDA 11.7."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        for name, types in _FUNCTIONS.items():
            getattr(driver, name).argtypes = types
    except (OSError, AttributeError):
        return None
    return driver


def _send(line: socket.socket, message: bytes) -> None:
    line.sendall(_LENGTH.pack(len(message)) + message)


def _received(line: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(receive_exactly(line, _LENGTH.size))
    return receive_exactly(line, length)

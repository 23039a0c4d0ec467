"""Memory on the CPU that processes of one machine share: a file without a name, which both ends of a link map."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
import weakref
from collections.abc import Sequence

import torch

from .one_machine import Sharing, machine
from .sockets import connection_error

_SIZE = struct.Struct("<Q")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_FAILED = ctypes.c_void_p(-1).value


class HostMemory:
    """The kind of sharing for tensors on the CPU."""

    name = "shared_memory"

    def place(self) -> str:
        return machine() if hasattr(os, "memfd_create") and hasattr(socket, "send_fds") else ""

    def joins(self, one: str, other: str) -> bool:
        return one == other

    def has_rival(self, one: str, other: str) -> bool:
        return False  # gloo copies through sockets what is written once here

    def end(self, line: socket.socket, is_source: bool) -> HostSharing:
        return HostSharing(line)


class HostSharing(Sharing):
    """One end's way to the landing memory of a link: descriptors of memory files travel over ``line``."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line

    def make(self, num_bytes: int) -> torch.Tensor:
        padded = -(-max(num_bytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        descriptor = os.memfd_create("pp_piecewise landing memory", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, 0, padded)  # or an error: a page that is missing later kills the process
            block = _mapped(descriptor, padded)
            socket.send_fds(self._line, [_SIZE.pack(padded)], [descriptor])
        except OSError as error:
            raise connection_error(error) from error
        finally:
            os.close(descriptor)  # the mappings have their own
        return block

    def take(self) -> torch.Tensor:
        size, descriptors, _, _ = socket.recv_fds(self._line, _SIZE.size, 1)
        if not descriptors:
            raise ConnectionError("the other end hung up")
        try:
            return _mapped(descriptors[0], *_SIZE.unpack(size))
        finally:
            os.close(descriptors[0])

    def write(self, ready: None, writes: Sequence[tuple[torch.Tensor, int, torch.Tensor]]) -> None:
        for block, offset, tensor in writes:
            ctypes.memmove(block.data_ptr() + offset, tensor.data_ptr(), tensor.nbytes)

    def close(self) -> None:
        self._line.close()  # a mapping goes with its tensor


def _mapped(descriptor: int, num_bytes: int) -> torch.Tensor:
    # The class of the standard library keeps a descriptor for as long as anybody has a view of the memory.
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    address = _libc.mmap(None, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, 0)
    if address == _FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    memory = (ctypes.c_uint8 * num_bytes).from_address(address)
    weakref.finalize(memory, _libc.munmap, address, num_bytes).atexit = False
    with torch.inference_mode(False), torch.no_grad():
        return torch.frombuffer(memory, dtype=torch.uint8)

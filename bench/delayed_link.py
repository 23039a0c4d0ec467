"""A transport around another one, on whose links tensors take longer: a stand-in for a network of higher latency.

Only latency is added. However much is under way at once, each tensor arrives ``seconds`` after it left; neither the
sender nor its thread waits for that, and the receiver waits in ``wait()`` only. When a tensor leaves depends on the
network that is meant:

- ``waits_for_memory=True``: once it was sent *and* the receiver has named the memory where it shall land, as with
  zero-copy writes into the memory of the other machine. Memory that is named late delays the tensor.
- ``waits_for_memory=False``: once it was sent, as with buffers at the receiver that take the tensor until it is asked
  for. Memory that is named late costs nothing.

The time of sending travels as one more tensor of 8 bytes behind those of a micro-batch, by the monotonic clock, which
all processes of a Linux machine share. So both ends must run on one machine and be wrapped alike, the tensors must lie
on the CPU, and who observes ``irecv`` sees one more call. Headers are not delayed: they are told before their tensors
are sent, so the same delay would not let any tensor arrive later. ``wait()`` sleeps, and may wake up 0.1 ms late.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence

import torch

from pp_piecewise_backend.pipeline.transports.base import Pending, Transport, Wire


class DelayedTransport:
    """``transport``, on whose links tensors take ``seconds`` longer; the number may change while they are in use."""

    def __init__(self, transport: Transport, seconds: float, waits_for_memory: bool = True) -> None:
        self.name = f"delayed {transport.name}"
        self.stage = transport.stage
        self.stage_count = transport.stage_count
        self.ranks = transport.ranks
        self._transport = transport
        self.seconds = seconds
        self.waits_for_memory = waits_for_memory

    def exchange(self, text: str) -> list[str]:
        return self._transport.exchange(text)

    def break_off(self) -> None:
        self._transport.break_off()

    def wire(self, source: int, target: int, name: str, sizes_bytes: Sequence[int] = ()) -> DelayedWire | None:
        wire = self._transport.wire(source, target, name, sizes_bytes)
        return None if wire is None else DelayedWire(wire, self)

    def close(self) -> None:
        self._transport.close()


class DelayedWire:
    """``wire``, on which tensors take longer, as the transport around it says."""

    def __init__(self, wire: Wire, transport: DelayedTransport) -> None:
        self.tell, self.flush, self.hear = wire.tell, wire.flush, wire.hear
        self.finish, self.close = wire.finish, wire.close
        self.break_data, self.break_control = wire.break_data, wire.break_control
        self.receives_take_the_device = wire.receives_take_the_device
        self._wire = wire
        self._transport = transport
        self._stamps: list[_Stamp] = []

    def landing_memory(self, num_bytes: int) -> torch.Tensor | None:
        return self._wire.landing_memory(num_bytes)

    def send(self, tensors: Sequence[torch.Tensor]) -> Pending:
        stamp = self._next_stamp(lands=False)
        stamp.seconds.value = time.monotonic()
        return self._wire.send([*tensors, stamp.tensor])

    def offer(self, views: Sequence[torch.Tensor]) -> bool:
        return False

    def receive(self, views: Sequence[torch.Tensor]) -> Pending:
        stamp = self._next_stamp(lands=True)
        named_at = time.monotonic() if self._transport.waits_for_memory else 0.0
        seconds, pending = self._transport.seconds, self._wire.receive([*views, stamp.tensor])

        def wait() -> None:
            pending.wait()
            left_at = max(stamp.seconds.value, named_at)
            time.sleep(max(0.0, left_at + seconds - time.monotonic()))

        return Pending(wait)

    def _next_stamp(self, lands: bool) -> _Stamp:
        if not self._stamps:
            block = self._wire.landing_memory(8 * _STAMP_COUNT) if lands else None
            if block is None:
                block = torch.zeros(8 * _STAMP_COUNT, dtype=torch.uint8)
            self._stamps = [_Stamp(block[at : at + 8]) for at in range(0, 8 * _STAMP_COUNT, 8)]
        self._stamps.append(self._stamps.pop(0))
        return self._stamps[-1]


_STAMP_COUNT = 64
"""More than the transfers of a link that are under way at once."""


class _Stamp:
    """A time of sending; it is read and written without torch, which would cost the host more than the rest."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.seconds = ctypes.c_double.from_address(tensor.data_ptr())

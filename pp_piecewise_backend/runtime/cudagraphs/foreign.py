"""Whether a capture is under way: what each call of a program asks first.

Note [inside a foreign capture]
An engine may capture a CUDA graph of its own around a call of a program, attention and all. Then the call is no call at
all: nothing runs, and what is enqueued runs in each replay of that graph, when the program knows nothing of it. So the
program runs its compiled pieces un-captured and its eager steps between them, on the tensors that it is given (landing
memory, where proxies lie there), and what it allocates belongs to the other graph. It replays no graph of its own,
takes no static memory, captures, compares and pads nothing, and notifies nobody that landing memory was read or results
are to be written: none of it happened. That is no miss, and no call after which a bucket would be captured; it is
counted in ``foreign_captures`` alone. What a program needs a host for, to be compiled or warmed up, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from .cuda import CudaDevice
from .emulated import EmulatedDevice

_CUDA, _EMULATED = CudaDevice(), EmulatedDevice()


def capture_check(device_types: Collection[str]) -> Callable[[], bool]:
    """What says, in less than a microsecond, whether a capture is under way in this thread: on its current stream.

    Args:
        device_types: of the tensors of a program; emulated captures count for all of them.
    """
    if "cuda" not in device_types:
        return _EMULATED.is_capturing
    return lambda: _CUDA.is_capturing() or _EMULATED.is_capturing()


def capture_is_under_way() -> bool:
    """The same where no program is known yet."""
    return _EMULATED.is_capturing() or (torch.cuda.is_initialized() and _CUDA.is_capturing())

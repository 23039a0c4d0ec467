"""What a graph device must do: capture one callable into a graph, replay it.

Both devices, ``cuda.py`` and ``emulated.py``, follow these protocols, so that what is tested on a CPU is what runs on
a GPU. A captured graph reads and writes fixed addresses only. Memory that it allocates comes from a pool; whoever
captures says which outputs are still to be read (``CapturedGraph.release_output``), and memory of the others serves
later captures of the same pool.

Note [release order]
Graphs first, then the pools that they allocate from, then static buffers that they read, then process groups whose
collectives they hold. The reverse order leaves a graph with addresses of freed memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

PieceCall = Callable[[Sequence[Any]], Sequence[Any]]


class CaptureError(Exception):
    """A piece cannot be captured; the message says why."""


class CapturedGraph(Protocol):
    """A captured piece. Its outputs have fixed addresses; who reads them is the capturer's to know."""

    outputs: list[Any]
    """Output tensors, which own no memory: valid from one replay until a later graph of the pool reuses the memory."""
    replay: Callable[[], None]

    def release_output(self, index: int) -> None:
        """Say that nothing captured from now on may find this output's memory in use."""

    def release(self) -> None:
        """Forget the graph; see Note [release order]."""


class Pool(Protocol):
    """Memory of a set of graphs that are replayed in the order of their capture, one at a time."""

    @property
    def held_bytes(self) -> int: ...


class Device(Protocol):
    """Where graphs live."""

    def new_pool(self) -> Pool: ...

    def capture(self, call: PieceCall, inputs: Sequence[Any], pool: Any) -> CapturedGraph:
        """Record what ``call`` does to ``inputs``. The outputs hold no values until the first replay.

        Raises:
            CaptureError: the piece does what no graph can hold.
        """

    def warm_up(self, call: Callable[[], Any]) -> Any:
        """Run what is about to be captured once, where it may still load kernels and allocate."""

    def is_capturing(self) -> bool:
        """Whether a capture is under way in this thread, by whomever."""

    def synchronize(self) -> None:
        """Return when all that was enqueued has run."""


def released() -> None:
    """What ``replay`` is after ``release``."""
    raise CaptureError("this graph was released; whoever replays it kept it too long")

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

from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

PieceCall = Callable[[Sequence[Any]], Sequence[Any] | Generator[Any, None, Sequence[Any]]]
"""Gives the outputs of a piece. A generator yields, besides, wherever its graph is to be cut into parts."""


class CaptureError(Exception):
    """A piece cannot be captured; the message says why."""


class CapturedGraph(Protocol):
    """A captured piece. Its outputs have fixed addresses; who reads them is the capturer's to know."""

    outputs: list[Any]
    """Output tensors, which own no memory: valid from one replay until a later graph of the pool reuses the memory."""
    replay: Callable[[], None]
    parts: list[Callable[[], None]]
    """What ``replay`` runs, one after the other: whoever replays may call these and do something in between."""
    borders: list[Any]
    """What the captured call yielded between the parts."""

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

    def capture(
        self, call: PieceCall, inputs: Sequence[Any], pool: Any, pool_after: Callable[[list[Any]], Any] | None = None
    ) -> CapturedGraph:
        """Record what ``call`` does to ``inputs``. The outputs hold no values until the first replay.

        Args:
            pool: memory of the first part.
            pool_after: for all that the call has yielded so far, memory of the part after it. A part may overwrite
                what the last replay left in its pool.

        Raises:
            CaptureError: the piece does what no graph can hold.
        """

    def warm_up(self, call: Callable[[], Any]) -> Any:
        """Run what is about to be captured once, where it may still load kernels and allocate."""

    def is_capturing(self) -> bool:
        """Whether a capture is under way in this thread, by whomever."""

    def synchronize(self) -> None:
        """Return when all that was enqueued has run."""


def in_parts(call: PieceCall, inputs: Sequence[Any]) -> Generator[Any, None, Sequence[Any]]:
    """The call as a generator, whichever it is."""
    outcome = call(inputs)
    return (yield from outcome) if isinstance(outcome, Generator) else outcome


def replay_of(parts: Sequence[Callable[[], None]]) -> Callable[[], None]:
    """What replays these parts, one after the other."""
    if len(parts) == 1:
        return parts[0]

    def replay_all() -> None:
        for part in parts:
            part()

    return replay_all


def released() -> None:
    """What ``replay`` is after ``release``."""
    raise CaptureError("this graph was released; whoever replays it kept it too long")

"""What a transport must do: carry control messages both ways and tensors one way, between neighbours.

A transport knows nothing of headers, order or liveness: ``link.py`` puts these on top, once for all transports. What
goes wrong on a wire is a ``ConnectionError``, or a ``TimeoutError`` where a time was given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ... import errors

MESSAGE_BYTES = 64
"""Length of a control message, whatever it says."""

POLL_SECONDS = 1e-3
"""Between two looks at what cannot be waited for."""


@dataclass(frozen=True)
class Patience:
    """How long a rank waits for another.

    Raises:
        ConfigError: a number that is not positive and finite.
    """

    silence_seconds: float = 60.0
    """A peer that sends nothing for so long is lost. Keep-alives need no main thread, so idle is not silent."""
    setup_seconds: float = 1800.0
    """The longest set-up, and the longest wait for data of a peer that lives."""
    step_seconds: float | None = None
    """The longest step of this rank in its own code; None: as long as it takes."""

    def __post_init__(self) -> None:
        given = {"silence_seconds": self.silence_seconds, "setup_seconds": self.setup_seconds}
        if self.step_seconds is not None:
            given["step_seconds"] = self.step_seconds
        for name, seconds in given.items():
            is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
            if not (is_number and math.isfinite(seconds) and seconds > 0):
                raise errors.ConfigError(errors.bad_patience(name, seconds))


@dataclass(slots=True)  # a frozen one takes several times as long to make
class Pending:
    """Tensors on their way."""

    wait: Callable[[], None]
    """Returns once what follows on this thread (on its current stream) may use the tensors again. Called once."""
    enqueued: Callable[[], None] | None = None
    """Of a send, where streams wait for other ranks: returns once nothing is left for this host to do. Called before a
    stream of this rank waits for another rank, which may wait for this transfer."""


@dataclass(frozen=True)
class LinkChoice:
    """Which transport one link of the pipeline has, and why; as text, a sentence."""

    name: str
    """Of the link: such as "proxies"."""
    source_rank: int
    target_rank: int
    transport: str
    """Empty where none works."""
    sizes_bytes: Sequence[int] = ()
    """What was sent to measure: a micro-batch of one token, and the largest; nothing where only one way was tried."""
    times_us: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Transport -> microseconds for each size."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Transport -> why it cannot be used."""

    def __str__(self) -> str:
        link = f"{self.name} from rank {self.source_rank} to rank {self.target_rank}"
        return errors.link_choice(link, self.transport, self.sizes_bytes, self.times_us, self.failed)


class Wire(Protocol):
    """One end of a link. Operations of different kinds may run in different threads at once."""

    receives_take_the_device: bool
    """Whether a receive computes on the device while it waits for its sender, as a kernel of NCCL does."""

    def tell(self, message: bytes) -> None:
        """Send a control message once the one before has left; messages arrive in order."""

    def flush(self, timeout_seconds: float) -> None:
        """Wait until the last message has left."""

    def hear(self, timeout_seconds: float) -> bytes:
        """The next control message of the other end."""

    def send(self, tensors: Sequence[torch.Tensor]) -> Pending:
        """Send the tensors as they are; until ``wait()`` returns, who writes into them changes what is sent."""

    def landing_memory(self, num_bytes: int) -> torch.Tensor | None:
        """Flat uint8 zeros for ``receive``; None where it takes any memory. The tensor belongs to the caller."""

    def offer(self, views: Sequence[torch.Tensor]) -> bool:
        """Let a transfer that nobody has announced yet land in the first bytes of ``views``; whether that can be.

        It is the next one for which neither ``offer`` nor ``receive`` was called; ``receive`` gets its views.
        """

    def receive(self, views: Sequence[torch.Tensor]) -> Pending:
        """Receive the tensors that ``send`` took, directly into ``views``, which have the same shapes and dtypes.

        Raises:
            ValueError: a view lies outside of ``landing_memory``, where that is not None.
        """

    def finish(self) -> None:
        """Return once everything sent and received over this end is there; later calls only end the wire.

        On the CPU it is, when the transfers have been waited for. On an accelerator streams may still be at it.
        """

    def break_data(self) -> None:
        """Make all waiting and later transfers of tensors fail, from any thread; messages still pass."""

    def break_control(self) -> None:
        """Make all waiting and later messages fail, from any thread."""

    def close(self) -> None:
        """Release what the wire holds; nothing waits in it any more."""


def poll(is_over: Callable[[], bool], longest_seconds: float) -> None:
    """Return once something that cannot be waited for is over.

    Raises:
        TimeoutError: it takes longer.
        Whatever ``is_over`` raises.
    """
    deadline = time.monotonic() + longest_seconds
    while not is_over():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(POLL_SECONDS)


class Transport(Protocol):
    """One rank's way to the others of its pipeline."""

    name: str
    """Equal on all ranks: it is part of the plan that they compare."""
    stage: int
    stage_count: int

    @property
    def ranks(self) -> Sequence[int]:
        """How messages name the stages: by the ranks that the user started."""

    def exchange(self, text: str) -> list[str]:
        """The texts of all ranks, in stage order; every rank calls it equally often.

        Raises:
            PeerLost: a rank did not bring its text in time.
        """

    def break_off(self) -> None:
        """End every ``exchange`` in which this rank waits, from any thread."""

    def wire(self, source: int, target: int, name: str, sizes_bytes: Sequence[int] = ()) -> Wire | None:
        """This rank's end of a new link, ready for use; None if it has none.

        Every rank calls it for every link of the pipeline, in the same order; both ends know ``sizes_bytes``, of a
        micro-batch of one token and of the largest, for who chooses a way by measuring.

        Raises:
            PeerLost: the other end did not come in time.
        """

    def close(self) -> None:
        """Release what the transport holds besides its wires."""

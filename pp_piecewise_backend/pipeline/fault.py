"""The first loss that a rank learns of: recorded once, sent to all its neighbours, and raised wherever the rank waits.

See Note [liveness] in ``link.py`` for who finds losses.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from .. import errors
from .positions import Positions, last_positions

_TOLD_SECONDS = 1.0
"""How long an error waits until the neighbours have been notified."""
_VERDICT_SECONDS = 0.5
"""How long a broken transfer waits for the listener to say why."""


class Loss(NamedTuple):
    """Why the pipeline is broken."""

    rank: int
    """The one that failed, as far as this rank knows."""
    reason: str
    """In at most 24 bytes, for the neighbours."""
    sentence: str
    micro_batch: int | None = None
    """In whose step that rank was, or the last one that it ran, if it says so."""
    step_timeout_s: float | None = None
    """What that rank may take for a step, if it is lost because it took longer."""


class Breakable(Protocol):
    """One end of a link, as far as a loss concerns it."""

    is_receiver: bool
    """Whether tensors land here, which this rank uses: no stream waits for them any more once ``break_off`` is called,
    so nothing of this rank may reach others by then."""

    def tell_failure(self, loss: Loss) -> None:
        """Notify the neighbour, if that can be done soon."""

    def break_off(self) -> None:
        """End all transfers of tensors, and the wait for a header."""

    def close(self) -> None:
        """Release what the end holds."""


class Fault:
    """The first failure that one rank learns of; it breaks all its links.

    Args:
        positions: of all ranks, for the error.
    """

    def __init__(self, positions: Positions) -> None:
        self.loss: Loss | None = None
        self._positions = positions
        self._found: tuple[errors.Position, ...] | None = None
        """Where the ranks were, once somebody has asked."""
        self._asking = threading.Lock()
        self._ends: list[Breakable] = []
        self.end_exchange: Callable[[], object] | None = None
        """Ends what waits for all other ranks at once, once the links are set up."""
        self._lock = threading.Lock()
        self._recorded = threading.Event()
        self._told = threading.Event()

    def add(self, end: Breakable) -> None:
        self._ends.append(end)

    @property
    def ends(self) -> tuple[Breakable, ...]:
        """Those that were added, and not forgotten."""
        return tuple(self._ends)

    def forget_ends(self) -> None:
        """What fails after the links were closed concerns nobody."""
        self._ends = []
        self.end_exchange = None

    def record(self, loss: Loss, found_by: Breakable | None = None) -> None:
        """Keep the first loss, notify all neighbours but the one that ``found_by`` lost, and break all transfers."""
        with self._lock:
            if self.loss is not None:
                return
            self.loss = loss
        self._recorded.set()
        self._positions.say_last()
        for end in self._ends:
            if end is not found_by:
                end.tell_failure(loss)
        for end in sorted(self._ends, key=lambda end: end.is_receiver):
            end.break_off()
        self._told.set()
        if self.end_exchange is not None:
            self.end_exchange()

    def check(self, doing: str) -> None:
        """Raises `PeerLost` once something is recorded, and the neighbours know."""
        if self.loss is not None:
            raise self._error(self.loss, doing)

    def verdict(self, doing: str, otherwise: Loss, found_by: Breakable) -> errors.PeerLost:
        """The error of a transfer that broke: its listener knows more, if it finds a loss soon."""
        if not self._recorded.wait(_VERDICT_SECONDS):
            self.record(otherwise, found_by)
        assert self.loss is not None
        return self._error(self.loss, doing)

    def _error(self, loss: Loss, doing: str) -> errors.PeerLost:
        self._told.wait(_TOLD_SECONDS)
        with self._asking:
            if self._found is None:
                self._found = self._positions.collect(loss.rank)
        text = last_positions(self._found, time.time()) if self._found else ""
        return errors.PeerLost(errors.lost_while(loss.sentence, doing, text), self._found)

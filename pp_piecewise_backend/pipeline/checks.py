"""What callers of ``StageRunner`` may give it, and when they may call it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from .. import errors
from ..runtime.stage import Proxy

Proxies = Mapping[str, Proxy]
MakeInputs = Callable[[int, bytes], Mapping[str, Any]]


def arguments(receive: str, max_in_flight: int | None, options: Mapping[str, Any]) -> None:
    """Check what is known before the ranks meet.

    Raises:
        ConfigError: an argument that cannot be used.
    """
    if receive not in ("early", "step"):
        raise errors.ConfigError(errors.runner_argument("receive", receive, "'early' or 'step'"))
    if max_in_flight is not None and (not isinstance(max_in_flight, int) or max_in_flight < 1):
        raise errors.ConfigError(errors.runner_argument("max_in_flight", max_in_flight, "None or at least 1"))
    for name in ("stage", "static_outputs", "max_tokens"):
        if name in options:
            raise errors.ConfigError(errors.runner_sets_option(name))


def ends(
    stage: int,
    stage_count: int,
    inputs: Proxies | None,
    outputs: Proxies | None,
    feedback: Proxies | None,
    finish: object,
) -> None:
    """Check that this stage has what belongs to its place, and nothing else.

    Raises:
        ConfigError: proxies that nobody sends or takes, or none where some are needed.
    """
    is_first, is_last, alone = stage == 0, stage == stage_count - 1, stage_count == 1
    for name, got, wanted in (
        ("inputs", inputs, not is_first),
        ("outputs", outputs, not is_last),
        ("feedback", feedback, None if not alone and (is_first or is_last) else False),
    ):
        if wanted is not None and bool(got) != wanted:
            raise errors.ConfigError(errors.proxies_at_wrong_end(name, list(got or ()), stage, stage_count))
    if finish is not None and not (is_last and feedback and callable(finish)):
        raise errors.ConfigError(errors.finish_cannot_be(finish, stage, stage_count, bool(feedback)))


class Turn:
    """What a runner does with its memory, one thing at a time: a micro-batch, or a warm-up.

    Raises:
        PPPiecewiseError: entered while it is held, by whichever thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None
        """Which holds it."""
        self.is_over = False

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise errors.PPPiecewiseError(errors.CLOSED_RUNNER if self.is_over else errors.NOT_BETWEEN_MICRO_BATCHES)
        self._thread = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._thread = None
        self._lock.release()

    def check_free(self) -> None:
        """Raises PPPiecewiseError in the thread that holds it."""
        if self._thread == threading.get_ident():
            raise errors.PPPiecewiseError(errors.NOT_BETWEEN_MICRO_BATCHES)

    def end(self, longest_seconds: float) -> bool:
        """Nobody enters it any more, once who holds it has left; whether that took no longer than it may."""
        self.is_over = self._lock.acquire(timeout=longest_seconds)
        return self.is_over

    def check_open(self) -> None:
        """Raises PPPiecewiseError after its end."""
        if self.is_over:
            raise errors.PPPiecewiseError(errors.CLOSED_RUNNER)

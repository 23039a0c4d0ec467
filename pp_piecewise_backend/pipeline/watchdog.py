"""Finds out that this rank hangs in its own code, which its keep-alives hide: for ``step_timeout_s``."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import sys
import threading
import traceback

from .. import errors
from .connect import Links
from .report import StepClock

_LOG = logging.getLogger(__name__)

_LOOKS_PER_TIMEOUT = 10
_LONGEST_LOOK_SECONDS = 1.0
_CLOSING_SECONDS = 5.0


class Watchdog:
    """A thread that looks whether a step takes longer than it may, from ``start`` to ``close`` or until one does.

    Then the stack of the step is in the log, and all ranks know that this one has failed. Where the step holds the
    interpreter, no thread here can look: ``faulthandler`` writes all stacks to stderr, and the others find this rank
    silent.

    Args:
        clock: of the steps; what they wait for other ranks does not count.
        links: of this rank.
        step_seconds: that one step may take; None: as long as it takes, and there is no thread.
    """

    def __init__(self, clock: StepClock, links: Links, step_seconds: float | None) -> None:
        self._clock = clock
        self._links = links
        self._step_seconds = step_seconds
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._step_seconds is not None:
            name = f"rank {self._links.rank} watchdog"
            self._thread = threading.Thread(target=self._watch, args=(self._step_seconds,), name=name, daemon=True)
            self._thread.start()

    def _watch(self, step_seconds: float) -> None:
        every_seconds = min(step_seconds / _LOOKS_PER_TIMEOUT, _LONGEST_LOOK_SECONDS)
        while not self._closed.wait(every_seconds):
            with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):  # stderr may be no file
                # Another one that was to come is replaced: there is one in a process.
                faulthandler.dump_traceback_later(step_seconds + every_seconds)
            late = self._clock.late_step(step_seconds)
            if late is not None:
                faulthandler.cancel_dump_traceback_later()
                frame = sys._current_frames().get(late.thread)
                stack = "" if frame is None else "".join(traceback.format_stack(frame))
                sentence = errors.step_is_late(self._links.rank, late.micro_batch, late.part, step_seconds)
                _LOG.error("%s Its stack:\n%s", sentence, stack)
                self._links.fail(f"hangs in its {late.part}", late.micro_batch, step_seconds)
                return

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(_CLOSING_SECONDS)  # it may hang in a look at a device that hangs
            faulthandler.cancel_dump_traceback_later()

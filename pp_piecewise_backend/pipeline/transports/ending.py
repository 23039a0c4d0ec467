"""Ends what may take for ever to end: in a thread of its own, for which nobody waits longer than it was given.

Note [left to the end of the process]
A communicator of NCCL, and memory of another process on a GPU, wait when they are released until what uses them has
run. No host can end a kernel that hangs, so that may be never. They are released in a thread of their own, which has
the last reference to them: then neither a caller nor the garbage collector, which runs in any thread, waits in their
destructor. A thread that is not done in time is left alone, on purpose and with a warning. Its frame keeps what it
ends, also while the interpreter ends, which does not wait for it; with the process, the driver takes everything back.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ... import errors

_LOG = logging.getLogger(__name__)


class Ending:
    """The end of some things, one after the other; see Note [left to the end of the process].

    Args:
        what: they are, for messages.
        things: to be ended. The list is emptied, so that nobody else has a reference to what only the caller had.
        end: ends one, before it is let go of. A RuntimeError in it is expected: what is released may be broken.
    """

    def __init__(self, what: str, things: list[Any], end: Callable[[Any], object] | None = None) -> None:
        self.what = what
        self._things = deque(things)
        things.clear()
        self._end = end
        self._thread = threading.Thread(target=self._run, name=f"end of {what}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while self._things:
            thing = self._things.popleft()
            if self._end is not None:
                with contextlib.suppress(RuntimeError):
                    self._end(thing)
            del thing

    def is_over(self, longest_seconds: float) -> bool:
        """Whether all have ended, as soon as they have or after so many seconds."""
        self._thread.join(longest_seconds)
        return not self._thread.is_alive()


def wait_for(endings: Sequence[Ending], longest_seconds: float) -> None:
    """Return once all have ended, or after so many seconds for all together; then those that have not are left."""
    deadline = time.monotonic() + longest_seconds
    for ending in endings:
        if not ending.is_over(max(0.0, deadline - time.monotonic())):
            _LOG.warning("%s", errors.left_to_the_end_of_the_process(ending.what, longest_seconds))

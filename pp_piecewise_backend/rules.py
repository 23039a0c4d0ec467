"""The names of the rules that keep results right, and the switch by which tests see that each is needed."""

from __future__ import annotations

_OF_NOTES = ("M1", "M2", "R1", "R2", "R3", "R4", "R5", "R6", "R7")
"""As the notes in ``cuts.py``, ``traits.py``, ``poison.py``, ``buffers.py`` and ``graphs.py`` number them."""

_OTHERS = ("aliases", "landing", "rows", "selection", "meeting", "float indices", "random", "tail", "uninitialised")

RULES = frozenset(_OF_NOTES + _OTHERS)
"""Every rule that a test may switch off, to see that it is needed."""

SWITCHED_OFF: frozenset[str] = frozenset()
"""Rules not applied. Tests replace it; nothing else does."""


def is_on(rule: str) -> bool:
    return rule not in SWITCHED_OFF

"""The names of the rules that keep results right, and the switch by which tests see that each is needed."""

from __future__ import annotations

RULES = frozenset(
    {
        "M1",
        "M2",
        "R1",
        "R2",
        "R3",
        "R4",
        "R5",
        "R6",
        "R7",
        "landing",
        "rows",
        "selection",
        "random",
        "tail",
        "uninitialised",
    }
)
"""Every rule that a test may switch off, to see that it is needed."""

SWITCHED_OFF: frozenset[str] = frozenset()
"""Rules not applied. Tests replace it; nothing else does."""


def is_on(rule: str) -> bool:
    return rule not in SWITCHED_OFF

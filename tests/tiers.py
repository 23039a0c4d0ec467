"""Which tests run by default, and how many of the others in a given time; ``pyproject.toml`` says what each tier is."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest

LEFT_OUT = ("slow", "bench", "nightly")
"""Markers of tests that are not in the default tier."""


def mark_default(items: Iterable[pytest.Item]) -> None:
    for item in items:
        if not any(item.get_closest_marker(name) for name in LEFT_OUT):
            item.add_marker("default")


def slow_but(default: Iterable[Any], every: Iterable[Any]) -> list[Any]:
    """For ``pytest.mark.parametrize``: every case, those marked as slow that are not among the default ones."""
    default, every = list(default), list(every)
    assert all(case in every for case in default), "a default case that is none"
    return [case if case in default else slow(case) for case in every]


def slow(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)


class TimeLimit:
    """Tests begin within a given time, in an order that another text changes; the others are skipped, and say so."""

    def __init__(self, seconds: float, order: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._order = order
        self._clock = clock
        self._began_at = clock()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: hashlib.sha256(f"{self._order} {item.nodeid}".encode()).digest())

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        if self._clock() - self._began_at > self._seconds:
            pytest.skip(f"could not begin within {self._seconds:.0f} s")

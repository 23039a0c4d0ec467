"""What each file of tests costs in processor seconds, child processes included, and what it may cost.

The default tier is for people who wait for it. A file of it that costs more than ``FILE_BUDGET_SECONDS`` is reported as
a failed test, ``<file>::processor_seconds``, once all tests have ended. Processor seconds and not wall time, so that
what else runs on the machine counts little, and a file costs the same whoever runs it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FILE_BUDGET_SECONDS = 60.0
_PROPERTY = "processor_seconds"
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def processor_seconds() -> float:
    """Used until now by this process, by the children it has waited for, and by all living descendants."""
    return sum(os.times()[:4]) + sum(_living(pid) for pid in _children("self"))


def _children(pid: int | str) -> list[int]:
    try:
        texts = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:  # it ended meanwhile
        return []
    return [int(child) for text in texts for child in text.split()]


def _living(pid: int) -> float:
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    # utime, stime, cutime, cstime: the 14th to 17th field, and the name was the second
    return sum(map(int, after_name[11:15])) / _TICKS_PER_SECOND + sum(_living(child) for child in _children(pid))


class FileCosts:
    """Measures where tests run (an xdist worker, or the only process) and judges where they are reported."""

    def __init__(self, config: pytest.Config, budget_seconds: float = FILE_BUDGET_SECONDS) -> None:
        self._config = config
        self._budget_seconds = budget_seconds
        self._started_at = 0.0
        self._seconds: Counter[str] = Counter()
        """By file."""
        self._default_seconds: Counter[str] = Counter()
        """Those of the default tier."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        self._started_at = processor_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> Iterator[None]:
        report: Any = yield
        if call.when == "teardown":
            # Few who wait have a GPU.
            counts = is_default(item) and item.get_closest_marker("cuda") is None
            cost = {"seconds": processor_seconds() - self._started_at, "default": counts}
            report.user_properties.append((_PROPERTY, cost))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, cost in report.user_properties:
            if name == _PROPERTY and report.when == "teardown":
                file = report.nodeid.partition("::")[0]
                self._seconds[file] += cost["seconds"]
                self._default_seconds[file] += cost["seconds"] * cost["default"]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Iterator[None]:
        done = yield
        if not hasattr(self._config, "workerinput"):
            for file, seconds in self._default_seconds.items():
                if seconds > self._budget_seconds:
                    self._config.hook.pytest_runtest_logreport(report=_too_dear(file, seconds, self._budget_seconds))
        return done

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._config.option.durations is None:
            return
        terminalreporter.section("processor seconds by file")
        for file, seconds in self._seconds.most_common(self._config.option.durations or None):
            terminalreporter.line(f"{seconds:7.1f} {file}")
        terminalreporter.line(f"{sum(self._seconds.values()):7.1f} in all")


def is_default(item: pytest.Item) -> bool:
    return item.get_closest_marker("default") is not None


def _too_dear(file: str, seconds: float, budget_seconds: float) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid=f"{file}::processor_seconds",
        location=(file, None, "processor_seconds"),
        keywords={},
        outcome="failed",
        longrepr=(
            f"tests of the default tier in {file} used {seconds:.0f} processor seconds, but a file may use "
            f"{budget_seconds:.0f}: make them cheaper, or mark what is covered elsewhere as slow"
        ),
        when="call",
    )

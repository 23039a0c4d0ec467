"""Other work in place of that of a flat program: to time what a call costs besides it, or to look at one part alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pp_piecewise_backend.runtime.replay import FlatProgram, _OnRealRows, _Replay


def replace_work(
    flat: FlatProgram,
    replay: Callable[[Callable[[], None]], Callable[[], None]],
    body: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
) -> None:
    """Run, in later calls, what these make of each graph's replay and of the body of each eager step."""
    for step in flat.steps:
        if isinstance(step, _Replay):
            step.replay = replay(step.replay)
        elif isinstance(step, _OnRealRows) and body is not None and step.body is not None:
            step.body = body(step.body)
    flat.bind(flat.steps)

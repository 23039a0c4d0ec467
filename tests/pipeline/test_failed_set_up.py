"""A rank whose set-up fails after it has links: the others hear of it, and it keeps no thread of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

import pp_piecewise_backend as ppb
from pp_piecewise_backend.errors import PeerLost
from pp_piecewise_backend.pipeline import connect, inbox, runner
from stages_in_threads import in_threads

pytestmark = pytest.mark.usefixtures("fresh_backend")


def failing_on(stage: int, call: Callable[..., Any], says: Callable[..., int]) -> Callable[..., Any]:
    """The call, which has no memory on that stage; ``says`` which one its arguments are of."""

    def failing(*args: Any, **named: Any) -> Any:
        if says(*args) == stage:
            raise MemoryError("none is left")
        return call(*args, **named)

    return failing


def of_link(link: Any, *_: Any) -> int:
    return int(link.own_rank)


def of_feedback(end: Any, wire: Any, schema: Any, transport: Any, *_: Any) -> int:
    stage = int(transport.stage)
    return stage if end is (connect.Sender if stage else connect.Receiver) else -1


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("at", ["a later link", "landing memory"])
def test_the_other_rank_hears_of_it(at: str, failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its link for feedback; or the first one with the memory for that, the second one with that for proxies."""
    if at == "landing memory":
        monkeypatch.setattr(runner, "Inbox", failing_on(failing, inbox.Inbox, of_link))
    else:
        monkeypatch.setattr(connect, "_started", failing_on(failing, connect._started, of_feedback))
    before = set(threading.enumerate())

    def play(own: ppb.StageRunner, stage: int) -> None:
        for _ in own.run([ppb.MicroBatch(3, b"1")] if stage == 0 else None):
            pass

    outcomes = in_threads(2, play, timeout_s=30)
    assert isinstance(outcomes[failing], MemoryError)
    other = outcomes[1 - failing]
    assert isinstance(other, PeerLost)
    assert f"rank {failing} failed (MemoryError)" in str(other)
    names = {thread.name for thread in set(threading.enumerate()) - before if thread.is_alive()}
    assert not {name for name in names if "handoff" in name}, names

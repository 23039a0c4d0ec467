"""What ranks do whose streams wait for one another: scenarios of ``handoff_ranks`` for one GPU or several."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch

import pp_piecewise_backend as ppb
from handoff_ranks import MAX_TOKENS, PROXIES, Stage, _now, closing, memory, rows, steady, values
from pp_piecewise_backend.pipeline.connect import Links
from pp_piecewise_backend.pipeline.fault import Loss
from pp_piecewise_backend.pipeline.inbox import Inbox
from pp_piecewise_backend.pipeline.transports import stream_sharing
from pp_piecewise_backend.utils.counters import Stats

HELD_SECONDS = 1.0
CYCLES_PER_SECOND = 2e9
"""Roughly, and no less than GPUs have."""
LONGEST_SECONDS = 20.0


def hold_back(seconds: float = HELD_SECONDS) -> None:
    """Keep the current stream busy for about so long."""
    torch.cuda._sleep(int(seconds * CYCLES_PER_SECOND))


@contextlib.contextmanager
def refusing_to_synchronize() -> Iterator[None]:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("the host waits for the device")

    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with (
            mock.patch.object(torch.cuda, "synchronize", refuse),
            mock.patch.object(torch.cuda.Stream, "synchronize", refuse),
            mock.patch.object(torch.cuda.Event, "synchronize", refuse),
            mock.patch.object(torch.accelerator, "synchronize", refuse),
        ):
            yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def inbox_of(links: Links) -> Inbox:
    device = torch.device("cuda", torch.cuda.current_device())
    inbox = Inbox(links.incoming, ppb.Stage(PROXIES.proxies, MAX_TOKENS, device), Stats(), hands_out=True)
    inbox.release()
    return inbox


def counts_nothing(sending_end: Any) -> None:
    """What this end writes lands, and nobody hears of it: it counts in a part of the page that nobody reads."""
    sending_end._counted_up = lambda: sending_end._word(64, 0)


def send(links: Links, tensors: dict[str, torch.Tensor], num_tokens: int) -> None:
    links.outgoing.send(links.outgoing.announce(num_tokens), rows(tensors, num_tokens)).wait()


def chooses(stage: Stage) -> list[dict[str, Any]]:
    """Micro-batches as in ``steady``; which transport each link of the pipeline has, and why."""
    connect = stage.connect
    made: list[Links] = []

    def noted(**changes: Any) -> Links:
        made.append(connect(**changes))
        return made[-1]

    stage.connect = noted
    steady(stage)
    return [{**asdict(choice), "text": str(choice)} for choice in made[0].choices]


def does_not_wait(stage: Stage) -> dict[str, Any]:
    """The second of two micro-batches is computed slowly; how long the last stage takes to enqueue its own work."""
    links = stage.connect(feedback=None)
    outgoing, found = memory(PROXIES), {}
    inbox = None if stage.is_first else inbox_of(links)
    expected = [values(sequence, 5) for sequence in range(3)]
    for sequence in range(3):
        if inbox is None:
            header = links.outgoing.announce(5)
            with refusing_to_synchronize() if sequence == 2 else contextlib.nullcontext():
                if sequence == 2:
                    hold_back()
                for name, tensor in expected[sequence].items():
                    outgoing[name][:5].copy_(tensor)
                links.outgoing.send(header, rows(outgoing, 5)).wait()
            continue
        if sequence == 2:
            time.sleep(0.1)
        began_at = time.monotonic()
        with refusing_to_synchronize() if sequence == 2 else contextlib.nullcontext():
            _, views = inbox.take()
            got = {name: view + 0 for name, view in views.items()}
            inbox.release()
            done = torch.cuda.current_stream().record_event()
        found["enqueued_seconds"] = time.monotonic() - began_at
        found["was_done"] = done.query()
        inbox.confirm()
        torch.cuda.synchronize()
        found["total_seconds"] = time.monotonic() - began_at
        assert all(torch.equal(got[name], expected[sequence][name]) for name in got), sequence
    links.close()
    return found


def closes_with_work_left(stage: Stage) -> None:
    """All stages close while the first one has still to compute what it sends."""
    links = stage.connect(feedback=None)
    expected = values(0, 5)
    if stage.is_first:
        outgoing = memory(PROXIES)
        hold_back()
        for name, tensor in expected.items():
            outgoing[name][:5].copy_(tensor)
        send(links, outgoing, 5)
    else:
        inbox = inbox_of(links)
        _, views = inbox.take()
        got = {name: view + 0 for name, view in views.items()}
        if links.outgoing is not None:
            send(links, got, 5)
        inbox.release()
    links.close()
    if not stage.is_first:
        assert all(torch.equal(got[name], expected[name]) for name in got)


def loses(stage: Stage) -> None:
    """The first stage dies or stops at its second micro-batch; the others go on until they learn of it."""
    links = stage.connect(feedback=None)
    landed = None if stage.is_first else inbox_of(links)
    try:
        _lose(stage, links, landed)
    finally:
        began_at = time.monotonic()
        torch.cuda.synchronize()
        assert time.monotonic() - began_at < 3.0, "streams were not let go"
        assert torch.ones(3).sum().item() == 3.0


def _lose(stage: Stage, links: Links, landed: Inbox | None) -> None:
    with closing(links):
        if stage.is_first:
            outgoing = values(0, 5)
            send(links, outgoing, 5)
            time.sleep(0.5)
            _fail_at(stage.arguments["at"], links, outgoing)
            time.sleep(LONGEST_SECONDS)
        for sequence in range(2):
            assert landed is not None
            _, views = landed.take()
            got = {name: view.clone() for name, view in views.items()}
            landed.release()
            if links.outgoing is not None:
                send(links, got, 5)
            else:
                landed.confirm()
                assert sequence == 0, "what never landed was handed out"
        landed.take()


def _fail_at(at: str, links: Links, tensors: dict[str, torch.Tensor]) -> None:
    if at == "stopped before the copy" or at == "before the copy":
        links.outgoing.announce(5)
    elif at == "while it computes":
        hold_back(2 * HELD_SECONDS)
        send(links, tensors, 5)
        time.sleep(0.1)
    elif at == "between copy and count":
        counts_nothing(links.outgoing._wire._sharing)
        send(links, tensors, 5)
        torch.cuda.synchronize()
    _now("fault")
    os.kill(os.getpid(), signal.SIGSTOP if at == "stopped before the copy" else signal.SIGKILL)


def passes_nothing_on(stage: Stage) -> None:
    """The first of three stages dies; the second lets its streams go; the last one learns of nothing for a while."""
    links = stage.connect(feedback=None)
    if stage.is_first:
        links.outgoing.announce(5)
        time.sleep(0.5)
        _now("fault")
        os.kill(os.getpid(), signal.SIGKILL)
    record: Callable[..., None] = links._fault.record
    if stage.is_last:
        links._fault.record = lambda *arguments, **found_by: None  # type: ignore[method-assign]
    inbox = inbox_of(links)
    try:
        _, views = inbox.take()
        got = {name: view.clone() for name, view in views.items()}
        if links.outgoing is not None:
            send(links, got, 5)
            inbox.take()
        done = torch.cuda.current_stream().record_event()
        sharing = links.incoming._wire._sharing
        deadline = time.monotonic() + LONGEST_SECONDS
        while sharing._distance(stream_sharing._LANDED, 1) < 0:
            assert time.monotonic() < deadline, "the second stage was not let go"
            time.sleep(0.01)
        time.sleep(0.5)
        assert not done.query(), "what never landed was accepted"
        record(Loss(0, "test", "now the last stage learns of it"))
        inbox.confirm()
    finally:
        links.close()

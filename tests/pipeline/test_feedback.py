"""Feedback from the last stage to the first: what the first one may keep while more comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import pp_piecewise_backend as ppb
from pp_piecewise_backend import errors
from pp_piecewise_backend.pipeline.transports.local import LocalHub

pytestmark = pytest.mark.usefixtures("fresh_backend")

LONGEST_SECONDS = 60.0
PROXIES = {"hidden_states": ppb.Proxy((4,), torch.float32)}
TOKENS = {"tokens": ppb.Proxy((), torch.int64)}


class First(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"hidden_states": input_ids[:, None].float().expand(-1, 4) + 1}


class Middle(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"hidden_states": hidden_states * 1}


class Last(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"tokens": hidden_states.sum(1).long()}


def runner(hub: LocalHub, stage: int, in_flight: int | None, **arguments: Any) -> ppb.StageRunner:
    is_last = stage == hub.stage_count - 1
    return ppb.StageRunner(
        Last() if is_last else Middle() if stage else First(),
        make_inputs=lambda n, tag: {} if stage else {"input_ids": torch.zeros(n, dtype=torch.int64)},
        max_tokens=4,
        inputs=PROXIES if stage else None,
        outputs=None if is_last else PROXIES,
        feedback=TOKENS if is_last or not stage else None,
        transport=hub.transport(stage),
        max_in_flight=in_flight,
        options={"compiler": "eager", "graphs": "off"},
        **arguments,
    )


def test_one_feedback_is_read_while_all_that_may_be_in_flight_arrive() -> None:
    hub, in_flight, count = LocalHub(2, LONGEST_SECONDS), 3, 8
    told: list[tuple[bytes, list[int], list[int]]] = []
    failures: list[BaseException] = []

    def last_stage() -> None:
        try:
            with runner(hub, 1, in_flight) as last:
                for _ in last.run():
                    pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=last_stage, daemon=True)
    thread.start()

    def microbatches(first: ppb.StageRunner) -> Iterator[ppb.MicroBatch]:
        def all_arrive(arrivals: int) -> None:
            deadline = time.monotonic() + LONGEST_SECONDS
            while first.stats.recvs < arrivals and time.monotonic() < deadline:
                time.sleep(0.001)
            assert first.stats.recvs == arrivals

        for sequence in range(count + in_flight):
            if sequence >= in_flight:
                tag, tensors = first.feedback()
                before = tensors["tokens"].tolist()
            if sequence < count:
                inputs: dict[str, Any] = {"input_ids": torch.full((2,), sequence)}
                yield ppb.MicroBatch(2, str(sequence).encode(), inputs)
            if sequence >= in_flight:  # as many are in flight as may be, besides the one that is read
                all_arrive(min(sequence + 1, count))
                told.append((tag, before, tensors["tokens"].tolist()))

    with runner(hub, 0, in_flight) as first:
        assert list(first.run(microbatches(first))) == [None] * count
    thread.join(LONGEST_SECONDS)
    assert not thread.is_alive() and not failures
    assert told == [(str(i).encode(), [4 * (i + 1)] * 2, [4 * (i + 1)] * 2) for i in range(count)]
    assert first.stats.recv_allocations == 0


@pytest.mark.parametrize("in_flight", [None, 2])
def test_micro_batches_without_feedback_are_passed_over_and_counted_in_flight(in_flight: int | None) -> None:
    """Chunks of a prompt: of three in a row only the last one is answered; three stages, so that one passes it on."""
    hub, asked, most = LocalHub(3, LONGEST_SECONDS), [number % 3 == 2 for number in range(12)], [0]
    ended, told = [0], []

    def play(stage: int) -> None:
        with runner(hub, stage, in_flight) as own:
            for _ in own.run(microbatches(own) if stage == 0 else None):
                ended[0] += stage == 2
                time.sleep(0.002 * (stage == 2))

    def microbatches(first: ppb.StageRunner) -> Iterator[ppb.MicroBatch]:
        with pytest.raises(errors.PPPiecewiseError, match="none is under way"):
            first.feedback()
        for number, has_feedback in enumerate(asked):
            most[0] = max(most[0], number + 1 - ended[0])
            inputs = {"input_ids": torch.full((2,), number)}
            yield ppb.MicroBatch(2, str(number).encode(), inputs, feedback=has_feedback)
        for _ in range(sum(asked)):
            tag, tensors = first.feedback()
            told.append((int(tag), tensors["tokens"].tolist()))
        with pytest.raises(errors.PPPiecewiseError, match="none is under way"):
            first.feedback()

    in_threads_of_their_own(play, 3)
    assert told == [(number, [4 * (number + 1)] * 2) for number in (2, 5, 8, 11)]
    if in_flight is not None:
        assert most[0] <= in_flight + 2  # asked for before there is room, and counted after the notice has left


def test_without_feedback_the_last_stage_sends_nothing() -> None:
    hub = LocalHub(2, LONGEST_SECONDS)
    headers: dict[int, int] = {}

    def play(stage: int) -> None:
        with runner(hub, stage, None) as own:
            batches = [ppb.MicroBatch(2, feedback=False)] * 4
            for _ in own.run(batches if stage == 0 else None):
                pass
        headers[stage] = own.stats.headers

    in_threads_of_their_own(play, 2)
    assert headers == {0: 4, 1: 4}, "those of the proxies"


def in_threads_of_their_own(play: Callable[[int], None], count: int) -> None:
    failures: list[BaseException] = []

    def one(stage: int) -> None:
        try:
            play(stage)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=one, args=(stage,), daemon=True) for stage in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONGEST_SECONDS)
    assert not any(thread.is_alive() for thread in threads)
    for failure in failures:
        raise failure

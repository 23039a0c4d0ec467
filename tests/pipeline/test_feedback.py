"""Feedback from the last stage to the first: what the first one may keep while more comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import pp_piecewise_backend as ppb
from pp_piecewise_backend.pipeline.transports.local import LocalHub

pytestmark = pytest.mark.usefixtures("fresh_backend")

LONGEST_SECONDS = 60.0
PROXIES = {"hidden_states": ppb.Proxy((4,), torch.float32)}
TOKENS = {"tokens": ppb.Proxy((), torch.int64)}


class First(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"hidden_states": input_ids[:, None].float().expand(-1, 4) + 1}


class Last(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"tokens": hidden_states.sum(1).long()}


def runner(hub: LocalHub, stage: int, in_flight: int) -> ppb.StageRunner:
    return ppb.StageRunner(
        Last() if stage else First(),
        make_inputs=lambda n, tag: {} if stage else {"input_ids": torch.zeros(n, dtype=torch.int64)},
        max_tokens=4,
        inputs=PROXIES if stage else None,
        outputs=None if stage else PROXIES,
        feedback=TOKENS,
        transport=hub.transport(stage),
        max_in_flight=in_flight,
        options={"compiler": "eager", "graphs": "off"},
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

"""The delay that benchmarks put on links: how long tensors take, and who waits for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from handoff_ranks import delayed_link, run, timed
from pp_piecewise_backend.pipeline.transports.base import Transport, Wire
from pp_piecewise_backend.pipeline.transports.local import LocalHub

SECONDS = 0.2
SLACK_SECONDS = 0.15
"""For a busy machine; less than one more delay."""


def test_delayed_ends_have_all_that_a_pipeline_asks_of_a_transport() -> None:
    transport = LocalHub(2).transport(0)
    delayed = delayed_link().DelayedTransport(transport, SECONDS)
    assert members(Transport) - set(dir(delayed)) == set()
    assert members(Wire) - set(dir(delayed.wire(0, 1, "proxies"))) == set()


def members(protocol: type) -> set[str]:
    names = {*vars(protocol), *protocol.__annotations__}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.process
@pytest.mark.parametrize("transport", ["local", "p2p", "shared_memory"])
@pytest.mark.parametrize("waits_for_memory", [True, False])
def test_tensors_arrive_after_the_delay_and_nobody_else_waits(
    transport: str, waits_for_memory: bool, tmp_path: Path
) -> None:
    delayed = {"seconds": SECONDS, "waits_for_memory": waits_for_memory}
    outcomes = run(transport, timed, 2, tmp_path, delayed=delayed)
    assert all(outcome.error is None for outcome in outcomes), outcomes
    sender, receiver = (outcome.value for outcome in outcomes)
    both = zip(sender["sent_at"], receiver["named_at"], strict=True)
    left_at = [max(sent, named) if waits_for_memory else sent for sent, named in both]
    for left, arrived in zip(left_at, receiver["arrived_at"], strict=True):
        # Several are under way at once, and none waits for the one before it.
        assert SECONDS <= arrived - left < SECONDS + SLACK_SECONDS
    assert sender["arrived_at"][-1] < receiver["arrived_at"][-1] - SECONDS / 2, "the sender waited"

"""Landing memory that is lent when the pipeline breaks."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

import pp_piecewise_backend as ppb
from pp_piecewise_backend.errors import PeerLost
from pp_piecewise_backend.pipeline.inbox import Inbox
from pp_piecewise_backend.utils.counters import Stats


class BrokenReceiver:
    """Announces nothing, and says that the pipeline is broken once it is."""

    headers_waiting = 0
    on_news: Callable[[], None]
    is_broken = False

    def landing_memory(self, max_tokens: int) -> dict[str, torch.Tensor]:
        return {}

    def check(self, doing: Callable[[], str]) -> None:
        if self.is_broken:
            raise PeerLost(f"{doing()}: the neighbour is gone")

    def breaks(self) -> None:
        self.is_broken = True
        self.on_news()


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("asks", ["take", "wait_for"])
def test_who_waits_with_all_memory_lent_hears_of_a_loss(asks: str, early: bool) -> None:
    receiver = BrokenReceiver()
    stage = ppb.Stage({"hidden_states": ppb.Proxy((4,), torch.float32)}, 8, "cpu")
    inbox = Inbox(receiver, stage, Stats(), early=early)  # type: ignore[arg-type]
    assert inbox.is_lent
    threading.Timer(0.2, receiver.breaks).start()
    found: list[BaseException] = []

    def wait() -> None:
        try:
            if asks == "wait_for":
                inbox.wait_for(1)
            inbox.take()
        except PeerLost as error:
            found.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), f"{asks}() still waits"
    assert "waiting for the next micro-batch: the neighbour is gone" in str(found)

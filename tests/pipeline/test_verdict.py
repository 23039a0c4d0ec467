"""Why a transfer broke is for the listener to say, whichever thread finds it broken and whatever it holds meanwhile."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import pp_piecewise_backend as ppb
from pp_piecewise_backend.pipeline.fault import Fault, Loss
from pp_piecewise_backend.pipeline.header import Header, Kind
from pp_piecewise_backend.pipeline.inbox import Inbox
from pp_piecewise_backend.pipeline.link import LinkSettings, Receiver, Sender, Sibling
from pp_piecewise_backend.pipeline.plan import Plan, Schema
from pp_piecewise_backend.pipeline.positions import Positions
from pp_piecewise_backend.pipeline.report import TimesOfRanks
from pp_piecewise_backend.pipeline.transports.base import Patience
from pp_piecewise_backend.runtime.cudagraphs.ladder import Ladder
from pp_piecewise_backend.utils.counters import Stats

PROXIES = {"hidden_states": ppb.Proxy((4,), torch.float32)}
LADDER = Ladder((1, 2, 4))


class HungUp:
    """A wire whose other end hangs up: it announced a micro-batch, and then another one, and that it failed.

    The second half is heard once somebody asks for the tensors of the first, which finds the wire broken.
    """

    def __init__(self, plan: Plan) -> None:
        self.refuses = False
        """Whether the other end takes no more messages."""
        self._plan = plan
        self._messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def say(self, kind: Kind, sequence: int, num_tokens: int = 0, tag: bytes = b"") -> None:
        header = Header(kind, self._plan.fingerprint, sequence, 0, num_tokens, bucket_tokens=num_tokens, tag=tag)
        self._messages.put(header.pack())

    def hear(self, timeout_seconds: float) -> bytes:
        return self._messages.get(timeout=timeout_seconds)

    def offer(self, tensors: Sequence[torch.Tensor]) -> bool:
        raise ConnectionResetError("the other end hung up")

    def receive(self, tensors: Sequence[torch.Tensor]) -> Any:
        self.say(Kind.DATA, 1, 2)
        self.say(Kind.FAILED, 0, tag=b"ValueError")
        raise ConnectionResetError("the other end hung up")

    def landing_memory(self, num_bytes: int) -> None:
        return None

    def tell(self, message: bytes) -> None:
        if self.refuses:
            raise BrokenPipeError("the other end hung up")

    def flush(self, timeout_seconds: float) -> None: ...

    def finish(self) -> None: ...

    def break_data(self) -> None: ...

    def break_control(self) -> None: ...


def receiver() -> tuple[HungUp, Receiver]:
    plan = Plan(LADDER, stage_count=2, has_feedback=False, fingerprint=7)
    wire = HungUp(plan)
    positions, times = Positions(1), TimesOfRanks((0, 1), 1)
    settings = LinkSettings(plan, Patience(silence_seconds=30.0), Fault(positions), Stats(), times, positions)
    return wire, Receiver(wire, Schema(PROXIES), own_rank=1, peer_rank=0, settings=settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("spare_count", [None, 1])
@pytest.mark.parametrize("early", [True, False], ids=["posted by the listener", "posted by the reader"])
def test_a_receive_posted_too_late_names_what_failed(early: bool, spare_count: int | None) -> None:
    wire, incoming = receiver()
    inbox = Inbox(incoming, ppb.Stage(PROXIES, 4, "cpu"), Stats(), spare_count=spare_count, early=early)
    inbox.release()
    threading.Timer(0.2, wire.say, (Kind.DATA, 0, 2)).start()  # the reader waits by then
    incoming.start()
    with pytest.raises(ppb.errors.PeerLost, match=r"rank 0 failed \(ValueError\)"):
        inbox.take()


def test_a_rank_that_hangs_up_is_heard_to_the_end() -> None:
    """It stopped and failed after all; that nothing more reaches it is no reason not to listen."""
    wire, incoming = receiver()
    incoming.start(closes_in_turn=True)
    incoming.say_stop()
    wire.refuses = True
    wire.say(Kind.STOP, 0)
    wire.say(Kind.FAILED, 0, tag=b"ValueError")
    with pytest.raises(ppb.errors.PeerLost, match=r"rank 0 failed \(ValueError\)"):
        incoming.wait_for_closed()


def test_what_a_rank_sends_is_broken_before_its_streams_are_let_go() -> None:
    """Else a stream that no more waits for its input could pass on what it computes of anything."""
    broken = []

    class OneEnd:
        def __init__(self, is_receiver: bool) -> None:
            self.is_receiver = is_receiver

        def tell_failure(self, loss: Loss) -> None:
            assert not broken

        def break_off(self) -> None:
            assert fault.loss is not None
            broken.append(self.is_receiver)

    fault = Fault(Positions(0))
    for is_receiver in (True, False, True, False):
        fault.add(OneEnd(is_receiver))
    fault.record(Loss(0, "test", "it is gone"))
    assert broken == [False, False, True, True]
    assert Receiver.is_receiver and not Sender.is_receiver and not Sibling.is_receiver

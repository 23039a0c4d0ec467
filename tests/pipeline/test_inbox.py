"""Landing memory: when it is made, and when it is lent as the pipeline breaks."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pp_piecewise_backend as ppb
from models.small_pipeline import FEEDBACK, MAX_TOKENS, PROXIES
from pp_piecewise_backend.errors import PeerLost
from pp_piecewise_backend.pipeline import inbox as inbox_module
from pp_piecewise_backend.pipeline.header import Header, Kind
from pp_piecewise_backend.pipeline.inbox import Inbox
from pp_piecewise_backend.pipeline.transports.base import Pending
from pp_piecewise_backend.pipeline.transports.local import InProcess
from pp_piecewise_backend.runtime import stage as stage_module
from pp_piecewise_backend.utils.counters import Stats
from stages_in_threads import all_well, in_threads, warm_up_alone


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


class Receiver(BrokenReceiver):
    """One whose sender announces ``sizes_tokens``, and notes what is called."""

    def __init__(self, takes_offers: bool) -> None:
        self.takes_offers = takes_offers
        self.headers: deque[Header] = deque()
        self.calls: list[tuple[str, int, int]] = []
        self.numbers: dict[int, int] = {}

    @property
    def headers_waiting(self) -> int:  # type: ignore[override]
        return len(self.headers)

    def announce(self, num_tokens: int) -> None:
        self.headers.append(Header(Kind.DATA, b"", 0, 0, num_tokens, num_tokens))
        self.on_news()

    def next_header(self) -> Header:
        return self.headers.popleft()

    def offer(self, views: Mapping[str, torch.Tensor]) -> bool:
        self._note("offer", views)
        return self.takes_offers

    def receive(self, header: Header, views: Mapping[str, torch.Tensor]) -> Pending:
        self._note("receive", views)
        return Pending(lambda: None)

    def _note(self, call: str, views: Mapping[str, torch.Tensor]) -> None:
        (view,) = views.values()
        self.calls.append((call, self.numbers.setdefault(view.data_ptr(), len(self.numbers)), len(view)))


def feedback(receiver: Receiver, **changes: Any) -> Inbox:
    slot = ppb.Stage({"tokens": ppb.Proxy((), torch.int64)}, 8, "cpu")
    inbox = Inbox(receiver, slot, Stats(), **{"spare_count": 1, **changes})  # type: ignore[arg-type]
    inbox.release()
    return inbox


def test_free_memory_is_offered_before_anything_is_announced() -> None:
    receiver = Receiver(takes_offers=True)
    inbox = feedback(receiver)
    assert receiver.calls == [("offer", 0, 8), ("offer", 1, 8)]
    receiver.announce(3)
    receiver.announce(2)
    assert receiver.calls[2:] == [("receive", 0, 3), ("receive", 1, 2)], "in the order of the offers"
    receiver.announce(5)
    assert receiver.calls[4:] == [("receive", 2, 5)], "with none left, further memory is made"
    inbox.take()
    inbox.release()
    assert receiver.calls[5:] == [("offer", 0, 8)]


@pytest.mark.parametrize(
    ("takes_offers", "changes"), [(False, {}), (True, {"early": False}), (True, {"spare_count": None})]
)
def test_memory_is_not_offered_where_that_cannot_be_or_was_not_asked_for(
    takes_offers: bool, changes: dict[str, Any]
) -> None:
    receiver = Receiver(takes_offers)
    inbox = feedback(receiver, **changes)
    receiver.announce(3)
    inbox.take()
    inbox.release()
    calls = [call for call, _, _ in receiver.calls]
    assert calls[calls.index("receive") :] == ["receive"] and calls.count("offer") <= (not takes_offers)


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


class Allocations:
    """Landing memory that stages made themselves, and that links made; in bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by_stages: list[int] = []
        self.by_links: list[int] = []
        allocate, make = stage_module.allocate, InProcess.make

        def allocated(num_bytes: int, device: torch.device) -> torch.Tensor:
            self.by_stages.append(num_bytes)
            return allocate(num_bytes, device)

        def made(link: InProcess, num_bytes: int) -> torch.Tensor:
            self.by_links.append(num_bytes)
            return make(link, num_bytes)

        monkeypatch.setattr(stage_module, "allocate", allocated)
        monkeypatch.setattr(InProcess, "make", made)


@pytest.mark.usefixtures("fresh_backend", "one_program")
def test_landing_memory_is_made_once_where_the_link_puts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies of one micro-batch on the second stage; on the first, feedback of one that is read and of four more."""
    made = Allocations(monkeypatch)
    all_well(in_threads(2, lambda runner, stage: warm_up_alone(runner)))
    proxies = [MAX_TOKENS * proxy.bytes_per_token for proxy in PROXIES.values()]
    feedback = [MAX_TOKENS * proxy.bytes_per_token for proxy in FEEDBACK.values()] * (1 + 2 * 2)
    assert sorted(made.by_links) == sorted([*proxies, *feedback]) and made.by_stages == []


def test_landing_memory_is_made_at_first_use_where_any_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Allocations(monkeypatch)
    stage = ppb.Stage({"hidden_states": ppb.Proxy((4,), torch.float32)}, 8, "cpu")
    inbox = Inbox(BrokenReceiver(), stage, Stats())  # type: ignore[arg-type]
    assert inbox.is_lent and made.by_stages == []
    address = stage.views(3)["hidden_states"].data_ptr()
    assert stage.landing("hidden_states").data_ptr() == stage.views(8)["hidden_states"].data_ptr() == address
    assert made.by_stages == [8 * 16] and made.by_links == []


def test_a_mark_counts_once_per_micro_batch() -> None:
    receiver = Receiver(takes_offers=False)
    inbox = feedback(receiver)
    assert not inbox.mark_read(), "nothing is lent"
    for _ in range(2):
        receiver.announce(3)
        inbox.take()
        assert inbox.mark_read() and not inbox.mark_read()
        inbox.release()
        assert not inbox.mark_read()


def begins_of_fillings(receiver: Receiver) -> list[torch.Event]:
    """Events at which a GPU may begin to fill memory, from now on."""
    begins: list[torch.Event] = []

    def receive(header: Header, views: Mapping[str, torch.Tensor]) -> Pending:
        begins.append(torch.accelerator.current_stream().record_event())
        return Pending(lambda: None)

    receiver.receive = receive  # type: ignore[method-assign]
    return begins


@pytest.mark.cuda
@pytest.mark.parametrize("is_marked", [True, False])
def test_memory_is_free_when_it_was_marked_as_read_on_a_gpu(is_marked: bool) -> None:
    """Not when all has run that was enqueued before ``release``."""
    receiver = Receiver(takes_offers=False)
    landing = ppb.Stage({"tokens": ppb.Proxy((), torch.int64)}, 8, torch.device("cuda"))
    inbox = Inbox(receiver, landing, Stats())  # type: ignore[arg-type]
    inbox.release()
    receiver.announce(3)
    inbox.take()
    if is_marked:
        inbox.mark_read()
    torch.cuda._sleep(1_000_000_000)  # about half a second
    has_slept = torch.cuda.current_stream().record_event()
    fillings = begins_of_fillings(receiver)
    receiver.announce(3)
    inbox.release()
    (begins,) = fillings
    begins.synchronize()
    assert has_slept.query() is not is_marked


@pytest.mark.cuda
@pytest.mark.parametrize("is_marked", [True, False])
def test_memory_that_is_read_again_and_again_is_free_after_the_latest_reader(is_marked: bool) -> None:
    """Its event is recorded again each time."""
    receiver, landing = Receiver(takes_offers=False), ppb.Stage(FEEDBACK, MAX_TOKENS, torch.device("cuda"))
    inbox = Inbox(receiver, landing, Stats())  # type: ignore[arg-type]
    inbox.release()
    reads, begins = list[torch.Event](), begins_of_fillings(receiver)
    receiver.announce(3)
    for _ in range(3):
        inbox.take()
        torch.cuda._sleep(100_000_000)
        reads.append(torch.cuda.current_stream().record_event())
        if is_marked:
            inbox.mark_read()
        receiver.announce(3)
        inbox.release()
        begins[-1].synchronize()
        assert reads[-1].query(), "it was filled before it had been read"


class Reached:
    """Stands for an event of a GPU: at which number of things enqueued it is, and when the GPU comes there."""

    def __init__(self, at: int, waited: list[int], is_there: Callable[[], bool] = lambda: True) -> None:
        self.at, self._waited, self._is_there = at, waited, is_there

    def query(self) -> bool:
        self._waited.append(self.at)
        return self._is_there()


def test_what_lands_is_confirmed_as_of_then_or_only_once_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    receiver, enqueued, asked, waited = Receiver(takes_offers=False), 0, list[int](), list[int]()
    inbox = feedback(receiver, hands_out=True, early=False)
    inbox._stream = torch.Stream("cpu")  # as on an accelerator

    def reached(inbox: Inbox, read: ppb.Stage | None = None) -> Any:
        if read is None:
            asked.append(enqueued)
        return Reached(enqueued, waited)

    monkeypatch.setattr(Inbox, "_reached", reached)
    for confirms, at_landing, confirmed_at in ((True, [1], 1), (False, [], 3)):
        receiver.announce(2)
        enqueued, asked[:], waited[:] = 1, [], []
        inbox.take(confirms=confirms)
        assert asked == at_landing and inbox.is_unconfirmed and not waited
        enqueued = 3
        inbox.confirm()
        assert waited == [confirmed_at] and not inbox.is_unconfirmed
        inbox.confirm()
        assert waited == [confirmed_at], "a second time there is nothing to wait for"
        inbox.release()


def test_what_was_taken_unconfirmed_is_confirmed_with_what_was_taken_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    receiver, waited = Receiver(takes_offers=False), list[int]()
    inbox = feedback(receiver, hands_out=True, early=False)
    inbox._stream = torch.Stream("cpu")
    count = iter(range(9))
    monkeypatch.setattr(Inbox, "_reached", lambda inbox, read=None: Reached(next(count), waited))
    for confirms in (True, False):
        receiver.announce(2)
        inbox.take(confirms=confirms)
    inbox.confirm()
    assert waited and waited[0] > 0, "not as of the first one, after which the second has landed"


class Device:
    """Of which one event is asked for: the GPU comes there some time after somebody waits, or never."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.receiver, self.looks = Receiver(takes_offers=False), list[int]()
        self.pauses: list[float] = []
        self.is_there: Callable[[], bool] = lambda: False
        self.inbox = feedback(self.receiver, hands_out=True, early=False)
        self.inbox._stream = torch.Stream("cpu")

        def pause(seconds: float) -> None:
            self.pauses.append(seconds)
            time.sleep(seconds)

        clock = SimpleNamespace(monotonic=time.monotonic, time_ns=time.time_ns, sleep=pause)
        monkeypatch.setattr(Inbox, "_reached", lambda *_: Reached(0, self.looks, lambda: self.is_there()))
        monkeypatch.setattr(inbox_module, "time", clock)
        self.receiver.announce(2)
        self.inbox.take()

    def comes_after(self, seconds: float) -> None:
        there_at = time.monotonic() + seconds
        self.is_there = lambda: time.monotonic() >= there_at


def test_what_has_landed_is_confirmed_by_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    device.is_there = lambda: True
    device.inbox.confirm()
    assert len(device.looks) == 1 and device.pauses == []


def test_a_short_wait_for_the_device_has_no_pause_and_lets_other_threads_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "_LOOKING_SECONDS", 60.0)
    device, is_running = Device(monkeypatch), threading.Event()
    device.is_there = is_running.is_set  # another thread must run for that
    thread = threading.Timer(0.01, is_running.set)
    thread.start()
    switches_every = sys.getswitchinterval()
    sys.setswitchinterval(60.0)  # by nothing but what the wait itself does for them
    try:
        device.inbox.confirm()
    finally:
        sys.setswitchinterval(switches_every)
    thread.join()
    assert len(device.looks) > 1 and device.pauses == []


def test_pauses_of_a_long_wait_for_the_device_grow_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    device.comes_after(0.2)
    device.inbox.confirm()
    assert device.pauses == sorted(device.pauses) and 1e-4 <= device.pauses[0] <= device.pauses[-1] <= 1e-3


def test_a_device_that_is_let_go_says_at_once_that_the_pipeline_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "_LETTING_GO_SECONDS", 60.0)
    device = Device(monkeypatch)
    threading.Timer(0.05, device.receiver.breaks).start()
    device.comes_after(0.15)
    with pytest.raises(PeerLost, match="waiting for tensors to land: the neighbour is gone"):
        device.inbox.confirm()
    assert device.is_there()


@pytest.mark.parametrize("breaks", ["before", "meanwhile"])
def test_a_device_that_is_never_let_go_does_not_keep_the_host(breaks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "_LETTING_GO_SECONDS", 0.2)
    device, found = Device(monkeypatch), list[tuple[float, BaseException]]()
    broke_at = time.monotonic() + 0.1 * (breaks == "meanwhile")
    if breaks == "before":
        device.receiver.breaks()
    else:
        threading.Timer(0.1, device.receiver.breaks).start()

    def confirm() -> None:
        try:
            device.inbox.confirm()
        except PeerLost as error:
            found.append((time.monotonic() - broke_at, error))

    thread = threading.Thread(target=confirm, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "confirm() still waits"
    ((seconds, error),) = found
    assert seconds >= 0.2 and "waiting for tensors to land: the neighbour is gone" in str(error)
    assert not device.inbox.is_unconfirmed

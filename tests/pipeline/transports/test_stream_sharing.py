"""Streams that wait for another process: no host does, faults let them go, and nothing worthless is accepted."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import stream_scenarios
from emulated_streams import EmulatedMemory, EmulatedSharing, Stream, enqueueing_on
from handoff_ranks import (
    SILENCE_SECONDS,
    all_well,
    early_end,
    fault,
    run,
    steady,
    survivors_lose_their_peer,
)
from pp_piecewise_backend.pipeline.transports import stream_sharing
from pp_piecewise_backend.pipeline.transports.cuda_ipc import CudaStreams
from pp_piecewise_backend.pipeline.transports.one_machine import OneMachineWire

pytestmark = [
    pytest.mark.compat,
    pytest.mark.skipif(not EmulatedMemory().place(), reason="memory files and their descriptors are Linux's"),
]

SECONDS = 20.0


class Link:
    """Both ends of one link, here in one process, each rank with a stream on which it computes."""

    def __init__(self) -> None:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(3)]
        self.lines = pairs[2]
        self.receiver, self.sender = (
            OneMachineWire(pairs[0][end], pairs[1][end], EmulatedSharing(pairs[2][end], end == 1), SECONDS)
            for end in (0, 1)
        )
        self.computing, self.using = Stream(), Stream()
        self.sent: list[torch.Tensor] = []
        """Kept, as an allocator does that knows of streams."""
        self.landing = self.receiver.landing_memory(64)[:64].view(torch.float32)

    def send(self, tensor: torch.Tensor) -> None:
        self.sent.append(tensor)
        with enqueueing_on(self.computing):
            self.sender.send([tensor]).wait()

    def receive(self, stream: Stream | None = None) -> None:
        """Name the landing memory once ``stream`` has read it, and let ``using`` wait for what comes."""
        with enqueueing_on(stream or self.using):
            pending = self.receiver.receive([self.landing])
        with enqueueing_on(self.using):
            pending.wait()

    def used(self) -> list[float]:
        """What ``using`` finds in landing memory when it comes to it."""
        found: list[float] = []
        self.using.enqueue(lambda: found.append(self.landing[0].item()))
        return found

    def lose_sender(self) -> None:
        """As the kernel does for a process that dies."""
        for line in (self.sender._messages, self.sender._data):
            line.hang_up()
        self.lines[1].shutdown(socket.SHUT_RDWR)


@pytest.fixture
def link() -> Iterator[Link]:
    made = Link()
    yield made
    made.receiver.break_data()
    made.sender.break_data()
    made.sender.close()
    made.receiver.close()


def full(value: float) -> torch.Tensor:
    return torch.full((16,), float(value))


def soon(condition: object, seconds: float = SECONDS) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.002)
    return condition()  # type: ignore[operator,no-any-return]


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What holds back a stream on which ``held_by`` was called."""
    event = threading.Event()
    yield event
    event.set()


def held_by(gate: threading.Event, stream: Stream) -> None:
    stream.enqueue(lambda: gate.wait())


# ------------------------------------------------------------------------------- what goes right


def test_the_receiver_enqueues_before_the_sender_has_begun(link: Link) -> None:
    link.receive()
    found = link.used()  # returned, although nothing was sent
    assert not found
    link.send(full(3.0))
    link.using.synchronize()
    assert found == [3.0]


def test_a_stream_waits_for_the_data_and_the_landing_memory_and_no_host_does(link: Link, gate: threading.Event) -> None:
    computed = torch.zeros(16)
    held_by(gate, link.computing)
    link.computing.enqueue(lambda: computed.fill_(5.0))
    was_read, reads = threading.Event(), Stream()
    link.receive()
    first = link.used()
    held_by(was_read, reads)
    link.receive(reads)  # its place may be written once ``reads`` has come that far
    link.send(computed)
    link.send(full(6.0))
    assert not first and not link.using.has_run, "all was enqueued while both streams are held back"
    gate.set()
    assert soon(lambda: first == [5.0])
    time.sleep(0.02)
    assert link.landing.eq(5.0).all(), "the second one may not land yet"
    was_read.set()
    link.using.synchronize()
    assert link.landing.eq(6.0).all()


def test_an_offered_place_is_written_once_its_reader_has_run(link: Link) -> None:
    was_read, reads = threading.Event(), Stream()
    link.landing.fill_(1.0)
    held_by(was_read, reads)
    with enqueueing_on(reads):
        assert link.receiver.offer([link.landing])
    link.send(full(7.0)[:3])
    assert not link.sender._writer, "it was enqueued without a word from the other end"
    time.sleep(0.02)
    assert link.landing.eq(1.0).all()
    was_read.set()
    with enqueueing_on(link.using):
        link.receiver.receive([link.landing[:3]]).wait()
    found = link.used()
    link.using.synchronize()
    assert found == [7.0] and link.landing.tolist() == [7.0] * 3 + [1.0] * 13


def test_transfers_of_many_sizes_arrive_in_order(link: Link) -> None:
    for number in range(40):
        view = link.landing[: number % 16 + 1]
        with enqueueing_on(link.using):
            pending = link.receiver.receive([view])
        link.send(full(number)[: len(view)])
        with enqueueing_on(link.using):
            pending.wait()
        found = link.used()
        link.using.synchronize()
        assert found == [number] and view.eq(number).all()


def test_counters_wrap_around(link: Link) -> None:
    for end in (link.receiver._sharing, link.sender._sharing):
        end._told_count = end._awaited_count = 0xFFFFFFFE
    link.receiver._awaited_count = 0xFFFFFFFE
    for word in (stream_sharing._LANDED, stream_sharing._FREE):
        link.receiver._sharing._set(word, 0xFFFFFFFE)
    for number in range(4):
        link.receive()
        found = link.used()
        assert not found
        link.send(full(number))
        link.using.synchronize()
        assert found == [number]


def test_finishing_waits_for_what_streams_have_still_to_do(link: Link, gate: threading.Event) -> None:
    held_by(gate, link.computing)
    link.receive()
    link.send(full(1.0))
    finished: list[str] = []
    threads = [
        threading.Thread(target=lambda wire=wire, name=name: (wire.finish(), finished.append(name)))
        for name, wire in (("sender", link.sender), ("receiver", link.receiver))
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    assert not finished
    gate.set()
    for thread in threads:
        thread.join(SECONDS)
    assert sorted(finished) == ["receiver", "sender"]
    link.sender.close()  # in order: what it wrote is not revoked
    link.using.synchronize()
    assert link.landing.eq(1.0).all()
    assert link.receiver._sharing._distance(stream_sharing._SOUND, 0) == 0


class Noting:
    """Streams that note what is asked of them."""

    def __init__(self, streams: Any) -> None:
        self._streams = streams
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.asked.append(name)
            return getattr(self._streams, name)(*arguments)

        return call


def test_a_transfer_of_many_tensors_is_few_calls_of_the_device(link: Link) -> None:
    sender, receiver = (Noting(wire._sharing._streams) for wire in (link.sender, link.receiver))  # type: ignore[attr-defined]
    link.sender._sharing._streams, link.receiver._sharing._streams = sender, receiver  # type: ignore[attr-defined]
    views = [link.receiver.landing_memory(64)[:64].view(torch.float32) for _ in range(3)]
    for value in range(2):
        with enqueueing_on(link.using):
            link.receiver.receive(views).wait()
        link.sent = [full(3 * value + at) for at in range(3)]
        with enqueueing_on(link.computing):
            link.sender.send(link.sent).wait()
    link.using.synchronize()
    assert [view[0].item() for view in views] == [3.0, 4.0, 5.0]
    # The current stream has written the tensors; then this end's writes; and the current one waits for that.
    write = ["current", "record", "wait_for_event", "copy", "current", "wait_for_stream"]
    assert sender.asked == 2 * write
    assert receiver.asked == 2 * ["current", "wait_for_stream", "write_word", "current", "wait_for_words"]


@pytest.fixture
def driver() -> tuple[CudaStreams, list[tuple[Any, ...]], dict[str, int]]:
    """Streams of a GPU over a driver that does nothing: they, its calls, and the codes that its functions return."""
    calls: list[tuple[Any, ...]] = []
    codes: dict[str, int] = {}

    def function(name: str) -> Callable[..., int]:
        return lambda *arguments: calls.append((name, *arguments)) or codes.get(name, 0)  # type: ignore[func-returns-value]

    streams = CudaStreams.__new__(CudaStreams)
    names = ("cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuStreamWaitValue32_v2", "cuStreamWriteValue32_v2")
    functions = {name: function(name) for name in (*names, "cuMemcpyAsync", "cuGetErrorName")}
    vars(streams).update(_functions=functions, _context="context", _device=torch.device("cuda", 1))
    return streams, calls, codes


def test_all_of_a_write_is_one_visit_to_the_context_of_the_gpu(driver: Any) -> None:
    streams, calls, _ = driver
    stream = SimpleNamespace(cuda_stream=7)
    streams.copy(stream, (128, 3), [(1000, 2000, 8), (1100, 2100, 16)], (0, 4))
    streams.wait_for_words(stream, [(0, 4), (256, 0)])
    streams.write_word(stream, (128, 5))
    popped = [call[0] for call in calls if call[0] == "cuCtxPopCurrent_v2"]
    assert [call for call in calls if call[0] != "cuCtxPopCurrent_v2"] == [
        ("cuCtxPushCurrent_v2", "context"),
        ("cuStreamWaitValue32_v2", 7, 128, 3, 0),
        ("cuMemcpyAsync", 1000, 2000, 8, 7),
        ("cuMemcpyAsync", 1100, 2100, 16, 7),
        ("cuStreamWriteValue32_v2", 7, 0, 4, 0),
        ("cuCtxPushCurrent_v2", "context"),
        ("cuStreamWaitValue32_v2", 7, 0, 4, 0),
        ("cuStreamWaitValue32_v2", 7, 256, 0, 0),
        ("cuCtxPushCurrent_v2", "context"),
        ("cuStreamWriteValue32_v2", 7, 128, 5, 0),
    ]
    assert len(popped) == 3


def test_a_copy_that_fails_leaves_the_context_and_is_not_told_to_have_landed(driver: Any) -> None:
    streams, calls, codes = driver
    codes["cuMemcpyAsync"] = 700
    with pytest.raises(RuntimeError, match="cuMemcpyAsync"):
        streams.copy(SimpleNamespace(cuda_stream=7), (128, 3), [(1000, 2000, 8), (1100, 2100, 16)], (0, 4))
    names = [call[0] for call in calls]
    assert names.count("cuMemcpyAsync") == 1 and "cuStreamWriteValue32_v2" not in names
    assert names.count("cuCtxPushCurrent_v2") == names.count("cuCtxPopCurrent_v2") == 1


# ------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("at", ["before it sends", "while it computes", "between copy and count"])
def test_a_receiver_lets_its_streams_go_when_the_sender_dies(at: str, link: Link, gate: threading.Event) -> None:
    if at == "between copy and count":
        stream_scenarios.counts_nothing(link.sender._sharing)
    held_by(gate, link.computing)
    link.receive()
    found = link.used()
    if at != "before it sends":
        link.send(full(7.0))
    if at == "between copy and count":
        gate.set()
        assert soon(lambda: link.landing.eq(7.0).all())
    time.sleep(0.02)
    assert not found
    link.lose_sender()
    with pytest.raises(ConnectionError):
        link.receiver.finish()
    link.receiver.break_data()  # as the listener does, once the fault is recorded
    link.using.synchronize(2.0)
    assert len(found) == 1, "a host that waits for the stream goes on"
    with pytest.raises(ConnectionError):
        link.receive()


def test_a_word_that_is_set_back_holds_up_nobody(link: Link) -> None:
    link.receiver.break_data()
    for _ in range(3):
        link.receiver._sharing._set(stream_sharing._LANDED, 0)
        link.receiver._sharing._set(stream_sharing._SOUND, stream_sharing._REVOKED)
        with enqueueing_on(link.using):
            link.receiver._sharing.after_landing(1)
        link.using.synchronize(2.0)


def test_what_a_rank_computes_after_it_gave_up_is_never_accepted(link: Link, gate: threading.Event) -> None:
    """Its streams were let go and compute on anything, so what they send must stop at the next rank."""
    held_by(gate, link.computing)  # waits for a rank before, which died
    link.receive()
    found = link.used()
    link.send(full(666.0))
    link.sender.break_data()
    gate.set()  # only now is the stream let go, see ``Fault``
    assert soon(lambda: link.receiver._sharing._distance(stream_sharing._LANDED, 1) >= 0), "it was counted"
    time.sleep(0.05)
    assert not found and not link.using.has_run
    link.receiver.break_data()
    link.using.synchronize(2.0)


@pytest.mark.parametrize("neighbour", ["knows of the fault", "was stopped", "died"])
def test_a_sender_that_gives_up_does_not_write_where_its_neighbour_still_reads(
    neighbour: str, link: Link, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_sharing, "_NOTICE_SECONDS", 0.2)
    reads = Stream()
    link.receive()
    link.send(full(1.0))
    link.using.synchronize()
    held_by(gate, reads)
    link.receive(reads)
    link.send(full(666.0))
    link.sender.break_data()
    if neighbour == "knows of the fault":
        link.receiver.break_data()
        time.sleep(0.4)
        assert link.landing.eq(1.0).all(), "its neighbour has still to read it"
        gate.set()
    elif neighbour == "died":
        link.lines[0].shutdown(socket.SHUT_RDWR)
    assert soon(lambda: link.sender._sharing._stream.has_run, 2.0)


def test_a_process_that_dies_hangs_up(link: Link) -> None:
    sender, receiver = link.sender._sharing, link.receiver._sharing
    link.lines[1].send(b"x")
    assert not receiver._neighbour_is_gone() and not sender._neighbour_is_gone(), "unread bytes are no hang-up"
    link.lose_sender()
    assert receiver._neighbour_is_gone()


def test_closing_leaves_no_thread_behind_and_ends_in_time(link: Link) -> None:
    link.receive()
    link.lose_sender()
    began = time.monotonic()
    link.receiver.close()
    assert time.monotonic() - began < 2.0
    thread = link.receiver._sharing._letting_go
    assert thread is not None and not thread.is_alive()


# ------------------------------------------------------------------------------ whole pipelines


@pytest.mark.process
def test_micro_batches_arrive_in_order_and_whole(tmp_path: Path) -> None:
    all_well(run("emulated", steady, 3, tmp_path, microbatches=40, delay_seconds=0.003))


@pytest.mark.process
def test_the_last_stage_can_ask_for_an_early_end(tmp_path: Path) -> None:
    counts = [outcome.value for outcome in all_well(run("emulated", early_end, 3, tmp_path))]
    assert len(set(counts)) == 1 and counts[0] >= 3


@pytest.mark.process
@pytest.mark.parametrize(("kind", "victim"), [("SIGKILL", 1), ("SIGSTOP", 0), ("SIGSTOP", 1)])
def test_a_rank_that_dies_or_stops_is_lost_to_all(kind: str, victim: int, tmp_path: Path) -> None:
    outcomes = run("emulated", fault, 3, tmp_path, SILENCE_SECONDS, kind=kind, victim=victim)
    survivors_lose_their_peer(outcomes, victim, SILENCE_SECONDS)


# ------------------------------------------------------------------------------------- on GPUs


@pytest.mark.process
@pytest.mark.cuda
def test_a_host_enqueues_its_work_while_the_sender_still_computes(tmp_path: Path) -> None:
    _, last = all_well(run("cuda_ipc", stream_scenarios.does_not_wait, 2, tmp_path))
    print(last.value)
    assert last.value["enqueued_seconds"] < stream_scenarios.HELD_SECONDS / 4
    assert not last.value["was_done"] and last.value["total_seconds"] > stream_scenarios.HELD_SECONDS / 2


@pytest.mark.process
@pytest.mark.cuda
@pytest.mark.parametrize("stages", [2, 3])
def test_closing_in_order_loses_nothing_that_streams_have_still_to_do(stages: int, tmp_path: Path) -> None:
    all_well(run("cuda_ipc", stream_scenarios.closes_with_work_left, stages, tmp_path))


@pytest.mark.process
@pytest.mark.cuda
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize(
    "at", ["before the copy", "while it computes", "between copy and count", "stopped before the copy"]
)
def test_what_never_landed_is_never_handed_out(at: str, stages: int, tmp_path: Path) -> None:
    stopped = at.startswith("stopped")
    kind = {"kind": "SIGSTOP"} if stopped else {}
    outcomes = run("cuda_ipc", stream_scenarios.loses, stages, tmp_path, SILENCE_SECONDS, at=at, victim=0, **kind)
    survivors_lose_their_peer(outcomes, 0, SILENCE_SECONDS if stopped else 0.0)


@pytest.mark.process
@pytest.mark.cuda
def test_a_rank_that_let_its_streams_go_passes_nothing_on(tmp_path: Path) -> None:
    outcomes = run("cuda_ipc", stream_scenarios.passes_nothing_on, 3, tmp_path, silence_seconds=20.0)
    assert [outcome.error for outcome in outcomes[1:]] == ["PeerLost"] * 2, [outcome.log for outcome in outcomes]

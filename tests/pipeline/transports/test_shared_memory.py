"""Links through the memory of one machine: what only they do. ``test_handoff_transports.py`` tests what all do."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pp_piecewise_backend import errors
from pp_piecewise_backend.pipeline.transports import one_machine, shared_memory, sockets
from pp_piecewise_backend.pipeline.transports.base import MESSAGE_BYTES
from pp_piecewise_backend.pipeline.transports.choosing import Auto
from pp_piecewise_backend.pipeline.transports.one_machine import OneMachine, OneMachineWire
from pp_piecewise_backend.pipeline.transports.shared_memory import HostMemory, HostSharing

pytestmark = [
    pytest.mark.compat,
    pytest.mark.skipif(not shared_memory.HostMemory().place(), reason="memory files and their descriptors are Linux's"),
]

SECONDS = 20.0


@pytest.fixture
def wires() -> Iterator[tuple[OneMachineWire, OneMachineWire]]:
    """The sending and the receiving end of one link, here in one process."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(3)]
    ends = tuple(
        OneMachineWire(messages, data, HostSharing(memory), SECONDS)
        for messages, data, memory in zip(*pairs, strict=True)
    )
    yield ends
    for end in ends:
        end.close()


def landing(receiver: OneMachineWire, rows: int = 8) -> torch.Tensor:
    return receiver.landing_memory(rows * 16)[: rows * 16].view(torch.float32).view(rows, 4)


def numbers(rows: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + rows * 4, dtype=torch.float32).view(rows, 4)


def test_the_sender_writes_before_the_receiver_asks(wires: tuple[OneMachineWire, OneMachineWire]) -> None:
    sender, receiver = wires
    one, other = landing(receiver), landing(receiver)
    receiving = receiver.receive([one[:3], other[2:4]])
    sender.send([numbers(3), numbers(2, 100)]).wait()
    assert torch.equal(one[:3], numbers(3)) and torch.equal(other[2:4], numbers(2, 100)), "nobody has waited yet"
    assert not one[3:].any() and not other[:2].any() and not other[4:].any()
    receiving.wait()


def test_tensors_that_are_sent_before_their_places_are_known_arrive_in_order(
    wires: tuple[OneMachineWire, OneMachineWire],
) -> None:
    sender, receiver = wires
    memory = landing(receiver)
    sent = [sender.send([numbers(2, 10 * number)]) for number in range(3)]
    assert len(sender._waiting) == 3
    receiving = [receiver.receive([memory[2 * number : 2 * number + 2]]) for number in range(3)]
    for pending in (*sent, *receiving):
        pending.wait()
    late = receiver.receive([memory[6:]])
    sender.send([numbers(2, 70)]).wait()
    late.wait()
    assert torch.equal(memory.view(4, 2, 4), torch.stack([numbers(2, start) for start in (0, 10, 20, 70)]))


def test_offered_places_take_what_is_sent_before_anything_is_received(
    wires: tuple[OneMachineWire, OneMachineWire],
) -> None:
    sender, receiver = wires
    offered, named = [landing(receiver), landing(receiver)], landing(receiver)
    assert all(receiver.offer([memory]) for memory in offered)
    for number, rows in enumerate((3, 8)):
        sender.send([numbers(rows, 100 * number)]).wait()
    assert not sender._writer and torch.equal(offered[0][:3], numbers(3)) and torch.equal(offered[1], numbers(8, 100))
    assert not offered[0][3:].any()
    pending = [receiver.receive([offered[0][:3]]), receiver.receive([offered[1]]), receiver.receive([named[:1]])]
    sender.send([numbers(1, 200)]).wait()
    for one in pending:
        one.wait()
    assert torch.equal(named[:1], numbers(1, 200)), "once no offer is left, places are named as ever"


def test_a_receive_takes_the_places_that_were_offered(wires: tuple[OneMachineWire, OneMachineWire]) -> None:
    _, receiver = wires
    memory = landing(receiver)
    receiver.offer([memory[:4]])
    with pytest.raises(ValueError, match="offered before"):
        receiver.receive([memory[4:]])


@pytest.mark.parametrize("is_sender", [True, False])
def test_breaking_off_ends_what_waits_on_both_ends(
    is_sender: bool, wires: tuple[OneMachineWire, OneMachineWire]
) -> None:
    sender, receiver = wires
    memory = landing(receiver)
    # The second of two is sent when no place is known, the third receive when nothing is sent.
    pendings = [receiver.receive([memory])] if is_sender else [sender.send([memory]), sender.send([memory])]
    failed: list[Exception] = []

    def wait() -> None:
        for pending in pendings:
            try:
                pending.wait()
            except ConnectionError as error:
                failed.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    time.sleep(0.05)
    (sender if is_sender else receiver).break_data()
    thread.join(SECONDS / 2)
    assert len(failed) == len(pendings)
    with pytest.raises(ConnectionError):
        sender.send([memory])
        pytest.fail("nothing may be sent any more")
    sender.tell(bytes(MESSAGE_BYTES))
    assert receiver.hear(SECONDS) == bytes(MESSAGE_BYTES), "messages still pass"


def test_waiting_takes_no_longer_than_allowed(wires: tuple[OneMachineWire, OneMachineWire]) -> None:
    _, receiver = wires
    with pytest.raises(TimeoutError):
        receiver.hear(0.05)
    with pytest.raises(TimeoutError):
        receiver._data.receive_some(0.05)


def test_what_was_told_can_be_heard_when_the_other_end_is_gone(
    wires: tuple[OneMachineWire, OneMachineWire],
) -> None:
    sender, receiver = wires
    receiver.tell(b"u" * MESSAGE_BYTES)  # never heard, which a socket may take for a reset
    sender.tell(b"d" * MESSAGE_BYTES)
    sender.close()
    assert receiver.hear(SECONDS) == b"d" * MESSAGE_BYTES
    with pytest.raises(ConnectionError):
        receiver.hear(SECONDS)


def test_a_full_line_is_waited_for_no_longer_than_allowed(wires: tuple[OneMachineWire, OneMachineWire]) -> None:
    sender, receiver = wires
    told = 0
    with pytest.raises(TimeoutError):
        for told in range(10**6):
            sender.flush(0.05)
            sender.tell(told.to_bytes(MESSAGE_BYTES, "little"))
    assert told > 20
    assert [int.from_bytes(receiver.hear(SECONDS), "little") for _ in range(told)] == [*range(told)]
    sender.flush(SECONDS)


def test_memory_of_somebody_else_is_refused(wires: tuple[OneMachineWire, OneMachineWire]) -> None:
    _, receiver = wires
    memory = landing(receiver)
    page = torch.zeros(1, dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"shape \[1\] was to be received outside of .*: receive into .*landing_memory"
    ):
        receiver.receive([page])
    receiver.receive([memory])


@pytest.mark.parametrize(("offset", "num_bytes"), [(0, 12), (4096 - 8, 16), (2**40, 16), (4096 - 8, 8)])
def test_a_place_that_does_not_fit_is_an_error_and_nothing_is_written(
    offset: int, num_bytes: int, wires: tuple[OneMachineWire, OneMachineWire]
) -> None:
    sender, receiver = wires
    memory = receiver.landing_memory(4096)
    receiver._data.send(one_machine._PLACE.pack(0, offset, num_bytes))
    with pytest.raises(ConnectionError, match=f"room for {num_bytes} bytes at offset {offset} of its 4096 bytes"):
        sender.send([numbers(1) + 1]).wait()
    assert not memory.any()


def test_memory_is_given_back(wires: tuple[OneMachineWire, OneMachineWire]) -> None:
    sender, receiver = wires
    gc.collect()
    before = shared_mappings()
    memory = landing(receiver)
    receiver.receive([memory])
    sender.send([numbers(8)]).wait()
    assert shared_mappings() == before + 2
    sender.close()
    receiver.close()
    assert shared_mappings() == before + 1 and torch.equal(memory, numbers(8)), "it stays with who uses it"
    del memory
    assert shared_mappings() == before == sum("memfd:pp_piecewise" in name for name in descriptors())


def shared_mappings() -> int:
    return sum("memfd:pp_piecewise landing" in line for line in Path("/proc/self/maps").read_text().splitlines())


def descriptors() -> list[str]:
    names = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of the listing itself
            names.append(os.readlink(path))
    return names


def test_a_stranger_at_the_door_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(sockets.Listener()) as listener:
        name, key = json.loads(listener.address)
        strangers = []
        monkeypatch.setattr(sockets, "_INTRODUCTION_SECONDS", 0.5)
        for said in (b"", b"x", b"x" * 17, bytes(17)):  # the first one says nothing and stays
            strangers.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            strangers[-1].connect(name)
            strangers[-1].sendall(said)
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.extend(listener.accepted(3, SECONDS)), daemon=True)
        thread.start()
        ends = sockets.connected(listener.address, 3, SECONDS)
        thread.join(SECONDS)
        assert len(found) == 3 and len(bytes.fromhex(key)) == 16
        for number, (one, other) in enumerate(zip(ends, found, strict=True)):
            one.sendall(bytes([number]))
            assert other.recv(1) == bytes([number])
        for end in (*ends, *found, *strangers):
            end.close()


class TwoMachines:
    """Stands in for ``P2P`` on ranks 0 and 1 of one machine, and 2 of another."""

    name = "p2p"
    stage, stage_count, setup_seconds = 0, 3, SECONDS
    ranks = (0, 1, 2)

    def __init__(self, *texts: list[str]) -> None:
        """``texts``: what the ranks bring to each exchange; to the first one their machines."""
        self._texts = iter(texts)

    def exchange(self, text: str) -> list[str]:
        return next(self._texts)

    def wire(self, source: int, target: int, name: str) -> str:
        return f"torch.distributed from {source} to {target}"


@pytest.mark.parametrize("machines", [["a", "a", "b"], ["", "", ""]])
def test_hops_between_machines_go_over_torch_distributed(machines: list[str]) -> None:
    transport = Auto(TwoMachines(machines), HostMemory())  # type: ignore[arg-type]
    assert transport.wire(1, 2, "proxies") == "torch.distributed from 1 to 2"
    assert transport.name == "auto"


def test_hops_between_machines_are_refused_where_memory_must_be_shared() -> None:
    transport = OneMachine(TwoMachines(["a", "a", "b"]), HostMemory())  # type: ignore[arg-type]
    with pytest.raises(errors.ConfigError, match="got rank 1 on a and rank 2 on b"):
        transport.wire(1, 2, "proxies")
    assert transport.name == "shared_memory"


def test_nobody_at_the_door_is_a_lost_rank() -> None:
    p2p = TwoMachines(["a", "a", "a"], ["", json.dumps(["\0pp_piecewise nobody", "00"]), ""])
    with pytest.raises(errors.PeerLost, match="rank 0 could not set up proxies from rank 0 to rank 1"):
        OneMachine(p2p, HostMemory()).wire(0, 1, "proxies")  # type: ignore[arg-type]

"""What a GPU may keep for ever is released in bounded time, or left to the end of the process, and blocks nobody."""

from __future__ import annotations

import gc
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from forked import run_program
from handoff_ranks import MARGIN_SECONDS, SILENCE_SECONDS, all_well, fault, run, steady, survivors_lose_their_peer
from like_nccl import Communicator
from pp_piecewise_backend.pipeline.transports import ending, one_machine, torch_distributed
from pp_piecewise_backend.pipeline.transports.ending import Ending
from pp_piecewise_backend.pipeline.transports.one_machine import OneMachineWire, Sharing
from pp_piecewise_backend.pipeline.transports.torch_distributed import P2P, P2PWire, Use, break_group

BOUND_SECONDS = 0.2
WELL_WITHIN_SECONDS = 5.0
"""For what takes no time, on a machine that is busy."""
LEFT = "communicators of NCCL: not released within 0.2 s"


@pytest.fixture(autouse=True)
def short_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_distributed, "_BREAKING_SECONDS", BOUND_SECONDS)


@pytest.fixture
def leaves_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_distributed, "_CLOSING_SECONDS", BOUND_SECONDS)


def in_time(call: Any, *arguments: Any) -> None:
    """It returns, as seen from another thread: a test that hangs says nothing."""
    thread = threading.Thread(target=call, args=arguments, daemon=True)
    thread.start()
    thread.join(WELL_WITHIN_SECONDS)
    assert not thread.is_alive(), "it hangs"


# ------------------------------------------------------------------------------------- groups


def test_groups_that_wait_for_one_another_are_aborted_together_after_a_loss(caplog: pytest.LogCaptureFixture) -> None:
    sends, receives = Communicator(), Communicator()
    sends.behind, receives.behind = [receives], [sends]  # neither can be aborted before the other
    in_time(torch_distributed._end, [sends, receives], True)
    for one in (sends, receives):
        assert one.calls == ["abort", "aborted", "shutdown", "shut down"]
    assert not caplog.records


def test_a_group_that_waits_for_another_one_does_not_keep_that_from_being_broken() -> None:
    receives = Communicator()
    sends = Communicator(behind=[receives])
    began_at = time.monotonic()
    in_time(break_group, sends)
    assert sends.calls == ["abort"] and time.monotonic() - began_at >= BOUND_SECONDS
    in_time(break_group, receives)
    assert receives.calls == ["abort", "aborted"]

    def wait_for_the_abort_that_was_left() -> None:
        while "aborted" not in sends.calls:
            time.sleep(0.001)

    in_time(wait_for_the_abort_that_was_left)
    in_time(torch_distributed._end, [sends, receives], True)
    assert sends.calls == ["abort", "aborted"] * 2 + ["shutdown", "shut down"]


def test_in_order_groups_are_flushed_one_after_the_other_and_not_aborted(caplog: pytest.LogCaptureFixture) -> None:
    groups = [Communicator(is_idle=True) for _ in range(2)]
    in_time(torch_distributed._end, [*groups], False)
    assert [group.calls for group in groups] == [["shutdown", "shut down"]] * 2
    assert not caplog.records


@pytest.mark.usefixtures("leaves_soon")
def test_a_group_whose_peer_stops_at_the_very_end_is_left(caplog: pytest.LogCaptureFixture) -> None:
    busy, next_one = Communicator(), Communicator(is_idle=True)
    in_time(torch_distributed._end, [busy, next_one], False)
    assert busy.calls == ["shutdown"] and not next_one.calls
    assert [LEFT in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.usefixtures("leaves_soon")
@pytest.mark.parametrize("is_broken", [False, True])
def test_what_never_ends_is_destroyed_by_nobody(is_broken: bool, caplog: pytest.LogCaptureFixture) -> None:
    groups = [Communicator(hangs=True)]
    destroyed_by = groups[0].destroyed_by
    in_time(torch_distributed._end, groups, is_broken)
    gc.collect()
    assert not groups and not destroyed_by
    assert [LEFT in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("is_broken", [False, True])
def test_what_ends_is_destroyed_in_its_own_thread(is_broken: bool) -> None:
    groups = [Communicator(is_idle=True) for _ in range(2)]
    found = [group.destroyed_by for group in groups]
    in_time(torch_distributed._end, groups, is_broken)
    assert found == [["end of communicators of NCCL"]] * 2


def test_what_fails_to_end_has_ended(caplog: pytest.LogCaptureFixture) -> None:
    def fails(_: object) -> None:
        raise RuntimeError("it was broken before")

    things: list[Any] = [Communicator()]
    found = things[0].destroyed_by
    ending.wait_for([Ending("things", things, fails)], WELL_WITHIN_SECONDS)
    assert found == ["end of things"] and not caplog.records


# -------------------------------------------------------------------------------------- links


class Transfer:
    def __init__(self) -> None:
        self.is_over = False

    def wait(self) -> None:
        """Of a stream."""

    def is_completed(self) -> bool:
        return self.is_over


def wire_with(transfer: Transfer, longest_seconds: float = 60.0) -> P2PWire:
    wire = P2PWire(Communicator(), Communicator(), True, timedelta(seconds=longest_seconds))
    wire._isend = lambda *_: transfer  # type: ignore[method-assign]
    wire.send([torch.zeros(1)]).wait()
    return wire


def test_the_last_transfer_is_waited_for_while_the_link_listens() -> None:
    transfer = Transfer()
    wire = wire_with(transfer)
    finishing = threading.Thread(target=wire.finish, daemon=True)
    finishing.start()
    finishing.join(BOUND_SECONDS)
    assert finishing.is_alive()
    transfer.is_over = True
    finishing.join(WELL_WITHIN_SECONDS)
    assert not finishing.is_alive()


def test_a_peer_that_stops_before_it_is_lost_in_finish() -> None:
    wire = wire_with(Transfer())
    breaking = threading.Timer(BOUND_SECONDS, wire.break_data)
    breaking.start()
    with pytest.raises(ConnectionError, match="what was under way is lost"):
        wire.finish()
    breaking.join()


def test_finish_waits_no_longer_than_for_data() -> None:
    with pytest.raises(TimeoutError):
        wire_with(Transfer(), longest_seconds=BOUND_SECONDS).finish()


def test_nothing_is_enqueued_on_a_group_that_is_aborted() -> None:
    wire = wire_with(Transfer())
    enqueues, may_go_on = threading.Event(), threading.Event()

    def slow(*_: object) -> Transfer:
        enqueues.set()
        may_go_on.wait()
        return Transfer()

    wire._isend = slow  # type: ignore[assignment, method-assign]
    sending = threading.Thread(target=wire.send, args=([torch.zeros(1)],), daemon=True)
    sending.start()
    enqueues.wait()
    breaking = threading.Thread(target=wire.break_data, daemon=True)
    breaking.start()
    while not wire.is_broken:
        time.sleep(0.001)
    assert not wire._data.calls
    may_go_on.set()
    breaking.join(WELL_WITHIN_SECONDS)
    assert wire._data.calls == ["abort", "aborted"]
    with pytest.raises(ConnectionError):
        wire.send([torch.zeros(1)])


def test_nor_does_a_stage_gather_over_it() -> None:
    whole, use = torch.zeros(2), Use()
    use.end()
    with pytest.raises(ConnectionError):
        torch_distributed.gather(whole, whole[:1], Communicator(), use)


def test_a_link_that_was_tried_and_discarded_is_not_the_loss_of_the_others() -> None:
    p2p = object.__new__(P2P)  # without a world
    p2p._wires = [wire_with(Transfer()) for _ in range(2)]
    p2p._groups = [group for wire in p2p._wires for group in wire.groups]
    tried, kept = (group.calls for group in (p2p._groups[1], p2p._groups[3]))
    p2p._groups[2].has_run.set()
    p2p._groups[3].has_run.set()
    p2p._wires[0].break_data()
    in_time(p2p.discard, p2p._wires[0])
    assert tried == ["abort", "aborted", "abort", "aborted", "shutdown", "shut down"]
    in_time(p2p.close)
    assert kept == ["shutdown", "shut down"] and not p2p._groups


def test_who_hangs_while_it_enqueues_does_not_keep_the_link_from_being_broken() -> None:
    use = Use()
    use.__enter__()
    in_time(use.end)
    assert use.is_over


class Memory:
    """Of another process: who has its last reference waits for a stream."""

    def __init__(self, hangs: bool) -> None:
        self.hangs = hangs

    def __del__(self) -> None:
        if self.hangs:
            threading.Event().wait()


class NoStreams(Sharing):
    streams_wait = True
    make = take = write = None  # type: ignore[assignment]


@pytest.mark.parametrize("hangs", [False, True])
def test_memory_of_another_process_holds_up_nobody(
    hangs: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(one_machine, "_RELEASING_SECONDS", BOUND_SECONDS)
    lines = [end for _ in range(2) for end in socket.socketpair()]
    wire = OneMachineWire(lines[0], lines[2], NoStreams(), 1.0)
    wire._blocks.append(Memory(hangs))  # type: ignore[arg-type]
    in_time(wire.close)
    said = "memory of another process: not released within 0.2 s"
    assert [said in record.getMessage() for record in caplog.records] == [True] * hangs
    for line in lines:
        line.close()


# ---------------------------------------------------------------------------------- processes


@pytest.mark.process
def test_micro_batches_arrive_in_order_and_whole(tmp_path: Path) -> None:
    all_well(run("like nccl", steady, 3, tmp_path, microbatches=20, delay_seconds=0.003))


@pytest.mark.process
@pytest.mark.parametrize(("kind", "victim"), [("SIGSTOP", 0), ("SIGSTOP", 1), ("SIGKILL", 1)])
def test_a_rank_whose_groups_never_end_raises_in_time_and_ends(kind: str, victim: int, tmp_path: Path) -> None:
    groups = {"never_ends": True, "closing_seconds": 1.0}
    outcomes = run("like nccl", fault, 2, tmp_path, SILENCE_SECONDS, kind=kind, victim=victim, **groups)
    (survivor,) = survivors_lose_their_peer(outcomes, victim, SILENCE_SECONDS)
    assert survivor.log.count("communicators of NCCL: not released within 1 s") == 2, survivor.log
    seconds = survivor.ended_at - survivor.raised_at
    print(f"ended {seconds:.2f} s after it raised")
    assert seconds < 1.0 + MARGIN_SECONDS + survivor.waited_seconds


PROGRAM = """
import gc, sys, threading
from pp_piecewise_backend.pipeline.transports import ending

class NeverEnds:
    def end(self):
        print("begins to end", flush=True)
        threading.Event().wait()

    def __del__(self):
        print("destroyed", flush=True)
        threading.Event().wait()

things = [NeverEnds(), NeverEnds()]
ending.wait_for([ending.Ending("things", things, NeverEnds.end)], 0.1)
gc.collect()
sys.exit(7)
"""


@pytest.mark.process
def test_a_process_with_what_never_ends_exits_with_its_code(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    ended = run_program(tmp_path / "program.py", ends_itself=True)
    assert ended.exit_code == 7, ended.log
    assert "begins to end" in ended.log and "destroyed" not in ended.log
    assert "things: not released within 0.1 s" in ended.log

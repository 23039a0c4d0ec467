"""What each rank knows of where all are, when the pipeline breaks."""

from __future__ import annotations

import functools
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from handoff_ranks import plan_of
from pp_piecewise_backend import errors
from pp_piecewise_backend.errors import Position
from pp_piecewise_backend.pipeline import positions as module
from pp_piecewise_backend.pipeline.connect import Links, make_links
from pp_piecewise_backend.pipeline.positions import Place, Positions, Saying, Step, last_positions
from pp_piecewise_backend.pipeline.transports.base import Patience
from pp_piecewise_backend.pipeline.transports.local import LocalHub
from stages_in_threads import together

SECONDS = 20.0


class Neighbour:
    """One end of a link to another ``Positions``, which hears at once."""

    def __init__(self, own: Positions, other: Positions) -> None:
        self.own, self.other = own, other
        self.back: Neighbour | None = None
        self.said = 0
        self.announced: Place | None = None
        own.add(self)

    def pass_on(self, rank: int) -> None:
        saying = self.own.known(rank)
        assert saying is not None and self.back is not None
        heard, _ = Saying.from_bytes(saying.to_bytes(), saying.place.micro_batch)
        self.said += 1
        self.other.hear(rank, heard, self.back)

    def seen(self) -> tuple[int, Place] | None:
        return None if self.announced is None else (1, self.announced)


def ring(count: int, looks: Callable[[int], Place]) -> tuple[list[Positions], list[Neighbour]]:
    all_known = [Positions(rank, functools.partial(looks, rank)) for rank in range(count)]
    ends = []
    for rank, positions in enumerate(all_known):
        positions.sent_names = {other: ["hidden_states", "residual"] for other in range(count)}
        there = Neighbour(positions, all_known[(rank + 1) % count])
        back = Neighbour(all_known[(rank + 1) % count], positions)
        there.back, back.back = back, there
        ends += [there, back]
    return all_known, ends


def test_what_is_heard_goes_round_once() -> None:
    all_known, ends = ring(8, lambda rank: Place(Step.SENDING, rank, time.perf_counter_ns() - 10**9))
    for known in all_known:
        known.say_last()
    assert all(end.said <= 2 * 8 for end in ends), "a rank says where it is once to each neighbour, and that goes round"
    for rank, known in enumerate(all_known):
        found = known.collect(lost_rank=(rank + 1) % 8)
        assert [position.rank for position in found] == [*range(8)]
        for position in found:
            assert position.step == f"sending hidden_states, residual of micro-batch {position.rank}"
            assert position.micro_batch == position.rank
            assert 0.9 < position.as_of - position.since < 5 and time.time() - position.as_of < 5


def test_what_a_rank_said_later_replaces_what_it_said_before_whatever_comes_first() -> None:
    known, end = Positions(0), Neighbour(Positions(1), Positions(0))
    known.sent_names = {0: (), 1: ()}
    now_ns = time.perf_counter_ns()
    for number, micro_batch in ((4, 7), (2, 6)):
        known.hear(1, Saying(Place(Step.FORWARD, micro_batch, now_ns), number, now_ns), end)
    assert known.collect(1)[1].micro_batch == 7
    known.hear(5, Saying(Place(Step.FORWARD, 9, now_ns), 1, now_ns), end)
    assert [position.rank for position in known.collect(1)] == [0, 1], "no rank of these pipelines"


def test_a_neighbour_is_where_it_announced_a_micro_batch_until_it_says_so_itself() -> None:
    known = Positions(0)
    end = Neighbour(known, Positions(1))
    known.sent_names = {0: (), 1: ()}
    now_ns = time.perf_counter_ns()
    known.hear(1, Saying(Place(Step.CALLER, None, now_ns), 2, now_ns), end)
    end.announced = Place(Step.INPUTS, 4, now_ns + 1)
    assert known.collect(1)[1].step == "in its make_inputs of micro-batch 4"
    known.hear(1, Saying(Place(Step.FORWARD, 4, now_ns + 2), 4, now_ns + 2), end)
    assert known.collect(1)[1].step == "in its forward of micro-batch 4"


@pytest.mark.parametrize("is_busy", [True, False])
@pytest.mark.parametrize("step", Step)
def test_a_saying_fits_into_a_tag_and_is_as_old_by_the_clock_of_who_hears_it(
    step: Step, is_busy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank has a clock of its own, which says nothing to the others."""
    there_ns, here_ns = 50 * 10**9, 7 * 10**9
    said = Saying(Place(step, 3, there_ns - 2 * 10**9), 6, there_ns - 10**9)
    monkeypatch.setattr(module.time, "perf_counter_ns", lambda: there_ns)
    packed = said.to_bytes(is_busy)
    assert len(packed) <= 24
    monkeypatch.setattr(module.time, "perf_counter_ns", lambda: here_ns)
    heard, was_busy = Saying.from_bytes(packed, 3)
    assert (heard.place.step, heard.place.micro_batch, heard.number, was_busy) == (step, 3, 6, is_busy)
    assert (heard.place.since_ns, heard.as_of_ns) == (here_ns - 2 * 10**9, here_ns - 10**9)
    assert bool(said.place.phrase()) is (step is not Step.UNKNOWN)


def test_the_sentence_of_eight_ranks_is_short_and_names_each_once() -> None:
    at = 1000.0
    found = [Position(0, 9, "waiting for feedback after micro-batch 9", at - 2.4, at - 0.1)]
    found += [Position(rank, 7, "waiting for the header of micro-batch 7", at - 2, at - 0.1) for rank in (4, 5)]
    found += [Position(6, 7, "waiting for the header of micro-batch 7", at - 3, at - 0.1), Position(7)]
    found += [Position(1, 7, "in its forward of micro-batch 7", at - 31, at - 20), Position(2), Position(3)]
    sentence = last_positions(found, at)
    assert sentence == (
        "Last positions: rank 0: waiting for feedback after micro-batch 9 for 2.3 s; ranks 4, 5, 6: waiting for the "
        "header of micro-batch 7 for 1.9 to 2.9 s; ranks 7, 2, 3: nothing is known; rank 1: in its forward of "
        "micro-batch 7 for 11.0 s, as of 20.0 s before."
    )


def test_the_error_is_data_and_survives_pickling() -> None:
    error = errors.PeerLost("gone", [Position(0, 1, "closing", 1.0, 2.0)])
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == "gone" and again.positions == error.positions == (Position(0, 1, "closing", 1.0, 2.0),)
    assert errors.PeerLost("before any link").positions == ()


# ------------------------------------------------------------------------------ over real links


def linked(
    count: int, play: Callable[[int, Links], Any], silence_seconds: float, silent: Sequence[int] = (), **changes: Any
) -> list[Any]:
    """What ``play`` returns or raises on each of so many ranks in threads, whose links are never closed in order."""
    hub = LocalHub(count, SECONDS)

    def one(rank: int) -> Any:
        patience = Patience(silence_seconds, SECONDS)
        look = None if rank in silent else lambda: Place(Step.FORWARD, 100 + rank, time.perf_counter_ns())
        links = make_links(hub.transport(rank), plan_of(rank, count, **changes), patience, look=look)
        try:
            return play(rank, links)
        finally:
            links.close()

    return together(count, one)


@pytest.mark.parametrize("changes", [{}, {"feedback": None}], ids=["a ring", "a chain"])
def test_after_a_notice_all_know_of_all_whatever_side_they_are_on(changes: dict[str, Any]) -> None:
    """Keep-alives come too rarely here: what is known was said with the notice, or in answer to it."""

    all_look = threading.Barrier(8)

    def play(rank: int, links: Links) -> None:
        all_look.wait(SECONDS)
        if rank == 3:
            links.fail("ValueError", 103)
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            links.check()
            time.sleep(0.01)

    outcomes = linked(8, play, 1000.0, **changes)
    for rank, outcome in enumerate(outcomes):
        assert isinstance(outcome, errors.PeerLost), outcome
        assert [p.step for p in outcome.positions] == [f"in its forward of micro-batch {100 + r}" for r in range(8)]
        assert "nothing is known" not in str(outcome) and f"rank {rank}: in its forward" in str(outcome)


def test_keep_alives_alone_say_where_ranks_are_and_who_says_nothing_is_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_FRESH_POSITIONS_SECONDS", 0.0)
    are_known = threading.Event()

    def play(rank: int, links: Links) -> Any:
        if rank != 0:
            are_known.wait(SECONDS)
            return None
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and len(links.positions.known_ranks()) < 3:
            time.sleep(0.01)
        found = links.positions.collect(lost_rank=0)
        are_known.set()
        return found

    found = linked(4, play, 1.0, silent=[1])[0]
    assert [p.micro_batch for p in found] == [100, None, 102, 103]
    assert found[1] == Position(1) and "rank 1: nothing is known" in last_positions(found, time.time())

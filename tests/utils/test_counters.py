from __future__ import annotations

import gc
import pickle
import threading
from collections.abc import Iterator

import pytest

from pp_piecewise_backend.utils.counters import (
    COUNTERS,
    MAX_TO_SUM_UP,
    NAMES,
    TOTALS,
    Amounts,
    Snapshot,
    Stats,
    expect,
    stats,
)

ALL_COUNTERS = {
    "programs", "calls", "recompiles", "recompiles_after_seal", "pieces", "pieces_compiled", "pieces_reused",
    "captures", "capture_seconds", "compile_seconds", "graph_bytes", "static_bytes", "replays",
    "eager_steps", "graph_misses", "miss_reasons", "input_copies", "input_bytes_copied", "output_copies",
    "border_copies",
    "stage_input_copies", "stage_inputs_in_place", "padded_tokens", "foreign_captures",
    "grad_fallbacks", "unmatched_split_ops",
    "headers", "sends", "recvs", "bytes_sent", "bytes_received", "microbatches", "proxy_copies", "recv_allocations",
    "pickles", "blocking_metadata", "early_releases", "send_waits", "direct_entries",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _zero_totals() -> Iterator[None]:
    TOTALS.reset()
    yield
    TOTALS.reset()


# --------------------------------------------------------------------------------------- adding


def test_the_counters_are_frozen_and_start_at_zero() -> None:
    fresh = Stats().as_dict()
    assert set(fresh) == set(NAMES) == ALL_COUNTERS
    assert fresh.pop("miss_reasons") == {}
    assert set(fresh.values()) == {0}


def test_every_counter_has_a_unit() -> None:
    assert all(counter.unit for counter in COUNTERS.values())


def test_add_and_read() -> None:
    counters = Stats()
    counters.add("pieces")
    counters.add("pieces", 4)
    counters.add("compile_seconds", 0.5)
    counters.add_many({"compile_seconds": 1, "eager_steps": 3})
    assert (counters.pieces, counters.compile_seconds, counters.eager_steps) == (5, 1.5, 3)
    assert isinstance(counters.pieces, int) and isinstance(counters.compile_seconds, float)
    assert repr(counters) == "Stats(pieces=5, compile_seconds=1.5, eager_steps=3)"


def test_misses_are_kept_by_reason_and_summed() -> None:
    counters = Stats()
    counters.add_miss("first-call", 3)
    counters.add_miss("over-max")
    counters.add_miss("first-call", 1)
    counters.add_miss("never", 0)
    assert counters.miss_reasons == {"first-call": 4, "over-max": 1}
    assert counters.graph_misses == 5


@pytest.mark.parametrize(
    ("name", "amount", "error", "words"),
    [
        ("peces", 1, ValueError, "unknown counter 'peces'; the nearest is 'pieces'"),
        ("graph_misses", 1, ValueError, r"kept by add_miss\(reason, pieces\)"),
        ("miss_reasons", 1, ValueError, r"kept by add_miss\(reason, pieces\)"),
        ("pieces", -1, ValueError, "counter 'pieces' only rises, got -1"),
        ("compile_seconds", -0.5, ValueError, "only rises"),
        ("pieces", 0.5, TypeError, "counts compute pieces of programs in whole numbers, got 0.5"),
    ],
)
def test_what_cannot_be_added(name: str, amount: float, error: type[Exception], words: str) -> None:
    parent = Stats()
    child = Stats(parent)
    with pytest.raises(error, match=words):
        child.add_many({"replays": 7, name: amount})
    assert child.as_dict() == parent.as_dict() == Stats().as_dict()


def test_misses_cannot_be_negative() -> None:
    with pytest.raises(ValueError, match="cannot count -1"):
        Stats().add_miss("first-call", -1)


def test_unknown_attributes_raise() -> None:
    with pytest.raises(AttributeError, match="no counter 'peces'"):
        _ = Stats().peces
    with pytest.raises(AttributeError, match="no counter 'peces'"):
        _ = Stats().snapshot().peces


def test_gauges_fall_and_survive_a_reset() -> None:
    counters = Stats()
    counters.add_many({"static_bytes": 100, "graph_bytes": 50, "replays": 1})
    counters.add_miss("first-call")
    counters.add("static_bytes", -60)
    counters.reset()
    left = {name: value for name, value in counters.as_dict().items() if value}
    assert left == {"static_bytes": 40, "graph_bytes": 50}


def test_as_dict_is_a_copy() -> None:
    counters = Stats()
    counters.add_miss("first-call")
    copied = counters.as_dict()
    copied["miss_reasons"]["first-call"] = 9
    copied["pieces"] = 9
    assert counters.miss_reasons == {"first-call": 1} and counters.pieces == 0


# -------------------------------------------------------------------------------------- parents


def test_additions_reach_every_ancestor_and_outlive_the_child() -> None:
    grandparent = Stats()
    parent = Stats(grandparent)
    child, sibling = Stats(parent), Stats(parent)
    child.add("pieces", 2)
    child.add_miss("over-max", 2)
    sibling.add("pieces", 3)
    del child
    gc.collect()
    assert (sibling.pieces, parent.pieces, grandparent.pieces) == (3, 5, 5)
    assert grandparent.miss_reasons == {"over-max": 2} and sibling.miss_reasons == {}


def test_resetting_a_child_leaves_the_parent() -> None:
    parent = Stats()
    child = Stats(parent)
    child.add("pieces", 2)
    child.reset()
    child.add("pieces")
    assert (child.pieces, parent.pieces) == (1, 3)


def test_threads_lose_no_addition() -> None:
    parent = Stats()
    children = [Stats(parent) for _ in range(4)]
    start = threading.Barrier(len(children))

    def work(child: Stats) -> None:
        start.wait()
        for _ in range(2000):
            child.add_many({"replays": 1, "eager_steps": 2})
            child.add_miss("first-call")

    threads = [threading.Thread(target=work, args=(child,)) for child in children]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (parent.replays, parent.eager_steps, parent.graph_misses) == (8000, 16000, 8000)
    assert [child.replays for child in children] == [2000] * 4


def test_what_waits_to_be_summed_up_is_bounded_whichever_counters_are_read() -> None:
    parent = Stats()
    children = [Stats(parent) for _ in range(3)]
    one = Amounts({"microbatches": 1})
    for number in range(5 * MAX_TO_SUM_UP):
        one.add_to(children[number % 3])
        assert all(len(each._added) <= MAX_TO_SUM_UP for each in (parent, *children))
        if number % 100 == 0:
            assert parent.microbatches == number + 1  # which sums up those of the parent alone
    assert parent.microbatches == sum(child.microbatches for child in children) == 5 * MAX_TO_SUM_UP


# ----------------------------------------------------------------------------- snapshot, totals


def test_a_snapshot_is_frozen_in_time_and_read_only() -> None:
    program = Stats(TOTALS)
    program.add("pieces", 2)
    before = stats()
    program.add("pieces")
    assert (before.pieces, before["pieces"], stats().pieces) == (2, 2, 3)
    assert set(before) == ALL_COUNTERS and len(before) == len(ALL_COUNTERS)
    with pytest.raises(AttributeError, match="read-only"):
        before.pieces = 3
    with pytest.raises(AttributeError, match="read-only"):
        del before.pieces
    with pytest.raises(TypeError):
        before["pieces"] = 3  # type: ignore[index]
    with pytest.raises(KeyError):
        _ = before["peces"]


def test_snapshots_compare_and_pickle() -> None:
    TOTALS.add_miss("first-call")
    snapshot = stats()
    restored = pickle.loads(pickle.dumps(snapshot))
    assert isinstance(restored, Snapshot) and restored == snapshot == dict(snapshot)
    assert "miss_reasons={'first-call': 1}" in repr(snapshot)


# --------------------------------------------------------------------------------------- expect


def test_expect_compares_differences_not_totals() -> None:
    TOTALS.add("pieces", 10)
    TOTALS.add_miss("first-call", 5)
    with expect(pieces=3, replays=0, miss_reasons={"over-max": 1}, graph_misses=1):
        Stats(TOTALS).add("pieces", 3)
        Stats(TOTALS).add_miss("over-max")
        TOTALS.add("eager_steps", 7)  # not named, so not checked


def test_expect_names_each_difference() -> None:
    with pytest.raises(AssertionError) as caught, expect(pieces=3, replays=1, eager_steps=0, miss_reasons={}):
        TOTALS.add("pieces", 2)
        TOTALS.add("replays", 1)
        TOTALS.add("eager_steps", 4)
        TOTALS.add_miss("first-call", 2)
    assert str(caught.value) == (
        "counters differ from what was expected: pieces: expected 3, got 2; "
        "eager_steps: expected 0, got 4; miss_reasons: expected {}, got {'first-call': 2}"
    )


def test_expect_checks_names_before_the_body_runs() -> None:
    ran = []
    with pytest.raises(ValueError, match="unknown counter 'peces'; the nearest is 'pieces'"), expect(peces=1):
        ran.append(True)
    assert not ran
    with pytest.raises(ValueError, match="unknown counter 'foo'; there are programs, calls, "), expect(foo=1):
        pass


def test_an_exception_of_the_body_wins() -> None:
    with pytest.raises(KeyError, match="mine"), expect(pieces=3):
        raise KeyError("mine")


def test_expects_nest() -> None:
    with expect(pieces=3), expect(pieces=3):
        TOTALS.add("pieces", 3)


def test_as_text_a_snapshot_leaves_out_what_is_zero() -> None:
    stats = Stats()
    stats.add("calls", 2)
    stats.add_miss("first-call", 3)
    text = "Snapshot(calls=2, graph_misses=3, miss_reasons={'first-call': 3})"
    assert repr(stats.snapshot()) == str(stats.snapshot()) == text

"""Ladders of buckets: integers only, so properties say most of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pp_piecewise_backend.config import Config, SizeRange
from pp_piecewise_backend.runtime.cudagraphs.ladder import Ladder

DEFAULT_RANGES = Config.resolve().capture_sizes

sizes = st.lists(st.integers(1, 500), min_size=1, max_size=20, unique=True).map(lambda s: tuple(sorted(s)))
ranges = st.lists(
    st.tuples(st.integers(1, 300), st.one_of(st.none(), st.integers(0, 9)), st.integers(1, 40)), max_size=5
).map(lambda drawn: [SizeRange(a, None if b is None else a + b * step, step) for a, b, step in drawn])


# ------------------------------------------------------------------------------- choosing


@given(sizes, st.integers(-3, 600))
def test_the_chosen_bucket_is_the_smallest_that_fits(sizes: tuple[int, ...], num_tokens: int) -> None:
    fitting = [size for size in sizes if size >= num_tokens]
    expected = fitting[0] if fitting and num_tokens >= 1 else None
    assert Ladder(sizes).bucket(num_tokens) == expected


@given(sizes)
def test_the_smallest_call_of_a_bucket_is_where_the_bucket_begins(sizes: tuple[int, ...]) -> None:
    ladder = Ladder(sizes)
    for bucket in sizes:
        smallest = ladder.smallest_call(bucket)
        assert 1 <= smallest <= bucket
        assert ladder.bucket(smallest) == bucket
        assert ladder.bucket(smallest - 1) != bucket


@given(sizes, st.integers(1, 600), st.integers(1, 600))
def test_a_cut_ladder_serves_smaller_calls_as_before(sizes: tuple[int, ...], cut: int, num_tokens: int) -> None:
    ladder = Ladder(sizes)
    shorter = ladder.cut_at(cut)
    assert shorter.max_tokens == min(cut, ladder.max_tokens)
    before = ladder.bucket(num_tokens)
    if num_tokens > shorter.max_tokens:
        assert shorter.bucket(num_tokens) is None
    else:
        assert before is not None
        assert shorter.bucket(num_tokens) == min(before, shorter.max_tokens)


def test_a_ladder_that_needs_no_cut_stays_the_same_object() -> None:
    ladder = Ladder((1, 2, 8))
    assert ladder.cut_at(8) is ladder and ladder.cut_at(9) is ladder
    assert ladder.cut_at(5) == Ladder((1, 2, 5)) and ladder.cut_at(2) == Ladder((1, 2))


# ------------------------------------------------------------------------------- building


@given(ranges, st.integers(1, 400))
def test_ranges_are_cut_at_max_tokens_which_is_always_a_bucket(drawn: list[SizeRange], max_tokens: int) -> None:
    named = {
        size
        for size in range(1, max_tokens + 1)
        for r in drawn
        if size >= r.first and (r.last is None or size <= r.last) and (size - r.first) % r.step == 0
    }
    assert Ladder.from_ranges(drawn, max_tokens).sizes_tokens == tuple(sorted(named | {max_tokens}))


def test_the_default_ladder() -> None:
    ladder = Ladder.from_ranges(DEFAULT_RANGES, 2048)
    sizes = ladder.sizes_tokens
    assert sizes[:6] == (1, 2, 4, 8, 16, 24) and sizes[-3:] == (1536, 1792, 2048)
    assert {64, 80, 256, 288, 512, 576, 1024, 1280} <= set(sizes) and len(sizes) == 43
    assert str(ladder) == "1, 2, 4, 8, ..., 1536, 1792, 2048"


def test_the_default_ladder_has_no_end_of_its_own() -> None:
    assert Ladder.from_ranges(DEFAULT_RANGES, 10_000).sizes_tokens[-4:] == (8704, 9216, 9728, 10_000)


@pytest.mark.parametrize(
    ("text", "max_tokens", "expected"),
    [
        ("3,7", 20, (3, 7, 20)),
        ("3,7", 7, (3, 7)),
        ("3,7", 5, (3, 5)),
        ("3,7", 1, (1,)),
        ("4:12:4", 30, (4, 8, 12, 30)),
        ("4:12:4", 9, (4, 8, 9)),
        ("1,4::4", 13, (1, 4, 8, 12, 13)),
        ("4::4", 12, (4, 8, 12)),
    ],
)
def test_ladders_from_the_option(text: str, max_tokens: int, expected: tuple[int, ...]) -> None:
    config = Config.resolve({"capture_sizes": text})
    ladder = Ladder.from_ranges(config.capture_sizes, max_tokens)
    assert ladder.sizes_tokens == expected
    assert str(ladder) == ", ".join(map(str, expected))


@pytest.mark.parametrize("bad", [(), (0,), (-1, 2), (2, 2), (3, 1), (1, 4, 3)])
def test_sizes_that_are_no_ladder(bad: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must ascend from at least 1"):
        Ladder(bad)


@pytest.mark.parametrize("max_tokens", [0, -5])
def test_no_room_for_a_ladder(max_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"max_tokens must be at least 1, got {max_tokens}"):
        Ladder.from_ranges(DEFAULT_RANGES, max_tokens)


def test_the_smallest_call_of_what_is_no_bucket() -> None:
    with pytest.raises(ValueError):
        Ladder((2, 4)).smallest_call(3)

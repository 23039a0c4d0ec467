"""``keep="if_faster"``: the warm-up weighs each bucket, and drops what is not faster with the memory that it holds."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import pp_piecewise_backend as ppb
from captured import DEVICES, HIDDEN, Pair, misses_between, net, rows
from one_program import for_every_size
from pp_piecewise_backend.debug.describe import describe_graphs
from pp_piecewise_backend.runtime import warmup
from pp_piecewise_backend.runtime.stage import StageMemory
from pp_piecewise_backend.runtime.warmup import REPETITIONS, Stopwatch

pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients", "one_program")
on_devices = pytest.mark.parametrize("device", DEVICES)


@torch.library.custom_op("keeptest::attention", mutates_args=())
def attention(x: Tensor) -> Tensor:
    return torch.tanh(x * 2)


attention.register_fake(torch.empty_like)


def two_layers(self: Any, hidden_states: Tensor) -> Tensor:
    x = hidden_states
    for _ in range(2):
        x = torch.ops.keeptest.attention(x @ self.w)
    return x @ self.w


def takes(monkeypatch: pytest.MonkeyPatch, *figures_us: Sequence[float]) -> list[Sequence[float]]:
    """What alternatives take, for one bucket after the other from the largest on: without graphs, then with them."""
    left = list(figures_us)

    class Scripted(Stopwatch):
        def medians_us(self, alternatives: Any, prepare: Any, device: torch.device) -> list[float]:
            for run in alternatives:
                prepare()
                run()
            figures = left.pop(0)
            assert len(figures) == len(alternatives)
            return list(figures)

    monkeypatch.setattr(warmup, "Stopwatch", Scripted)
    return left


def warmed_up(device: str, function: Any = two_layers, sizes: Sequence[int] | None = None, **options: Any) -> Pair:
    options = {"split_ops": "+keeptest::*", "keep": "if_faster", "capture_sizes": "2,4,8", "strict": True, **options}
    pair = Pair(net(function, device), device, mark=False, **options)

    def make_inputs(num_tokens: int) -> tuple[tuple[()], dict[str, Tensor]]:
        return (), for_every_size({"hidden_states": rows(num_tokens, device)})

    ppb.warmup(pair.compiled, make_inputs, sizes=sizes, progress=False)
    return pair


def buckets_of(pair: Pair) -> list[int]:
    return [bucket.tokens for bucket, _ in pair.program.all_buckets]


def calls_are_right(pair: Pair, *counts_tokens: int) -> dict[str, int]:
    before = ppb.stats()
    for num_tokens in counts_tokens:
        pair(rows(num_tokens, pair.device, seed=1))
    return misses_between(before, ppb.stats())


@on_devices
def test_buckets_that_save_no_time_are_dropped_with_their_memory(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    left = takes(monkeypatch, (700.4, 900.6), (500, 500), (300, 120))
    pair = warmed_up(device)
    assert not left and buckets_of(pair) == [2]
    held = ppb.stats().graph_bytes, ppb.stats().static_bytes
    assert calls_are_right(pair, 8, 6, 4, 3, 2, 1) == {"not-faster": 4 * 3}, "what is dropped is no error under strict"
    text = " ".join(ppb.explain().split())
    assert "a replay took 901 us, the compiled pieces without graphs 700 us (medians)" in text
    assert "4 tokens (not-faster)" in text and "a call takes 120 us with it, 300 us without" in text
    graphs = describe_graphs(pair.program)
    assert [dropped.tokens for dropped in graphs.dropped] == [8, 4]
    (kept,) = graphs.buckets
    assert (kept.replay_us, kept.otherwise_us) == (120, 300)
    alone = warmed_up(device, keep="all", capture_sizes="2", max_tokens=2)
    assert (ppb.stats().graph_bytes, ppb.stats().static_bytes) == held, "memory of what was dropped is still held"
    assert buckets_of(alone) == [2]


@pytest.mark.parametrize(("largest_us", "kept"), [((700, 300), [8, 2]), ((700, 900), [2])])
def test_memory_of_what_was_dropped_goes_to_buckets_that_had_no_room(
    largest_us: tuple[float, float], kept: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def bytes_of_buckets(memory: StageMemory) -> int:  # which share none, as in the memory of a CUDA driver
        return sum(bucket.tokens for user in memory._users for bucket, _ in user.buckets)

    monkeypatch.setattr(StageMemory, "graph_bytes", property(bytes_of_buckets))
    left = takes(monkeypatch, (500, 600), (300, 200), largest_us)
    pair = warmed_up("cpu", graph_memory_bytes=8 + 2)
    assert not left and buckets_of(pair) == kept
    graphs = describe_graphs(pair.program)
    assert {dropped.tokens: dropped.reason for dropped in graphs.dropped} == dict.fromkeys(
        {8, 4}.difference(kept), "not-faster"
    )
    assert [bucket.replay_us for bucket in graphs.buckets] == [300, 200][-len(kept) :]
    assert calls_are_right(pair, 8, 2) == ({} if 8 in kept else {"not-faster": 3})


def test_nothing_is_held_if_nothing_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    takes(monkeypatch, *[(1, 2)] * 3)
    with pytest.warns(ppb.errors.PPPiecewiseWarning, match="captured nothing: .*saves no time"):
        pair = warmed_up("cpu")
    assert (ppb.stats().graph_bytes, ppb.stats().static_bytes, buckets_of(pair)) == (0, 0, [])
    assert calls_are_right(pair, 8, 1) == {"not-faster": 6}


def test_everything_that_is_faster_is_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    takes(monkeypatch, *[(2, 1)] * 3)
    pair = warmed_up("cpu")
    assert buckets_of(pair) == [8, 4, 2] and ppb.stats().captures == 9
    assert calls_are_right(pair, 8, 6, 4, 3, 2) == {}


def test_all_is_kept_unweighed_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    takes(monkeypatch)
    assert buckets_of(warmed_up("cpu", keep="all")) == [8, 4, 2]


def test_only_what_a_warm_up_of_some_sizes_captures_is_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    left = takes(monkeypatch, (1, 2), (2, 1))
    assert buckets_of(warmed_up("cpu", sizes=[3, 2])) == [2] and not left


@pytest.mark.parametrize(("others_us", "is_kept"), [((300, 301), False), ((999, 120), True)])
def test_the_slowest_rank_decides_for_all_of_a_stage(
    others_us: Sequence[float], is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    takes(monkeypatch, (300, 250 if is_kept is False else 400))
    stage = ppb.Stage({"hidden_states": ppb.Proxy((HIDDEN,), torch.float32)}, 8, "cpu")

    def exchange(text: str) -> list[str]:
        said = json.loads(text)
        is_time = isinstance(said, list) and all(isinstance(one, (int, float)) and one > 1 for one in said)
        return [text, json.dumps(others_us) if is_time else text]

    stage.exchange = exchange
    pair = warmed_up("cpu", stage=stage, capture_sizes="8")
    assert buckets_of(pair) == ([8] if is_kept else [])


@on_devices
@pytest.mark.parametrize(
    ("figures_us", "full", "pieces"),
    [
        ((900, 500, 400), [4], [8, 4]),
        ((900, 500, 600), [], [8, 4]),
        ((500, 900, 400), [4], [8]),
        ((500, 900, 600), [], [8]),
    ],
)
def test_a_full_graph_must_be_faster_than_what_replays_in_its_place(
    device: str, figures_us: Sequence[float], full: list[int], pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    takes(monkeypatch, (2, 1), figures_us)
    options = {"mode": "full_and_piecewise", "full_max_tokens": 4, "row_wise_ops": "keeptest::*", "strict": False}
    pair = warmed_up(device, capture_sizes="4,8", **options)
    graphs = describe_graphs(pair.program)
    assert graphs.full is not None
    assert [bucket.tokens for bucket in graphs.full.buckets] == full
    assert [bucket.tokens for bucket in graphs.buckets] == pieces
    before = ppb.stats().replays
    calls_are_right(pair, 4, 3)
    assert ppb.stats().replays - before == (2 if full else 6 if 4 in pieces else 0)
    text = " ".join(ppb.explain().split())
    assert ("a replay took 600 us, replays of the pieces 500 us (medians)" in text) is (figures_us == (900, 500, 600))


def counts_on(self: Any, hidden_states: Tensor, cache: Tensor, length: Tensor) -> Tensor:
    x = hidden_states @ self.w
    cache.index_copy_(0, length, x[:1])
    length.add_(1)
    return torch.ops.keeptest.attention(x + cache.sum(0)) @ self.w


def test_each_repetition_finds_state_as_the_call_found_it() -> None:
    """Else the length of this cache would leave it."""
    pair = Pair(net(counts_on, "cpu"), "cpu", split_ops="+keeptest::*", keep="if_faster", dims=(0, None, None))
    cache, length = torch.zeros(3, HIDDEN), torch.tensor([1])
    before = cache.clone()
    ppb.warmup(pair.compiled, lambda n: ((rows(n, "cpu"), cache, length), {}), progress=False)
    assert length.item() == 1 and torch.equal(cache, before)
    assert pair.program.graphs is not None and pair.program.graphs.measured


def test_alternatives_take_turns_and_are_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now, seen = [0.0], []
    monkeypatch.setattr(warmup.time, "perf_counter", lambda: now[0])
    spikes: Iterator[float] = itertools.chain([5.0], itertools.repeat(0.0, 3), [7.0], itertools.repeat(0.0))

    def taking(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            seen.append(name)
            now[0] += seconds + next(spikes)

        return run

    def prepare() -> None:
        seen.append("prepared")
        now[0] += 100.0

    found = Stopwatch().medians_us([taking("a", 1e-3), taking("b", 3e-3)], prepare, torch.device("cpu"))
    assert found == [pytest.approx(1e3), pytest.approx(3e3)]
    assert seen == ["prepared", "a", "prepared", "b"] * (1 + REPETITIONS)

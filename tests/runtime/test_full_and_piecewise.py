"""``mode="full_and_piecewise"``: one graph for small calls, pieces for the rest, in one program."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import pp_piecewise_backend as ppb
from captured import DEVICES, HIDDEN, Pair, Wrong, misses_between, net, rows
from pp_piecewise_backend import backend
from pp_piecewise_backend.debug.describe import describe, describe_graphs
from pp_piecewise_backend.debug.report import report_page
from pp_piecewise_backend.runtime.cudagraphs import memory
from pp_piecewise_backend.runtime.replay import FlatProgram
from pp_piecewise_backend.runtime.warmup import MAX_UNCOUNTED

pytestmark = pytest.mark.usefixtures("no_gradients")
on_devices = pytest.mark.parametrize("device", DEVICES)

CONTEXT: dict[str, Any] = {}
"""An engine's forward context: ``lengths`` stays at one address, ``scale`` is a Python number."""


@torch.library.custom_op("fulltest::attention", mutates_args=())
def attention(x: Tensor) -> Tensor:
    return x * CONTEXT["lengths"].sum() * CONTEXT["scale"]


attention.register_fake(torch.empty_like)


@pytest.fixture(autouse=True)
def context() -> Iterator[None]:
    CONTEXT.update(lengths=None, scale=1.0)
    yield
    CONTEXT.clear()


def two_layers(self: Any, x: Tensor) -> Tensor:
    for _ in range(2):
        x = torch.ops.fulltest.attention(torch.tanh(x @ self.w)) @ self.w
    return x


def made(device: str, function: Any = two_layers, **options: Any) -> Pair:
    CONTEXT["lengths"] = torch.ones(4, device=device)
    options = {"split_ops": "+fulltest::attention", "mode": "full_and_piecewise", "full_max_tokens": 4, **options}
    return Pair(net(function, device), device, **options)


def call(pair: Pair, num_tokens: int, length: int, *more: Any) -> dict[str, Any]:
    """One call with another sequence length; what it counted comes back."""
    CONTEXT["lengths"].fill_(length)
    before = ppb.stats()
    pair(rows(num_tokens, pair.device, seed=length), *more)
    after = ppb.stats()
    counted = {name: after[name] - before[name] for name in ("replays", "eager_steps", "graph_misses", "captures")}
    return {**counted, "misses": misses_between(before, after)}


ONE_GRAPH = {"replays": 1, "eager_steps": 0, "graph_misses": 0, "captures": 0, "misses": {}}
PIECES = {"replays": 3, "eager_steps": 2, "graph_misses": 0, "captures": 0, "misses": {}}


@on_devices
@pytest.mark.parametrize("row_wise", [True, False])
def test_small_calls_replay_one_graph_and_others_the_pieces(device: str, row_wise: bool) -> None:
    pair = made(device, row_wise_ops="fulltest::*" if row_wise else "none", strict=row_wise)
    assert call(pair, 4, 1)["misses"] == {"first-call": 3}
    assert call(pair, 4, 2)["captures"] == 1
    assert call(pair, 8, 1)["misses"] == {"first-call": 3}
    assert call(pair, 8, 2)["captures"] == 3
    for length in (3, 1, 4):
        assert call(pair, 4, length) == ONE_GRAPH
        assert call(pair, 8, length) == PIECES
        assert call(pair, 6, length) == PIECES, "padded"
    if row_wise:
        assert call(pair, 3, 2) == ONE_GRAPH, "padded"
    else:
        assert call(pair, 3, 2)["captures"] == 3, "the pieces missed the first call of this size, too"
        assert call(pair, 3, 5) == PIECES
    graphs = describe_graphs(pair.program)
    assert graphs.full is not None and [b.tokens for b in graphs.full.buckets] == [4]
    text = " ".join(ppb.explain().split())
    assert "full graphs up to 4 tokens" in text and "the next proxies may land at its end" in text
    html = report_page(describe(pair.program), defaultdict(str))
    assert "<h3>Full graphs</h3>" in html and "for calls of up to 4 tokens" in html
    assert (graphs.full.padding == "safe") is row_wise and f" padding {graphs.full.padding} " in text
    assert not {3, 6} & {missed.tokens for missed in graphs.full.misses}, "these calls are for the pieces"
    assert ppb.stats().graph_bytes == sum(b.bytes for b in [*graphs.full.buckets, *graphs.buckets])


def test_what_is_refused_as_one_graph_replays_its_pieces() -> None:
    pair = made("cpu", graph_safe_ops="none")
    for length in range(4):
        CONTEXT["scale"] = float(length)
        counted = call(pair, 4, length)
    assert counted == PIECES
    text = " ".join(ppb.explain().split())
    assert "full graphs none, the pieces replay instead" in text and "fulltest::attention runs Python code" in text


@on_devices
def test_a_full_graph_that_is_proven_wrong_gives_way_to_the_pieces(device: str) -> None:
    """The op is declared wrongly: it reads a Python number, too."""
    pair = made(device)
    for length in range(1, 4):
        CONTEXT["scale"] = float(length)
        call(pair, 4, length)  # the third compares its replay, and returns what the pieces give
    CONTEXT["scale"] = 7.0
    assert call(pair, 4, 1)["captures"] == 3
    assert call(pair, 4, 2) == PIECES
    text = " ".join(ppb.explain().split())
    assert "Its pieces replay instead; take that op out of graph_safe_ops" in text


def with_cache(self: Any, x: Tensor, cache: Tensor, positions: Tensor) -> Tensor:
    x = torch.tanh(x @ self.w)
    cache.index_copy_(0, positions, x)
    x = torch.ops.fulltest.attention(x + cache.sum(0)) @ self.w
    return torch.tanh(x) @ self.w


@on_devices
def test_state_is_written_inside_a_full_graph_at_exact_sizes(device: str) -> None:
    pair = made(device, with_cache, dims=(0, None, 0))
    cache, other = (torch.zeros(16, HIDDEN, device=device) for _ in range(2))

    def step(num_tokens: int, length: int, cache: Tensor = cache) -> dict[str, Any]:
        return call(pair, num_tokens, length, cache, torch.arange(num_tokens, device=device) + length)

    for num_tokens in (4, 8):
        step(num_tokens, 1), step(num_tokens, 2)
    for length in (3, 5, 1):
        assert step(4, length) == ONE_GRAPH
        assert step(8, length)["graph_misses"] == 0
    step(4, 1, other)
    assert step(4, 3, other)["replays"] >= 1, "the other conversation is captured, or its pieces replay"


def reads_after_a_write(self: Any, x: Tensor, cache: Tensor, other: Tensor) -> Tensor:
    x = torch.ops.fulltest.attention(torch.tanh(x @ self.w)) @ self.w
    cache[: x.shape[0]] = x
    return torch.tanh(x + other.sum()) @ self.w


@pytest.mark.parametrize("is_checked", [True, False])
def test_inputs_that_come_to_share_memory_are_left_to_the_pieces(is_checked: bool) -> None:
    """What the full graph reads from a copy, it would itself have written."""
    pair = made("cpu", reads_after_a_write, dims=(0, None, None))
    cache, other = torch.zeros(16, HIDDEN), torch.zeros(2, HIDDEN)
    for length in (1, 2, 3, 4):
        call(pair, 4, length, cache, other)
    assert call(pair, 4, 5, cache, other) == ONE_GRAPH
    full = pair.program.full
    assert full is not None
    theirs = cache.clone()
    both = rows(4, "cpu", seed=9), cache, cache[:2]
    if is_checked:
        pair(*both, theirs=[both[0], theirs, theirs[:2]])
        assert "inputs-overlap: 1 call of 4 tokens" in " ".join(ppb.explain().split())
    else:
        full._apart = None
        with pytest.raises(Wrong):
            pair(*both, theirs=[both[0], theirs, theirs[:2]])


@on_devices
def test_warm_up_captures_and_proves_both(device: str) -> None:
    pair = made(device, mark=False, capture="warmup", row_wise_ops="fulltest::*", strict=True)
    lengths = iter(range(1, 100))

    def make_inputs(num_tokens: int) -> Any:
        CONTEXT["lengths"].fill_(next(lengths))
        return (rows(num_tokens, device),), {}

    ppb.warmup(pair.compiled, make_inputs, progress=False)
    before = ppb.stats()
    for num_tokens in (4, 8, 3, 2, 7, 4):
        assert call(pair, num_tokens, num_tokens + 1) == (ONE_GRAPH if num_tokens <= 4 else PIECES)
    full = pair.program.full
    assert full is not None and [bucket.tokens for bucket, _ in full.buckets] == [4, 2]
    assert [bucket.proofs and bucket.proofs.left for bucket, _ in full.buckets] == [0, 0]
    assert ppb.stats().captures == before.captures


@pytest.mark.parametrize("graph_safe", ["fulltest::*", "none"])
def test_only_sizes_of_full_graphs_are_called_again_to_be_proven(graph_safe: str) -> None:
    called: dict[str, list[int]] = {}

    def make_inputs(num_tokens: int) -> Any:
        called[mode].append(num_tokens)
        return (rows(num_tokens, "cpu"),), {}

    for mode in ("piecewise", "full_and_piecewise"):
        called[mode] = []
        pair = made("cpu", mode=mode, mark=False, graph_safe_ops=graph_safe)
        ppb.warmup(pair.compiled, make_inputs, progress=False)
    more = Counter(called["full_and_piecewise"]) - Counter(called["piecewise"])
    assert more == ({4: 2, 2: 2, 1: 2} if graph_safe != "none" else {})


@pytest.mark.parametrize("graphs", ["emulate", "off"])
def test_a_graph_is_cut_once_where_there_are_no_graphs(graphs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut: list[bool] = []
    split_graph = backend.split_graph
    monkeypatch.setattr(backend, "split_graph", lambda *given: cut.append(given[3]) or split_graph(*given))
    made("cpu", graphs=graphs)(rows(4, "cpu"))
    assert cut == ([False, True] if graphs == "emulate" else [False])


@on_devices
@pytest.mark.parametrize("mode", ["piecewise", "full", "full_and_piecewise"])
def test_bytes_of_graphs_are_shown_per_bucket_and_in_all(
    mode: str, device: str, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    safe = {"row_wise_ops": "fulltest::*", "graph_safe_ops": "fulltest::*"}
    pair = made(device, mode=mode, mark=False, capture="warmup", capture_sizes="2,4", max_tokens=8, **safe)
    lengths = iter(range(1, 10**6))

    def make_inputs(num_tokens: int) -> Any:
        CONTEXT["lengths"].fill_(next(lengths))
        return (rows(num_tokens, device),), {}

    with caplog.at_level(logging.INFO, "pp_piecewise_backend"):
        ppb.warmup(pair.compiled, make_inputs, progress=True)
    in_all = ppb.stats().graph_bytes
    assert in_all > 0
    (line,) = [record.getMessage() for record in caplog.records if "warmed up" in record.getMessage()]
    assert capsys.readouterr().err.splitlines()[-1] == line
    by_bucket = {int(tokens): int(num) for tokens, num in re.findall(r"(\d+): [\d.]+ s, (\d+) bytes", line)}
    assert {2, 4, 8} <= by_bucket.keys() and line.endswith(f"; {in_all} bytes of graphs in all")
    assert sum(by_bucket.values()) == in_all
    programs = {program.name: program.explain() for program in ppb.programs()}
    shown: dict[int, int] = defaultdict(int)
    for explained in programs.values():
        of_program = 0
        for tokens, num_bytes in re.findall(r"captured +(\d+) tokens?: .* (\d+) bytes more", explained):
            shown[int(tokens)] += int(num_bytes)  # of pieces, and of a full graph
            of_program += int(num_bytes)
        assert re.search(rf"^  in all +{of_program} bytes of graphs$", explained, re.MULTILINE), explained
    assert shown == by_bucket, programs


def test_little_memory_keeps_the_smallest_sizes_of_both() -> None:
    pair = made("cpu", row_wise_ops="fulltest::*")
    for num_tokens in (2, 8, 2, 8, 2, 8):
        call(pair, num_tokens, 1)
    held = ppb.stats().graph_bytes
    pair = made("cpu", row_wise_ops="fulltest::*", graph_memory_bytes=held - 1)
    for num_tokens in (2, 8) * 4:
        call(pair, num_tokens, 1)
    graphs = describe_graphs(pair.program)
    assert [dropped.tokens for dropped in graphs.dropped] == [8]
    assert call(pair, 2, 3) == ONE_GRAPH
    assert ppb.stats().graph_bytes < held
    pair.program.release()
    assert (ppb.stats().graph_bytes, ppb.stats().static_bytes, pair.program.all_buckets) == (0, 0, [])
    call(pair, 2, 1), call(pair, 2, 2), call(pair, 2, 3), call(pair, 2, 4)
    assert call(pair, 2, 5) == ONE_GRAPH


def proofs_left(pair: Pair) -> int:
    full = pair.program.full
    assert full is not None
    ((bucket, _),) = full.buckets
    return bucket.proofs.left if bucket.proofs is not None else -1


def test_a_comparison_counts_only_in_a_context_that_was_not_seen_before() -> None:
    """The op reads a number that is frozen, and that a warm-up and the first calls leave alone."""
    pair = made("cpu", mark=False, row_wise_ops="fulltest::*", capture_sizes="4", max_tokens=4)
    ppb.warmup(pair.compiled, lambda n: ((rows(4, "cpu"),), {}), sizes=[4], progress=False)
    assert proofs_left(pair) == 3
    assert "to be compared with its pieces in 3 calls more" in " ".join(ppb.explain().split())
    pair(rows(4, "cpu"))
    assert proofs_left(pair) == 3
    for seed in (1, 2):
        pair(rows(4, "cpu", seed=seed))
    assert proofs_left(pair) == 1
    CONTEXT["scale"] = 7.0
    pair(rows(4, "cpu", seed=3))  # returns what the pieces give
    assert "differs from the graph itself" in " ".join(ppb.explain().split())


def test_results_that_never_vary_are_compared_some_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    run_verified = FlatProgram.run_verified
    monkeypatch.setattr(FlatProgram, "run_verified", lambda *arguments: compared.append(1) or run_verified(*arguments))
    pair = made("cpu")
    for _ in range(2 + MAX_UNCOUNTED + 3):
        pair(rows(4, "cpu"))
    assert len(compared) == MAX_UNCOUNTED and proofs_left(pair) == 0


@pytest.mark.parametrize("who", ["this rank", "another rank"])
def test_a_size_whose_state_cannot_be_copied_to_compare_replays_its_pieces(
    who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = ppb.Stage({}, 8, "cpu")

    def exchange(text: str) -> list[str]:
        said = json.loads(text)
        is_bare = said is None or isinstance(said[0], str)
        return [text, json.dumps(["graph-memory", "full"]) if who == "another rank" and is_bare else text]

    stage.exchange = exchange
    pair = made("cpu", with_cache, dims=(0, None, 0), stage=stage)
    cache = torch.zeros(16, HIDDEN)

    def like(tensor: Tensor) -> Tensor:
        if who == "this rank" and tensor.data_ptr() == cache.data_ptr():
            raise torch.OutOfMemoryError("no room")
        return tensor.clone()

    monkeypatch.setattr(memory, "like", like)
    for length in range(4):
        counted = call(pair, 4, length, cache, torch.arange(4) + length)
    assert counted["replays"] > 1, "the pieces replay"
    text = " ".join(ppb.explain().split())
    assert ("no memory was left to compare" if who == "this rank" else "on rank 1 of this stage, full") in text


@pytest.mark.slow
@on_devices
def test_full_graphs_of_compiled_pieces(device: str) -> None:
    """Inductor's code, between it attention, in one graph; the pieces come from the same code."""
    pair = made(device, compiler="inductor", row_wise_ops="fulltest::*")
    for num_tokens in (4, 8):
        for length in range(1, 6):
            call(pair, num_tokens, length)
    for length in (3, 1, 4):
        assert call(pair, 4, length) == ONE_GRAPH
        assert call(pair, 3, length) == ONE_GRAPH, "padded"
        assert call(pair, 8, length) == PIECES
    compiled = [piece for piece in pair.program.compiled if piece is not None]
    assert len(compiled) == 3 and not any(piece.failure for piece in compiled)

"""Which graphs replay in a call, and what happens to calls that cannot: other threads, other captures, other memory."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import pp_piecewise_backend as ppb
from captured import DEVICES, HIDDEN, SIZES, Pair, misses_between, net, rows
from dumping import events_of, program_folders, summary_of
from forked import run_program
from pp_piecewise_backend import errors
from pp_piecewise_backend.debug.describe import describe_graphs
from pp_piecewise_backend.runtime.cudagraphs import emulated, memory

pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")
on_devices = pytest.mark.parametrize("device", DEVICES)

INNER: dict[str, Any] = {"call": None, "meet": None}


@torch.library.custom_op("graphstest::attention", mutates_args=())
def attention(x: Tensor) -> Tensor:
    if INNER["meet"] is not None:
        INNER["meet"]()
    return torch.tanh(x.cumsum(0) + x.mean(0))


@attention.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("graphstest::calling_another_model", mutates_args=())
def calling_another_model(x: Tensor) -> Tensor:
    return x * 2 if INNER["call"] is None else INNER["call"](x)


@calling_another_model.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def forward(self: Any, x: Tensor) -> Tensor:
    for _ in range(2):
        x = torch.ops.graphstest.attention(x @ self.w)
    return x @ self.w


def forward_of_stage(self: Any, hidden_states: Tensor) -> Tensor:
    return forward(self, hidden_states)


def call(program: Any, **values: Any) -> Tensor:
    """Call a program itself, without Dynamo and its guards."""
    (result,) = program(*[values["x"].shape[0] if i.spec is None else values[i.label] for i in program.inputs])
    return result


def pair_of(function: Any, device: str, **options: Any) -> Pair:
    return Pair(function, device, **{"split_ops": "+graphstest::attention", **options})


@pytest.fixture(autouse=True)
def _nothing_inside() -> Any:
    INNER.update(call=None, meet=None)
    yield
    INNER.update(call=None, meet=None)


# ------------------------------------------------------------------- calls inside of other calls


@on_devices
def test_a_call_made_inside_another_capture_runs_without_graphs(device: str) -> None:
    inner = pair_of(net(forward, device), device)
    inner.run_sizes(lambda n: (rows(n, device),))
    program, model = inner.program, inner.function
    captured = ppb.stats().captures

    def outer(self: Any, x: Tensor) -> Tensor:
        x = torch.ops.graphstest.calling_another_model(x @ self.w) @ self.w
        return torch.ops.graphstest.attention(x) @ self.w

    INNER["call"] = lambda x: call(program, x=x, w=model.w)
    outer_model = net(outer, device, seed=1)
    options = {**inner.options, "compiler": "eager"}
    compiled = torch.compile(outer_model, backend="pp_piecewise", options=options, fullgraph=True)
    before = program.stats.snapshot()
    for num_tokens in SIZES:
        x = rows(num_tokens, device)
        if num_tokens == 7:
            torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), outer_model(x), rtol=1e-5, atol=1e-5)
    after = program.stats.snapshot()
    assert not misses_between(before, after)
    assert after.foreign_captures - before.foreign_captures == 1
    assert program.stats.captures == captured


@on_devices
def test_programs_inside_the_eager_steps_of_another(device: str) -> None:
    inner = pair_of(net(forward, device), device)
    inner.run_sizes(lambda n: (rows(n, device),))

    def outer(self: Any, x: Tensor) -> Tensor:
        x = torch.ops.graphstest.calling_another_model(x @ self.w)
        return torch.ops.graphstest.attention(x @ self.w) @ self.w

    program, model = inner.program, inner.function
    outer_model = net(outer, device, seed=1)
    options = {**inner.options, "split_ops": "graphstest::*"}
    compiled = torch.compile(outer_model, backend="pp_piecewise", options=options, fullgraph=True)
    before = ppb.stats()
    for num_tokens in SIZES:
        x = rows(num_tokens, device)
        if num_tokens == 7:
            torch._dynamo.mark_dynamic(x, 0)
        INNER["call"] = lambda x: call(program, x=x, w=model.w)
        got = compiled(x)
        INNER["call"] = inner.twin
        torch.testing.assert_close(got, outer_model(x), rtol=1e-5, atol=1e-5)
    assert misses_between(before, ppb.stats()) == {"first-call": 3}
    assert ppb.stats().replays - before.replays == 4 * 3 + 5 * 3


@on_devices
def test_a_program_inside_itself(device: str) -> None:
    pair = pair_of(net(forward, device), device)
    pair.run_sizes(lambda n: (rows(n, device),))
    results = []

    def call_again() -> None:
        INNER["meet"] = None
        results.append(call(pair.program, x=rows(6, device), w=pair.function.w))

    INNER["meet"] = call_again
    before = ppb.stats()
    got = pair.compiled(rows(5, device))
    torch.testing.assert_close(got, pair.twin(rows(5, device)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0], pair.twin(rows(6, device)), rtol=1e-5, atol=1e-5)
    assert misses_between(before, ppb.stats()) == {"concurrent-call": 3}
    assert ppb.stats().replays - before.replays == 3


# ------------------------------------------------------------------------------------- threads


def in_threads(*bodies: Any) -> None:
    failures: list[BaseException] = []

    def guarded(body: Any) -> None:
        try:
            with torch.no_grad():
                body()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    if failures:
        raise failures[0]


@on_devices
def test_two_threads_with_one_model(device: str) -> None:
    pair = pair_of(net(forward, device), device)
    pair.run_sizes(lambda n: (rows(n, device),))
    barrier = threading.Barrier(2)
    inside = threading.local()

    def meet() -> None:
        """Both are inside of attention once, so that their calls overlap for certain."""
        if not getattr(inside, "met", False):
            inside.met = True
            barrier.wait(timeout=60)

    INNER["meet"] = meet
    before = ppb.stats()

    def body(seed: int) -> Any:
        def run() -> None:
            for num_tokens in (5, 6, 7, 8) * 5:
                x = rows(num_tokens, device, seed=seed)
                got = pair.compiled(x)
                torch.testing.assert_close(got, pair.twin(x), rtol=1e-5, atol=1e-5)

        return run

    in_threads(body(1), body(2))
    misses = misses_between(before, ppb.stats())
    assert set(misses) == {"concurrent-call"} and misses["concurrent-call"] % 3 == 0
    assert ppb.stats().replays - before.replays == 2 * 20 * 3 - misses["concurrent-call"] > 0


@on_devices
def test_two_threads_with_two_models(device: str) -> None:
    pairs = [pair_of(net(forward, device), device)]
    other = net(lambda self, x: torch.ops.graphstest.attention(x @ self.w) @ self.w + 1, device, seed=5)
    compiled = [pairs[0].compiled, torch.compile(other, backend="pp_piecewise", options=pairs[0].options)]
    models = [pairs[0].function, other]
    for model in compiled:
        for num_tokens in SIZES:
            x = rows(num_tokens, device)
            if num_tokens == 7:
                torch._dynamo.mark_dynamic(x, 0)
            model(x)
    before = ppb.stats()

    def body(index: int) -> Any:
        def run() -> None:
            for num_tokens in (5, 6, 7, 8) * 5:
                x = rows(num_tokens, device, seed=index)
                torch.testing.assert_close(compiled[index](x), models[index](x), rtol=1e-5, atol=1e-5)

        return run

    in_threads(body(0), body(1))
    assert misses_between(before, ppb.stats()) == {}
    assert ppb.stats().replays - before.replays == 20 * 3 + 20 * 2


# ------------------------------------------------------------------------- what is not captured


@on_devices
def test_other_dtypes_and_strides_are_programs_of_their_own(device: str) -> None:
    pair = pair_of(lambda x: torch.ops.graphstest.attention(x + 1) @ x.new_ones(HIDDEN, HIDDEN), device)
    pair(rows(7, device))
    pair(rows(6, device))
    before = ppb.stats()
    pair(rows(6, device).double())
    pair(torch.randn(HIDDEN, 6, device=device).t())
    after = ppb.stats()
    assert after.replays == before.replays
    assert set(misses_between(before, after)) == {"first-call"}


@on_devices
def test_inputs_with_an_offset_run_without_graphs_and_say_so(device: str) -> None:
    """Dynamo makes the offset a number of its own, which may differ in each call."""

    def adding(self: Any, x: Tensor, y: Tensor) -> Tensor:
        return torch.ops.graphstest.attention(x @ self.w + y) @ self.w

    pair = pair_of(net(adding, device), device)
    for offset, num_tokens in enumerate(SIZES, 1):
        pair(rows(num_tokens, device), rows(num_tokens + offset, device)[offset:])
    assert ppb.stats().miss_reasons == {"first-call": 1, "other-dynamic-dimension": 5}
    (obstacle,) = describe_graphs(pair.program).never_captured
    assert "the place of y in its memory varies, next to the token count" in obstacle.sentence


@on_devices
def test_a_program_called_with_what_no_guard_would_let_through(device: str) -> None:
    """Whoever calls a program itself, without Dynamo's guards, gets right results too."""
    pair = pair_of(net(forward, device), device)
    pair.run_sizes(lambda n: (rows(n, device),))
    program, w = pair.program, pair.function.w
    before = ppb.stats()
    x = rows(6, device)
    strided = torch.randn(HIDDEN, 6, device=device).t()
    twin = copy.deepcopy(pair.twin)
    torch.testing.assert_close(call(program, x=strided, w=w), twin(strided), rtol=1e-5, atol=1e-5)
    assert misses_between(before, ppb.stats()) == {}
    twin.double()
    torch.testing.assert_close(call(program, x=x.double(), w=twin.w), twin(x.double()))
    assert set(misses_between(before, ppb.stats())) == {"address-moved"}
    with pytest.raises(RuntimeError):  # as eager: a matmul of two dtypes
        call(program, x=x.double(), w=w)
    assert misses_between(before, ppb.stats())["rows-disagree"] == 3


@on_devices
def test_a_parameter_transposed_in_place(device: str) -> None:
    """Address and shape stay, strides do not."""
    pair = pair_of(net(forward, device), device)
    pair.run_sizes(lambda n: (rows(n, device),))
    for model in (pair.function, pair.twin):
        model.w.data = model.w.data.t()
    for num_tokens in SIZES:
        pair(rows(num_tokens, device))


@on_devices
def test_steps_are_timed_while_a_bucket_is_captured(device: str) -> None:
    pair = pair_of(net(forward, device), device)
    pair(rows(7, device))
    assert pair.program.step_seconds == {}
    pair(rows(6, device))
    seconds = pair.program.step_seconds
    assert set(seconds) == {piece.index for piece in pair.program.pieces} and min(seconds.values()) > 0


@on_devices
def test_a_new_large_cache_for_each_conversation(device: str) -> None:
    """A compute piece reads it by its address: a conversation of three calls misses once and replays once captured."""

    def reading(self: Any, x: Tensor, cache: Tensor) -> Tensor:
        x = torch.ops.graphstest.attention(x @ self.w)
        return (x @ cache) @ cache.t() @ self.w

    pair = pair_of(net(reading, device), device, dims=(0, None))
    # Divided, so that results are about 1 and not differences of thousands, whose last bits depend on the machine.
    first = torch.randn(HIDDEN, 4096, device=device) / 64
    for num_tokens in SIZES:
        pair(rows(num_tokens, device), first)
    kept, found = [], []
    for seed in range(6):
        cache = torch.randn(HIDDEN, 4096, device=device) / 64
        kept.append(cache)
        for call in range(3):
            before = ppb.stats()
            pair(rows(5 + call, device, seed=seed), cache)
            found.append(misses_between(before, ppb.stats()))
            assert ppb.stats().replays - before.replays == 2 - len(found[-1])
    # The piece that does not read it always replays.
    assert found == [{"address-moved": 1}, {}, {}] * 6
    (moved,) = [miss for miss in describe_graphs(pair.program).misses if miss.reason == "address-moved"][:1]
    assert moved.sentence.startswith("cache lies elsewhere than at capture; call 2 in a row")


@on_devices
def test_a_number_that_changes(device: str) -> None:
    def scaled(self: Any, x: Tensor, table: Tensor) -> Tensor:
        x = torch.ops.graphstest.attention(x @ self.w) @ self.w
        return x * table.shape[0]

    pair = pair_of(net(scaled, device), device, dims=(0, 0))
    tables = {size: torch.zeros(size, 2, device=device) for size in (11, 12)}
    for num_tokens in (7, 6, 8, 5):
        pair(rows(num_tokens, device), tables[11])
    assert ppb.stats().miss_reasons == {"first-call": 2}
    for call, expected in enumerate(({"scalar-changed": 1}, {}, {})):
        before = ppb.stats()
        pair(rows(5 + call, device), tables[12])
        assert misses_between(before, ppb.stats()) == expected, call
    assert len(ppb.programs()) == 1


@on_devices
def test_capture_in_warmup_only(device: str) -> None:
    pair = pair_of(net(forward, device), device, capture="warmup")
    for num_tokens in SIZES * 2:
        pair(rows(num_tokens, device))
    assert ppb.stats().captures == 0 and ppb.stats().replays == 0
    assert ppb.stats().miss_reasons == {"not-warmed-up": 2 * len(SIZES) * 3}
    ppb.warmup(pair.compiled, lambda n: ((rows(n, device),), {}), sizes=[8], progress=False)
    assert ppb.stats().captures == 3
    before = ppb.stats()
    for num_tokens in (8, 7, 6, 5, 4, 8):
        pair(rows(num_tokens, device))
    assert misses_between(before, ppb.stats()) == {"not-warmed-up": 3}  # the bucket of 4
    assert ppb.stats().captures == before.captures and ppb.stats().replays - before.replays == 5 * 3
    pair.function.w.data = pair.function.w.data.clone()
    before = ppb.stats()
    for _ in range(3):
        pair(rows(8, device))
    assert misses_between(before, ppb.stats()) == {"not-warmed-up": 9}
    assert ppb.stats().captures == before.captures


@on_devices
def test_graph_memory_is_kept_within_its_limit(device: str, caplog: pytest.LogCaptureFixture) -> None:
    pair = pair_of(net(forward, device), device)
    pair.run_sizes(lambda n: (rows(n, device),))
    limit = ppb.stats().graph_bytes - 1
    pair = pair_of(net(forward, device), device, graph_memory_bytes=limit)
    for num_tokens in (8, 8, 8, 4, 4, 2, 2, 3, 8, 7):
        pair(rows(num_tokens, device))
    reasons = ppb.stats().miss_reasons
    assert reasons["graph-memory"] > 0
    assert ppb.stats().graph_bytes <= limit
    dropped = {entry.tokens: entry.sentence for entry in describe_graphs(pair.program).dropped}
    assert 8 in dropped and "graph_memory_bytes" in dropped[8]
    assert any("bucket of 8 tokens" in record.getMessage() for record in caplog.records)
    assert device == "cuda" or ppb.stats().replays > 0  # the smaller buckets are kept


def test_the_limit_holds_for_all_programs_of_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them must not keep what the other one counts no more: sizes of one token have a program of their own."""
    blocks: list[weakref.ref[Tensor]] = []

    class Observed(memory.StaticMemory):
        def take(self, num_bytes: int, device: torch.device) -> Tensor:
            held_before = self.held_bytes
            block = super().take(num_bytes, device)
            if self.held_bytes > held_before:
                blocks.append(weakref.ref(block))
            return block

    monkeypatch.setattr(emulated, "StaticMemory", Observed)
    calls = (64, 64, 1, 1, 4, 4, 1, 64, 2, 2, 1, 3)
    sizes = {"capture_sizes": "1,2,4,64", "max_tokens": 64}

    def held_bytes() -> int:
        return sum(block.numel() for reference in blocks if (block := reference()) is not None)

    pair = pair_of(net(forward_of_stage, "cpu"), "cpu", **sizes)
    for num_tokens in calls:
        pair(rows(num_tokens, "cpu"))
    most = ppb.stats().graph_bytes
    assert held_bytes() == most > 0
    pair = pair_of(net(forward_of_stage, "cpu"), "cpu", graph_memory_bytes=most - 1, **sizes)
    for num_tokens in (1, 1, *calls):
        pair(rows(num_tokens, "cpu"))
        assert held_bytes() == ppb.stats().graph_bytes < most
    one, many = ppb.programs()
    assert (set(one.graphs.dropped), set(many.graphs.dropped)) == (set(), {64})
    with ppb.expect(captures=0, miss_reasons={"graph-memory": 3}, replays=4 * 3):
        for num_tokens in (64, 4, 3, 2, 1):
            pair(rows(num_tokens, "cpu"))


@on_devices
def test_static_outputs_outlive_graphs_that_the_limit_leaves_no_room_for(device: str) -> None:
    pair = pair_of(net(forward, device), device, static_outputs=True, graph_memory_bytes=1)
    pair(rows(8, device))
    with ppb.expect(captures=3, output_copies=1):
        pair(rows(8, device))
    assert ppb.stats().graph_bytes == 0


@on_devices
def test_strict_makes_a_miss_an_error(device: str) -> None:
    def drop(self: Any, x: Tensor) -> Tensor:
        x = torch.ops.graphstest.attention(x @ self.w) @ self.w
        return x - x.mean(0)

    model = net(drop, device)
    pair = pair_of(model, device, strict=True)
    x = rows(7, device)
    torch._dynamo.mark_dynamic(x, 0)
    pair.compiled(x)
    pair.compiled(rows(8, device))
    pair.compiled(rows(8, device))
    with pytest.raises(errors.GraphMiss, match="padding-unsafe"):
        pair.compiled(rows(6, device))
    torch.testing.assert_close(pair.compiled(rows(8, device)), model(rows(8, device)), rtol=1e-5, atol=1e-5)


@torch.library.custom_op("graphstest::centred", mutates_args=())
def centred(x: Tensor) -> Tensor:
    return x - x.mean(0)


@centred.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def mixing_tokens_in_an_opaque_op(self: Any, x: Tensor) -> Tensor:
    x = torch.ops.graphstest.attention(x @ self.w)
    return torch.ops.graphstest.centred(x @ self.w)


DECLARED = "graphstest::centred"
"""By a user who is wrong."""
FOUND_BY_THE_TEST = "R3: output 0 changes in the real rows with nan in the padded rows"


@on_devices
def test_a_miss_is_told_with_what_was_found_for_this_piece(device: str, tmp_path: Path) -> None:
    """The reason stays whole from the test of the padding to the log, the report, the dump and its events."""
    pair = pair_of(net(mixing_tokens_in_an_opaque_op, device), device, dump_dir=tmp_path, row_wise_ops=DECLARED)
    pair.run_sizes(lambda n: (rows(n, device),), unsafe={2: FOUND_BY_THE_TEST})
    assert pair.program.graphs is not None
    logged = {reason.sentence for reason, _ in pair.program.graphs.miss_log if reason.code == "padding-unsafe"}
    assert logged == {FOUND_BY_THE_TEST}
    assert f"missed padding-unsafe: 3 pieces in 3 calls of 5..7 tokens: {FOUND_BY_THE_TEST}" in flat(ppb.explain())
    pair.program.events.sealed()  # writes the dump as it is by now
    folder = program_folders(tmp_path)[-1]
    misses = [miss for miss in summary_of(folder).graphs.misses if miss.reason == "padding-unsafe"]
    assert [(miss.tokens, miss.sentence) for miss in misses] == [(n, FOUND_BY_THE_TEST) for n in (6, 5, 7)]
    told = {event["sentence"] for event in events_of(folder) if event.get("reason") == "padding-unsafe"}
    assert told == {FOUND_BY_THE_TEST}


@on_devices
def test_a_strict_error_says_what_was_found_for_this_piece(device: str) -> None:
    pair = pair_of(net(mixing_tokens_in_an_opaque_op, device), device, strict=True, row_wise_ops=DECLARED)
    for num_tokens in (8, 8, 8):
        pair(rows(num_tokens, device))
    with pytest.raises(errors.GraphMiss, match=rf"a call of 6 tokens .*\(padding-unsafe\): {FOUND_BY_THE_TEST}"):
        pair.compiled(rows(6, device))


@on_devices
def test_each_piece_that_must_not_be_padded_has_its_own_reason(device: str) -> None:
    """Where no piece may be padded, a padded call captures nothing."""

    def mixing_twice(self: Any, x: Tensor) -> Tensor:
        x = torch.ops.graphstest.attention((x @ self.w).softmax(0))
        return (x @ self.w) - x.mean(0)

    pair = pair_of(net(mixing_twice, device), device)
    for num_tokens in (7, 7):
        pair(rows(num_tokens, device))
    assert ppb.stats().miss_reasons == {"padding-unsafe": 4}, ppb.explain()
    assert pair.program.graphs is not None
    logged = {reason.sentence: misses.pieces for (reason, _), misses in pair.program.graphs.miss_log.items()}
    assert len(logged) == 2 and set(logged.values()) == {2}, logged
    assert [name for sentence in logged for name in ("softmax", "mean") if name in sentence] == ["softmax", "mean"]


def flat(report: str) -> str:
    """The report with wrapped lines joined, to look for sentences."""
    return " ".join(report.split())


@on_devices
def test_a_miss_without_a_token_count_says_so(device: str) -> None:
    """Not that the call had 0 tokens."""

    def without_inputs(self: Any) -> Tensor:
        return torch.ops.graphstest.attention(self.w @ self.w) @ self.w

    pair = pair_of(net(without_inputs, device), device, mark=False)
    for _ in range(2):
        pair()
    assert set(ppb.stats().miss_reasons) == {"no-token-count"}, ppb.explain()
    assert pair.program.graphs is not None
    assert {tokens for _, tokens in pair.program.graphs.miss_log} == {None}
    assert "missed no-token-count: 4 pieces in 2 calls without a token count: " in flat(ppb.explain())
    assert "0 tokens" not in ppb.explain()


@on_devices
def test_padding_never_replays_exact_sizes_only(device: str) -> None:
    pair = pair_of(net(forward, device), device, padding="never")
    for num_tokens in (8, 8, 8, 7, 3, 4, 4, 4):
        pair(rows(num_tokens, device))
    assert ppb.stats().miss_reasons == {"first-call": 2 * 3, "padding-off": 2 * 3}
    assert ppb.stats().replays == 4 * 3 and ppb.stats().padded_tokens == 0
    assert "padding-off" in {miss.reason for miss in describe_graphs(pair.program).misses}


@torch.library.custom_op("graphstest::reading_on_the_host", mutates_args=())
def reading_on_the_host(x: Tensor) -> Tensor:
    return x * (2.0 if x[0, 0].item() > 1e9 else 1.0)


@reading_on_the_host.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize("device", DEVICES[:1])
def test_a_piece_that_cannot_be_captured_runs_without_its_graph(device: str) -> None:
    def reading(self: Any, x: Tensor) -> Tensor:
        x = torch.ops.graphstest.attention(x @ self.w)
        return torch.ops.graphstest.reading_on_the_host(x @ self.w) @ self.w

    pair = pair_of(net(reading, device), device)
    for num_tokens in SIZES:
        pair(rows(num_tokens, device))
    assert ppb.stats().miss_reasons == {"first-call": 2, "capture-failed": 4}
    assert ppb.stats().replays == 4
    (reason,) = describe_graphs(pair.program).buckets[0].not_captured.values()
    assert "from the host" in reason


# ------------------------------------------------------------------------------- other settings


@on_devices
def test_mode_full_captures_all_of_it(device: str) -> None:
    def whole(self: Any, x: Tensor, cache: Tensor) -> Tensor:
        x = x @ self.w
        cache[: x.shape[0]] = x
        return torch.tanh(x + cache.sum()) @ self.w

    caches = [torch.zeros(16, HIDDEN, device=device) for _ in range(2)]
    pair = pair_of(net(whole, device), device, dims=(0, None), mode="full")
    for num_tokens in (8, 8, 8, 7, 7, 7):
        pair(rows(num_tokens, device), caches[0])
    assert len(pair.program.pieces) == 1
    assert ppb.stats().miss_reasons == {"first-call": 1, "padding-unsafe": 3}
    assert ppb.stats().replays == 2
    before = ppb.stats()
    for call in range(3):
        pair(rows(8, device, seed=call), caches[1])  # the other conversation
    assert misses_between(before, ppb.stats()) == {"address-moved": 1}
    assert ppb.stats().replays - before.replays == 2


@on_devices
def test_mode_full_pads_what_is_safe(device: str) -> None:
    def whole(self: Any, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w) @ self.w

    pair = pair_of(net(whole, device), device, mode="full")
    pair.run_sizes(lambda n: (rows(n, device),))


@pytest.mark.parametrize("device", DEVICES[:1])
def test_static_outputs_are_spoiled_under_strict_when_the_next_call_takes_their_memory(device: str) -> None:
    def more(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = forward(self, x)
        return y, y > 0, x[:, :2]

    pair = pair_of(net(more, device), device, static_outputs=True, strict=True)
    for num_tokens in (7, 8):
        pair(rows(num_tokens, device))
    x = rows(8, device)
    result, positive, view = pair(x)
    assert view.data_ptr() == x.data_ptr()
    expected = x.clone()
    again, *_ = pair(rows(5, device, seed=2))
    assert torch.equal(x, expected), "the caller's own memory is left alone"
    assert positive.all()
    assert torch.isnan(result).all(), "its memory belongs to the later call"
    torch.testing.assert_close(again, pair.twin(rows(5, device, seed=2))[0], rtol=1e-5, atol=1e-5)


def test_static_outputs_are_spoiled_by_a_call_of_any_program_of_the_stage() -> None:
    pair = pair_of(net(forward_of_stage, "cpu"), "cpu", static_outputs=True, strict=True)
    for num_tokens in (8, 8, 1, 1, 2, 2):
        pair(rows(num_tokens, "cpu"))
    assert len(ppb.programs()) == 2
    for num_tokens, other in ((8, 1), (1, 8), (2, 1)):
        result = pair(rows(num_tokens, "cpu"))
        later = pair(rows(other, "cpu"))
        assert torch.isnan(result).all(), "its memory belongs to the later call"
        torch.testing.assert_close(later, pair.twin(rows(other, "cpu")), rtol=1e-5, atol=1e-5)


@on_devices
def test_static_outputs_are_views_of_static_memory(device: str) -> None:
    pair = pair_of(net(forward, device), device, static_outputs=True)
    pointers = {pair(rows(n, device)).data_ptr() for n in SIZES[1:] if pair.compiled(rows(n, device)) is not None}
    results = {pair(rows(n, device)).data_ptr() for n in SIZES[1:]}
    assert len(results) == 1 and results <= pointers
    assert ppb.stats().output_copies == 0


# -------------------------------------------------------------------------------- beginning and end


@on_devices
def test_dynamo_is_reset_in_between(device: str) -> None:
    pair = pair_of(net(forward, device), device)
    pair.run_sizes(lambda n: (rows(n, device),))
    program = pair.program
    torch._dynamo.reset()
    assert ppb.programs() == ()
    assert ppb.stats().graph_bytes == 0 and ppb.stats().static_bytes == 0
    before = ppb.stats()
    for index, num_tokens in enumerate(SIZES):
        x = rows(num_tokens, device)
        if index == 0:
            torch._dynamo.mark_dynamic(x, 0)
        pair(x)
    assert misses_between(before, ppb.stats()) == {"first-call": 3}
    assert ppb.stats().replays - before.replays == 4 * 3
    # Who still holds the old program may call it: it captures again.
    x = rows(5, device)
    for _ in range(3):
        torch.testing.assert_close(call(program, x=x, w=pair.function.w), pair.twin(x), rtol=1e-5, atol=1e-5)


@on_devices
def test_release_leaves_no_memory_behind(device: str) -> None:
    pair = pair_of(net(forward, device), device)
    pair.run_sizes(lambda n: (rows(n, device),))
    held = ppb.stats().graph_bytes, ppb.stats().static_bytes
    assert min(held) > 0
    for _ in range(2):
        pair.program.release()
        assert (ppb.stats().graph_bytes, ppb.stats().static_bytes) == (0, 0)
        for num_tokens in (8, 8, 5):
            pair(rows(num_tokens, device))
        assert (ppb.stats().graph_bytes, ppb.stats().static_bytes) <= held
    del pair
    torch._dynamo.reset()
    gc.collect()
    assert (ppb.stats().graph_bytes, ppb.stats().static_bytes) == (0, 0)


_SCRIPT = """
import torch
from captured import SIZES, net, rows
from runtime import test_dispatch
torch.set_grad_enabled(False)
pair = test_dispatch.pair_of(net(test_dispatch.forward, {device!r}), {device!r})
for n in SIZES:
    kept = pair(rows(n, {device!r}))
print(test_dispatch.ppb.stats().replays)
"""


@on_devices
def test_the_interpreter_exits_cleanly_with_graphs_alive(device: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(_SCRIPT.format(device=device))
    ended = run_program(tmp_path / "program.py", ends_itself=True)
    assert (ended.exit_code, ended.log.strip()) == (0, "12")


# ---------------------------------------------------------------- two stage inputs in one memory


def changes_one_proxy(hidden_states: Tensor, residual: Tensor) -> Tensor:
    before = torch.ops.graphstest.attention(residual * 2) * 3
    hidden_states.add_(1)
    return before + hidden_states * 2


def reads_the_other_proxy(hidden_states: Tensor, residual: Tensor) -> Tensor:
    residual[:, 0] = 0.5
    return torch.ops.graphstest.attention(hidden_states * 2) * 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["piecewise", "full"])
@pytest.mark.parametrize("function", [changes_one_proxy, reads_the_other_proxy])
def test_proxies_that_share_memory_which_the_graph_writes(function: Any, mode: str, device: str) -> None:
    pair = Pair(function, device, split_ops="+graphstest::attention", mode=mode)
    for num_tokens in (8, 8, 8, 7):
        x = rows(num_tokens, device)
        theirs = x.clone()
        pair(x, x[:], theirs=[theirs, theirs[:]])
    if mode == "full":
        assert ppb.stats().miss_reasons["inputs-overlap"] == 4
    else:
        assert ppb.stats().replays > 0


REFUSAL: dict[str, type[Exception]] = {"kind": RuntimeError}


@torch.library.custom_op("graphstest::refusing_multiples_of_8", mutates_args=())
def refusing_multiples_of_8(x: Tensor) -> Tensor:
    if x.shape[0] % 8 == 0:
        raise REFUSAL["kind"]("no multiples of 8")
    return x * 2


@refusing_multiples_of_8.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize("error", [RuntimeError, AssertionError, ValueError, TypeError, KeyError, ZeroDivisionError])
def test_what_an_op_raises_at_the_size_of_the_bucket_stays_here(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager never calls it with 8 rows."""
    monkeypatch.setitem(REFUSAL, "kind", error)

    def refused(self: Any, x: Tensor) -> Tensor:
        return torch.ops.graphstest.attention(torch.ops.graphstest.refusing_multiples_of_8(x @ self.w)) @ self.w

    pair = Pair(net(refused, "cpu"), "cpu", split_ops="+graphstest::attention", row_wise_ops="graphstest::refusing*")
    for num_tokens in (6, 5, 5, 7):
        pair(rows(num_tokens, "cpu"))
    assert ppb.stats().miss_reasons["capture-failed"] > 0 and ppb.stats().replays > 0
    (bucket,) = describe_graphs(pair.program).buckets
    assert f"{error.__name__}: " in bucket.not_captured[0]
    with pytest.raises(error, match="no multiples of 8"):
        pair(rows(8, "cpu"))  # at its own size it is the caller's, as in eager


def slice_and_softmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """Inductor keeps both results in one buffer if the rows are random."""
    x = torch.rand_like(x) * 0 + x
    return x[:, :2], x.softmax(-1)


def every_second_and_sum(x: Tensor) -> tuple[Tensor, Tensor]:
    x = F.dropout(x * 2, 0.5, training=True)
    return x[:, ::2], x.exp()


@pytest.mark.parametrize("graphs", ["off", "emulate"])
@pytest.mark.parametrize("function", [slice_and_softmax, every_second_and_sum])
def test_results_that_a_compiler_merged_are_taken_apart_with_their_strides(function: Any, graphs: str) -> None:
    run = torch.compile(function, backend="pp_piecewise", options={"graphs": graphs})
    x = torch.randn(8, 4)
    for _ in range(3):
        results = run(x)
        assert [result.stride() for result in results] == [result.stride() for result in function(x)]
        assert memory.address(results[0]) != memory.address(results[1])

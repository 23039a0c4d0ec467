"""``mode="auto"``, the default: full graphs for small calls where they are known to be right, else pieces."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library import opaque_object
from torch.nn.functional import scaled_dot_product_attention

import pp_piecewise_backend as ppb
from captured import DEVICES, HIDDEN, Pair, misses_between, net, rows
from pp_piecewise_backend.errors import ReplayDiffers
from pp_piecewise_backend.runtime import bucket, replay
from pp_piecewise_backend.runtime.bucket import BucketCapture
from pp_piecewise_backend.runtime.cudagraphs import memory
from pp_piecewise_backend.runtime.instructions import Instruction
from pp_piecewise_backend.runtime.replay import FlatProgram
from pp_piecewise_backend.runtime.stage import StageMemory
from pp_piecewise_backend.runtime.warmup import MAX_UNCOUNTED, time_buckets

pytestmark = pytest.mark.usefixtures("no_gradients")
on_devices = pytest.mark.parametrize("device", DEVICES)

OPAQUE_BASE: Any = getattr(opaque_object, "OpaqueBase", None) or opaque_object.CustomClassBase  # since 2.14

CONTEXT: dict[str, Any] = {"scale": 1.0}
"""What ops in Python read besides their arguments."""


@torch.library.custom_op("autotest::scaled", mutates_args=())
def scaled(x: Tensor) -> Tensor:
    return x * CONTEXT["scale"]


scaled.register_fake(torch.empty_like)


@torch.library.custom_op("autotest::longest", mutates_args=())
def longest(x: Tensor, number: int) -> Tensor:
    return x * number


longest.register_fake(lambda x, number: torch.empty_like(x))


class Metadata(OPAQUE_BASE):  # type: ignore[misc]
    """What an engine would hand to attention; it changes from call to call."""

    def __init__(self) -> None:
        self.scale = 1.0


opaque_object.register_opaque_type(Metadata, typ="reference")
_NAME = f"{Metadata.__module__}.{Metadata.__qualname__}"
_LIBRARY = torch.library.Library("autotest", "FRAGMENT")
_LIBRARY.define(f"with_metadata(Tensor x, {_NAME} metadata) -> Tensor")
_LIBRARY.impl("with_metadata", lambda x, metadata: x * metadata.scale, "CompositeExplicitAutograd")
torch.library.register_fake("autotest::with_metadata", lambda x, metadata: torch.empty_like(x), lib=_LIBRARY)


@pytest.fixture(autouse=True)
def context() -> None:
    CONTEXT["scale"] = 1.0


def layers(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor, *more: Any) -> Tensor:
        for _ in range(2):
            x = attend(torch.tanh(x @ self.w), *more) @ self.w
        return x

    return forward


def attend_to_memory(x: Tensor, keys: Tensor) -> Tensor:
    return scaled_dot_product_attention(x[None], keys[None], keys[None])[0]


def into_a_cache(self: Any, x: Tensor, cache: Tensor, places: Tensor) -> Tensor:
    x = torch.tanh(x @ self.w)
    cache.index_copy_(0, places, x)
    return torch.tanh(attend_to_memory(x, cache) @ self.w)


def made(function: Callable[..., Any], device: str = "cpu", **options: Any) -> Pair:
    options = {"mode": "auto", "full_max_tokens": 4, "split_ops": "built-in", "graph_safe_ops": "none", **options}
    return Pair(net(function, device), device, **{"mark": False, **options})


def warm(pair: Pair, *more: Callable[[int], Any], varies: bool = True) -> None:
    seeds = itertools.count() if varies else itertools.repeat(0)

    def make_inputs(num_tokens: int) -> Any:
        seed = next(seeds)
        return (rows(num_tokens, pair.device, seed=seed), *(make(num_tokens) for make in more)), {}

    ppb.warmup(pair.compiled, make_inputs, progress=False)


def counted(pair: Pair, num_tokens: int, *more: Any, seed: int = 99) -> dict[str, Any]:
    """What one call, compared with eager, adds to the counters."""
    before = ppb.stats()
    pair(rows(num_tokens, pair.device, seed=seed), *more)
    after = ppb.stats()
    found = {name: after[name] - before[name] for name in ("replays", "graph_misses", "captures")}
    return {**found, "misses": misses_between(before, after)}


def explained() -> str:
    return " ".join(ppb.explain().split())


ONE_GRAPH = {"replays": 1, "graph_misses": 0, "captures": 0, "misses": {}}
PIECES = {"replays": 3, "graph_misses": 0, "captures": 0, "misses": {}}
TWO_PIECES = {**PIECES, "replays": 2}


# ------------------------------------------------------------------------------- what is known


@on_devices
def test_attention_of_pytorch_is_captured_for_small_calls_after_a_warm_up(device: str) -> None:
    pair = made(layers(attend_to_memory), device, strict=True)
    keys = rows(6, device, seed=50)
    warm(pair, lambda n: keys)
    for num_tokens, expected in ((4, ONE_GRAPH), (8, PIECES), (2, ONE_GRAPH), (1, ONE_GRAPH), (4, ONE_GRAPH)):
        assert counted(pair, num_tokens, keys) == expected
    said = "full graphs up to 4 tokens, since every op is known to read nothing but its arguments; without warmup()"
    assert said in explained() and f"graphs auto, {'emulate' if device == 'cpu' else 'cuda'}" in explained()


def native(x: Tensor) -> Tensor:
    """By two ops in C++ of a library of which nothing is known here; these round."""
    return torch.ops.quantization._Bfloat16QuantizedToFloat(torch.ops.quantization._FloatToBfloat16Quantized(x))


torch.library.register_fake(
    "quantization::_FloatToBfloat16Quantized", lambda x: torch.empty_like(x, dtype=torch.float16)
)
torch.library.register_fake(
    "quantization::_Bfloat16QuantizedToFloat", lambda x: torch.empty_like(x, dtype=torch.float32)
)


@pytest.mark.parametrize("is_cut_at", [True, False])
def test_an_op_in_c_plus_plus_of_which_nothing_is_known_is_not_captured_with_the_rest(is_cut_at: bool) -> None:
    def attend(x: Tensor, keys: Tensor) -> Tensor:
        return attend_to_memory(native(x), keys)

    split_ops = "+quantization::*" if is_cut_at else "built-in"
    keys = rows(6, "cpu", seed=50)
    for options, expected in (
        ({}, PIECES),
        ({"graph_safe_ops": "quantization::*"}, ONE_GRAPH),
        ({"mode": "full_and_piecewise"}, ONE_GRAPH),
        ({"mode": "piecewise", "graph_safe_ops": "quantization::*"}, PIECES),
    ):
        pair = made(layers(attend), split_ops=split_ops, **options)
        warm(pair, lambda n: keys)
        assert counted(pair, 4, keys) == expected, options
        is_named = "full graphs none, the pieces replay instead: mode='auto' makes them where every op is known to read"
        assert (is_named in explained()) is (not options), options
        assert ("and quantization::_FloatToBfloat16Quantized is not; name it in graph_safe_ops" in explained()) is (
            not options
        )


@pytest.mark.parametrize("is_declared", [True, False])
def test_an_op_in_python_is_captured_with_the_rest_only_if_it_is_declared(is_declared: bool) -> None:
    pair = made(
        layers(torch.ops.autotest.scaled),
        split_ops="+autotest::scaled",
        graph_safe_ops="autotest::scaled" if is_declared else "none",
    )
    warm(pair)
    assert counted(pair, 4) == (ONE_GRAPH if is_declared else PIECES)
    CONTEXT["scale"] = 2.0
    if not is_declared:
        assert counted(pair, 4) == PIECES, "compared with eager"
        assert "and autotest::scaled is not" in explained()


def test_numbers_that_vary_are_never_frozen() -> None:
    """Nor captured again for each value, as longest lengths of a batch are hardly ever the same."""
    for mode in ("auto", "full_and_piecewise"):
        pair = made(
            layers(torch.ops.autotest.longest), split_ops="+autotest::longest", graph_safe_ops="*::*", mode=mode
        )
        numbers = itertools.count(2)
        warm(pair, lambda n, numbers=numbers: next(numbers))
        seen = [counted(pair, 4, number) for number in (7, 8, 8, 9, 9, 9)]
        assert (seen == [PIECES] * 6) is (mode == "auto"), (mode, seen)
        why = "the graph takes more[0], no tensor nor the token count, which a full graph would freeze"
        assert (why in explained()) is (mode == "auto")


def test_objects_whose_contents_may_change_are_never_frozen() -> None:
    for mode in ("auto", "full_and_piecewise"):
        attend = torch.ops.autotest.with_metadata
        pair = made(layers(attend), split_ops="+autotest::with_metadata", graph_safe_ops="autotest::*", mode=mode)
        metadata = Metadata()
        warm(pair, lambda n, metadata=metadata: metadata)
        x = rows(4, "cpu")
        for seed in (7, 8):
            pair.compiled(rows(4, "cpu", seed=seed), metadata)
        metadata.scale = 3.0
        got = pair.compiled(x, metadata)
        is_right = torch.allclose(got, pair.twin(x, metadata), atol=1e-5)
        assert is_right is (mode == "auto"), "to declare such an op is wrong, which is seen where it is captured"


def by_the_host(x: Tensor, lengths: Tensor) -> Tensor:
    return scaled_dot_product_attention(x[None], x[None], x[None])[0] * lengths.max().item()


def by_control_flow(x: Tensor, lengths: Tensor) -> Tensor:
    x = scaled_dot_product_attention(x[None], x[None], x[None])[0]
    return torch.cond(lengths.max() > 2, lambda y: y + 1, lambda y: y - 1, (x,))


@pytest.mark.parametrize(
    ("attend", "name"), [(by_the_host, "aten::_local_scalar_dense"), (by_control_flow, "cond")], ids=["item", "cond"]
)
def test_what_a_tensor_decides_on_the_host_is_not_captured(attend: Any, name: str) -> None:
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        pair = made(layers(attend))
        lengths = torch.tensor([1, 2])
        warm(pair, lambda n: lengths)
        for longest in (2, 5, 1):
            lengths.fill_(longest)
            pair(rows(4, "cpu"), lengths)
        assert f"and {name} is not; name it" in explained()
        assert pair.program.full is not None and not pair.program.full.buckets


# --------------------------------------------------------------------------------------- when


@pytest.mark.parametrize("mode", ["auto", "full_and_piecewise"])
def test_without_a_warm_up_there_are_pieces(mode: str) -> None:
    """There are no two contexts in which a full graph could be compared before it serves."""
    pair = made(layers(attend_to_memory), mode=mode)
    keys = rows(6, "cpu", seed=50)
    for seed in range(8):
        found = counted(pair, 4, keys, seed=seed)
    assert found == (PIECES if mode == "auto" else ONE_GRAPH)
    assert ("without warmup() there are none" in explained()) is (mode == "auto")
    full = pair.program.full
    assert full is not None and full.graphs is not None
    assert bool(full.buckets or full.graphs.miss_log) is (mode != "auto"), "calls do not even ask"
    warm(pair, lambda n: keys)
    assert counted(pair, 4, keys, seed=9) == ONE_GRAPH, "a warm-up comes in time at any time"


@pytest.mark.parametrize("is_proven", [True, False])
def test_another_cache_is_captured_once_the_first_one_s_graph_is_proven(is_proven: bool) -> None:
    pair = made(into_a_cache, capture_sizes="4", max_tokens=4)
    cache, other = (torch.zeros(16, HIDDEN) for _ in range(2))
    warm(pair, lambda n: cache, torch.arange)
    places = torch.arange(4)
    if is_proven:
        assert counted(pair, 4, cache, places) == ONE_GRAPH
    found = [counted(pair, 4, other, places + seed, seed=seed) for seed in range(6)]
    assert [each["captures"] for each in found] == ([0, 1, 0, 0, 0, 0] if is_proven else [0] * 6)
    assert found[-1] == (ONE_GRAPH if is_proven else TWO_PIECES) and found[0] == TWO_PIECES
    assert "cache lies elsewhere than at capture" in explained()
    full = pair.program.full
    assert full is not None
    left = {id(bucket.memory[0]()): bucket.proofs.left for bucket, _ in full.buckets if bucket.proofs is not None}
    expected = {cache: 0, other: 0} if is_proven else {cache: 1}
    assert left == {id(tensor.untyped_storage()): count for tensor, count in expected.items()}, (
        "compared like the first"
    )


def test_what_never_varied_proves_nothing_for_another_cache() -> None:
    pair = made(into_a_cache, capture_sizes="4", max_tokens=4)
    cache, other = (torch.zeros(16, HIDDEN) for _ in range(2))
    warm(pair, lambda n: cache, torch.arange, varies=False)
    for _ in range(MAX_UNCOUNTED + 2):
        cache.zero_()
        counted(pair, 4, cache, torch.arange(4), seed=0)
    found = [counted(pair, 4, other, torch.arange(4), seed=seed)["captures"] for seed in range(6)]
    assert found == [0] * 6


def test_ranks_of_one_stage_capture_in_the_warm_up_only() -> None:
    """Their caches need not move alike."""
    stage = ppb.Stage({}, 4, "cpu")
    stage.exchange = lambda text: [text, text]
    pair = made(into_a_cache, capture_sizes="4", stage=stage)
    cache, other = (torch.zeros(16, HIDDEN) for _ in range(2))
    warm(pair, lambda n: cache, torch.arange)
    assert counted(pair, 4, cache, torch.arange(4)) == ONE_GRAPH
    found = [counted(pair, 4, other, torch.arange(4), seed=seed) for seed in range(6)]
    assert found == [TWO_PIECES] * 6 and "only warmup() captures" in explained()
    assert counted(pair, 4, cache, torch.arange(4)) == ONE_GRAPH, "the first one still has its graph"


@pytest.mark.parametrize("varies", [True, False])
def test_a_warm_up_that_varies_nothing_leaves_comparisons_to_the_first_calls(
    varies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []
    run_verified = FlatProgram.run_verified
    pair = made(layers(attend_to_memory), capture_sizes="4", max_tokens=4)
    keys = rows(6, "cpu", seed=50)
    warm(pair, lambda n: keys, varies=varies)
    monkeypatch.setattr(FlatProgram, "run_verified", lambda *arguments: compared.append(1) or run_verified(*arguments))
    time_buckets(pair.compiled, lambda n: ((rows(n, "cpu"), keys), {}), [4])
    assert not compared, "what is timed does nothing else"
    for seed in range(100, 108):
        counted(pair, 4, keys, seed=seed)
    assert len(compared) == (1 if varies else 3)


# --------------------------------------------------------------------------------- it gives way


def lying(**options: Any) -> Pair:
    """A pair whose op was declared and reads a number all the same."""
    options = {"graph_safe_ops": "autotest::*", "capture_sizes": "4", "max_tokens": 4, **options}
    return made(layers(torch.ops.autotest.scaled), split_ops="+autotest::scaled", **options)


@pytest.mark.parametrize("mode", ["auto", "full_and_piecewise"])
@pytest.mark.parametrize("at", ["warm-up", "first call"])
def test_what_differs_drops_the_size_and_is_no_error(at: str, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    pair = lying(strict=True, mode=mode)

    def changing(num_tokens: int) -> Any:
        CONTEXT["scale"] += at == "warm-up"
        return (rows(num_tokens, "cpu", seed=int(CONTEXT["scale"])),), {}

    def play() -> None:
        if at == "warm-up":
            ppb.warmup(pair.compiled, changing, progress=False)
        else:
            warm(pair)
            CONTEXT["scale"] = 5.0
            pair(rows(4, "cpu", seed=77))

    if mode != "auto":
        with pytest.raises((ReplayDiffers, AssertionError), match="differs from the graph itself"):
            play()
        return
    play()
    CONTEXT["scale"] = 7.0
    assert counted(pair, 4) == PIECES
    assert "dropped 4 tokens (verify-failed)" in explained() and "The pieces replay instead" in explained()
    assert [record.levelname for record in caplog.records if "differs from" in record.getMessage()] == ["WARNING"]


def test_verify_every_compares_full_graphs_without_an_error_and_pieces_with_one() -> None:
    pair = lying(strict=True, verify_every=1)
    warm(pair)
    pair(rows(4, "cpu", seed=1))
    CONTEXT["scale"] = 5.0
    assert counted(pair, 4, seed=2)["misses"] == {}
    assert counted(pair, 4, seed=3) == PIECES
    step = pair.compute[0]
    graph = next(b for b, _ in pair.program.all_buckets if step in b.graphs and len(b.graphs) == 3).graphs[step]
    graph.outputs[0].fill_(3)
    graph.replay = lambda: None  # type: ignore[method-assign]
    for found, _ in pair.program.all_buckets:
        found.programs.clear()
    with pytest.raises(ReplayDiffers):
        pair.compiled(rows(4, "cpu", seed=4))


def test_a_kernel_that_is_not_reproducible_drops_the_size() -> None:
    """Its sums differ in the last bits from run to run, as with atomic additions."""
    pair = lying(strict=True)

    def rounding(num_tokens: int) -> Any:
        CONTEXT["scale"] *= 1 + 2**-20
        return (rows(num_tokens, "cpu"),), {}

    ppb.warmup(pair.compiled, rounding, progress=False)
    assert counted(pair, 4) == PIECES and "does not give the same bits each time" in explained()


# -------------------------------------------------------------------------------------- memory


def out_of_memory_for(cache: Tensor, normal: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def like(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() == cache.data_ptr():
            raise torch.OutOfMemoryError("no room")
        return normal(tensor)

    return like


def with_cache(**options: Any) -> tuple[Pair, Tensor]:
    return made(into_a_cache, capture_sizes="2,4", max_tokens=4, strict=True, **options), torch.zeros(16, HIDDEN)


def dropped(pair: Pair) -> dict[int, str]:
    full = pair.program.full
    assert full is not None and full.graphs is not None
    return {tokens: reason.code for tokens, reason in full.graphs.dropped.items()}


@pytest.mark.parametrize("mode", ["auto", "full_and_piecewise"])
def test_a_copy_of_state_that_takes_more_than_half_of_what_is_free_is_not_made(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, cache = with_cache(mode=mode)
    free = 2 * cache.nbytes - 1
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    warm(pair, lambda n: cache, torch.arange)
    assert counted(pair, 4, cache, torch.arange(4)) == (TWO_PIECES if mode == "auto" else ONE_GRAPH)
    assert dropped(pair) == ({2: "graph-memory", 4: "graph-memory"} if mode == "auto" else {})
    full = pair.program.full
    assert full is not None and bool(full.buckets) is (mode != "auto"), "there is none before it is captured either"
    said = f"{cache.nbytes} bytes are more than half of the {free} that are free"
    assert (said in explained()) is (mode == "auto")
    free = 2 * cache.nbytes
    pair, cache = with_cache(mode=mode)
    warm(pair, lambda n: cache, torch.arange)
    assert counted(pair, 4, cache, torch.arange(4)) == ONE_GRAPH


@pytest.mark.parametrize("where", [memory, replay, bucket], ids=lambda module: module.__name__.rpartition(".")[2])
def test_state_that_cannot_be_copied_drops_the_size(where: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a comparison, in the middle of one, and in the run before a capture."""
    pair, cache = with_cache()
    warm_up, is_capturing_pieces = BucketCapture._warm_up, []

    def of_full_graphs_only(self: Any, *arguments: Any) -> None:
        is_capturing_pieces.append(not self._plan.is_beside_pieces)
        warm_up(self, *arguments)
        is_capturing_pieces.pop()

    monkeypatch.setattr(BucketCapture, "_warm_up", of_full_graphs_only)
    normal = where.like
    monkeypatch.setattr(
        where, "like", lambda t: (normal if any(is_capturing_pieces) else out_of_memory_for(cache, normal))(t)
    )
    warm(pair, lambda n: cache, torch.arange)
    assert counted(pair, 4, cache, torch.arange(4)) == TWO_PIECES
    assert counted(pair, 2, cache, torch.arange(2)) == TWO_PIECES
    text = explained()
    assert "OutOfMemoryError: no room" in text if where is bucket else "no memory was left to compare" in text


def test_memory_that_ends_while_it_serves_drops_the_size_before_anything_was_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def writes_what_it_read(self: Any, x: Tensor, cache: Tensor) -> Tensor:
        x = torch.tanh(x @ self.w)
        cache.add_(x.sum())
        return torch.tanh(attend_to_memory(x, cache) @ self.w)

    pair = made(writes_what_it_read, capture_sizes="4", max_tokens=4, strict=True)
    cache = torch.zeros(16, HIDDEN)
    warm(pair, lambda n: cache)
    run, is_over = Instruction.run, [True]

    def without_memory(self: Instruction, arguments: Sequence[Any]) -> Sequence[Any]:
        outputs = run(self, arguments)
        if is_over[0] and len(self.piece.ops) > 4:
            raise torch.OutOfMemoryError("no room")
        return outputs

    monkeypatch.setattr(Instruction, "run", without_memory)
    assert counted(pair, 4, cache)["misses"] == {}, "its writes are compared, too"
    assert dropped(pair) == {4: "graph-memory"}
    is_over[0] = False
    assert counted(pair, 4, cache, seed=5) == TWO_PIECES


@pytest.mark.parametrize("who", ["this rank", "another rank"])
def test_ranks_of_one_stage_drop_a_size_together(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = ppb.Stage({}, 4, "cpu")
    asked: Counter[str] = Counter()

    def exchange(text: str) -> list[str]:
        said = json.loads(text)
        asked["reasons"] += said is None or isinstance(said[0], str)
        is_bare = said is None or isinstance(said[0], str)
        return [text, json.dumps(["graph-memory", "full"]) if who == "another rank" and is_bare else text]

    stage.exchange = exchange
    pair = made(into_a_cache, capture_sizes="4", stage=stage)
    cache = torch.zeros(16, HIDDEN)
    if who == "this rank":
        monkeypatch.setattr(memory, "free_bytes", lambda device: 1)
    warm(pair, lambda n: cache, torch.arange)
    assert asked["reasons"], "each rank says what it found"
    assert counted(pair, 4, cache, torch.arange(4)) == TWO_PIECES
    said = "on rank 0 of this stage, a full graph is" if who == "this rank" else "on rank 1 of this stage, full"
    assert said in explained()


def test_copies_of_weights_are_made_by_the_pieces_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a capture it is seen that nothing is written silently: not on copies of all weights of a stage at once."""
    seen: list[tuple[bool, set[int]]] = []
    undo_writes, warm_up = bucket.undo_writes, BucketCapture._warm_up

    def noting(self: Any, *arguments: Any) -> None:
        seen.append((self._plan.is_beside_pieces, set()))
        warm_up(self, *arguments)

    def undo(before: Any) -> bool:
        seen[-1][1].update(tensor.data_ptr() for tensor, _ in before)
        return undo_writes(before)

    monkeypatch.setattr(BucketCapture, "_warm_up", noting)
    monkeypatch.setattr(bucket, "undo_writes", undo)
    pair = made(layers(attend_to_memory), capture_sizes="4", max_tokens=4)
    keys = rows(6, "cpu", seed=50)
    warm(pair, lambda n: keys)
    weight = pair.function.w.data_ptr()
    assert any(weight in places for is_full, places in seen if not is_full)
    of_full = [places for is_full, places in seen if is_full]
    assert of_full and all(weight not in places for places in of_full) and any(of_full), "other inputs are seen to"


class Holder:
    """What holds captures of these sizes in the memory of a stage."""

    def __init__(self, gives_way: bool, *tokens: int) -> None:
        self.gives_way, self.tokens = gives_way, set(tokens)
        self.releases = 0

    @property
    def largest_tokens(self) -> int:
        return max(self.tokens, default=0)

    def release_buckets(self) -> None:
        self.releases += 1

    def retry_dropped(self) -> None:
        raise NotImplementedError

    def drop(self, tokens: int, held_bytes: int, limit_bytes: int) -> None:
        self.release_buckets()
        self.tokens.discard(tokens)


@pytest.mark.parametrize("gives_way", [True, False])
def test_full_graphs_of_which_nobody_asked_make_room_before_pieces_do(gives_way: bool) -> None:
    full, pieces, others = Holder(gives_way, 2, 4), Holder(False, 2, 4, 8), Holder(False, 8)
    shared = memory_of_a_stage(full, pieces, others)
    rounds = [(full.tokens.copy(), pieces.tokens.copy(), others.tokens.copy()) for _ in range(4) if drop(shared)]
    expected = [
        [({2}, {2, 4, 8}, {8}), (set(), {2, 4, 8}, {8}), (set(), {2, 4}, set()), (set(), {2}, set())],
        [({2, 4}, {2, 4}, set()), ({2}, {2}, set()), (set(), set(), set()), (set(), set(), set())],
    ]
    assert rounds == expected[not gives_way]
    assert full.releases == pieces.releases == others.releases == 4, "pools shrink only as a whole"


def memory_of_a_stage(*holders: Holder) -> StageMemory:
    shared = StageMemory()
    for holder in holders:
        shared.add_user(holder)
    return shared


def drop(shared: StageMemory) -> bool:
    shared.drop_largest(1)
    return True


def test_pieces_of_a_warm_up_find_state_as_it_was_before_the_full_graph_ran() -> None:
    """Written twice, this cache would be too short."""

    def appends(self: Any, x: Tensor, cache: Tensor, filled: Tensor) -> Tensor:
        x = torch.tanh(x @ self.w)
        cache.index_copy_(0, filled + torch.arange(x.shape[0]), x)
        filled.add_(x.shape[0])
        return torch.tanh(attend_to_memory(x, cache) @ self.w)

    pair = made(appends, capture_sizes="4", max_tokens=4)
    cache, filled = torch.zeros(4, HIDDEN), torch.zeros(1, dtype=torch.int64)
    warm(pair, lambda n: cache, lambda n: filled)
    assert not filled and not cache.any()
    assert counted(pair, 4, cache, filled) == ONE_GRAPH and filled == 4


# ------------------------------------------------------------------------------------ failures


def fail_full_graphs(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    run = BucketCapture.run

    def failing(self: BucketCapture, *arguments: Any) -> Any:
        if self._plan.is_beside_pieces:
            raise error
        return run(self, *arguments)

    monkeypatch.setattr(BucketCapture, "run", failing)


@pytest.mark.parametrize("mode", ["auto", "full_and_piecewise"])
@pytest.mark.parametrize("error", [RuntimeError("no"), torch.OutOfMemoryError("no room")], ids=["error", "memory"])
def test_a_warm_up_goes_on_with_pieces_where_full_graphs_fail(
    error: Exception, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_full_graphs(error, monkeypatch)
    pair = made(layers(attend_to_memory), strict=True, mode=mode)
    keys = rows(6, "cpu", seed=50)
    if mode != "auto":
        with pytest.raises(type(error)):
            warm(pair, lambda n: keys)
        return
    warm(pair, lambda n: keys)
    assert counted(pair, 4, keys) == PIECES and f"{type(error).__name__}: {error}" in explained()


def test_a_failure_of_one_rank_of_several_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others would wait for it in their exchanges."""
    stage = ppb.Stage({}, 8, "cpu")
    stage.exchange = lambda text: [text, text]
    fail_full_graphs(RuntimeError("no"), monkeypatch)
    pair = made(layers(attend_to_memory), stage=stage)
    keys = rows(6, "cpu", seed=50)
    with pytest.raises(RuntimeError, match="no"):
        warm(pair, lambda n: keys)


def test_an_error_of_the_model_in_a_warm_up_is_the_caller_s() -> None:
    @torch.library.custom_op("autotest::refuses", mutates_args=())
    def refuses(x: Tensor) -> Tensor:
        raise ValueError("the model refuses")

    refuses.register_fake(torch.empty_like)
    pair = made(layers(torch.ops.autotest.refuses), split_ops="+autotest::refuses", graph_safe_ops="autotest::*")
    with pytest.raises(ValueError, match="the model refuses"):
        warm(pair)

"""What is kept captured, and for how long: instances, weights that are replaced, large tensors that move, numbers."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pp_piecewise_backend as ppb
from captured import DEVICES, HIDDEN, SIZES, Pair, misses_between, net, rows
from pp_piecewise_backend.debug.describe import describe_graphs
from pp_piecewise_backend.runtime.dispatch import CALLS_THAT_PAY, CAPTURES_ON_CREDIT

pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")
on_devices = pytest.mark.parametrize("device", DEVICES)
DISPATCH = "pp_piecewise_backend.runtime.dispatch."


@torch.library.custom_op("keptcaptures::mix", mutates_args=())
def mix(x: Tensor) -> Tensor:
    return torch.tanh(x.cumsum(0))


@mix.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def forward(self: Any, x: Tensor) -> Tensor:
    return torch.ops.keptcaptures.mix(x @ self.w) @ self.w


def reading(self: Any, x: Tensor, cache: Tensor) -> Tensor:
    """Only the piece after the split op reads the cache, which is too large to be copied in each call."""
    x = torch.ops.keptcaptures.mix(x @ self.w)
    return (x @ cache) @ cache.t() @ self.w


class Layer(nn.Module):
    """One class, so that Dynamo runs all instances by one program."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(HIDDEN, HIDDEN) / HIDDEN**0.5)

    forward = forward


def new_cache(device: str) -> Tensor:
    return torch.randn(HIDDEN, 4096, device=device) / 64


def pair_of(function: nn.Module, device: str, **options: Any) -> Pair:
    return Pair(function, device, split_ops="+keptcaptures::*", **options)


def replace_weights(pair: Pair) -> None:
    """By new tensors; the old ones go."""
    new = torch.randn_like(pair.function.w) / HIDDEN**0.5
    pair.function.w.data, pair.twin.w.data = new, new.clone()


def missed(pair: Pair, *arguments: Tensor) -> dict[str, int]:
    before = ppb.stats()
    pair(*arguments)
    return misses_between(before, ppb.stats())


def held_bytes() -> tuple[int, int]:
    return ppb.stats().graph_bytes, ppb.stats().static_bytes


@on_devices
def test_layers_compiled_one_by_one(device: str) -> None:
    """One program serves them all, however many there are; what was captured for those that go, goes."""

    options = {"compiler": "eager", "graphs": "emulate" if device == "cpu" else "cuda", "split_ops": "+keptcaptures::*"}
    layers = [Layer().to(device) for _ in range(71)]
    compiled = [torch.compile(layer, backend="pp_piecewise", options=options, dynamic=False) for layer in layers]
    x = rows(8, device)
    for _ in range(2):
        for index in range(70):
            compiled[index](x)
    (program,) = ppb.programs()
    assert "140 pieces in" in ppb.explain() and "70 times: for other parameters" in " ".join(ppb.explain().split())
    before = held_bytes()
    with ppb.expect(replays=140, graph_misses=0):
        for index in range(70):
            torch.testing.assert_close(compiled[index](x), layers[index].forward(x), rtol=1e-5, atol=1e-5)
    del layers[10:70], compiled[10:70]
    gc.collect()
    compiled[-1](x)
    assert len(program.graphs.buckets) == 10 and held_bytes() == before


@on_devices
def test_weights_that_are_replaced_again_and_again(device: str) -> None:
    pair = pair_of(net(forward, device), device)
    pair.run_sizes(lambda n: (rows(n, device),))
    before = held_bytes()
    for _ in range(2 * CAPTURES_ON_CREDIT):
        replace_weights(pair)
        assert [missed(pair, rows(5, device)) for _ in range(3)] == [{"address-moved": 2}, {}, {}]
        for _ in range(CALLS_THAT_PAY):
            pair(rows(6, device))
        # As many are held as live, whatever came before.
        assert len(pair.program.graphs.buckets) == 1 and held_bytes() == before
    found = []
    for _ in range(CAPTURES_ON_CREDIT + 2):
        replace_weights(pair)
        found += [missed(pair, rows(5, device)) for _ in range(3)]
    # What had paid goes first; then four captures that had not may go before the next one waits.
    assert found == [{"address-moved": 2}, {}, {}] * (CAPTURES_ON_CREDIT + 1) + [{"moved-too-often": 2}] * 2 + [{}]
    replace_weights(pair)
    assert [missed(pair, rows(5, device)) for _ in range(6)] == [{"moved-too-often": 2}] * 4 + [{}, {}]
    *_, last = describe_graphs(pair.program).misses
    assert "of another instance of the module or replaced, lie elsewhere than at capture; call 5 in a" in last.sentence
    # What has stayed for as long, and pays, ends the waiting; and weights that keep their memory never miss.
    for step in range(CALLS_THAT_PAY):
        for model in (pair.function, pair.twin):
            model.w.data.mul_(-1.01)
        assert missed(pair, rows(5 + step % 3, device)) == {}
    replace_weights(pair)
    assert [missed(pair, rows(5, device)) for _ in range(2)] == [{"address-moved": 2}, {}]


@on_devices
def test_large_tensors_that_take_turns(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DISPATCH + "MAX_PLACES", 3)
    pair = pair_of(net(reading, device), device, dims=(0, None))
    caches = [new_cache(device) for _ in range(4)]
    for num_tokens in SIZES:
        pair(rows(num_tokens, device), caches[0])
    for turn in range(4):
        for cache in caches[:3]:
            found = missed(pair, rows(5 + turn % 3, device), cache)
            assert found == ({} if turn > 1 or cache is caches[0] else {"address-moved": 1} if turn == 0 else {})
    # A fourth takes the place of none that is in use; the piece that does not read it always replays.
    for turn in range(4):
        for cache in caches:
            found = missed(pair, rows(5 + turn % 3, device), cache)
            assert found == ({"moved-too-often": 1} if cache is caches[3] else {})
    said = " ".join(ppb.explain().split())
    assert "same captures it too, in place of the least used of the 3 captures that a bucket keeps" in said
    # Used twice in a row, it is captured in place of the one that was used longest ago.
    assert [missed(pair, rows(7, device), caches[3]) for _ in range(2)] == [{}, {}]
    assert [missed(pair, rows(7, device), cache) for cache in caches[:3]] == [{"moved-too-often": 1}, {}, {}]


@on_devices
def test_a_large_tensor_that_is_new_in_each_call(device: str) -> None:
    pair = pair_of(net(reading, device), device, dims=(0, None))
    caches = [new_cache(device)]
    for num_tokens in (8, 8, 4, 4):
        pair(rows(num_tokens, device), caches[0])
    before = held_bytes()
    for turn in range(10):
        caches.append(new_cache(device))  # next to the others, so that it lies elsewhere
        assert missed(pair, rows(5 + turn % 3, device), caches[-1]) == {"address-moved": 1}
    cache = caches[-1]
    caches.clear()
    said = " ".join(ppb.explain().split())
    assert "cache lies elsewhere than at capture; call 2 in a row with the same captures it too. Keep the same" in said
    for turn in range(3):
        cache.copy_(new_cache(device))
        assert missed(pair, rows(5 + turn % 3, device), cache) == {}
    # What was captured for memory that was freed is gone.
    assert len(pair.program.graphs.buckets) == 2 and held_bytes() == before


@on_devices
def test_only_warmup_captures_and_says_so(device: str) -> None:
    pair = pair_of(net(reading, device), device, dims=(0, None), capture="warmup")
    caches = [new_cache(device) for _ in range(2)]
    pair(rows(8, device), caches[0])
    for count, cache in enumerate(caches):
        ppb.warmup(pair.compiled, lambda n, cache=cache: ((rows(n, device), cache), {}), sizes=[8], progress=False)
        found = [missed(pair, rows(n, device), other) for other in caches for n in (8, 5)]
        assert found == ([{}, {}, {"address-moved": 1}, {"address-moved": 1}] if count == 0 else [{}] * 4)
    (moved,) = {miss.sentence for miss in describe_graphs(pair.program).misses if miss.reason == "address-moved"}
    assert moved.startswith("cache lies elsewhere than at capture; only warmup() captures. Keep the same tensors")


@on_devices
def test_views_and_misses_that_are_kept(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views for the numbers of tokens used last; the latest kinds of misses, and how many came before."""
    monkeypatch.setattr(DISPATCH + "MAX_FLAT_STEPS", 3 * 3)
    monkeypatch.setattr(DISPATCH + "MAX_MISSES_LOGGED", 2)
    pair = pair_of(net(forward, device), device)
    for num_tokens in (8, 8, 5, 6, 8, 7):
        pair(rows(num_tokens, device))
    ((bucket, _),) = pair.program.graphs.buckets
    assert list(bucket.programs) == [6, 8, 7]
    for num_tokens in (9, 10, 11):
        pair(rows(num_tokens, device))
    said = " ".join(ppb.explain().split())
    assert (
        "over-max: 4 pieces in 2 calls of 10..11 tokens" in said and "4 pieces more, longer ago than the last 2" in said
    )

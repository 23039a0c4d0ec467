"""The flat program of a bucket: checked replays, and eager steps that give something else than was traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pp_piecewise_backend as ppb
from captured import DEVICES, SIZES, Pair, Wrong, misses_between, net, rows
from pp_piecewise_backend import errors
from pp_piecewise_backend.runtime.replay import _Copy

pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")
on_devices = pytest.mark.parametrize("device", DEVICES)

WAYWARD: dict[str, Callable[[Tensor], Tensor]] = {"result": lambda x: x}


@torch.library.custom_op("replaytest::attention", mutates_args=())
def attention(x: Tensor) -> Tensor:
    return torch.tanh(x.cumsum(0) + x.mean(0))


@attention.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("replaytest::wayward", mutates_args=())
def wayward(x: Tensor) -> Tensor:
    """Gives what the test wants, whatever was traced."""
    return WAYWARD["result"](torch.tanh(x.cumsum(0)))


@wayward.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.fixture(autouse=True)
def _as_traced() -> Any:
    WAYWARD["result"] = lambda x: x
    yield
    WAYWARD["result"] = lambda x: x


def forward(self: Any, x: Tensor) -> Tensor:
    for _ in range(2):
        x = torch.ops.replaytest.attention(x @ self.w)
    return x @ self.w


def pair_of(function: Any, device: str, **options: Any) -> Pair:
    return Pair(function, device, **{"split_ops": "+replaytest::*", **options})


# -------------------------------------------------------------------------------- verified replays


def break_a_replay(pair: Pair, step: int, row: int) -> None:
    """Let the graph of a piece leave one wrong row behind."""
    ((bucket, _),) = pair.program.graphs.buckets
    graph = bucket.graphs[step]
    replay = graph.replay

    def broken() -> None:
        replay()
        graph.outputs[0][row] += 1

    graph.replay = broken
    bucket.programs.clear()


@on_devices
def test_verified_calls_find_nothing_in_sound_replays(device: str) -> None:
    pair = pair_of(net(forward, device), device, verify_every=1, strict=False)
    pair.run_sizes(lambda n: (rows(n, device),))


@on_devices
def test_a_broken_replay_is_an_error_under_strict(device: str) -> None:
    pair = pair_of(net(forward, device), device, verify_every=1, strict=True)
    pair.run_sizes(lambda n: (rows(n, device),))
    break_a_replay(pair, step=2, row=3)
    with pytest.raises(errors.ReplayDiffers, match=r"bucket of 8 tokens.*piece\[2\], tensor \w+, row 3"):
        pair.compiled(rows(6, device))
    # A wrong row behind the real ones is nobody's.
    fresh = pair_of(net(forward, device), device, verify_every=1, strict=True)
    fresh.run_sizes(lambda n: (rows(n, device),))
    break_a_replay(fresh, step=2, row=7)
    fresh(rows(7, device))
    with pytest.raises(errors.ReplayDiffers, match="row 7"):
        fresh.compiled(rows(8, device))


@on_devices
def test_a_broken_replay_is_put_right_and_its_bucket_dropped(device: str, caplog: pytest.LogCaptureFixture) -> None:
    pair = pair_of(net(forward, device), device, verify_every=2)
    for num_tokens in (*SIZES, 5):
        pair(rows(num_tokens, device))
    break_a_replay(pair, step=0, row=1)
    wrong = 0
    for num_tokens in (6, 7):  # every second call is verified
        try:
            pair(rows(num_tokens, device))
        except Wrong:
            wrong += 1
    assert wrong == 1, "the unverified call shows that the break is real; the verified one is right"
    before = ppb.stats()
    pair._last = None
    for num_tokens in (5, 6, 7, 8):
        pair(rows(num_tokens, device))
    assert misses_between(before, ppb.stats()) == {"verify-failed": 4 * 3}
    assert ppb.stats().replays == before.replays
    assert any("piece[0]" in r.getMessage() and "row 1" in r.getMessage() for r in caplog.records)
    assert "piece[0]" in pair.program.graphs.dropped[8].sentence
    pair(rows(4, device))  # other buckets are captured as ever
    pair(rows(3, device))
    pair(rows(4, device))
    assert ppb.stats().replays - before.replays == 2 * 3


@on_devices
def test_verification_runs_eager_steps_once(device: str) -> None:
    seen = []
    WAYWARD["result"] = lambda x: (seen.append(x.shape[0]), x)[1]

    def one(self: Any, x: Tensor) -> Tensor:
        return torch.ops.replaytest.wayward(x @ self.w) @ self.w

    model = net(one, device)
    pair = pair_of(model, device, verify_every=1)
    pair.run_sizes(lambda n: (rows(n, device),))
    assert seen == [n for n in SIZES for _ in range(2)], "once in eager, once compiled"


@on_devices
def test_verified_pieces_that_write_proxies(device: str) -> None:
    def writing(self: Any, hidden_states: Tensor, residual: Tensor) -> Tensor:
        residual.add_(hidden_states)
        hidden_states.copy_(residual * 0.5)
        return torch.ops.replaytest.attention(hidden_states @ self.w) @ self.w

    pair = pair_of(net(writing, device), device, verify_every=1)
    pair.run_sizes(lambda n: (rows(n, device), rows(n, device, seed=4)))
    assert pair.program.graphs.dropped == {}
    ((bucket, _),) = pair.program.graphs.buckets
    graph = bucket.graphs[0]
    landing = bucket.static[pair.program.layout.registers["l_residual_"]]
    replay = graph.replay

    def broken() -> None:
        replay()
        landing.tensor[0] += 1

    graph.replay = broken
    bucket.programs.clear()
    pair(rows(6, device), rows(6, device, seed=4))  # put right, in the caller's tensor too
    assert 8 in pair.program.graphs.dropped


# ---------------------------------------------------------------- what eager steps give unexpectedly


def through_wayward(self: Any, x: Tensor) -> Tensor:
    x = torch.ops.replaytest.wayward(x @ self.w)
    ones = x.new_ones(x.shape[1], x.shape[1])
    x = torch.ops.replaytest.attention(x * 2 @ ones)
    return x @ x.new_ones(x.shape[1], x.shape[1])


@on_devices
@pytest.mark.parametrize("how", ["dtype", "rows"])
def test_an_eager_step_that_gives_another_tensor_than_traced(device: str, how: str) -> None:
    """Its readers run without graphs, as they would in eager; the next call replays again."""
    pair = pair_of(net(through_wayward, device), device)
    pair.run_sizes(lambda n: (rows(n, device),))
    WAYWARD["result"] = (lambda x: x.double()) if how == "dtype" else (lambda x: torch.cat([x, x]))
    for num_tokens in (5, 8):
        before = ppb.stats()
        pair(rows(num_tokens, device))
        assert misses_between(before, ppb.stats()) == {"unexpected-tensor": 2}
        assert ppb.stats().replays - before.replays == 1
        assert ppb.stats().output_copies == before.output_copies, "what no graph made is the caller's already"
    WAYWARD["result"] = lambda x: x
    before = ppb.stats()
    pair(rows(5, device))
    assert misses_between(before, ppb.stats()) == {} and ppb.stats().replays - before.replays == 3
    assert ppb.stats().output_copies - before.output_copies == 1


@on_devices
def test_without_the_check_an_unexpected_tensor_goes_wrong(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Copy, "fits", lambda self, value: True)
    pair = pair_of(net(through_wayward, device), device)
    pair.run_sizes(lambda n: (rows(n, device),))
    WAYWARD["result"] = lambda x: torch.cat([x, x])
    with pytest.raises(Wrong):
        pair(rows(5, device))


@on_devices
def test_an_unexpected_tensor_in_the_capturing_call(device: str) -> None:
    pair = pair_of(net(through_wayward, device), device)
    pair(rows(7, device))
    WAYWARD["result"] = lambda x: torch.cat([x, x])
    pair(rows(6, device))
    WAYWARD["result"] = lambda x: x
    for num_tokens in (5, 8, 7):
        pair(rows(num_tokens, device))
    reasons = ppb.stats().miss_reasons
    assert set(reasons) <= {"first-call", "unexpected-tensor"} and reasons["unexpected-tensor"] > 0


@on_devices
def test_strides_that_differ_from_those_traced_are_copied(device: str) -> None:
    pair = pair_of(net(through_wayward, device), device)
    pair.run_sizes(lambda n: (rows(n, device),))
    WAYWARD["result"] = lambda x: x.t().contiguous().t()
    before = ppb.stats()
    for num_tokens in (5, 8):
        pair(rows(num_tokens, device))
    assert misses_between(before, ppb.stats()) == {} and ppb.stats().replays - before.replays == 6

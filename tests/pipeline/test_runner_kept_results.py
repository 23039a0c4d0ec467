"""Results on a stage that sends them from where graphs write: those that the module keeps, and those that lie where
early steps of the next micro-batch write."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import pp_piecewise_backend as ppb
from pp_piecewise_backend.pipeline import runner as runner_module
from pp_piecewise_backend.pipeline.transports.local import LocalHub
from pp_piecewise_backend.runtime import dispatch
from pp_piecewise_backend.utils.counters import Snapshot
from stages_in_threads import all_well, together, warm_up_alone
from switches import let_results_share_memory_with_earlier_steps

pytestmark = pytest.mark.usefixtures("fresh_backend")

WIDTH = 8
LONGEST_SECONDS = 60.0
PROXIES = {"h": ppb.Proxy((WIDTH,), torch.float32)}
SEQUENCES = 3
CALLS = [(4, step * 7 // 3 % SEQUENCES) for step in range(12)] + [
    (2, 0),
    (4, 1),
    (2, 2),
    (4, 0),
    (1, 1),
    (4, 2),
    (4, 1),
]
"""Tokens and sequence of each micro-batch."""

State = dict[str, Any]


class Weighted(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed)) / WIDTH**0.5
        self.weight = nn.Parameter(weight, requires_grad=False)


def attention(x: Tensor) -> Tensor:
    return scaled_dot_product_attention(x[None], x[None], x[None])[0]


class Recurrent(Weighted):
    """New state of a sequence is known early, and the old one used late."""

    def forward(self, h: Tensor, cache: State, mean: Tensor) -> dict[str, Tensor]:
        first = torch.tanh(h @ self.weight)
        x = attention(first) @ self.weight
        x = attention(x + cache["last"]) @ self.weight + cache["last"]
        cache["last"] = first.mean(0)
        return {"h": x}


class KeepsWhatItReturns(Weighted):
    """The next call gets a part of what the last one of its sequence sent, in the graph and from ``make_inputs``."""

    def forward(self, h: Tensor, cache: State, mean: Tensor) -> dict[str, Tensor]:
        x = attention(torch.tanh((h + cache["last"]) @ self.weight)) @ self.weight - mean
        cache["all"], cache["last"] = x, x[-1]
        return {"h": x}


class Layer(Weighted):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x @ self.weight)
        torch._dynamo.graph_break()
        return attention(x) @ self.weight


class Breaks(nn.Module):
    """One program serves all layers, and what they gave is needed later."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(10 * seed + number) for number in range(3))

    def forward(self, h: Tensor, cache: State, mean: Tensor) -> dict[str, Tensor]:
        first = self.layers[0](h)
        second = self.layers[1](first)
        return {"h": first + second + self.layers[2](second)}


class Last(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h + 1


def new_states() -> list[State]:
    """One for each sequence, and one for the warm-up."""
    return [{"last": torch.zeros(WIDTH), "all": torch.zeros(1, WIDTH)} for _ in range(SEQUENCES + 1)]


def inputs_of(call: int) -> Tensor:
    return torch.randn(CALLS[call][0], WIDTH, generator=torch.Generator().manual_seed(call))


def play(make: Callable[[int], nn.Module], **options: Any) -> tuple[list[Tensor], Snapshot]:
    """What the last of two stages gives, and what the first one counts."""
    hub = LocalHub(2, LONGEST_SECONDS)

    def one(stage: int) -> Any:
        states = new_states()

        def inputs(call: int | None, num_tokens: int) -> Mapping[str, Any]:
            cache = states[-1 if call is None else CALLS[call][1]]
            own = {"cache": cache, "mean": cache["all"].mean(0)}
            if stage:
                return own
            return {**own, "h": torch.randn(num_tokens, WIDTH) if call is None else inputs_of(call)}

        with ppb.StageRunner(
            make(stage), make_inputs=lambda n, tag: inputs(int(tag) if tag else None, n), max_tokens=4,
            inputs=PROXIES if stage else None, outputs=None if stage else PROXIES, transport=hub.transport(stage),
            options={"compiler": "eager", "graphs": "emulate", "capture_sizes": "1,2,4", **options},
        ) as runner:  # fmt: skip
            warm_up_alone(runner)
            batches = (ppb.MicroBatch(n, str(call).encode()) for call, (n, _) in enumerate(CALLS))
            given = [output["h"].clone() for output in runner.run(None if stage else batches) if output is not None]
            return given, runner.stats

    (_, counted), (given, _) = all_well(together(2, one))
    return given, counted


def eagerly(make: Callable[[int], nn.Module]) -> list[Tensor]:
    modules, states = [make(stage) for stage in range(2)], [new_states() for _ in range(2)]
    results = []
    for call, (_, sequence) in enumerate(CALLS):
        h = inputs_of(call)
        for module, own in zip(modules, states, strict=True):
            h = module(h=h, cache=own[sequence], mean=own[sequence]["all"].mean(0))["h"]
        results.append(h)
    return results


@pytest.mark.parametrize("mode", ["auto", "piecewise"])
@pytest.mark.parametrize("make", [Recurrent, KeepsWhatItReturns, Breaks])
def test_what_a_module_keeps_of_its_results_is_not_overwritten(make: Callable[[int], nn.Module], mode: str) -> None:
    given, counted = play(make, mode=mode)
    torch.testing.assert_close(given, eagerly(make))
    assert counted.replays and (make is Breaks or not counted.graph_misses), counted


@pytest.mark.parametrize("make", [Recurrent, KeepsWhatItReturns])
def test_it_is_overwritten_where_it_is_left_where_it_was_lent(
    make: Callable[[int], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "own_what_is_kept", lambda lent: lent.clear())
    given, _ = play(make, mode="piecewise")
    with pytest.raises(AssertionError):
        torch.testing.assert_close(given, eagerly(make))


def test_after_a_warm_up_what_was_kept_in_it_lies_in_no_graph() -> None:
    """It may be reset in place, and is then as good as new."""

    class Keeps(Weighted):
        kept = torch.zeros(WIDTH)

        def forward(self, h: Tensor) -> dict[str, Tensor]:
            first = torch.tanh(h @ self.weight)
            x = attention(first + self.kept) @ self.weight + self.kept
            self.kept = first.mean(0)
            return {"h": x}

    module, twin, hub = Keeps(0), Keeps(0), LocalHub(2, LONGEST_SECONDS)

    def one(stage: int) -> Any:
        with ppb.StageRunner(
            Last() if stage else module, make_inputs=lambda n, tag: {} if stage else {"h": torch.randn(n, WIDTH)},
            max_tokens=4, inputs=PROXIES if stage else None, outputs=None if stage else PROXIES,
            transport=hub.transport(stage), options={"compiler": "eager", "graphs": "emulate", "mode": "piecewise"},
        ) as runner:  # fmt: skip
            if not stage:
                warm_up_alone(runner)
                assert module.kept.isfinite().all(), "nor was it overwritten in the warm-up itself"
                module.kept.zero_()
                batches = (ppb.MicroBatch(4, inputs={"h": inputs_of(call)}) for call in range(4))
                return [None for _ in runner.run(batches)]
            return [output.clone() for output in runner.run()]

    given = all_well(together(2, one))[1]
    torch.testing.assert_close(given, [twin(inputs_of(call))["h"] + 1 for call in range(4)])


@torch.library.custom_op("kepttest::attend_into", mutates_args=("output",))
def attend_into(x: Tensor, output: Tensor) -> None:
    output.copy_(x.flip(0))


@attend_into.register_fake
def _(x: Tensor, output: Tensor) -> None:
    return None


class SendsABuffer(Weighted):
    """A view of what attention filled. The last piece reads the buffer, which lies where an earlier one lay."""

    def forward(self, h: Tensor) -> dict[str, Tensor]:
        first, second = torch.empty_like(h), torch.empty(len(h), 2, WIDTH // 2)
        attend_into(torch.tanh(h @ self.weight), first)
        attend_into((first @ self.weight).view(-1, 2, WIDTH // 2), second)
        sent = second.view(-1, WIDTH)
        return {"h": sent, "more": sent @ self.weight}


class SendsTwoViews(Weighted):
    """Of what a piece made that returns no result itself."""

    def forward(self, h: Tensor) -> dict[str, Tensor]:
        first = torch.tanh(attention(torch.tanh(h @ self.weight)) @ self.weight)
        x = attention(first) @ self.weight
        return {"h": first.view(-1, WIDTH), "more": first.view(-1, WIDTH) + 0 * x, "half": first[:, : WIDTH // 2]}


class Adds(nn.Module):
    def forward(self, h: Tensor, more: Tensor) -> Tensor:
        return h + more


@pytest.mark.parametrize("is_apart", [True, False])
@pytest.mark.parametrize("make", [SendsABuffer, SendsTwoViews])
def test_results_do_not_lie_where_early_steps_write(
    make: Callable[[int], nn.Module], is_apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next stage takes them when the one that sends has begun the next micro-batch."""
    if not is_apart:
        let_results_share_memory_with_earlier_steps(monkeypatch)
        monkeypatch.setattr(dispatch, "hand_over", lambda *arguments: 0)
    proxies = {**PROXIES, "more": ppb.Proxy((WIDTH,), torch.float32)}
    hub = LocalHub(2, LONGEST_SECONDS)

    def one(stage: int) -> Any:
        def make_inputs(num_tokens: int, tag: bytes) -> dict[str, Tensor]:
            if stage and tag:
                time.sleep(0.02)
            return {} if stage else {"h": torch.zeros(num_tokens, WIDTH)}

        with ppb.StageRunner(
            Adds() if stage else make(0), make_inputs=make_inputs, max_tokens=4, receive="step",
            inputs=proxies if stage else None, outputs=None if stage else proxies, transport=hub.transport(stage),
            options={
                "compiler": "eager", "graphs": "emulate", "capture_sizes": "4", "mode": "piecewise",
                "split_ops": "built-in" if make is SendsTwoViews else "+kepttest::*",
            },
        ) as runner:  # fmt: skip
            warm_up_alone(runner)
            batches = (ppb.MicroBatch(4, b"1", inputs={"h": inputs_of(call)}) for call in range(6))
            return [output.clone() for output in runner.run(None if stage else batches) if output is not None]

    given, expected = all_well(together(2, one))[1], []
    for call in range(6):
        sent = make(0)(inputs_of(call))
        expected.append(sent["h"] + sent["more"])
    with contextlib.nullcontext() if is_apart else pytest.raises(AssertionError):
        torch.testing.assert_close(given, expected)

"""Results that are still being sent: they stay as they are until the listener of the stage may be told otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from typing import Any

import pytest
import torch
from test_early_release import Spoiler, attend, compiled_for, two_proxies
from torch import Tensor

import pp_piecewise_backend as ppb
from captured import DEVICES, HIDDEN, net
from pp_piecewise_backend.runtime import dispatch
from switches import let_results_share_memory_with_earlier_steps

pytestmark = pytest.mark.usefixtures("fresh_backend")

SIZES = (7, 8, 6, 4, 3, 8, 2, 4) * 4
"""Attention is never padded here, so calls of 4 and 8 tokens replay full graphs, and the others pieces."""

LIBRARY = torch.library.Library("flighttest", "DEF")
LIBRARY.define("into(Tensor x, Tensor(a!) out) -> ()")
LIBRARY.impl("into", lambda x, out: (out.copy_(x + x.cumsum(0)), None)[1], "CompositeExplicitAutograd")
LIBRARY.impl("into", lambda x, out: None, "Meta")


def into_a_buffer(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    torch.ops.flighttest.into(x, out)
    return out


class Neighbour(Spoiler):
    """Fills landing memory as soon as it may, and sees that results are unchanged until they may be overwritten."""

    def __init__(self, stage: ppb.Stage) -> None:
        super().__init__(stage)
        self.told: list[str] = []
        self.sent: list[tuple[Tensor, Tensor]] = []

    def mark_landing_read(self) -> None:
        self.told.append("mark_landing_read")
        self.spoil()

    def results_are_written(self) -> None:
        self.told.append("results_are_written")
        for result, copy in self.sent:
            assert torch.equal(result, copy), "results were overwritten while they were sent"
        self.sent = []


def run(
    forward: Callable[..., Any],
    device: str,
    *,
    compiler: str = "eager",
    clones: bool = True,
    listens: bool = True,
    sizes: Sequence[int] = SIZES,
    **changed: Any,
) -> Iterator[tuple[Any, Any, list[str]]]:
    """Per call what came back, what eager gives, and what the listener was told."""
    module, stage = net(forward, device), two_proxies(device)
    neighbour = Neighbour(stage)
    options = {
        "mode": "full_and_piecewise", "compiler": compiler, "graphs": "emulate" if device == "cpu" else "cuda",
        "graph_safe_ops": "*::*", "static_outputs": True, **changed,
    }  # fmt: skip
    listener = neighbour if listens else None
    compiled = compiled_for(stage, module, listener, clones, "+livenesstest::*,*test::*", **options)
    with torch.no_grad():
        for number, num_tokens in enumerate(sizes):
            generator = torch.Generator().manual_seed(number)
            names = [*stage.inputs, *(["own"] if "own" in signature(forward).parameters else [])]
            given = {name: torch.randn(num_tokens, HIDDEN, generator=generator).to(device) / 8 for name in names}
            expected = forward(module, **{name: tensor.clone() for name, tensor in given.items()})
            for name, view in stage.views(num_tokens).items():
                view.copy_(given[name])
            neighbour.told = []
            got = compiled(**{**given, **stage.views(num_tokens)})
            yield got, expected, neighbour.told
            neighbour.sent = [(t, t.clone()) for t in (got if isinstance(got, tuple) else (got,))]


def told_last(forward: Callable[..., Any], device: str = "cpu", **arguments: Any) -> list[str]:
    """What was told in the last call; the results of all are right."""
    last: list[str] = []
    for got, expected, told in run(forward, device, **arguments):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        last = told
    return last


def compute_view(self: Any, hidden_states: Tensor, residual: Tensor) -> Any:
    y = attend(hidden_states @ self.w + residual) @ self.w
    return attend(y @ self.w) @ self.w, y.view(-1, 2, HIDDEN // 2)


def compute_slice(self: Any, hidden_states: Tensor, residual: Tensor) -> Any:
    y = attend(hidden_states @ self.w + residual) @ self.w
    return attend(y @ self.w) @ self.w, y[:, 2:4]


def written_later(self: Any, hidden_states: Tensor, residual: Tensor) -> Any:
    y = attend(hidden_states @ self.w + residual) @ self.w
    z = attend(y)
    y.add_(1)
    return attend(z @ self.w) @ self.w, y.view(-1, 2, HIDDEN // 2)


def attention_view(self: Any, hidden_states: Tensor, residual: Tensor) -> Any:
    y = attend(attend(hidden_states + residual) @ self.w)
    return attend(y @ self.w) @ self.w, y.view(-1, 2, HIDDEN // 2)


def buffer_view(self: Any, hidden_states: Tensor, residual: Tensor) -> Any:
    y = into_a_buffer(into_a_buffer(hidden_states @ self.w + residual) @ self.w)
    return attend(y @ self.w) @ self.w, y.view(-1, 2, HIDDEN // 2)


def buffer_itself(self: Any, hidden_states: Tensor, residual: Tensor) -> Any:
    y = into_a_buffer(into_a_buffer(hidden_states @ self.w + residual) @ self.w)
    return attend(y @ self.w) @ self.w, y


def own_input_and_buffer(self: Any, hidden_states: Tensor, residual: Tensor, own: Tensor) -> Any:
    y = into_a_buffer(into_a_buffer(hidden_states @ self.w + residual * own) @ self.w)
    return attend(y @ self.w + own) @ self.w, y.view(-1, 2, HIDDEN // 2), own.view(-1, 2, HIDDEN // 2)


LATE = [compute_view, compute_slice, written_later, attention_view, buffer_view, buffer_itself, own_input_and_buffer]
modes = pytest.mark.parametrize("mode", ["piecewise", "full_and_piecewise"])


@modes
@pytest.mark.parametrize("forward", LATE, ids=lambda forward: forward.__name__)
@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("device", DEVICES)
def test_a_result_that_is_a_view_of_an_earlier_value_stays_until_it_left(
    forward: Callable[..., Any], compiler: str, device: str, mode: str
) -> None:
    assert told_last(forward, device, compiler=compiler, mode=mode)[-1] == "results_are_written"
    assert ppb.stats().replays and not ppb.stats().output_copies


@modes
def test_where_memory_of_such_results_is_shared_with_earlier_steps_they_are_copied(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_results_share_memory_with_earlier_steps(monkeypatch, in_pools=False)
    told_last(buffer_view, mode=mode)
    assert ppb.stats().output_copies


@modes
def test_without_a_copy_they_are_overwritten_there(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    let_results_share_memory_with_earlier_steps(monkeypatch)
    monkeypatch.setattr(dispatch, "hand_over", lambda *arguments: 0)
    with pytest.raises(AssertionError, match="overwritten while they were sent"):
        told_last(buffer_view, mode=mode)

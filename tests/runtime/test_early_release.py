"""Early release: landing memory is overwritten where a program says that it was read, and results must stay right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pp_piecewise_backend as ppb
from captured import HIDDEN, net
from pp_piecewise_backend.runtime.ownership import Boundary, find_boundary
from pp_piecewise_backend.runtime.tracing import Timeline
from pp_piecewise_backend.utils.dynamo_entrance import cloning

MAX_TOKENS = 8


@torch.library.custom_op("livenesstest::attention", mutates_args=())
def attention(x: Tensor) -> Tensor:
    return x + x.cumsum(0)


@attention.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("livenesstest::attention_in_place", mutates_args=("x",))
def attention_in_place(x: Tensor) -> None:
    x.add_(x.cumsum(0))


attend = torch.ops.livenesstest.attention


class Spoiler:
    """Overwrites landing memory as soon as it may be, as the next micro-batch would."""

    timeline: Timeline | None = None

    def __init__(self, stage: ppb.Stage) -> None:
        self.stage = stage
        self.releases = 0

    def landing_was_read(self) -> None:
        self.releases += 1
        self.spoil()

    mark_landing_read = landing_was_read

    def results_are_written(self) -> None:
        pass

    def spoil(self) -> None:
        for name in self.stage.inputs:
            self.stage.landing(name).view(torch.float32).fill_(float("nan"))


def plain(self: Any, hidden_states: Tensor, residual: Tensor) -> Any:
    x = attend(hidden_states @ self.w + residual)
    x = attend(x @ self.w)
    return x @ self.w


def residual_added_last(self: Any, hidden_states: Tensor, residual: Tensor) -> Any:
    x = attend(attend(hidden_states @ self.w) @ self.w)
    return x @ self.w + residual


def slice_read_later(self: Any, hidden_states: Tensor, residual: Tensor) -> Any:
    half = hidden_states[:, : HIDDEN // 2]
    x = attend(hidden_states @ self.w + residual)
    x = attend(x @ self.w)
    return torch.cat([half, half], 1) + x


def rope_view(self: Any, hidden_states: Tensor, residual: Tensor) -> Any:
    rotary = residual.view(-1, 2, HIDDEN // 2)
    x = attend(hidden_states @ self.w)
    x = attend((x.view(-1, 2, HIDDEN // 2) * rotary).flatten(1) @ self.w)
    return (x.view(-1, 2, HIDDEN // 2) * rotary).flatten(1) @ self.w


def conversions_that_do_nothing(self: Any, hidden_states: Tensor, residual: Tensor) -> Any:
    same = hidden_states.to(torch.float32).contiguous()
    x = attend(hidden_states @ self.w + residual)
    x = attend(x @ self.w)
    return same + x @ self.w


def view_by_an_eager_step(self: Any, hidden_states: Tensor, residual: Tensor) -> Any:
    x = attend(hidden_states.view(-1, HIDDEN))
    y = attend(residual.t().t())
    x = attend((x + y) @ self.w)
    return x @ self.w


def passed_through(self: Any, hidden_states: Tensor, residual: Tensor) -> Any:
    return attend(attend(hidden_states @ self.w) @ self.w) @ self.w, residual


def result_is_a_view(self: Any, hidden_states: Tensor, residual: Tensor) -> Any:
    return attend(attend(hidden_states @ self.w) @ self.w) @ self.w, residual[:, 1:]


def written_then_returned(self: Any, hidden_states: Tensor, residual: Tensor) -> Any:
    residual.add_(hidden_states)
    x = attend(residual @ self.w)
    x = attend(x @ self.w)
    return x @ self.w, residual


def written_by_an_eager_step(self: Any, hidden_states: Tensor, residual: Tensor) -> Any:
    attention_in_place(residual)
    x = attend(residual @ self.w + hidden_states)
    x = attend(x @ self.w)
    return x @ self.w


CASES: dict[Callable[..., Any], bool | None] = {
    plain: True,
    residual_added_last: False,
    slice_read_later: False,
    rope_view: False,
    conversions_that_do_nothing: False,
    view_by_an_eager_step: True,
    passed_through: None,
    result_is_a_view: False,
    written_then_returned: None,
    written_by_an_eager_step: True,
}
"""Forward -> whether memory is released before the last step.

None: Dynamo hands the caller's own tensor back without telling the backend. So whoever listens has to look at what the
module returns, as the runner does, or to clone proxies in the graph, as it also does.
"""

WAYS = [
    # Without graphs are contained in those with: their first call runs without.
    pytest.param("eager", "off", id="eager-off", marks=pytest.mark.slow),
    pytest.param("eager", "emulate", id="eager-emulate"),
    pytest.param("inductor", "off", id="inductor-off", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    pytest.param("inductor", "emulate", id="inductor-emulate", marks=pytest.mark.timeout(600)),
]


def compiled_for(
    stage: ppb.Stage, module: nn.Module, listener: Any, clones: bool, split_ops: str, **options: Any
) -> Callable[..., Any]:
    """The module, compiled for the stage, to which this listens; behind clones of its proxies, if asked for."""
    stage.listener = listener
    options = {"stage": stage, "split_ops": split_ops, "capture_sizes": "4,8", **options}
    whole = cloning(module, tuple(stage.inputs)) if clones else module
    return torch.compile(whole, backend="pp_piecewise", options=options, fullgraph=True, dynamic=True)


def two_proxies(device: str = "cpu") -> ppb.Stage:
    proxies = {name: ppb.Proxy((HIDDEN,), torch.float32) for name in ("hidden_states", "residual")}
    return ppb.Stage(proxies, MAX_TOKENS, torch.device(device))


def run(forward: Callable[..., Any], compiler: str, graphs: str, clones: bool) -> Iterator[tuple[Any, Any, int]]:
    """Per call what came back, what eager gives, and how often the memory was released in the call."""
    module, stage = net(forward, "cpu"), two_proxies()
    spoiler = Spoiler(stage)
    compiled = compiled_for(stage, module, spoiler, clones, "+livenesstest::*", compiler=compiler, graphs=graphs)
    with torch.no_grad():
        for number, num_tokens in enumerate((7, 6, 8, 5, 7, 3, 4)):
            generator = torch.Generator().manual_seed(number)
            given = {name: torch.randn(num_tokens, HIDDEN, generator=generator) for name in stage.inputs}
            expected = forward(module, **{name: tensor.clone() for name, tensor in given.items()})
            views = stage.views(num_tokens)
            for name, tensor in given.items():
                views[name].copy_(tensor)
            before = spoiler.releases
            got = compiled(**views)
            yield got, expected, spoiler.releases - before


def check(forward: Callable[..., Any], compiler: str, graphs: str, clones: bool = False) -> list[int]:
    releases = []
    for got, expected, released in run(forward, compiler, graphs, clones):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        releases.append(released)
    return releases


@pytest.mark.usefixtures("fresh_backend")
@pytest.mark.parametrize(("compiler", "graphs"), WAYS)
@pytest.mark.parametrize("clones", [False, True], ids=["as it is", "behind clones"])
@pytest.mark.parametrize("forward", CASES, ids=lambda forward: forward.__name__)
def test_results_stay_right(forward: Callable[..., Any], clones: bool, compiler: str, graphs: str) -> None:
    is_early = clones or CASES[forward]
    if is_early is None:
        with pytest.raises(AssertionError):
            check(forward, compiler, graphs)
        return
    releases = check(forward, compiler, graphs, clones)
    assert max(releases) <= 1
    # A call that captures does not release; there are two buckets.
    assert sum(releases) >= len(releases) - 2 if is_early else not any(releases), releases


@pytest.mark.usefixtures("fresh_backend")
@pytest.mark.parametrize(
    ("forward", "graphs"),
    [
        (plain, "emulate"),
        (view_by_an_eager_step, "emulate"),
        (written_by_an_eager_step, "emulate"),
        (written_by_an_eager_step, "off"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_release_one_step_too_early_is_noticed(
    forward: Callable[..., Any], graphs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_early(*args: Any) -> Boundary:
        found = find_boundary(*args)
        assert found.last_reader is not None
        return Boundary(found.last_reader - 1, found.first_writer, found.landing_storages)

    for module in ("capture_plan", "program"):
        monkeypatch.setattr(f"pp_piecewise_backend.runtime.{module}.find_boundary", too_early)
    with pytest.raises(AssertionError):
        check(forward, "eager", graphs)


@pytest.mark.usefixtures("fresh_backend")
def test_an_alias_that_facts_do_not_know_is_seen_when_it_is_made() -> None:
    check(plain, "eager", "off")
    program = ppb.programs()[-1]
    assert program.stage is not None and program.boundary.last_reader == 0
    spoiler = program.stage.listener
    assert isinstance(spoiler, Spoiler)
    views, apart = program.stage.views(4), torch.randn(4, HIDDEN)
    inside = torch.from_numpy(views["residual"].numpy()[1:])  # of another storage
    program.inputs = tuple(replace(i, kind="other-tensor") if i.label == "w" else i for i in program.inputs)
    program.table = replace(program.table, inputs=program.inputs)
    for output, weight, released in (
        (views["hidden_states"][:, 1:], apart, 0),
        (inside, apart, 0),
        (apart, inside, 0),  # what the caller passes may be read after the release
        (apart, apart, 1),
    ):
        before = spoiler.releases
        given = [views.get(i.label, weight) if i.spec is not None else 4 for i in program.inputs]
        program._releasing(given, spoiler)(0, [output])
        assert spoiler.releases - before == released


def test_boundary_of_a_stage_without_proxies() -> None:
    compiled = torch.compile(nn.Linear(2, 2), backend="pp_piecewise", options={"compiler": "eager"})
    with torch.no_grad():
        compiled(torch.randn(3, 2))
    assert ppb.programs()[-1].boundary == Boundary(None, 0, frozenset())

"""Stages whose objects change between their calls: what enters without Dynamo all the same, and what must not."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pp_piecewise_backend as ppb
from entered_stages import WIDTH, Bench, Layer, Memory, Negated, OtherRecord, Record, Slot
from pp_piecewise_backend.pipeline.transports.local import LocalHub
from pp_piecewise_backend.utils import dynamo_entrance as entrance
from tiers import slow_but

pytestmark = [pytest.mark.usefixtures("fresh_backend", "no_gradients")]


@pytest.fixture(autouse=True)
def _all_guards_are_asked() -> Iterator[None]:
    """On 2.11 Dynamo has a fast way of its own, which does not notice all that its guards are about."""
    with torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=False):
        yield


class StepTensors(nn.Module):
    """What an engine fills between two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(WIDTH))
        self.fills = 0

    def fill(self, value: float) -> None:
        self.fills += 1
        self.shift.fill_(value)


class Metadata:
    def __init__(self, value: float) -> None:
        self.scales = torch.full((WIDTH,), value)
        self.kind = "decode"


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.step = StepTensors()
        self.record = Record()
        self.slots = [Slot(1.0), Slot(2.0)]
        self.table = {"shift": torch.ones(WIDTH)}
        self.order = {"first": torch.ones(WIDTH), "second": torch.ones(WIDTH), "calls": 0}
        self.metadata = Metadata(1.0)
        self.scales = torch.ones(WIDTH)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(x)
        for slot in self.slots:
            x = x * slot.weight + slot.sums
        for name, value in self.order.items():
            if name != "calls":
                x = x + value
        if self.metadata.kind == "decode":
            x = x * self.metadata.scales
        return {"y": self.record.shifted(x) + self.step.shift + self.table["shift"] * self.scales}


Change = Callable[[Decoder, int], object]


def _all(module: Decoder, call: int) -> None:
    for one in COUNTERS.values():
        if one is not _all:
            one(module, call)


COUNTERS: dict[str, Change] = {
    "a sub-module": lambda module, call: module.step.fill(call),
    "the stage": lambda module, call: setattr(module, "calls", call),
    "a plain object": lambda module, call: setattr(module.record, "calls", call),
    "a plain object in a list": lambda module, call: setattr(module.slots[1], "calls", call),
    "a dict": lambda module, call: module.table.update(calls=call),
    "a dict that is looked through": lambda module, call: module.order.update(calls=call),
    "a layer": lambda module, call: setattr(module.layers[0], "calls", call),
    "all of them": _all,
}

REPLACED: dict[str, Change] = {
    "a plain object": lambda module, call: setattr(module, "metadata", Metadata(float(call))),
    "a tensor": lambda module, call: setattr(module, "scales", torch.full((WIDTH,), float(call))),
    "a buffer": lambda module, call: setattr(module.step, "shift", torch.full((WIDTH,), float(call))),
    "a parameter": lambda module, call: setattr(module.layers[0], "weight", nn.Parameter(torch.eye(WIDTH), False)),
    "a sub-module": lambda module, call: module.layers.__setitem__(1, Layer()),
    "an item of a dict": lambda module, call: module.table.update(shift=torch.full((WIDTH,), float(call))),
    "an item of a dict that is looked through": lambda module, call: module.order.update(first=torch.randn(WIDTH)),
    "an item of a list": lambda module, call: module.slots.__setitem__(0, Slot(1.0)),
    "an equal number": lambda module, call: setattr(module.record, "factor", float("2.0")),
}


def _run(change: Change, calls: int, in_warmup: bool) -> int:
    """Micro-batches of a stage that enter directly, all of which give what eager gives."""
    module = Decoder().eval()
    made: list[int] = []

    def make_inputs(num_tokens: int, tag: bytes) -> dict[str, Tensor]:
        if tag or in_warmup:
            made.append(num_tokens)
            change(module, len(made))
        return {"x": torch.arange(float(num_tokens * WIDTH)).view(num_tokens, WIDTH) / 10}

    with ppb.StageRunner(
        module, make_inputs=make_inputs, max_tokens=4, transport=LocalHub(1).transport(0),
        options={"graphs": "emulate", "compiler": "eager", "capture_sizes": "4"},
    ) as runner:  # fmt: skip
        runner.warmup()
        batches = (ppb.MicroBatch(2 + at % 3, b"serving") for at in range(calls))
        for at, output in enumerate(runner.run(batches)):
            x = torch.arange(float((2 + at % 3) * WIDTH)).view(-1, WIDTH) / 10
            torch.testing.assert_close(output["y"], module(x)["y"])
        return int(runner.stats.direct_entries)


@pytest.mark.parametrize("name", slow_but(["a sub-module", "the stage", "all of them"], COUNTERS))
def test_a_stage_that_counts_between_calls_enters_directly_once_that_was_seen(name: str) -> None:
    assert _run(COUNTERS[name], calls=8, in_warmup=False) == 7


@pytest.mark.parametrize("name", slow_but(["a sub-module"], COUNTERS))
def test_one_that_counts_in_the_warm_up_enters_directly_at_once(name: str) -> None:
    assert _run(COUNTERS[name], calls=4, in_warmup=True) == 4


@pytest.mark.parametrize("name", slow_but(["a plain object", "an item of a list"], REPLACED))
def test_what_is_another_object_in_each_call_is_asked_for_in_each(name: str) -> None:
    # In a list nothing but the object itself says that it is the same.
    assert _run(REPLACED[name], calls=8, in_warmup=False) == (7 if name == "an item of a list" else 6)


@pytest.mark.parametrize("make", [Memory, lambda: _counted(MEMORY)], ids=["others", "the same, and it changes"])
def test_objects_among_the_arguments_that_are_others_in_each_call_are_asked_for_in_each(
    make: Callable[[], Memory],
) -> None:
    bench = Bench()
    enter = bench.entrance()
    for _ in range(entrance.LEARNED_ON_CREDIT + 1):
        bench.check(enter, bench.arguments(memory=make()), is_direct=False)
    for _ in range(4):
        bench.check(enter, bench.arguments(memory=make()), is_direct=True)
    for memory in (_with_weight(2.0), _with_weight(1)):
        bench.check(enter, bench.arguments(memory=memory), is_direct=False)
    shared = make()
    bench.check(enter, bench.arguments(memory=shared, bias=shared.slots[0].sums), is_direct=False)


MEMORY = Memory()


def _counted(memory: Memory) -> Memory:
    memory.calls = getattr(memory, "calls", 0) + 1
    return memory


def _with_weight(weight: float) -> Memory:
    memory = Memory()
    memory.slots[1].weight = weight
    return memory


def test_what_is_replaced_now_and_then_is_compared_with_what_was_there_last() -> None:
    """Else all that all guards ask of it would be asked in every call."""
    bench = Bench()
    enter = bench.entrance()
    for turn in range(3):
        bench.net.mark = torch.full((WIDTH,), float(turn))
        bench.check(enter, bench.arguments(), is_direct=False)
        for _ in range(entrance.CALLS_THAT_PAY):
            bench.check(enter, bench.arguments(), is_direct=True)
    assert enter._changes.dicts and not enter._changes.places


def test_where_new_changes_are_found_learning_does_not_wait() -> None:
    bench = Bench()
    enter = bench.entrance()
    parts = [*bench.net.layers, *bench.net.blocks, bench.net.record, bench.net.record.inner, bench.net, *[bench.module]]
    for part in [*parts, *bench.memory.slots]:
        part.calls = 1
        bench.check(enter, bench.arguments(), is_direct=False)
        bench.check(enter, bench.arguments(), is_direct=True)
    for part in parts:
        part.calls = 2
        bench.check(enter, bench.arguments(), is_direct=True)


# ------------------------------------------------------------------------------ changes in any order


def _set_or_delete(owner: Any, name: str, value: Any) -> None:
    if name in vars(owner):
        delattr(owner, name)
    else:
        setattr(owner, name, value)


def _grow_or_shrink(of: list[Any], one: Any) -> None:
    if len(of) > 2:
        of.pop()
    else:
        of.append(one)


def _negated_or_not(layer: Layer) -> None:
    layer.__class__ = Layer if type(layer) is Negated else Negated


# What may happen to a stage between two calls; Dynamo compiles for few of these again, and for none without end.
EVENTS: list[Callable[[Bench, random.Random], object]] = [
    lambda bench, rng: setattr(bench.net.layers[rng.randrange(2)], "weight", nn.Parameter(torch.eye(WIDTH), False)),
    lambda bench, rng: bench.net.layers.__setitem__(rng.randrange(2), Layer()),
    lambda bench, rng: bench.net.blocks.__setitem__(rng.randrange(2), Layer()),
    lambda bench, rng: bench.net.blocks.reverse(),
    lambda bench, rng: _grow_or_shrink(bench.net.blocks, Layer()),
    lambda bench, rng: setattr(bench.net, "blocks", list(bench.net.blocks)),
    lambda bench, rng: setattr(bench.net, "offset", torch.randn(WIDTH)),
    lambda bench, rng: setattr(bench.net, "mark", torch.randn(WIDTH)),
    lambda bench, rng: bench.net.marks.__setitem__(rng.randrange(2), torch.randn(WIDTH)),
    lambda bench, rng: bench.net.table.update(shift=torch.randn(WIDTH)),
    lambda bench, rng: bench.net.table.update(factor=rng.choice([2.0, 3.0])),
    lambda bench, rng: setattr(bench.net, "table", {**bench.net.table, "calls": 1}),
    lambda bench, rng: setattr(bench.net, "record", rng.choice([Record, OtherRecord])()),
    lambda bench, rng: setattr(bench.net.record, "shift", torch.randn(WIDTH)),
    lambda bench, rng: setattr(bench.net.record, "inner", Slot(3.0)),
    lambda bench, rng: setattr(bench.net.layers[0], "kind", rng.choice(["plain", "other"])),
    lambda bench, rng: _negated_or_not(bench.net.layers[1]),
    lambda bench, rng: _set_or_delete(bench.net.layers[0], "power", 2),
    lambda bench, rng: _set_or_delete(bench.net.layers[1], "scale", 3),
    lambda bench, rng: _set_or_delete(bench.net.blocks[0], "product", _doubled),
    lambda bench, rng: _set_or_delete(bench.net, "step", 4.0),
    lambda bench, rng: bench.net.shifts.__setitem__(0, rng.choice([1.0, 2.0])),
    lambda bench, rng: bench.net.load_state_dict({k: v + 1 for k, v in bench.net.state_dict().items()}, assign=True),
    lambda bench, rng: setattr(bench.net.layers[0], "__dict__", dict(vars(bench.net.layers[0]))),
]  # fmt: skip


def _doubled(x: Tensor) -> Tensor:
    return x * 2


COUNTS: list[Callable[[Bench, int], object]] = [
    lambda bench, call: setattr(bench.net, "calls", call),
    lambda bench, call: setattr(bench.net.record, "calls", call),
    lambda bench, call: setattr(bench.net.layers[0], "calls", call),
    lambda bench, call: bench.net.table.update(calls=call),
    lambda bench, call: bench.touch(),
    lambda bench, call: setattr(bench.memory, "calls", call),
]


@pytest.mark.parametrize("seed", slow_but([0], range(6)))
def test_whatever_happens_between_calls_each_gives_what_eager_gives(seed: int) -> None:
    rng = random.Random(seed)
    bench = Bench()
    events = rng.sample(EVENTS, 6)
    counts = rng.sample(COUNTS, 2)
    enter = bench.entrance()
    with torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=1000):
        for call in range(60):
            for count in counts:
                count(bench, call)
            if rng.random() < 0.3:
                rng.choice(events)(bench, rng)
            bench.check(enter, bench.arguments())
    assert bench.stats.snapshot().direct_entries > 0

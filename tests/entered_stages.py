"""A stage that reads all kinds of things, and what can become another one under a call that enters it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pp_piecewise_backend.backend import graph_input_sources
from pp_piecewise_backend.utils import dynamo_entrance as entrance
from pp_piecewise_backend.utils import dynamo_frames, dynamo_guards, dynamo_places
from pp_piecewise_backend.utils.counters import Stats
from pp_piecewise_backend.utils.dynamo_entrance import Entrance, cloning

WIDTH = 4
FACTOR = 2.0
TABLE = {"offset": 1.0}


def enlarged(x: Tensor) -> Tensor:
    return x * FACTOR


class Settings:
    """Finds its attributes in its own way, as those of transformers do."""

    def __init__(self) -> None:
        self.power = 2

    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__(name)


class Layer(nn.Module):
    scale = 5
    power = 1

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.scale = 2
        self.kind = "plain"
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.product(x) * self.scale
        return x**self.power if self.kind == "plain" else -x

    def product(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Negated(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


class Record:
    """An object of a stage that is no module."""

    def __init__(self) -> None:
        self.shift = torch.ones(WIDTH)
        self.factor = 2.0
        self.inner = Slot(3.0)

    def shifted(self, x: Tensor) -> Tensor:
        return x * self.factor + self.shift + self.inner.sums * self.inner.weight


class OtherRecord(Record):
    def shifted(self, x: Tensor) -> Tensor:
        return x * self.factor - self.shift


class Slot:
    def __init__(self, weight: float) -> None:
        self.sums = torch.zeros(WIDTH)
        self.weight = weight


class Memory:
    """What a stage keeps of a sequence, one entry for each layer."""

    def __init__(self) -> None:
        self.slots = [Slot(1.0), Slot(1.0)]
        self.length = 5


class Net(nn.Module):
    step = 3.0

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.register_buffer("offset", torch.ones(WIDTH))
        self.settings = Settings()
        self.shifts = [1.0, 2.0]
        self.blocks = [Layer(), Layer()]
        self.marks = [torch.ones(WIDTH), torch.ones(WIDTH)]
        self.mark = torch.ones(WIDTH)
        self.record = Record()
        self.table = {"shift": torch.ones(WIDTH), "factor": 2.0}
        self.order = {"first": 1.0, "second": 2.0}

    def forward(
        self,
        x: Tensor,
        rows: Tensor,
        memory: Memory,
        parts: Any,
        bias: Tensor | None = None,
        other: Tensor | None = None,
        times: int = 1,
        is_odd: bool = False,
        name: str = "a",
    ) -> dict[str, Tensor]:
        for layer, slot in zip(self.layers, memory.slots, strict=True):
            x = layer(x)
            slot.sums.add_(x.sum(0))
            x = enlarged(x) + slot.weight + memory.length
        x = x + self.shifts[0] + len(self.shifts) + self.step
        x = x + rows[:, None] + self.offset + TABLE["offset"] + parts[0] ** self.settings.power
        for block in self.blocks:
            x = block(x)
        x = self.record.shifted(x) + self.mark + self.marks[1] + len(self.marks)
        x = x * self.table["factor"] + self.table["shift"]
        for key, value in self.order.items():
            x = x * value if key == "first" else x + value
        if bias is not None:
            x = x + bias
        if other is not None:
            x = x - 2 * other
        if self.training:
            x = x + 10
        x = x * times
        return {"y": -x if is_odd or name == "b" else x, "x": x + 1}


class Bench:
    """A compiled module, calls of it, and what they give eagerly."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = Net().eval()
        self.memory = Memory()
        self.module = cloning(self.net, ("x",))
        options = {"compiler": "eager", "graphs": "off"}
        self.compiled = torch.compile(self.module, backend="pp_piecewise", options=options, fullgraph=True)
        self.stats = Stats()
        self.compiled(**self.arguments())

    def arguments(self, count: int = 3, **others: Any) -> dict[str, Any]:
        given = {"x": torch.randn(count, WIDTH), "rows": torch.arange(count), "memory": self.memory}
        parts = [torch.ones(WIDTH), torch.ones(WIDTH)]
        return {**given, "parts": parts, "bias": torch.ones(WIDTH), "other": torch.ones(WIDTH), **others}

    def entrance(self) -> Entrance:
        made = Entrance(self.module, self.compiled, graph_input_sources, self.stats)
        made.learn(self.arguments())
        assert made.why_not == ""
        return made

    def touch(self) -> None:
        """Change each dict of each object of the module, and put back what was there."""
        record = self.net.record
        held: list[dict[str, Any]] = [self.net.table, self.net.order, vars(record), vars(record.inner)]
        for module in (*self.module.modules(), *(part for block in self.net.blocks for part in block.modules())):
            held += [vars(module), module._parameters, module._buffers, module._modules]
        for one in [*held, self.net.settings.__dict__]:
            one["touched"] = 0
            del one["touched"]

    def touched_entrance(self) -> Entrance:
        """One that has found that all these dicts change."""
        made = self.entrance()
        for _ in range(2):
            self.touch()
            made(self.arguments())
        assert made.why_not == "" and made.knows(self.arguments())
        self.touch()
        return made

    def check(self, enter: Entrance, arguments: dict[str, Any], is_direct: bool | None = None) -> None:
        """What comes back, and what the call leaves behind, is what the module does eagerly."""
        memory = arguments["memory"]
        before = [slot.sums.clone() for slot in memory.slots]
        entries = self.stats.snapshot().direct_entries
        got = enter(arguments)
        assert is_direct is None or self.stats.snapshot().direct_entries == entries + is_direct
        sums = [slot.sums.clone() for slot in memory.slots]
        for slot, value in zip(memory.slots, before, strict=True):
            slot.sums.copy_(value)
        expected = self.net(**{**arguments, "x": arguments["x"].clone()})
        assert list(got) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value)
        for slot, value in zip(memory.slots, sums, strict=True):
            torch.testing.assert_close(slot.sums, value)


Patches = list[tuple[Any, str, Any]]


def _nothing(manager: Any, value: Any) -> None:
    pass


def _only_version(manager: Any, value: Any) -> None:
    attributes = manager.get_generic_dict_manager("", value.__dict__, dynamo_places._KIND)
    attributes.add_dict_version_guard(value.__dict__, ["as it was"], None)


def _only_type(manager: Any, value: Any) -> None:
    manager.add_type_match_guard(id(type(value)), ["as it was"], None)


def _without_others(self: Any, values: Any, objects: Any) -> bool:
    own, tensors = self._own.check(self._own_values), self._check_own_tensors(*self._own_tensors)
    return own and tensors and self._same.are_there(values) and objects.root.check(values)


# Rule -> what stands there without it.
AWAY: dict[str, Patches] = {
    "attributes": [(dynamo_guards, "compare_object", _only_type)],
    "type": [(dynamo_guards, "compare_object", _only_version)],
    "dicts": [(dynamo_guards, "compare_version", _nothing)],
    "tensors": [(dynamo_guards, "_check_of", lambda tensors: lambda *others: True)],
    "same": [(dynamo_guards, "_question", lambda *_: "G")],
    "objects": [(dynamo_guards._Division, "_ask_whether_same", lambda *_: True)],
    "classes": [(dynamo_guards, "compare_class", _nothing)],
    "keys": [(dynamo_guards._Division, "_ask_of_dict", lambda *_: None)],
    "length": [(dynamo_guards, "compare_length", _nothing)],
    "others": [(dynamo_guards.Guards, "hold", _without_others)],
    "apart": [(entrance, "_are_others", lambda ids, found: True)],
    "in use": [(dynamo_frames.Frame, "is_in_use", True)],
    "freely": [(dynamo_frames, "runs_compiled_code_freely", lambda: True)],
}


@contextlib.contextmanager
def without(rules: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, replacement in (one for rule in rules.split(",") for one in AWAY[rule]):
            patch.setattr(owner, name, replacement)
        yield


class CountingFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def global_hook() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, value, raising=False)
        yield


@dataclass
class Case:
    rules: str
    """By which it is noticed; where each of several would do, all of them."""
    touched: str = ""
    """By which it is noticed where no version of a dict is compared, if that is another rule."""
    arguments: Callable[[Bench], dict[str, Any]] = Bench.arguments
    change: Callable[[Bench], object] = lambda bench: None
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def _call(rules: str = "others", **changed: Callable[[Bench], Any]) -> Case:
    return Case(rules, arguments=lambda bench: bench.arguments(**{name: make(bench) for name, make in changed.items()}))


def _swap_attributes(bench: Bench) -> None:
    layer = bench.net.layers[1]
    layer.__dict__ = {**layer.__dict__, "scale": 7}


def _twos() -> Tensor:
    return torch.full((WIDTH,), 2.0)


def _turn_round(bench: Bench) -> None:
    order = bench.net.order
    order["first"] = order.pop("first")


def _transpose(bench: Bench) -> None:
    weight = bench.net.layers[0].weight
    weight.data = weight.data.t()


def _same_twice(bench: Bench) -> dict[str, Any]:
    bias = torch.ones(WIDTH)
    return bench.arguments(bias=bias, other=bias)


CASES: dict[str, Case] = {
    "dtype": _call(rows=lambda bench: torch.arange(3, dtype=torch.int32)),
    "rank": _call(bias=lambda bench: torch.ones(1, WIDTH)),
    "strides": _call(x=lambda bench: torch.randn(WIDTH, 3).t()),
    "a tensor that requires grad": _call(bias=lambda bench: torch.ones(WIDTH, requires_grad=True)),
    "none for a tensor": _call(bias=lambda bench: None),
    "a parameter for a tensor": _call(bias=lambda bench: nn.Parameter(torch.ones(WIDTH), requires_grad=False)),
    "one row": Case("others", arguments=lambda bench: bench.arguments(count=1)),
    "another number of rows": Case("others", arguments=lambda bench: bench.arguments(count=5)),
    "rows that disagree": _call(rows=lambda bench: torch.arange(1)),
    "tuple for list": _call(parts=lambda bench: (torch.ones(WIDTH), torch.ones(WIDTH))),
    "a longer list": _call(parts=lambda bench: [torch.ones(WIDTH)] * 3),
    "int": _call(times=lambda bench: 2),
    "bool": _call(is_odd=lambda bench: True),
    "text": _call(name=lambda bench: "b"),
    "the same tensor twice": Case("others", arguments=_same_twice),
    "a buffer of the module": _call("apart", bias=lambda bench: bench.net.offset),
    "a tensor of an object": _call("apart", bias=lambda bench: bench.memory.slots[0].sums),
    "grad mode": Case("others", around=torch.enable_grad),
    "inference mode": Case("others,tensors", around=torch.inference_mode),
    "autocast": Case("others,tensors", around=lambda: torch.autocast("cpu", torch.bfloat16)),
    "default dtype": Case("others", around=default_dtype),
    "function mode": Case("others", around=CountingFunctions),
    "stance": Case("freely", around=lambda: torch.compiler.set_stance("force_eager")),
    "global hook": Case("freely", around=global_hook),
    "int attribute": Case("attributes", "objects", change=lambda bench: setattr(bench.net.layers[1], "scale", 3)),
    "bool for int attribute": Case(
        "attributes", "objects", change=lambda bench: setattr(bench.net.layers[1], "scale", True)
    ),
    "text attribute": Case(
        "attributes", "objects", change=lambda bench: setattr(bench.net.layers[0], "kind", "other")
    ),
    "training": Case("attributes", "objects", change=lambda bench: bench.net.train()),
    "forward of an instance": Case(
        "attributes", "keys", change=lambda bench: setattr(bench.net.layers[1], "forward", lambda x: x + 1)
    ),
    "method of an instance": Case(
        "attributes", "keys", change=lambda bench: setattr(bench.net.layers[1], "product", lambda x: x + 1)
    ),
    "an attribute that hides one of the class": Case(
        "attributes", "keys", change=lambda bench: setattr(bench.net.layers[1], "power", 2)
    ),
    "one that hides nothing any more": Case(
        "attributes", "objects", change=lambda bench: delattr(bench.net.layers[1], "scale")
    ),
    "all attributes": Case("attributes", "objects", change=_swap_attributes),
    "class": Case(  # torch 2.11 looks for attributes in the dict of the class, too
        "type,same", "classes,same", change=lambda bench: setattr(bench.net.layers[1], "__class__", Negated)
    ),
    "tensor attribute": Case("attributes", "objects", change=lambda bench: setattr(bench.net, "mark", _twos())),
    "tensor of a plain object": Case(
        "attributes", "objects", change=lambda bench: setattr(bench.net.record, "shift", _twos())
    ),
    "number of a plain object": Case(
        "attributes", "objects", change=lambda bench: setattr(bench.net.record, "factor", 4.0)
    ),
    "object of a plain object": Case(
        "attributes", "objects", change=lambda bench: setattr(bench.net.record, "inner", Slot(4.0))
    ),
    "method of a plain object": Case(
        "attributes", "keys", change=lambda bench: setattr(bench.net.record, "shifted", lambda x: x + 1)
    ),
    "class of a plain object": Case(
        "type", "classes", change=lambda bench: setattr(bench.net.record, "__class__", OtherRecord)
    ),
    "a plain object": Case("attributes", "objects", change=lambda bench: setattr(bench.net, "record", OtherRecord())),
    "parameter": Case(
        "dicts", "objects",
        change=lambda bench: setattr(bench.net.layers[1], "weight", nn.Parameter(torch.eye(WIDTH), False)),
    ),
    "buffer": Case("dicts", "objects", change=lambda bench: setattr(bench.net, "offset", torch.zeros(WIDTH))),
    "sub-module": Case("dicts", "objects", change=lambda bench: bench.net.layers.__setitem__(1, Layer())),
    "a sub-module of another class": Case(
        "dicts", "objects", change=lambda bench: bench.net.layers.__setitem__(1, Negated())
    ),
    "tensor in a dict": Case("dicts", "objects", change=lambda bench: bench.net.table.update(shift=_twos())),
    "number in a dict": Case("dicts", "objects", change=lambda bench: bench.net.table.update(factor=4.0)),
    "a dict": Case(
        "attributes", "objects", change=lambda bench: setattr(bench.net, "table", {**bench.net.table, "factor": 4.0})
    ),
    "order of a dict": Case("dicts", "keys", change=_turn_round),
    "a longer dict": Case("dicts", "keys", change=lambda bench: bench.net.order.update(third=3.0)),
    "strides of a parameter": Case("tensors", change=_transpose),
    "a parameter that requires grad": Case("tensors", change=lambda bench: bench.net.layers[0].requires_grad_()),
    "an element of a list": Case("objects", change=lambda bench: bench.net.shifts.__setitem__(0, 9.0)),
    "length of a list": Case("length", change=lambda bench: bench.net.shifts.append(9.0)),
    "a sub-module in a list": Case("objects", change=lambda bench: bench.net.blocks.__setitem__(1, Layer())),
    "sub-modules that change places": Case("objects", change=lambda bench: bench.net.blocks.reverse()),
    "a tensor in a list": Case("objects", change=lambda bench: bench.net.marks.__setitem__(1, _twos())),
    "settings": Case(
        "attributes,same,others", "classes,same,others", change=lambda bench: setattr(bench.net.settings, "power", 3)
    ),
    "an object among the arguments": Case("attributes", change=lambda bench: setattr(bench.memory, "length", 6)),
    "one in a list of an object": Case(
        "attributes", change=lambda bench: bench.memory.slots.__setitem__(1, Slot(4.0))
    ),
    "global": Case("same", around=lambda: replaced(_globals(), "FACTOR", 3.0)),
    "an item of a global": Case("same", around=lambda: replaced_item(TABLE, "offset", 4.0)),
    "global function": Case("same", around=lambda: replaced(_globals(), "enlarged", lambda x: x - 1)),
    "code of a function": Case("same", around=lambda: replaced(enlarged, "__code__", (lambda x: x - 1).__code__)),
    "attribute of a class": Case("same", around=lambda: replaced(Net, "step", 4.0)),
    "reset": Case("in use", change=lambda bench: torch._dynamo.reset()),
}  # fmt: skip


def _globals() -> Any:
    return sys.modules[__name__]


@contextlib.contextmanager
def replaced_item(table: dict[str, Any], key: str, value: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(table, key, value)
        yield

"""Calls that enter a stage without Dynamo, and all that must keep them from it."""

from __future__ import annotations

import contextlib
import gc
import logging
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import pp_piecewise_backend as ppb
from models.hf import make_model
from pp_piecewise_backend.backend import graph_input_sources
from pp_piecewise_backend.integrations import huggingface
from pp_piecewise_backend.pipeline.transports.local import LocalHub
from pp_piecewise_backend.utils import dynamo_entrance as entrance
from pp_piecewise_backend.utils import dynamo_frames, dynamo_guards, dynamo_sources
from pp_piecewise_backend.utils.counters import Stats
from pp_piecewise_backend.utils.dynamo_entrance import Entrance, cloning
from pp_piecewise_backend.utils.dynamo_sources import Unexpected
from tiers import slow_but

pytestmark = [pytest.mark.usefixtures("fresh_backend", "no_gradients")]

WIDTH = 4
FACTOR = 2.0
TABLE = {"offset": 1.0}


@pytest.fixture(autouse=True)
def _all_guards_are_asked() -> Iterator[None]:
    """On 2.11 Dynamo has a fast way of its own, which does not notice all that its guards are about."""
    with torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=False):
        yield


def enlarged(x: Tensor) -> Tensor:
    return x * FACTOR


class Settings:
    """Finds its attributes in its own way, as those of transformers do."""

    def __init__(self) -> None:
        self.power = 2

    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__(name)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.scale = 2
        self.kind = "plain"

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.weight * self.scale
        return x if self.kind == "plain" else -x


class Negated(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


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
        self.requires_grad_(False)

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

    def check(self, enter: Entrance, arguments: dict[str, Any], is_direct: bool) -> None:
        """What comes back, and what the call leaves behind, is what the module does eagerly."""
        memory = arguments["memory"]
        before = [slot.sums.clone() for slot in memory.slots]
        entries = self.stats.snapshot().direct_entries
        got = enter(arguments)
        assert self.stats.snapshot().direct_entries == entries + is_direct
        sums = [slot.sums.clone() for slot in memory.slots]
        for slot, value in zip(memory.slots, before, strict=True):
            slot.sums.copy_(value)
        expected = self.net(**{**arguments, "x": arguments["x"].clone()})
        assert list(got) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value)
        for slot, value in zip(memory.slots, sums, strict=True):
            torch.testing.assert_close(slot.sums, value)


def test_calls_like_one_that_was_learned_enter_directly_and_give_what_eager_gives() -> None:
    bench = Bench()
    enter = bench.entrance()
    for _ in range(4):
        bench.check(enter, bench.arguments(), is_direct=True)
        with torch.no_grad():
            bench.net.layers[0].weight.mul_(1.1)  # what is read is the parameter, not a copy
            bench.net.offset.add_(1)


# ------------------------------------------------------------------------- what must be noticed

Patches = list[tuple[Any, str, Any]]


def _nothing(manager: Any, value: Any) -> None:
    pass


def _only_version(manager: Any, value: Any) -> None:
    attributes = manager.get_generic_dict_manager("", value.__dict__, dynamo_guards._KIND)
    attributes.add_dict_version_guard(value.__dict__, ["as it was"], None)


def _only_type(manager: Any, value: Any) -> None:
    manager.add_type_match_guard(id(type(value)), ["as it was"], None)


def _without_others(self: Any, values: Any, objects: Any) -> bool:
    own, tensors = self._own.check(self._own_values), self._check_own_tensors(*self._own_tensors)
    return own and tensors and self._are_same(values) and objects.root.check(values)


_has_dict = dynamo_guards._has_dict


def _has_dict_or_is_float(value: Any) -> bool:
    return _has_dict(value) or type(value) is float


# Rule -> what stands there without it.
AWAY: dict[str, Patches] = {
    "attributes": [(dynamo_guards, "_compare_object", _only_type)],
    "type": [(dynamo_guards, "_compare_object", _only_version)],
    "dicts": [(dynamo_guards, "_compare_version", _nothing)],
    "tensors": [(dynamo_guards, "_check_of", lambda tensors: lambda *others: True)],
    "same": [(dynamo_guards, "are_the_same", lambda *_: lambda values: True)],
    "elements": [(dynamo_guards, "_has_dict", _has_dict_or_is_float)],
    "length": [(dynamo_guards, "_compare_length", _nothing)],
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
    arguments: Callable[[Bench], dict[str, Any]] = Bench.arguments
    change: Callable[[Bench], object] = lambda bench: None
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def _call(rules: str = "others", **changed: Callable[[Bench], Any]) -> Case:
    return Case(rules, lambda bench: bench.arguments(**{name: make(bench) for name, make in changed.items()}))


def _swap_attributes(bench: Bench) -> None:
    layer = bench.net.layers[1]
    layer.__dict__ = {**layer.__dict__, "scale": 7}


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
    "one row": Case("others", lambda bench: bench.arguments(count=1)),
    "another number of rows": Case("others", lambda bench: bench.arguments(count=5)),
    "rows that disagree": _call(rows=lambda bench: torch.arange(1)),
    "tuple for list": _call(parts=lambda bench: (torch.ones(WIDTH), torch.ones(WIDTH))),
    "a longer list": _call(parts=lambda bench: [torch.ones(WIDTH)] * 3),
    "int": _call(times=lambda bench: 2),
    "bool": _call(is_odd=lambda bench: True),
    "text": _call(name=lambda bench: "b"),
    "the same tensor twice": Case("others", _same_twice),
    "a buffer of the module": _call("apart", bias=lambda bench: bench.net.offset),
    "a tensor of an object": _call("apart", bias=lambda bench: bench.memory.slots[0].sums),
    "grad mode": Case("others", around=torch.enable_grad),
    "inference mode": Case("others,tensors", around=torch.inference_mode),
    "autocast": Case("others,tensors", around=lambda: torch.autocast("cpu", torch.bfloat16)),
    "default dtype": Case("others", around=default_dtype),
    "function mode": Case("others", around=CountingFunctions),
    "stance": Case("freely", around=lambda: torch.compiler.set_stance("force_eager")),
    "global hook": Case("freely", around=global_hook),
    "int attribute": Case("attributes", change=lambda bench: setattr(bench.net.layers[1], "scale", 3)),
    "bool for int attribute": Case("attributes", change=lambda bench: setattr(bench.net.layers[1], "scale", True)),
    "text attribute": Case("attributes", change=lambda bench: setattr(bench.net.layers[0], "kind", "other")),
    "training": Case("attributes", change=lambda bench: bench.net.train()),
    "forward of an instance": Case(
        "attributes", change=lambda bench: setattr(bench.net.layers[1], "forward", lambda x: x + 1)
    ),
    "all attributes": Case("attributes", change=_swap_attributes),
    "class": Case("type", change=lambda bench: setattr(bench.net.layers[1], "__class__", Negated)),
    "parameter": Case(
        "dicts", change=lambda bench: setattr(bench.net.layers[1], "weight", nn.Parameter(torch.eye(WIDTH), False))
    ),
    "buffer": Case("dicts", change=lambda bench: setattr(bench.net, "offset", torch.zeros(WIDTH))),
    "sub-module": Case("dicts", change=lambda bench: bench.net.layers.__setitem__(1, Layer().requires_grad_(False))),
    "a sub-module of another class": Case(
        "dicts", change=lambda bench: bench.net.layers.__setitem__(1, Negated().requires_grad_(False))
    ),
    "strides of a parameter": Case("tensors", change=_transpose),
    "a parameter that requires grad": Case("tensors", change=lambda bench: bench.net.layers[0].requires_grad_()),
    "an element of a list": Case("elements", change=lambda bench: bench.net.shifts.__setitem__(0, 9.0)),
    "length of a list": Case("elements,length", change=lambda bench: bench.net.shifts.append(9.0)),
    "settings": Case("attributes,same,others", change=lambda bench: setattr(bench.net.settings, "power", 3)),
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


@pytest.mark.parametrize(
    "name",
    slow_but(
        [
            *("dtype", "int", "a buffer of the module", "stance", "int attribute", "class", "parameter", "reset"),
            *("an element of a list", "strides of a parameter", "one in a list of an object", "length of a list"),
        ],
        CASES,
    ),
)
def test_what_dynamo_looks_at_is_noticed_by_its_rule(name: str) -> None:
    case, bench = CASES[name], Bench()
    seeing = bench.entrance()
    with without(case.rules):
        blind = bench.entrance()
    arguments = case.arguments(bench)
    with case.around():
        case.change(bench)
        assert not seeing.knows(arguments)
        with without(case.rules):
            assert blind.knows(arguments), "another rule notices it, too"
        bench.check(seeing, arguments, is_direct=False)


def test_hooks_of_modules_are_called_or_not_as_through_dynamo() -> None:
    bench = Bench()
    enter = bench.entrance()
    bench.net.layers[0].register_forward_hook(lambda module, args, output: output + 1)
    arguments = bench.arguments()
    through_dynamo = bench.compiled(**arguments)
    torch.testing.assert_close(enter(arguments)["x"], through_dynamo["x"])


def test_memory_that_a_parameter_is_given_is_read() -> None:
    bench = Bench()
    enter = bench.entrance()
    bench.net.layers[0].weight.data = torch.eye(WIDTH)  # alike, and elsewhere
    bench.check(enter, bench.arguments(), is_direct=True)
    bench.net.load_state_dict({name: value + 1 for name, value in bench.net.state_dict().items()})
    bench.check(enter, bench.arguments(), is_direct=True)
    bench.net.to(torch.float64).to(torch.float32)  # puts other buffers into the dicts
    bench.check(enter, bench.arguments(), is_direct=False)


# ------------------------------------------------------------------------------------- learning


def test_after_a_change_the_next_calls_enter_directly_again() -> None:
    bench = Bench()
    enter = bench.entrance()
    bench.net.layers[1].scale = 3
    bench.check(enter, bench.arguments(), is_direct=False)
    bench.check(enter, bench.arguments(), is_direct=True)
    bench.net.layers[1].weight = nn.Parameter(torch.eye(WIDTH), False)
    bench.check(enter, bench.arguments(), is_direct=False)
    bench.check(enter, bench.arguments(), is_direct=True)
    bench.check(enter, bench.arguments(count=1), is_direct=False)
    for count in (1, 3, 1, 3):
        bench.check(enter, bench.arguments(count=count), is_direct=True)


def test_objects_among_the_arguments_are_learned_one_by_one_and_not_kept_alive() -> None:
    bench = Bench()
    enter = bench.entrance()
    others = [Memory() for _ in range(3)]
    for memory in others:
        bench.check(enter, bench.arguments(memory=memory), is_direct=False)
    for memory in (*others, bench.memory, *others):
        bench.check(enter, bench.arguments(memory=memory), is_direct=True)
    gone = weakref.ref(others[0].slots[0].sums)
    del others, memory
    gc.collect()
    assert gone() is None


def test_an_object_of_another_shape_takes_the_old_way() -> None:
    bench = Bench()
    enter = bench.entrance()
    memory = Memory()
    memory.slots[0].weight = 2  # an int where a float was
    bench.check(enter, bench.arguments(memory=memory), is_direct=False)
    bench.check(enter, bench.arguments(), is_direct=True)


def test_where_learning_is_in_vain_it_is_tried_ever_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    enter = bench.entrance()
    tried = []
    learn = enter.learn
    monkeypatch.setattr(enter, "learn", lambda arguments: (tried.append(calls), learn(arguments)))
    for calls in range(40):  # noqa: B007
        enter(bench.arguments(memory=Memory()))
    assert tried[: entrance.LEARNED_ON_CREDIT - 1] == list(range(entrance.LEARNED_ON_CREDIT - 1))
    gaps = [
        after - before
        for before, after in zip(
            tried[entrance.LEARNED_ON_CREDIT :], tried[entrance.LEARNED_ON_CREDIT + 1 :], strict=False
        )
    ]
    assert gaps == sorted(gaps) and gaps[-1] >= 8


class Noted:
    last: Tensor | None = None


NOTED = Noted()


class Noting(nn.Module):
    """Keeps what it computes, in a global or in an object of its own."""

    def __init__(self, is_global: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH), requires_grad=False)
        self.noted = Noted()
        self.is_global = is_global

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        noted = NOTED if self.is_global else self.noted
        noted.last = x @ self.weight
        return {"y": noted.last + 1}


@pytest.mark.parametrize("is_global", [True, False])
def test_what_dynamo_does_after_the_graph_is_done_however_a_stage_is_entered(
    is_global: bool,
) -> None:
    module = Noting(is_global)
    with ppb.StageRunner(
        module, make_inputs=lambda n, tag: {"x": torch.full((n, WIDTH), float(n))}, max_tokens=4,
        transport=LocalHub(1).transport(0), options={"graphs": "emulate", "compiler": "eager", "capture_sizes": "1,4"},
    ) as runner:  # fmt: skip
        runner.warmup()
        sizes = (1, 2, 3, 4, 1, 4)
        for size, output in zip(sizes, runner.run(map(ppb.MicroBatch, sizes)), strict=True):
            kept = (NOTED if is_global else module.noted).last
            torch.testing.assert_close(kept, torch.full((size, WIDTH), float(size)) @ module.weight)
            torch.testing.assert_close(output["y"], kept + 1)
        # What an own object of the module holds is looked at; then it is learned from every other call.
        entries = runner.stats.direct_entries
        assert entries == 6 if is_global else 0 < entries < 6


# ----------------------------------------------------------------------- bytecode that is not known


def _graph(*taken: Any) -> list[Any]:
    return list(taken)


def _loads(given: Any) -> Any:
    graph_out_0 = __compiled_fn_0(given.a, given.b)  # noqa: F821
    return {"first": graph_out_0[0], "second": graph_out_0[1], "given": given.c}


def _writes_before(given: Any) -> Any:
    given.c = 1
    graph_out_0 = __compiled_fn_0(given.a, given.b)  # noqa: F821
    return graph_out_0


def _calls_before(given: Any) -> Any:
    graph_out_0 = __compiled_fn_0(given.a, given.pop())  # noqa: F821
    return graph_out_0


def _needs_later(given: Any) -> Any:
    first = given.a
    graph_out_0 = __compiled_fn_0(first, given.b)  # noqa: F821
    return graph_out_0, first


def _branches(given: Any) -> Any:
    graph_out_0 = __compiled_fn_0(given.a, given.b if given.c else given.a)  # noqa: F821
    return graph_out_0


def _stores_twice(given: Any) -> Any:
    graph_out_0 = __compiled_fn_0(given.a, given.b)  # noqa: F821
    graph_out_0 = graph_out_0[0]
    return graph_out_0


def with_graph(function: Any, graph: Callable[..., Any] = _graph) -> FunctionType:
    return FunctionType(function.__code__, {**globals(), "__compiled_fn_0": graph}, function.__name__)


def test_a_function_without_its_loads_does_the_rest() -> None:
    given = SimpleNamespace(a=1, b=2, c=3)
    whole = with_graph(_loads)
    assert dynamo_frames.graph_arguments(whole, given) == (1, 2)
    assert dynamo_frames.compiled_callable(whole) is _graph
    short = dynamo_frames.after_graph(whole, lambda: [7, 8], 2)
    assert short(SimpleNamespace(c=9)) == {"first": 7, "second": 8, "given": 9}


@pytest.mark.parametrize(
    "function", [_writes_before, _calls_before, _needs_later, _branches, _stores_twice], ids=lambda f: f.__name__
)
def test_bytecode_that_does_more_than_to_load_is_refused(function: Any) -> None:
    with pytest.raises(Unexpected):
        dynamo_frames.after_graph(with_graph(function), lambda: [7, 8], 2)


def test_another_number_of_arguments_and_another_number_of_graphs_are_refused() -> None:
    with pytest.raises(Unexpected, match="another way"):
        dynamo_frames.after_graph(with_graph(_loads), lambda: [7, 8], 3)
    with pytest.raises(Unexpected, match="0 graphs"):
        dynamo_frames.compiled_name(with_graph.__code__)


def test_attributes_items_sizes_and_types_are_read_and_nothing_else() -> None:
    values = {"a": SimpleNamespace(items=[torch.ones(2, 3)]), "b": {"c": 4}}
    read = ["L['a'].items[0]", "L['a'].items[0].size()[1]", "L['b']['c']", "G['n'].x", "type(L['a'])"]
    read += ["dict(type(G['n']).__dict__)['step']", "anything at all", "L['gone'].scale"]
    scope = {"n": Shadowed()}
    known = {"anything at all": "constant", "L['gone']": Layer()}
    found = dynamo_sources.reader(read, scope, known)(values)
    assert found == [values["a"].items[0], 3, 4, 1, SimpleNamespace, Shadowed.step, "constant", 2]
    for source in ("L['a'].pop()", "L['a'][L['b']]", "L['a'] +", "f(L['a'])", "dict(L['a'])", "x", "type(L, G)"):
        assert not dynamo_sources.is_readable(source)
        with pytest.raises(Unexpected):
            dynamo_sources.reader([source], {}, {})


def test_objects_are_the_same_only_where_they_are_all_there_and_no_others() -> None:
    values = {"a": SimpleNamespace(x=1.5, y=[]), "b": 2}
    are_same = dynamo_sources.are_the_same(["L['a'].x", "L['a'].y", "type(L['b'])"], {}, {}, values)
    assert are_same(values) and are_same({**values, "b": 3})
    for x, y, b in ((float("1.5"), values["a"].y, 2), (values["a"].x, [], 2), (values["a"].x, values["a"].y, True)):
        assert not are_same({"a": SimpleNamespace(x=x, y=y), "b": b})
    assert not are_same({"a": SimpleNamespace(x=values["a"].x), "b": 2}) and not are_same({})


def test_a_value_that_is_made_when_it_is_asked_for_stays_with_dynamo() -> None:
    def one(a: int, b: int) -> None: ...

    def other(a: int) -> None: ...

    scope = {"one": one}
    root, kind = dynamo_guards.native.RootGuardManager(), dynamo_guards._KIND
    node = root.globals_dict_manager(scope, "G", scope, kind).dict_getitem_manager("one", "G['one']", one, kind)
    node = node.code_manager("G['one'].__code__", one.__code__, kind)
    node = node.getattr_manager("co_varnames", "G['one'].__code__.co_varnames", one.__code__.co_varnames, kind)
    node.add_length_check_guard(2, ["two variables"], None)
    guards = dynamo_guards.Guards(SimpleNamespace(root=root), {}, scope, (), "arguments", ())
    objects = guards.of_objects({})
    assert guards.hold({}, objects)
    one.__code__ = other.__code__
    assert not guards.hold({}, objects)


class Shadowed:
    of_class = 1
    step = 2
    x = 1

    def __init__(self) -> None:
        self.__dict__.update(plain=1, computed=1, of_class=2)

    @property
    def computed(self) -> int:
        return 3


def test_an_attribute_lies_in_the_dict_unless_its_class_computes_it() -> None:
    names = ("plain", "of_class", "computed", "missing")
    assert [dynamo_guards._lies_in_dict(Shadowed(), name) for name in names] == [True, True, False, False]
    assert not dynamo_guards._lies_in_dict(Settings(), "power")


def entered_lines() -> set[str]:
    """What ``explain()`` says of entrances, by all programs."""
    paragraphs = re.split(r"\n(?=  \S)", ppb.explain())
    return {" ".join(text.split()) for text in paragraphs if text.startswith("  entered")}


def test_explain_says_what_an_entrance_costs() -> None:
    with ppb.StageRunner(
        Noting(is_global=True), make_inputs=lambda n, tag: {"x": torch.ones(n, WIDTH)}, max_tokens=4,
        transport=LocalHub(1).transport(0), options={"graphs": "emulate", "compiler": "eager", "capture_sizes": "4"},
    ) as runner:  # fmt: skip
        runner.warmup()
        assert len(list(runner.run(map(ppb.MicroBatch, (1, 2, 4))))) == 3
        (line,) = entered_lines()
        found = re.fullmatch(r"entered 3 of 3 micro-batches without Dynamo, after checks that take (\d+) us", line)
        assert found is not None and int(found[1]) > 0, line
    assert not entered_lines(), "nobody enters any more"


def test_the_log_says_why_a_stage_is_entered_through_dynamo(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamo_frames, "compiled_name", lambda code: "missing")
    with caplog.at_level(logging.INFO, "pp_piecewise_backend.pipeline.runner"), ppb.StageRunner(
        Noting(is_global=True), make_inputs=lambda n, tag: {"x": torch.ones(n, WIDTH)}, max_tokens=4,
        transport=LocalHub(1).transport(0), options={"graphs": "emulate", "compiler": "eager", "capture_sizes": "4"},
    ) as runner:  # fmt: skip
        runner.warmup()
        assert len(list(runner.run(map(ppb.MicroBatch, (1, 2, 4))))) == 3
        assert runner.stats.direct_entries == 0
        assert entered_lines() == {
            "entered 0 of 3 micro-batches without Dynamo; the last that was learned from goes through Dynamo: "
            "KeyError: 'missing'"
        }
    said = [record.getMessage() for record in caplog.records if "through Dynamo" in record.getMessage()]
    assert len(said) == 3 and all("KeyError: 'missing'" in text for text in said)


def test_decoders_of_transformers_enter_directly_with_each_of_their_caches() -> None:
    model = make_model("llama", 2)
    step = huggingface.DecoderStep(huggingface.cut_decoder(model, stages=1)[0], returns=("logits",))
    caches = [step.new_cache(16) for _ in range(2)]
    given: list[dict[str, Any]] = []

    def make_inputs(num_tokens: int, tag: bytes) -> dict[str, Any]:
        slot, start = (int(text) for text in tag.decode().split()) if tag else (0, 0)
        tokens = torch.arange(start + slot, start + slot + num_tokens) % 64
        positions = torch.arange(start, start + num_tokens)
        inputs = {"input_ids": tokens, "position_ids": positions, "past_key_values": caches[slot]}
        given.append(inputs)
        return inputs

    turns = [(0, 0, 4), (1, 0, 4), *((slot, start, 1) for start in range(4, 8) for slot in (0, 1))]
    with ppb.StageRunner(
        step, make_inputs=make_inputs, max_tokens=4, transport=LocalHub(1).transport(0),
        options={"graphs": "emulate", "compiler": "eager", "capture_sizes": "1,4"},
    ) as runner:  # fmt: skip
        runner.warmup()
        for cache in caches:
            cache.reset()
        batches = (ppb.MicroBatch(count, f"{slot} {start}".encode()) for slot, start, count in turns)
        outputs = [output["logits"].clone() for output in runner.run(batches)]
        # The second cache is learned from its first prompt, and from its first single token.
        assert runner.stats.direct_entries == len(turns) - 2
    fresh = [step.new_cache(16) for _ in caches]
    for (slot, start, count), output in zip(turns, outputs, strict=True):
        inputs = {**make_inputs(count, f"{slot} {start}".encode()), "past_key_values": fresh[slot]}
        torch.testing.assert_close(output, step(**inputs)["logits"])

"""Calls that enter a stage without Dynamo, and all that must keep them from it."""

from __future__ import annotations

import gc
import logging
import re
import weakref
from collections.abc import Callable, Iterator
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pp_piecewise_backend as ppb
from entered_stages import CASES, WIDTH, Bench, Case, Layer, Memory, Settings, without
from models.hf import make_model
from pp_piecewise_backend.integrations import huggingface
from pp_piecewise_backend.pipeline.transports.local import LocalHub
from pp_piecewise_backend.utils import dynamo_entrance as entrance
from pp_piecewise_backend.utils import dynamo_frames, dynamo_guards, dynamo_places, dynamo_sources
from pp_piecewise_backend.utils.dynamo_entrance import Entrance
from pp_piecewise_backend.utils.dynamo_sources import Unexpected
from tiers import slow_but

pytestmark = [pytest.mark.usefixtures("fresh_backend", "no_gradients")]


@pytest.fixture(autouse=True)
def _all_guards_are_asked() -> Iterator[None]:
    """On 2.11 Dynamo has a fast way of its own, which does not notice all that its guards are about."""
    with torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=False):
        yield


def test_calls_like_one_that_was_learned_enter_directly_and_give_what_eager_gives() -> None:
    bench = Bench()
    enter = bench.entrance()
    for _ in range(4):
        bench.check(enter, bench.arguments(), is_direct=True)
        with torch.no_grad():
            bench.net.layers[0].weight.mul_(1.1)  # what is read is the parameter, not a copy
            bench.net.offset.add_(1)


# ------------------------------------------------------------------------- what must be noticed

_BY_DEFAULT = [
    *("dtype", "int", "a buffer of the module", "stance", "int attribute", "class", "parameter", "reset"),
    *("an element of a list", "strides of a parameter", "one in a list of an object", "length of a list"),
    "a sub-module in a list",
]


@pytest.mark.parametrize("name", slow_but(_BY_DEFAULT, CASES))
def test_what_dynamo_looks_at_is_noticed_by_its_rule(name: str) -> None:
    case, bench = CASES[name], Bench()
    with without(case.rules):
        blind = bench.entrance()
    _check_that_it_is_noticed(case, case.rules, bench, bench.entrance(), blind)


def _check_that_it_is_noticed(case: Case, rules: str, bench: Bench, seeing: Entrance, blind: Entrance) -> None:
    arguments = case.arguments(bench)
    with case.around():
        case.change(bench)
        assert not seeing.knows(arguments)
        with without(rules):
            assert blind.knows(arguments), "another rule notices it, too"
        bench.check(seeing, arguments, is_direct=False)


_BY_DEFAULT_WHERE_ALL_CHANGES = [
    *("dtype", "forward of an instance", "int attribute", "class", "parameter", "sub-module", "a plain object"),
    *("order of a dict", "one that hides nothing any more", "tensor attribute", "method of a plain object"),
]


@pytest.mark.parametrize("name", slow_but(_BY_DEFAULT_WHERE_ALL_CHANGES, CASES))
def test_it_is_noticed_by_its_rule_where_all_objects_change_between_calls(name: str) -> None:
    case, bench = CASES[name], Bench()
    rules = case.touched or case.rules
    with without(rules):
        blind = bench.touched_entrance()
    seeing = bench.touched_entrance()
    _check_that_it_is_noticed(case, rules, bench, seeing, blind)


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
        bench.net.layers[1].__dict__ = dict(vars(bench.net.layers[1]))  # not a change of the dict that was there
        enter(bench.arguments())
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
        # What an own object of the module holds is looked at: the first calls of either size show that it changes.
        assert runner.stats.direct_entries == (6 if is_global else 4)


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
    places = ["L['a'].x", "L['a'].y", "type(L['b'])", "'a' in L"]
    same = dynamo_sources.Same(places, {}, {}, values)
    assert same.are_there(values) and same.are_there({**values, "b": 3}) and same.others(values) == []
    for at, (x, y, b) in enumerate(((float("1.5"), values["a"].y, 2), (1.5, [], 2), (1.5, values["a"].y, True))):
        others = {"a": SimpleNamespace(x=values["a"].x if at else x, y=y), "b": b}
        assert not same.are_there(others) and same.others(others) == [places[at]]
    gone = {"a": SimpleNamespace(x=values["a"].x), "b": 2}
    assert not same.are_there(gone) and not same.are_there({}) and same.others(gone) == []


def test_a_value_that_is_made_when_it_is_asked_for_stays_with_dynamo() -> None:
    def one(a: int, b: int) -> None: ...

    def other(a: int) -> None: ...

    scope = {"one": one}
    root, kind = dynamo_guards.native.RootGuardManager(), dynamo_places._KIND
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

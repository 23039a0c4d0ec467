"""What each graph input is and why, on graphs that Dynamo really makes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import sympy
import torch
from torch import Tensor, nn

import pp_piecewise_backend as ppb
from models.hf import greedy_decode, make_model, make_prompts
from models.toy_stage import NAMED_OPS, ToyStage
from pp_piecewise_backend.compilation.placeholders import GraphInput
from pp_piecewise_backend.compilation.sources import argument_path, readable
from pp_piecewise_backend.runtime.program import Program

TOKENS, HIDDEN = 5, 4


pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")


def compiled(function: Callable[..., Any], *, dynamic: bool | None = None, **options: Any) -> Callable[..., Any]:
    options = {"compiler": "eager", **options}
    return torch.compile(function, backend="pp_piecewise", options=options, dynamic=dynamic)


def program_of(function: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any) -> Program:
    """The program that one call with these arguments makes; its result is compared with eager."""
    wanted = function(*args, **kwargs)
    got = compiled(function, dynamic=dynamic)(*args, **kwargs)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    program = ppb.programs()[-1]
    assert isinstance(program, Program) and program.stats.calls == 1
    return program


def by_label(program: Program) -> dict[str, GraphInput]:
    return {graph_input.label: graph_input for graph_input in program.inputs}


def kinds(program: Program) -> dict[str, str]:
    return {graph_input.label: graph_input.kind for graph_input in program.inputs}


def proxies() -> tuple[Tensor, Tensor]:
    return torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, HIDDEN)


class Stage(nn.Module):
    """A later stage: proxies and positions, no ``input_ids``; a buffer, a plain tensor and a list of caches."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)
        self.register_buffer("scale", torch.rand(HIDDEN))
        self.table = torch.rand(32, HIDDEN)
        self.caches = [torch.zeros(16, HIDDEN), torch.zeros(16, HIDDEN)]

    def forward(self, hidden_states: Tensor, residual: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        self.caches[1][positions] = hidden_states
        hidden = self.linear(hidden_states + residual) * self.scale + self.table[positions]
        return hidden + self.caches[0][positions], residual


def stage_arguments(tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(tokens, HIDDEN), torch.randn(tokens, HIDDEN), torch.arange(tokens)


STAGE_KINDS = {
    "hidden_states": "stage-input",
    "residual": "stage-input",
    "positions": "per-token",
    "weight": "parameter",
    "bias": "parameter",
    "scale": "parameter",
    "table": "parameter",
    "caches[0]": "parameter",
    "caches[1]": "state",
}


# ------------------------------------------------------------------------ how proxies come in


@pytest.mark.compat
@pytest.mark.parametrize("as_keywords", [False, True], ids=["positional", "keywords"])
def test_every_kind_and_reason_on_a_later_stage(as_keywords: bool) -> None:
    names = ("hidden_states", "residual", "positions")
    arguments = stage_arguments()
    keywords = dict(zip(names, arguments, strict=True)) if as_keywords else {}
    program = program_of(Stage(), *(() if as_keywords else arguments), **keywords)
    assert kinds(program) == STAGE_KINDS
    assert {label: i.reason for label, i in by_label(program).items()} == {
        "hidden_states": "registered as 'hidden_states'",
        "residual": "registered as 'residual'",
        "positions": "dimension 0 is the token count",
        "weight": "module parameter",
        "bias": "module parameter",
        "scale": "module buffer",
        "table": "attribute of a module",
        "caches[0]": "attribute of a module",
        "caches[1]": "attribute of a module that the graph writes",
    }
    assert program.table.unmatched_stage_inputs == ()
    assert program.table.token_count == TOKENS
    assert [i.name for i in program.table.of_kind("stage-input")] == [
        i.name for i in program.inputs if i.label in ("hidden_states", "residual")
    ]


def closure(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def method_decorator(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return wrapper


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def _decorated_class(decorate: Callable[..., Any]) -> nn.Module:
    return type("Decorated", (Stage,), {"forward": decorate(Stage.forward)})()


def _patched_instance() -> nn.Module:
    stage = Stage()
    stage.forward = closure(stage.forward)  # type: ignore[method-assign]
    return stage


WRAPPERS: dict[str, Callable[[], Callable[..., Any]]] = {
    "closure-over-module": lambda: closure(Stage()),
    "closure-over-method": lambda: closure(Stage().forward),
    "closure-twice": lambda: closure(closure(Stage().forward)),
    "functools-wraps": lambda: decorator(Stage().forward),
    "args-with-self": lambda: _decorated_class(decorator),
    "args-with-self-no-wraps": lambda: _decorated_class(closure),
    "self-and-args": lambda: _decorated_class(method_decorator),
    "patched-instance": _patched_instance,
    "module-around-module": lambda: Around(Stage()),
    "module-around-module-twice": lambda: Around(Around(Stage())),
    "module-around-decorated-module": lambda: Around(_decorated_class(closure)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_proxies_behind_a_wrapper(wrapper: str) -> None:
    assert kinds(program_of(WRAPPERS[wrapper](), *stage_arguments())) == STAGE_KINDS


def test_keywords_behind_a_wrapper() -> None:
    hidden_states, residual, positions = stage_arguments()
    program = program_of(Around(Stage()), hidden_states, positions=positions, residual=residual)
    assert kinds(program) == STAGE_KINDS


def test_a_wrapper_of_nothing_keeps_its_positions() -> None:
    def swap(*args: Any) -> Any:
        return args[0] * 2 + args[1]

    for function in (swap, closure(torch.add)):  # of a builtin, Python does not say what its parameters are
        program = program_of(function, *proxies())
        assert set(kinds(program)) == {"args[0]", "args[1]"}
    assert program.table.unmatched_stage_inputs == ("hidden_states", "residual")


def test_a_wrapper_that_refers_to_itself() -> None:
    def itself(*args: Any) -> Any:
        return args[0] + 1 if len(args) == 1 else itself(args[0])

    program = program_of(itself, torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, HIDDEN))
    assert kinds(program) == {"args[0]": "other-tensor"}


# ------------------------------------------------------------------------------- names for readers


@pytest.mark.compat
@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("L['hidden_states']", "hidden_states"),
        ("L['self']._modules['layers']._modules['0']._parameters['weight']", "self.layers.0.weight"),
        ("L['self']._buffers['k_cache']", "self.k_cache"),
        ("L['caches'][0].keys", "caches[0].keys"),
        ("G['TABLE']", "TABLE"),
        ("", ""),
    ],
)
def test_sources_are_readable(source: str, text: str) -> None:
    assert readable(source, argument_path(source, None), None) == text


@pytest.mark.compat
def test_a_sequential_has_the_names_of_its_user_and_not_of_the_wrapper_around_it() -> None:
    program = program_of(nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU()), torch.randn(TOKENS, HIDDEN))
    assert [graph_input.readable for graph_input in program.inputs] == ["self.0.weight", "self.0.bias", "input"]
    assert all(f" {text} " in program.explain() for text in ("self.0.weight", "input"))


def test_arguments_behind_a_wrapper_are_readable() -> None:
    hidden_states, residual, positions = stage_arguments()
    program = program_of(Around(Stage()), hidden_states, positions=positions, residual=residual)
    named = {graph_input.label: graph_input.readable for graph_input in program.inputs}
    assert {label: named[label] for label in ("hidden_states", "residual", "positions")} == {
        label: label for label in ("hidden_states", "residual", "positions")
    }


class NamedProxies(NamedTuple):
    hidden_states: Tensor
    residual: Tensor


@dataclass
class DataProxies:
    hidden_states: Tensor
    residual: Tensor


class IntermediateTensors:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


def _named(pair: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return dict(zip(("hidden_states", "residual"), pair, strict=True))


def from_items(carrier: Any) -> Tensor:
    return carrier["hidden_states"] * 2 + carrier["residual"]


def from_attributes(carrier: Any) -> Tensor:
    return carrier.hidden_states * 2 + carrier.residual


def from_list_of_dicts(carrier: Any) -> Tensor:
    return carrier[0]["hidden_states"] * 2 + carrier[0]["residual"]


def from_unpacking(carrier: Any) -> Tensor:
    hidden_states, residual = carrier
    return hidden_states * 2 + residual


CARRIERS: dict[str, tuple[Callable[[Any], Tensor], Callable[[], Any]]] = {
    "dict": (from_items, lambda: _named(proxies())),
    "object-with-tensors": (from_items, lambda: IntermediateTensors(_named(proxies()))),
    "list-of-dicts": (from_list_of_dicts, lambda: [_named(proxies())]),
    "named-tuple": (from_attributes, lambda: NamedProxies(*proxies())),
    "named-tuple-unpacked": (from_unpacking, lambda: NamedProxies(*proxies())),
    "dataclass": (from_attributes, lambda: DataProxies(*proxies())),
}


@pytest.mark.parametrize("wrap", [lambda f: f, closure], ids=["direct", "wrapped"])
@pytest.mark.parametrize("carrier", CARRIERS)
def test_proxies_in_containers(carrier: str, wrap: Callable[[Any], Any]) -> None:
    function, make = CARRIERS[carrier]
    program = program_of(wrap(function), make())
    assert kinds(program) == {"hidden_states": "stage-input", "residual": "stage-input"}
    assert program.table.token_count == TOKENS


# ------------------------------------------------------------------------------- token count


@pytest.mark.compat
def test_the_static_the_dynamic_and_the_size_1_program() -> None:
    run = compiled(Stage())
    for tokens in (5, 6, 1):
        run(*stage_arguments(tokens))
    five, dynamic, one = ppb.programs()
    assert (one.table.token_count, five.table.token_count) == (1, 5)
    assert one.table.token_reason == "static 1, from hidden_states float32[1, 4]"
    assert kinds(one) == kinds(five) == STAGE_KINDS
    symbol = dynamic.table.token_count
    assert isinstance(symbol, sympy.Symbol)
    (count,) = dynamic.table.of_kind("token-count")
    assert (count.expression, count.spec, count.reason) == (symbol, None, "sizes the token dimension")
    assert {i.label: i.kind for i in dynamic.inputs if i is not count} == STAGE_KINDS
    assert {i.label: i.token_dim for i in dynamic.inputs if i.token_dim is not None} == {
        "hidden_states": 0, "residual": 0, "positions": 0,
    }  # fmt: skip


@pytest.mark.compat
@pytest.mark.parametrize("mark", ["mark_dynamic", "mark_unbacked"])
def test_marked_token_dimension(mark: str) -> None:
    arguments = stage_arguments()
    for tensor in arguments:
        getattr(torch._dynamo.decorators, mark)(tensor, 0)
    program = program_of(Stage(), *arguments)
    # Unbacked, each tensor brings its own number; the graph's asserts make them one symbol.
    (symbol,) = {i.expression for i in program.inputs if i.spec is None}
    assert symbol == program.table.token_count and isinstance(symbol, sympy.Symbol)
    assert {i.kind for i in program.inputs if i.spec is None} == {"token-count"}
    assert {i.label: i.kind for i in program.inputs if i.spec is not None} == STAGE_KINDS


def test_positions_with_tokens_last() -> None:
    def forward(hidden_states: Tensor, positions: Tensor) -> Tensor:
        return hidden_states + positions.sum(0)[:, None]

    run = compiled(forward)
    for tokens in (5, 6):
        run(torch.randn(tokens, HIDDEN), torch.arange(3 * tokens).view(3, tokens))
    for program in ppb.programs():
        positions = by_label(program)["positions"]
        assert (positions.kind, positions.token_dim) == ("per-token", 1)


def test_hugging_face_shapes() -> None:
    def forward(hidden_states: Tensor, position_ids: Tensor, rotary: Tensor, attention_mask: Tensor) -> Tensor:
        heads = hidden_states.view(1, -1, 2, HIDDEN // 2).transpose(1, 2) * rotary
        return heads.transpose(1, 2).flatten(2) + position_ids[..., None] * attention_mask[..., None]

    run = compiled(forward)
    for tokens in (5, 6):
        run(torch.randn(1, tokens, HIDDEN), torch.arange(tokens)[None], torch.randn(1, 2, tokens, 2),
            torch.ones(1, tokens, dtype=torch.int64))  # fmt: skip
    for program in ppb.programs():
        inputs = by_label(program)
        assert {label: (i.kind, i.token_dim) for label, i in inputs.items() if i.spec is not None} == {
            "hidden_states": ("stage-input", 1),
            "position_ids": ("per-token", 1),
            "rotary": ("per-token", 2),
            "attention_mask": ("per-token", 1),
        }


def test_batch_and_sequence_both_vary() -> None:
    def forward(hidden_states: Tensor, position_ids: Tensor) -> Tensor:
        return hidden_states + position_ids[..., None]

    arguments = torch.randn(3, TOKENS, HIDDEN), torch.arange(3 * TOKENS).view(3, TOKENS)
    for tensor in arguments:
        torch._dynamo.mark_dynamic(tensor, 0)
        torch._dynamo.mark_dynamic(tensor, 1)
    program = program_of(forward, *arguments)
    hidden_states = by_label(program)["hidden_states"]
    assert hidden_states.spec is not None
    batch, tokens, _ = hidden_states.spec.shape
    assert program.table.token_count == tokens != batch
    assert program.table.token_reason.endswith(f"; {batch} varies too")
    numbers = {i.expression: i.kind for i in program.inputs if i.spec is None}
    assert numbers == {batch: "scalar", tokens: "token-count"}
    assert by_label(program)["position_ids"].token_dim == 1


def test_stage_inputs_that_disagree() -> None:
    def forward(hidden_states: Tensor, residual: Tensor) -> Tensor:
        return hidden_states.sum() + residual

    program = program_of(forward, torch.randn(5, HIDDEN), torch.randn(7, HIDDEN))
    assert program.table.token_count is None
    assert program.table.token_reason == (
        "the stage inputs disagree on the token dimension: hidden_states float32[5, 4], residual float32[7, 4]"
    )
    assert set(kinds(program).values()) == {"stage-input"}


PROXIES = {
    "two tail dimensions": {"hidden_states": ppb.Proxy((2, HIDDEN), torch.float32)},
    "no tail": {"hidden_states": ppb.Proxy((), torch.float32)},
    "integers": {"hidden_states": ppb.Proxy((8,), torch.float32), "residual": ppb.Proxy((16,), torch.int64)},
    "bools": {"hidden_states": ppb.Proxy((8,), torch.float32), "residual": ppb.Proxy((16,), torch.bool)},
    "complex": {"hidden_states": ppb.Proxy((8,), torch.float32), "residual": ppb.Proxy((16,), torch.complex64)},
}


def summing(**stage_inputs: Tensor) -> Tensor:
    hidden, *others = (t.flatten(1) if t.dim() > 1 else t[:, None] for t in stage_inputs.values())
    for other in others:
        hidden = hidden + (other.real if other.is_complex() else other).float().mean(-1, keepdim=True)
    return torch.softmax(hidden @ hidden.new_ones(hidden.shape[1], 3), 0) * 2


@pytest.mark.parametrize("declared", [True, False], ids=["stage", "no stage"])
@pytest.mark.parametrize("kind", PROXIES)
def test_proxies_of_every_shape_and_dtype_count_tokens_in_every_program(kind: str, declared: bool) -> None:
    stage = ppb.Stage(PROXIES[kind], 8, "cpu")
    given: dict[str, Any] = {"stage": stage} if declared else {"max_tokens": 8}
    run = compiled(summing, graphs="emulate", split_ops="softmax", **given)
    for tokens in (7, 6, 1, 8):
        views = stage.views(tokens)
        for name, view in views.items():
            view.copy_(torch.randn(tokens, *PROXIES[kind][name].shape) > 0)
        torch.testing.assert_close(run(**views), summing(**views), rtol=1e-5, atol=1e-5)
    static, dynamic, one = ppb.programs()
    if declared or kind != "two tail dimensions":  # there nothing tells which of the leading dimensions it is
        assert (static.table.token_count, one.table.token_count) == (7, 1)
    assert isinstance(dynamic.table.token_count, sympy.Symbol)
    assert "no-token-count" not in ppb.stats().miss_reasons


def test_a_stage_input_of_another_rank_than_declared_is_named() -> None:
    stage = ppb.Stage({"hidden_states": ppb.Proxy((2, HIDDEN), torch.float32)}, 8, "cpu")
    run = compiled(lambda hidden_states: hidden_states * 2, graphs="emulate", stage=stage)
    with pytest.raises(Exception, match=r"float32\[2, 4\].*rows of shape \(2, 4\)"):
        run(torch.randn(2, HIDDEN))


def test_the_first_stage_counts_its_ids_and_a_named_input_comes_before_others() -> None:
    def forward(lengths: Tensor, table: Tensor, input_ids: Tensor) -> Tensor:
        return table[input_ids] + lengths.sum()

    run = compiled(forward)
    for tokens in (5, 6):
        run(torch.arange(3), torch.randn(9, HIDDEN), torch.randint(9, (tokens,)))
    static, dynamic = ppb.programs()
    assert static.table.token_reason == "static 5, from input_ids int64[5]"
    assert {label: kind for label, kind in kinds(dynamic).items() if kind != "token-count"} == {
        "lengths": "other-tensor", "table": "other-tensor", "input_ids": "per-token",
    }  # fmt: skip


def test_among_unnamed_arguments_the_one_that_varies_counts() -> None:
    def forward(weight: Tensor, rows: Tensor) -> Tensor:
        return rows @ weight

    run = compiled(forward)
    for tokens in (5, 6):
        run(torch.ones(HIDDEN, HIDDEN), torch.randn(tokens, HIDDEN))
    program = ppb.programs()[-1]
    assert isinstance(program.table.token_count, sympy.Symbol)
    assert {i.label: i.kind for i in program.inputs if i.spec is not None} == {
        "weight": "other-tensor", "rows": "per-token",
    }  # fmt: skip


def test_nothing_that_counts_tokens() -> None:
    constant = torch.tensor(2.0)
    program = program_of(lambda: constant + 1)
    assert program.table.token_count is None
    assert program.table.token_reason == "no stage input and no per-token input was found"


def test_a_static_size_that_matches_by_chance() -> None:
    class Holder:
        scales = torch.randn(TOKENS)

    def forward(hidden_states: Tensor, holder: Holder) -> Tensor:
        return hidden_states * holder.scales[0]

    program = program_of(forward, torch.randn(TOKENS, HIDDEN), Holder())
    assert kinds(program) == {"hidden_states": "stage-input", "scales": "other-tensor"}


# ------------------------------------------------------------------------- members and state


def test_global_and_local_modules_and_tensors() -> None:
    program = program_of(uses_globals, *stage_arguments())
    assert kinds(program) == {**STAGE_KINDS, "GLOBAL_TENSOR": "other-tensor"}


GLOBAL_TENSOR = torch.rand(HIDDEN)
GLOBAL_STAGE = Stage()


def uses_globals(hidden_states: Tensor, residual: Tensor, positions: Tensor) -> Tensor:
    return GLOBAL_STAGE(hidden_states, residual, positions)[0] + GLOBAL_TENSOR


def test_parameters_as_arguments() -> None:
    def forward(hidden_states: Tensor, weight: nn.Parameter) -> Tensor:
        return hidden_states @ weight

    program = program_of(forward, torch.randn(TOKENS, HIDDEN), nn.Parameter(torch.rand(HIDDEN, HIDDEN)))
    weight = by_label(program)["weight"]
    assert (weight.kind, weight.reason) == ("parameter", "torch.nn.Parameter")


def test_caches_and_counters_passed_as_arguments() -> None:
    def forward(hidden_states: Tensor, caches: list[Tensor], length: Tensor, read_only: Tensor) -> Tensor:
        caches[0].index_copy_(0, length + torch.arange(hidden_states.shape[0]), hidden_states)
        length.add_(hidden_states.shape[0])
        return caches[0].sum(0) + hidden_states + read_only.sum()

    caches, length = [torch.zeros(16, HIDDEN)], torch.zeros(1, dtype=torch.int64)
    compiled(forward)(torch.ones(TOKENS, HIDDEN), caches, length, torch.ones(16, HIDDEN))
    (program,) = ppb.programs()
    assert kinds(program) == {
        "hidden_states": "stage-input", "caches[0]": "state", "length": "state", "read_only": "other-tensor",
    }  # fmt: skip
    assert by_label(program)["length"].reason == "the graph writes it"
    assert length.item() == TOKENS and caches[0].sum().item() == TOKENS * HIDDEN


def test_a_state_that_is_written_through_a_view_and_read_through_another_input() -> None:
    def forward(hidden_states: Tensor, cache: Tensor, window: Tensor) -> Tensor:
        cache.view(-1)[:2].fill_(3)
        return hidden_states + window

    cache = torch.zeros(4, HIDDEN)
    compiled(forward)(torch.zeros(TOKENS, HIDDEN), cache, cache[0])
    (program,) = ppb.programs()
    inputs = by_label(program)
    assert inputs["cache"].kind == "state"
    assert inputs.get("window", inputs["cache"]).kind == "state"  # the same memory


def test_a_mutated_stage_input_stays_a_stage_input() -> None:
    def forward(hidden_states: Tensor, residual: Tensor) -> Tensor:
        residual.add_(hidden_states)
        return residual.relu()

    hidden_states, residual = proxies()
    wanted = residual + hidden_states
    compiled(forward)(hidden_states, residual)
    (program,) = ppb.programs()
    assert by_label(program)["residual"].reason == "registered as 'residual' and written by the graph"
    assert by_label(program)["hidden_states"].reason == "registered as 'hidden_states'"
    torch.testing.assert_close(residual, wanted)


def test_written_buffers_are_state() -> None:
    stage = ToyStage(2)
    inputs = stage.make_inputs(TOKENS)
    torch.compile(stage, backend="pp_piecewise", options={"compiler": "eager", **NAMED_OPS})(**inputs)
    (program,) = ppb.programs()
    assert {i.label: i.reason for i in program.table.of_kind("state")} == {
        "k_cache": "module buffer that the graph writes", "v_cache": "module buffer that the graph writes",
    }  # fmt: skip
    assert by_label(program)["cos_sin"].kind == "parameter"


# ------------------------------------------------------------------------------------ numbers


def test_numbers() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eps = 0.5
            self.linear = nn.Linear(HIDDEN, HIDDEN)

        def forward(self, hidden_states: Tensor, factor: float, count: int) -> Tensor:
            return self.linear(hidden_states) * self.eps * factor + count

    program = program_of(Scaled(), torch.randn(TOKENS, HIDDEN), 2.5, 7, dynamic=True)
    inputs = by_label(program)
    for name in ("eps", "factor"):
        if name in inputs:  # whether a float becomes an input is Dynamo's choice
            assert inputs[name].kind == "scalar"
            assert inputs[name].reason == "a Python float, which Dynamo passes as a 0-d tensor"
    assert "factor" in inputs
    assert (inputs["count"].kind, inputs["count"].reason) == ("scalar", "a number that is no token count")


# ------------------------------------------------------------------------------ unmatched names


def forward_of_x(x: Tensor) -> Tensor:
    return x * 2


def test_default_names_that_match_nothing_are_only_explained() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ppb.errors.PPPiecewiseWarning)
        program = program_of(forward_of_x, torch.randn(TOKENS, HIDDEN))
    assert "not found" in program.explain() and "hidden_states, residual" in program.explain()


@pytest.mark.compat
def test_given_names_that_match_nothing_warn() -> None:
    with pytest.warns(ppb.errors.PPPiecewiseWarning, match="stage inputs 'hidden' matched no input.*'x'"):
        compiled(forward_of_x, stage_inputs="x,hidden")(torch.randn(TOKENS, HIDDEN))
    (program,) = ppb.programs()
    assert kinds(program) == {"x": "stage-input"}
    assert program.table.unmatched_stage_inputs == ("hidden",)


def test_given_names_that_match_nothing_are_an_error_under_strict() -> None:
    with pytest.raises(Exception, match="stage inputs 'hidden' matched no input") as caught:
        compiled(forward_of_x, stage_inputs="hidden", strict=True)(torch.randn(TOKENS, HIDDEN))
    chain = [caught.value, caught.value.__cause__, caught.value.__context__]
    assert any(isinstance(error, ppb.errors.UnmatchedName) for error in chain)


def test_names_of_parameters_buffers_and_numbers_are_no_stage_inputs() -> None:
    class Confusing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.residual = nn.Parameter(torch.ones(HIDDEN))
            self.register_buffer("hidden_states", torch.ones(HIDDEN))

        def forward(self, x: Tensor, count: int) -> Tensor:
            return x * self.residual + self.hidden_states + count

    run = compiled(Confusing(), stage_inputs="residual,hidden_states,count", dynamic=True)
    with pytest.warns(ppb.errors.PPPiecewiseWarning, match="'residual', 'hidden_states', 'count' matched no input"):
        run(torch.randn(TOKENS, HIDDEN), 3)
    (program,) = ppb.programs()
    labels = by_label(program)
    assert (labels["residual"].kind, labels["hidden_states"].kind, labels["count"].kind) == (
        "parameter", "parameter", "scalar",
    )  # fmt: skip


# ------------------------------------------------------------------------------ Hugging Face


def hf_kinds(program: Program) -> dict[str, set[str]]:
    """Label -> kinds, parameters left out."""
    found: dict[str, set[str]] = {}
    for graph_input in program.inputs:
        if graph_input.kind != "parameter" and graph_input.spec is not None:
            found.setdefault(graph_input.label, set()).add(graph_input.kind)
    return found


def test_llama_with_a_static_cache() -> None:
    model = make_model("llama", num_layers=1)
    greedy_decode(compiled(model), model.config, make_prompts([5, 7]), cache_kind="static", steps=3)
    prefill, decode, dynamic = ppb.programs()
    counters = {"input_ids": {"per-token"}, "cumulative_length": {"state"}}
    assert hf_kinds(prefill) == hf_kinds(dynamic) == counters  # the cache's memory is born in the prefill
    assert hf_kinds(decode) == {**counters, "keys": {"state"}, "values": {"state"}}
    assert [p.table.token_count for p in (prefill, decode)] == [5, 1]
    (count,) = dynamic.table.of_kind("token-count")
    assert count.source == "L['kwargs']['input_ids'].size()[1]"
    ids = by_label(dynamic)["input_ids"]
    assert (ids.token_dim, ids.reason) == (1, "dimension 1 is the token count")


@pytest.mark.parametrize(("architecture", "cache"), [("gemma2", "static"), ("gpt2", "dynamic")])
def test_other_decoders(architecture: str, cache: str) -> None:
    model = make_model(architecture, num_layers=1)
    prompts = make_prompts([5, 7])
    for prompt in prompts:
        torch._dynamo.mark_dynamic(prompt, 1)
    greedy_decode(compiled(model), model.config, prompts, cache_kind=cache, steps=2)
    token_counts = [program.table.token_count for program in ppb.programs()]
    assert 1 in token_counts and any(isinstance(count, sympy.Symbol) for count in token_counts)
    for program in ppb.programs():
        found = hf_kinds(program)
        assert found.pop("input_ids") == {"per-token"}
        expected = {"state"} if cache == "static" else {"other-tensor"}
        for label in ("keys", "values"):
            assert found.pop(label, expected) == expected
        found.pop("_sliding_window_tensor", None)
        assert found in ({}, {"cumulative_length": {"state"}})
        assert by_label(program)["input_ids"].token_dim == 1
        if any(i.kind == "token-count" for i in program.inputs):
            assert isinstance(program.table.token_count, sympy.Symbol)
        else:
            assert program.table.token_count in (1, 5)

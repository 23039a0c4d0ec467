"""Random small programs: whatever eager does, the compiled program does, to outputs and to arguments.

Each example is the source of a `forward`, so that a failure prints as a program one can read and run. What
is compared: values (bit by bit where pieces run as they are), dtypes, shapes, strides, which outputs share
memory with which tensors, and what became of the tensors that the caller passed.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import pp_piecewise_backend as ppb
from pp_piecewise_backend.runtime.cudagraphs.emulated import EmulatedGraph
from pp_piecewise_backend.runtime.cudagraphs.memory import same_bits
from pp_piecewise_backend.runtime.program import Program
from pp_piecewise_backend.utils.counters import Snapshot

# A program may leave out the result of its only split op; then nothing matches, and the backend says so.
pytestmark = pytest.mark.filterwarnings("ignore::pp_piecewise_backend.errors.PPPiecewiseWarning")

HIDDEN = 8
MAX_TOKENS = 16
SPLIT_OPS = "+prop::*"
N = "n"
"""Stands for the token dimension in the shapes below."""

TOKENS, HEADS, TRANSPOSED, HALF, COLUMN, ROW = (
    (N, HIDDEN),
    (N, 2, HIDDEN // 2),
    (HIDDEN, N),
    (N, HIDDEN // 2),
    (N, 1),
    (1, HIDDEN),
)


def _mix(a: Tensor, b: Tensor) -> Tensor:
    return torch.softmax(a @ b.mT, dim=-1) @ b


@torch.library.custom_op("prop::fresh", mutates_args=())
def fresh(a: Tensor, b: Tensor) -> Tensor:
    return _mix(a, b).contiguous()


@fresh.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape)


@torch.library.custom_op("prop::into", mutates_args=("out",))
def into(a: Tensor, b: Tensor, out: Tensor) -> None:
    out.copy_(_mix(a, b))


@into.register_fake
def _(a: Tensor, b: Tensor, out: Tensor) -> None:
    return None


@torch.library.custom_op("prop::cached", mutates_args=("cache",))
def cached(a: Tensor, cache: Tensor, ids: Tensor) -> Tensor:
    cache[ids] = a
    return _mix(a, cache).contiguous()


@cached.register_fake
def _(a: Tensor, cache: Tensor, ids: Tensor) -> Tensor:
    return a.new_empty(a.shape)


@dataclass(frozen=True)
class Variable:
    """A name of the generated program, with the shape and the dtype that its value will have."""

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype = torch.float32


@dataclass
class Writer:
    """A program while it is being written: the lines so far and the names they define."""

    draw: Callable[..., Any]
    lines: list[str] = field(default_factory=list)
    variables: list[Variable] = field(
        default_factory=lambda: [Variable("x", TOKENS), Variable("y", TOKENS), Variable("x", TOKENS)]
    )

    def pick(self, *shapes: tuple[int | str, ...], dtype: torch.dtype | None = torch.float32) -> Variable | None:
        """A name of one of these shapes (any, if none is given) and of that dtype (None: any)."""
        fitting = [
            variable
            for variable in self.variables
            if (not shapes or variable.shape in shapes) and dtype in (None, variable.dtype)
        ]
        # The newest names come first: hypothesis shrinks towards long chains, not towards the inputs.
        return self.draw(st.sampled_from(fitting[::-1])) if fitting else None

    def choose(self, *choices: str) -> str:
        return self.draw(st.sampled_from(choices))

    def define(self, value: str, shape: tuple[int | str, ...], dtype: torch.dtype = torch.float32) -> Variable:
        variable = Variable(f"v{len(self.lines)}", shape, dtype)
        self.lines.append(f"{variable.name} = {value}")
        self.variables.append(variable)
        return variable

    def do(self, line: str) -> None:
        self.lines.append(line)


def elementwise(writer: Writer) -> None:
    if v := writer.pick(dtype=None):
        expression = writer.choose("{}.relu()", "{}.sigmoid()", "-{}", "{} + 1.5", "{} * 0.5", "{}.sin()")
        writer.define(expression.format(v.name), v.shape, v.dtype)


def binary(writer: Writer) -> None:
    if (a := writer.pick(dtype=None)) and (b := writer.pick(a.shape, dtype=a.dtype)):
        expression = writer.choose("{} + {}", "{} * {}", "torch.maximum({}, {})", "torch.where({0} > 0, {0}, {1})")
        writer.define(expression.format(a.name, b.name), a.shape, a.dtype)


def broadcast(writer: Writer) -> None:
    if (a := writer.pick(TOKENS)) and (b := writer.pick(ROW, COLUMN)):
        writer.define(f"{a.name} + {b.name}.expand_as({a.name})", a.shape)


def matmul(writer: Writer) -> None:
    if v := writer.pick(TOKENS, ROW):
        expression = writer.choose(
            "F.linear({}, self.weight, self.bias)", "{} @ self.weight", "torch.mm({}, self.weight)"
        )
        writer.define(expression.format(v.name), v.shape)


def gram(writer: Writer) -> None:
    if (a := writer.pick(TRANSPOSED)) and (b := writer.pick(TOKENS)):
        writer.define(f"{b.name} @ ({a.name} @ {b.name})", TOKENS)


def reduction(writer: Writer) -> None:
    if v := writer.pick(TOKENS, dtype=None):
        expression, shape = writer.draw(
            st.sampled_from(
                [
                    ("{}.sum(0, keepdim=True)", ROW),
                    ("{}.mean(-1, keepdim=True)", COLUMN),
                    ("{}.amax(0, keepdim=True)", ROW),
                    ("{}.cumsum(0)", TOKENS),
                    ("{}.softmax(0)", TOKENS),
                    ("{}.softmax(-1)", TOKENS),
                    ("{0} - {0}.mean(0)", TOKENS),
                    ("F.layer_norm({0}, {0}.shape[-1:])", TOKENS),
                ]
            )
        )
        writer.define(expression.format(v.name), shape, v.dtype)


def view(writer: Writer) -> None:
    if v := writer.pick(dtype=None):
        n = f"{v.name}.shape[0]"
        expressions: dict[tuple[int | str, ...], list[tuple[str, tuple[int | str, ...]]]] = {
            TOKENS: [
                ("{}.t()", TRANSPOSED),
                (f"{{}}.reshape({n}, 2, {HIDDEN // 2})", HEADS),
                ("{}[:, 2:6]", HALF),
                ("{}.chunk(2, dim=-1)[1]", HALF),
                ("{}[-1:]", ROW),
                ("{}[:, :1]", COLUMN),
                (f"{{}}.to({v.dtype})", TOKENS),
                ("{}.contiguous()", TOKENS),
                ("{}.view_as({})", TOKENS),
            ],
            HEADS: [("{}.flatten(1)", TOKENS), ("{}[:, 1]", HALF)],
            TRANSPOSED: [("{}.t()", TOKENS), ("{}.t().contiguous()", TOKENS)],
            HALF: [("torch.cat(({0}, {0}), dim=-1)", TOKENS), ("{}[:, 1:2]", COLUMN)],
            COLUMN: [(f"{{}}.expand(-1, {HIDDEN}).contiguous()", TOKENS)],
            ROW: [("{}.clone()", ROW)],
        }
        expression, shape = writer.draw(st.sampled_from(expressions[v.shape]))
        writer.define(expression.format(v.name, v.name), shape, v.dtype)


def in_place(writer: Writer) -> None:
    """On whatever the name stands for: an activation, a view, one of the caller's tensors."""
    if v := writer.pick(dtype=None):
        statement = writer.choose(
            "{}.add_(0.25)",
            "{}.mul_(0.5)",
            "{}.relu_()",
            "{}[:, 0] = 0.5",
            "{}[..., -1:].neg_()",
            "{} += 1.0",
        )
        writer.do(statement.format(v.name))


def copy_over(writer: Writer) -> None:
    if (a := writer.pick(dtype=None)) and (b := writer.pick(a.shape, dtype=None)):
        writer.do(f"{a.name}.copy_({b.name}.clone())")


def state(writer: Writer) -> None:
    if v := writer.pick(TOKENS):
        statement = writer.choose(
            "cache[ids] = {}",
            "cache.index_copy_(0, ids, {})",
            "cache[: {0}.shape[0]].copy_({0})",
            "cache.mul_(0.5)",
            "self.state.add_({}.detach().sum(0))",
            "self.calls.add_(1)",
        )
        writer.do(statement.format(v.name))


def read_state(writer: Writer) -> None:
    value = writer.choose("cache[ids]", "cache[: ids.shape[0]]", "cache.index_select(0, ids)")
    writer.define(value, TOKENS)


def read_small_state(writer: Writer) -> None:
    if v := writer.pick(TOKENS):
        writer.define(f"{v.name} * self.state + self.calls", TOKENS)


def split_op(writer: Writer) -> None:
    if (a := writer.pick(TOKENS)) and (b := writer.pick(TOKENS)):
        style = writer.choose("sdpa", "fresh", "into", "into new", "cached")
        if style == "sdpa":
            heads = f".view(-1, 2, {HIDDEN // 2}).transpose(0, 1).unsqueeze(0)"
            q, k = (writer.define(f"{v.name}.contiguous(){heads}", (1, 2, N, HIDDEN // 2)).name for v in (a, b))
            del writer.variables[-2:]
            causal = writer.choose("True", "False")
            output = f"F.scaled_dot_product_attention({q}, {k}, {k}, is_causal={causal})"
            writer.define(f"{output}.squeeze(0).transpose(0, 1).flatten(1)", TOKENS)
        elif style == "fresh":
            writer.define(f"torch.ops.prop.fresh({a.name}, {b.name})", TOKENS)
        elif style == "cached":
            writer.define(f"torch.ops.prop.cached({a.name}, cache, ids)", TOKENS)
        else:
            new = f"{a.name}.new_empty({a.name}.shape)" if style == "into new" else f"torch.empty_like({a.name})"
            out = writer.define(new, TOKENS)
            writer.do(f"torch.ops.prop.into({a.name}, {b.name}, {out.name})")


def autocast(writer: Writer) -> None:
    """A region with a split op in its middle, so that enter and exit are in danger of being cut apart."""
    if v := writer.pick(TOKENS):
        writer.do("with torch.autocast('cpu', dtype=torch.bfloat16):")
        a = f"a{len(writer.lines)}"
        writer.do(f"    {a} = F.linear({v.name}, self.weight)")
        writer.do(f"    {a} = torch.ops.prop.fresh({a}, {a})")
        writer.do(f"    {a} = F.linear({a}, self.weight)")
        writer.define(f"{a}.float()", TOKENS)


def convert(writer: Writer) -> None:
    if v := writer.pick(dtype=None):
        if v.dtype == torch.float64:
            writer.define(f"{v.name}.float()", v.shape)
        else:
            expression, dtype = writer.draw(
                st.sampled_from(
                    [
                        ("{}.double()", torch.float64),
                        ("{}.to(torch.bfloat16).float()", torch.float32),
                        ("({} > 0).float()", torch.float32),
                        ("{}.long().float()", torch.float32),
                    ]
                )
            )
            # Converting NaN, or what does not fit, is undefined in eager too.
            bounded = f"{v.name}.nan_to_num(0.0).clamp(-100, 100)" if "long" in expression else v.name
            writer.define(expression.format(bounded), v.shape, dtype)


def size_as_value(writer: Writer) -> None:
    if v := writer.pick(TOKENS):
        expression = writer.choose(
            "{0} / {0}.shape[0]",
            "{0} + torch.arange({0}.shape[0], device={0}.device)[:, None]",
            "{0} * torch.full((1,), float({0}.shape[0] + 1))",
            "{0} + torch.ones({0}.shape[0], 1)",
            "{0}[: ({0}.shape[0] + 1) // 2].sum() + {0}",
            "{0}.view({0}.numel()).view(-1, 8) if {0}.is_contiguous() else {0} + {0}.numel()",
        )
        writer.define(expression.format(v.name), TOKENS)


STATEMENTS = (
    elementwise,
    binary,
    broadcast,
    matmul,
    matmul,
    gram,
    reduction,
    view,
    view,
    in_place,
    in_place,
    copy_over,
    state,
    read_state,
    read_small_state,
    split_op,
    split_op,
    split_op,
    autocast,
    convert,
    size_as_value,
)


@dataclass(frozen=True)
class Example:
    source: str
    sizes: tuple[int, ...]
    """Token counts of the calls, in order."""
    y: str
    """How the second argument lies in memory: "own", "same" tensor as the first, or a "view" of it."""
    mark_dynamic: bool

    def __repr__(self) -> str:
        return f"sizes={self.sizes} y={self.y} mark_dynamic={self.mark_dynamic}\n{self.source}"


@st.composite
def examples(draw: Callable[..., Any]) -> Example:
    writer = Writer(draw)
    for statement in draw(st.lists(st.sampled_from(STATEMENTS), min_size=2, max_size=14)):
        statement(writer)
    outputs = [_output(writer) for _ in range(draw(st.integers(1, 4)))]
    structure = writer.choose("({},)", "{{'first': ({},), 'rest': [x, ids]}}", "[{}, ({},)]")
    listed = ", ".join(outputs)
    writer.do(f"return {structure.format(listed, listed)}")
    body = "\n".join(f"    {line}" for line in writer.lines)
    sizes = draw(st.lists(st.sampled_from([5, 3, 1, 2, 8, 4, 1]), min_size=1, max_size=4))
    return Example(
        f"def forward(self, x, y, cache, ids):\n{body}\n",
        tuple(sizes),
        writer.choose("own", "own", "own", "same", "view"),
        draw(st.booleans()),
    )


def _output(writer: Writer) -> str:
    variable = writer.pick(dtype=None)
    assert variable is not None  # the arguments are always there
    form = writer.choose("{}", "{}", "{}", "{}[:, :1]", "{}.view_as({})", "cache", "{}.shape[0] * 2", "{}[-1]")
    return form.format(variable.name, variable.name)


_compiled_sources = 0


class ExampleModule(nn.Module):
    """The example as a module, with a weight, and with two buffers that it may write."""

    def __init__(self, source: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN, generator=generator) * HIDDEN**-0.5, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(HIDDEN, generator=generator), requires_grad=False)
        self.register_buffer("state", torch.randn(HIDDEN, generator=generator))
        self.register_buffer("calls", torch.zeros(()))
        self._forward = _function(source)

    def forward(self, *arguments: Tensor) -> Any:
        return self._forward(self, *arguments)


class StageModule(ExampleModule):
    """The same as a pipeline stage: the first two arguments are its proxies."""

    def forward(self, hidden_states: Tensor, residual: Tensor, cache: Tensor, ids: Tensor) -> Any:
        return self._forward(self, hidden_states, residual, cache, ids)


def _function(source: str) -> Callable[..., Any]:
    """A function with a code object of its own, whose lines tracebacks can show."""
    global _compiled_sources
    _compiled_sources += 1
    filename = f"<example {_compiled_sources}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"torch": torch, "F": F}
    exec(compile(source, filename, "exec"), namespace)
    return namespace["forward"]


def make_arguments(example: Example, tokens: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    y = {
        "own": lambda: torch.randn(tokens, HIDDEN, generator=generator),
        "same": lambda: x,
        "view": lambda: x[:],
    }
    cache = torch.randn(MAX_TOKENS, HIDDEN, generator=generator)
    ids = torch.randperm(MAX_TOKENS, generator=generator)[:tokens].clone()
    return [x, y[example.y](), cache, ids]


PLACES: Mapping[str, tuple[str | None, str | None]] = {
    "both landed": ("hidden_states", "residual"),
    "first landed": ("hidden_states", None),
    "second landed": (None, "residual"),
    "swapped": ("residual", "hidden_states"),
    "foreign": (None, None),
}
"""In whose landing memory the caller passes ``x`` and ``y``; None for memory of its own."""


def land(stage: ppb.Stage, arguments: list[Tensor], y: str, place: str) -> None:
    """Move ``x`` and ``y`` to where the place says, as far as the call fits; a ``y`` that lies in ``x`` goes along."""
    num_tokens = len(arguments[0])
    if num_tokens > stage.max_tokens:
        return
    views = stage.views(num_tokens)
    for index, name in enumerate(PLACES[place]):
        if name is not None and (index == 0 or y == "own"):
            arguments[index] = views[name].copy_(arguments[index])
    if y != "own":
        arguments[1] = arguments[0] if y == "same" else arguments[0][:]


def shared_memory(tensors: Sequence[Tensor], from_the_first: bool = False) -> list[tuple[int, int]]:
    """For each tensor the first of them with the same storage, and where in the storage it begins.

    With graphs a result that has its memory to itself may begin elsewhere in it than eager's, so there the beginning
    counts from the first tensor of the storage.
    """
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    firsts = [storages.index(own) for own in storages]
    begins = [tensor.storage_offset() for tensor in tensors]
    return [(first, own - begins[first] * from_the_first) for first, own in zip(firsts, begins, strict=True)]


def same_objects(values: Sequence[Any]) -> list[int]:
    return [next(i for i, other in enumerate(values) if other is value) for value in values]


def strides(tensor: Tensor) -> list[int]:
    """Those that lead anywhere: of a dimension of size 1, kernels and their fake twins may give different ones."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def check(
    example: Example,
    compiler: str,
    rtol: float,
    sizes: Sequence[int] | None = None,
    places: Sequence[str] = (),
    **options: Any,
) -> None:
    """Compare each call with eager.

    Args:
        sizes: token counts of the calls, if not those of the example.
        places: of the proxies in each call, as ``PLACES`` names them, where the options have a stage.
    """
    torch._dynamo.reset()
    ppb.reset()
    stage = options.get("stage")
    module_class = ExampleModule if stage is None else StageModule
    expected_module, module = module_class(example.source), module_class(example.source)
    kept: list[tuple[Tensor, Tensor]] = []
    """What the last call returned in memory of its own, and copies of it."""
    options = {"compiler": compiler, "split_ops": SPLIT_OPS, "graph_safe_ops": SPLIT_OPS[1:], **options}
    compiled = torch.compile(module, backend="pp_piecewise", options=options)
    for call, tokens in enumerate(example.sizes if sizes is None else sizes):
        expected_arguments = make_arguments(example, tokens, seed=call)
        arguments = make_arguments(example, tokens, seed=call)
        if stage is not None:
            land(stage, arguments, example.y, places[call])
        if example.mark_dynamic and tokens > 1:
            for argument in (arguments[0], arguments[1], arguments[3]):
                torch._dynamo.maybe_mark_dynamic(argument, 0)
        try:
            expected = expected_module(*expected_arguments)
        except RuntimeError:
            reject()  # eager itself refuses some writes of a view of the cache to the cache
        copied_before = ppb.stats().stage_input_copies
        got = compiled(*arguments)
        if stage is not None and places[call] == "both landed" and example.y == "own" and tokens <= stage.max_tokens:
            assert ppb.stats().stage_input_copies == copied_before, f"call {call} copied a proxy that had landed"
        expected_values, expected_structure = pytree.tree_flatten(expected)
        values, structure = pytree.tree_flatten(got)
        assert structure == expected_structure
        all_expected = [*expected_arguments, *expected_module.buffers(), *expected_values]
        everything = [*arguments, *module.buffers(), *values]
        for index, (value, want) in enumerate(zip(everything, all_expected, strict=True)):
            where = f"call {call} of {tokens} tokens, value {index}"
            assert type(value) is type(want), where
            if not isinstance(want, Tensor):
                assert value == want, where
                continue
            assert (value.shape, strides(value), value.dtype) == (want.shape, strides(want), want.dtype), where
            torch.testing.assert_close(
                value,
                want,
                rtol=rtol,
                atol=rtol,
                equal_nan=True,
                msg=lambda text, where=where: f"{where}: {text}",
            )
        tensors, expected_tensors = (
            [value for value in listed if isinstance(value, Tensor)] for listed in (everything, all_expected)
        )
        if options.get("static_outputs"):
            continue  # results lie in static memory, which the next call overwrites
        shared, wanted = (shared_memory(listed, "graphs" in options) for listed in (tensors, expected_tensors))
        assert shared == wanted, f"call {call}: shared memory"
        assert same_objects(tensors) == same_objects(expected_tensors), f"call {call}: same tensors"
        assert all(same_bits(result, copy) for result, copy in kept), f"call {call} overwrote an earlier result"
        lent = {tensor.untyped_storage().data_ptr() for tensor in (*arguments, *module.buffers())}
        results = [value for value in values if isinstance(value, Tensor)]
        kept = [(value, value.clone()) for value in results if value.untyped_storage().data_ptr() not in lent]
    programs = ppb.programs()
    assert all(isinstance(program, Program) for program in programs)
    # A miss would tell of a failed verification in a later call of the bucket only, and there may be none.
    dropped = [o.sentence for p in programs if p.graphs is not None for o in p.graphs.dropped.values()]
    assert not dropped, dropped
    calls = len(example.sizes if sizes is None else sizes)
    assert sum(program.stats.calls for program in programs) >= (calls if _has_a_graph(example) else 0)


def _has_a_graph(example: Example) -> bool:
    """Whether Dynamo must have found something to compile, and so a Program must have run."""
    return any(" = " in line or "_(" in line for line in example.source.splitlines())


GRAPHS = {"graphs": "emulate", "capture_sizes": "1,2,4,8", "max_tokens": 8, "verify_every": 1}
"""Every replay is compared, bit for bit, with its un-captured piece at the same bucket."""

token_count = st.sampled_from([7, 6, 5, 8, 3, 4, 2, 1, 9])
token_counts = st.lists(token_count, min_size=4, max_size=10)


def check_with_graphs(example: Example, sizes: Sequence[int]) -> int:
    """As ``check``, with emulated graphs; the number of padded replays comes back."""
    # A matrix product of more rows may add up in another order.
    check(example, "eager", rtol=1e-5, sizes=sizes, **GRAPHS)
    return int(ppb.stats().padded_tokens)


STAGE_GRAPHS = (
    {},
    {},
    {"verify_every": 0},
    {"static_outputs": True},
    {"mode": "full"},
    {"mode": "full", "static_outputs": True},
    {"mode": "full_and_piecewise", "full_max_tokens": 4},
)
"""What differs from ``GRAPHS`` where the module is a stage."""

stage_calls = st.lists(st.tuples(token_count, st.sampled_from(tuple(PLACES))), min_size=4, max_size=10)


def check_stage(example: Example, calls: Sequence[tuple[int, str]], more: Mapping[str, Any]) -> Snapshot:
    """As ``check_with_graphs``, for a stage whose proxies lie here and there; its counters come back."""
    proxies = {name: ppb.Proxy((HIDDEN,), torch.float32) for name in ("hidden_states", "residual")}
    max_tokens = GRAPHS["max_tokens"]
    options = {**GRAPHS, "stage": ppb.Stage(proxies, max_tokens, device="cpu"), **more}
    del options["max_tokens"]
    sizes, places = zip(*calls, strict=True)
    check(example, "eager", rtol=1e-5, sizes=sizes, places=places, **options)
    return ppb.stats()


SMALLEST_PADDED_SHARE = 0.15
"""Share of the examples in which padded calls must really have replayed, or the test says nothing about them."""

COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}


NIGHTLY_PARTS = 10
"""The nightly examples are drawn in as many tests, so that several processes can share them."""


def examples_per_run(default: int, slow: int, nightly: int) -> Any:
    """How many examples a test draws in each tier; the nightly ones are others every night."""

    def tier(max_examples: int, derandomize: bool, *marks: Any, part: str = "") -> Any:
        chosen = settings(max_examples=max_examples, derandomize=derandomize, **COMMON)
        return pytest.param(chosen, id=f"{max_examples}{part}", marks=marks)

    nightly_marks = (pytest.mark.nightly, pytest.mark.timeout(3600))
    return pytest.mark.parametrize(
        "draws",
        [
            tier(default, True),
            tier(slow, True, pytest.mark.slow, pytest.mark.timeout(900)),
            *(
                tier(nightly // NIGHTLY_PARTS, False, *nightly_marks, part=f"-part{part}")
                for part in range(NIGHTLY_PARTS)
            ),
        ],
    )


@examples_per_run(default=15, slow=60, nightly=2000)
def test_equal_to_eager(draws: settings) -> None:
    @draws
    @given(examples())
    def run(example: Example) -> None:
        note(repr(example))
        check(example, "eager", rtol=0.0)

    run()


@examples_per_run(default=4, slow=12, nightly=500)
def test_equal_to_eager_through_aot_autograd(draws: settings) -> None:
    @draws
    @given(examples())
    def run(example: Example) -> None:
        note(repr(example))
        check(example, "aot_eager", rtol=1e-5)

    run()


def test_a_replay_that_differs_in_the_last_call_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its results are put right, so only what the verification left behind tells."""
    replayed: list[EmulatedGraph] = []
    replay = EmulatedGraph._replay_part

    def wrong_but_for_the_first_time(graph: EmulatedGraph, part: int) -> None:
        replay(graph, part)
        if graph in replayed:
            graph.outputs[0][0] += 1
        replayed.append(graph)

    source = "def forward(self, x, y, cache, ids):\n    return torch.ops.prop.fresh(x @ self.weight, y) @ self.weight\n"
    example = Example(source, (), "own", mark_dynamic=True)
    check_with_graphs(example, [7, 6, 5])
    monkeypatch.setattr(EmulatedGraph, "_replay_part", wrong_but_for_the_first_time)
    with pytest.raises(AssertionError, match=r"replay in the bucket of 8 tokens differs .* row 0"):
        check_with_graphs(example, [7, 6, 5])
    assert "verify-failed" not in ppb.stats().miss_reasons


@examples_per_run(default=20, slow=150, nightly=2000)
def test_equal_to_eager_with_graphs(draws: settings) -> None:
    padded: list[int] = []

    @draws
    @given(examples(), token_counts)
    def run(example: Example, sizes: list[int]) -> None:
        note(f"sizes={sizes}\n{example!r}")
        padded.append(check_with_graphs(example, sizes))

    run()
    assert sum(count > 0 for count in padded) >= len(padded) * SMALLEST_PADDED_SHARE


@examples_per_run(default=15, slow=120, nightly=2000)
def test_stages_are_equal_to_eager_wherever_their_proxies_lie(draws: settings) -> None:
    padded: list[bool] = []
    landed: list[bool] = []

    @draws
    @given(examples(), stage_calls, st.sampled_from(STAGE_GRAPHS))
    def run(example: Example, calls: list[tuple[int, str]], more: Mapping[str, Any]) -> None:
        note(f"calls={calls} {more}\n{example!r}")
        stats = check_stage(example, calls, more)
        padded.append(stats.padded_tokens > 0)
        landed.append(stats.stage_inputs_in_place > 0)

    run()
    assert sum(padded) >= len(padded) * SMALLEST_PADDED_SHARE
    assert sum(landed) >= len(landed) * SMALLEST_PADDED_SHARE

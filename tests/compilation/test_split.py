"""What crosses the borders of pieces: results, views, tuples and numbers come out exactly as from eager."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from against_eager import aliasing, assert_same, check, steps, tokens
from tiers import slow_but

WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
SIZES = (5, 9, 1)


pytestmark = pytest.mark.usefixtures("no_gradients")


def attention(x: Tensor) -> Tensor:
    q = x.view(1, -1, 2, 4).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(-1, 8)


# ---------------------------------------------------------------------------------------------- results


class Pair(NamedTuple):
    first: Tensor
    second: Any


@dataclasses.dataclass
class Output:
    hidden: Tensor
    size: int
    nothing: None


torch.utils._pytree.register_dataclass(Output, serialized_type_name="test_split.Output")


def views_of_results(x: Tensor) -> tuple[Tensor, ...]:
    y = attention(x @ WEIGHT)
    z = y @ WEIGHT
    return z, z.t(), z[:1], y, y.view(-1), x, x[:, 2:], z.view(-1, 2, 4)


def inputs_only(x: Tensor) -> tuple[Tensor, ...]:
    return x, x.view(-1), x.t(), x[1:]


def nested(x: Tensor) -> dict[str, Any]:
    z = attention(x @ WEIGHT) @ WEIGHT
    return {"a": [z, (x.shape[0], 3.5, "text", None)], "b": Pair(z, {"x": x}), "c": Output(z * 2, x.shape[0], None)}


def same_twice(x: Tensor) -> tuple[Any, ...]:
    z = attention(x @ WEIGHT) @ WEIGHT
    return z, None, z, x, x


def attention_first_and_last(x: Tensor) -> Tensor:
    return attention(attention(x) @ WEIGHT)


def handed_on_unchanged(x: Tensor) -> tuple[Tensor, ...]:
    z = attention(x @ WEIGHT) @ WEIGHT
    return F.dropout(z, 0.5, False), z, z.contiguous(), z.to(z.dtype), z.clone(), x.contiguous(), x.clone()


def equal_values(x: Tensor) -> tuple[Tensor, Tensor]:
    y = attention(x @ WEIGHT)
    return y + 1, y + 1


def not_contiguous(x: Tensor) -> tuple[Tensor, ...]:
    y = (x @ WEIGHT).view(-1, 2, 4).transpose(0, 1)
    z = y * 2
    weights = attention(x)
    return z, z.contiguous(), (z @ WEIGHT[:4, :4]).transpose(0, 1), (x.t() + 1), weights


def unused_parts(x: Tensor) -> Tensor:
    y = attention(x)
    (y @ WEIGHT).sum()
    attention(y)
    return y


def tuples_across_borders(x: Tensor) -> tuple[Any, ...]:
    y = x @ WEIGHT
    values, indices = torch.topk(y, 3)
    a, b = y.chunk(2, -1)
    first = attention(x)
    c, d, e = torch.split(y, [2, 2, 4], -1)
    columns = torch.unbind(y, -1)
    second = attention(first)
    largest = torch.max(y, 0)
    return (
        values + 1, indices, first, a @ WEIGHT[:4], b, largest, columns[0] + c[:, 0], d, e, torch.topk(second, 2),
    )  # fmt: skip


RESULTS = [
    views_of_results, inputs_only, nested, same_twice, attention_first_and_last, handed_on_unchanged, equal_values,
    not_contiguous, unused_parts, tuples_across_borders,
]  # fmt: skip


@pytest.mark.compat
@pytest.mark.parametrize(
    ("function", "compiler"),
    slow_but(
        [*((function, "eager") for function in RESULTS), (views_of_results, "aot_eager"), (same_twice, "aot_eager")],
        [(function, compiler) for function in RESULTS for compiler in ("eager", "aot_eager")],
    ),
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_results(function: Any, compiler: str) -> None:
    check(function, *tokens(*SIZES), compiler=compiler, tolerance=0 if compiler == "eager" else 1e-6)


def test_where_there_is_nothing_to_compute_there_is_no_piece() -> None:
    program = check(inputs_only, *tokens(5))
    assert "c" not in steps(program)


def test_sizes_zero_and_one() -> None:
    program = check(attention_first_and_last, *tokens(5, 1, 0, 2))
    assert program.stats.calls >= 1


# --------------------------------------------------------------------------------- kinds of tensors and inputs


def transposed_and_expanded(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    y = attention(a @ WEIGHT)
    return a + b, y @ WEIGHT + c, a * 2, b, (a + 1).t(), torch.empty_like(a).fill_(1), torch.zeros_like(b)


def test_inputs_with_unusual_strides() -> None:
    calls = [(torch.randn(8, n).t(), torch.randn(1, 8).expand(n, 8), torch.randn(n, 1).expand(n, 8)) for n in (5, 9, 2)]
    check(transposed_and_expanded, *calls)


def test_inputs_that_start_amid_their_storage() -> None:
    def function(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        y = attention(a @ WEIGHT)
        b.add_(y)
        return y @ WEIGHT + b, a[1:]

    calls = [(torch.randn(8, n + 3)[:, 2 : n + 2].t(), torch.randn(3 * n, 8)[n : 2 * n]) for n in (5, 9, 2)]
    check(function, *calls, mark=False)
    check(function, *calls, mark=False, compiler="aot_eager", tolerance=1e-6)


def test_other_dtypes() -> None:
    def function(c: Tensor, i: Tensor, b: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        y = torch.view_as_real(c)
        w = attention(b @ WEIGHT.bfloat16())
        w = w.masked_fill(mask[:, None], 0)
        return y * 2, c.abs(), i + 1, w @ WEIGHT.bfloat16(), i.bool(), c.real, c.conj(), ~mask

    calls = [
        (
            torch.randn(n, 8, dtype=torch.complex64),
            torch.randint(0, 5, (n,), dtype=torch.int8),
            torch.randn(n, 8).bfloat16(),
            torch.randn(n) > 0,
        )
        for n in (5, 9, 2)
    ]
    check(function, *calls)


def test_constants_in_the_graph() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        constant = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
        other = torch.tensor(3)
        y = attention(x @ WEIGHT)
        constant.add_(1)
        return y @ WEIGHT * constant, constant, y * other

    program = check(function, *tokens(5, 9, 5))
    assert program.stats.calls == 3


class WithBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("scale", torch.randn(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=True)
        self.plain = torch.randn(8)

    def forward(self, x: Tensor) -> Tensor:
        x = attention(self.linear(x) * self.scale + self.plain)
        self.calls += 1
        self.scale.mul_(0.5)
        return attention(self.linear(x) * self.scale) @ self.linear.weight


def test_module_buffers() -> None:
    check(WithBuffers(), *tokens(5, 9, 1, 5))


# ------------------------------------------------------------------------------------------------ numbers

NUMBERS: dict[str, Callable[[int], Any]] = {
    "times": lambda n: n * 4,
    "plus": lambda n: n + 3,
    "minus": lambda n: 7 - n,
    "negative": lambda n: -n,
    "squared": lambda n: n**2,
    "floor division": lambda n: n // 2,
    "ceiling division": lambda n: (n + 3) // 4 * 4,
    "modulo": lambda n: n % 3,
    "shift": lambda n: n << 1,
    "min": lambda n: min(n, 7),
    "max": lambda n: max(n, 3),
    "comparison": lambda n: n * 2 > 6,
    "true division": lambda n: n / 7,
    "inverse": lambda n: 1 / n,
    "root": lambda n: n**0.5,
    "integer of a root": lambda n: int(n**0.5),
    "math.sqrt": math.sqrt,
    "math.floor": lambda n: math.floor(n / 3),
    "math.ceil": lambda n: math.ceil(n / 2),
    "round": lambda n: round(n / 3),
    "truncation": lambda n: int(n / 3),
    "float": lambda n: float(n) * 1.5,
}


@torch.library.custom_op("test_split::scale", mutates_args=())
def scale(q: Tensor, n: int, factor: float, sizes: list[int]) -> Tensor:
    return q * n + factor + sum(sizes)


@scale.register_fake
def _(q: Tensor, n: int, factor: float, sizes: list[int]) -> Tensor:
    return torch.empty_like(q)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_made_from_the_token_count(name: str) -> None:
    """It is used in a compute piece, returned, and used in an eager step."""
    number = NUMBERS[name]

    def function(x: Tensor) -> tuple[Any, ...]:
        value = number(x.shape[0])
        return (attention(x @ WEIGHT) @ WEIGHT) * value, value

    check(function, *tokens(5, 9, 8))


def test_numbers_as_arguments_of_an_eager_step() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        n = x.shape[0]
        y = scale(x @ WEIGHT, n * 4, 1.5, [n // 2, n % 3, 7, n + 1]) @ WEIGHT
        y = scale(y, x.numel(), 2.5, list(y.shape))
        y = y.new_zeros(y.shape) + y.view(torch.Size([n, 8]))
        return y[: n - 1] @ WEIGHT, y[n // 2 :].expand(2, -1, -1)

    program = check(function, *tokens(5, 9, 2), split_ops="test_split::scale")
    assert steps(program)[:4] == "cece"


def test_true_division_as_an_argument_of_attention() -> None:
    def function(x: Tensor) -> Tensor:
        q = (x @ WEIGHT).view(1, -1, 2, 4).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, scale=1 / x.shape[0]).transpose(1, 2).reshape(-1, 8) @ WEIGHT

    check(function, *tokens(5, 9, 2))


def test_two_symbols() -> None:
    def function(a: Tensor, b: Tensor) -> tuple[Any, ...]:
        n, m = a.shape[0], b.shape[0]
        y = scale(a @ WEIGHT, min(n, m), 1.5, [n - m, max(n, m)])
        z = torch.cat([y, b]) @ WEIGHT
        return z, n + m, min(n, m), max(n, 2 * m), n * m, z[: min(n, m)]

    calls = [(torch.randn(n, 8), torch.randn(m, 8)) for n, m in ((5, 3), (9, 4), (2, 11), (7, 7), (1, 3), (0, 3))]
    check(function, *calls, split_ops="test_split::scale", mark=False)


def test_batch_and_sequence() -> None:
    def function(x: Tensor) -> Tensor:
        q = (x @ WEIGHT).view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(x.shape) @ WEIGHT

    program = check(function, *[(torch.randn(b, t, 8),) for b, t in ((2, 5), (3, 7), (4, 2), (1, 6))], mark=False)
    assert steps(program) == "cec"


def test_scalar_arguments_that_vary() -> None:
    def function(x: Tensor, factor: float, count: int) -> tuple[Any, ...]:
        y = attention(x @ WEIGHT * factor)
        return y @ WEIGHT * count + factor, factor * 2, count * 2

    calls = [(torch.randn(n, 8), factor, count) for n, factor, count in ((5, 1.5, 3), (9, 2.5, 4), (2, 0.0, 0))]
    check(function, *calls, mark=False)
    check(function, *calls, mark=False, dynamic=True)


def test_a_varying_float_as_an_argument_of_an_eager_step() -> None:
    def function(x: Tensor, factor: float) -> Tensor:
        return scale(x @ WEIGHT, 1, factor, []) @ WEIGHT

    program = check(
        function, *[(torch.randn(5, 8), f) for f in (1.5, 2.5, 3.5)], mark=False, split_ops="test_split::scale"
    )
    assert steps(program) == "cec"


def test_numbers_read_from_a_tensor() -> None:
    def function(x: Tensor, count: Tensor) -> tuple[Any, ...]:
        k = count.item()
        y = scale(x @ WEIGHT, k, 1.5, [k * 2])
        torch._check(k >= 0)
        torch._check(k <= 64)
        return y @ WEIGHT + k, torch.zeros(k, 8) + 1, k

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        calls = [(torch.randn(n, 8), torch.tensor(k)) for n, k in ((5, 3), (9, 4), (2, 2))]
        check(function, *calls, split_ops="test_split::scale")


def test_sizes_born_in_the_graph() -> None:
    def function(x: Tensor) -> tuple[Any, ...]:
        y = x @ WEIGHT
        rows = (y.sum(-1) > 0).nonzero()[:, 0]
        z = scale(y[rows], rows.shape[0], 1.5, [rows.numel() * 2])
        return z @ WEIGHT, rows.shape[0]

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        check(function, *tokens(5, 9, 2), split_ops="test_split::scale")


def test_sizes_born_in_an_element_of_a_tuple() -> None:
    def function(x: Tensor, ids: Tensor) -> tuple[Any, ...]:
        y = x @ WEIGHT
        values, counts = torch.unique(ids, return_counts=True)
        z = scale(y, counts.shape[0], 1.5, [counts.numel() * 2])
        return z @ WEIGHT + values.shape[0], counts.shape[0]

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        check(function, *((x, torch.arange(len(x)) // 2) for (x,) in tokens(5, 9, 2)), split_ops="test_split::scale")


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_an_unbacked_token_count_serves_every_size(compiler: str) -> None:
    def function(x: Tensor) -> tuple[Any, ...]:
        y = x @ WEIGHT
        return y.softmax(-1) @ WEIGHT, y.t().contiguous(), y, x.shape[0] * 2

    options = {"compiler": compiler, "split_ops": "softmax"}
    compiled = torch.compile(function, backend="pp_piecewise", options=options, fullgraph=True)
    for index, (x,) in enumerate(tokens(5, 1, 0, 9)):
        expected = function(x)
        if index == 0:
            torch._dynamo.decorators.mark_unbacked(x, 0)
        got = compiled(x)
        assert_same(got, expected, 1e-6)
        assert aliasing(x, got) == aliasing(x, expected)

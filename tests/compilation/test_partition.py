"""Where graphs are cut, and that in-place effects are those of eager (rules M1 to M4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pp_piecewise_backend as ppb
from against_eager import check, compute_ops, eager_ops, steps, tokens
from tiers import slow_but

WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
SIZES = (5, 9, 1)


pytestmark = pytest.mark.usefixtures("no_gradients")


def attention(x: Tensor, cache: Tensor | None = None) -> Tensor:
    q = x.view(1, -1, 2, 4).transpose(1, 2)
    k = q if cache is None else cache.view(1, -1, 2, 4).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, k).transpose(1, 2).reshape(-1, 8)


@torch.library.custom_op("test_cuts::add_norm_", mutates_args=("x", "residual"))
def add_norm_(x: Tensor, residual: Tensor) -> None:
    residual.add_(x)
    x.copy_(F.layer_norm(residual, (8,)))


@add_norm_.register_fake
def _(x: Tensor, residual: Tensor) -> None:
    return None


# ------------------------------------------------------------------------------------------ caches and state


def by_index_copy(cache: Tensor, positions: Tensor, k: Tensor) -> Tensor:
    cache.index_copy_(0, positions, k)
    return cache


def by_setitem(cache: Tensor, positions: Tensor, k: Tensor) -> Tensor:
    cache[positions] = k
    return cache


def by_slice(cache: Tensor, positions: Tensor, k: Tensor) -> Tensor:
    cache[: k.shape[0]] = k
    return cache


def by_copy_into_a_view(cache: Tensor, positions: Tensor, k: Tensor) -> Tensor:
    cache.view(-1, 2, 4)[: k.shape[0]].copy_(k.view(-1, 2, 4))
    return cache


def by_index_put(cache: Tensor, positions: Tensor, k: Tensor) -> Tensor:
    return cache.index_put_((positions,), k)


def by_scatter(cache: Tensor, positions: Tensor, k: Tensor) -> Tensor:
    cache.scatter_(0, positions[:, None].expand(-1, 8), k)
    return cache


def by_narrow_through_transpose(cache: Tensor, positions: Tensor, k: Tensor) -> Tensor:
    cache.t()[:, : k.shape[0]] = k.t()
    return cache


CACHE_WRITES = [
    by_index_copy, by_setitem, by_slice, by_copy_into_a_view, by_index_put, by_scatter, by_narrow_through_transpose,
]  # fmt: skip


def cache_calls() -> list[tuple[Tensor, ...]]:
    return [(torch.randn(n, 8), torch.randn(16, 8), torch.arange(n)) for n in SIZES]


@pytest.mark.compat
@pytest.mark.parametrize("write", CACHE_WRITES, ids=lambda f: f.__name__)
def test_a_cache_is_written_in_the_step_of_its_attention(write: Callable[..., Tensor]) -> None:
    def layer(x: Tensor, cache: Tensor, positions: Tensor) -> Tensor:
        k = x @ WEIGHT
        return attention(k, write(cache, positions, k)) @ WEIGHT

    program = check(layer, *cache_calls())
    assert steps(program) == "cec"
    assert "writes graph input cache" in program.pieces[1].reason
    assert "split op scaled_dot_product_attention" in program.pieces[1].reason
    kinds = {graph_input.label: graph_input.kind for graph_input in program.inputs}
    assert kinds["cache"] == "state"


def test_one_cache_for_all_layers() -> None:
    def layers(x: Tensor, cache: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        for layer in range(2):
            k = x @ WEIGHT
            cache[layer, positions] = k
            x = attention(k, cache[layer]) @ WEIGHT
        cache[1, : x.shape[0]] = x
        return x, cache[1]

    calls = [(torch.randn(n, 8), torch.randn(2, 16, 8), torch.arange(n)) for n in SIZES]
    assert steps(check(layers, *calls)).startswith("cecec")


def test_a_length_counter() -> None:
    def layer(x: Tensor, cache: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        k = x @ WEIGHT
        cache[: x.shape[0]].copy_(k)
        length += x.shape[0]
        y = attention(k, cache) @ WEIGHT + length
        length.add_(1)
        return y, length * 2

    check(layer, *[(torch.randn(n, 8), torch.randn(16, 8), torch.zeros((), dtype=torch.long)) for n in SIZES])


@pytest.mark.parametrize("compiler", slow_but(["eager"], ["eager", "aot_eager"]))
def test_caches_made_in_the_graph(compiler: str) -> None:
    def layers(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        caches = [torch.zeros(16, 8) for _ in range(3)]
        for cache in caches:
            k = x @ WEIGHT
            cache[: x.shape[0]] = k
            x = attention(k, cache) @ WEIGHT
        return x, caches

    check(layers, *tokens(*SIZES), compiler=compiler, tolerance=0 if compiler == "eager" else 1e-6)


def test_a_cache_made_in_the_graph_and_written_through_a_view() -> None:
    def layers(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cache, other = torch.zeros(16, 8), torch.zeros(16, 8)
        x = (x @ WEIGHT).softmax(-1)
        cache[: x.shape[0]] = x
        other[: x.shape[0]] = x * 2
        x = (x @ WEIGHT).softmax(-1)
        cache.view(-1, 4).add_(1)
        return cache, other, x @ WEIGHT

    program = check(layers, *tokens(*SIZES), split_ops="softmax", compiler="aot_eager", tolerance=1e-6)
    assert "add_" in eager_ops(program)


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.dropout = nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = attention(self.linear(x))
        x = torch.cat([x, x + 1])
        return self.dropout(self.linear(self.norm(self.linear(self.dropout(x)))))


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics(training: bool) -> None:
    program = check(Normalised().train(training), *tokens(*SIZES))
    assert ("batch_norm" in eager_ops(program)) == training
    assert steps(program) == ("cecec" if training else "cec")


# ------------------------------------------------------------------------------- activations changed in place


def test_fused_add_and_norm_through_many_layers_stays_compiled() -> None:
    def layers(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        x, residual = x @ WEIGHT, residual @ WEIGHT
        for _ in range(4):
            add_norm_(x, residual)
            x = attention(x @ WEIGHT) @ WEIGHT
        return x, residual

    program = check(layers, *[(torch.randn(n, 8), torch.randn(n, 8)) for n in SIZES], graph_safe_ops="test_cuts::*")
    assert steps(program) == "cecececec"
    assert "test_cuts::add_norm_" not in eager_ops(program)


def test_plain_in_place_adds_through_many_layers_stay_compiled() -> None:
    def layers(x: Tensor) -> Tensor:
        residual = x @ WEIGHT
        for _ in range(4):
            y = attention(F.layer_norm(residual, (8,)) @ WEIGHT)
            residual.add_(y @ WEIGHT)
        return residual

    program = check(layers, *tokens(*SIZES))
    assert steps(program) == "cecececec"
    assert "add_" not in eager_ops(program)
    assert {graph_input.kind for graph_input in program.inputs} <= {"per-token", "other-tensor", "token-count"}


def test_stage_inputs_may_be_written_in_pieces() -> None:
    def layers(hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden_states
        for _ in range(2):
            add_norm_(x, residual)
            x = attention(x @ WEIGHT) @ WEIGHT
        return x, residual

    program = check(layers, *[(torch.randn(n, 8), torch.randn(n, 8)) for n in SIZES], graph_safe_ops="test_cuts::*")
    assert steps(program) == "cecec"
    assert "test_cuts::add_norm_" in compute_ops(program)


def alias_is_read(x: Tensor) -> tuple[Tensor, ...]:
    y = x @ WEIGHT
    tail, turned = y[1:], y.t()
    first = attention(y)
    y.add_(1)
    return tail + 1, turned.sum(), first, attention(y @ WEIGHT), y


def view_is_read(x: Tensor) -> Tensor:
    y = x @ WEIGHT
    view = y.view(-1, 2, 4)
    attention(y).sum()
    first = attention(y)
    y.mul_(2)
    return attention(view.reshape(-1, 8) @ WEIGHT) + first


def view_is_written(x: Tensor) -> Tensor:
    y = x @ WEIGHT
    first = attention(y)
    y[:, :4].mul_(2)
    y.view(-1)[0] = 7
    return attention(y @ WEIGHT) + first


def detached_is_read(x: Tensor) -> Tensor:
    y = x @ WEIGHT
    detached, data = y.detach(), y.data
    first = attention(y)
    y.add_(1)
    return detached + data + first


def data_is_written(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x @ WEIGHT
    data = y.data
    first = attention(y)
    data.add_(1)
    return first + 1, y


def chunk_is_written(x: Tensor) -> tuple[Tensor, ...]:
    y = x @ WEIGHT
    a, b = y.chunk(2, -1)
    first = attention(y)
    a.add_(1)
    return b, attention(y @ WEIGHT), first


def whole_is_written_after_split(x: Tensor) -> tuple[Tensor, ...]:
    y = x @ WEIGHT
    a, b = y.split(4, -1)
    first = attention(y)
    y.add_(1)
    return a, attention(y @ WEIGHT) + b.sum(), first


ALIASED = [
    alias_is_read, view_is_read, view_is_written, detached_is_read, data_is_written, chunk_is_written,
    whole_is_written_after_split,
]  # fmt: skip


@pytest.mark.parametrize("compiler", slow_but(["eager"], ["eager", "aot_eager"]))
@pytest.mark.parametrize("function", ALIASED, ids=lambda f: f.__name__)
def test_no_renaming_while_another_alias_lives(function: Any, compiler: str) -> None:
    program = check(function, *tokens(*SIZES), compiler=compiler, tolerance=0 if compiler == "eager" else 1e-5)
    assert any(name.rstrip("_") in ("add", "mul", "setitem") for name in eager_ops(program))


def after_a_crossing(x: Tensor) -> Tensor:
    y = x @ WEIGHT
    first = attention(y)
    y.relu_()
    second = attention(y @ WEIGHT)
    y.sigmoid_()
    return first + second + y


def returned_by_the_op(x: Tensor) -> tuple[Tensor, ...]:
    y = x @ WEIGHT
    first = attention(y)
    return first, y, y.relu_()


def by_an_operator(x: Tensor) -> tuple[Tensor, ...]:
    y = x @ WEIGHT
    first = attention(y)
    y += first @ WEIGHT
    tail = y[1:]
    second = attention(y @ WEIGHT)
    y += 1
    return tail, second


def clone_written(x: Tensor) -> tuple[Tensor, ...]:
    y = x @ WEIGHT
    z = y.clone()
    first = attention(y)
    z.add_(1)
    return y + attention(z @ WEIGHT), z, first


def out_argument(x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x)
    torch.mm(x, WEIGHT, out=y)
    first = attention(y)
    torch.add(first, 1, out=y)
    return y, first


def masked(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x @ WEIGHT
    first = attention(y)
    y[y > 0] = 0
    x[x < 0] = 1
    return y @ WEIGHT + first, x


def results_share_a_renamed_tensor(x: Tensor) -> tuple[Tensor, ...]:
    y = x @ WEIGHT
    first = attention(y)
    y.add_(1)
    second = attention(y @ WEIGHT)
    return y, first, second, y.t(), y[1:]


def equal_values_of_which_one_is_written(x: Tensor) -> tuple[Tensor, ...]:
    y = attention(x @ WEIGHT) @ WEIGHT
    a, b = y + 1, y + 1
    second = attention(a)
    a.mul_(2)
    return a, b, second, a.t()


IN_PLACE = [
    after_a_crossing, returned_by_the_op, by_an_operator, clone_written, out_argument, masked,
    results_share_a_renamed_tensor, equal_values_of_which_one_is_written,
]  # fmt: skip


@pytest.mark.parametrize("compiler", slow_but(["eager"], ["eager", "aot_eager"]))
@pytest.mark.parametrize("function", IN_PLACE, ids=lambda f: f.__name__)
def test_in_place_after_a_cut(function: Any, compiler: str) -> None:
    check(function, *tokens(*SIZES), compiler=compiler, tolerance=0 if compiler == "eager" else 1e-5)


# -------------------------------------------------------------------------------------- inputs that overlap


def overlapping(n: int) -> tuple[Tensor, Tensor]:
    base = torch.randn(n + 1, 8)
    return base[:n], base[1:]


def apart(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 8), torch.randn(n, 8)


def written_first(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    y = attention(a @ WEIGHT)
    a.add_(y)
    return b * 2, attention(b @ WEIGHT)


def written_between(a: Tensor, b: Tensor) -> Tensor:
    y = b @ WEIGHT
    a.add_(1)
    return y + attention(b @ WEIGHT)


def independent_of_the_write(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    first, product = attention(b @ WEIGHT), b @ WEIGHT
    a.add_(1)
    return first, product, b * 2


def stage_input_written(hidden_states: Tensor, other: Tensor) -> tuple[Tensor, ...]:
    y = attention(other @ WEIGHT) @ WEIGHT
    hidden_states.mul_(2)
    z = other + y
    return attention(z @ WEIGHT), z


def both_stage_inputs(hidden_states: Tensor, residual: Tensor) -> Tensor:
    hidden_states.add_(1)
    return attention(residual @ WEIGHT)


OVERLAPPING = [written_first, written_between, independent_of_the_write, stage_input_written, both_stage_inputs]


@pytest.mark.parametrize("compiler", slow_but(["eager"], ["eager", "aot_eager"]))
@pytest.mark.parametrize("function", OVERLAPPING, ids=lambda f: f.__name__)
def test_two_inputs_over_one_storage(function: Any, compiler: str) -> None:
    check(function, *[overlapping(n) for n in SIZES], compiler=compiler, tolerance=0 if compiler == "eager" else 1e-5)


@pytest.mark.parametrize("compiler", slow_but(["eager"], ["eager", "aot_eager"]))
@pytest.mark.parametrize("function", OVERLAPPING, ids=lambda f: f.__name__)
def test_inputs_that_overlap_in_a_later_call_only(function: Any, compiler: str) -> None:
    """Dynamo does not guard on it."""
    calls = [apart(5), apart(7), overlapping(9), apart(6)]
    check(function, *calls, compiler=compiler, tolerance=0 if compiler == "eager" else 1e-5)


# ------------------------------------------------------------------------------------ fragments (M3 and M4)


def test_position_arithmetic_between_steps_makes_no_piece() -> None:
    def layer(x: Tensor, cache: Tensor, positions: Tensor) -> Tensor:
        k = x @ WEIGHT
        cache[positions] = k
        shifted = (positions * 2 + 1).clamp(max=15)
        y = attention(k, cache.expand(1, -1, -1)[0])
        cache[shifted] = k
        return attention(y, cache) @ WEIGHT

    program = check(layer, *cache_calls())
    assert steps(program) == "cec"


def test_writes_that_need_no_product_come_first() -> None:
    def layers(x: Tensor, cache: Tensor, positions: Tensor) -> Tensor:
        for _ in range(3):
            y = x @ WEIGHT
            cache[(positions * 2).clamp(max=15)] += 1
            x = attention(y @ WEIGHT) @ WEIGHT
        return x + cache.sum()

    program = check(layers, *cache_calls())
    assert steps(program) == "ecececec"
    assert program.pieces[0].ops.count("setitem") == 3


def test_nothing_to_split_is_one_piece() -> None:
    assert steps(check(lambda x: (x @ WEIGHT).relu(), *tokens(*SIZES))) == "c"


@pytest.mark.parametrize("layers", [1, 3])
def test_one_piece_more_than_attention(layers: int) -> None:
    def function(x: Tensor) -> Tensor:
        for _ in range(layers):
            x = attention(x @ WEIGHT) @ WEIGHT + x
        return x

    program = check(function, *tokens(*SIZES, 0))
    assert steps(program) == "ce" * layers + "c"
    assert ppb.stats().eager_steps == 4 * layers


def test_checks_of_sizes_cut_nothing() -> None:
    """With sizes that Dynamo knows nothing of, it writes each check into the graph, also after the first ops."""

    def function(x: Tensor, residual: Tensor, positions: Tensor) -> Tensor:
        x, residual = x.clone(), residual.clone()
        torch._check(x.shape[0] == residual.shape[0])
        x = x + residual
        torch._check(x.shape[0] == positions.shape[0])
        x = ((x + positions[:, None]) @ WEIGHT)[None]
        return F.scaled_dot_product_attention(x, x, x)[0] @ WEIGHT

    given = (torch.randn(5, 8), torch.randn(5, 8), torch.arange(5))
    for tensor in given:
        torch._dynamo.decorators.mark_unbacked(tensor, 0)
    options = {"compiler": "eager"}
    run = torch.compile(function, backend="pp_piecewise", options=options, fullgraph=True)
    assert torch.equal(run(*given), function(*given))
    (program,) = ppb.programs()
    first, second, *_ = program.pieces
    assert first.kind == "eager" and set(first.ops) == {"aten::_assert_scalar"}
    assert second.kind == "compute" and second.ops.count("clone") == 2

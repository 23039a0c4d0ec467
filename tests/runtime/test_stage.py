"""Memory that stays where it is: proxies, landing memory, blocks, and the rows of static tensors."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from pp_piecewise_backend import Proxy, Stage
from pp_piecewise_backend.compilation.specs import TensorSpec
from pp_piecewise_backend.errors import ConfigError
from pp_piecewise_backend.runtime.cudagraphs.memory import (
    ALIGNMENT_BYTES,
    StaticMemory,
    StaticTensor,
    allocate,
    extent_bytes,
    geometry,
    tensor_in,
)
from pp_piecewise_backend.runtime.stage import StageMemory
from pp_piecewise_backend.utils.counters import Stats

CPU = torch.device("cpu")
TOKENS = sympy.Symbol("s0", integer=True, positive=True)


def stage(max_tokens: int = 8, **inputs: Proxy) -> Stage:
    inputs = inputs or {"hidden_states": Proxy((4,), torch.float32), "residual": Proxy((2, 3), torch.bfloat16)}
    return Stage(inputs, max_tokens, "cpu")


# --------------------------------------------------------------------------------- proxies


def test_a_proxy() -> None:
    proxy = Proxy((4, 2), torch.bfloat16)
    assert (proxy.shape, proxy.dtype, proxy.layout, proxy.bytes_per_token) == ((4, 2), torch.bfloat16, "replicated", 16)
    assert Proxy(4, torch.float32) == Proxy([4], torch.float32) == Proxy(torch.Size([4]), torch.float32)  # type: ignore[arg-type]
    assert Proxy((), torch.int64).bytes_per_token == 8
    assert Proxy((4,), torch.float32) != Proxy((4,), torch.float32, "scattered")
    assert len({Proxy((4,), torch.float32), Proxy((4,), torch.float32)}) == 1


@pytest.mark.parametrize("shape", [(0,), (4, -1), 0, (4.0,), (True,), True, "ab", ("tokens", 4), None, 4.0])
def test_shapes_that_no_proxy_has(shape: Any) -> None:
    with pytest.raises(ConfigError, match=r"Proxy got shape=.*: expected sizes of at least 1"):
        Proxy(shape, torch.float32)


@pytest.mark.parametrize("dtype", ["float32", float, None])
def test_dtypes_that_no_proxy_has(dtype: Any) -> None:
    with pytest.raises(ConfigError, match=r"Proxy got dtype=.*: expected a torch\.dtype"):
        Proxy((4,), dtype)


def test_layouts_that_no_proxy_has() -> None:
    with pytest.raises(ConfigError, match="Proxy got layout='split': expected 'replicated' or 'scattered'"):
        Proxy((4,), torch.float32, "split")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------- stages


@pytest.mark.parametrize(
    "inputs", [None, ["hidden_states"], {"a b": Proxy((4,), torch.float32)}, {"x": (4,)}, {3: Proxy((4,), torch.int8)}]
)
def test_inputs_that_no_stage_has(inputs: Any) -> None:
    with pytest.raises(ConfigError, match=r"Stage got inputs=.*: expected a mapping of argument names to Proxy"):
        Stage(inputs, 8, "cpu")


@pytest.mark.parametrize("max_tokens", [0, -1, 1.5, True, "8", None])
def test_max_tokens_that_no_stage_has(max_tokens: Any) -> None:
    with pytest.raises(ConfigError, match=r"Stage got max_tokens=.*at least 1"):
        Stage({}, max_tokens, "cpu")


@pytest.mark.parametrize("num_tokens", [0, -1, 9])
def test_views_that_a_stage_has_not(num_tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"views\({num_tokens}\) of a Stage with max_tokens=8: expected 1 to 8 rows"):
        stage().views(num_tokens)


def test_views_lie_at_one_address_each() -> None:
    landing = stage()
    addresses = {name: landing.landing(name).data_ptr() for name in landing.inputs}
    for num_tokens in (1, 5, 8):
        views = landing.views(num_tokens)
        assert list(views) == ["hidden_states", "residual"]
        assert views["hidden_states"].shape == (num_tokens, 4) and views["hidden_states"].dtype == torch.float32
        assert views["residual"].shape == (num_tokens, 2, 3) and views["residual"].dtype == torch.bfloat16
        for name, view in views.items():
            assert view.data_ptr() == addresses[name] and addresses[name] % ALIGNMENT_BYTES == 0
            assert view.storage_offset() == 0 and view.is_contiguous()
            assert view.untyped_storage().data_ptr() == addresses[name]
            assert not view.is_inference() and not view.requires_grad
    assert len(set(addresses.values())) == 2
    landing_bytes = sum(landing.landing(name).numel() for name in landing.inputs)
    assert landing_bytes == 512  # 8 rows of 16 and of 12 bytes, each aligned


def test_views_of_fewer_rows_see_the_same_contents() -> None:
    landing = stage()
    landing.views(8)["hidden_states"].copy_(torch.arange(32.0).view(8, 4))
    assert torch.equal(landing.views(3)["hidden_states"], torch.arange(12.0).view(3, 4))


def test_views_are_made_once() -> None:
    landing = stage()
    first, second = landing.views(3), landing.views(3)
    assert all(first[name] is second[name] for name in first)
    first.clear()  # the dictionary is the caller's
    assert set(landing.views(3)) == {"hidden_states", "residual"}


def test_views_are_not_kept_without_end() -> None:
    landing = Stage({"x": Proxy((), torch.int8)}, 5000, "cpu")
    for num_tokens in range(1, 5001):
        landing.views(num_tokens)
    assert len(landing._views) <= 4096
    assert landing.views(1)["x"].shape == (1,)


@pytest.mark.parametrize("made_inside", [False, True])
@pytest.mark.parametrize("views_inside", [False, True])
def test_views_are_written_in_and_outside_of_inference_mode(made_inside: bool, views_inside: bool) -> None:
    with torch.inference_mode(made_inside):
        landing = stage()
    with torch.inference_mode(views_inside):
        view = landing.views(2)["hidden_states"]
    assert not view.is_inference() and not landing.landing("hidden_states").is_inference()
    for inside in (True, False, True):
        with torch.inference_mode(inside):
            view.fill_(3.0)
            landing.landing("hidden_states").fill_(0)
    assert view.sum() == 0


def test_stages_are_compared_by_identity() -> None:
    one, other = stage(), stage()
    assert one != other and len({one, other}) == 2
    assert one.landing("residual").data_ptr() != other.landing("residual").data_ptr()


def test_a_stage_as_text() -> None:
    text = repr(Stage({"x": Proxy((4,), torch.float16)}, 8, "cpu"))
    assert text == (
        "Stage({'x': Proxy(shape=(4,), dtype=torch.float16, layout='replicated')}, max_tokens=8, device='cpu')"
    )


def spec(*shape: Any, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> TensorSpec:
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return TensorSpec(shape, stride, 0, dtype, device, 0)


@pytest.mark.parametrize(
    ("name", "given", "token_dim", "why"),
    [
        ("hidden_states", spec(TOKENS, 4), 0, None),
        ("hidden_states", spec(1, TOKENS, 4), 1, None),
        ("hidden_states", spec(7, 4), 0, None),  # a static graph
        ("other", spec(TOKENS, 4), 0, "no memory for stage input 'other'; it has 'hidden_states', 'residual'"),
        ("hidden_states", spec(4), None, "no dimension counts tokens"),
        ("hidden_states", spec(2, TOKENS, 4), 1, "the Stage has rows of shape"),
        ("hidden_states", spec(TOKENS, 5), 0, "the Stage has rows of shape (4,) and dtype torch.float32"),
        ("hidden_states", spec(TOKENS), 0, "the Stage has rows of shape"),
        ("hidden_states", spec(TOKENS, 4, dtype=torch.float16), 0, "float16[s0, 4] in the graph"),
        ("hidden_states", spec(TOKENS, 4, device=torch.device("meta")), 0, "is on meta, but the Stage's memory"),
    ],
)
def test_what_can_land(name: str, given: TensorSpec, token_dim: int | None, why: str | None) -> None:
    got = stage().check(name, given, token_dim)
    assert got is None if why is None else got is not None and why in got


# ---------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("num_bytes", [0, 1, 255, 256, 257, 100_000])
def test_blocks(num_bytes: int) -> None:
    block = allocate(num_bytes, CPU)
    assert block.dtype == torch.uint8 and block.dim() == 1 and num_bytes <= block.numel() < num_bytes + 257
    assert block.numel() % ALIGNMENT_BYTES == 0 and block.data_ptr() % ALIGNMENT_BYTES == 0
    assert block.storage_offset() == 0 and block.untyped_storage().data_ptr() == block.data_ptr()
    assert block.untyped_storage().nbytes() == block.numel() and not block.any()


def test_a_tensor_in_a_block() -> None:
    block = allocate(200, CPU)
    tensor = tensor_in(block, (3, 4), (1, 3), torch.float64)
    assert (tensor.shape, tensor.stride(), tensor.dtype) == ((3, 4), (1, 3), torch.float64)
    assert tensor.data_ptr() == block.data_ptr() and tensor.storage_offset() == 0
    tensor.fill_(1.5)
    assert block[:96].any() and not block[96:].any()
    reference = weakref.ref(block.untyped_storage())
    del block
    gc.collect()
    assert reference() is not None and tensor.sum() == 18.0  # the tensor keeps its memory


@pytest.mark.parametrize(
    "tensor",
    [torch.empty(3, 4), torch.empty(4, 3).t(), torch.empty(8)[::2], torch.empty(1).expand(5), torch.empty(0, 3)],
)
def test_extent(tensor: Tensor) -> None:
    expected = 0
    if tensor.numel():
        last = tensor[tuple(size - 1 for size in tensor.shape)]
        expected = last.data_ptr() - tensor.data_ptr() + 4
    assert extent_bytes(tensor.shape, tensor.stride(), torch.float32) == expected


def test_memory_serves_the_next_value_once_it_is_given_back() -> None:
    memory = StaticMemory()
    small, large = memory.take(100, CPU), memory.take(1000, CPU)
    assert memory.held_bytes == small.numel() + large.numel()
    memory.give_back(large)
    memory.give_back(small)
    assert memory.take(10, CPU) is small  # the smallest that fits
    assert memory.take(10, CPU) is large
    third = memory.take(10, CPU)
    assert third is not small and third is not large
    assert memory.held_bytes == small.numel() + large.numel() + third.numel()


def test_a_block_that_is_too_small_is_not_taken() -> None:
    memory = StaticMemory()
    small = memory.take(10, CPU)
    memory.give_back(small)
    assert memory.take(1000, CPU) is not small
    assert memory.take(10, CPU) is small


def test_giving_back_twice_or_what_is_not_ours_changes_nothing() -> None:
    memory = StaticMemory()
    block = memory.take(10, CPU)
    memory.give_back(block)
    memory.give_back(block)
    memory.give_back(allocate(10, CPU))
    assert memory.take(10, CPU) is block
    assert memory.take(10, CPU) is not block


def test_released_memory_is_freed_and_does_not_come_back() -> None:
    memory = StaticMemory()
    kept, block = memory.take(10, CPU), memory.take(10, CPU)
    reference = weakref.ref(block)
    memory.release()
    assert memory.held_bytes == 0
    del block
    gc.collect()
    assert reference() is None
    memory.give_back(kept)
    assert memory.take(10, CPU) is not kept


# ----------------------------------------------------------------------- memory of all programs


class Captured:
    """The captures of a program, all in one pool."""

    gives_way = False

    def __init__(self, memory: StageMemory, *bucket_tokens: int) -> None:
        self.buckets = list(bucket_tokens)
        self.dropped: list[int] = []
        memory.add_user(self)

    @property
    def largest_tokens(self) -> int:
        return max(self.buckets, default=0)

    def drop(self, tokens: int, held_bytes: int, limit_bytes: int) -> None:
        assert (held_bytes, limit_bytes) == (HELD_BYTES, 5)
        self.dropped.append(tokens)
        self.buckets.clear()


HELD_BYTES = 7


class Pool:
    held_bytes = HELD_BYTES


def test_the_last_program_to_go_releases_the_memory_of_its_stage() -> None:
    memory, stats = StageMemory(), Stats()
    memory.pools["graphs"] = Pool()
    memory.blocks.take(10, CPU)
    one, other = Captured(memory, 8), Captured(memory, 8)
    memory.update_gauges(stats)
    memory.update_gauges(stats)
    assert (stats.graph_bytes, stats.static_bytes) == (HELD_BYTES, memory.blocks.held_bytes) != (HELD_BYTES, 0)
    memory.remove_user(one)
    assert memory.pools and memory.blocks.held_bytes
    memory.remove_user(other)
    memory.update_gauges(stats)
    assert not memory.pools and (stats.graph_bytes, stats.static_bytes) == (0, 0)


def test_all_programs_drop_the_largest_bucket_of_any() -> None:
    memory = StageMemory()
    memory.pools["graphs"] = Pool()
    programs = Captured(memory, 1, 8), Captured(memory, 2, 16)
    memory.drop_largest(limit_bytes=5)
    assert [program.dropped for program in programs] == [[16], [16]] and not memory.pools


# -------------------------------------------------------------------------- static tensors


def static(
    shape: tuple[Any, ...],
    stride: tuple[Any, ...],
    dims: tuple[int, ...],
    bucket: int = 6,
    dtype: torch.dtype = torch.float32,
) -> StaticTensor:
    """A static tensor that holds 0, 1, 2, ... in the order of its memory."""
    geometry_of = TensorSpec(shape, stride, 0, dtype, CPU, 0)
    sizes, steps = geometry(geometry_of, {TOKENS: bucket})
    block = allocate(extent_bytes(sizes, steps, dtype), CPU)
    tensor_in(block, (block.numel() // 4,), (1,), dtype).copy_(torch.arange(block.numel() // 4))
    return StaticTensor(tensor_in(block, sizes, steps, dtype), geometry_of, dims, lambda n: {TOKENS: n}, block)


def test_rows_of_tokens_that_lie_outermost_are_exact() -> None:
    value = static((TOKENS, 3), (3, 1), (0,))
    exact = value.exact(4)
    assert exact is not None and exact.stride() == (3, 1) and exact.shape == (4, 3)
    assert exact.data_ptr() == value.tensor.data_ptr() and torch.equal(exact, value.tensor[:4])
    assert torch.equal(value.rows(4), value.tensor[:4])


def test_rows_of_a_transposed_layout_are_exact_where_tokens_lie_outermost_in_memory() -> None:
    value = static((3, TOKENS), (1, 3), (1,))  # [3, tokens], token by token in memory
    exact = value.exact(2)
    assert exact is not None and exact.shape == (3, 2) and exact.stride() == (1, 3)
    assert torch.equal(exact, value.tensor[:, :2])


def test_rows_of_tokens_that_lie_inside_are_a_view_but_not_exact() -> None:
    value = static((3, TOKENS), (TOKENS, 1), (1,))
    rows = value.rows(4)
    assert rows.shape == (3, 4) and rows.stride() == (6, 1) and rows.data_ptr() == value.tensor.data_ptr()
    assert value.exact(4) is None
    whole = value.exact(6)
    assert whole is not None and torch.equal(whole, value.tensor)


def test_strides_of_single_rows_do_not_matter() -> None:
    value = static((1, TOKENS, 2), (TOKENS * 2, 2, 1), (1,))  # [1, tokens, 2]: the outer stride varies, to no effect
    exact = value.exact(3)
    assert exact is not None and exact.shape == (1, 3, 2) and exact.stride() == (6, 2, 1)
    assert torch.equal(exact, value.tensor[:, :3])


def test_a_square_of_tokens() -> None:
    value = static((TOKENS, TOKENS), (TOKENS, 1), (0, 1), bucket=3)
    assert torch.equal(value.rows(2), torch.tensor([[0.0, 1.0], [3.0, 4.0]]))
    assert value.exact(2) is None


def test_tails_of_integers() -> None:
    value = static((TOKENS, 2), (2, 1), (0,), dtype=torch.int32)
    ((tail, first_row),) = value.tails(4)
    assert torch.equal(tail, value.tensor[4:]) and tail.data_ptr() == value.tensor[4:].data_ptr()
    assert torch.equal(first_row, torch.tensor([[0, 1], [0, 1]], dtype=torch.int32))
    assert value.tails(6) == []
    first, second = static((TOKENS, TOKENS), (TOKENS, 1), (0, 1), bucket=3, dtype=torch.int32).tails(2)
    assert first[0].shape == (1, 3) and second[0].shape == (3, 1)
    assert static((TOKENS, 2), (2, 1), (0,)).tails(4) == []  # a float indexes nothing


def test_filled_tails_of_a_square_hold_values_of_real_rows_only() -> None:
    value = static((TOKENS, TOKENS), (TOKENS, 1), (0, 1), bucket=4, dtype=torch.int32)
    real = set(value.rows(2).flatten().tolist())
    assert len(value.tails(2)) == 2
    for tail, first_row in value.tails(2):
        tail.copy_(first_row)
    assert set(value.tensor.flatten().tolist()) <= real


def test_rows_are_made_outside_of_inference_mode() -> None:
    value = static((TOKENS, 2), (2, 1), (0,), dtype=torch.int32)
    with torch.inference_mode():
        rows, exact, ((tail, _),) = value.rows(3), value.exact(3), value.tails(3)
    assert exact is not None
    for made in (rows, exact, tail):
        assert not made.is_inference()
        made.fill_(7)
    assert value.tensor.eq(7).all()


def test_geometry() -> None:
    shape, stride = geometry(TensorSpec((TOKENS, 2, 5), (1, TOKENS * 5, TOKENS), 0, torch.int8, CPU, 0), {TOKENS: 3})
    assert (shape, stride) == ((3, 2, 5), (1, 15, 3))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (2, 1, 4)])
def test_a_tensor_without_strides_is_contiguous(shape: tuple[int, ...]) -> None:
    assert tensor_in(allocate(256, CPU), shape, (), torch.float32).stride() == torch.empty(shape).stride()

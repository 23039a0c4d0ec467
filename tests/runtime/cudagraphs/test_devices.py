"""What a captured graph does and refuses, with one body for the emulated device and for CUDA."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pp_piecewise_backend.runtime.cudagraphs.device import CaptureError
from pp_piecewise_backend.runtime.cudagraphs.emulated import EmulatedDevice
from pp_piecewise_backend.runtime.cudagraphs.memory import same_bits
from pp_piecewise_backend.runtime.dispatch import make_device

PYTHON: dict[str, Any] = {"scale": 2.0, "calls": 0}
"""What the custom op below reads on the host."""


@torch.library.custom_op("capturetest::python", mutates_args=())
def python_op(x: Tensor, flag: Tensor) -> Tensor:
    PYTHON["calls"] += 1
    if PYTHON.get("reads"):
        return PYTHON["reads"](x, flag)
    return x.cos() * PYTHON["scale"] if PYTHON["scale"] > 1 else x.sin() * PYTHON["scale"]


@torch.library.custom_op("capturetest::writes", mutates_args=("out",))
def writes_op(x: Tensor, out: Tensor) -> None:
    out.copy_(x * 3)


@pytest.fixture(params=["emulate", pytest.param("cuda", marks=pytest.mark.cuda)])
def on(request: pytest.FixtureRequest) -> str:
    """The kind of device that the test captures on."""
    return request.param


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    PYTHON.clear()
    PYTHON.update(scale=2.0, calls=0)
    with torch.no_grad():
        yield


def where(on: str) -> torch.device:
    return torch.device("cuda" if on == "cuda" else "cpu")


def tensor(on: str, *shape: int, **options: Any) -> Tensor:
    return torch.randn(*shape, **options).to(where(on))


def captured(on: str, call: Callable[..., Sequence[Any]], *inputs: Any, pool: Any = None) -> Any:
    device = make_device(on, compiler_runs_ops=True)
    device.warm_up(lambda: call(*[v.clone() if isinstance(v, Tensor) else v for v in inputs]))
    return device.capture(lambda given: call(*given), inputs, device.new_pool() if pool is None else pool)


# --------------------------------------------------------------------------------- replays


def test_a_replay_reads_and_writes_the_captured_addresses(on: str) -> None:
    x, weight = tensor(on, 3, 4), tensor(on, 4, 4)
    graph = captured(on, lambda x, w: (x @ w, x.relu()), x, weight)
    addresses = [output.data_ptr() for output in graph.outputs]
    for _ in range(3):
        x.copy_(tensor(on, 3, 4))
        graph.replay()
        assert same_bits(graph.outputs[0], x @ weight) and same_bits(graph.outputs[1], x.relu())
        assert [output.data_ptr() for output in graph.outputs] == addresses


def test_a_tensor_in_another_place_is_not_seen(on: str) -> None:
    x = tensor(on, 3, 4)
    graph = captured(on, lambda x: (x + 1,), x)
    at_capture = x.clone()
    kept = x.detach()  # the memory of the capture stays alive, as buffers keep it
    x.data = tensor(on, 3, 4)
    graph.replay()
    assert same_bits(graph.outputs[0], at_capture + 1) and kept.data_ptr() != x.data_ptr()


def test_an_output_is_overwritten_by_the_next_replay(on: str) -> None:
    x = tensor(on, 3)
    graph = captured(on, lambda x: (x * 2,), x)
    graph.replay()
    first = graph.outputs[0]
    before = first.clone()
    x.add_(1)
    graph.replay()
    assert same_bits(first, x * 2) and not same_bits(first, before)


def test_a_capture_leaves_inputs_and_outputs_alone(on: str) -> None:
    x, out = tensor(on, 3), tensor(on, 3)
    before = x.clone(), out.clone()

    def call(x: Tensor, out: Tensor) -> tuple[Tensor]:
        out.copy_(x * 2)
        x.add_(5)
        return (x + out,)

    graph = captured(on, call, x, out)
    assert same_bits(x, before[0]) and same_bits(out, before[1])
    graph.replay()
    assert same_bits(x, before[0] + 5) and same_bits(out, before[0] * 2)
    assert same_bits(graph.outputs[0], x + out)


def test_a_capture_computes_nothing() -> None:
    x = torch.ones(3)
    graph = captured("emulate", lambda x: (x * 2,), x)
    assert graph.outputs[0].isnan().all()


def test_an_output_that_is_an_input_stays_that_memory(on: str) -> None:
    x = tensor(on, 3, 4)
    graph = captured(on, lambda x: (x, x[1:], x + 1), x)
    assert graph.outputs[0].data_ptr() == x.data_ptr() and graph.outputs[1].data_ptr() == x[1:].data_ptr()
    graph.replay()
    assert same_bits(graph.outputs[1], x[1:])


def test_outputs_that_share_memory_still_do(on: str) -> None:
    x = tensor(on, 3, 4)

    def call(x: Tensor) -> tuple[Tensor, ...]:
        y = x * 2
        return y, y[1:, 2:], y.t()

    graph = captured(on, call, x)
    graph.replay()
    whole, part, turned = graph.outputs
    assert same_bits(whole, x * 2) and same_bits(part, (x * 2)[1:, 2:]) and same_bits(turned, (x * 2).t())
    assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert (part.storage_offset(), part.stride(), turned.stride()) == (6, (4, 1), (1, 4))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.sum(0, keepdim=True).expand(5, 4),
        lambda x: (x * 2)[:, ::2],
        lambda x: (x * 2).t(),
        lambda x: x.sum(),
        lambda x: x[:0] * 2,
        lambda x: x > 0,
        lambda x: x.to(torch.complex64) * 1j,
        lambda x: (x * 100).to(torch.int64),
        lambda x: x.to(torch.bfloat16),
    ],
    ids=["expanded", "strided", "transposed", "scalar", "empty", "bool", "complex", "int64", "bfloat16"],
)
def test_outputs_of_every_form(on: str, make: Callable[[Tensor], Tensor]) -> None:
    x = tensor(on, 3, 4)
    graph = captured(on, lambda x: (make(x),), x)
    for _ in range(2):
        x.copy_(tensor(on, 3, 4))
        graph.replay()
        (output,) = graph.outputs
        expected = make(x)
        assert same_bits(output, expected) and output.dtype == expected.dtype
        assert (output.shape, output.stride()) == (expected.shape, expected.stride())


def test_numbers_among_inputs_and_outputs(on: str) -> None:
    x = tensor(on, 4)
    graph = captured(on, lambda x, n: (x[:n] * n, n + 1, None), x, 3)
    graph.replay()
    assert same_bits(graph.outputs[0], x[:3] * 3) and graph.outputs[1:] == [4, None]


# ------------------------------------------------------------------- what a capture freezes


def test_a_python_branch_and_a_scalar_are_frozen(on: str) -> None:
    settings = {"double": True, "scale": 3.0}

    def call(x: Tensor) -> tuple[Tensor]:
        return (x * settings["scale"] if settings["double"] else x + settings["scale"],)

    x = tensor(on, 3)
    graph = captured(on, call, x)
    settings.update(double=False, scale=7.0)
    graph.replay()
    assert same_bits(graph.outputs[0], x * 3.0)


def test_what_a_custom_op_chose_is_frozen(on: str) -> None:
    x = tensor(on, 3)
    graph = captured(on, lambda x: (torch.ops.capturetest.python(x, x),), x)
    calls = PYTHON["calls"]
    PYTHON["scale"] = 0.5
    x.add_(1)
    graph.replay()
    assert same_bits(graph.outputs[0], x.cos() * 2.0)
    assert PYTHON["calls"] == calls


def test_a_custom_op_that_writes(on: str) -> None:
    x, out = tensor(on, 3), tensor(on, 3)

    def call(x: Tensor, out: Tensor) -> tuple[Tensor]:
        torch.ops.capturetest.writes(x, out)
        return (out + 1,)

    graph = captured(on, call, x, out)
    x.copy_(tensor(on, 3))
    graph.replay()
    assert same_bits(out, x * 3) and same_bits(graph.outputs[0], x * 3 + 1)


@pytest.mark.parametrize("inside", [False, True])
def test_casts_of_weights_that_autocast_keeps_are_neither_captured_nor_left(on: str, inside: bool) -> None:
    """It keeps those of parameters that require gradients, for as long as the caller is in its context."""
    x, weight = tensor(on, 3, 4), torch.nn.Parameter(tensor(on, 4, 4))

    def product(x: Tensor) -> list[Tensor]:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=inside or torch.is_autocast_enabled(x.device.type)):
            return [x @ weight]

    def expected() -> Tensor:
        return x.bfloat16() @ weight.detach().bfloat16()

    with torch.autocast(x.device.type, torch.bfloat16):
        for _ in range(2):
            graph = captured(on, product, x)
        weight.data.mul_(-2)
        assert same_bits(product(x)[0], expected()), "it is cast again after a capture"
    for factor in (1.0, 3.0):
        weight.data.mul_(factor)
        graph.replay()
        assert same_bits(graph.outputs[0], expected())


def test_autocast_of_the_replay_does_not_count() -> None:
    x, weight = torch.randn(3, 4), torch.randn(4, 4)
    graph = captured("emulate", lambda x, w: (x @ w,), x, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph.replay()
    assert same_bits(graph.outputs[0], x @ weight)


# ---------------------------------------------------------------------- what no graph holds


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda x: (x * x.sum().item(),), "reads device memory from the host"),
        (lambda x: (x + 1 if x.sum() > 0 else x - 1,), "reads device memory from the host"),
        (lambda x: (x * float(torch.equal(x, x + 1)),), "reads device memory from the host"),
        (lambda x: (x.nonzero(),), "size depends on values"),
        (lambda x: (x[x > 0],), "size depends on values"),
        (lambda x: (x.unique(),), "size depends on values"),
        (lambda x: (x.masked_select(x > 0),), "size depends on values"),
    ],
    ids=["item", "branch", "equal", "nonzero", "mask", "unique", "masked_select"],
)
def test_host_reads_are_refused(on: str, call: Callable[[Tensor], Any], why: str) -> None:
    x = tensor(on, 3)
    before = x.clone()
    with pytest.raises(CaptureError, match=why if on == "emulate" else ""):
        captured(on, call, x)
    assert same_bits(x, before)
    assert not make_device(on, True).is_capturing()
    graph = captured(on, lambda x: (x + 1,), x)  # nothing is left behind
    graph.replay()
    assert same_bits(graph.outputs[0], x + 1)


@pytest.mark.cuda
def test_memory_of_a_capture_that_failed_is_given_back() -> None:
    x = tensor("cuda", 3)
    graph = captured("cuda", lambda x: (x + 1,), x)  # so that everything is there that stays
    graph.release()
    gc.collect()
    torch.cuda.empty_cache()
    before_bytes = torch.cuda.memory_reserved()
    with pytest.raises(CaptureError):
        captured("cuda", lambda x: (x.new_zeros(1 << 26), x.sum().item()), x)
    gc.collect()
    torch.cuda.empty_cache()  # raises where a capture goes on, and where it does the process aborts at its end
    stays = torch.__version__.startswith(("2.12.", "2.13."))  # pytorch/pytorch#190348
    assert stays or torch.cuda.memory_reserved() <= before_bytes


@pytest.mark.parametrize(
    "reads",
    [
        lambda x, flag: x * flag.sum().item(),
        lambda x, flag: x + 1 if flag.any() else x - 1,
        lambda x, flag: x * sum(flag.tolist()),
        lambda x, flag: x * float(flag.numpy(force=True).sum()),
        lambda x, flag: torch.as_tensor(flag.numpy(force=True) * 2, device=x.device),
    ],
    ids=["item", "branch", "tolist", "numpy", "as_tensor"],
)
def test_host_reads_inside_of_a_custom_op_are_refused(on: str, reads: Callable[..., Tensor]) -> None:
    PYTHON["reads"] = reads
    x = tensor(on, 3)
    with pytest.raises(CaptureError, match="reads device memory from the host" if on == "emulate" else ""):
        captured(on, lambda x: (torch.ops.capturetest.python(x, x.clone()),), x)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: (torch.rand_like(x),),
        lambda x: (torch.nn.functional.dropout(x, 0.5),),
        lambda x: (x.clone().normal_(),),
        lambda x: (torch.bernoulli(x.sigmoid()),),
    ],
    ids=["rand_like", "dropout", "normal_", "bernoulli"],
)
def test_random_ops_are_refused_by_emulation(call: Callable[[Tensor], Any]) -> None:
    with pytest.raises(CaptureError, match="draws random numbers"):
        captured("emulate", call, torch.randn(3))


def test_random_ops_inside_of_a_custom_op_are_refused_by_emulation() -> None:
    PYTHON["reads"] = lambda x, flag: x + torch.rand_like(x)
    with pytest.raises(CaptureError, match="draws random numbers"):
        captured("emulate", lambda x: (torch.ops.capturetest.python(x, x),), torch.randn(3))


def test_attention_without_dropout_draws_nothing(on: str) -> None:
    q = tensor(on, 1, 2, 3, 8)
    graph = captured(on, lambda q: (torch.nn.functional.scaled_dot_product_attention(q, q, q),), q)
    graph.replay()
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(graph.outputs[0], expected, rtol=0, atol=0)


def test_indexing_by_numbers_is_no_host_read(on: str) -> None:
    x, at = tensor(on, 5, 2), torch.tensor([3, 0]).to(where(on))
    graph = captured(on, lambda x, at: (x[at],), x, at)
    at.copy_(torch.tensor([1, 4]))
    graph.replay()
    assert same_bits(graph.outputs[0], x[[1, 4]])


def test_an_error_of_the_piece_is_a_capture_error_and_undoes_its_writes() -> None:
    def call(x: Tensor) -> tuple[Tensor]:
        x.zero_()
        raise ValueError("no such luck")

    x = torch.ones(3)
    device = EmulatedDevice()
    with pytest.raises(CaptureError, match="ValueError: no such luck"):
        device.capture(lambda given: call(*given), [x], device.new_pool())
    assert torch.equal(x, torch.ones(3)) and not device.is_capturing()


# ------------------------------------------------------------------------------------ pools


def test_memory_of_an_output_that_was_read_serves_another_piece(on: str) -> None:
    device = make_device(on, True)
    pool = device.new_pool()
    x = tensor(on, 64)
    first = device.capture(lambda given: (given[0] + 1,), [x], pool)
    held = pool.held_bytes
    first.release_output(0)
    second = device.capture(lambda given: (given[0] * 2,), [x], pool)
    assert second.outputs[0].data_ptr() == first.outputs[0].data_ptr() and pool.held_bytes == held
    first.replay()
    second.replay()
    assert same_bits(first.outputs[0], x * 2)  # what the first one wrote is gone


def test_memory_of_an_output_that_is_still_read_is_left_alone(on: str) -> None:
    device = make_device(on, True)
    pool = device.new_pool()
    x = tensor(on, 64)
    first = device.capture(lambda given: (given[0] + 1, given[0] - 1), [x], pool)
    first.release_output(0)
    others = [device.capture(lambda given: (given[0] * 2,), [x], pool) for _ in range(2)]
    assert first.outputs[1].data_ptr() not in [graph.outputs[0].data_ptr() for graph in others]
    for graph in (first, *others):
        graph.replay()
    assert same_bits(first.outputs[1], x - 1)


def test_memory_that_two_outputs_share_is_free_after_both() -> None:
    device = EmulatedDevice()
    pool = device.new_pool()
    x = torch.randn(64)

    def call(given: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        y = given[0] + 1
        return y, y[8:]

    first = device.capture(call, [x], pool)
    first.release_output(0)
    first.release_output(0)  # said twice is said once
    second = device.capture(lambda given: (given[0] * 2,), [x], pool)
    assert second.outputs[0].data_ptr() != first.outputs[0].data_ptr()
    first.release_output(1)
    third = device.capture(lambda given: (given[0] * 3,), [x], pool)
    assert third.outputs[0].data_ptr() == first.outputs[0].data_ptr()


def test_emulation_scribbles_over_free_memory_of_its_pool() -> None:
    device = EmulatedDevice()
    pool = device.new_pool()
    x = torch.randn(8)
    first = device.capture(lambda given: (given[0] + 1,), [x], pool)
    first.release_output(0)
    second = device.capture(lambda given: (given[0][:1].sum(),), [x], pool)
    third = device.capture(lambda given: (torch.cat([given[0]] * 200),), [x], pool)
    first.replay()
    assert same_bits(first.outputs[0], x + 1)
    third.replay()
    assert not first.outputs[0].isnan().any()  # the second one's output lies there and is still to be read
    second.release_output(0)
    fourth = device.capture(lambda given: (torch.cat([given[0]] * 400),), [x], pool)
    fourth.replay()
    assert first.outputs[0].isnan().all()


@pytest.mark.parametrize("inside", [False, True])
def test_captures_in_inference_mode_replay_anywhere(on: str, inside: bool) -> None:
    x = tensor(on, 3, 4)
    with torch.inference_mode(inside):
        weight = tensor(on, 4, 4)
        graph = captured(on, lambda x, w: (x @ w,), x, weight)
    for replays_inside in (True, False):
        with torch.inference_mode(replays_inside):
            x.add_(1)
            graph.replay()
            assert same_bits(graph.outputs[0], x @ weight)


# ----------------------------------------------------------------------------------- release


def test_a_released_graph_refuses(on: str) -> None:
    graph = captured(on, lambda x: (x + 1,), tensor(on, 3))
    graph.release()
    with pytest.raises(CaptureError, match="was released"):
        graph.replay()
    assert graph.outputs == []
    graph.release_output(0)  # whoever ends late does no harm
    graph.release()


def test_released_memory_is_free_for_the_pool() -> None:
    device = EmulatedDevice()
    pool = device.new_pool()
    x = torch.randn(64)
    first = device.capture(lambda given: (given[0] + 1,), [x], pool)
    address = first.outputs[0].data_ptr()
    first.release()
    assert device.capture(lambda given: (given[0] + 1,), [x], pool).outputs[0].data_ptr() == address


def test_a_released_graph_and_pool_hold_nothing() -> None:
    device = EmulatedDevice()
    pool = device.new_pool()
    x = torch.randn(64)
    graph = device.capture(lambda given: (given[0] + 1, given[0]), [x], pool)
    references = [weakref.ref(x), weakref.ref(graph.outputs[0].untyped_storage()), weakref.ref(pool)]
    graph.release()
    del x, pool
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


@pytest.mark.cuda
def test_cuda_memory_goes_back() -> None:
    torch.cuda.synchronize()
    device = make_device("cuda", True)
    pool = device.new_pool()
    x = tensor("cuda", 2**20)
    graph = device.capture(lambda given: (given[0] + 1,), [x], pool)
    assert pool.held_bytes >= 2**22
    graph.release()
    torch.cuda.empty_cache()
    assert pool.held_bytes == 0


# --------------------------------------------------------------------------------- the rest


def test_whether_a_capture_is_under_way(on: str) -> None:
    device = make_device(on, True)
    seen: list[bool] = []

    def call(given: Sequence[Tensor]) -> tuple[Tensor]:
        seen.append(device.is_capturing())
        if on == "emulate":
            other = threading.Thread(target=lambda: seen.append(device.is_capturing()))
            other.start()
            other.join()
        return (given[0] + 1,)

    device.capture(call, [tensor(on, 3)], device.new_pool())
    assert seen == ([True, False] if on == "emulate" else [True])
    assert not device.is_capturing()


def test_what_no_capture_holds() -> None:
    """Emulated: a capture within a capture ends the process on a GPU [ran, H200]."""
    on = "emulate"
    device, x = make_device(on, True), tensor(on, 3)
    graph = captured(on, lambda x: (x + 1,), x)
    for forbidden in (
        graph.replay,
        device.synchronize,
        lambda: device.capture(lambda given: (given[0] * 2,), [x], device.new_pool()),
    ):
        with pytest.raises(CaptureError, match="inside a capture"):
            device.capture(lambda given, forbidden=forbidden: (forbidden(), given[0] + 1)[1:], [x], device.new_pool())
    assert not device.is_capturing()
    graph.replay()
    assert same_bits(graph.outputs[0], x + 1)


def test_a_piece_that_is_no_list_of_ops_is_called_again() -> None:
    calls: list[int] = []

    def call(given: Sequence[Any]) -> tuple[Tensor]:
        calls.append(given[1])
        return (given[0] * given[1],)

    device = make_device("emulate", compiler_runs_ops=False)
    x = torch.randn(3)
    graph = device.capture(call, [x, 3], device.new_pool())
    x.add_(1)
    graph.replay()
    assert calls == [3, 3] and same_bits(graph.outputs[0], x * 3)


# ----------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("consists_of_ops", [True, False])
def test_between_two_parts_something_else_may_happen(on: str, consists_of_ops: bool) -> None:
    x, y = tensor(on, 3, 4), tensor(on, 3, 4)

    def call(given: Sequence[Tensor]) -> Iterator[Any]:
        doubled = given[0] * 2
        yield "x was read"
        total = doubled + given[1]
        yield "y was read"
        return (total * total,)

    device = make_device(on, consists_of_ops)
    graph = device.capture(call, [x, y], device.new_pool())
    assert graph.borders == ["x was read", "y was read"] and len(graph.parts) == 3
    for _ in range(2):
        expected = x * 2 + y
        graph.parts[0]()
        x.fill_(float("nan"))
        graph.parts[1]()
        y.fill_(float("nan"))
        graph.parts[2]()
        assert same_bits(graph.outputs[0], expected * expected)
        x.copy_(tensor(on, 3, 4))
        y.copy_(tensor(on, 3, 4))
    graph.replay()
    assert same_bits(graph.outputs[0], (x * 2 + y) * (x * 2 + y))
    graph.release()
    assert not graph.parts and device.new_pool().held_bytes == 0


def test_outputs_in_a_pool_of_their_own_outlive_the_parts_before_theirs(on: str) -> None:
    x = tensor(on, 300, 400)

    def call(given: Sequence[Tensor]) -> Iterator[Any]:
        y = given[0]
        for _ in range(4):
            y = (y + 1) * 2
        yield "results"
        return (y - 1, y + 1)

    device = make_device(on, compiler_runs_ops=True)
    first, second = device.new_pool(), device.new_pool()
    told: list[Any] = []

    def pool_after(borders: list[Any]) -> Any:
        told.append([*borders])
        return second

    graph = device.capture(call, [x], first, pool_after)
    assert told == [["results"]] and second.held_bytes
    graph.replay()
    results = [output.clone() for output in graph.outputs]
    x.copy_(tensor(on, 300, 400))
    graph.parts[0]()
    assert all(map(same_bits, graph.outputs, results))
    graph.parts[1]()
    assert not any(map(same_bits, graph.outputs, results))
    graph.release()
    assert first.held_bytes == 0 and (on == "emulate" or second.held_bytes == 0)


def test_outputs_in_the_pool_of_an_earlier_part_do_not_in_emulation() -> None:
    x = torch.randn(3)

    def call(given: Sequence[Tensor]) -> Iterator[Any]:
        y = given[0] + 1
        yield "results"
        return (y * 2,)

    device = make_device("emulate", compiler_runs_ops=True)
    graph = device.capture(call, [x], device.new_pool())
    graph.replay()
    graph.parts[0]()
    assert graph.outputs[0].isnan().all()


def test_what_fails_in_a_later_part_leaves_no_graph(on: str) -> None:
    x = tensor(on, 3)

    def call(given: Sequence[Tensor]) -> Iterator[Any]:
        y = given[0] + 1
        yield "first part"
        return (y * y.sum().item(),)

    device = make_device(on, compiler_runs_ops=True)
    pool = device.new_pool()
    with pytest.raises(CaptureError):
        device.capture(call, [x], pool)
    assert not device.is_capturing()
    graph = device.capture(lambda given: (given[0] + 1,), [x], pool)
    graph.replay()
    assert same_bits(graph.outputs[0], x + 1)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), True),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.tensor(1.5), torch.tensor(1.5), True),
        (torch.empty(0, 3), torch.empty(0, 3), True),
        (torch.arange(6).view(2, 3).t(), torch.arange(6).view(2, 3).t().contiguous(), True),
        (torch.ones(1).expand(3), torch.ones(3), True),
        (torch.tensor([True, False]), torch.tensor([True, True]), False),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 2j]), True),
    ],
)
def test_same_bits(one: Tensor, other: Tensor, same: bool) -> None:
    assert same_bits(one, other) is same

"""Nodes that only make sense in pairs are never cut apart, and leave nothing behind, whatever happens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import pp_piecewise_backend as ppb
from against_eager import assert_same, check, compute_ops, eager_ops, steps, tokens
from pp_piecewise_backend.utils import torch_compat

WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
SIZES = (5, 9, 1)


pytestmark = pytest.mark.usefixtures("no_gradients")


def attention(x: Tensor) -> Tensor:
    q = x.view(1, -1, 2, 4).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(-1, 8)


def bfloat16(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def ambient() -> tuple[Any, ...]:
    """The state of this thread that a program must leave as it found it."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch_compat.autocast_state(),
        torch_compat.functorch_level(),
        torch.get_default_dtype(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
    )


# ---------------------------------------------------------------------------------------------- autocast


def autocast_around_everything(x: Tensor) -> Tensor:
    with bfloat16():
        for _ in range(3):
            x = attention(x @ WEIGHT) @ WEIGHT
    return x


def autocast_ends_after_attention(x: Tensor) -> tuple[Tensor, Tensor]:
    with bfloat16():
        y = attention(x @ WEIGHT)
        z = y @ WEIGHT
    return z.float() @ WEIGHT, y


def autocast_nested_and_switched_off(x: Tensor) -> tuple[Tensor, ...]:
    x = x @ WEIGHT
    with bfloat16():
        y = attention(x @ WEIGHT) @ WEIGHT
        with bfloat16(enabled=False):
            z = attention(y.float() @ WEIGHT) @ WEIGHT
        y = z @ WEIGHT
    return y.float() @ WEIGHT, z, y


@pytest.mark.compat
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (autocast_around_everything, "cececec"),
        (autocast_ends_after_attention, "cec"),
        (autocast_nested_and_switched_off, "cecec"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_autocast(function: Any, expected: str) -> None:
    program = check(function, *tokens(*SIZES), exact_strides=False)
    assert steps(program) == expected
    assert not any("autocast" in name for name in compute_ops(program) + eager_ops(program))


def test_autocast_around_the_call() -> None:
    with bfloat16():
        program = check(lambda x: attention(x @ WEIGHT) @ WEIGHT, *tokens(*SIZES), exact_strides=False)
    assert steps(program) == "cec"


def test_autocast_with_a_tracing_compiler() -> None:
    check(autocast_nested_and_switched_off, *tokens(5, 9), compiler="aot_eager", exact_strides=False, tolerance=1e-2)


# --------------------------------------------------------------------------- grad and inference mode, labels


def grad_modes(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = attention(x @ WEIGHT)
    with torch.enable_grad():
        z = attention(y @ WEIGHT) @ WEIGHT
    torch.set_grad_enabled(True)
    z = attention(z @ WEIGHT) @ WEIGHT
    torch.set_grad_enabled(False)
    return z


def labels(x: Tensor) -> Tensor:
    with torch.profiler.record_function("first"):
        y = attention(x @ WEIGHT)
    with torch.autograd.profiler.record_function("second"):
        return attention(y @ WEIGHT) @ WEIGHT


def inference_inside(x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = attention(x @ WEIGHT) @ WEIGHT
    return y * 2


@pytest.mark.parametrize(
    ("function", "expected"), [(grad_modes, "cececec"), (labels, "cecec"), (inference_inside, "cec")]
)
def test_modes_and_labels_inside(function: Any, expected: str) -> None:
    assert steps(check(function, *tokens(*SIZES))) == expected


def in_place(x: Tensor) -> tuple[Tensor, Tensor]:
    y = attention(x @ WEIGHT) @ WEIGHT
    y.add_(1)
    x.mul_(2)
    return y, x


def test_inference_mode_around() -> None:
    with torch.inference_mode():
        program = check(in_place, *tokens(*SIZES))
    assert steps(program) in ("cec", "cece")


def test_grad_mode_without_anything_that_requires_gradients() -> None:
    with torch.enable_grad():
        assert steps(check(grad_modes, *tokens(*SIZES))) == "cececec"


# ------------------------------------------------------------------------------- choice of an attention kernel


def one_kernel(x: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        y = attention(x @ WEIGHT) @ WEIGHT
    return attention(y @ WEIGHT) @ WEIGHT


def one_kernel_late(x: Tensor) -> Tensor:
    y = attention(x @ WEIGHT) @ WEIGHT
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True):
        y = attention(y @ WEIGHT) @ WEIGHT
    return y @ WEIGHT


@pytest.mark.parametrize("function", [one_kernel, one_kernel_late])
def test_chosen_attention_kernels(function: Any) -> None:
    before = ambient()
    program = check(function, *tokens(*SIZES))
    assert ambient() == before
    eager = [piece for piece in program.pieces if "_sdpa_kernel" in piece.ops]
    (piece,) = eager
    assert piece.kind == "eager"
    assert piece.ops.count("_sdpa_kernel") == 2, "set and restored in one step"
    assert "scaled_dot_product_attention" in piece.ops


# -------------------------------------------------------------------------------------- functorch transforms


def vmap_without_attention(x: Tensor) -> Tensor:
    y = attention(x @ WEIGHT)
    z = torch.vmap(lambda row: (row @ WEIGHT).relu())(y @ WEIGHT)
    return attention(z) @ WEIGHT


def grad_without_attention(x: Tensor) -> Tensor:
    y = attention(x @ WEIGHT)
    gradient = torch.func.grad(lambda t: ((t @ WEIGHT) ** 2).sum())(y)
    return attention(gradient @ WEIGHT) @ WEIGHT


def jvp_without_attention(x: Tensor) -> tuple[Tensor, Tensor]:
    y = attention(x @ WEIGHT)
    value, tangent = torch.func.jvp(lambda t: (t @ WEIGHT).sin(), (y,), (x,))
    return attention(value @ WEIGHT), tangent


@pytest.mark.parametrize(
    ("function", "attention_steps"),
    [(vmap_without_attention, 2), (grad_without_attention, 2), (jvp_without_attention, 2)],
)
def test_transforms_between_attention(function: Any, attention_steps: int) -> None:
    before = ambient()
    program = check(function, *tokens(5, 9))
    assert ambient() == before
    assert eager_ops(program).count("scaled_dot_product_attention") == attention_steps
    for piece in program.pieces:
        entered = sum(name.endswith("_increment_nesting") for name in piece.ops)
        assert entered == sum(name.endswith("_decrement_nesting") for name in piece.ops)


def vmap_with_attention(x: Tensor) -> Tensor:
    def one_head(rows: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(rows[None], rows[None], rows[None])[0] @ WEIGHT[:4, :4]

    y = (x @ WEIGHT).view(-1, 2, 4)
    return torch.vmap(one_head, in_dims=1, out_dims=1)(y).reshape(-1, 8) @ WEIGHT


def grad_with_attention(x: Tensor) -> Tensor:
    return torch.func.grad(lambda t: (attention(t @ WEIGHT) ** 2).sum())(x @ WEIGHT) @ WEIGHT


@pytest.mark.parametrize("function", [vmap_with_attention, grad_with_attention])
def test_transforms_around_attention(function: Any) -> None:
    before = ambient()
    program = check(function, *tokens(5, 9), tolerance=1e-6)
    assert ambient() == before
    (piece,) = [piece for piece in program.pieces if "scaled_dot_product_attention" in piece.ops]
    assert piece.kind == "eager"
    assert any(name.endswith("_increment_nesting") for name in piece.ops)
    assert any(name.endswith("_decrement_nesting") for name in piece.ops)


# -------------------------------------------------------------------------------------- higher-order ops


def test_checkpoint_around_attention_is_one_eager_step() -> None:
    def function(x: Tensor) -> Tensor:
        return checkpoint(lambda t: attention(t @ WEIGHT) @ WEIGHT, x @ WEIGHT, use_reentrant=False) @ WEIGHT

    program = check(function, *tokens(*SIZES))
    assert steps(program) == "cec"
    assert program.split.cuts.matches == {"scaled_dot_product_attention": 1}


def test_checkpoint_without_attention_is_compiled() -> None:
    def function(x: Tensor) -> Tensor:
        return attention(checkpoint(lambda t: (t @ WEIGHT).relu() @ WEIGHT, x, use_reentrant=False) @ WEIGHT) @ WEIGHT

    assert steps(check(function, *tokens(*SIZES))) == "cec"


CONDITIONS = [(torch.randn(size, 8), torch.tensor(flag)) for size, flag in ((5, True), (9, False), (1, True))]


def test_cond_around_attention() -> None:
    def function(x: Tensor, flag: Tensor) -> Tensor:
        y = torch.cond(flag, lambda t: attention(t @ WEIGHT), lambda t: (t @ WEIGHT).relu(), (x @ WEIGHT,))
        return y @ WEIGHT

    program = check(function, *CONDITIONS)
    assert steps(program) == "cec"
    assert eager_ops(program) == ["cond"]


def test_cond_without_attention_and_with_a_size() -> None:
    def function(x: Tensor, flag: Tensor) -> Tensor:
        size = x.shape[0]
        y = torch.cond(flag, lambda t: t.sin() * size, lambda t: (t @ WEIGHT) * (size + 1), (attention(x @ WEIGHT),))
        return attention(y @ WEIGHT) @ WEIGHT

    program = check(function, *CONDITIONS)
    assert steps(program) == "cecec"
    assert "cond" in compute_ops(program)


# --------------------------------------------------------------------------------------------- exceptions

_LIBRARY = torch.library.Library("test_regions", "FRAGMENT")
_LIBRARY.define("fails(Tensor x) -> Tensor")
_LIBRARY.define("fails_on_fakes(Tensor x) -> Tensor")


def _fails(x: Tensor) -> Tensor:
    raise ZeroDivisionError("on purpose")


_LIBRARY.impl("fails", _fails, "CPU")
_LIBRARY.impl("fails_on_fakes", torch.clone, "CPU")
torch.library.register_fake("test_regions::fails", torch.empty_like, lib=_LIBRARY)
_traced = 0


def _fails_second_time(x: Tensor) -> Tensor:
    global _traced
    _traced += 1
    if _traced > 1:
        raise ZeroDivisionError("on purpose")
    return torch.empty_like(x)


torch.library.register_fake("test_regions::fails_on_fakes", _fails_second_time, lib=_LIBRARY)


def fails_amid_regions(x: Tensor) -> Tensor:
    with bfloat16(), torch.enable_grad():
        y = attention(x @ WEIGHT)
        y = torch.ops.test_regions.fails(y)
    return y @ WEIGHT


def fails_amid_regions_when_built(x: Tensor) -> Tensor:
    with bfloat16(), torch.enable_grad():
        y = torch.ops.test_regions.fails_on_fakes(attention(x @ WEIGHT))
    return y.float() @ WEIGHT


@pytest.mark.parametrize("split_ops", [None, "+test_regions::*"], ids=["in-a-piece", "in-an-eager-step"])
@pytest.mark.parametrize("inference", [False, True], ids=["no-grad", "inference"])
def test_an_exception_at_run_time_leaves_no_state(split_ops: str | None, inference: bool) -> None:
    with torch.inference_mode(inference), torch.no_grad():
        before = ambient()
        options = {"compiler": "eager", "graph_safe_ops": "test_regions::*"} | (
            {} if split_ops is None else {"split_ops": split_ops}
        )
        compiled = torch.compile(fails_amid_regions, backend="pp_piecewise", options=options)
        with pytest.raises(ZeroDivisionError, match="on purpose"):
            compiled(torch.randn(5, 8))
        assert ambient() == before
        assert len(ppb.programs()) == 1


def test_an_exception_while_building_leaves_no_state_and_the_graph_runs_whole() -> None:
    global _traced
    _traced = 0
    before = ambient()
    compiled = torch.compile(fails_amid_regions_when_built, backend="pp_piecewise", options={"compiler": "eager"})
    x = torch.randn(5, 8)
    got = compiled(x)
    assert ambient() == before
    assert_same(got, fails_amid_regions_when_built(x), tolerance=1e-2, exact_strides=False)
    (program,) = ppb.programs()
    assert not program.pieces
    assert "on purpose" in program.explain()

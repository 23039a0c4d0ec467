"""Names of steps in profilers."""

from __future__ import annotations

import types

import pytest
import torch

import pp_piecewise_backend as ppb
from dumping import EAGER, Small
from pp_piecewise_backend.runtime import tracing

pytestmark = [pytest.mark.compat, pytest.mark.usefixtures("fresh_backend", "no_gradients")]


def test_names_of_the_steps_of_a_program() -> None:
    torch.compile(Small(), backend="pp_piecewise", options=EAGER)(torch.randn(3, 4))
    (program,) = ppb.programs()
    assert [tracing.step_name(piece) for piece in program.pieces] == [
        "ppb.piece[0]", "ppb.eager[attention]", "ppb.piece[2]",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ops", "label"),
    [
        (("toy::attention_with_output",), "attention"),
        (("index_copy_", "flash_attn::_flash_attn_forward", "view"), "attention"),
        (("torch.ops.aten.index_put_.default",), "default"),
        (("my_engine::cache_write",), "cache_write"),
        ((), "results"),
    ],
)
def test_labels_of_eager_steps(ops: tuple[str, ...], label: str) -> None:
    assert tracing.eager_label(ops) == label


def test_a_profiler_sees_the_names_and_is_noticed() -> None:
    double = tracing.wrap(lambda x: x * 2, "ppb.piece[3]")
    assert not tracing.profiler_is_running()
    with torch.profiler.profile() as profile:
        assert tracing.profiler_is_running()
        assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))
    assert not tracing.profiler_is_running()
    assert "ppb.piece[3]" in {event.key for event in profile.key_averages()}


def test_the_older_profiler_is_noticed_too() -> None:
    with torch.autograd.profiler.profile():
        assert tracing.profiler_is_running()


def test_it_is_a_function_of_the_piece_alone() -> None:
    piece = types.SimpleNamespace(kind="compute", index=7, ops=())
    assert tracing.step_name(piece) == "ppb.piece[7]"  # type: ignore[arg-type]

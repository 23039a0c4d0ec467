"""How long forwards take, and where the time of a pipeline went."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pp_piecewise_backend as ppb
from pp_piecewise_backend.pipeline.transports.local import LocalHub

pytestmark = [pytest.mark.usefixtures("fresh_backend")]

SECONDS_PER_ROW = 0.004


@torch.library.custom_op("report::sleep", mutates_args=())
def sleep(x: Tensor) -> Tensor:
    """Takes its time for each row, and runs between the captured pieces."""
    time.sleep(SECONDS_PER_ROW * x.shape[0])
    return x.clone()


@sleep.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Sleeping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        y: Tensor = sleep(self.layer(x))
        return self.layer(y)


def alone(**options: Any) -> ppb.StageRunner:
    chosen = {"compiler": "eager", "graphs": "emulate", "capture_sizes": "1,4", **options}
    return ppb.StageRunner(
        Sleeping(), make_inputs=lambda n, tag: {"x": torch.ones(n, 4)}, max_tokens=6,
        transport=LocalHub(1).transport(0), options=chosen,
    )  # fmt: skip


def test_the_warm_up_times_each_bucket_and_leaves_no_trace() -> None:
    with alone() as runner:
        assert runner.bucket_times() == ()
        runner.warmup()
        times = runner.bucket_times()
        before = ppb.stats()
        assert [time.tokens for time in times] == [1, 4, 6]
        for tokens, forward_us in times:
            assert 1e6 * SECONDS_PER_ROW * tokens <= forward_us < 1e6 * SECONDS_PER_ROW * (tokens + 5), times
        assert runner._module.module.calls == 0
        assert (before.calls, before.replays, before.graph_misses) == (0, 0, 0)


def test_where_nothing_is_captured_no_bucket_is_timed() -> None:
    with alone(graphs="off") as runner:
        runner.warmup()
        assert runner.bucket_times() == ()

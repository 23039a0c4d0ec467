"""Stages whose graph breaks because a number of a tensor decides what runs: they run, as under plain torch.compile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pp_piecewise_backend as ppb
from pp_piecewise_backend.pipeline.transports.local import LocalHub
from stages_in_threads import warm_up_alone
from tiers import slow_but

pytestmark = pytest.mark.usefixtures("fresh_backend")

PROXIES = {"h": ppb.Proxy((), torch.float32)}
LONGEST_SECONDS = 60.0


def by_item(h: torch.Tensor) -> torch.Tensor:
    return h * (2 if h[0].item() > 2 else 3)


def by_float(h: torch.Tensor) -> torch.Tensor:
    return h * (2 if float(h.max()) > 2 else 3)


def by_all(h: torch.Tensor) -> torch.Tensor:
    return h + 1 if bool((h > 2).all()) else -h


def by_tensor(h: torch.Tensor) -> torch.Tensor:
    return h * 2 if h.sum() > 2 else h - 1


def by_list(h: torch.Tensor) -> torch.Tensor:
    return h * [5, 6, 7, 8, 9][int(h[0].item())]


def by_loop(h: torch.Tensor) -> torch.Tensor:
    for _ in range(int(h[0].item())):
        h = h * 2
    return h


KINDS = [by_item, by_float, by_all, by_tensor, by_list, by_loop]


@pytest.mark.parametrize("kind", slow_but([by_item, by_list], KINDS))
def test_a_stage_in_which_numbers_of_tensors_decide(
    kind: Callable[[torch.Tensor], torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    class First(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"h": x + 1}

    class Last(torch.nn.Module):
        def forward(self, h: torch.Tensor) -> torch.Tensor:
            return kind(h)

    chosen = [(3, 0.0), (8, 3.0), (3, 3.0), (1, 0.0), (8, 1.0)]
    hub = LocalHub(2, LONGEST_SECONDS)
    failures: list[BaseException] = []

    def runner(stage: int) -> ppb.StageRunner:
        return ppb.StageRunner(
            Last() if stage else First(), make_inputs=lambda n, tag: {} if stage else {"x": torch.zeros(n)},
            max_tokens=8, inputs=PROXIES if stage else None, outputs=None if stage else PROXIES,
            transport=hub.transport(stage), options={"compiler": "eager", "graphs": "emulate", "capture_sizes": "4"},
        )  # fmt: skip

    def first_stage() -> None:
        try:
            with runner(0) as own:
                warm_up_alone(own)
                inputs: list[dict[str, Any]] = [{"x": torch.full((rows,), value)} for rows, value in chosen]
                for _ in own.run(ppb.MicroBatch(len(given["x"]), inputs=given) for given in inputs):
                    pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=first_stage, daemon=True)
    thread.start()
    with runner(1) as last:
        warm_up_alone(last)
        results = [output.tolist() for output in last.run()]
        assert "entered through Dynamo, since the graph breaks" in " ".join(ppb.explain().split())
    thread.join(LONGEST_SECONDS)
    assert not thread.is_alive() and not failures, failures
    assert results == [kind(torch.full((rows,), value) + 1).tolist() for rows, value in chosen]
    assert "the module of stage 1 breaks into several graphs" in caplog.text
    assert "Dynamo says: " in caplog.text and "Dynamo says: \n" not in caplog.text

"""``enabled=0``, the way out of trouble: stages go to plain Inductor, and are handed over as always."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import pp_piecewise_backend as ppb
from models.small_pipeline import OPTIONS, one_after_the_other, one_layer, sizes
from pp_piecewise_backend.pipeline.link import End
from pp_piecewise_backend.utils import torch_compat
from stages_in_threads import all_well, in_threads, play_all
from tiers import slow_but

pytestmark = pytest.mark.usefixtures("fresh_backend")


@pytest.mark.parametrize("given_as", slow_but(["option"], ["option", "environment"]))
def test_stages_run_in_plain_inductor(given_as: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is too slow for this test: whatever is asked of it, a graph is run as it is."""
    asked: list[str] = []

    def plain(name: str) -> Callable[..., Any]:
        asked.append(name)
        return lambda graph_module, inputs: graph_module.forward

    monkeypatch.setattr(torch_compat, "stock_backend", plain)
    options = dict(OPTIONS)
    if given_as == "environment":
        monkeypatch.setenv("PP_PIECEWISE", "0")
    else:
        options["enabled"] = 0
    said: list[bool] = []
    say_busy = End.say_busy

    def noting(end: End, busy: bool) -> None:
        say_busy(end, busy)
        if end.is_receiver and not end.own_rank:  # of the ends of the first stage, that of feedback
            said.append(busy)

    monkeypatch.setattr(End, "say_busy", noting)
    chosen = sizes(8, seed=2)
    before = ppb.stats()
    *_, (outputs, stats) = all_well(in_threads(3, play_all(chosen), options=options, make_module=one_layer))
    assert set(asked) == {"inductor"} and ppb.programs() == () and ppb.stats().programs == before.programs
    assert stats["microbatches"] == len(chosen) and stats["graph_misses"] == stats["replays"] == 0
    assert said == [True, False] * (1 + len(chosen)), "a rank that compiles in a step says so before"
    with torch.no_grad():
        for got, expected in zip(outputs, one_after_the_other(chosen, 3, None, make_module=one_layer), strict=True):
            torch.testing.assert_close(got["logits"], expected["logits"], rtol=1e-5, atol=1e-5)

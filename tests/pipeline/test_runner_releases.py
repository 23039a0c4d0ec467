"""When landing memory is free again and results may be overwritten: one step too early, and results are wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import test_runner_results as results

import pp_piecewise_backend as ppb
from models.small_pipeline import one_layer, sizes
from stages_in_threads import all_well, in_threads, play_all

pytestmark = pytest.mark.usefixtures("fresh_backend")


@pytest.mark.usefixtures("one_program")
def test_a_release_one_step_too_early_gives_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pp_piecewise_backend.runtime.capture_plan.find_boundary", results.too_early)
    with pytest.raises(AssertionError):
        results.compare_with_one_thread(3, None, "cpu", one_layer)


@pytest.mark.usefixtures("one_program")
def test_without_the_wait_for_the_last_send_results_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppb.StageRunner, "results_are_written", lambda self: None)
    with pytest.raises(AssertionError):
        results.compare_with_one_thread(3, None, "cpu", one_layer)


@pytest.mark.usefixtures("one_program")
def test_only_steps_that_write_results_wait_for_the_last_send(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[int, list[str]] = {}

    def noting(name: str) -> Callable[[ppb.StageRunner], None]:
        original = getattr(ppb.StageRunner, name)

        def noted(self: ppb.StageRunner) -> None:
            if self._in_forward:
                told.setdefault(self.stage, []).append(name)
            original(self)

        return noted

    for name in ("landing_was_read", "results_are_written"):
        monkeypatch.setattr(ppb.StageRunner, name, noting(name))
    all_well(in_threads(3, play_all(sizes(10))))
    # On the last stage results are the caller's, and nothing is sent from where they lie.
    assert told[1] == ["landing_was_read", "results_are_written"] * 10

"""A pipeline in one process, its stages in threads: feedback, overlap, order, misuse."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import pp_piecewise_backend as ppb
from models.small_pipeline import (
    FEEDBACK,
    HIDDEN,
    MAX_TOKENS,
    OPTIONS,
    PROXIES,
    PipelineStage,
    one_after_the_other,
    one_layer,
    own_inputs,
    sizes,
)
from pp_piecewise_backend import errors
from pp_piecewise_backend.pipeline.transports.local import LocalHub
from stages_in_threads import all_well, in_threads, play_all
from tiers import slow_but

pytestmark = [pytest.mark.usefixtures("fresh_backend", "one_program"), pytest.mark.timeout(300)]


class OneLayer(PipelineStage):
    def __init__(self, index: int, count: int) -> None:
        super().__init__(index, count, num_layers=1)


class Breaking(OneLayer):
    """Two graphs per forward."""

    def forward(self, positions: Tensor, **arguments: Any) -> dict[str, Tensor]:  # type: ignore[override]
        output = super().forward(positions, **arguments)
        torch._dynamo.graph_break()
        return {name: tensor * 1 for name, tensor in output.items()}


def test_a_stage_that_breaks_the_graph_runs_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    chosen = sizes(15)
    *_, (outputs, stats) = all_well(in_threads(2, play_all(chosen), make_module=Breaking, delay_seconds=0.002))
    assert "breaks into several graphs" in caplog.text
    assert stats["early_releases"] == 0
    for got, expected in zip(outputs, one_after_the_other(chosen, 2, None, make_module=OneLayer), strict=True):
        torch.testing.assert_close(got["logits"], expected["logits"], rtol=1e-5, atol=1e-5)


def test_inputs_of_the_caller_replace_those_that_are_made() -> None:
    ids = torch.tensor([3, 1, 2])

    def play(runner: ppb.StageRunner, stage: int) -> Any:
        batch = ppb.MicroBatch(3, b"", {"input_ids": ids, "positions": torch.arange(3)})
        return [o["logits"] for o in runner.run([batch] if stage == 0 else None) if o is not None]

    *_, (logits,) = all_well(in_threads(2, play))
    with torch.no_grad():
        first, last = one_layer(0, 2), one_layer(1, 2)
        expected = last(torch.arange(3), **first(torch.arange(3), ids))["logits"]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------- feedback, early ends


@pytest.mark.parametrize("feedback_rows", ["any", "tokens"])
@pytest.mark.parametrize("max_in_flight", slow_but([None], [None, 1, 3]))
def test_the_first_stage_goes_on_from_what_the_last_one_tells(max_in_flight: int | None, feedback_rows: str) -> None:
    rounds = 12

    def play(runner: ppb.StageRunner, stage: int) -> Any:
        def batches() -> Iterator[ppb.MicroBatch]:
            tokens = torch.tensor([1, 2])
            for number in range(rounds):
                inputs = {"input_ids": tokens, "positions": torch.tensor([0, 1])}
                yield ppb.MicroBatch(2, str(number).encode(), inputs)
                tag, told = runner.feedback()
                assert tag == str(number).encode()
                tokens = told["next_tokens"].clone()
                seen.append(tokens.tolist())

        seen: list[list[int]] = []
        for _ in runner.run(batches() if stage == 0 else None):
            pass
        return seen, runner.stats.recv_allocations

    outcomes = in_threads(2, play, max_in_flight=max_in_flight, feedback_rows=feedback_rows)
    (seen, allocations), *_ = all_well(outcomes)
    assert len(seen) == rounds and allocations == 0
    with torch.no_grad():
        first, last = one_layer(0, 2), one_layer(1, 2)
        tokens, positions = torch.tensor([1, 2]), torch.tensor([0, 1])
        for found in seen:
            tokens = last(positions, **first(positions, tokens))["next_tokens"]
            assert found == tokens.tolist()


def test_at_most_so_many_micro_batches_are_in_flight() -> None:
    started, ended, most = [0], [0], [0]

    def play(runner: ppb.StageRunner, stage: int) -> int:
        runner.warmup()

        def batches() -> Iterator[ppb.MicroBatch]:
            for _ in range(30):
                yield ppb.MicroBatch(3)

        for _ in runner.run(batches() if stage == 0 else None):
            if stage == 0:
                started[0] += 1
                most[0] = max(most[0], started[0] - ended[0])
            elif runner.is_last:
                ended[0] += 1
                time.sleep(0.005)
        return most[0]

    all_well(in_threads(4, play, max_in_flight=2, feedback=None))
    # The last stage tells of an end before the test counts it.
    assert 2 <= most[0] <= 3


# --------------------------------------------------------------------------------------------- misuse


def test_a_profile_shows_receives_by_their_name() -> None:
    def play(runner: ppb.StageRunner, stage: int) -> dict[str, int]:
        runner.warmup()
        if stage == 0:
            for _ in runner.run([ppb.MicroBatch(2)] * 5):
                pass
            return {}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in runner.run():
                pass
        return {event.key: event.count for event in profile.key_averages()}

    _, seen = all_well(in_threads(2, play))
    assert seen["ppb.handoff.recv"] == 5, "one per micro-batch"
    assert any(name.startswith("ppb.piece[") for name in seen)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda output: output["hidden_states"], "stage 0 returned Tensor: expected a dict with 'hidden_states', 'res"),
        (lambda output: {"residual": output["residual"]}, r"returned a dict with \['residual'\]"),
        (lambda output: {**output, "residual": output["residual"].double()}, "'residual' as contiguous torch.float32"),
        (
            lambda output: {**output, "residual": output["residual"][:-1]},
            r"torch.float32\[3, 16\], but got .*\[2, 16\]",
        ),
    ],
    ids=["no dict", "no such name", "dtype", "rows"],
)
def test_a_module_that_returns_something_else_is_told(change: Callable[[Any], Any], words: str) -> None:
    class Other(torch.nn.Module):
        def __init__(self, index: int, count: int) -> None:
            super().__init__()

        def forward(self, positions: Tensor, **_: Any) -> Any:
            rows = positions[:, None] * torch.ones(HIDDEN)
            return change({name: rows + index for index, name in enumerate(PROXIES)})

    def play(runner: ppb.StageRunner, stage: int) -> int:
        return sum(1 for _ in runner.run([ppb.MicroBatch(3)] if stage == 0 else None))

    first, last = in_threads(2, play, make_module=Other)
    with pytest.raises(ValueError, match=words):
        raise first
    assert isinstance(last, errors.PeerLost)


@pytest.mark.parametrize("make_module", slow_but([OneLayer], [OneLayer, Breaking]))
def test_what_runners_count_is_all_that_the_process_counts(make_module: Callable[[int, int], Any]) -> None:
    """Exact sizes only, so that some micro-batches miss their graphs; a name that matches nothing; many programs."""
    before = ppb.stats()
    options = {**OPTIONS, "padding": "never", "split_ops": f"{OPTIONS['split_ops']},nothing::of_that_name"}

    def play(runner: ppb.StageRunner, stage: int) -> tuple[ppb.StageRunner, Any]:
        return runner, play_all([3, 4, 5, 8, 1])(runner, stage)

    with pytest.warns(errors.PPPiecewiseWarning, match="nothing::of_that_name"):
        runners = [runner for runner, _ in all_well(in_threads(2, play, make_module=make_module, options=options))]
    after = ppb.stats()
    for name in after:
        counted = [runner.stats[name] for runner in runners]
        if name == "miss_reasons":
            totals: dict[str, int] = {}
            for reason, pieces in (pair for reasons in counted for pair in reasons.items()):
                totals[reason] = totals.get(reason, 0) + pieces
            assert totals == {
                reason: pieces - before[name].get(reason, 0)
                for reason, pieces in after[name].items()
                if pieces > before[name].get(reason, 0)
            }
        else:
            assert sum(counted) == pytest.approx(after[name] - before[name]), name
    for name in ("graph_misses", "stage_inputs_in_place", "replays", "captures", "unmatched_split_ops", "bytes_sent"):
        assert after[name] > before[name], f"{name}: a counter that stays 0 shows nothing"


def test_results_with_other_strides_are_copied_and_counted() -> None:
    class Transposed(OneLayer):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            if self.is_last:
                return output
            return {name: tensor.t().contiguous().t() for name, tensor in output.items()}

    chosen = sizes(10, seed=1)
    (_, stats), (outputs, _) = all_well(in_threads(2, play_all(chosen), make_module=Transposed))
    assert stats["proxy_copies"] == 2 * sum(num_tokens > 1 for num_tokens in chosen)
    for got, expected in zip(outputs, one_after_the_other(chosen, 2, None, make_module=OneLayer), strict=True):
        torch.testing.assert_close(got["logits"], expected["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"receive": "late"}, "receive='late': expected 'auto', 'early' or 'step'"),
        ({"max_in_flight": 0}, "max_in_flight=0: expected None or at least 1"),
        ({"timeout_s": -1}, "timeout_s=-1"),
        ({"options": {"stage": None}}, "option 'stage' is set by StageRunner itself"),
        ({"options": {"max_tokens": 4}}, "option 'max_tokens' is set by StageRunner itself"),
        ({"transport": "tcp"}, "transport='tcp': expected 'auto', 'p2p', 'shared_memory', 'cuda_ipc' or a transport"),
        ({"transport": "auto"}, "no initialised torch.distributed"),
        ({"inputs": PROXIES}, r"stage 0 of 1, the first one, got inputs \['hidden_states', 'residual'\]"),
        ({"feedback": FEEDBACK}, "only the first and the last stage have feedback"),
    ],
)
def test_arguments_that_cannot_be_used(arguments: Mapping[str, Any], words: str) -> None:
    given = {"transport": LocalHub(1).transport(0), **arguments}
    with pytest.raises(errors.ConfigError, match=words):
        ppb.StageRunner(PipelineStage(0, 1), make_inputs=lambda n, tag: own_inputs(True, n, tag), max_tokens=8, **given)


def test_a_pipeline_of_one_stage() -> None:
    runner = ppb.StageRunner(
        OneLayer(0, 1), make_inputs=lambda n, tag: own_inputs(True, n, tag), max_tokens=MAX_TOKENS,
        transport=LocalHub(1).transport(0), options=OPTIONS,
    )  # fmt: skip
    with pytest.raises(errors.PPPiecewiseError, match="no micro-batches on the first stage"):
        runner.run()
    chosen = sizes(9)
    outputs, _ = play_all(chosen)(runner, 0)
    with pytest.raises(errors.PPPiecewiseError, match="run\\(\\) was called before"):
        runner.run([])
    with pytest.raises(errors.PPPiecewiseError, match="only the first stage of a pipeline with feedback"):
        runner.feedback()
    runner.close()
    runner.close()
    for got, expected in zip(outputs, one_after_the_other(chosen, 1, None, make_module=OneLayer), strict=True):
        torch.testing.assert_close(got["logits"], expected["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0,), "num_tokens=0"),
        ((2.0,), "num_tokens=2.0"),
        ((1, b"x" * 25), "at most 24 bytes"),
        ((1, "x"), "tag='x'"),
        ((1, b"", None, 1), "feedback=1: expected True or False"),
    ],
)
def test_a_micro_batch_that_cannot_be(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(errors.ConfigError, match=words):
        ppb.MicroBatch(*arguments)


def test_make_inputs_must_leave_proxies_out() -> None:
    def play(runner: ppb.StageRunner, stage: int) -> None:
        runner.warmup()

    def make_inputs(num_tokens: int, tag: bytes) -> dict[str, Tensor]:
        return {**own_inputs(True, num_tokens, tag), "residual": torch.zeros(num_tokens, HIDDEN)}

    first, last = in_threads(2, play, make_inputs=make_inputs)
    assert isinstance(last, ValueError) and "make_inputs gave 'residual', which the previous stage sends" in str(last)
    assert isinstance(first, errors.PeerLost) and "rank 1 failed (ValueError)" in str(first)

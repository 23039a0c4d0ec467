"""``warmup()`` between micro-batches: what lands, or is on its way, while it uses the memory of both."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pp_piecewise_backend as ppb
from pp_piecewise_backend import errors
from pp_piecewise_backend.pipeline.transports.local import LocalHub
from runner_ranks import all_well, run, warms_up_between
from stages_in_threads import warm_up_alone
from tiers import slow_but

pytestmark = pytest.mark.usefixtures("fresh_backend", "one_program")

LONGEST_SECONDS = 60.0
LATE_SECONDS = 0.3
"""How long something waits for a warm-up that, in its turn, should wait for it."""
ROWS, MAX_TOKENS, COUNT, BETWEEN = 3, 8, 6, 2
PROXIES = {"h": ppb.Proxy((), torch.float32)}


within_call = threading.local()
"""What the op below does in this thread, in the middle of a call."""


@torch.library.custom_op("warmup_between::pause", mutates_args=())
def pause(x: torch.Tensor) -> torch.Tensor:
    getattr(within_call, "does", lambda: None)()
    return x.clone()


pause.register_fake(torch.empty_like)


class Adds(torch.nn.Module):
    def forward(self, x: torch.Tensor, h: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"h": pause(x if h is None else h) + x}


class Play:
    """Two stages in threads, of which one warms up after its micro-batch ``BETWEEN``; what each does meanwhile is set.

    The stage that does not warm up finds out, by ``warming``, that the other one is within a call of its module.
    """

    def __init__(self, who: int, device: str = "cpu", **arguments: Any) -> None:
        self.who, self.device, self.arguments = who, device, arguments
        self.is_between = False
        self.warming, self.stepped = threading.Event(), threading.Event()
        self.on_warmup: Callable[[], Any] = lambda: None
        self.on_step: Callable[[int, int], Any] = lambda stage, number: None
        """Once a micro-batch was announced."""
        self.before_batch: Callable[[int], Any] = lambda number: None
        self.failures: list[BaseException] = []
        self.results: list[list[float]] = []

    def make_inputs(self, stage: int, num_tokens: int, tag: bytes) -> dict[str, torch.Tensor]:
        if tag:
            self.on_step(stage, int(tag))
        return {"x": torch.full((num_tokens,), float(tag or 0), device=self.device)}

    def within_call(self) -> None:
        if self.is_between:
            self.warming.set()
            self.on_warmup()

    def one_stage(self, hub: LocalHub, stage: int) -> None:
        if stage == self.who:
            within_call.does = self.within_call
        try:
            with torch.Stream(self.device) if self.device != "cpu" else torch.no_grad(), ppb.StageRunner(
                Adds(), make_inputs=lambda n, tag: self.make_inputs(stage, n, tag), max_tokens=MAX_TOKENS,
                inputs=PROXIES if stage else None, outputs=None if stage else PROXIES, transport=hub.transport(stage),
                options={"compiler": "eager", "graphs": "emulate" if self.device == "cpu" else "cuda",
                         "capture_sizes": "2,4,8"}, **self.arguments,
            ) as runner:  # fmt: skip
                warm_up_alone(runner)
                for number, output in enumerate(runner.run(self.microbatches() if stage == 0 else None)):
                    if stage == 0 and number == BETWEEN + 1:
                        self.stepped.set()
                    if stage == 1:
                        self.results.append(output["h"].tolist())
                    if stage == self.who and number == BETWEEN:
                        self.is_between = True
                        runner.warmup()
                        self.is_between = False
        except BaseException as error:
            self.failures.append(error)

    def microbatches(self) -> Iterator[ppb.MicroBatch]:
        for number in range(COUNT):
            self.before_batch(number)
            yield ppb.MicroBatch(ROWS, str(number).encode())

    def run(self) -> list[list[float]]:
        """What the last stage returned."""
        hub = LocalHub(2, LONGEST_SECONDS, self.device)
        threads = [threading.Thread(target=self.one_stage, args=(hub, stage), daemon=True) for stage in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONGEST_SECONDS)
        assert not any(thread.is_alive() for thread in threads)
        if self.failures:
            raise self.failures[0]
        assert self.warming.is_set()
        return self.results


EXPECTED = [[3.0 * number] * ROWS for number in range(COUNT)]


def proxies_come_while_it_warms_up(device: str) -> list[list[float]]:
    play = Play(1, device)
    # The first stage goes on only when the warm-up is under way, which goes on when the first stage has sent.
    play.before_batch = lambda number: number == BETWEEN + 1 and play.warming.wait(LONGEST_SECONDS)
    play.on_warmup = lambda: play.stepped.wait(LONGEST_SECONDS)
    return play.run()


def proxies_were_announced_before(device: str) -> list[list[float]]:
    play = Play(1, device)

    def on_step(stage: int, number: int) -> None:
        if stage == 1 and number == BETWEEN:
            announced.wait(LONGEST_SECONDS)
        elif stage == 0 and number == BETWEEN + 1:
            announced.set()
            play.warming.wait(LATE_SECONDS)  # the warm-up waits for these proxies, which leave in time

    announced = threading.Event()
    play.on_step = on_step
    play.on_warmup = lambda: play.stepped.wait(LONGEST_SECONDS)
    return play.run()


def results_are_on_their_way(device: str) -> list[list[float]]:
    play = Play(0, device, receive="step")
    # The last stage takes what the first has sent only when it is asked for the next micro-batch.
    play.on_step = lambda stage, number: stage == 1 and number == BETWEEN - 1 and play.warming.wait(LATE_SECONDS)
    return play.run()


CASES = [proxies_come_while_it_warms_up, proxies_were_announced_before, results_are_on_their_way]


@pytest.mark.parametrize("case", CASES)
def test_a_warm_up_between_micro_batches_leaves_what_lands_and_leaves(case: Callable[[str], Any]) -> None:
    assert case("cpu") == EXPECTED


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES)
def test_a_warm_up_between_micro_batches_on_a_gpu(case: Callable[[str], Any]) -> None:
    assert case("cuda") == EXPECTED


@pytest.mark.parametrize("who", ["make_inputs", "another thread"])
def test_a_warm_up_within_a_micro_batch_is_refused(who: str) -> None:
    def make_inputs(num_tokens: int, tag: bytes) -> dict[str, torch.Tensor]:
        if tag and who == "make_inputs":
            runner.warmup()
        elif tag:
            other = threading.Thread(target=refused)
            other.start()
            other.join(LONGEST_SECONDS)
        return {"x": torch.full((num_tokens,), 2.0)}

    def refused() -> None:
        with pytest.raises(errors.PPPiecewiseError, match="between two micro-batches"):
            runner.warmup()
        seen.append(True)

    seen: list[bool] = []
    runner = ppb.StageRunner(
        Adds(), make_inputs=make_inputs, max_tokens=MAX_TOKENS, transport=LocalHub(1).transport(0),
        options={"compiler": "eager", "graphs": "emulate", "capture_sizes": "8"},
    )  # fmt: skip
    with runner:
        if who == "make_inputs":
            with pytest.raises(errors.PPPiecewiseError, match="between two micro-batches"):
                list(runner.run([ppb.MicroBatch(ROWS, b"0")]))
        else:
            (output,) = runner.run([ppb.MicroBatch(ROWS, b"0")])
            assert output["h"].tolist() == [4.0] * ROWS and seen == [True]


@pytest.mark.process
@pytest.mark.parametrize(
    ("count", "transport"), slow_but([(2, "auto")], [(2, "auto"), (2, "p2p"), (3, "auto"), (3, "p2p")])
)
def test_ranks_that_warm_up_between_micro_batches(count: int, transport: str, tmp_path: Path) -> None:
    outcomes = all_well(run(warms_up_between, count, tmp_path, transport=transport))
    *_, last = outcomes
    assert last.value["wrong"] == [] and last.value["results"] == last.value["microbatches"]
    assert all(outcome.value["warmups"] > 1 for outcome in outcomes)

"""Feedback from the last stage to the first: what the first one may keep while more comes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import pp_piecewise_backend as ppb
from pp_piecewise_backend import errors
from pp_piecewise_backend.pipeline.header import Answer
from pp_piecewise_backend.pipeline.inbox import Inbox
from pp_piecewise_backend.pipeline.results import Answers
from pp_piecewise_backend.pipeline.transports.local import LocalHub
from pp_piecewise_backend.pipeline.transports.one_machine import OneMachineWire
from pp_piecewise_backend.utils.counters import Stats
from stages_in_threads import warm_up_alone

pytestmark = pytest.mark.usefixtures("fresh_backend")

LONGEST_SECONDS = 60.0
PROXIES = {"hidden_states": ppb.Proxy((4,), torch.float32)}
TOKENS = {"tokens": ppb.Proxy((), torch.int64)}


class First(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"hidden_states": input_ids[:, None].float().expand(-1, 4) + 1}


class Middle(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"hidden_states": hidden_states * 1}


class Last(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"tokens": hidden_states.sum(1).long()}


def runner(hub: LocalHub, stage: int, in_flight: int | None, **arguments: Any) -> ppb.StageRunner:
    is_last = stage == hub.stage_count - 1
    usual: dict[str, Any] = {
        "module": Last() if is_last else Middle() if stage else First(),
        "make_inputs": lambda n, tag: {} if stage else {"input_ids": torch.zeros(n, dtype=torch.int64)},
        "inputs": PROXIES if stage else None,
        "outputs": None if is_last else PROXIES,
        "feedback": TOKENS if is_last or not stage else None,
        "max_in_flight": in_flight,
        "options": {"compiler": "eager", "graphs": "off"},
    }
    return ppb.StageRunner(max_tokens=4, transport=hub.transport(stage), **{**usual, **arguments})


def test_one_feedback_is_read_while_all_that_may_be_in_flight_arrive() -> None:
    hub, in_flight, count = LocalHub(2, LONGEST_SECONDS), 3, 8
    told: list[tuple[bytes, list[int], list[int]]] = []
    failures: list[BaseException] = []

    def last_stage() -> None:
        try:
            with runner(hub, 1, in_flight) as last:
                warm_up_alone(last)
                for _ in last.run():
                    pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=last_stage, daemon=True)
    thread.start()

    def microbatches(first: ppb.StageRunner) -> Iterator[ppb.MicroBatch]:
        def all_arrive(arrivals: int) -> None:
            deadline = time.monotonic() + LONGEST_SECONDS
            while first.stats.recvs < arrivals and time.monotonic() < deadline:
                time.sleep(0.001)
            assert first.stats.recvs == arrivals

        for sequence in range(count + in_flight):
            if sequence >= in_flight:
                tag, tensors = first.feedback()
                before = tensors["tokens"].tolist()
            if sequence < count:
                inputs: dict[str, Any] = {"input_ids": torch.full((2,), sequence)}
                yield ppb.MicroBatch(2, str(sequence).encode(), inputs)
            if sequence >= in_flight:  # as many are in flight as may be, besides the one that is read
                all_arrive(min(sequence + 1, count))
                told.append((tag, before, tensors["tokens"].tolist()))

    with runner(hub, 0, in_flight) as first:
        warm_up_alone(first)
        assert list(first.run(microbatches(first))) == [None] * count
    thread.join(LONGEST_SECONDS)
    assert not thread.is_alive() and not failures
    assert told == [(str(i).encode(), [4 * (i + 1)] * 2, [4 * (i + 1)] * 2) for i in range(count)]
    assert first.stats.recv_allocations == 0


@pytest.mark.parametrize("in_flight", [None, 2])
def test_micro_batches_without_feedback_are_passed_over_and_counted_in_flight(in_flight: int | None) -> None:
    """Chunks of a prompt: of three in a row only the last one is answered; three stages, so that one passes it on."""
    hub, asked, most = LocalHub(3, LONGEST_SECONDS), [number % 3 == 2 for number in range(12)], [0]
    ended, told = [0], []

    def play(stage: int) -> None:
        with runner(hub, stage, in_flight) as own:
            warm_up_alone(own)
            for _ in own.run(microbatches(own) if stage == 0 else None):
                ended[0] += stage == 2
                time.sleep(0.002 * (stage == 2))

    def microbatches(first: ppb.StageRunner) -> Iterator[ppb.MicroBatch]:
        with pytest.raises(errors.PPPiecewiseError, match="none is under way"):
            first.feedback()
        for number, has_feedback in enumerate(asked):
            most[0] = max(most[0], number + 1 - ended[0])
            inputs = {"input_ids": torch.full((2,), number)}
            yield ppb.MicroBatch(2, str(number).encode(), inputs, feedback=has_feedback)
        for _ in range(sum(asked)):
            tag, tensors = first.feedback()
            told.append((int(tag), tensors["tokens"].tolist()))
        with pytest.raises(errors.PPPiecewiseError, match="none is under way"):
            first.feedback()

    in_threads_of_their_own(play, 3)
    assert told == [(number, [4 * (number + 1)] * 2) for number in (2, 5, 8, 11)]
    if in_flight is not None:
        assert most[0] <= in_flight + 2  # asked for before there is room, and counted after the notice has left


def test_without_feedback_the_last_stage_sends_nothing() -> None:
    hub = LocalHub(2, LONGEST_SECONDS)
    headers: dict[int, int] = {}

    def play(stage: int) -> None:
        with runner(hub, stage, None) as own:
            warm_up_alone(own)
            batches = [ppb.MicroBatch(2, feedback=False)] * 4
            for _ in own.run(batches if stage == 0 else None):
                pass
        headers[stage] = own.stats.headers

    in_threads_of_their_own(play, 2)
    assert headers == {0: 4, 1: 4}, "those of the proxies"


@pytest.mark.parametrize(("rows", "is_early"), [("tokens", True), ("any", False)])
def test_feedback_whose_rows_are_known_is_announced_before_the_forward(rows: str, is_early: bool) -> None:
    """So the first stage need not wait for what the last one's host does: with one in flight it starts the next one."""
    hub, starts_the_second, came = LocalHub(2, LONGEST_SECONDS), threading.Event(), []

    def inputs_of_the_first(num_tokens: int, tag: bytes) -> dict[str, torch.Tensor]:
        if tag == b"1":
            starts_the_second.set()
        return {"input_ids": torch.zeros(num_tokens, dtype=torch.int64)}

    def inputs_of_the_last(num_tokens: int, tag: bytes) -> dict[str, torch.Tensor]:
        if tag == b"0":
            came.append(starts_the_second.wait(LONGEST_SECONDS if is_early else 0.5))
        return {}

    def play(stage: int) -> None:
        make_inputs = inputs_of_the_last if stage else inputs_of_the_first
        with runner(hub, stage, 1, make_inputs=make_inputs, feedback_rows=rows) as own:
            warm_up_alone(own)
            batches = [ppb.MicroBatch(2, tag) for tag in (b"0", b"1")]
            for _ in own.run(batches if stage == 0 else None):
                pass
            if stage == 0:
                told.extend(own.feedback()[1]["tokens"].tolist() for _ in batches)

    told: list[list[int]] = []
    in_threads_of_their_own(play, 2)
    assert came == [is_early] and told == [[4, 4], [4, 4]]


@pytest.mark.parametrize("confirmed", [True, False])
def test_the_last_stage_waits_for_what_lands_where_its_outputs_are_confirmed(
    confirmed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over a transport on which only streams wait, so that nothing has landed for hosts until they confirm it."""
    hub, unconfirmed, at_outputs, at_ends = LocalHub(2, LONGEST_SECONDS), set[Inbox](), list[bool](), list[bool]()
    land = Inbox.land

    def lands_for_streams(inbox: Inbox, confirms: bool = True) -> None:
        land(inbox, confirms)
        unconfirmed.add(inbox)

    monkeypatch.setattr(Inbox, "land", lands_for_streams)
    monkeypatch.setattr(Inbox, "confirm", lambda inbox: unconfirmed.discard(inbox))
    monkeypatch.setattr(Inbox, "is_unconfirmed", property(lambda inbox: inbox in unconfirmed))

    def play(stage: int) -> None:
        with runner(hub, stage, None) as own:
            warm_up_alone(own)
            batches = [ppb.MicroBatch(2, feedback=False)] * 3
            for number, _ in enumerate(own.run(batches if stage == 0 else None, confirmed=confirmed)):
                if stage == 1:
                    at_outputs.append(bool(unconfirmed))
                if number == 1:
                    own.confirm_output()  # nothing to do on the first stage
                if stage == 1:
                    at_outputs.append(bool(unconfirmed))
            at_ends.append(bool(unconfirmed) and stage == 1)

    in_threads_of_their_own(play, 2)
    assert at_outputs == ([False] * 6 if confirmed else [True, True, True, False, True, True])
    assert at_ends == [False, False]


def test_finish_gets_what_has_landed_also_where_outputs_are_not_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    hub, confirmed, told = LocalHub(2, LONGEST_SECONDS), list[Inbox](), list[int]()
    monkeypatch.setattr(Inbox, "confirm", lambda inbox: confirmed.append(inbox))
    monkeypatch.setattr(Inbox, "is_unconfirmed", property(lambda inbox: inbox._hands_out and not inbox._grows))

    def finish(output: dict[str, torch.Tensor], tag: bytes) -> dict[str, torch.Tensor]:
        told.append(len(confirmed))
        return {"tokens": output["tokens"]}

    def play(stage: int) -> None:
        with runner(hub, stage, None, **({"finish": finish} if stage else {})) as own:
            warm_up_alone(own)
            for _ in own.run([ppb.MicroBatch(2)] * 3 if stage == 0 else None, confirmed=False):
                pass

    in_threads_of_their_own(play, 2)
    assert told == [1, 2, 3]


def test_a_stage_prepares_its_inputs_while_its_proxies_are_computed() -> None:
    """The first stage computes nothing before the last one's ``make_inputs`` was called for the same micro-batch."""
    hub, asked, came = LocalHub(2, LONGEST_SECONDS), threading.Event(), []

    def inputs_of_the_first(num_tokens: int, tag: bytes) -> dict[str, torch.Tensor]:
        if tag:
            came.append(asked.wait(LONGEST_SECONDS))
        return {"input_ids": torch.zeros(num_tokens, dtype=torch.int64)}

    def inputs_of_the_last(num_tokens: int, tag: bytes) -> dict[str, torch.Tensor]:
        if tag:
            asked.set()
        return {}

    def play(stage: int) -> None:
        with runner(hub, stage, None, make_inputs=inputs_of_the_last if stage else inputs_of_the_first) as own:
            warm_up_alone(own)
            for _ in own.run([ppb.MicroBatch(2, b"tag")] if stage == 0 else None):
                pass
            if stage == 0:
                told.append(own.feedback()[1]["tokens"].tolist())

    told: list[list[int]] = []
    in_threads_of_their_own(play, 2)
    assert came == [True] and told == [[4, 4]]


@pytest.mark.parametrize(
    ("receive", "takes_the_device", "is_early"),
    [("auto", False, True), ("auto", True, False), ("early", True, True), ("step", False, False)],
)
def test_when_a_receive_is_posted(
    receive: str, takes_the_device: bool, is_early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before this rank asks for it, unless the device would compute for as long as it waits, as over NCCL."""
    monkeypatch.setattr(OneMachineWire, "receives_take_the_device", takes_the_device)
    hub, posted = LocalHub(2, LONGEST_SECONDS), []

    def play(stage: int) -> None:
        with runner(hub, stage, None, receive=receive) as own:
            warm_up_alone(own)
            for number, _ in enumerate(own.run([ppb.MicroBatch(2), ppb.MicroBatch(2)] if stage == 0 else None)):
                if stage == 1 and number == 0:
                    deadline = time.monotonic() + (LONGEST_SECONDS if is_early else 0.5)
                    while own.stats.recvs < 2 and time.monotonic() < deadline:
                        time.sleep(0.001)
                    posted.append(own.stats.recvs)

    in_threads_of_their_own(play, 2)
    assert posted == [2 if is_early else 1]


@pytest.mark.parametrize("rows", [1, 3])
def test_feedback_with_other_rows_than_were_promised_is_an_error(rows: int) -> None:
    hub, raised = LocalHub(2, LONGEST_SECONDS), {}

    def play(stage: int) -> None:
        finish = (lambda output, tag: {"tokens": torch.zeros(rows, dtype=torch.int64)}) if stage else None
        with pytest.raises((ValueError, errors.PeerLost)) as caught, runner(
            hub, stage, 1, finish=finish, feedback_rows="tokens"
        ) as own:  # fmt: skip
            warm_up_alone(own)
            for _ in own.run([ppb.MicroBatch(2)] if stage == 0 else None):
                pass
            own.feedback()
        raised[stage] = caught.value

    in_threads_of_their_own(play, 2)
    assert type(raised[1]) is ValueError and type(raised[0]) is errors.PeerLost
    assert f"finish on stage 1 returned feedback with {rows} rows for a micro-batch of 2 tokens" in str(raised[1])


def in_threads_of_their_own(play: Callable[[int], None], count: int) -> None:
    failures: list[BaseException] = []

    def one(stage: int) -> None:
        try:
            play(stage)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=one, args=(stage,), daemon=True) for stage in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONGEST_SECONDS)
    assert not any(thread.is_alive() for thread in threads)
    for failure in failures:
        raise failure


class Logits(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * 2


def test_finish_makes_the_feedback_from_what_the_module_returned() -> None:
    hub, told, yielded, seen = LocalHub(2, LONGEST_SECONDS), [], [], []

    def finish(output: torch.Tensor, tag: bytes) -> dict[str, torch.Tensor]:
        seen.append((tag, output.requires_grad, torch.is_inference_mode_enabled()))
        return {"tokens": output[-1:].sum(1).long()}  # one row for three

    def play(stage: int) -> None:
        arguments = {"module": Logits(), "finish": finish} if stage else {}
        with runner(hub, stage, None, **arguments) as own:
            warm_up_alone(own)
            yielded.extend(output for output in own.run(batches(own) if stage == 0 else None) if output is not None)

    def batches(first: ppb.StageRunner) -> Iterator[ppb.MicroBatch]:
        for number in range(4):
            inputs = {"input_ids": torch.arange(3) + number}
            yield ppb.MicroBatch(3, str(number).encode(), inputs, feedback=number != 2)
            if number != 2:
                told.append(first.feedback()[1]["tokens"].tolist())

    in_threads_of_their_own(play, 2)
    assert told == [[4 * 2 * (number + 3)] for number in (0, 1, 3)]
    assert seen == [(b"0", False, False), (b"1", False, False), (b"3", False, False)], "once each, and not at warm-up"
    assert [output[:, 0].tolist() for output in yielded] == [
        [2.0 * (number + i + 1) for i in range(3)] for number in range(4)
    ]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: torch.zeros(2), "finish on stage 1 returned Tensor: expected a dict with 'tokens'"),
        (lambda: {}, r"finish on stage 1 returned a dict with \[\]: expected a dict with 'tokens'"),
        (lambda: {"tokens": torch.zeros(2).long(), "logits": 0}, "also returned 'logits', .* exactly 'tokens'"),
        (lambda: {"tokens": [1, 2]}, "'tokens' as list: expected torch.int64"),
        (
            lambda: {"tokens": torch.zeros(2)},
            r"'tokens' as torch.float32\[2\] on cpu: expected torch.int64\[2\] on cpu",
        ),
        (lambda: {"tokens": torch.zeros(2, 1).long()}, r"as torch.int64\[2, 1\] on cpu: expected torch.int64\[2\]"),
        (lambda: {"tokens": torch.zeros(0).long()}, r"as torch.int64\[0\] on cpu: expected .* with 1 to 4 rows"),
        (lambda: {"tokens": torch.zeros(5).long()}, r"as torch.int64\[5\] on cpu: expected .* with 1 to 4 rows"),
        (lambda: {"tokens": torch.zeros(()).long()}, r"as torch.int64\[\] on cpu: expected torch.int64\[rows\]"),
        (lambda: {"tokens": torch.zeros(2, device="meta").long()}, r"on meta: expected torch.int64\[2\] on cpu"),
    ],
)
def test_what_finish_returns_is_checked(made: Callable[[], Any], words: str) -> None:
    answers = Answers(None, TOKENS, ppb.Stage({}, 4, "cpu"), 1, lambda output, tag: made(), False, Stats())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=words):
        answers.send(Answer.FEEDBACK, b"", None)


def test_feedback_of_several_tensors_has_equally_many_rows() -> None:
    made = {"tokens": torch.zeros(2).long(), "scores": torch.zeros(3)}
    proxies = {**TOKENS, "scores": ppb.Proxy((), torch.float32)}
    answers = Answers(None, proxies, ppb.Stage({}, 4, "cpu"), 1, None, False, Stats())  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"the module of stage 1 returned 'scores' as torch.float32\[3\].*\[2\] on cpu"
    ):
        answers.send(Answer.FEEDBACK, b"", made)


@pytest.mark.parametrize(
    ("stage", "count", "changes", "words"),
    [
        (0, 2, {"finish": print}, "stage 0 of 2, which has feedback, got finish=<built-in"),
        (1, 2, {"finish": 3}, "got finish=3: expected a function"),
        (1, 2, {"finish": print, "feedback": None}, "stage 1 of 2, which has no feedback"),
        (0, 1, {"finish": print, "feedback": None, "outputs": None}, "stage 0 of 1, which has no feedback"),
    ],
)
def test_where_finish_cannot_be(stage: int, count: int, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(errors.ConfigError, match=words):
        runner(LocalHub(count), stage, None, **changes)

"""A pipeline in one process, its stages in threads: results, what is copied and when memory is free for the next."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pp_piecewise_backend as ppb
from against_eager import assert_same
from captured import DEVICES
from models.small_pipeline import OPTIONS, PipelineStage, one_after_the_other, sizes
from pp_piecewise_backend.pipeline.header import Header
from pp_piecewise_backend.pipeline.link import Receiver
from pp_piecewise_backend.runtime.ownership import Boundary, find_boundary
from stages_in_threads import all_well, in_threads, play_all
from tiers import slow_but

pytestmark = pytest.mark.usefixtures("fresh_backend")

on_devices = pytest.mark.parametrize("device", DEVICES)


@on_devices
@pytest.mark.parametrize(("count", "max_in_flight"), slow_but([(3, 3)], [(2, None), (2, 1), (3, 3), (4, 8)]))
@pytest.mark.usefixtures("one_program")
def test_results_are_those_of_one_thread_bit_for_bit(count: int, max_in_flight: int | None, device: str) -> None:
    compare_with_one_thread(count, max_in_flight, device, PipelineStage)


def compare_with_one_thread(
    count: int, max_in_flight: int | None, device: str, make_module: Callable[[int, int], nn.Module]
) -> None:
    chosen = chosen_for(count)
    *_, (outputs, _) = all_well(
        in_threads(
            count,
            play_all(chosen),
            make_module=make_module,
            delay_seconds=0.004,
            max_in_flight=max_in_flight,
            device=device,
        )
    )
    assert len(outputs) == len(chosen)
    torch._dynamo.reset()
    ppb.reset()
    for got, (same_buckets, unsplit) in zip(outputs, expected_of(count, device, make_module), strict=True):
        assert_same(got, same_buckets)
        torch.testing.assert_close(got["logits"], unsplit["logits"], rtol=1e-5, atol=1e-5)


def chosen_for(count: int) -> list[int]:
    return sizes(100, seed=count)


@functools.cache
def expected_of(count: int, device: str, make_module: Callable[[int, int], nn.Module]) -> list[tuple[Any, Any]]:
    """For each micro-batch what one thread gives through the same buckets, and eagerly."""
    options = OPTIONS if device == "cpu" else {**OPTIONS, "graphs": "cuda"}
    through_buckets = one_after_the_other(chosen_for(count), count, options, device, make_module)
    kept = [{name: tensor.clone() for name, tensor in output.items()} for output in through_buckets]
    return list(zip(kept, one_after_the_other(chosen_for(count), count, None, device, make_module), strict=True))


@pytest.mark.usefixtures("one_program")
@pytest.mark.parametrize("graphs", slow_but(["emulate"], ["off", "emulate"]))
def test_nothing_is_copied_on_the_way(graphs: str) -> None:
    chosen = sizes(40)
    with torch.no_grad():
        outcomes = all_well(in_threads(3, play_all(chosen), options={**OPTIONS, "graphs": graphs}))
    for stage, (_, stats) in enumerate(outcomes):
        assert stats["microbatches"] == len(chosen)
        assert stats["headers"] == 2 * len(chosen)
        assert stats["recvs"] == len(chosen) * (1 if stage == 0 else 2)
        assert stats["sends"] == len(chosen) * (1 if stage == 2 else 2)
        assert stats["proxy_copies"] == 0
        assert stats["early_releases"] == (0 if stage == 0 else len(chosen))


def test_the_next_stage_hears_of_a_micro_batch_before_the_work_for_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work waits for that, and without end where the header only comes after it."""
    heard: set[tuple[int, bytes]] = set()
    changed = threading.Condition()
    hand_on = Receiver._put

    def noted(receiver: Receiver, header: Header | None) -> None:
        hand_on(receiver, header)
        with changed:
            heard.add((receiver.own_rank, b"" if header is None else header.tag))
            changed.notify_all()

    monkeypatch.setattr(Receiver, "_put", noted)

    def play(runner: ppb.StageRunner, stage: int) -> Any:
        make_inputs = runner._make_inputs

        def once_heard(num_tokens: int, tag: bytes) -> Any:
            with changed:
                if tag and not runner.is_last:
                    assert changed.wait_for(lambda: (stage + 1, tag) in heard, timeout=10), f"no header of {tag!r}"
            return make_inputs(num_tokens, tag)

        runner._make_inputs = once_heard
        return play_all(sizes(6))(runner, stage)

    all_well(in_threads(3, play))
    assert {(stage, str(number).encode()) for stage in (1, 2) for number in range(6)} <= heard


def too_early(*args: Any) -> Boundary:
    found = find_boundary(*args)
    last = found.last_reader
    return Boundary(None if last is None else last - 1, found.first_writer, found.landing_storages)


@pytest.mark.usefixtures("one_program")
def test_a_trace_shows_every_micro_batch_on_every_rank(tmp_path: Path) -> None:
    chosen, path = sizes(6), tmp_path / "trace.json"

    def play(runner: ppb.StageRunner, stage: int) -> Any:
        runner.trace(str(path))
        return play_all(chosen)(runner, stage)

    all_well(in_threads(3, play))
    spans = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    assert all(event["dur"] >= 0 for event in spans)
    for stage in range(3):
        for micro_batch in range(len(chosen)):
            own = [e for e in spans if (e["pid"], e["args"].get("micro_batch")) == (stage, micro_batch)]
            begins = {event["name"]: event["ts"] for event in own}
            pieces = [event["name"] for event in own if event["name"].startswith("ppb.piece[")]
            assert len(pieces) == len(set(pieces)) == 2
            assert [event["name"] for event in own].count("ppb.eager[attention]") == 1
            assert ("send" in begins) == (stage < 2)
            assert ("receive" in begins) == ("release" in begins) == (stage > 0)
            if stage > 0:
                assert begins["receive"] < begins[pieces[0]] < begins["release"] < begins[pieces[1]]
            if stage < 2:
                assert begins["send"] > begins[pieces[-1]]

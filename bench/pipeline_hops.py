"""What lies between two stages on the device, in a trace that `gpu_pipeline.py` wrote with one micro-batch in flight.

    python bench/pipeline_hops.py bench/results/gpu_pipeline_trace_7b.json.gz

Then only one device works at a time, and the time of a step is that of both stages and of the hops between them: from
the end of the last kernel of one stage to the start of the first one of the next, from the last stage to the first one
with the chosen tokens. A hop has the transfer, the copies into and out of a graph's memory, and the launch of the
graph, as far as nothing of it ran before.

Kernels belong to one pass through a stage if they follow one another within `PAUSE_US`, and a pass has most kernels
of all: a copy of its inputs that runs long before is none of it. NCCL's kernels, which wait for the other rank, are
left out.
"""

from __future__ import annotations

import gzip
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

PAUSE_US = 60.0
"""Longer than what lies between two kernels of a graph, shorter than another stage takes."""


class Pass(NamedTuple):
    """One run of a stage on its device, in microseconds on the clock of the trace."""

    rank: int
    begin_us: float
    end_us: float


class Hops(NamedTuple):
    """Medians over the steps of a trace, in microseconds."""

    steps: int
    step_us: float
    """From the start of a pass of the first stage to that of its next one."""
    stage_us: tuple[float, ...]
    """By rank."""
    hop_us: tuple[float, ...]
    """From each rank to the next, from the last one to the first."""


def main(arguments: Sequence[str]) -> None:
    for name in arguments:
        found = hops(read(Path(name)))
        stages = " + ".join(f"{us:.0f}" for us in found.stage_us)
        between = " + ".join(f"{us:.0f}" for us in found.hop_us)
        print(f"{name}: {found.steps} steps of {found.step_us:.0f} us: stages {stages}, hops {between}")


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def kernels_of(chrome_trace: dict[str, Any], rank: int) -> list[dict[str, Any]]:
    """What ran on the device, of a trace of PyTorch's profiler, on a clock that all ranks of a machine share."""
    base_us = chrome_trace.get("baseTimeNanoseconds", 0) / 1e3
    return [
        {"ph": "X", "cat": event["cat"], "name": event["name"][:60], "pid": rank, "tid": event["tid"],
         "ts": base_us + event["ts"], "dur": event["dur"]}
        for event in chrome_trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]  # fmt: skip


def hops(events: Sequence[dict[str, Any]]) -> Hops:
    """What the steps of a trace consist of; those in which the pipeline fills and empties are left out.

    Raises:
        ValueError: the passes of the ranks do not take turns, as with more than one micro-batch in flight.
    """
    ranks = sorted({event["pid"] for event in events})
    passes = sorted((one for rank in ranks for one in passes_of(events, rank)), key=lambda one: one.begin_us)
    while passes and passes[0].rank != ranks[0]:
        passes.pop(0)
    count = len(passes) // len(ranks)
    if [one.rank for one in passes[: count * len(ranks)]] != ranks * count or count < 3:
        order = "".join(str(one.rank) for one in passes)
        raise ValueError(f"ranks {ranks} ran in the order {order}: expected turns, so one micro-batch in flight")
    steps = [passes[at * len(ranks) : (at + 1) * len(ranks)] for at in range(count)]
    inner = list(itertools.pairwise(steps[1:]))
    return Hops(
        len(inner),
        statistics.median(after[0].begin_us - step[0].begin_us for step, after in inner),
        tuple(statistics.median(step[at].end_us - step[at].begin_us for step, _ in inner) for at in range(len(ranks))),
        tuple(
            statistics.median(b.begin_us - a.end_us for a, b in ((step + after)[at : at + 2] for step, after in inner))
            for at in range(len(ranks))
        ),
    )


def passes_of(events: Sequence[dict[str, Any]], rank: int) -> list[Pass]:
    spans = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event["pid"] == rank and event["cat"] == "kernel" and "nccl" not in event["name"]
    )
    found: list[tuple[Pass, int]] = []
    for begin_us, end_us in spans:
        if found and begin_us - found[-1][0].end_us < PAUSE_US:
            last, kernels = found[-1]
            found[-1] = last._replace(end_us=max(last.end_us, end_us)), kernels + 1
        else:
            found.append((Pass(rank, begin_us, end_us), 1))
    most = max((kernels for _, kernels in found), default=0)
    return [one for one, kernels in found if kernels > most / 2]


if __name__ == "__main__":
    main(sys.argv[1:])

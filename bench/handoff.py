"""What handing micro-batches over costs the host, and what overlapping it gains, next to the ways of engines.

    python bench/handoff.py

Ranks are processes on this machine. `--device cuda` takes one GPU each and NCCL, which nobody has tried.
A stage is compiled and captured as always (emulated graphs), then its replays are replaced by no-ops. The methods:

- `alone`: the stage without any hand-off, on proxies that lie in its memory; subtracted from the others.
- `engine`, over gloo: per hop two blocking, pickled objects (as SGLang does: one with requests, one with the shapes),
  tensors received into fresh memory and copied into the memory that graphs read. Tensors leave without blocking, and
  the next forward, which overwrites them, waits for that. `engine_one_object` sends one object (as vLLM does).
- `copy_in`, over gloo: the same with a header of 64 bytes in place of pickled objects.
- `ours_step`, `ours_early`: `StageRunner` with `receive="step"` and `"early"`, and with `transport="auto"`: ranks write
  into one another's landing memory. `ours_step_p2p`, `ours_early_p2p`: the same over gloo, as between machines.
  `ours_end`: early, but the memory is released when the forward has ended. `ours_step` posts the receive some
  microseconds later still, when the results have been sent: both are "release at the end", and targets compare with
  the better one.

An observer sees to it that each method does what is said here, without our counters.

Host: no stage sleeps, and blocks of all methods take turns, so that a slow moment of the machine falls on all alike.
`saturated` has as many micro-batches in flight as the stages hold: its wall time per micro-batch is that of the slowest
rank. `single` has one in flight: its wall time is the way through all stages, given per hop. Processor time is that of
all ranks and all their threads, per hop.

Throughput: stages sleep within the forward, in an eager step behind the piece that reads the proxies, with a jitter of
10 % from fixed seeds; `delayed_link.py` says what a link of so many milliseconds is. Throughput is relative to a stage
that never waits. `predicted` knows the very sleeps that stages ask for, but no cost of the host; `predicted_with_host`
takes them for as long as they were (a busy machine wakes sleepers late) and adds what the host needs per stage. That
is what one micro-batch in flight took longer than all its sleeps and links, in a run of the same method, stage and
link times: a processor that has slept works more slowly than one that has not. Without such a run it is taken from
`single`. With `--stretch` all sleeps and links take longer, so that the host matters less on a machine that others use.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, plotted, run_ranks, spread, write_result
from handoff_prediction import Style, completion_seconds, relative_throughput

NAME = "handoff"
RANK = Path(__file__).with_name("handoff_rank.py")
OURS = ("ours_step", "ours_early", "ours_step_p2p", "ours_early_p2p")
HOST_METHODS = ("alone", "engine", "engine_one_object", "copy_in", *OURS)
OVERLAPPING = ("ours_early", "ours_step")
"""Measured with every number of micro-batches in flight; the others with one more than there are stages."""
TARGETED = ("ours_early", "ours_step", "ours_end")
OTHERS = ("ours_end", "ours_early_p2p", "ours_step_p2p", "copy_in", "engine", "engine_one_object")
STYLES: dict[str, Style] = {
    "ours_early": "early",
    "ours_step": "end",
    "ours_end": "end",
    "ours_early_p2p": "early",
    "ours_step_p2p": "end",
}
"""How the prediction sees a method; else as `engine`."""
CLOCKS = ("wall", "processor", "main_thread")
TARGET = {"host_ratio": 1 / 3, "stages": 4, "in_flight": 5, "stage_ms": 5.0, "link_ms": 2.0, "gain": 1.2, "points": 5.0}
DOES = {
    "engine": {"pickles": 2, "blocking_messages": 4, "receives_elsewhere": 2, "copies_into_landing": 2},
    "engine_one_object": {"pickles": 1, "blocking_messages": 2, "receives_elsewhere": 2, "copies_into_landing": 2},
    "copy_in": {"receives_elsewhere": 2, "copies_into_landing": 2},
    "ours_step": {},
    "ours_early": {},
    "ours_step_p2p": {"receives_into_landing": 2},
    "ours_early_p2p": {"receives_into_landing": 2},
}
"""What the last rank must be seen to do per micro-batch, and nothing else of what the observer counts."""
FIRST_DOES = {
    "engine": {"pickles": 2, "blocking_messages": 4},
    "engine_one_object": {"pickles": 1, "blocking_messages": 2},
    "ours_step": {"writes_into_another_process": 2},
    "ours_early": {"writes_into_another_process": 2},
}
"""Likewise the first rank; those that are not named here nothing."""


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    if options.trace is not None:
        record_trace(options)
        return
    host, cells, repeats = [], [], []
    for stages in options.stages:
        found = measure_host(stages, options)
        host.append(found)
        cells += measure_throughput(stages, options, found)
        if stages == TARGET["stages"] and not options.no_repeats:
            repeats = measure_target(options, found)
    body = {"targets": targets(host, repeats), "host": host, "throughput": cells, "repeats": repeats}
    names = ("stages", "rounds", "block", "stage_ms", "link_ms", "in_flight", "micro_batches", "skipped", "stretch")
    parameters = {name: getattr(options, name) for name in (*names, "device")}
    json_path = write_result(options.output, NAME, parameters, body)
    picture = plotted(plot, body, options.output / f"{NAME}.png")
    print_tables(body)
    print(f"\n{json_path}\n{picture}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--block", type=int, default=40, help="micro-batches that are timed together")
    parser.add_argument("--stage-ms", type=float, nargs="+", default=[5.0, 2.0])
    parser.add_argument("--link-ms", type=float, nargs="+", default=[0.04, 0.5, 2.0])
    parser.add_argument("--in-flight", type=int, nargs="+", default=list(range(1, 9)))
    parser.add_argument("--micro-batches", type=int, default=40, help="per cell of the throughput table")
    parser.add_argument("--skipped", type=int, default=10, help="so many of them run before the clock starts")
    parser.add_argument("--stretch", type=float, default=1.0, help="factor on all sleeps and links")
    parser.add_argument("--no-repeats", action="store_true", help="do not repeat the cell of the target")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--trace", type=Path, help="only write a Chrome trace of a short run of `ours_early` there")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def run_tasks(stages: int, options: argparse.Namespace, tasks: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Per task the answers of all ranks."""
    request = {"device": options.device, "tasks": list(tasks)}
    answers = run_ranks(RANK, request, stages, timeout_seconds=900)
    return [[answer[at] for answer in answers] for at in range(len(tasks))]


# ---------------------------------------------------------------------------------------------- host


def measure_host(stages: int, options: argparse.Namespace) -> dict[str, Any]:
    """Microseconds per micro-batch and hop on top of the stage alone, by situation, method and clock."""
    task = {"task": "host_costs", "methods": HOST_METHODS, "rounds": options.rounds, "block": options.block}
    (ranks,) = run_tasks(stages, options, [task])
    for situation in ("saturated", "single"):
        for rank, does in ((-1, DOES), (0, FIRST_DOES)):
            for method in DOES:
                seen = {key: count for key, count in ranks[rank][situation]["observed"][method].items() if count}
                # The last write of a block may come after it, and so in the next one.
                key = "writes_into_another_process"
                if key in seen and round(abs(seen[key] - 2) * options.block) <= 2:
                    seen[key] = 2
                expected = does.get(method, {})
                assert seen == expected, f"{method} was seen to do {seen} on rank {rank}, not {expected}"
    alone = {clock: [rank["saturated"]["microseconds"]["alone"][clock] for rank in ranks] for clock in CLOCKS}
    costs: dict[str, dict[str, dict[str, Any]]] = {"saturated": {}, "single": {}}
    per_stage_us = {}
    for situation, found in costs.items():
        for method in HOST_METHODS[1:]:
            samples = [rank[situation]["microseconds"][method] for rank in ranks]
            found[method] = {}
            for clock in CLOCKS:
                found[method][clock] = spread(
                    [
                        per_hop(
                            situation,
                            clock,
                            [(s[clock][at], a[at]) for s, a in zip(samples, alone[clock], strict=True)],
                        )
                        for at in range(options.rounds)
                    ]
                )
            if situation == "single":
                per_stage_us[method] = statistics.median(samples[-1]["wall"]) / stages
    return {
        "stages": stages,
        "alone_us": {clock: spread([value for rank in alone[clock] for value in rank]) for clock in CLOCKS},
        "handoff_us_per_hop": costs,
        "single_us_per_stage": per_stage_us,
        "observed_per_micro_batch": {m: ranks[-1]["saturated"]["observed"][m] for m in HOST_METHODS},
    }


def per_hop(situation: str, clock: str, by_rank: Sequence[tuple[float, float]]) -> float:
    """One round: what a micro-batch took on each rank, with and without hand-off."""
    hops = len(by_rank) - 1
    if clock != "wall":
        return sum(with_handoff - alone for with_handoff, alone in by_rank) / hops
    last, _ = by_rank[-1]  # its micro-batches end as fast as those of the slowest rank
    if situation == "saturated":
        return last - max(alone for _, alone in by_rank)
    return (last - sum(alone for _, alone in by_rank)) / hops


# ---------------------------------------------------------------------------------------- throughput


def measure_throughput(stages: int, options: argparse.Namespace, host: Mapping[str, Any]) -> list[dict[str, Any]]:
    pairs = [(stage_ms, link_ms) for stage_ms in options.stage_ms for link_ms in options.link_ms]
    runs = [(method, in_flight) for in_flight in options.in_flight for method in OVERLAPPING]
    runs += [(method, stages + 1) for method in OTHERS]
    return measure_runs(stages, options, host, runs, pairs)


def measure_target(options: argparse.Namespace, host: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cell of the target, five times for each of its methods, each beside one with one micro-batch in flight."""
    runs = [(method, in_flight) for _ in range(5) for method in TARGETED for in_flight in (1, TARGET["in_flight"])]
    return measure_runs(int(TARGET["stages"]), options, host, runs, [(TARGET["stage_ms"], TARGET["link_ms"])])


def measure_runs(
    stages: int,
    options: argparse.Namespace,
    host: Mapping[str, Any],
    runs: Sequence[tuple[str, Any]],
    pairs: Sequence[tuple[float, float]],
) -> list[dict[str, Any]]:
    """Each run goes through all pairs of stage and link times, one after the other."""
    count, skipped = options.micro_batches, options.skipped
    seconds = [tuple(ms * options.stretch / 1000 for ms in pair) for pair in pairs]
    tasks = [
        {"task": "throughput", "method": method, "cells": seconds, "micro_batches": count, "max_in_flight": in_flight}
        for method, in_flight in runs
    ]
    cells = []
    alone_in_flight: dict[tuple[str, int], float] = {}
    """Method and place in ``pairs`` -> seconds of the host per stage, with one micro-batch in flight."""
    for (method, in_flight), ranks in zip(runs, run_tasks(stages, options, tasks), strict=True):
        style = STYLES.get(method, "engine")
        warm_us = host["single_us_per_stage"].get(method, host["single_us_per_stage"]["ours_early"])
        for at, ((stage_ms, link_ms), (stage_seconds, link_seconds)) in enumerate(zip(pairs, seconds, strict=True)):
            own = slice(at * count, (at + 1) * count)
            asked, took = ([rank[name][own] for rank in ranks] for name in ("stage_seconds", "took_seconds"))
            links, ended = [link_seconds] * count, ranks[-1]["ended_seconds"][own]
            if in_flight == 1:
                without = completion_seconds(took, links, 1, style)
                longer = (ended[-1] - ended[skipped]) - (without[-1] - without[skipped])
                alone_in_flight[method, at] = max(0.0, longer / (count - 1 - skipped) / stages)
            host_seconds = alone_in_flight.get((method, at), warm_us / 1e6)
            ends = {
                "measured": ended,
                "predicted": completion_seconds(asked, links, in_flight, style),
                "predicted_with_host": completion_seconds(took, links, in_flight, style, host_seconds),
            }
            cells.append(
                {
                    "stages": stages,
                    "method": method,
                    "stage_ms": stage_ms,
                    "link_ms": link_ms,
                    "in_flight": in_flight,
                    "host_us": round(host_seconds * 1e6),
                    **{
                        name: round(relative_throughput(each, skipped, stage_seconds), 4) for name, each in ends.items()
                    },
                }
            )
    return cells


# ------------------------------------------------------------------------------------------- targets


def targets(host: Sequence[Mapping[str, Any]], repeats: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for run in host:
        for situation, methods in run["handoff_us_per_hop"].items():
            for clock in CLOCKS:
                medians = {method: methods[method][clock]["median"] for method in methods}
                for ours in OURS:
                    found.append(
                        {
                            "target": "host",
                            "stages": run["stages"],
                            "situation": situation,
                            "clock": clock,
                            "method": ours,
                            "over_engine": (ratio := medians[ours] / medians["engine"]),
                            "over_engine_one_object": medians[ours] / medians["engine_one_object"],
                            "allowed_over_engine": TARGET["host_ratio"],
                            "met": ratio <= TARGET["host_ratio"],
                        }
                    )
    if repeats:
        medians = {
            (method, name): statistics.median(
                cell[name] for cell in repeats if (cell["method"], cell["in_flight"]) == (method, TARGET["in_flight"])
            )
            for method in TARGETED
            for name in ("measured", "predicted", "predicted_with_host")
        }
        at_end = max(medians["ours_step", "measured"], medians["ours_end", "measured"])
        gain, early = medians["ours_early", "measured"] / at_end, medians["ours_early", "measured"]
        found.append({"target": "gain", "gain": gain, "needed": TARGET["gain"], "met": gain >= TARGET["gain"]})
        for name in ("predicted", "predicted_with_host"):
            points = 100 * (early - medians["ours_early", name])
            met = abs(points) <= TARGET["points"]
            found.append({"target": f"early_near_{name}", "points": points, "allowed": TARGET["points"], "met": met})
    return found


# ------------------------------------------------------------------------------------------- showing


def record_trace(options: argparse.Namespace) -> None:
    cell = [ms * options.stretch / 1000 for ms in (TARGET["stage_ms"], TARGET["link_ms"])]
    task = {"task": "throughput", "method": "ours_early", "cells": [cell], "micro_batches": 14, "max_in_flight": 5}
    run_tasks(int(TARGET["stages"]), options, [{**task, "trace_path": str(options.trace.resolve())}])
    print(options.trace)


def plot(body: Mapping[str, Any], path: Path) -> Path:
    """Left: microseconds of the host by number of stages. Right: throughput of the longest pipeline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = max(cell["stages"] for cell in body["throughput"])
    cells = [cell for cell in body["throughput"] if cell["stages"] == stages]
    pairs = sorted({(cell["stage_ms"], cell["link_ms"]) for cell in cells})
    stage_times, links = (sorted({pair[at] for pair in pairs}) for at in (0, 1))
    rows = max(len(body["host"]), len(stage_times))
    figure, panels = pyplot.subplots(rows, 1 + len(links), figsize=(4.2 * (1 + len(links)), 3.6 * rows), squeeze=False)
    for panel in panels.flat:
        panel.set_visible(False)
    for panel, run in zip(panels[: len(body["host"]), 0], body["host"], strict=True):
        panel.set_visible(True)
        shown = [("saturated", "wall"), ("saturated", "processor"), ("single", "wall"), ("single", "processor")]
        methods = HOST_METHODS[1:]
        for at, method in enumerate(methods):
            found = [run["handoff_us_per_hop"][situation][method][clock]["median"] for situation, clock in shown]
            places = [place + at * 0.12 for place in range(len(shown))]
            panel.bar(places, found, width=0.12, label=method.replace("_", " "))
        panel.set_xticks([place + 0.36 for place in range(len(shown))], ["\n".join(pair) for pair in shown], fontsize=7)
        panel.set_ylabel("us per micro-batch and hop")
        panel.set_title(f"host, {run['stages']} stages", fontsize=9)
    panels[len(body["host"]) - 1][0].legend(fontsize=6)
    colors = {"ours_early": "#3b6ea5", "ours_step": "#b85c5c"}
    for row, stage_ms in enumerate(reversed(stage_times)):
        for column, link_ms in enumerate(links):
            panel = panels[row][1 + column]
            panel.set_visible(True)
            for method, color in colors.items():
                own = [c for c in cells if (c["method"], c["stage_ms"], c["link_ms"]) == (method, stage_ms, link_ms)]
                own.sort(key=lambda cell: cell["in_flight"])
                x = [cell["in_flight"] for cell in own]
                label = method.replace("_", " ")
                panel.plot(x, [c["predicted"] for c in own], "-", color=color, label=f"{label}, predicted")
                panel.plot(x, [c["predicted_with_host"] for c in own], ":", color=color, label="... with host cost")
                panel.plot(x, [c["measured"] for c in own], "o", color=color, label=f"{label}, measured")
            panel.set_ylim(0, 1.05)
            panel.set_title(f"{stages} stages of {stage_ms:g} ms, link {link_ms:g} ms", fontsize=9)
            panel.set_xlabel("micro-batches in flight", fontsize=8)
            panel.set_ylabel("relative throughput", fontsize=8)
    panels[0][1].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def print_tables(body: Mapping[str, Any]) -> None:
    for run in body["host"]:
        alone = run["alone_us"]["wall"]["median"]
        print(f"\n{run['stages']} stages: microseconds per micro-batch and hop; the stage alone takes {alone:.0f}")
        print(f"{'':30} " + " ".join(f"{clock:>22}" for clock in CLOCKS))
        for situation, methods in run["handoff_us_per_hop"].items():
            for method, clocks in methods.items():
                shown = " ".join(
                    f"{s['median']:8.0f} ({s['min']:.0f}..{s['max']:.0f})".rjust(22) for s in clocks.values()
                )
                print(f"{situation:10} {method:19} {shown}")
    print("\nrelative throughput")
    print("stages  stage ms  link ms  in flight  method              measured  predicted  with host  host us")
    for cell in [*body["throughput"], *body["repeats"]]:
        figures = "".join(f"{cell[name]:11.3f}" for name in ("measured", "predicted", "predicted_with_host"))
        times = f"{cell['stages']:6} {cell['stage_ms']:9g} {cell['link_ms']:8g} {cell['in_flight']:10}"
        print(f"{times}  {cell['method']:17}{figures} {cell['host_us']:8}")
    print()
    for target in body["targets"]:
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in target.items() if k not in ("met",)}
        print(f"{'met' if target['met'] else 'missed':7} {shown}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""A whole pipeline on several GPUs, end to end: ours against what one would build or take otherwise.

    python bench/gpu_pipeline.py --models qwen2.5-7b --budget-s 560
    python bench/gpu_pipeline.py --models qwen2.5-7b --tp 4 --budget-s 560
    python bench/gpu_pipeline.py --one-gpu --check --quick
    python bench/gpu_pipeline.py --device cpu --models tiny --tokens 1 8 96 --check --quick

All layers of a model (`decoder.py`, random weights) are spread over the ranks, with the embedding on the first one and
the head and the greedy choice on the last. The chosen tokens go back to the first rank, which starts a micro-batch when
the one before with the same sequences has ended. Up to 64 tokens are decode: the next token of as many sequences, which
grow from step to step; more are parts of one to eight prompts. Attention reads a slot cache (`slot_attention.py`) and
all numbers of a step from memory at fixed addresses, so that graphs which hold it are right at any lengths.

Variants, which take turns in one run, on the same weights and cache:

- `eager` and `reduce_overhead` (`torch.compile(mode="reduce-overhead", dynamic=False)`), handed over in the style of
  engines: pickled metadata over gloo, fresh tensors, NCCL.
- `transformers`: its own pipeline, `DistributedConfig(pp_size=N)`, with its model of the same shapes and its growing
  cache. It has no schedule: one micro-batch at a time, whose logits every rank gets. It comes in from the function that
  `from_pretrained` uses, since there is no checkpoint.
- `ours_MODE_TRANSPORT`: `StageRunner`, for each mode of the package and each transport: `nccl`, `ipc` (CUDA IPC), and
  on the CPU `gloo` and `shm` (shared memory).

A GPU's clock drops by some percent within the first tenths of a second of work, which favours the variant that comes
first. So before the first round of a cell a block of the first variant runs that is not counted, for `--block-s` at
most, and each round begins with the next variant: in as many rounds as there are variants, each is first once.

Figures, per model, number of tokens, micro-batches in flight and variant:

- `ms`: per micro-batch in the steady state, on the first rank's stream from one chosen token's arrival to another's;
  median and extremes over rounds. `host_ms` is the same on the host's clock.
- `tokens_per_second` from its median.
- For each rank, `main_thread_us` and `process_us`: how long the thread that runs the stage, and all threads of the
  process, ran on the host per step; waits that sleep are not in it.
- For each rank of ours, `host_work_us`: the host's time of a step less its waits for other ranks, which spin on a GPU.
- For each rank, `device_busy_us`: how long kernels ran per step, NCCL's left out, in a profile of its own; `bubble` is
  the part of `ms` that is left.
- `counters` per step.

`--check` compares the chosen tokens of all variants (but transformers, which has other weights) with those of the whole
model in one process, at sequence lengths that jump from step to step, prompts and decode mixed. A chosen token is right
if its logit is the largest, in bf16 nearly so: it may lie below by as much as the rounding of that process explains, as
the same model in float32 shows. The file says how many choices differ, and by how much at most.

With `--tp T`, T ranks hold each stage together: they share heads, MLP and vocabulary, and graphs hold the all-reduces.
The engine-style hand-off and ours go from each rank to the one of its number. transformers' pipeline is left out then.

`--trace-variants` writes, for each, what the devices did with one micro-batch in flight, which `pipeline_hops.py`
reads, or more.

`--one-gpu` puts all ranks on one GPU, for rightness and for the host's part: NCCL is left out, and engine-style methods
go through the host. `--device cpu` runs the same code with emulated graphs and the clock of the host.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, plotted, run_ranks, write_result
from pipeline_hops import hops

NAME = "gpu_pipeline"
BASELINES = ("eager", "reduce_overhead", "transformers")
WANTED_MODES = ("piecewise", "full", "full_and_piecewise")
"""Besides the default, with all other defaults: `ours_auto_auto`."""
RANK_SCRIPT = Path(__file__).resolve().parent / "pipeline_rank.py"
GRACE_SECONDS = 60.0
"""For a cell that has begun when the budget is used up."""


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    collected = Collected(options)
    request = {**collected.parameters, "seconds_left": options.budget_s, "profile": not options.no_profile}
    try:
        run_ranks(RANK_SCRIPT, request, options.ranks * options.tp, options.budget_s + options.grace_s, collected.look)
    except RuntimeError as error:
        collected.body["error"] = str(error)[-6000:]
        collected.write()
        print(error, file=sys.stderr)
    plot_path = plotted(plot, collected.body["cells"], options.output / f"{NAME}.png")
    print(f"\n{collected.path}\n{plot_path}")
    if "error" in collected.body:
        raise SystemExit(1)
    if any(not check["ok"] for check in collected.body["checks"]):
        raise SystemExit("a variant chose other tokens than the whole model")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    from decoder import MODELS
    from pipeline_methods import variant_names

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["qwen2.5-0.5b", "qwen2.5-7b", "llama-3.1-8b"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512, 2048])
    parser.add_argument("--in-flight", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--variants", nargs="+", help="names; a part of a name stands for all that have it")
    parser.add_argument("--ranks", type=int, default=2, help="stages of the pipeline")
    parser.add_argument("--tp", type=int, default=1, help="ranks that hold each stage together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--one-gpu", action="store_true", help="all ranks on the same GPU")
    parser.add_argument("--check", action="store_true", help="compare tokens with those of a single process first")
    parser.add_argument("--quick", action="store_true", help="one model, few tokens, two rounds")
    parser.add_argument("--rounds", type=int, default=3, help="0 with --check: only compare")
    parser.add_argument("--count", type=int, default=100, help="micro-batches of a block, if they fit into --block-s")
    parser.add_argument("--block-s", type=float, default=0.6, help="a block of a variant takes about that long")
    parser.add_argument("--context-tokens", type=int, default=512)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="float32 on the CPU, else bfloat16")
    parser.add_argument("--compiler", default=None, help="of ours; inductor on GPUs, eager on the CPU")
    parser.add_argument("--no-profile", action="store_true", help="do not measure how long the devices work")
    parser.add_argument("--trace-folder", default="", help="write the profiles there")
    parser.add_argument("--trace-variants", nargs="*", default=[], help="write what their devices did")
    parser.add_argument("--trace-tokens", type=int, default=8)
    parser.add_argument("--trace-in-flight", type=int, default=1, help="1 is what pipeline_hops.py reads")
    parser.add_argument("--budget-s", type=float, default=3600, help="begin nothing new after that many seconds")
    parser.add_argument("--grace-s", type=float, default=GRACE_SECONDS, help="for what has begun by then")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.quick:
        given = set(arguments)
        quick = {"models": options.models[:1], "tokens": [1, 8], "in_flight": [1, 2], "rounds": 2, "count": 30}
        for name, value in quick.items():
            if f"--{name.replace('_', '-')}" not in given:
                setattr(options, name, value)
    if options.tp > 1 and options.one_gpu:
        parser.error("--tp needs a GPU for each rank: NCCL takes one rank per GPU, so leave out --one-gpu")
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    options.compiler = options.compiler or ("inductor" if options.device == "cuda" else "eager")
    known = variant_names(WANTED_MODES, options.device, options.one_gpu)
    wanted = options.variants or known
    options.variants = [name for name in known if any(part in name for part in wanted)]
    if not options.variants:
        parser.error(f"no variant has a part of its name among {wanted}; there are {', '.join(known)}")
    return options


class Collected:
    """What the ranks have found so far, written after every line of theirs."""

    def __init__(self, options: argparse.Namespace) -> None:
        left_out = ("output", "no_profile", "block_s", "budget_s", "grace_s")
        self.parameters = {name: value for name, value in vars(options).items() if name not in left_out}
        self.parameters |= {"block_seconds": options.block_s, "least_count": 4 if options.quick else 12}
        self.body: dict[str, Any] = {"ranks": [], "variants": [], "checks": [], "cells": [], "ratios": []}
        self.path = options.output / f"{NAME}.json"
        self._output = options.output
        self._read = 0
        self._began = time.perf_counter()

    def look(self, folder: Path) -> None:
        file = folder / "found.jsonl"
        if not file.exists():
            return
        with file.open() as lines:
            lines.seek(self._read)
            text = lines.read()
        complete = text[: text.rfind("\n") + 1]
        if not complete:
            return
        self._read += len(complete.encode())
        for line in complete.splitlines():
            self._take(json.loads(line))
        self.write()

    def _take(self, found: dict[str, Any]) -> None:
        what = found.pop("what")
        if what == "ranks":
            self.body["ranks"] = found["ranks"]
        elif what == "over":
            self.body["over"] = found["sentence"]
            print(found["sentence"])
        elif what == "trace":
            self._write_trace(found)
        else:
            self.body[f"{what}s"].append(found)
            print(f"{time.perf_counter() - self._began:5.0f} s  {shown(what, found)}", flush=True)
        self.body["ratios"] = ratios(self.body["cells"])

    def _write_trace(self, found: dict[str, Any]) -> None:
        """What the devices did, for Perfetto, in a file of its own; and what the steps in it consist of."""
        name = f"{NAME}_trace_{found['model']}_{found['variant']}.json.gz"
        events = found.pop("events")
        if events:
            with gzip.open(self._output / name, "wt") as file:
                json.dump({"traceEvents": events}, file)
            found |= {"file": name}
            try:
                found |= hops(events)._asdict() if self.parameters["trace_in_flight"] == 1 else {}
            except ValueError as error:
                found["error"] = str(error)
        self.body.setdefault("traces", []).append(found)
        print(f"trace of {found}")

    def write(self) -> None:
        self.path = write_result(self._output, NAME, self.parameters, self.body)


def shown(what: str, found: Mapping[str, Any]) -> str:
    if what == "variant":
        seconds = [f"{rank['seconds']:.1f} s" for rank in found.get("ranks", [])]
        return f"{found['model']}: {found['variant']} {found['status']} {found.get('reason', '')}{', '.join(seconds)}"
    if what == "check":
        verdict = "ok" if found["ok"] else "WRONG"
        return (
            f"{found['model']}, {found['tokens']} tokens: {found['variant']} {verdict}: {found['different']} of "
            f"{found['choices']} choices differ, largest regret {found['largest_regret']:.3g} "
            f"of {found['allowed_regret']:.3g}"
        )
    ms, ranks = found["ms"], found["ranks"]
    host = " ".join(f"{rank['main_thread_us']:.0f}" for rank in ranks)
    works = " ".join(f"{rank['host_work_us']:.0f}" for rank in ranks if "host_work_us" in rank)
    bubbles = " ".join(f"{rank['bubble']:.0%}" for rank in ranks if "bubble" in rank)
    return (
        f"{found['model']}, {found['tokens']} tokens, {found['in_flight']} in flight: {found['variant']:<30} "
        f"{ms['median']:8.3f} ms ({ms['min']:.3f} to {ms['max']:.3f}), {found['tokens_per_second']:.0f} tokens/s, "
        f"host {host} us{works and f' (without waits {works})'}, bubble {bubbles or 'unknown'}"
    )


def ratios(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By cell, the time of each variant over that of each baseline."""
    by_cell: dict[tuple[str, int, int], dict[str, float]] = {}
    for cell in cells:
        key = (cell["model"], cell["tokens"], cell["in_flight"])
        by_cell.setdefault(key, {})[cell["variant"]] = cell["ms"]["median"]
    found = []
    for (model, tokens, in_flight), times in by_cell.items():
        over = {
            baseline: {name: round(ms / times[baseline], 4) for name, ms in times.items() if name != baseline}
            for baseline in BASELINES
            if baseline in times
        }
        found.append({"model": model, "tokens": tokens, "in_flight": in_flight, "ms_over": over})
    return found


def plot(cells: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """A row for each model, a column for each number of micro-batches in flight: milliseconds by tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(cell["model"] for cell in cells)) or ["nothing measured"]
    columns = sorted({cell["in_flight"] for cell in cells}) or [1]
    variants = list(dict.fromkeys(cell["variant"] for cell in cells))
    size = (4 * len(columns) + 1.5, 3.2 * len(models))
    figure, grid = pyplot.subplots(len(models), len(columns), figsize=size, squeeze=False, sharex=True)
    for row, model in zip(grid, models, strict=True):
        for axes, in_flight in zip(row, columns, strict=True):
            for number, variant in enumerate(variants):
                own = [c for c in cells if (c["model"], c["in_flight"], c["variant"]) == (model, in_flight, variant)]
                own.sort(key=lambda cell: cell["tokens"])
                middle = [cell["ms"]["median"] for cell in own]
                below = [cell["ms"]["median"] - cell["ms"]["min"] for cell in own]
                above = [cell["ms"]["max"] - cell["ms"]["median"] for cell in own]
                style = "--" if variant in BASELINES else "-"
                axes.errorbar(
                    [cell["tokens"] for cell in own], middle, [below, above],
                    marker="o", markersize=3, linestyle=style, label=variant, color=f"C{number % 10}",
                )  # fmt: skip
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_title(f"{model}, {in_flight} in flight", fontsize=8)
    grid[-1][0].set_xlabel("tokens")
    grid[0][0].set_ylabel("ms per micro-batch")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", fontsize=6)
    figure.tight_layout(rect=(0, 0, 1 - 1.5 / size[0], 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    main(sys.argv[1:])

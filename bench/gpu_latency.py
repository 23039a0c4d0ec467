"""Latency of a pipeline stage by number of tokens: this backend next to what else one may use, and to the limit.

    python bench/gpu_latency.py --stages qwen2.5-7b --tokens 1 8 64 256 512 2048 8192

The stages are those of `gpu_stage.py`. The methods:

- `eager`: the module as it is. `default`: `torch.compile`. `reduce_overhead`: the same with `mode="reduce-overhead"`.
- `breakable_cuda_graphs`: the PyPI package of that name on the eager module, with the breaks set by hand at attention.
- `ours_eager`: this backend with `compiler=eager`, what the line above is to be compared with.
- `ours`: this backend, pieces by Inductor, stage inputs in landing memory. `ours_copied`: the same program called with
  stage inputs that lie elsewhere and are copied in. `ours_full`: this backend with `mode=full`.
- `limit`: one graph of the whole stage, captured by hand from the very pieces of `ours` and replayed by itself.

Every method is called with one and the same input memory, filled with other random numbers before each call that is
timed alone. It is first compared with eager, row by row; a method that fails or differs is recorded and not timed.

- `latency_us`: from an idle device, the time between an event before the call and one behind it.
- `host_us`: the time until that call returned.
- `steady_us`: per call, of a block of up to 50 calls of which none waits for another on the host.

All compiled methods see the number of tokens as dynamic (but for one token) and the largest number first.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import RESULTS, plotted, spread, write_result

if TYPE_CHECKING:
    import torch
    from gpu_stage import GPUStage

NAME = "gpu_latency"
METHODS = (
    "eager",
    "default",
    "reduce_overhead",
    "breakable_cuda_graphs",
    "ours_eager",
    "ours",
    "ours_copied",
    "ours_full",
    "limit",
)
NEEDS_CUDA = ("reduce_overhead", "breakable_cuda_graphs", "limit")
FIGURES = ("latency_us", "steady_us", "host_us")
BASELINES = ("limit", "eager", "reduce_overhead", "breakable_cuda_graphs")
ADAPTATIONS = {
    "static outputs": "the graph methods return memory that their next call overwrites: ours with static_outputs=1, "
    "as between stages; reduce_overhead does so by itself",
    "reduce_overhead": "copies its inputs into memory of its own in each call, ours_copied copies the stage inputs, "
    "the others read them where they are",
    "buckets": "ours captures exactly the sizes measured: padding is not measured here",
    "attention": "see gpu_stage.py; outside of the graphs in ours*, breakable_cuda_graphs; inside in the others",
}
TOLERANCES = {"torch.bfloat16": 5e-2, "torch.float16": 1e-2, "torch.float32": 1e-4}
"""Most that a row may differ from eager's: norm of the difference over norm of the row."""

WARM_UP_CALLS = 4
WARM_UP_SECONDS = 0.2
"""At least so long a method runs before it is timed, so that a device that clocked down is awake."""
FRESH_INPUTS = 4
COUNTERS = (
    "replays",
    "graph_misses",
    "eager_steps",
    "stage_inputs_in_place",
    "stage_input_copies",
    "input_copies",
    "border_copies",
    "output_copies",
)
MIN_REPEATS = 10
CALLS_PER_BLOCK = 50
BLOCK_SECONDS = 0.3
"""Blocks have fewer calls, but 10, where they would take longer."""
MIN_BLOCKS = 3


class Skipped(Exception):
    """A method that cannot run here, and why."""


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    parameters = {name: value for name, value in vars(options).items() if name != "output"}
    cells: list[dict[str, Any]] = []
    json_path = options.output / f"{NAME}.json"
    for cell in measure(options):
        cells.append(cell)
        print(line(cell), flush=True)
        # Written after every cell: an interrupt loses nothing.
        body = {"adaptations": ADAPTATIONS, "summary": summarize(cells), "cells": cells}
        json_path = write_result(options.output, NAME, parameters, body)
    plot_path = plotted(plot, cells, options.output / f"{NAME}.png")
    print_table(summarize(cells))
    print(f"\n{json_path}\n{plot_path}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    from gpu_stage import SHAPES

    models = [name for name in SHAPES if name != "tiny"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=SHAPES, default=models)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 256, 512, 2048, 8192])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=100, help="calls timed alone, and in blocks, at most")
    parser.add_argument("--cell-seconds", type=float, default=1.0, help="stop repeating earlier after so long, twice")
    parser.add_argument("--budget-seconds", type=float, default=400.0, help="start no further cell after so long")
    parser.add_argument("--context-tokens", type=int, default=512, help="length of each sequence in decode")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--compiler", choices=("inductor", "aot_eager", "eager"), default="inductor")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


# --------------------------------------------------------------------------------------------- methods


@dataclass
class Bench:
    """One stage, and what its methods are called with."""

    stage: GPUStage
    options: argparse.Namespace
    landing: Any
    """The `ppb.Stage` whose memory the stage inputs lie in."""
    foreign: dict[str, torch.Tensor]
    """Other memory for the stage inputs, as long as the landing memory."""
    positions: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def is_cuda(self) -> bool:
        return self.options.device == "cuda"

    def arguments(self, tokens: int, foreign: bool = False) -> dict[str, torch.Tensor]:
        """The keyword arguments that all methods are called with, always the same memory for a number of tokens."""
        import torch

        if tokens not in self.positions:
            with torch.inference_mode(False):
                self.positions[tokens] = self.stage.make_inputs(tokens)["positions"]
        proxies = {k: v[:tokens] for k, v in self.foreign.items()} if foreign else self.landing.views(tokens)
        arguments = {"positions": self.positions[tokens], **proxies}
        if tokens > 1:
            for tensor in arguments.values():
                torch._dynamo.mark_dynamic(tensor, 0)
        return arguments


Call = Callable[[], Sequence[Any]]
"""Runs the stage on the arguments of the bench and returns its outputs."""


@dataclass(frozen=True)
class Method:
    function: Callable[..., Any]
    """The stage, compiled or not."""
    captured: Callable[[Mapping[str, Any]], Call] | None = None
    """Makes the call by a capture by hand of the function; where there is none, the function itself is called."""

    def call(self, arguments: Mapping[str, Any]) -> Call:
        return (lambda: self.function(**arguments)) if self.captured is None else self.captured(arguments)


def prepare(method: str, bench: Bench) -> Method:
    """A method before its first call; compiles nothing yet."""
    import torch

    if method in NEEDS_CUDA and not bench.is_cuda:
        raise Skipped("needs CUDA")
    stage, compiler = bench.stage, bench.options.compiler
    if method == "breakable_cuda_graphs":
        return Method(stage, lambda arguments: captured_with_breaks(stage, arguments))
    if method == "eager":
        return Method(stage)
    if method == "default":
        return Method(torch.compile(stage, backend=compiler))
    if method == "reduce_overhead":
        return Method(marking_steps(torch.compile(stage, mode="reduce-overhead")))
    if method == "limit":
        uncaptured = compiled_by_us(bench, mode="none")
        return Method(uncaptured, lambda arguments: captured_whole(uncaptured, arguments))
    return Method(
        compiled_by_us(
            bench,
            mode="full" if method == "ours_full" else "piecewise",
            graphs="cuda" if bench.is_cuda else "emulate",
            stage=bench.landing,
            static_outputs=True,
            capture_sizes=sorted(set(bench.options.tokens)),
            **({"compiler": "eager"} if method == "ours_eager" else {}),
        )
    )


def compiled_by_us(bench: Bench, **options: Any) -> Callable[..., Any]:
    import torch
    from gpu_stage import NAMED_OPS

    settings = {"compiler": bench.options.compiler, **NAMED_OPS, **options}
    return torch.compile(bench.stage, backend="pp_piecewise", options=settings)


def marking_steps(function: Callable[..., Any]) -> Callable[..., Any]:
    """Say before each call that the results of the last are not needed any more, as `reduce-overhead` wants it."""
    import torch

    def call(**arguments: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return function(**arguments)

    return call


def captured_whole(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Call:
    """One CUDA graph of the whole call, captured by hand."""
    import torch

    warm_up_on_side_stream(lambda: function(**arguments))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = function(**arguments)

    def call() -> Sequence[Any]:
        graph.replay()
        return outputs

    return call


def captured_with_breaks(stage: GPUStage, arguments: Mapping[str, Any]) -> Call:
    """The eager stage in the package's graphs, with a break at each attention."""
    import torch
    from breakable_cuda_graphs import BreakableCUDAGraph, breakable_graph, no_graph

    op = torch.ops.gpu_stage.attention.default

    @no_graph  # type: ignore[untyped-decorator, unused-ignore]
    def attend(*tensors: torch.Tensor) -> None:
        op(*tensors)

    with stage.attending_with(attend):
        warm_up_on_side_stream(lambda: stage(**arguments))
        sequence = BreakableCUDAGraph()
        with breakable_graph(sequence, capture_error_mode="thread_local"):
            outputs = stage(**arguments)

    def call() -> Sequence[Any]:
        sequence.replay()
        return outputs

    return call


def warm_up_on_side_stream(call: Callable[[], Any]) -> None:
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)


# ------------------------------------------------------------------------------------------- measuring


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A cell for each stage, number of tokens and method; methods innermost, so that they share the machine's moods."""
    import torch

    import pp_piecewise_backend as ppb

    if options.device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("torch sees no CUDA device; --device cpu with --stages tiny runs the same code")
        torch.backends.cuda.enable_cudnn_sdp(False)  # the same attention kernels for every method
    # Every method compiles the same code, twice: Dynamo counts them together.
    torch._dynamo.config.recompile_limit = 64
    deadline = time.perf_counter() + options.budget_seconds
    broken: str | None = None
    for name in options.stages:
        torch._dynamo.reset()
        ppb.reset()
        release_memory(options)
        bench = None if broken or time.perf_counter() > deadline else make_bench(name, options)
        methods: dict[str, Method | Exception] = {}
        for tokens in options.tokens:
            for method in options.methods:
                cell: dict[str, Any] = {"stage": name, "tokens": tokens, "method": method}
                if broken:
                    yield {**cell, "status": "not started", "reason": f"the device failed before: {broken}"}
                    continue
                if bench is None or time.perf_counter() > deadline:
                    yield {**cell, "status": "not started", "reason": "the budget is spent"}
                    continue
                started = time.perf_counter()
                try:
                    found = measure_cell(bench, methods, method, tokens)
                except Skipped as skipped:
                    found = {"status": "skipped", "reason": str(skipped)}
                except Exception as error:
                    found = {"status": "failed", "reason": f"{type(error).__name__}: {str(error)[:2000]}"}
                    broken = failure_of_the_device(options)
                yield {**cell, **found, "cell_seconds": time.perf_counter() - started}
        del bench, methods
    release_memory(options)


def make_bench(name: str, options: argparse.Namespace) -> Bench:
    import torch
    from gpu_stage import SHAPES, GPUStage

    import pp_piecewise_backend as ppb

    max_tokens = max(options.tokens)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    stage = GPUStage(
        SHAPES[name], max_tokens, context_tokens=options.context_tokens, device=options.device, dtype=dtype
    )
    proxies = {proxy: ppb.Proxy((stage.shape.hidden,), dtype) for proxy in ("hidden_states", "residual")}
    landing = ppb.Stage(proxies, max_tokens, device=options.device)
    foreign = {
        proxy: torch.empty(max_tokens, stage.shape.hidden, dtype=dtype, device=options.device) for proxy in proxies
    }
    return Bench(stage, options, landing, foreign)


def measure_cell(bench: Bench, methods: dict[str, Method | Exception], method: str, tokens: int) -> dict[str, Any]:
    import torch
    from gpu_stage import set_metadata

    with torch.inference_mode():
        compiled = prepared(bench, methods, method)
        set_metadata(bench.stage.metadata(tokens))
        arguments = bench.arguments(tokens, foreign=method == "ours_copied")
        with torch.inference_mode(False):
            fresh = [bench.stage.make_inputs(tokens, seed) for seed in range(1, FRESH_INPUTS + 1)]
        skips_before = graph_skips()
        call = compiled.call(arguments)
        for number in range(WARM_UP_CALLS):
            load(arguments, fresh[number % len(fresh)])
            call()
        check = compare(bench, call, arguments, fresh)
        found: dict[str, Any] = {"status": "ok" if check["ok"] else "wrong", "check": check}
        if skips := graph_skips() - skips_before:
            found["cudagraph_skips"] = skips
        if not check["ok"]:
            return {**found, "reason": f"a row differs from eager's by {check['largest_row_error']:.2g} of its norm"}
        microseconds, per_call = timed(bench, call, arguments, fresh)
        if method.startswith("ours"):
            found["per_call"] = per_call
    return {**found, "microseconds": {name: spread_of(values) for name, values in microseconds.items()}}


def prepared(bench: Bench, methods: dict[str, Method | Exception], method: str) -> Method:
    """The method, compiled at the largest number of tokens; an error is raised for each of its cells."""
    from gpu_stage import set_metadata

    key = "ours" if method == "ours_copied" else method  # both call one program
    if key not in methods:
        try:
            made = methods[key] = prepare(key, bench)
            largest = max(bench.options.tokens)
            set_metadata(bench.stage.metadata(largest))
            arguments = bench.arguments(largest)
            load(arguments, bench.stage.make_inputs(largest))
            made.function(**arguments)
        except Exception as error:
            methods[key] = error
    known = methods[key]
    if isinstance(known, Exception):
        raise known
    return known


def load(arguments: Mapping[str, Any], fresh: Mapping[str, Any]) -> None:
    """Fill the memory of the arguments with other values."""
    for name, tensor in arguments.items():
        tensor.copy_(fresh[name])


def compare(bench: Bench, call: Call, arguments: Mapping[str, Any], fresh: Sequence[Mapping[str, Any]]) -> Any:
    """Outputs next to eager's, for two sets of inputs, so that a result left over from the first shows."""
    tolerance = TOLERANCES[str(bench.stage.dtype)]
    largest, is_finite = 0.0, True
    # All of eager's first: a call must not find the keys and values that it should have written in the cache.
    expected = [[output.clone() for output in bench.stage(**inputs)] for inputs in fresh[:2]]
    for inputs, outputs in zip(fresh, expected, strict=False):
        load(arguments, inputs)
        for wanted, got in zip(outputs, call(), strict=True):
            wanted_rows, got_rows = wanted.double(), got.double()
            errors = (got_rows - wanted_rows).norm(dim=-1) / wanted_rows.norm(dim=-1)
            is_finite = is_finite and bool(errors.isfinite().all())
            largest = max(largest, errors.nan_to_num(nan=float("inf")).max().item())
    return {"ok": is_finite and largest <= tolerance, "largest_row_error": largest, "tolerance": tolerance}


def timed(
    bench: Bench, call: Call, arguments: Mapping[str, Any], fresh: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Samples of each figure, and what this backend counted per timed call."""
    import pp_piecewise_backend as ppb

    options, clock = bench.options, Clock(bench.is_cuda)
    samples: dict[str, list[float]] = {name: [] for name in FIGURES}
    until = time.perf_counter() + min(WARM_UP_SECONDS, options.cell_seconds)
    while time.perf_counter() < until:
        clock.time(call, 1)
    before = ppb.stats()
    gc.collect()
    with without_garbage_collection():
        until = time.perf_counter() + options.cell_seconds
        for number in range(options.repeats):
            if number >= min(MIN_REPEATS, options.repeats) and time.perf_counter() > until:
                break
            load(arguments, fresh[number % len(fresh)])
            device_us, host_us = clock.time(call, 1)
            samples["latency_us"].append(device_us)
            samples["host_us"].append(host_us)
        slowest_us = max(samples["latency_us"])
        calls_per_block = min(CALLS_PER_BLOCK, options.repeats, max(10, int(BLOCK_SECONDS * 1e6 / slowest_us)))
        blocks = max(MIN_BLOCKS, options.repeats // 10)
        until = time.perf_counter() + options.cell_seconds
        for number in range(blocks):
            if number >= min(MIN_BLOCKS, blocks) and time.perf_counter() > until:
                break
            load(arguments, fresh[number % len(fresh)])
            device_us, _ = clock.time(call, calls_per_block)
            samples["steady_us"].append(device_us / calls_per_block)
    after = ppb.stats()
    calls = len(samples["latency_us"]) + len(samples["steady_us"]) * calls_per_block
    return samples, {counter: (after[counter] - before[counter]) / calls for counter in COUNTERS}


class Clock:
    """Times calls by CUDA events; without CUDA by the wall clock, where device and host are one."""

    def __init__(self, is_cuda: bool) -> None:
        import torch

        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if is_cuda else []
        self._synchronize = torch.cuda.synchronize if is_cuda else lambda: None

    def time(self, call: Call, calls: int) -> tuple[float, float]:
        """Microseconds on the device and on the host, of all calls together, from an idle device."""
        self._synchronize()
        if self._events:
            self._events[0].record()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        host_us = (time.perf_counter() - started) * 1e6
        if not self._events:
            return host_us, host_us
        self._events[1].record()
        self._synchronize()
        return self._events[0].elapsed_time(self._events[1]) * 1e3, host_us


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def graph_skips() -> int:
    """How often Inductor said that it uses no CUDA graphs although it was asked to."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["cudagraph_skips"])


def failure_of_the_device(options: argparse.Namespace) -> str | None:
    """What is wrong with the device after an error, if it cannot be used any more."""
    import torch

    if options.device != "cuda":
        return None
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def release_memory(options: argparse.Namespace) -> None:
    import torch

    gc.collect()
    if options.device == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def spread_of(values: Sequence[float]) -> dict[str, float]:
    """As `spread`, with the quartiles."""
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {**spread(values), "lower_quartile": quartiles[0], "upper_quartile": quartiles[2]}


# ------------------------------------------------------------------------------------------- reporting


def summarize(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per stage and number of tokens the medians of each method, and its speed over that of each baseline."""
    grouped: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for cell in cells:
        if cell["status"] == "ok":
            grouped.setdefault((cell["stage"], cell["tokens"]), {})[cell["method"]] = cell["microseconds"]
    summary = []
    for (stage, tokens), methods in grouped.items():
        medians = {m: {figure: us[figure]["median"] for figure in FIGURES} for m, us in methods.items()}
        summary.append(
            {
                "stage": stage,
                "tokens": tokens,
                "medians_us": medians,
                "speed_over": {
                    baseline: {
                        method: {figure: medians[baseline][figure] / own[figure] for figure in FIGURES}
                        for method, own in medians.items()
                    }
                    for baseline in BASELINES
                    if baseline in medians
                },
            }
        )
    return summary


def line(cell: Mapping[str, Any]) -> str:
    where = f"{cell['stage']:13} {cell['tokens']:6d} {cell['method']:22}"
    if cell["status"] != "ok":
        return f"{where} {cell['status']}: {cell['reason'].splitlines()[0][:150]}"
    medians = " ".join(f"{name} {cell['microseconds'][name]['median']:9.1f}" for name in FIGURES)
    misses = cell.get("per_call", {}).get("graph_misses", 0)
    remarks = [f"{misses:.1f} misses a call"] * bool(misses) + ["CUDA graphs skipped"] * ("cudagraph_skips" in cell)
    return f"{where} {medians} ({cell['cell_seconds']:.0f} s) {', '.join(remarks)}"


def print_table(summary: Sequence[dict[str, Any]]) -> None:
    for entry in summary:
        print(f"\n{entry['stage']}, {entry['tokens']} tokens; speed over each baseline: latency / steady")
        print(f"{'':22} {'latency':>10} {'steady':>10} {'host us':>10} " + "".join(f"{b[:17]:>18}" for b in BASELINES))
        for method, medians in entry["medians_us"].items():
            ratios = []
            for baseline in BASELINES:
                found = entry["speed_over"].get(baseline, {}).get(method)
                ratios.append("-" if found is None else f"{found['latency_us']:.2f} / {found['steady_us']:.2f}")
            figures = " ".join(f"{medians[figure]:10.1f}" for figure in FIGURES)
            print(f"{method:22} {figures} " + "".join(f"{ratio:>18}" for ratio in ratios))


def plot(cells: Sequence[dict[str, Any]], path: Path) -> Path:
    """Per stage: latency over eager's, and host microseconds, by number of tokens; bars span the quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [cell for cell in cells if cell["status"] == "ok"]
    stages = list(dict.fromkeys(cell["stage"] for cell in good)) or ["nothing measured"]
    figure, panels = pyplot.subplots(2, len(stages), figsize=(6 * len(stages), 9), squeeze=False)
    for column, stage in enumerate(stages):
        for method in METHODS:
            own = sorted((c for c in good if (c["stage"], c["method"]) == (stage, method)), key=lambda c: c["tokens"])
            if not own:
                continue
            tokens = [cell["tokens"] for cell in own]
            for row, name in enumerate(("latency_us", "host_us")):
                us = [cell["microseconds"][name] for cell in own]
                medians = [values["median"] for values in us]
                below = [max(0.0, values["median"] - values["lower_quartile"]) for values in us]
                above = [max(0.0, values["upper_quartile"] - values["median"]) for values in us]
                panels[row][column].errorbar(tokens, medians, (below, above), marker="o", capsize=2, label=method)
        for row, label in enumerate(("latency, microseconds", "host, microseconds per call")):
            panel = panels[row][column]
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xlabel("tokens")
            panel.set_ylabel(label)
            panel.set_title(stage)
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    main(sys.argv[1:])

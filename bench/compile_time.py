"""Seconds until a pipeline stage has run once, by depth: this backend, one compile per piece, stock Inductor.

    python bench/compile_time.py --layers 4 16 64 --repeats 3

Every figure comes from a process of its own. `cold` starts with an empty Inductor cache; `warm` repeats it
with the cache that the cold run left; `off` has Inductor's caches disabled, so that only what this package
shares is shared. What any first compilation pays once (finding the C++ compiler, precompiled headers) is
paid before the clock starts and recorded as `toolchain`.

A run's seconds: `dynamo` (tracing and guards), `split` (all of the backend but compiling), `compile`,
`first_run`, and `total`, their sum. The stock backend has no split.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, TEST_MODELS, run_child, spread, unshared_compiler, write_result

NAME = "compile_time"
METHODS = {
    "pp_piecewise": "each distinct piece once",
    "unshared": "one compile per piece",
    "stock": "the whole graph, stock Inductor",
}
CACHES = ("cold", "warm", "off")
PHASES = ("dynamo", "split", "compile", "first_run")
CHILD_TIMEOUT_SECONDS = 1800.0
TARGET_DEPTH_RATIO = 1.3


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    parameters = {name: getattr(options, name) for name in ("layers", "methods", "caches", "repeats")}
    parameters |= {"hidden": options.hidden, "tokens": options.tokens, "compiler": options.compiler}
    runs: list[dict[str, Any]] = []
    for run in measure(options):
        runs.append(run)
        summary = summarize(runs)
        ratios = depth_ratios(summary)
        # Written after every run: an hour of measuring should survive an interrupt.
        body = {"summary": summary, "ratios": ratios, "runs": runs}
        json_path = write_result(options.output, NAME, parameters, body)
    plot_path = plot(summary, options.output / f"{NAME}.png")
    print_table(summary, ratios)
    print(f"\n{json_path}\n{plot_path}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=["cold", "warm"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--compiler", choices=("inductor", "aot_eager", "eager"), default="inductor")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All runs, repeats outermost, so that a slow minute of the machine falls on every method alike."""
    from tqdm import tqdm

    combinations = list(itertools.product(range(options.repeats), options.layers, options.methods))
    wanted = set(options.caches)
    with tqdm(total=len(combinations) * len(wanted), unit="run") as progress:
        for repeat, layers, method in combinations:
            # A warm run needs a cold one before it, in the same folder, whether or not that is wanted.
            for caches in [name for name in CACHES if name in wanted or (name == "cold" and "warm" in wanted)]:
                if caches != "warm":
                    folder = tempfile.TemporaryDirectory()
                progress.set_postfix_str(f"{method}, {layers} layers, {caches}")
                request = {
                    "method": method,
                    "layers": layers,
                    "hidden": options.hidden,
                    "tokens": options.tokens,
                    "compiler": options.compiler,
                }
                answer = run_child(
                    Path(__file__).resolve(),
                    request,
                    cache_variables(caches, folder.name),
                    CHILD_TIMEOUT_SECONDS,
                )
                if caches in wanted:
                    progress.update()
                    yield {**request, "caches": caches, "repeat": repeat, **answer}


def cache_variables(caches: str, folder: str) -> dict[str, str]:
    variables = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
    return {**variables, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"} if caches == "off" else variables


def run_once(request: dict[str, Any]) -> dict[str, Any]:
    """In the child: compile one stage, run it once, and say where the time went."""
    import torch

    sys.path.insert(0, str(TEST_MODELS))
    from models.toy_stage import NAMED_OPS, ToyStage

    started = time.perf_counter()
    torch.compile(lambda x: x * 2 + 1, backend=request["compiler"])(torch.ones(8))
    toolchain_seconds = time.perf_counter() - started
    torch._dynamo.reset()

    stage = ToyStage(request["layers"], hidden=request["hidden"])
    inputs = stage.make_inputs(request["tokens"])
    for tensor in inputs.values():
        if tensor is not None:
            torch._dynamo.mark_dynamic(tensor, 0)
    compile_graph, counts = METHOD_BACKENDS[request["method"]](request["compiler"], NAMED_OPS)
    backend_seconds: list[float] = []
    run_seconds: list[float] = []

    def timed_backend(graph: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        started = time.perf_counter()
        function = compile_graph(graph, example_inputs)
        backend_seconds.append(time.perf_counter() - started)

        def timed(*arguments: Any) -> Any:
            started = time.perf_counter()
            results = function(*arguments)
            run_seconds.append(time.perf_counter() - started)
            return results

        return timed

    compiled = torch.compile(stage, backend=timed_backend)
    started = time.perf_counter()
    compiled(**inputs)
    total_seconds = time.perf_counter() - started
    (in_backend,), (in_run,) = backend_seconds, run_seconds  # one graph, run once
    counted = counts()
    compile_seconds = counted.pop("compile_seconds", in_backend)
    return {
        "seconds": {
            "toolchain": toolchain_seconds,
            "dynamo": total_seconds - in_backend - in_run,
            "split": in_backend - compile_seconds,
            "compile": compile_seconds,
            "first_run": in_run,
            "total": total_seconds,
        },
        "counts": counted,
    }


Backend = tuple[Callable[..., Any], Callable[[], dict[str, Any]]]
"""What compiles a graph, and what says afterwards how often and how long it compiled."""


def stock_backend(compiler: str, named_ops: Mapping[str, str]) -> Backend:
    import torch

    return torch._dynamo.lookup_backend(compiler), lambda: {"pieces": 1, "pieces_compiled": 1}


def piecewise_backend(compiler: str, named_ops: Mapping[str, str]) -> Backend:
    from pp_piecewise_backend.backend import backend

    return _our_backend(backend, compiler, named_ops)


def unshared_backend(compiler: str, named_ops: Mapping[str, str]) -> Backend:
    from pp_piecewise_backend.backend import PiecewiseBackend

    backend = PiecewiseBackend()
    backend._compiler = unshared_compiler()
    return _our_backend(backend, compiler, named_ops)


def _our_backend(backend: Callable[..., Any], compiler: str, named_ops: Mapping[str, str]) -> Backend:
    import pp_piecewise_backend as ppb

    def compile_graph(graph: Any, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return backend(graph, example_inputs, options={"compiler": compiler, **named_ops})

    def counts() -> dict[str, Any]:
        stats = ppb.stats()
        return {name: stats[name] for name in ("pieces", "pieces_compiled", "compile_seconds")}

    return compile_graph, counts


METHOD_BACKENDS: dict[str, Callable[[str, str], Backend]] = {
    "pp_piecewise": piecewise_backend,
    "unshared": unshared_backend,
    "stock": stock_backend,
}


def summarize(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The spread over the repeats of each phase, per caches, method and depth."""

    def key(run: dict[str, Any]) -> tuple[int, int, int]:
        return CACHES.index(run["caches"]), list(METHODS).index(run["method"]), run["layers"]

    summary = []
    for _, group in itertools.groupby(sorted(runs, key=key), key):
        same = list(group)
        summary.append(
            {
                **{name: same[0][name] for name in ("caches", "method", "layers")},
                "seconds": {
                    phase: spread([run["seconds"][phase] for run in same]) for phase in ("toolchain", *PHASES, "total")
                },
                "counts": same[0]["counts"],
            }
        )
    return summary


def depth_ratios(summary: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compile seconds (medians) at the largest depth over those at the smallest."""
    ratios = []
    for _, group in itertools.groupby(summary, lambda entry: (entry["caches"], entry["method"])):
        entries = list(group)
        shallow, deep = entries[0], entries[-1]
        seconds = [entry["seconds"]["compile"]["median"] for entry in (shallow, deep)]
        ratios.append(
            {
                **{name: shallow[name] for name in ("caches", "method")},
                "layers": [shallow["layers"], deep["layers"]],
                "compile_seconds_ratio": seconds[1] / seconds[0] if seconds[0] else None,
                "target": TARGET_DEPTH_RATIO if shallow["method"] == "pp_piecewise" else None,
            }
        )
    return ratios


def plot(summary: Sequence[dict[str, Any]], path: Path) -> Path:
    """Stacked bars, one panel per state of the caches; the whiskers span the repeats' totals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    states = [caches for caches in CACHES if any(entry["caches"] == caches for entry in summary)]
    bars = max(sum(entry["caches"] == caches for entry in summary) for caches in states)
    figure, panels = pyplot.subplots(1, len(states), figsize=(max(6, bars) * len(states), 4.5), squeeze=False)
    colors = dict(zip(PHASES, ("#9aa5b1", "#e0a458", "#3b6ea5", "#7fb069"), strict=True))
    for panel, caches in zip(panels[0], states, strict=True):
        entries = [entry for entry in summary if entry["caches"] == caches]
        labels = [f"{entry['method']}\n{entry['layers']}" for entry in entries]
        bottoms = [0.0] * len(entries)
        for phase in PHASES:
            heights = [entry["seconds"][phase]["median"] for entry in entries]
            panel.bar(labels, heights, bottom=bottoms, color=colors[phase], label=phase)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        totals = [entry["seconds"]["total"] for entry in entries]
        middles = [(total["min"] + total["max"]) / 2 for total in totals]
        reaches = [(total["max"] - total["min"]) / 2 for total in totals]
        panel.errorbar(labels, middles, yerr=reaches, fmt="none", ecolor="black", capsize=3)
        panel.set_title(f"Inductor caches {caches}")
        panel.set_ylabel("seconds to the end of the first call")
        panel.tick_params(axis="x", labelsize=7)
    panels[0][0].legend()
    figure.suptitle("Toy stage: seconds by depth (layers)")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


def print_table(summary: Sequence[dict[str, Any]], ratios: Sequence[dict[str, Any]]) -> None:
    columns = (*PHASES, "total")
    print(f"{'caches':6} {'method':13} {'layers':>6} " + " ".join(f"{name:>10}" for name in columns) + "  compiled")
    for entry in summary:
        medians = " ".join(f"{entry['seconds'][name]['median']:10.2f}" for name in columns)
        counts = entry["counts"]
        compiled = f"{counts['pieces_compiled']} of {counts['pieces']}"
        print(f"{entry['caches']:6} {entry['method']:13} {entry['layers']:6d} {medians}  {compiled}")
    for ratio in ratios:
        value = ratio["compile_seconds_ratio"]
        shown = "n/a" if value is None else f"{value:.2f}"
        target = "" if ratio["target"] is None else f" (target: at most {ratio['target']})"
        shallow, deep = ratio["layers"]
        which = f"{ratio['caches']}, {ratio['method']}"
        print(f"{which}: compile seconds at {deep} / {shallow} layers = {shown}{target}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        Path(sys.argv[3]).write_text(json.dumps(run_once(json.loads(sys.argv[2]))))
    else:
        main(sys.argv[1:])

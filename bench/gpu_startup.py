"""Seconds and memory until every size of a stage is compiled and captured, next to what else one may use.

    python bench/gpu_startup.py --stage qwen2.5-7b --caches off cold warm

Each figure comes from a process of its own. `cold` starts with an empty Inductor cache, `warm` repeats it with what
the cold run left, `off` has Inductor's caches disabled. The methods:

- `ours`: `warmup()` of this backend for all sizes. `unshared`: the same with one compile per piece.
- `reduce_overhead`: `torch.compile(mode="reduce-overhead")`, called until each size is recorded.

Seconds: `compile` and `capture` as the backend counts them, for `reduce_overhead` the first calls that compile and all
other calls; `total` until everything is done, with tracing and the runs in between. Weights are made, and a first
small kernel is compiled, before the clock starts; the second is recorded as `toolchain`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, plotted, run_child, unshared_compiler, write_result
from compile_time import CACHES, cache_variables

NAME = "gpu_startup"
METHODS = ("ours", "unshared", "reduce_overhead")
NEEDS_CUDA = ("reduce_overhead",)
SIZES_TOKENS = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 2048]
CALLS_UNTIL_RECORDED = 2
"""Of a size, under `reduce-overhead`: the first runs it, the second records it."""


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    parameters = {name: value for name, value in vars(options).items() if name != "output"}
    runs: list[dict[str, Any]] = []
    json_path = options.output / f"{NAME}.json"
    for run in measure(options):
        runs.append(run)
        print(line(run), flush=True)
        # Written after every run: an interrupt loses nothing.
        json_path = write_result(options.output, NAME, parameters, {"ratios": ratios(runs), "runs": runs})
    plot_path = plotted(plot, runs, options.output / f"{NAME}.png")
    for ratio in ratios(runs):
        print(ratio)
    print(f"\n{json_path}\n{plot_path}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    from gpu_stage import SHAPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=SHAPES, default="qwen2.5-7b")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES_TOKENS, help="token counts to capture")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=["off", "cold", "warm"])
    parser.add_argument("--budget-seconds", type=float, default=440.0, help="start no further run after so long")
    parser.add_argument("--context-tokens", type=int, default=512, help="length of each sequence in decode")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--compiler", choices=("inductor", "aot_eager", "eager"), default="inductor")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All runs in the order of `--caches`, so that what the budget cuts off is the last of these."""
    deadline = time.perf_counter() + options.budget_seconds
    with tempfile.TemporaryDirectory() as root:
        for caches in options.caches:
            for method in options.methods:
                run = {"caches": caches, "method": method}
                if method in NEEDS_CUDA and options.device != "cuda":
                    yield {**run, "status": "skipped", "reason": "needs CUDA"}
                    continue
                folder = f"{root}/{method}" if caches != "off" else f"{root}/{method}_off"
                request = {
                    **{name: getattr(options, name) for name in ("stage", "sizes", "device", "compiler")},
                    "context_tokens": options.context_tokens,
                    "method": method,
                }
                script, variables = Path(__file__).resolve(), cache_variables(caches, folder)
                try:
                    if caches == "warm" and "cold" not in options.caches[: options.caches.index("warm")]:
                        run_child(script, request, variables, seconds_left(deadline))
                    answer = {"status": "ok", **run_child(script, request, variables, seconds_left(deadline))}
                except TimeoutError as error:
                    answer = {"status": "not started", "reason": str(error)}
                except Exception as error:
                    answer = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
                yield {**run, **answer}


def seconds_left(deadline: float) -> float:
    """For a child, which gets a minute more than what is left: it is worth the wait once it has begun."""
    left = deadline - time.perf_counter()
    if left <= 0:
        raise TimeoutError("the budget is spent")
    return left + 60.0


def run_once(request: dict[str, Any]) -> dict[str, Any]:
    """In the child: make a stage, compile and capture it for all sizes, and say what that took."""
    import torch
    from gpu_stage import SHAPES, GPUStage

    is_cuda = request["device"] == "cuda"
    started = time.perf_counter()
    torch.compile(lambda x: x * 2 + 1, backend=request["compiler"])(torch.ones(8, device=request["device"]))
    toolchain_seconds = time.perf_counter() - started
    torch._dynamo.reset()

    stage = GPUStage(
        SHAPES[request["stage"]],
        max(request["sizes"]),
        context_tokens=request["context_tokens"],
        device=request["device"],
        dtype=torch.bfloat16 if is_cuda else torch.float32,
    )
    if is_cuda:
        torch.backends.cuda.enable_cudnn_sdp(False)  # as in gpu_latency.py
        torch.mm(*(torch.ones(8, 8, device="cuda") for _ in range(2)))  # makes cuBLAS's workspace
        torch.cuda.synchronize()
    memory_before = device_memory(is_cuda)
    started = time.perf_counter()
    with torch.inference_mode():
        found = start_reduce_overhead(stage, request) if request["method"] == "reduce_overhead" else (
            start_ours(stage, request)
        )  # fmt: skip
    if is_cuda:
        torch.cuda.synchronize()
    total_seconds = time.perf_counter() - started
    memory = {name: after - memory_before[name] for name, after in device_memory(is_cuda).items()}
    return {
        "seconds": {"toolchain": toolchain_seconds, **found.pop("seconds"), "total": total_seconds},
        "bytes": {**found.pop("bytes"), **memory},
        "counts": found,
    }


def start_ours(stage: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    import torch
    from gpu_stage import NAMED_OPS

    import pp_piecewise_backend as ppb
    from pp_piecewise_backend.backend import backend

    if request["method"] == "unshared":
        backend._compiler = unshared_compiler()
    options = {
        "compiler": request["compiler"],
        **NAMED_OPS,
        "mode": "piecewise",
        "graphs": "cuda" if request["device"] == "cuda" else "emulate",
        "capture_sizes": request["sizes"],
        "max_tokens": max(request["sizes"]),
    }
    compiled = torch.compile(stage, backend="pp_piecewise", options=options)
    ppb.warmup(compiled, lambda tokens: ((), inputs_for(stage, tokens)))
    stats = ppb.stats()
    return {
        "seconds": {"compile": stats.compile_seconds, "capture": stats.capture_seconds},
        "bytes": {"graphs": stats.graph_bytes, "static": stats.static_bytes},
        **{name: stats[name] for name in ("programs", "pieces", "pieces_compiled", "captures")},
    }


def start_reduce_overhead(stage: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    import torch
    from torch._dynamo.utils import counters

    compiled = torch.compile(stage, mode="reduce-overhead")
    sizes = sorted(set(request["sizes"]), reverse=True)
    started = time.perf_counter()
    first_calls = [sizes[0]] + [1] * (1 in sizes)  # a program for one token, another for all other sizes
    for tokens in first_calls:
        compiled(**inputs_for(stage, tokens))
    compile_seconds = time.perf_counter() - started
    for tokens in sizes:
        for _ in range(CALLS_UNTIL_RECORDED):
            torch.compiler.cudagraph_mark_step_begin()
            compiled(**inputs_for(stage, tokens))
    torch.cuda.synchronize()
    return {
        "seconds": {"compile": compile_seconds, "capture": time.perf_counter() - started - compile_seconds},
        "bytes": {},
        "graph_skips": int(counters["inductor"]["cudagraph_skips"]),
    }


def inputs_for(stage: Any, tokens: int) -> dict[str, Any]:
    """Keyword arguments for a call, with the metadata that it needs set."""
    import torch
    from gpu_stage import set_metadata

    set_metadata(stage.metadata(tokens))
    inputs: dict[str, Any] = stage.make_inputs(tokens)
    if tokens > 1:
        for tensor in inputs.values():
            torch._dynamo.mark_dynamic(tensor, 0)
    return inputs


def device_memory(is_cuda: bool) -> dict[str, int]:
    """What the process has taken from the device, by its allocator and in all; nothing that is free is counted."""
    import torch

    if not is_cuda:
        return {}
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return {"reserved": torch.cuda.memory_reserved(), "device": total - free}


def ratios(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds and memory of `ours` over those of each other method, per state of the caches."""
    found = []
    good = {(run["caches"], run["method"]): run for run in runs if run["status"] == "ok"}
    for (caches, method), run in good.items():
        ours = good.get((caches, "ours"))
        if method == "ours" or ours is None:
            continue
        compile_and_capture = [sum(r["seconds"][name] for name in ("compile", "capture")) for r in (ours, run)]
        reserved = [r["bytes"].get("reserved", 0) for r in (ours, run)]
        found.append(
            {
                "caches": caches,
                "ours_over": method,
                "compile_and_capture": compile_and_capture[0] / compile_and_capture[1],
                "total": ours["seconds"]["total"] / run["seconds"]["total"],
                "reserved_bytes": reserved[0] / reserved[1] if reserved[1] else None,
            }
        )
    return found


def line(run: Mapping[str, Any]) -> str:
    where = f"{run['caches']:5} {run['method']:16}"
    if run["status"] != "ok":
        return f"{where} {run['status']}: {run['reason']}"
    seconds = " ".join(f"{name} {value:7.2f} s" for name, value in run["seconds"].items())
    memory = " ".join(f"{name} {value / 2**20:.0f} MiB" for name, value in run["bytes"].items())
    return f"{where} {seconds}; {memory}; {run['counts']}"


def plot(runs: Sequence[dict[str, Any]], path: Path) -> Path:
    """Stacked bars: compile, capture and the rest of the seconds, per state of the caches and method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [run for run in runs if run["status"] == "ok"]
    labels = [f"{run['method']}\ncaches {run['caches']}" for run in good]
    figure, panel = pyplot.subplots(figsize=(max(6, 1.3 * len(good)), 4.5))
    bottoms = [0.0] * len(good)
    parts = {name: [run["seconds"][name] for run in good] for name in ("compile", "capture")}
    parts["other"] = [run["seconds"]["total"] - run["seconds"]["compile"] - run["seconds"]["capture"] for run in good]
    for (name, heights), color in zip(parts.items(), ("#3b6ea5", "#7fb069", "#9aa5b1"), strict=True):
        panel.bar(labels, heights, bottom=bottoms, color=color, label=name)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    panel.set_ylabel("seconds until all sizes are captured")
    panel.tick_params(axis="x", labelsize=7)
    panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        Path(sys.argv[3]).write_text(json.dumps(run_once(json.loads(sys.argv[2]))))
    else:
        main(sys.argv[1:])

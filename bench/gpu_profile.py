"""What one step of a stage does on a GPU: a profile of two stages in one process, and what must not be in it.

    python bench/gpu_profile.py --stage qwen2.5-7b --tokens 8

Two stages of `gpu_stage.py` hand micro-batches over through `StageRunner` and the `local` transport, each in a thread
and on a stream of its own. After warm-up a few micro-batches are profiled. Written are the trace, for Perfetto, and
what was found in it:

- `synchronisations`, `allocations`: calls of the CUDA runtime that wait for the device, or take memory from it.
- `copies_per_micro_batch`: copies from memory to memory; two proxies make two, each from where the first stage wrote
  it to where the second one reads it. Copies within attention are kernels, and not among them.
- `copies_beside_a_kernel`: those during which a kernel ran: proxies that land while a stage computes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, write_result
from gpu_handoff import Pair, two_threads

NAME = "gpu_profile"
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
TAKES = ("cudaMalloc", "cudaMallocAsync", "cudaHostAlloc", "cuMemCreate", "cudaFree")
MEMORY_TO_MEMORY = "Memcpy DtoD"


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device, and there is nothing to see without one")
    torch._dynamo.config.recompile_limit = 64
    pair = Pair(options)
    events = traced(pair, options.tokens[0], options.output)
    parameters = {name: value for name, value in vars(options).items() if name != "output"}
    found = findings(events, options.micro_batches)
    print(json.dumps(found, indent=1))
    print(write_result(options.output, NAME, parameters, found))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    from gpu_stage import SHAPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=SHAPES, default="qwen2.5-7b")
    parser.add_argument("--tokens", type=int, nargs=1, default=[8])
    parser.add_argument("--micro-batches", type=int, default=8, help="so many are profiled")
    parser.add_argument("--context-tokens", type=int, default=512)
    parser.add_argument("--compiler", default="inductor")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(arguments, argparse.Namespace(device="cuda"))


def traced(pair: Pair, tokens: int, folder: Path) -> list[dict[str, Any]]:
    """The events of the steady state, which are also left as a compressed trace in the folder."""
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    two_threads(pair, [(tokens, 3)], profiler)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "trace.json"
        profiler.export_chrome_trace(str(path))
        text = path.read_text()
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / f"{NAME}_trace.json.gz", "wt") as out:
        out.write(text)
    events: list[dict[str, Any]] = json.loads(text)["traceEvents"]
    return events


def findings(events: Sequence[Mapping[str, Any]], micro_batches: int) -> dict[str, Any]:
    """What the docstring of this module names, from the events of a Chrome trace of torch.profiler."""
    runtime = [event["name"] for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    copies = [
        event for event in events if event.get("cat") == "gpu_memcpy" and event["name"].startswith(MEMORY_TO_MEMORY)
    ]
    return {
        "micro_batches": micro_batches,
        "synchronisations": {name: count for name in WAITS if (count := runtime.count(name))},
        "allocations": {name: count for name in TAKES if (count := runtime.count(name))},
        "copies_per_micro_batch": len(copies) / micro_batches,
        "copied_bytes_per_micro_batch": sum(event["args"].get("bytes", 0) for event in copies) / micro_batches,
        "kernels_per_micro_batch": len(kernels) / micro_batches,
        "copies_beside_a_kernel": sum(any(overlap(copy, kernel) for kernel in kernels) for copy in copies),
    }


def overlap(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two events of the device run at the same time for a while."""
    return bool(one["ts"] < other["ts"] + other["dur"] and other["ts"] < one["ts"] + one["dur"])


if __name__ == "__main__":
    main(sys.argv[1:])

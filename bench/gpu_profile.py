"""What one step of a stage does on a GPU: a profile of two stages in one process, and what must not be in it.

    python bench/gpu_profile.py --stage qwen2.5-7b --tokens 8

Two stages of `gpu_stage.py` hand micro-batches over through `StageRunner` and the `local` transport, each in a thread
and on a stream of its own. After warm-up a few micro-batches are profiled. Written are the trace, for Perfetto, and
what was found in it:

- `synchronisations`, `allocations`: calls of the CUDA runtime that wait for the device, or take memory from it. What
  the profiler itself does behind the last launch is left out.
- `hand_over_copies`: copies on the stream between the stages, which runs nothing else: two proxies make two for each
  micro-batch, from where the first stage wrote them to where the second one reads them.
- `landing_in_a_forward`: of these, how many began while the second stage ran the forward before.
- `copies_in_the_second_stage`: bytes -> copies for each of its forwards. Of the size of a proxy are what attention
  writes to its output argument, one per layer, and the two results, which a last stage hands to its caller; the
  positions are the small ones. A third kind would be a copy on the way of a proxy into the pieces.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import RESULTS, write_result
from gpu_handoff import Pair, two_threads

NAME = "gpu_profile"
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
TAKES = ("cudaMalloc", "cudaMallocAsync", "cudaHostAlloc", "cuMemCreate", "cudaFree")
MEMORY_TO_MEMORY = ("Memcpy DtoD", "Memcpy PtoP")
PIECE = "ppb.piece["


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device, and there is nothing to see without one")
    torch._dynamo.config.recompile_limit = 64
    pair = Pair(options)
    events = traced(pair, options.tokens[0], options.output)
    parameters = {name: value for name, value in vars(options).items() if name != "output"}
    found = findings(events)
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
        whole: dict[str, Any] = json.loads(path.read_text())
    whole.pop("traceName", None)  # a path of this machine
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / f"{NAME}_trace.json.gz", "wt") as out:
        json.dump(whole, out)
    events: list[dict[str, Any]] = whole["traceEvents"]
    return events


def findings(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the docstring of this module names, from the events of a Chrome trace of torch.profiler.

    The profiler was started in the thread of the second stage, so the steps that it names are those of that stage. What
    runs on the device has its stream for a thread.
    """
    calls = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    last_launch = max((event["ts"] for event in calls if "Launch" in event["name"]), default=0.0)
    served = [event["name"] for event in calls if event["ts"] <= last_launch]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    copies = [e for e in events if e.get("cat") == "gpu_memcpy" and e["name"].startswith(MEMORY_TO_MEMORY)]
    steps = [e for e in events if e.get("cat") == "gpu_user_annotation" and e["name"].startswith(PIECE)]
    streams = {event["tid"] for event in kernels}
    forwards = forwards_of(steps)
    between = [copy for copy in copies if copy["tid"] not in streams]
    own_stream = {event["tid"] for event in steps}
    own: Counter[int] = Counter(copy["args"]["bytes"] for copy in copies if copy["tid"] in own_stream)
    return {
        "forwards_of_the_second_stage": len(forwards),
        "synchronisations": {name: count for name in WAITS if (count := served.count(name))},
        "allocations": {name: count for name in TAKES if (count := served.count(name))},
        "hand_over_copies": len(between),
        "landing_in_a_forward": sum(any(begin <= copy["ts"] <= end for begin, end in forwards) for copy in between),
        "copies_in_the_second_stage": {str(size): count / len(forwards) for size, count in sorted(own.items())},
        "kernels_in_the_second_stage": sum(e["tid"] in own_stream for e in kernels) / len(forwards),
    }


def forwards_of(steps: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Begin and end of each forward on the device, from its first piece to its last."""
    ordered = sorted(steps, key=lambda event: float(event["ts"]))
    firsts = [at for at, event in enumerate(ordered) if event["name"] == f"{PIECE}0]"]
    groups = [ordered[at:next_at] for at, next_at in pairwise([*firsts, len(ordered)])]
    return [(group[0]["ts"], max(event["ts"] + event["dur"] for event in group)) for group in groups]


if __name__ == "__main__":
    main(sys.argv[1:])

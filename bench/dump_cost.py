"""What a dump costs: seconds and bytes for a stage, and nanoseconds of a call with dumping on against off.

    python bench/dump_cost.py [--layers 32] [--compiler inductor] [--output bench/results]

The seconds are measured around everything that writes, so they are what a dump adds to compilation. What depyf takes is
given by itself. The calls of both programs alternate in one process, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, TEST_MODELS, spread, write_result

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
sys.path.insert(0, str(TEST_MODELS))

import torch

from models.toy_stage import NAMED_OPS, ToyStage
from pp_piecewise_backend.backend import backend
from pp_piecewise_backend.debug import dump, dynamo_frame


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--calls", type=int, default=300, help="timed calls with dumping on, and as many off")
    parser.add_argument("--compiler", default="inductor")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        seconds = _Stopwatch()
        seconds.watch(dump.ProgramDump, ["traced", "split", "compiled", "reused", "built", "refresh"])
        seconds.watch(dynamo_frame, ["decompile"])
        on = _program(options, dump_dir=folder)
        backend.dumps.finish()
        off = _program(options)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        body = {
            "summary": {
                "dump_seconds": seconds.of("traced", "split", "compiled", "reused", "built", "refresh"),
                "depyf_seconds": seconds.of("decompile"),
                "dump_bytes": sum(path.stat().st_size for path in files if path.name != dynamo_frame.TRANSFORMED_CODE),
                "depyf_bytes": sum(path.stat().st_size for path in files if path.name == dynamo_frame.TRANSFORMED_CODE),
                "programs": 1,
                "call_seconds": _call_seconds(options, {"dumping": on, "not dumping": off}),
            }
        }
    parameters = {name: getattr(options, name) for name in ("layers", "tokens", "calls", "compiler")}
    print(body["summary"])
    print(write_result(options.output, "dump_cost", parameters, body))


class _Stopwatch:
    """Adds up the time spent in functions, the inner ones of nested calls not counted twice."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._depth = 0

    def watch(self, owner: Any, names: list[str]) -> None:
        for name in names:
            setattr(owner, name, self._watched(getattr(owner, name), name))

    def of(self, *names: str) -> float:
        return sum(self._seconds.get(name, 0.0) for name in names)

    def _watched(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begin, self._depth = time.perf_counter(), self._depth + 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin

        return run


def _program(options: argparse.Namespace, **more: Any) -> tuple[ToyStage, Callable[..., Any]]:
    stage = ToyStage(options.layers, last=True)
    own_options = {"compiler": options.compiler, **NAMED_OPS, **more}
    run = torch.compile(stage, backend="pp_piecewise", options=own_options)
    run(**stage.make_inputs(options.tokens))
    return stage, run


def _call_seconds(options: argparse.Namespace, programs: dict[str, Any]) -> dict[str, Any]:
    """Time of a call of each program; they take turns."""
    taken: dict[str, list[float]] = {name: [] for name in programs}
    inputs = {name: stage.make_inputs(options.tokens) for name, (stage, _) in programs.items()}
    for _ in range(options.calls + 20):
        for name, (_, run) in programs.items():
            begin = time.perf_counter()
            run(**inputs[name])
            taken[name].append(time.perf_counter() - begin)
    return {name: spread(values[20:]) for name, values in taken.items()}


if __name__ == "__main__":
    main()

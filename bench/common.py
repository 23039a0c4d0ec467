"""What the benchmarks share: the record of where they ran, spreads, child processes, the result files."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "bench" / "results"
TEST_MODELS = REPOSITORY / "tests"
"""Put on `sys.path`, it makes `models` importable: the models that tests and benchmarks share."""

_PACKAGES = ("pp_piecewise_backend", "torch", "triton", "transformers", "numpy")
_VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TORCHINDUCTOR_COMPILE_THREADS", "CXX")


def environment() -> dict[str, Any]:
    """Versions, device and settings: everything but the code that a figure depends on."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor_name(),
        "logical_cores": os.cpu_count(),
        "load_average_1min": os.getloadavg()[0],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cuda": torch.version.cuda,
        "torch_threads": torch.get_num_threads(),
        "cxx_compiler": _first_line([os.environ.get("CXX", "c++"), "--version"]),
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def unshared_compiler() -> Any:
    """Compiles each piece again. No option turns sharing off: nobody else wants that."""
    from pp_piecewise_backend.compilation.inductor import PieceCompiler

    class Unshared(PieceCompiler):
        def compile(self, *arguments: Any) -> Any:
            self.reset()
            return super().compile(*arguments)

    return Unshared()


def command_line() -> str:
    """The command that this process was started with, from the root of the repository; not where its output went."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(REPOSITORY) if script.is_relative_to(REPOSITORY) else script.name
    arguments = sys.argv[1:]
    if "--output" in arguments:
        at = arguments.index("--output")
        arguments = arguments[:at] + arguments[at + 2 :]
    return shlex.join(["python", str(shown), *arguments])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, extremes and number of `values`, in the unit of the values."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "count": len(values),
    }


def run_child(
    script: Path, request: Mapping[str, Any], variables: Mapping[str, str], timeout_seconds: float
) -> dict[str, Any]:
    """Run `script --child REQUEST ANSWER` in a process of its own; returns the JSON it wrote to ANSWER.

    `variables` are added to this process's environment. Raises RuntimeError, with the end of what the child
    printed, when it fails, and subprocess.TimeoutExpired when it takes too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        child = subprocess.run(
            [sys.executable, str(script), "--child", json.dumps(request), str(answer)],
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_seconds,
        )
        if child.returncode != 0:
            raise RuntimeError(
                f"the run {dict(request)} ended with exit code {child.returncode}:\n{child.stdout[-4000:]}"
            )
        result: dict[str, Any] = json.loads(answer.read_text())
        return result


def run_ranks(
    script: Path,
    request: Mapping[str, Any],
    rank_count: int,
    timeout_seconds: float,
    meanwhile: Callable[[Path], None] = lambda folder: None,
) -> list[Any]:
    """Run `script REQUEST FOLDER` in one process per rank at once; the JSON that each wrote to FOLDER/answer_RANK.json.

    Ranks find RANK and WORLD_SIZE in their environment, and may meet at a file in FOLDER. `meanwhile(FOLDER)` is called
    again and again while they run, and once when they have ended, well or not. Raises RuntimeError, with the end of
    what each rank printed, as soon as one fails, or when they take too long.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        logs = [folder / f"rank_{rank}.log" for rank in range(rank_count)]
        ranks = []
        for rank, log in enumerate(logs):
            variables = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(rank_count), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, str(script), json.dumps(request), str(folder)]
            with log.open("w") as out:
                ranks.append(subprocess.Popen(command, env=variables, stdout=out, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + timeout_seconds
        try:
            while any(rank.poll() is None for rank in ranks):
                if time.monotonic() > deadline or any(rank.poll() for rank in ranks):
                    break
                meanwhile(folder)
                time.sleep(0.05)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
            meanwhile(folder)
        if any(rank.returncode for rank in ranks):
            printed = "\n".join(f"--- {log.stem}\n{log.read_text()[-3000:]}" for log in logs)
            raise RuntimeError(f"the ranks ended with exit codes {[rank.returncode for rank in ranks]}:\n{printed}")
        return [json.loads((folder / f"answer_{rank}.json").read_text()) for rank in range(rank_count)]


def write_result(folder: Path, name: str, parameters: Mapping[str, Any], body: Mapping[str, Any]) -> Path:
    """Write `name`.json into `folder` (made if missing): where and how it ran, then `body`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    result = {
        "benchmark": name,
        "command": command_line(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "parameters": dict(parameters),
        **body,
    }
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def plotted(plot: Callable[[Any, Path], Path], data: Any, path: Path) -> Path | str:
    """Where `plot` put the picture of `data`; where matplotlib is missing, a sentence that says so."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return f"no {path.name}: matplotlib is not installed"
    return plot(data, path)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _first_line(command: Sequence[str]) -> str | None:
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return output.splitlines()[0] if output else None

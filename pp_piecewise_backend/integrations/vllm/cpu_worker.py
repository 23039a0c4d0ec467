"""The worker that vLLM is given on the CPU, where graphs are emulated: for tests."""

from __future__ import annotations

# vLLM's own has to come first: it sets up shared memory.
from vllm.v1.worker.cpu_worker import CPUWorker

from .worker import PiecewiseWorker


class PiecewiseCPUWorker(PiecewiseWorker, CPUWorker):  # type: ignore[misc]
    """vLLM's worker with landing memory and captured pieces."""

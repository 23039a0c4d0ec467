"""The worker that vLLM is given on GPUs."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from .worker import PiecewiseWorker


class PiecewiseGPUWorker(PiecewiseWorker, Worker):  # type: ignore[misc]
    """vLLM's worker with landing memory and captured pieces."""

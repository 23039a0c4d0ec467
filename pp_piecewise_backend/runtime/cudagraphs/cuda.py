"""CUDA graphs and the pools that they allocate from: the only door to ``torch.cuda``'s graphs."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ...utils import torch_compat
from ...utils.addresses import MemoryMap
from .device import CaptureError, PieceCall, released


class CudaPool:
    """A private pool of the CUDA caching allocator; its memory goes back when its last graph is released.

    The allocator forgets a pool then, and refuses its id from there on [ran, 2.11], so the next graph begins another.
    """

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self.graphs = 0
        """How many graphs hold it."""

    def begin(self) -> Any:
        """The id to capture with."""
        if self.graphs == 0:
            self.handle = torch.cuda.graph_pool_handle()
        return self.handle

    @property
    def held_bytes(self) -> int:
        if self.graphs == 0:
            return 0
        return sum(
            segment["total_size"]
            for segment in torch.cuda.memory_snapshot()
            if tuple(segment["segment_pool_id"]) == tuple(self.handle)
        )


class CudaGraph:
    """One captured piece on CUDA."""

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Sequence[Any], inputs: MemoryMap, pool: CudaPool) -> None:
        self._graph = graph
        self._pool: CudaPool | None = pool
        pool.graphs += 1
        self.replay = graph.replay
        self._strong: list[Any] = [o if isinstance(o, torch.Tensor) and not inputs.holds(o) else None for o in outputs]
        self.outputs = [torch_compat.tensor_without_ownership(o) if isinstance(o, torch.Tensor) else o for o in outputs]

    def release_output(self, index: int) -> None:
        if self._strong:
            self._strong[index] = None

    def release(self) -> None:
        self._strong = []
        self.outputs = []
        self.replay = released
        self._graph.reset()
        if self._pool is not None:
            self._pool.graphs -= 1
            self._pool = None


class CudaDevice:
    """Real CUDA graphs on the current device."""

    def new_pool(self) -> CudaPool:
        return CudaPool()

    def warm_up(self, call: Callable[[], Any]) -> Any:
        with self._on_side_stream():
            return call()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def capture(self, call: PieceCall, inputs: Sequence[Any], pool: CudaPool) -> CudaGraph:
        graph = torch.cuda.CUDAGraph()
        outputs: Sequence[Any] | None = None
        try:
            with self._on_side_stream(), _no_garbage_collection():
                graph.capture_begin(pool=pool.begin(), capture_error_mode="thread_local")
                try:
                    outputs = call(inputs)
                finally:
                    graph.capture_end()
        except Exception as error:
            outputs = None
            with contextlib.suppress(Exception):
                graph.reset()
            # An error inside a capture stays pending in CUDA until somebody asks for it.
            with contextlib.suppress(Exception):
                torch.cuda.synchronize()
            raise CaptureError(f"{type(error).__name__}: {error}") from error
        return CudaGraph(graph, outputs, MemoryMap.of(inputs), pool)

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    @contextlib.contextmanager
    def _on_side_stream(self) -> Iterator[None]:
        side, current = _side_stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                yield
        finally:
            current.wait_stream(side)


_SIDE_STREAMS = threading.local()


def _side_stream() -> torch.cuda.Stream:
    """The stream on which this thread captures; one for all, since cuBLAS keeps a workspace for each stream [ran]."""
    streams: dict[str, torch.cuda.Stream] = _SIDE_STREAMS.__dict__
    device = f"cuda:{torch.cuda.current_device()}"
    if device not in streams:
        streams[device] = torch.cuda.Stream()
    return streams[device]


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    # A collection in the middle of a capture may free CUDA memory, which a capture forbids.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

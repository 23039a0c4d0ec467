"""CUDA graphs and the pools that they allocate from: the only door to ``torch.cuda``'s graphs.

Note [workspaces that stay]
cuBLAS has a workspace for each handle (so each thread) and stream, in memory of the caching allocator, and a graph uses
for ever the one that it was captured with. PyTorch frees them all on request, and ``mode="reduce-overhead"`` asks for
it at each of its captures: graphs that were captured before then write into memory of others, or into none [ran, H200:
an illegal access in our replay]. To do the same in our captures would break the graphs of others. So the workspace of
the stream on which a thread captures comes from a memory pool that is never given up and that nothing else allocates
from: where it is freed, no other tensor gets it. One stream for all programs of a thread, since a workspace has 32 MiB.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ...utils import torch_compat
from ...utils.addresses import MemoryMap
from .device import CaptureError, PieceCall, in_parts, released, replay_of


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

    def __init__(
        self,
        graphs: Sequence[torch.cuda.CUDAGraph],
        borders: list[Any],
        outputs: Sequence[Any],
        inputs: MemoryMap,
        pools: Sequence[CudaPool],
    ) -> None:
        self._graphs = graphs
        self._pools = pools
        """Of each graph."""
        for pool in pools:
            pool.graphs += 1
        self.parts: list[Callable[[], None]] = [graph.replay for graph in graphs]
        self.borders = borders
        self.replay = replay_of(self.parts)
        self._strong: list[Any] = [o if isinstance(o, torch.Tensor) and not inputs.holds(o) else None for o in outputs]
        self.outputs = [torch_compat.tensor_without_ownership(o) if isinstance(o, torch.Tensor) else o for o in outputs]

    def release_output(self, index: int) -> None:
        if self._strong:
            self._strong[index] = None

    def release(self) -> None:
        self._strong = []
        self.outputs, self.parts = [], []
        self.replay = released
        for graph in self._graphs:
            graph.reset()
        for pool in self._pools:
            pool.graphs -= 1
        self._pools = ()


class CudaDevice:
    """Real CUDA graphs on the current device."""

    def new_pool(self) -> CudaPool:
        return CudaPool()

    def warm_up(self, call: Callable[[], Any]) -> Any:
        with _side_stream():
            return call()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def capture(
        self,
        call: PieceCall,
        inputs: Sequence[Any],
        pool: CudaPool,
        pool_after: Callable[[list[Any]], CudaPool] | None = None,
    ) -> CudaGraph:
        pools = [pool]
        handles = {pool: pool.begin()}
        graphs: list[torch.cuda.CUDAGraph] = []
        borders: list[Any] = []
        outputs: Sequence[Any] | None = None
        try:
            with _side_stream(), _no_garbage_collection(), torch_compat.no_cached_casts():
                running = in_parts(call, inputs)
                while outputs is None:
                    graphs.append(torch.cuda.CUDAGraph())
                    graphs[-1].capture_begin(pool=handles[pools[-1]], capture_error_mode="thread_local")
                    try:
                        borders.append(next(running))
                    except StopIteration as end:
                        outputs = end.value
                    finally:
                        _end(graphs[-1], handles[pools[-1]])
                    if outputs is None:
                        pools.append(pool if pool_after is None else pool_after(borders))
                        if pools[-1] not in handles:
                            handles[pools[-1]] = pools[-1].begin()
        except Exception as error:
            outputs = None
            for graph in graphs:
                with contextlib.suppress(Exception):
                    graph.reset()
            # An error inside a capture stays pending in CUDA until somebody asks for it.
            with contextlib.suppress(Exception):
                torch.cuda.synchronize()
            raise CaptureError(f"{type(error).__name__}: {error}") from error
        return CudaGraph(graphs, borders, outputs, MemoryMap.of(inputs), pools)

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()


def _end(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    try:
        graph.capture_end()
    except Exception:
        torch_compat.end_failed_capture(pool)
        raise


_STREAMS_OF_THREAD = threading.local()
_STREAM_CHOICES = 32
"""So many streams does PyTorch have to give out; somebody else may have computed on some of them."""
_KEPT_WORKSPACES: list[torch.cuda.MemPool] = []


class _CaptureStream:
    """The stream on which one thread captures on one GPU, see Note [workspaces that stay]."""

    def __init__(self) -> None:
        self._workspaces = torch.cuda.MemPool()
        _KEPT_WORKSPACES.append(self._workspaces)
        self._stream = torch.cuda.Stream()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Makes it the current stream, after what is enqueued on the current one, which then waits for it.

        Raises `CaptureError` if the workspace of every stream lies in memory of others.
        """
        for _ in range(_STREAM_CHOICES + 1):
            with self._in_order():
                if self._workspace_is_kept():
                    yield
                    return
            self._stream = torch.cuda.Stream()
        raise CaptureError("cuBLAS has workspaces in memory that may be freed on each stream that PyTorch gives out")

    @contextlib.contextmanager
    def _in_order(self) -> Iterator[None]:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def _workspace_is_kept(self) -> bool:
        """Has cuBLAS make its workspaces here, where it has none; False if it has some of before."""
        with torch.cuda.use_mem_pool(self._workspaces), torch.autocast("cuda", enabled=False):
            square = torch.zeros(16, 16, device="cuda")
            # The second one is computed by cuBLASLt.
            torch.addmm(square[0], square @ square, square)
            del square
        return any(
            block["state"] == "active_allocated"
            for segment in self._workspaces.snapshot()
            for block in segment["blocks"]
        )


def _side_stream() -> contextlib.AbstractContextManager[None]:
    streams: dict[str, _CaptureStream] = _STREAMS_OF_THREAD.__dict__
    device = f"cuda:{torch.cuda.current_device()}"
    if device not in streams:
        streams[device] = _CaptureStream()
    return streams[device].entered()


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

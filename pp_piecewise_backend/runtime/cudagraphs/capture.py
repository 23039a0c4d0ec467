"""Capturing one piece into a graph and replaying it: on CUDA, and emulated on any device.

Both devices follow one protocol, so that what is tested on a CPU is what runs on a GPU. A captured graph reads and
writes fixed addresses only. Memory that it allocates comes from a pool; whoever captures says which outputs are still
to be read (``CapturedGraph.release_output``), and memory of the others serves later captures of the same pool.

Note [release order]
Graphs first, then the pools that they allocate from, then static buffers that they read, then process groups whose
collectives they hold. The reverse order leaves a graph with addresses of freed memory.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

from ...utils import torch_compat
from .memory import allocate, assign, tensor_in

SCRIBBLE_BYTE = 0xFF
"""What emulation writes over memory that a real graph might overwrite: NaN as a float, -1 as an integer."""

PieceCall = Callable[[Sequence[Any]], Sequence[Any]]


class CaptureError(Exception):
    """A piece cannot be captured; the message says why."""


class CapturedGraph(Protocol):
    """A captured piece. Its outputs have fixed addresses; who reads them is the capturer's to know."""

    outputs: list[Any]
    """Output tensors, which own no memory: valid from one replay until a later graph of the pool reuses the memory."""
    replay: Callable[[], None]

    def release_output(self, index: int) -> None:
        """Say that nothing captured from now on may find this output's memory in use."""

    def release(self) -> None:
        """Forget the graph; see Note [release order]."""


class Pool(Protocol):
    """Memory of a set of graphs that are replayed in the order of their capture, one at a time."""

    @property
    def held_bytes(self) -> int: ...


class Device(Protocol):
    """Where graphs live."""

    name: str

    def new_pool(self) -> Pool: ...

    def capture(self, call: PieceCall, inputs: Sequence[Any], pool: Any) -> CapturedGraph:
        """Record what ``call`` does to ``inputs``. The outputs hold no values until the first replay.

        Raises:
            CaptureError: the piece does what no graph can hold.
        """

    def warm_up(self, call: Callable[[], Any]) -> Any:
        """Run what is about to be captured once, where it may still load kernels and allocate."""

    def is_capturing(self) -> bool:
        """Whether a capture is under way in this thread, by whomever."""

    def synchronize(self) -> None:
        """Return when all that was enqueued has run."""


def make_device(kind: str, compiler_runs_ops: bool) -> Device:
    """The device for ``graphs="cuda"`` or ``"emulate"``.

    Args:
        compiler_runs_ops: whether compiled pieces consist of PyTorch ops, which emulation can record one by one.
    """
    return CudaDevice() if kind == "cuda" else EmulatedDevice(compiler_runs_ops)


# ------------------------------------------------------------------------------------------ CUDA


class CudaPool:
    """A private pool of the CUDA caching allocator; its memory goes back when its last graph is released.

    The allocator forgets a pool then, and refuses its id from there on [ran, 2.11], so the next graph begins another.
    """

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self._graphs = 0

    def begin(self) -> Any:
        """The id to capture with."""
        if self._graphs == 0:
            self.handle = torch.cuda.graph_pool_handle()
        return self.handle

    def hold(self) -> None:
        self._graphs += 1

    def let_go(self) -> None:
        self._graphs -= 1

    @property
    def held_bytes(self) -> int:
        if self._graphs == 0:
            return 0
        return sum(
            segment["total_size"]
            for segment in torch.cuda.memory_snapshot()
            if tuple(segment["segment_pool_id"]) == tuple(self.handle)
        )


class CudaGraph:
    """One captured piece on CUDA."""

    def __init__(
        self, graph: torch.cuda.CUDAGraph, outputs: Sequence[Any], input_storages: set[int], pool: CudaPool
    ) -> None:
        self._graph = graph
        self._pool: CudaPool | None = pool
        pool.hold()
        self.replay = graph.replay
        self._strong: list[Any] = [
            o if isinstance(o, torch.Tensor) and _storage_address(o) not in input_storages else None for o in outputs
        ]
        self.outputs = [torch_compat.tensor_without_ownership(o) if isinstance(o, torch.Tensor) else o for o in outputs]

    def release_output(self, index: int) -> None:
        if self._strong:
            self._strong[index] = None

    def release(self) -> None:
        self._strong = []
        self.outputs = []
        self.replay = _released
        self._graph.reset()
        if self._pool is not None:
            self._pool.let_go()
            self._pool = None


class CudaDevice:
    """Real CUDA graphs on the current device."""

    name = "cuda"

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
        return CudaGraph(graph, outputs, _storages(inputs), pool)

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


# --------------------------------------------------------------------------------------- emulated


class EmulatedPool:
    """Blocks that stand for graph memory; a block is free once no output in it is to be read any more."""

    def __init__(self) -> None:
        self._readers: list[list[Any]] = []
        """Pairs (block, number of outputs in it that are to be read)."""

    @property
    def held_bytes(self) -> int:
        return sum(block.numel() for block, _ in self._readers)

    def take(self, num_bytes: int, device: torch.device) -> list[Any]:
        for entry in self._readers:
            block, readers = entry
            if readers == 0 and block.numel() >= num_bytes and block.device == device:
                return entry
        self._readers.append([allocate(num_bytes, device), 0])
        return self._readers[-1]

    def free_blocks(self) -> list[torch.Tensor]:
        return [block for block, readers in self._readers if readers == 0]


class EmulatedGraph:
    """One captured piece, emulated: a replay repeats the recorded ops on the captured inputs, address for address.

    It writes NaN over all memory of its pool that was free when it was captured, since a real graph may use that for
    its intermediates. Where the piece does not consist of PyTorch ops (Inductor's C++), a replay calls it again.
    """

    def __init__(
        self,
        run: Callable[[], Sequence[Any]],
        results: Sequence[Any],
        input_storages: set[int],
        pool: EmulatedPool,
    ) -> None:
        self._run = run
        self._entries: list[list[Any] | None] = [None] * len(results)
        self._read_no_more: set[int] = set()
        self.outputs: list[Any] = []
        placed: dict[int, list[Any]] = {}
        for index, result in enumerate(results):
            if not isinstance(result, torch.Tensor) or _storage_address(result) in input_storages:
                self.outputs.append(result)
                continue
            storage = result.untyped_storage()
            entry = placed.get(storage.data_ptr()) if result.numel() else None
            if entry is None:
                entry = pool.take(storage.nbytes(), result.device)
                entry[1] += 1  # taken by this graph until its outputs are placed
                placed[storage.data_ptr() if result.numel() else -index - 1] = entry
            entry[1] += 1
            self._entries[index] = entry
            self.outputs.append(_placed(entry[0], result))
        for entry in placed.values():
            entry[1] -= 1
        self._free = pool.free_blocks()
        self.replay = self._replay

    def _replay(self) -> None:
        with torch.no_grad():
            for block in self._free:
                block.fill_(SCRIBBLE_BYTE)
            for result, entry in zip(self._run(), self._entries, strict=True):
                if entry is not None:
                    # All that the tensor's memory holds: it may be shared by outputs, or by rows of one output.
                    num_bytes = result.untyped_storage().nbytes()
                    entry[0][:num_bytes].copy_(tensor_in(result, (num_bytes,), (1,), torch.uint8))

    def release_output(self, index: int) -> None:
        entry = self._entries[index] if self._entries else None
        if entry is not None and index not in self._read_no_more:
            self._read_no_more.add(index)
            entry[1] -= 1

    def release(self) -> None:
        for index in range(len(self._entries)):
            self.release_output(index)
        self.outputs, self._entries, self._free = [], [], []
        self.replay, self._run = _released, _nothing


class EmulatedDevice:
    """Graphs without a GPU, as strict as real ones about addresses, reuse of memory, random ops and host reads."""

    name = "emulate"

    def __init__(self, compiler_runs_ops: bool = True) -> None:
        self._records_ops = compiler_runs_ops

    def new_pool(self) -> EmulatedPool:
        return EmulatedPool()

    def warm_up(self, call: Callable[[], Any]) -> Any:
        return call()

    def synchronize(self) -> None:
        pass

    def capture(self, call: PieceCall, inputs: Sequence[Any], pool: EmulatedPool) -> EmulatedGraph:
        # Aliases keep the captured addresses, also where somebody gives the tensor another memory later.
        with torch.no_grad():
            captured = [value.detach() if isinstance(value, torch.Tensor) else value for value in inputs]
        storages = _storages(captured)
        recorder = _Recorder()
        written = [value.clone() if isinstance(value, torch.Tensor) else None for value in captured]
        versions = [torch_compat.version(value) if isinstance(value, torch.Tensor) else None for value in captured]
        _CAPTURING.depth = getattr(_CAPTURING, "depth", 0) + 1
        try:
            with torch.no_grad(), _NoHostReads(), recorder:
                results = call(captured)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(f"{type(error).__name__}: {error}") from error
        finally:
            _CAPTURING.depth -= 1
            _undo(captured, written, versions)
        run = recorder.tape(captured, results) if self._records_ops else None
        graph = EmulatedGraph(run or (lambda: call(captured)), results, storages, pool)
        for output, entry in zip(graph.outputs, graph._entries, strict=True):
            if entry is not None and output.numel():
                # A real capture computes nothing.
                entry[0].fill_(SCRIBBLE_BYTE)
        return graph

    def is_capturing(self) -> bool:
        return getattr(_CAPTURING, "depth", 0) > 0


_CAPTURING = threading.local()


def _undo(tensors: Sequence[Any], copies: Sequence[Any], versions: Sequence[int | None]) -> None:
    """Give inputs their contents back: a real capture runs nothing."""
    with torch.no_grad():
        for tensor, copy, version in zip(tensors, copies, versions, strict=True):
            if copy is None:
                continue
            is_untouched = version is not None and torch_compat.version(tensor) == version
            if not is_untouched or not same_bits(tensor, copy):
                assign(tensor, copy)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype are equal bit for bit, NaN included."""
    a, b = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other))
    return torch.equal(a, b)


class _Recorder(torch_compat.TorchDispatchMode):
    """Notes every op of a capture, as the graph would, and refuses what a graph cannot hold."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._ops: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inside = torch_compat.kernel_in_python(func, _device_type((args, kwargs)))
        if isinstance(func, torch_compat.HigherOrderOperator):
            if inside is None:
                raise CaptureError(f"{func} has no kernel that can be followed")
            with self:
                return inside(*args, **kwargs)
        if torch_compat.schema_name(func) in _HOST_READS or torch.Tag.data_dependent_output in func.tags:
            raise CaptureError(f"{func} reads device memory from the host, which no graph can hold")
        if torch.Tag.dynamic_output_shape in func.tags and not _indexes_by_numbers(func, args):
            raise CaptureError(f"{func} gives a tensor whose size depends on values, which no graph can hold")
        if (
            torch.Tag.nondeterministic_seeded in func.tags
            and torch_compat.argument(func, "dropout_p", args, kwargs) != 0
        ):
            raise CaptureError(f"{func} draws random numbers; captured, it would draw other ones than eager")
        if inside is not None:
            # A graph holds what the op did, not the Python that chose it.
            with self, _NoHostReads():
                return inside(*args, **kwargs)
        # Inside of a custom op, composite ops arrive whole; what they are made of may be refused.
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        leaves = [leaf for leaf in torch_compat.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self._ops.append((func, args, kwargs, leaves))
        return result

    def tape(self, inputs: Sequence[Any], results: Sequence[Any]) -> Callable[[], Sequence[Any]]:
        """What repeats the recorded ops on the very same input tensors and gives their results."""
        slots: dict[int, int] = {}
        steps = []
        for func, args, kwargs, leaves in self._ops:
            taken = torch_compat.tree_map(lambda v: _Slot(slots[id(v)]) if id(v) in slots else v, (args, kwargs))
            made = []
            for leaf in leaves:
                made.append(slots.setdefault(id(leaf), len(slots)))
            steps.append((func, *taken, made))
        wanted = [_Slot(slots[id(r)]) if id(r) in slots else r for r in results]
        count = len(slots)

        def run() -> Sequence[Any]:
            values: list[Any] = [None] * count

            def fill(value: Any) -> Any:
                return values[value.index] if isinstance(value, _Slot) else value

            with torch_compat.no_autocast():
                for func, args, kwargs, made in steps:
                    result = func(*torch_compat.tree_map(fill, args), **torch_compat.tree_map(fill, kwargs))
                    leaves = [leaf for leaf in torch_compat.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
                    for slot, leaf in zip(made, leaves, strict=True):
                        values[slot] = leaf
            return [fill(value) for value in wanted]

        return run


class _NoHostReads(TorchFunctionMode):
    """Refuses what reads a tensor from Python without any op, as CPU tensors allow and a capture does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _READS_WITHOUT_OPS:
            raise CaptureError(f"Tensor.{func.__name__} reads device memory from the host, which no graph can hold")
        return func(*args, **(kwargs or {}))


_READS_WITHOUT_OPS = frozenset({"tolist", "numpy", "__array__", "__dlpack__", "item"})


class _Slot:
    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


_HOST_READS = frozenset({"aten::_local_scalar_dense", "aten::equal"})


def _indexes_by_numbers(func: Any, args: Sequence[Any]) -> bool:
    """Whether it is an indexing op without masks: these alone make the size of its result depend on values."""
    if func is not torch.ops.aten.index.Tensor:
        return False
    return not any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])


def _device_type(values: Any) -> str:
    for leaf in torch_compat.tree_leaves(values):
        if isinstance(leaf, torch.Tensor):
            return leaf.device.type
    return "cpu"


def _storage_address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _storages(values: Sequence[Any]) -> set[int]:
    return {_storage_address(v) for v in values if isinstance(v, torch.Tensor) and v.untyped_storage().nbytes()}


def _placed(block: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    tensor = tensor_in(block, like.shape, like.stride(), like.dtype)
    if like.storage_offset():
        tensor = tensor.as_strided(like.shape, like.stride(), like.storage_offset())
    return tensor


def _released() -> None:
    raise CaptureError("this graph was released; whoever replays it kept it too long")


def _nothing() -> Sequence[Any]:
    return ()

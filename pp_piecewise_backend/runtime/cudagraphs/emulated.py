"""Graphs without a GPU: recorded ops are repeated on captured addresses, in memory reused as a real pool's is."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ...utils import torch_compat
from ...utils.addresses import MemoryMap
from .device import CaptureError, PieceCall, in_parts, released, replay_of
from .memory import StaticMemory, tensor_in, undo_writes

SCRIBBLE_BYTE = 0xFF
"""What emulation writes over memory that a real graph might overwrite: NaN as a float, -1 as an integer."""


class EmulatedGraph:
    """One captured piece, emulated: a replay repeats the recorded ops on the captured inputs, address for address.

    It writes NaN over all memory of its pool that was free when it was captured, since a real graph may use that for
    its intermediates, and so over its own outputs before it computes them. Where the piece does not consist of PyTorch
    ops (Inductor's C++), a replay calls it again.
    """

    def __init__(
        self,
        run: Callable[[], Generator[Any, None, Sequence[Any]]],
        borders: list[Any],
        results: Sequence[Any],
        inputs: MemoryMap,
        pools: Sequence[StaticMemory],
    ) -> None:
        self._run, self._pools = run, pools
        pool = pools[-1]
        free = {id(one): list(one.free) for one in pools}
        self._blocks: list[torch.Tensor | None] = [None] * len(results)
        """Per output the block of the pool that it lies in; None for an input, and for what is no tensor."""
        self.outputs = list(results)
        placed: dict[int, torch.Tensor] = {}
        for index, result in enumerate(results):
            if not isinstance(result, torch.Tensor) or inputs.holds(result):
                continue
            storage = result.untyped_storage()
            key = storage.data_ptr() if result.numel() else -index - 1
            if key not in placed:
                placed[key] = pool.take(storage.nbytes(), result.device)
            block = self._blocks[index] = placed[key]
            offset = int(result.storage_offset())
            self.outputs[index] = tensor_in(block, result.shape, result.stride(), result.dtype, offset)
            if result.numel():
                block.fill_(SCRIBBLE_BYTE)  # a real capture computes nothing
        self._unread = {index for index, block in enumerate(self._blocks) if block is not None}
        """Outputs that are still to be read: a block is free once none of those in it is."""
        free[id(pool)] += placed.values()
        self._scribbled = [free.pop(id(one), []) for one in pools]
        """Per part memory that it is the first to use."""
        self.borders = borders
        self.parts: list[Callable[[], None]] = [
            partial(self._replay_part, number) for number in range(len(borders) + 1)
        ]
        self._running: Generator[Any, None, Sequence[Any]] = run()
        self.replay = replay_of(self.parts)

    def _replay_part(self, number: int) -> None:
        _refuse_in_a_capture("a graph is replayed")
        with torch.no_grad():
            if number == 0:
                self._running = self._run()
            for memory in self._scribbled[number]:
                memory.fill_(SCRIBBLE_BYTE)
            has_ended = False
            try:
                next(self._running)
            except StopIteration as end:
                has_ended = True
                self._leave(end.value)
            if has_ended != (number == len(self.borders)):
                raise CaptureError("a replay has other parts than its capture")

    def _leave(self, results: Sequence[Any]) -> None:
        """Bring results to where the outputs lie."""
        for result, block in zip(results, self._blocks, strict=True):
            if block is not None:
                # All that the tensor's memory holds: it may be shared by outputs, or by rows of one output.
                num_bytes = result.untyped_storage().nbytes()
                block[:num_bytes].copy_(tensor_in(result, (num_bytes,), (1,), torch.uint8))

    def release_output(self, index: int) -> None:
        if index in self._unread:
            self._unread.remove(index)
            block = self._blocks[index]
            if block is not None and not any(self._blocks[other] is block for other in self._unread):
                self._pools[-1].give_back(block)

    def release(self) -> None:
        for index in list(self._unread):
            self.release_output(index)
        self.outputs, self._blocks, self._scribbled, self.parts, self._pools = [], [], [], [], ()
        self._running.close()
        self.replay, self._run = released, lambda: in_parts(lambda given: (), ())


class EmulatedDevice:
    """Graphs without a GPU, as strict as real ones about addresses, reuse of memory, random ops and host reads."""

    def __init__(self, compiler_runs_ops: bool = True) -> None:
        self._records_ops = compiler_runs_ops

    def new_pool(self) -> StaticMemory:
        return StaticMemory()

    def warm_up(self, call: Callable[[], Any]) -> Any:
        return call()

    def synchronize(self) -> None:
        _refuse_in_a_capture("the host waits")

    def capture(
        self,
        call: PieceCall,
        inputs: Sequence[Any],
        pool: StaticMemory,
        pool_after: Callable[[list[Any]], StaticMemory] | None = None,
    ) -> EmulatedGraph:
        # As in a real graph: the captured addresses, whatever becomes of the tensors and of their memory.
        alias = torch_compat.tensor_without_ownership
        captured = [alias(value) if isinstance(value, torch.Tensor) else value for value in inputs]
        given = MemoryMap.of(captured)
        _refuse_in_a_capture("another capture begins")
        recorder = _Recorder()
        borders: list[Any] = []
        before = [(value, value.clone()) for value in captured if isinstance(value, torch.Tensor)]
        try:
            with capturing(), torch.no_grad(), torch_compat.no_cached_casts(), _NoHostReads(), recorder:
                running = in_parts(call, captured)
                try:
                    while True:
                        borders.append(next(running))
                        recorder.cut()
                except StopIteration as end:
                    results = end.value
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(f"{type(error).__name__}: {error}") from error
        finally:
            with torch.no_grad():
                undo_writes(before)  # a real capture runs nothing
        run = recorder.tape(captured, results) if self._records_ops else None
        ends = range(1, len(borders) + 1)
        pools = [pool, *(pool if pool_after is None else pool_after(borders[:end]) for end in ends)]
        return EmulatedGraph(run or (lambda: in_parts(call, captured)), borders, results, given, pools)

    def is_capturing(self) -> bool:
        return _CAPTURING.depth > 0


class _Capturing(threading.local):
    """Of one thread. Each call of a program asks, and an attribute of the class costs a quarter of ``getattr``'s."""

    depth = 0


_CAPTURING = _Capturing()


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """The body is inside a capture, as far as ``is_capturing`` says, in this thread."""
    _CAPTURING.depth += 1
    try:
        yield
    finally:
        _CAPTURING.depth -= 1


def _refuse_in_a_capture(what: str) -> None:
    """As a real device does."""
    if _CAPTURING.depth:
        raise CaptureError(f"{what} inside a capture, which no graph can hold")


class _Recorder(torch_compat.TorchDispatchMode):
    """Notes every op of a capture, as the graph would, and refuses what a graph cannot hold."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._parts: list[list[tuple[Any, Any, Any, list[Any]]]] = [[]]

    def cut(self) -> None:
        """What follows is another part of the tape."""
        self._parts.append([])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device_type = next((tensor.device.type for tensor in torch_compat.tensors_in((args, kwargs))), "cpu")
        inside = torch_compat.kernel_in_python(func, device_type)
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
            and torch_compat.bound_arguments(func, args, kwargs).get("dropout_p") != 0
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
        leaves = torch_compat.tensors_in(result)
        self._parts[-1].append((func, args, kwargs, leaves))
        return result

    def tape(self, inputs: Sequence[Any], results: Sequence[Any]) -> Callable[[], Generator[None, None, Sequence[Any]]]:
        """What repeats the recorded ops on the very same input tensors and gives their results, part by part."""
        slots: dict[int, int] = {}
        parts: list[list[Any]] = []
        for ops in self._parts:
            parts.append([])
            for func, args, kwargs, leaves in ops:
                taken = torch_compat.tree_map(lambda v: _Slot(slots[id(v)]) if id(v) in slots else v, (args, kwargs))
                made = [slots.setdefault(id(leaf), len(slots)) for leaf in leaves]
                parts[-1].append((func, *taken, made))
        wanted = [_Slot(slots[id(r)]) if id(r) in slots else r for r in results]
        count = len(slots)

        def run() -> Generator[None, None, Sequence[Any]]:
            values: list[Any] = [None] * count

            def fill(value: Any) -> Any:
                return values[value.index] if isinstance(value, _Slot) else value

            for number, steps in enumerate(parts):
                if number:
                    yield
                with torch_compat.no_autocast():
                    for func, args, kwargs, made in steps:
                        result = func(*torch_compat.tree_map(fill, args), **torch_compat.tree_map(fill, kwargs))
                        leaves = torch_compat.tensors_in(result)
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


@dataclass(frozen=True)
class _Slot:
    index: int


_HOST_READS = frozenset({"aten::_local_scalar_dense", "aten::equal"})


def _indexes_by_numbers(func: Any, args: Sequence[Any]) -> bool:
    """Whether it is an indexing op without masks: these alone make the size of its result depend on values."""
    if func is not torch.ops.aten.index.Tensor:
        return False
    return not any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])

"""Blocks and tensors at fixed addresses: what captured graphs read, and what proxies land in.

Note [static memory]
Static tensors are made outside inference mode, so that they may be written both inside and outside of it. Each lies in
a storage of its own at offset 0, aligned to 256 bytes: views with an offset would make Dynamo add an input and
recompile, and Inductor clones inputs that are not aligned to 16 bytes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import sympy
import torch

from ... import errors
from ...compilation.specs import TensorSpec, evaluate
from ...utils.addresses import MemoryMap

ALIGNMENT_BYTES = 256


def allocate(num_bytes: int, device: torch.device) -> torch.Tensor:
    """A flat uint8 tensor of at least ``num_bytes`` zero bytes; see Note [static memory]."""
    padded = -(-max(num_bytes, 1) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    if device.type == "cpu":
        return _aligned_on_cpu(padded)
    with torch.inference_mode(False), torch.no_grad():
        return torch.zeros(padded, dtype=torch.uint8, device=device)


def _aligned_on_cpu(num_bytes: int) -> torch.Tensor:
    # The CPU allocator aligns to 64 bytes, and a storage that begins where we say keeps the offset at 0.
    raw = bytearray(num_bytes + ALIGNMENT_BYTES)
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.frombuffer(raw, dtype=torch.uint8)
        start = -whole.data_ptr() % ALIGNMENT_BYTES
        return torch.frombuffer(raw, dtype=torch.uint8, offset=start, count=num_bytes)


def tensor_in(
    block: torch.Tensor, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, offset: int = 0
) -> torch.Tensor:
    """The tensor with this geometry in the storage of ``block``; ``stride`` ``()``: that of a contiguous one."""
    with torch.inference_mode(False), torch.no_grad():
        typed = torch.empty(0, dtype=dtype, device=block.device)
        return typed.set_(block.untyped_storage(), offset, tuple(shape), tuple(stride))


def extent_bytes(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes from the first to after the last element of a tensor with this geometry."""
    if 0 in shape:
        return 0
    return (1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))) * dtype.itemsize


def free_bytes(device: torch.device) -> int | None:
    """What is left on a device, what its allocator holds and does not use included; None where that is not known."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def why_no_copies(tensors: Sequence[torch.Tensor], device: torch.device | None) -> str | None:
    """Why a full graph cannot be compared on copies of some tensors; None if there is room for them.

    Args:
        device: on which the copies are to take no more than half of what is free; None: it is tried in any case.
    """
    free = None if device is None else free_bytes(device)
    if free is not None:
        num_bytes = sum(extent_bytes(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
        if num_bytes > free // 2:
            return errors.copy_too_large(num_bytes, free)
    try:
        [like(tensor) for tensor in tensors]
    except torch.OutOfMemoryError:
        return errors.NO_MEMORY_TO_COMPARE
    return None


class StaticMemory:
    """Blocks at fixed addresses, for calls that run one at a time.

    Contents do not outlive a call, so what one call has read for the last time may serve the next value: whoever lays
    out a bucket takes a block where a value is born and returns it where it was read last. A block stays allocated
    until ``release``.
    """

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []
        self.free: list[torch.Tensor] = []
        """Blocks that the next value may take."""

    def take(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """A block of at least ``num_bytes``, the smallest free one that holds them, or a new one."""
        fitting = [b for b in self.free if b.numel() >= num_bytes and b.device == device]
        if fitting:
            block = min(fitting, key=torch.Tensor.numel)
            self.free = [b for b in self.free if b is not block]
            return block
        block = allocate(num_bytes, device)
        self._blocks.append(block)
        return block

    def give_back(self, block: torch.Tensor) -> None:
        if any(b is block for b in self._blocks) and not any(b is block for b in self.free):
            self.free.append(block)

    @property
    def held_bytes(self) -> int:
        return sum(block.numel() for block in self._blocks)

    def release(self) -> None:
        """Forget all blocks; tensors in them stay valid as long as somebody holds them."""
        self._blocks.clear()
        self.free.clear()


def spoil(tensor: torch.Tensor) -> None:
    """Overwrite a tensor, so that whoever still reads it sees that its contents are gone."""
    with torch.inference_mode(False), torch.no_grad():
        is_number = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)
        without_repeats(tensor).fill_(torch.iinfo(tensor.dtype).max if is_number else float("nan"))


def without_repeats(tensor: torch.Tensor) -> torch.Tensor:
    """A view of each element once: what ``expand`` repeats is one place in memory, which no op may write twice."""
    return without_repeats_of(tensor, tensor)


def without_repeats_of(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """What of ``value`` belongs into ``without_repeats(target)``."""
    for dim, (size, step) in enumerate(zip(target.shape, target.stride(), strict=True)):
        if step == 0 and size > 1:
            value = value.narrow(dim, 0, 1)
    return value


def assign(target: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``target.copy_(value)``, also where ``target`` repeats elements, as ``value`` then does too."""
    without_repeats(target).copy_(without_repeats_of(value, target))
    return target


def like(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return assign(copy, tensor)


def first_rows(tensor: torch.Tensor, token_dims: Sequence[int], num_tokens: int) -> torch.Tensor:
    """A view of the first so many rows along each dimension that counts tokens."""
    for dim in token_dims:
        tensor = tensor.narrow(dim, 0, num_tokens)
    return tensor


@dataclass
class StaticTensor:
    """One value at a fixed address, as wide as the bucket, and what of it n real rows are.

    Note [strides of padded values] (rule R5): a piece was compiled for the traced strides, evaluated at its number of
    rows. A view of the first n rows has the strides of the bucket; it equals what was traced only where the token
    dimension is outermost in memory. Elsewhere an eager step needs a copy.
    """

    tensor: torch.Tensor
    """``spec`` evaluated at the bucket."""
    spec: TensorSpec
    token_dims: tuple[int, ...]
    symbols: Callable[[int], Mapping[sympy.Symbol, int]] = field(repr=False)
    """Values of the program's symbols for a number of tokens."""
    block: torch.Tensor | None = None
    """The block of static memory that it lies in, if it does."""

    def rows(self, num_tokens: int) -> torch.Tensor:
        """The real rows, whatever strides result: what to copy into."""
        with torch.inference_mode(False), torch.no_grad():
            return first_rows(self.tensor, self.token_dims, num_tokens)

    def tails(self, num_tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs (padded rows, first row broadcast to them), one per token dimension.

        Only where padded rows must hold values of the same batch: integers may index something.
        """
        if self.tensor.dtype.is_floating_point or self.tensor.dtype.is_complex:
            return []
        pairs = []
        with torch.inference_mode(False), torch.no_grad():
            for dim in self.token_dims:
                padded = self.tensor.shape[dim] - num_tokens
                if padded > 0 and self.tensor.stride(dim) != 0:
                    tail = self.tensor.narrow(dim, num_tokens, padded)
                    first_row = self.tensor.narrow(dim, 0, 1).expand_as(tail)
                    pairs.append((without_repeats(tail), without_repeats_of(first_row, tail)))
        return pairs

    def exact(self, num_tokens: int) -> torch.Tensor | None:
        """A view of the real rows with the strides that were traced; None where only a copy can have them."""
        shape, stride = geometry(self.spec, self.symbols(num_tokens))
        same = all(a == b or size <= 1 for a, b, size in zip(stride, self.tensor.stride(), shape, strict=True))
        if not same:
            return None
        with torch.inference_mode(False), torch.no_grad():
            return self.tensor.as_strided(shape, stride, self.tensor.storage_offset())


def geometry(spec: TensorSpec, values: Mapping[sympy.Symbol, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of a tensor once its symbols have these values."""
    return tuple(evaluate(size, values) for size in spec.shape), tuple(evaluate(step, values) for step in spec.stride)


def address(tensor: torch.Tensor) -> int:
    """Where the tensor's storage begins."""
    return tensor.untyped_storage().data_ptr()


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype are equal bit for bit, NaN included."""
    a, b = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other))
    return torch.equal(a, b)


def memory_of(tensors: Iterable[torch.Tensor]) -> list[weakref.ref[torch.UntypedStorage]]:
    """The storages of some tensors, which it does not keep alive."""
    return [weakref.ref(tensor.untyped_storage()) for tensor in tensors]


def still_held(storages: Iterable[weakref.ref[torch.UntypedStorage]]) -> MemoryMap:
    """Where those of ``memory_of`` lie that something keeps alive."""
    alive = (storage for reference in storages if (storage := reference()) is not None)
    return MemoryMap(((storage.data_ptr(), storage.data_ptr() + storage.nbytes()), None) for storage in alive)


def undo_writes(before: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Whether any of these tensors is no more like its copy; then it is restored."""
    changed = [(tensor, copy) for tensor, copy in before if not same_bits(tensor, copy)]
    for tensor, copy in changed:
        assign(tensor, copy)
    return bool(changed)

"""Every tensor whose address must not move: landing memory of a stage's proxies, and static inputs of its pieces.

Note [static memory]
Static tensors are made outside inference mode, so that they may be written both inside and outside of it. Each lies in
a storage of its own at offset 0, aligned to 256 bytes: views with an offset would make Dynamo add an input and
recompile, and Inductor clones inputs that are not aligned to 16 bytes.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import sympy
import torch

from ... import errors
from ...compilation.specs import TensorSpec, evaluate
from ..timeline import Timeline

ALIGNMENT_BYTES = 256

Layout = Literal["replicated", "scattered"]


@dataclass(frozen=True)
class Proxy:
    """One tensor that travels from stage to stage, without its token dimension.

    Args:
        shape: sizes behind the token dimension: ``(hidden,)`` for hidden states ``[tokens, hidden]``.
        dtype: of every element.
        layout: ``replicated`` or ``scattered`` over tensor parallel ranks.

    Raises:
        ConfigError: a size below 1, something that is no dtype, or an unknown layout.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout = "replicated"

    def __post_init__(self) -> None:
        sizes = tuple(self.shape) if isinstance(self.shape, Iterable) else (self.shape,)
        if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
            raise errors.ConfigError(errors.bad_proxy("shape", self.shape, "sizes of at least 1, such as (4096,)"))
        if not isinstance(self.dtype, torch.dtype):
            raise errors.ConfigError(errors.bad_proxy("dtype", self.dtype, "a torch.dtype such as torch.bfloat16"))
        if self.layout not in ("replicated", "scattered"):
            raise errors.ConfigError(errors.bad_proxy("layout", self.layout, "'replicated' or 'scattered'"))
        object.__setattr__(self, "shape", sizes)

    @property
    def bytes_per_token(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


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


def tensor_in(block: torch.Tensor, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The tensor with this geometry at the start of ``block``."""
    with torch.inference_mode(False), torch.no_grad():
        typed = torch.empty(0, dtype=dtype, device=block.device)
        return typed.set_(block.untyped_storage(), 0, tuple(shape), tuple(stride))


def extent_bytes(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes from the first to behind the last element of a tensor with this geometry."""
    if 0 in shape:
        return 0
    return (1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))) * dtype.itemsize


class StaticMemory:
    """Blocks at fixed addresses that the calls of one stage share, one call at a time.

    Contents do not outlive a call, so what one call has read for the last time may serve the next value: whoever lays
    out a bucket takes a block where a value is born and gives it back where it was read last. A block stays allocated
    until ``release``.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Held by the call that uses the memory."""
        self.holder: int | None = None
        """The thread of that call."""
        self.users: set[Any] = set()
        """The graphs of each program that has something captured in it; the last one to go releases it."""
        self._blocks: list[torch.Tensor] = []
        self._free: list[torch.Tensor] = []
        self.pools: dict[str, Any] = {}
        """Graph pools that belong to the same stage, by name; ``capture.py`` knows what they are."""
        self.given_out: list[weakref.ref[torch.Tensor]] = []
        """What the last call returned, where the next one is to show that it took the memory of these results."""
        self.counted_bytes = (0, 0)
        """What the gauges of ``stats`` hold of it: bytes in graph pools, bytes in blocks."""

    def take(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """A block of at least ``num_bytes``, the smallest free one that holds them, or a new one."""
        fitting = [b for b in self._free if b.numel() >= num_bytes and b.device == device]
        if fitting:
            block = min(fitting, key=torch.Tensor.numel)
            self._free = [b for b in self._free if b is not block]
            return block
        block = allocate(num_bytes, device)
        self._blocks.append(block)
        return block

    def give_back(self, block: torch.Tensor) -> None:
        if any(b is block for b in self._blocks) and not any(b is block for b in self._free):
            self._free.append(block)

    def spoil_given_out(self) -> None:
        """Overwrite what the last call returned, so that whoever still reads it sees that it is gone."""
        for reference in self.given_out:
            tensor = reference()
            if tensor is not None:
                with torch.inference_mode(False), torch.no_grad():
                    is_number = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)
                    without_repeats(tensor).fill_(torch.iinfo(tensor.dtype).max if is_number else float("nan"))
        self.given_out = []

    @property
    def held_bytes(self) -> int:
        return sum(block.numel() for block in self._blocks)

    def release(self) -> None:
        """Forget all blocks; tensors in them stay valid as long as somebody holds them."""
        self._blocks.clear()
        self._free.clear()
        self.pools.clear()


class StageListener(Protocol):
    """Who hands a stage's memory over, and so wants to know, within a call, when steps are done with it."""

    timeline: Timeline | None
    """Where the steps of calls are noted, if anywhere."""

    def landing_was_read(self) -> None:
        """Every step that reads landing memory was run (on a GPU: enqueued), and steps follow that do not."""

    def results_are_written(self) -> None:
        """The next step writes memory in which results of earlier calls lie."""


class Stage:
    """The landing memory of one pipeline stage, shared by all programs that are compiled for it.

    ``torch.compile(module, backend="pp_piecewise", options={"stage": stage})`` makes every program of ``module`` read
    its stage inputs from this memory. A caller (or a transport) that writes into ``views(n)`` and passes these views
    to the module pays no copy; any other tensor is copied and counted. Compared by identity: give each module instance
    a stage of its own.

    Args:
        inputs: name of each stage input -> its ``Proxy``.
        max_tokens: rows of the landing memory, and the largest call that runs with graphs.
        device: where the memory lies; the current accelerator, or the CPU without one.

    Raises:
        ConfigError: a name or size that cannot be used.
    """

    def __init__(self, inputs: Mapping[str, Proxy], max_tokens: int, device: torch.device | str | None = None) -> None:
        if not isinstance(inputs, Mapping) or not all(
            isinstance(name, str) and name.isidentifier() and isinstance(proxy, Proxy) for name, proxy in inputs.items()
        ):
            raise errors.ConfigError(errors.bad_stage_inputs(inputs))
        if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
            raise errors.ConfigError(errors.bad_stage_tokens(max_tokens))
        self.inputs: Mapping[str, Proxy] = dict(inputs)
        self.max_tokens = max_tokens
        self.device = torch.empty(0, device=_default_device() if device is None else device).device
        self.memory = StaticMemory()
        self._landing = {
            name: allocate(max_tokens * proxy.bytes_per_token, self.device) for name, proxy in self.inputs.items()
        }
        self._views: dict[int, dict[str, torch.Tensor]] = {}
        self.is_shown = False
        """Whether anybody was given views of it, so that arguments may lie in it."""
        self.listener: StageListener | None = None
        """Set, if at all, before anything is compiled for the stage."""
        self.programs_share_memory = True
        """Whether the results of one program may be overwritten by another one."""

    def views(self, num_tokens: int) -> dict[str, torch.Tensor]:
        """``{name: [num_tokens, *shape]}``: the first rows of the landing memory.

        The tensors belong to the stage and are valid as long as it lives. Their contents are read by the next call of
        the module; what is written later, or by a later call that was given other tensors, replaces them.

        Raises:
            ValueError: ``num_tokens`` is not in 1 to ``max_tokens``.
        """
        self.is_shown = True
        if num_tokens not in self._views:
            if not 1 <= num_tokens <= self.max_tokens:
                raise ValueError(errors.rows_out_of_range(num_tokens, self.max_tokens))
            if len(self._views) >= 4096:
                self._views.clear()
            self._views[num_tokens] = {
                name: tensor_in(block, (num_tokens, *p.shape), contiguous_stride((num_tokens, *p.shape)), p.dtype)
                for (name, block), p in zip(self._landing.items(), self.inputs.values(), strict=True)
            }
        return dict(self._views[num_tokens])

    def land_in(self, blocks: Mapping[str, torch.Tensor]) -> None:
        """Use these flat uint8 blocks for the stage inputs named, before anybody was given views of the old ones."""
        assert not self.is_shown and not self._views
        for name, block in blocks.items():
            assert block.numel() >= self.max_tokens * self.inputs[name].bytes_per_token
            self._landing[name] = block

    def landing(self, name: str) -> torch.Tensor:
        """The flat uint8 memory in which the stage input ``name`` lands."""
        return self._landing[name]

    @cached_property
    def landing_addresses(self) -> frozenset[int]:
        """Where the landing memory of each stage input begins."""
        return frozenset(block.data_ptr() for block in self._landing.values())

    @property
    def landing_bytes(self) -> int:
        return sum(block.numel() for block in self._landing.values())

    def check(self, name: str, spec: TensorSpec, token_dim: int | None) -> str | None:
        """Why the graph input ``name`` cannot land in this memory; None if it can."""
        proxy = self.inputs.get(name)
        if proxy is None:
            return errors.stage_lacks_input(name, list(self.inputs))
        if token_dim is None:
            return errors.stage_input_without_tokens(name, str(spec))
        tail = tuple(spec.shape[token_dim + 1 :])
        if spec.dtype != proxy.dtype or tail != proxy.shape or any(size != 1 for size in spec.shape[:token_dim]):
            return errors.stage_input_differs(name, str(spec), proxy.shape, proxy.dtype)
        if spec.device != self.device:
            return errors.stage_on_other_device(name, spec.device, self.device)
        return None

    def __repr__(self) -> str:
        return f"Stage({dict(self.inputs)!r}, max_tokens={self.max_tokens}, device={str(self.device)!r})"


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


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    stride: list[int] = []
    step = 1
    for size in reversed(shape):
        stride.append(step)
        step *= size
    return tuple(reversed(stride))


def _default_device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if accelerator is None else accelerator


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
        view = self.tensor
        with torch.inference_mode(False), torch.no_grad():
            for dim in self.token_dims:
                view = view.narrow(dim, 0, num_tokens)
        return view

    def tails(self, num_tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs (padded rows, first row broadcast to them), one per token dimension."""
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

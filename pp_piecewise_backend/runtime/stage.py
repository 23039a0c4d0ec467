"""What a pipeline stage keeps at fixed addresses: memory in which proxies land, and memory that its programs share.

Note [ranks decide alike]
Ranks that hold one stage together (tensor parallel) run the same collectives inside their pieces. A rank that runs a
piece on the real rows while another one replays it on padded rows gives a collective two sizes, and one that captures
alone waits for ever in the collectives of its warm-up. What a rank finds for itself may differ all the same: a capture
failed, a padded row leaked, a replay was wrong, memory ran out, a graph was not faster. So whatever decides what is
captured or replayed is exchanged when it is found, by all ranks at the same places whatever they found, and what one of
them found holds for all.
"""

from __future__ import annotations

import json
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import torch

from .. import errors
from ..compilation.specs import TensorSpec
from ..utils.addresses import MemoryMap, Span, span
from ..utils.counters import TOTALS, Stats
from ..utils.reasons import Reason
from .cudagraphs.device import Pool
from .cudagraphs.memory import StaticMemory, allocate, spoil, tensor_in
from .hooks import StageListener

Layout = Literal["replicated", "scattered"]


@dataclass(frozen=True)
class Proxy:
    """One tensor that travels from stage to stage, without its token dimension.

    Args:
        shape: sizes after the token dimension: ``(hidden,)`` for hidden states ``[tokens, hidden]``.
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


class Captures(Protocol):
    """What one program has captured in the memory of its stage."""

    @property
    def gives_way(self) -> bool:
        """Whether its buckets go before those of others do."""

    @property
    def largest_tokens(self) -> int:
        """Its largest bucket; 0 without any."""

    def release_buckets(self) -> None:
        """Release all graphs; the next call of a bucket captures it again."""

    def retry_dropped(self) -> None:
        """Capture again, too, what was dropped for want of memory."""

    def drop(self, tokens: int, held_bytes: int, limit_bytes: int) -> None:
        """Release all buckets, and capture the one of ``tokens`` tokens no more: too much graph memory is held."""


class StageMemory:
    """What the programs of a stage capture in, one call at a time: blocks of static memory, and pools of graphs."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Held by the call that uses the memory."""
        self.holder: int | None = None
        """The thread of that call."""
        self.blocks, self.result_blocks = StaticMemory(), StaticMemory()
        """The second ones are for values in whose memory results lie, see ``OUTPUT_POOL``."""
        self.pools: dict[str, Pool] = {}
        """Pools of graph memory, by name."""
        self._users: set[Captures] = set()
        self.given_out: list[weakref.ref[torch.Tensor]] = []
        """Results of the last call that the next one is to overwrite, to show that they are valid until then only."""
        self.lent: list[list[weakref.ref[torch.Tensor]]] = []
        """Where a stage sends its results: those of the last call, see Note [static results that are kept]."""
        self.overwritten = MemoryMap()
        """Where static results of the last call may lie."""
        self._counted_bytes = (0, 0)

    @property
    def graph_bytes(self) -> int:
        return sum(pool.held_bytes for pool in self.pools.values())

    def add_user(self, user: Captures) -> None:
        """``user`` captured something here."""
        self._users.add(user)

    def remove_user(self, user: Captures) -> None:
        """``user`` has released its graphs. The last one releases pools and blocks, see Note [release order]."""
        self._users.discard(user)
        if not self._users:
            self._release_memory()

    def drop_largest(self, limit_bytes: int) -> None:
        """Make room: the largest bucket of all programs is captured no more, or of those that give way."""
        held_bytes, users = self.graph_bytes, list(self._users)
        chosen = [user for user in users if user.gives_way and user.largest_tokens] or users
        largest = max(user.largest_tokens for user in chosen)
        for user in users:
            # Pools shrink only as a whole; the other buckets are captured again when they are needed.
            if user in chosen:
                user.drop(largest, held_bytes, limit_bytes)
            else:
                user.release_buckets()
        self.pools.clear()

    def release_captures(self) -> None:
        """Release what all programs have captured, with the memory that it took: there is room for other buckets."""
        for user in list(self._users):
            user.release_buckets()
            user.retry_dropped()
        self._release_memory()

    def _release_memory(self) -> None:
        self.pools.clear()
        self.blocks.release()
        self.result_blocks.release()

    def spoil_given_out(self) -> None:
        """Overwrite ``given_out``."""
        for reference in self.given_out:
            if (tensor := reference()) is not None:
                spoil(tensor)
        self.given_out = []

    def update_gauges(self, stats: Stats) -> None:
        """Count in ``stats`` what is held now. All programs of a stage share its memory, which counts once."""
        now = self.graph_bytes, self.blocks.held_bytes + self.result_blocks.held_bytes
        before, self._counted_bytes = self._counted_bytes, now
        stats.add_many({"graph_bytes": now[0] - before[0], "static_bytes": now[1] - before[1]})


class Stage:
    """The landing memory of one pipeline stage, shared by all programs that are compiled for it.

    ``torch.compile(module, backend="pp_piecewise", options={"stage": stage})`` makes every program of ``module`` read
    its proxies from this memory. A caller (or a transport) that writes into ``views(n)`` and passes these views
    to the module pays no copy; any other tensor is copied and counted. Compared by identity: give each module instance
    a stage of its own.

    Args:
        inputs: name of each argument that is a proxy -> its ``Proxy``.
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
        try:
            self.device = torch.empty(0, device=_default_device() if device is None else device).device
        except (TypeError, RuntimeError, AssertionError) as error:  # no device, or none that is here
            raise errors.ConfigError(errors.bad_stage_device(device, error)) from error
        self.memory = StageMemory()
        self._landing: dict[str, torch.Tensor] = {}
        """Made at first use, since the link that fills it may have memory for it: see ``land_in``."""
        self._making = threading.Lock()
        self._views: dict[int, dict[str, torch.Tensor]] = {}
        self.matched_names: set[str] = set()
        """Those of ``inputs`` that a graph compiled for the stage takes."""
        self.is_shown = False
        """Whether anybody was given views of it, so that arguments may lie in it."""
        self.listener: StageListener | None = None
        """Set, if at all, before anything is compiled for the stage."""
        self.exchange: Callable[[str], Sequence[str]] | None = None
        """Where several ranks hold the stage together: takes this rank's text and returns those of all of them, in the
        same order on each, once all have brought theirs. Set likewise; see Note [ranks decide alike]."""
        self.links: Sequence[str] = ()
        """How proxies and results travel, where that was found by trial; for who reads about the stage."""
        self.entrance: Callable[[], str] = str
        """How its calls enter it, in one line; likewise, and empty where nobody says."""
        self.stats = TOTALS
        """Where programs of the stage count, besides their own; set likewise."""

    def views(self, num_tokens: int) -> dict[str, torch.Tensor]:
        """``{name: [num_tokens, *shape]}``: the first rows of the landing memory.

        The tensors belong to the stage and are valid as long as it lives. Their contents are read by the next call of
        the module; what is written later, or by a later call that was given other tensors, replaces them.

        Raises:
            ValueError: ``num_tokens`` is not in 1 to ``max_tokens``.
        """
        self.is_shown = True
        if num_tokens not in self._views:
            if not isinstance(num_tokens, int) or not 1 <= num_tokens <= self.max_tokens:
                raise ValueError(errors.rows_out_of_range(num_tokens, self.max_tokens))
            if len(self._views) >= 4096:
                self._views.clear()
            self._views[num_tokens] = {
                name: tensor_in(self.landing(name), (num_tokens, *p.shape), (), p.dtype)
                for name, p in self.inputs.items()
            }
        return dict(self._views[num_tokens])

    def land_in(self, blocks: Mapping[str, torch.Tensor]) -> None:
        """Use these flat uint8 blocks for the proxies named, before anybody has asked for landing memory."""
        assert not self._landing and not self._views
        for name, block in blocks.items():
            assert block.numel() >= self.max_tokens * self.inputs[name].bytes_per_token
            self._landing[name] = block

    def release(self) -> None:
        """Forget the landing memory and the listener; nothing is called for this stage any more. Views stay valid."""
        self._landing.clear()
        self._views.clear()
        self.listener = self.exchange = None
        self.entrance = str

    def landing(self, name: str) -> torch.Tensor:
        """The flat uint8 memory in which the proxy ``name`` lands."""
        with self._making:
            if name not in self._landing:
                self._landing[name] = allocate(self.max_tokens * self.inputs[name].bytes_per_token, self.device)
            return self._landing[name]

    @cached_property
    def landing_spans(self) -> tuple[Span, ...]:
        """Where the landing memory of each proxy lies."""
        return tuple(span(self.landing(name)) for name in self.inputs)

    def exchanged(self, own: Any) -> list[Any]:
        """What each rank that holds the stage has to say, as JSON; ``own`` alone where this one does."""
        return [own] if self.exchange is None else [json.loads(said) for said in self.exchange(json.dumps(own))]

    def found_by_any(self, own: Reason | None) -> Reason | None:
        """What the first of these ranks found that found anything; all of them ask."""
        return own if self.exchange is None else first_found(self.exchanged(own))

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


def first_found(reasons: Sequence[Reason | Sequence[str] | None]) -> Reason | None:
    """The first reason of all ranks, each of which may have gone through JSON."""
    for number, reason in enumerate(reasons):
        if reason is not None:
            code, sentence = reason
            return Reason(code, sentence if len(reasons) == 1 else f"on rank {number} of this stage, {sentence}")
    return None


def _default_device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if accelerator is None else accelerator

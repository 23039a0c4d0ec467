"""Attention over a cache of slots, as engines do it, right in a captured graph whatever the sequences' lengths are.

The keys and values of a sequence lie in consecutive rows of the cache, its slot; new ones are written into it first, so
that a new token attends to the rows of its slot from the first one to its own. What a call is about, where each row's
keys and values go, where sequences begin and how long they are, stands in tensors that live at fixed addresses
(`StepTensors`). The engine fills them before each step; a captured graph reads what stands there at its replay.

A kernel's launch is frozen in a capture, so what the host decides depends on the number of rows alone:

- Up to `MAX_SEQUENCES` rows, each row is a sequence of one query over the keys up to its own. That is right for decode,
  for rows of one prompt, and for any mixture of both.
- More rows belong to at most `MAX_PROMPTS` sequences. Each may have all rows, which bounds the launch; sequences that
  are not there have none.

Kernels: flash attention as PyTorch has it, on bf16 and fp16 tensors of a GPU. Elsewhere products with a mask over the
whole longest slot, which read nothing on the host either.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_SEQUENCES = 64
"""Rows up to which each row is a sequence of its own."""
MAX_PROMPTS = 8
"""Sequences of a call with more rows."""

OPTIONS = {"split_ops": "+slot_attention::attend", "graph_safe_ops": "slot_attention::*"}
"""The options that name these ops. `choose` stays in the last piece."""

_STARTS_Q, _STARTS_K, _LENGTHS = range(3)
"""Rows of the table of sequences: the first row of each among the queries, the first one of its slot in the cache, and
how many rows of the slot are in use with the new ones."""
_RING = 16
"""Steps whose numbers may be on their way to the device at once."""


@dataclass(frozen=True)
class StepBatch:
    """What one call is about, on the host."""

    positions: np.ndarray
    """int64 `[rows]`: of each token in its sequence."""
    cache_rows: np.ndarray
    """int64 `[rows]`: where its key and value go."""
    sequences: np.ndarray
    """int32 `[3, MAX_SEQUENCES + 1]`."""

    @property
    def num_tokens(self) -> int:
        return len(self.positions)


def step_batch(slots: list[int], old_lengths: list[int], new_tokens: list[int]) -> StepBatch:
    """The call that adds `new_tokens[i]` tokens to a sequence of `old_lengths[i]`, whose slot begins at row `slots[i]`.

    Raises:
        ValueError: more than `MAX_SEQUENCES` rows belong to more than `MAX_PROMPTS` sequences.
    """
    counts, old = np.asarray(new_tokens), np.asarray(old_lengths)
    rows = int(counts.sum())
    ends = counts.cumsum()
    nth = np.arange(rows) - np.repeat(ends - counts, counts)
    positions = np.repeat(old, counts) + nth
    first_rows = np.repeat(np.asarray(slots), counts)
    sequences = np.zeros((3, MAX_SEQUENCES + 1), dtype=np.int32)
    if rows <= MAX_SEQUENCES:
        sequences[_STARTS_Q] = np.minimum(np.arange(MAX_SEQUENCES + 1), rows)
        sequences[_STARTS_K, :rows] = first_rows
        sequences[_LENGTHS, :rows] = positions + 1
    elif len(counts) > MAX_PROMPTS:
        raise ValueError(f"{rows} rows belong to {len(counts)} sequences, but at most {MAX_PROMPTS} are possible")
    else:
        sequences[_STARTS_Q, 1:] = rows
        sequences[_STARTS_Q, 1 : len(counts) + 1] = ends
        sequences[_STARTS_K, : len(counts)] = slots
        sequences[_LENGTHS, : len(counts)] = old + counts
    return StepBatch(positions, first_rows + positions, sequences)


class StepTensors(nn.Module):
    """The numbers of the current step on the device, always in the same memory.

    Args:
        max_tokens: rows of the largest call.
        device: where they lie.
    """

    positions: Tensor
    cache_rows: Tensor
    sequences: Tensor

    def __init__(self, max_tokens: int, device: torch.device | str) -> None:
        super().__init__()
        for name in ("positions", "cache_rows"):
            self.register_buffer(name, torch.zeros(max_tokens, dtype=torch.int64, device=device), persistent=False)
        table = torch.zeros(3, MAX_SEQUENCES + 1, dtype=torch.int32, device=device)
        self.register_buffer("sequences", table, persistent=False)
        is_cuda = torch.device(device).type == "cuda"
        self._ring = [
            (
                torch.zeros(2, max_tokens, dtype=torch.int64, pin_memory=is_cuda),
                torch.zeros(3, MAX_SEQUENCES + 1, dtype=torch.int32, pin_memory=is_cuda),
                torch.cuda.Event() if is_cuda else None,
            )
            for _ in range(_RING)
        ]
        self._fills = 0

    def fill(self, batch: StepBatch) -> Tensor:
        """Bring the numbers of `batch` to the device, in the current stream's order; returns the positions `[rows]`."""
        rows = batch.num_tokens
        longs, table, has_left = self._ring[self._fills % _RING]
        if has_left is not None and self._fills >= _RING:
            has_left.synchronize()
        self._fills += 1
        on_host = longs.numpy()
        on_host[0, :rows], on_host[1, :rows] = batch.positions, batch.cache_rows
        table.numpy()[:] = batch.sequences
        positions = self.positions[:rows]
        positions.copy_(longs[0, :rows], non_blocking=True)
        self.cache_rows[:rows].copy_(longs[1, :rows], non_blocking=True)
        self.sequences.copy_(table, non_blocking=True)
        if has_left is not None:
            has_left.record()
        return positions


def _attend(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor,
    cache_rows: Tensor, sequences: Tensor, longest_of_few: int, longest_of_many: int,
) -> None:  # fmt: skip
    """Attention of `q`, `[rows, heads, d]`, into `out`; caches are `[cache rows, kv_heads, d]`.

    No sequence is longer than `longest_of_few` where each row is one, and than `longest_of_many` in larger calls.
    """
    rows = q.shape[0]
    longest = longest_of_few if rows <= MAX_SEQUENCES else longest_of_many
    k_cache.index_copy_(0, cache_rows[:rows], k)
    v_cache.index_copy_(0, cache_rows[:rows], v)
    if not (q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)):
        out.copy_(_masked(q, k_cache, v_cache, cache_rows[:rows], sequences, longest))
        return
    most_rows, count = (1, rows) if rows <= MAX_SEQUENCES else (rows, MAX_PROMPTS)
    found = torch.ops.aten._flash_attention_forward(
        q, k_cache, v_cache, sequences[_STARTS_Q, : count + 1], sequences[_STARTS_K, : count + 1], most_rows, longest,
        0.0, True, False, seqused_k=sequences[_LENGTHS, :count],
    )  # fmt: skip
    out.copy_(found[0])


def _masked(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_rows: Tensor, sequences: Tensor, longest: int) -> Tensor:
    """The same by products over as many rows as the longest slot has, for each query."""
    rows, heads, d = q.shape
    number = torch.arange(rows, device=q.device)
    if rows > MAX_SEQUENCES:
        number = torch.searchsorted(sequences[_STARTS_Q, 1 : MAX_PROMPTS + 1], number.int(), right=True)
    starts = sequences[_STARTS_K].long()[number]
    nth = torch.arange(longest, device=q.device)
    is_seen = nth <= (cache_rows - starts)[:, None]
    places = (starts[:, None] + nth).clamp(max=k_cache.shape[0] - 1)
    keys, values = (cache[places].transpose(1, 2) for cache in (k_cache, v_cache))  # [rows, kv_heads, longest, d]
    queries = q.view(rows, keys.shape[1], -1, d)
    mask = is_seen[:, None, None].expand(-1, -1, queries.shape[2], -1)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).reshape(rows, heads, d)


def _choose(x: Tensor, weight: Tensor, sequences: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row the largest logit in `x @ weight.T`, float32, and its token; of more than `MAX_SEQUENCES` rows, those
    of the last row of each sequence, in their order, before zeros."""
    rows = x.shape[0]
    if rows <= MAX_SEQUENCES:
        values, tokens = F.linear(x, weight).max(-1)
        return values.float(), tokens
    values = torch.zeros(rows, dtype=torch.float32, device=x.device)
    tokens = torch.zeros(rows, dtype=torch.int64, device=x.device)
    last = sequences[_STARTS_Q, 1 : MAX_PROMPTS + 1].long() - 1
    found = F.linear(x[last], weight).max(-1)
    values[:MAX_PROMPTS], tokens[:MAX_PROMPTS] = found.values.float(), found.indices
    return values, tokens


def rows_with_choice(batch: StepBatch) -> np.ndarray:
    """The rows for which `choose` gives tokens, in the order in which it does."""
    rows = batch.num_tokens
    return np.arange(rows) if rows <= MAX_SEQUENCES else batch.sequences[_STARTS_Q, 1 : MAX_PROMPTS + 1] - 1


# Registered without `custom_op`, whose Python kernels for autograd cost the host more than the attention does.
_LIBRARY = torch.library.Library("slot_attention", "DEF")
_LIBRARY.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) out, Tensor cache_rows, "
    "Tensor sequences, int longest_of_few, int longest_of_many) -> ()",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_LIBRARY.define("choose(Tensor x, Tensor weight, Tensor sequences) -> (Tensor, Tensor)")
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("attend", _attend, _key)
    _LIBRARY.impl("choose", _choose, _key)


@torch.library.register_fake("slot_attention::attend", lib=_LIBRARY)
def _(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor,
    cache_rows: Tensor, sequences: Tensor, longest_of_few: int, longest_of_many: int,
) -> None:  # fmt: skip
    return None


@torch.library.register_fake("slot_attention::choose", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, sequences: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(x.shape[0], dtype=torch.int64)

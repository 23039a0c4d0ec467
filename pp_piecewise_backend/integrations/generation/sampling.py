"""Chooses tokens, the same ones for a seed however sequences were put together into micro-batches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def draw(
    logits: torch.Tensor, keys: Sequence[tuple[int, ...]], *, temperature: float, top_p: float, seed: int
) -> torch.Tensor:
    """One token per row of ``logits`` ``[n, vocabulary]``, int64 ``[n]`` on their device.

    Args:
        keys: what each row is, such as prompt and position: equal keys draw equally.
        temperature: above 0; less of it favours likely tokens.
        top_p: tokens are drawn of the likeliest ones that together have this probability.
    """
    # On the CPU in float64, so that devices draw alike.
    probabilities = (logits.double().cpu() / temperature).softmax(-1)
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)
    chosen = []
    for row, key in zip(ordered, keys, strict=True):
        generator = torch.Generator().manual_seed(_seed_of((seed, *key)))
        chosen.append(torch.multinomial(row, 1, generator=generator))
    return tokens.gather(1, torch.stack(chosen))[:, 0].to(logits.device)


def _seed_of(numbers: tuple[int, ...]) -> int:
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")

"""A decoder stage for micro-batches of any tokens of any sequences, and the memory that their keys and values share.

    rows = DecoderRows(stage)
    cache = rows.new_cache(sequences=4, max_cache_tokens=64)
    places = cache.places(sequence=2, position=7, count=3)      # three tokens of the third sequence
    results = rows(input_ids=tokens, places=places, past_key_values=cache)

All sequences of one cache are attended to in one call: row i sees the keys of its own sequence up to its own position.
So prompts, parts of prompts and next tokens of different lengths share a micro-batch, and the only size that varies is
the number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..runtime.stage import Proxy
from .decoder_stages import DecoderStage, stage_proxies

RETURNS = ("tokens", "logits")
_KINDS_OF_LAYERS = {"full_attention", "sliding_attention"}


class SlotCache:
    """Keys and values of the local layers for several sequences, in memory that never moves.

    The place of a token is ``sequence * max_cache_tokens + position``. What an earlier sequence left in the places of a
    new one is never seen: a row sees positions up to its own only, which the new sequence has written.
    """

    def __init__(self, layer_count: int, sequences: int, max_cache_tokens: int, device: torch.device) -> None:
        self.sequences = sequences
        self.max_cache_tokens = max_cache_tokens
        self.keys: list[Any] = [None] * layer_count
        self.values: list[Any] = [None] * layer_count
        all_places = torch.arange(sequences * max_cache_tokens, device=device)
        self.sequence_of = all_places // max_cache_tokens
        self.position_of = all_places % max_cache_tokens

    @property
    def place_count(self) -> int:
        return self.sequences * self.max_cache_tokens

    def places(self, sequence: int, position: int, count: int = 1) -> torch.Tensor:
        """Of ``count`` tokens of a sequence, the first at ``position``."""
        begin = sequence * self.max_cache_tokens + position
        return torch.arange(begin, begin + count, device=self.position_of.device)


class _Writing:
    """What a decoder takes for its cache: ``update`` writes the tokens of this call at their places."""

    is_compileable = True

    def __init__(self, cache: SlotCache, places: torch.Tensor) -> None:
        self.cache = cache
        self.at = places

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cache = self.cache
        if cache.keys[layer_idx] is None:
            cache.keys[layer_idx] = keys.new_zeros(1, keys.shape[1], cache.place_count, keys.shape[3])
            cache.values[layer_idx] = values.new_zeros(1, values.shape[1], cache.place_count, values.shape[3])
        all_keys, all_values = cache.keys[layer_idx], cache.values[layer_idx]
        all_keys.index_copy_(2, self.at, keys)
        all_values.index_copy_(2, self.at, values)
        return all_keys, all_values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are given


class DecoderRows(nn.Module):
    """A `DecoderStage` for rows that are tokens of any sequences; results and proxies have one row per token.

    ``returns`` says what the last stage gives: ``"tokens"`` (int64 ``[n]``, the likeliest next ones), ``"logits"``
    (``[n, vocabulary]``), or both. Raises `ValueError` for other names, and for decoders with layers that neither
    attend to all earlier tokens nor to a sliding window of them.
    """

    def __init__(self, stage: DecoderStage, *, returns: Sequence[str] = ("tokens",)) -> None:
        super().__init__()
        if not returns or not set(returns) <= set(RETURNS):
            raise ValueError(f"returns={returns!r}: one or both of {', '.join(RETURNS)} are expected.")
        self.stage = stage
        self.returns = tuple(returns)
        config = stage.config
        kinds = getattr(config, "layer_types", None)
        if others := set(kinds or ()) - _KINDS_OF_LAYERS:
            raise ValueError(
                f"{type(stage.decoder).__name__} has layers of the kind {', '.join(sorted(others))}; only "
                f"{' and '.join(sorted(_KINDS_OF_LAYERS))} can share a micro-batch."
            )
        self._has_kinds = "sliding_attention" in (kinds or ())
        has_window = self._has_kinds or kinds is None
        self._window: int | None = getattr(config, "sliding_window", None) if has_window else None

    @property
    def proxies(self) -> dict[str, Proxy]:
        """What one stage hands to the next."""
        return stage_proxies(self.stage)

    @torch.no_grad()
    def new_cache(self, sequences: int, max_cache_tokens: int) -> SlotCache:
        """Memory for ``sequences`` of at most ``max_cache_tokens`` each; there at once, and it never moves."""
        base = self.stage.decoder.base_model
        device = next(base.parameters()).device
        cache = SlotCache(len(self.stage.layers), sequences, max_cache_tokens, device)
        if self.stage.is_first:
            row = {"input_ids": torch.zeros(1, dtype=torch.int64, device=device)}
        else:
            row = {"hidden_states": torch.zeros(1, base.config.hidden_size, dtype=base.dtype, device=device)}
        self(**row, places=cache.places(0, 0), past_key_values=cache)  # the layers know the shapes once they run
        return cache

    def forward(
        self,
        places: torch.Tensor,
        past_key_values: SlotCache,
        input_ids: torch.Tensor | None = None,
        hidden_states: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """``{"hidden_states": [n, hidden]}``; on the last stage what ``returns`` names.

        The first stage takes ``input_ids`` (int64 ``[n]``), later ones ``hidden_states`` (``[n, hidden]``). ``places``
        (int64 ``[n]``, all different) say which token of which sequence each row is; tokens of a sequence are given in
        order, over as many calls as one likes. The cache is updated in place; what is returned belongs to the caller.
        """
        cache = past_key_values
        positions, sequences = places % cache.max_cache_tokens, places // cache.max_cache_tokens
        output = self.stage(
            input_ids=None if input_ids is None else input_ids[None],
            hidden_states=None if hidden_states is None else hidden_states[None],
            position_ids=positions[None],
            attention_mask=self._masks(cache, positions, sequences),
            past_key_values=_Writing(cache, places),
        )[0]
        if not self.stage.is_last:
            return {"hidden_states": output}
        results = {"tokens": output.argmax(-1)} if "tokens" in self.returns else {}
        return results | ({"logits": output} if "logits" in self.returns else {})

    def _masks(self, cache: SlotCache, positions: torch.Tensor, sequences: torch.Tensor) -> Any:
        """0 where a row sees a place and the least number where not, ``[1, 1, n, places]``; per kind of layer."""
        distance = positions[:, None] - cache.position_of
        is_seen = (sequences[:, None] == cache.sequence_of) & (distance >= 0)
        within = is_seen if self._window is None else is_seen & (distance < self._window)
        if not self._has_kinds:
            return self._added(within)
        return {"full_attention": self._added(is_seen), "sliding_attention": self._added(within)}

    def _added(self, is_seen: torch.Tensor) -> torch.Tensor:
        dtype = self.stage.decoder.base_model.dtype
        zero = torch.zeros((), dtype=dtype, device=is_seen.device)
        return torch.where(is_seen, zero, torch.finfo(dtype).min)[None, None]

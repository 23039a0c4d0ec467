"""Tiny random-weight decoders from transformers, and greedy decoding with each kind of KV cache.

The weights are drawn with a standard deviation far above the library's default, so that the best
and the second best next token lie well apart: "same tokens" is then a statement about the model and
not about the rounding of two equal logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

VOCAB_SIZE = 128
MAX_CACHE_TOKENS = 64
WEIGHT_STD = 0.3

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": WEIGHT_STD,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "output_router_logits": False}

# Architecture -> what its configuration needs besides `_COMMON`.
_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 32, **_EXPERTS}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, **_EXPERTS}),
    "gemma2": ("Gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}),
    "phi3": ("Phi3", {}),
}
ARCHITECTURES: tuple[str, ...] = (*_ARCHITECTURES, "gpt2")
CACHES: tuple[str, ...] = ("static", "dynamic")


def make_config(architecture: str, num_layers: int) -> PretrainedConfig:
    """The configuration of a tiny decoder; `architecture` is one of `ARCHITECTURES`."""
    if architecture == "gpt2":
        return transformers.GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_embd=32,
            n_layer=num_layers,
            n_head=4,
            n_positions=128,
            initializer_range=WEIGHT_STD,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
        )
    name, extra = _ARCHITECTURES[architecture]
    config_class = getattr(transformers, f"{name}Config")
    return config_class(**{**_COMMON, "num_hidden_layers": num_layers, **extra})


def _capped_flex_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Soft-capped attention, one FlexAttention call: `[1, heads, tokens, d]` to `[1, tokens, heads, d]`.

    The mask is a boolean tensor that the score function captures; a block mask would be made by Python
    that Dynamo cannot trace for a cache.
    """
    assert softcap is not None

    def score(
        score: torch.Tensor,
        batch: torch.Tensor,
        head: torch.Tensor,
        query_at: torch.Tensor,
        key_at: torch.Tensor,
    ) -> torch.Tensor:
        capped = softcap * torch.tanh(score / softcap)
        return torch.where(attention_mask[batch, 0, query_at, key_at], capped, float("-inf"))

    output = flex_attention(query, key, value, score_mod=score, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None


def _full_mask(*args: Any, **kwargs: Any) -> torch.Tensor:
    """transformers' boolean mask for SDPA, never left out as "SDPA's `is_causal` does that"."""
    mask = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    assert mask is not None
    return mask


CAPPED_FLEX = "capped_flex"
AttentionInterface.register(CAPPED_FLEX, _capped_flex_attention)
AttentionMaskInterface.register(CAPPED_FLEX, _full_mask)


def make_model(architecture: str, num_layers: int = 2, seed: int = 0, attention: str | None = None) -> PreTrainedModel:
    """A tiny decoder in float32, evaluation mode, on the CPU, with the weights that `seed` gives.

    `attention` names transformers' attention implementation; None is the library's own choice (SDPA, but
    for Gemma2, whose soft cap SDPA cannot express, plain matmul and softmax).
    """
    torch.manual_seed(seed)
    config = make_config(architecture, num_layers)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def make_cache(kind: str, config: PretrainedConfig) -> Cache:
    """A new, empty KV cache of `kind` ("static" or "dynamic")."""
    if kind == "static":
        return StaticCache(config=config, max_cache_len=MAX_CACHE_TOKENS)
    return DynamicCache(config=config)


def make_prompts(lengths_tokens: Iterable[int], seed: int = 0) -> list[torch.Tensor]:
    """One prompt `[1, length]` of token ids (int64) for each of `lengths_tokens`."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (1, length), generator=generator) for length in lengths_tokens]


@dataclass(frozen=True)
class Decoded:
    """What greedy decoding of a list of prompts gave."""

    tokens: list[list[int]]
    """Per prompt the tokens generated: one by the prefill and one per decode step."""
    logits: list[torch.Tensor]
    """Per prompt `[1 + steps, vocab]`: the logits that each token was chosen from."""
    calls: int
    """How often the model was called."""

    def smallest_margin(self) -> float:
        """The smallest distance between the best and the second best logit of any choice."""
        best_two = torch.cat(self.logits).float().topk(2, dim=-1).values
        return float((best_two[:, 0] - best_two[:, 1]).min())


def greedy_decode(
    model: Callable[..., Any],
    config: PretrainedConfig,
    prompts: Iterable[torch.Tensor],
    *,
    cache_kind: str,
    steps: int = 16,
) -> Decoded:
    """Each prompt is a conversation of its own: a new cache, one prefill, then `steps` decode steps."""
    tokens: list[list[int]] = []
    logits: list[torch.Tensor] = []
    calls = 0
    for prompt in prompts:
        cache = make_cache(cache_kind, config)
        step_ids = prompt
        chosen: list[torch.Tensor] = []
        for _ in range(1 + steps):
            output = model(input_ids=step_ids, past_key_values=cache, use_cache=True)
            calls += 1
            chosen.append(output.logits[0, -1].clone())
            step_ids = chosen[-1].argmax().view(1, 1)
        logits.append(torch.stack(chosen))
        tokens.append(logits[-1].argmax(dim=-1).tolist())
    return Decoded(tokens, logits, calls)

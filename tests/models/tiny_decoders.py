"""Tiny decoders of all architectures that can be cut, with random weights of which none is zero or one."""

from __future__ import annotations

from typing import Any

import torch
import transformers

LAYERS = 4
TINY: dict[str, Any] = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
EXPERTS: dict[str, Any] = dict(moe_intermediate_size=24, num_experts=4, num_local_experts=4, num_experts_per_tok=2)
WINDOW: dict[str, Any] = dict(
    sliding_window=6,
    layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
)
DECODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", dict(tie_word_embeddings=True)),
    "qwen2-window": ("Qwen2ForCausalLM", "Qwen2Config", dict(use_sliding_window=True, **WINDOW)),
    "qwen2-tied": ("Qwen2ForCausalLM", "Qwen2Config", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", dict(head_dim=8)),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", dict(head_dim=8, **EXPERTS)),
    "gemma2-window": ("Gemma2ForCausalLM", "Gemma2Config", dict(head_dim=8, **WINDOW)),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", dict(head_dim=8)),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", EXPERTS),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", dict(no_rope_layers=[1, 0, 1, 1])),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", dict(head_dim=8, **EXPERTS, **WINDOW)),
}


def tiny_decoder(name: str, layers: int = LAYERS) -> transformers.PreTrainedModel:
    """With fewer ``layers`` where their kinds are all alike."""
    model_class, config_class, extra = DECODERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**TINY, **extra, "num_hidden_layers": layers})
    model = getattr(transformers, model_class)(config).eval()
    # Zero biases and unit norms would hide a stage that took the wrong ones.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model

"""A pipeline stage as inference engines write theirs: attention learns from a forward context what no graph shows it.

``forward(input_ids, positions, hidden_states=None, residual=None)`` returns a dict. The attention op is given a name,
and finds under it the layer with its KV cache; which request and position each token has, it finds in the context that
was set before the forward. Weights depend on a seed alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.toy_stage import ToyMLP, ToyNorm, _cos_sin, _rotate

SPLIT_OPS = "+engine::attention"
"""The ``split_ops`` option that names this stage's attention."""


@dataclass(frozen=True)
class ForwardContext:
    """What attention must know of the tokens of one forward.

    Args:
        requests: ``[tokens]`` int64, the request of each token.
        positions: ``[tokens]`` int64, where each token stands in its request.
        failing: the next attention raises.
    """

    requests: Tensor
    positions: Tensor
    failing: bool = False


_context: ForwardContext | None = None


def set_forward_context(context: ForwardContext | None) -> None:
    """For the forwards that follow; without one, as at warm-up, attention gives zeros and touches no cache."""
    global _context
    _context = context


_layers: dict[str, EngineAttention] = {}


@torch.library.custom_op("engine::attention", mutates_args=("out",))
def attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, layer_name: str) -> None:
    """Cached causal attention of each token within its request, into ``out``, ``[tokens, heads, d]``."""
    if _context is None:
        out.zero_()
        return
    if _context.failing:
        raise ArithmeticError(f"attention of {layer_name} failed")
    requests, positions, layer = _context.requests, _context.positions, _layers[layer_name]
    layer.k_cache[requests, positions] = k
    layer.v_cache[requests, positions] = v
    groups = q.shape[1] // k.shape[1]
    keys, values = (c[requests].repeat_interleave(groups, dim=2) for c in (layer.k_cache, layer.v_cache))
    scores = torch.einsum("thd,tshd->ths", q, keys) * q.shape[-1] ** -0.5
    visible = torch.arange(keys.shape[1]) <= positions[:, None, None]
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    out.copy_(torch.einsum("ths,tshd->thd", weights, values))


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, out: Tensor, layer_name: str) -> None:
    return None


class EngineAttention(nn.Module):
    """Registers itself under ``name``; the cache is no buffer, so nothing of it is an input of the graph."""

    def __init__(self, name: str, hidden: int, heads: int, kv_heads: int, requests: int, max_positions: int) -> None:
        super().__init__()
        self.name, self.heads, self.kv_heads, self.head_dim = name, heads, kv_heads, hidden // heads
        self.qkv = nn.Linear(hidden, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.k_cache, self.v_cache = (torch.zeros(requests, max_positions, kv_heads, self.head_dim) for _ in range(2))
        _layers[name] = self

    def forward(self, x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        q, k, v = self.qkv(x).split([q_size, kv_size, kv_size], dim=-1)
        cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
        q = _rotate(q.view(-1, self.heads, self.head_dim), cos, sin)
        k = _rotate(k.view(-1, self.kv_heads, self.head_dim), cos, sin)
        attended = torch.empty_like(q)
        torch.ops.engine.attention(q, k, v.view(-1, self.kv_heads, self.head_dim), attended, self.name)
        return self.out(attended.view(-1, q_size))


class EngineLayer(nn.Module):
    def __init__(self, attention: EngineAttention, hidden: int) -> None:
        super().__init__()
        self.input_norm = ToyNorm(hidden, in_place=False)
        self.attention = attention
        self.mlp_norm = ToyNorm(hidden, in_place=False)
        self.mlp = ToyMLP(hidden)

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None, positions: Tensor, cos_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden_states, residual = self.input_norm(hidden_states, residual)
        hidden_states, residual = self.mlp_norm(self.attention(hidden_states, positions, cos_sin), residual)
        return self.mlp(hidden_states), residual


class EngineStage(nn.Module):
    """Stage ``index`` of ``count``, with ``num_layers`` layers; stages of one seed and count are one model.

    Args:
        prefix: begins the names of the layers; no two stages of a process may share it.
        requests: rows of the KV cache, each with room for ``max_positions`` tokens.
    """

    def __init__(
        self,
        index: int,
        count: int,
        *,
        prefix: str = "",
        num_layers: int = 2,
        hidden: int = 16,
        heads: int = 2,
        kv_heads: int = 1,
        vocab_size: int = 32,
        requests: int = 8,
        max_positions: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        names = [f"{prefix}{index}.{layer}" for layer in range(num_layers)]
        self.embedding = nn.Embedding(vocab_size, hidden) if index == 0 else None
        self.layers = nn.ModuleList(
            EngineLayer(EngineAttention(name, hidden, heads, kv_heads, requests, max_positions), hidden)
            for name in names
        )
        self.norm = ToyNorm(hidden, in_place=False) if index == count - 1 else None
        self.head = nn.Linear(hidden, vocab_size, bias=False) if index == count - 1 else None
        self.register_buffer("cos_sin", _cos_sin(max_positions, hidden // heads))
        self.requires_grad_(False)
        generator = torch.Generator().manual_seed(1000 * seed + index)
        for parameter in self.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
            parameter.copy_(noise + 1 if parameter.dim() == 1 else noise)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        hidden_states: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Two proxies ``[tokens, hidden]``; on the last stage ``logits`` ``[tokens, vocab]`` and likeliest tokens."""
        if self.embedding is not None:
            hidden_states, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual, positions, self.cos_sin)
        if self.norm is None or self.head is None:
            return {"hidden_states": hidden_states, "residual": residual}
        logits = self.head(self.norm(hidden_states, residual)[0])
        return {"logits": logits, "next_tokens": logits.argmax(dim=-1)}

"""A pipeline stage in the style of inference engines: flattened tokens, two proxies, opaque attention.

Tokens of all requests lie in one dimension, `[tokens, hidden]`. Between the stages travel the hidden
states and the residual that the next fused add + RMSNorm adds to them. Attention is a custom op that
writes the KV cache (a buffer of the layer) and, as engines do, an output argument. Weights, cache and
inputs depend on seeds alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NAMED_OPS = {"split_ops": "+toy::attention*", "graph_safe_ops": "toy::fused*"}
"""The options that name this stage's own ops."""

ROTARY_BASE = 10_000.0


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x_float = x.float()
    return (x_float * torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


@torch.library.custom_op("toy::fused_add_rms_norm_", mutates_args=("x", "residual"))
def fused_add_rms_norm_(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    """In place: `residual += x`, then `x = rms_norm(residual) * weight`; both are `[tokens, hidden]`."""
    residual.add_(x)
    x.copy_(_rms_norm(residual, weight, eps))


@fused_add_rms_norm_.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    return None


def _attend(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor) -> Tensor:
    """Write `k` and `v` at `positions`, then let each token attend to the cache up to its own position."""
    k_cache[positions] = k
    v_cache[positions] = v
    groups = q.shape[1] // k.shape[1]
    keys = k_cache.repeat_interleave(groups, dim=1)
    values = v_cache.repeat_interleave(groups, dim=1)
    scores = torch.einsum("thd,shd->hts", q, keys) * q.shape[-1] ** -0.5
    visible = torch.arange(k_cache.shape[0], device=q.device) <= positions[:, None]
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hts,shd->thd", weights, values).contiguous()


@torch.library.custom_op("toy::attention", mutates_args=("k_cache", "v_cache"))
def attention(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, layer_index: int
) -> Tensor:
    """Causal attention over the cache; returns a fresh `[tokens, heads, d]`."""
    return _attend(q, k, v, k_cache, v_cache, positions)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, layer_index: int) -> Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("toy::attention_with_output", mutates_args=("k_cache", "v_cache", "out"))
def attention_with_output(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    out: Tensor,
    layer_index: int,
) -> None:
    """Causal attention over the cache, written into `out`, `[tokens, heads, d]`."""
    out.copy_(_attend(q, k, v, k_cache, v_cache, positions))


@attention_with_output.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    out: Tensor,
    layer_index: int,
) -> None:
    return None


class ToyNorm(nn.Module):
    """RMSNorm, alone or fused with the addition of the residual."""

    def __init__(self, hidden: int, in_place: bool, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.in_place = in_place
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """`(normed, residual)`, both `[tokens, hidden]`; with `in_place` they are the arguments' memory."""
        if residual is None:
            return _rms_norm(x, self.weight, self.eps), x
        if self.in_place:
            torch.ops.toy.fused_add_rms_norm_(x, residual, self.weight, self.eps)
            return x, residual
        residual = residual + x
        return _rms_norm(residual, self.weight, self.eps), residual


class ToyAttention(nn.Module):
    def __init__(
        self, layer_index: int, hidden: int, heads: int, kv_heads: int, max_tokens: int, output_argument: bool
    ) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, hidden // heads
        self.output_argument = output_argument
        self.qkv = nn.Linear(hidden, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.register_buffer("k_cache", torch.zeros(max_tokens, kv_heads, self.head_dim))
        self.register_buffer("v_cache", torch.zeros(max_tokens, kv_heads, self.head_dim))

    def forward(self, x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        q, k, v = self.qkv(x).split([q_size, kv_size, kv_size], dim=-1)
        cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
        q = _rotate(q.view(-1, self.heads, self.head_dim), cos, sin)
        k = _rotate(k.view(-1, self.kv_heads, self.head_dim), cos, sin)
        v = v.view(-1, self.kv_heads, self.head_dim)
        if self.output_argument:
            attended = torch.empty_like(q)
            torch.ops.toy.attention_with_output(
                q, k, v, self.k_cache, self.v_cache, positions, attended, self.layer_index
            )
        else:
            attended = torch.ops.toy.attention(q, k, v, self.k_cache, self.v_cache, positions, self.layer_index)
        return self.out(attended.view(-1, q_size))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class ToyMLP(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 4 * hidden, bias=False)
        self.down = nn.Linear(2 * hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class ToyLayer(nn.Module):
    def __init__(self, attention: ToyAttention, hidden: int, inplace_norm: bool) -> None:
        super().__init__()
        self.input_norm = ToyNorm(hidden, inplace_norm)
        self.attention = attention
        self.mlp_norm = ToyNorm(hidden, inplace_norm)
        self.mlp = ToyMLP(hidden)

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None, positions: Tensor, cos_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden_states, residual = self.input_norm(hidden_states, residual)
        hidden_states = self.attention(hidden_states, positions, cos_sin)
        hidden_states, residual = self.mlp_norm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class ToyStage(nn.Module):
    """`num_layers` decoder layers; with `first` also the embedding, with `last` also norm and head.

    `max_tokens` bounds the positions. With `inplace_norm` the fused add + RMSNorm is an opaque in-place
    op; on a stage that is not the first it then overwrites the caller's proxies, as engines' kernels do.
    With `attention_output_argument` attention writes into a tensor that the layer made, else it returns one.
    """

    def __init__(
        self,
        num_layers: int,
        hidden: int = 64,
        heads: int = 4,
        kv_heads: int = 2,
        vocab_size: int = 128,
        max_tokens: int = 64,
        *,
        first: bool = False,
        last: bool = False,
        inplace_norm: bool = False,
        attention_output_argument: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.hidden, self.vocab_size, self.max_tokens = hidden, vocab_size, max_tokens
        self.embedding = nn.Embedding(vocab_size, hidden) if first else None
        self.layers = nn.ModuleList(
            ToyLayer(
                ToyAttention(index, hidden, heads, kv_heads, max_tokens, attention_output_argument),
                hidden,
                inplace_norm,
            )
            for index in range(num_layers)
        )
        self.norm = ToyNorm(hidden, inplace_norm) if last else None
        self.head = nn.Linear(hidden, vocab_size, bias=False) if last else None
        self.register_buffer("cos_sin", _cos_sin(max_tokens, hidden // heads))
        self.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            scale = 0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise + 1 if parameter.dim() == 1 else noise)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        hidden_states: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """`(hidden_states, residual)`, each `[tokens, hidden]`, or on the last stage `[tokens, vocab]`."""
        if self.embedding is not None:
            hidden_states, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual, positions, self.cos_sin)
        if self.norm is None or self.head is None:
            return hidden_states, residual
        return self.head(self.norm(hidden_states, residual)[0])

    def make_inputs(self, tokens: int, start: int = 0, seed: int = 0) -> dict[str, Tensor | None]:
        """Keyword arguments of `forward` for `tokens` tokens at positions from `start` on.

        Never the same memory twice. What the stage does not take (token ids on a later stage, proxies on
        the first) is None.
        """
        generator = torch.Generator().manual_seed(seed)
        positions = torch.arange(start, start + tokens)
        if self.embedding is not None:
            ids = torch.randint(self.vocab_size, (tokens,), generator=generator)
            return {"input_ids": ids, "positions": positions, "hidden_states": None, "residual": None}
        hidden_states, residual = (
            torch.randn(tokens, self.hidden, generator=generator) for _ in ("hidden_states", "residual")
        )
        return {
            "input_ids": None,
            "positions": positions,
            "hidden_states": hidden_states,
            "residual": residual,
        }


def _cos_sin(max_tokens: int, head_dim: int) -> Tensor:
    """`[max_tokens, head_dim]`: cosines of the rotary angles, then their sines."""
    frequencies = ROTARY_BASE ** -(torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.arange(max_tokens)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)

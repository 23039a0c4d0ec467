"""Middle stages in the style of inference engines, with the shapes of real models and random weights.

A stage is half of the layers of a model. Tokens of all requests lie in one dimension; `hidden_states` and `residual`,
both `[tokens, hidden]`, come from the stage before and go to the one behind. RMSNorm, rotary positions, grouped query
attention and SwiGLU as in Llama and Qwen2.

Attention is one opaque op that writes its output argument and the KV cache of the layer. What it is to do with these
rows (`Metadata`) is set outside of the graph before each call, as engines do. Up to `MAX_SEQUENCES` rows are decode:
one token each of as many sequences, all at the last position of their context; more rows are the prefill of one
sequence. The op copies keys and values into the cache (two kernels), runs scaled dot product attention over the cache
(decode) or over the new rows (prefill), and copies the result into its output argument. Decode folds the query heads
that share a key head into the query length, so that no key is repeated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_SEQUENCES = 64
"""More rows than these are the prefill of one sequence."""

NORM_EPSILON = 1e-6
NAMED_OPS = {"split_ops": "+gpu_stage::attention", "graph_safe_ops": "gpu_stage::attention"}
"""The options that name this stage's attention; a full graph holds it, too."""


@dataclass(frozen=True)
class Shape:
    """The shape of one stage of a model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_base: float
    qkv_bias: bool


SHAPES = {
    "tiny": Shape(2, 64, 128, 4, 2, 16, 10_000.0, True),
    "qwen2.5-0.5b": Shape(24 // 2, 896, 4864, 14, 2, 64, 1_000_000.0, True),
    "qwen2.5-7b": Shape(28 // 2, 3584, 18944, 28, 4, 128, 1_000_000.0, True),
    "llama-3.1-8b": Shape(32 // 2, 4096, 14336, 32, 8, 128, 500_000.0, False),
}
"""Half of the layers of each model; the rotary scaling of Llama 3.1 is left out, since it changes no shape."""


@dataclass(frozen=True)
class Metadata:
    """What attention has to know about a call besides its tensors."""

    num_tokens: int
    context_tokens: int
    """Length of each sequence in decode, with the new token."""

    @property
    def is_decode(self) -> bool:
        return self.num_tokens <= MAX_SEQUENCES


_current: Metadata | None = None


def set_metadata(metadata: Metadata) -> None:
    """Say what the calls that follow are about."""
    global _current
    _current = metadata


def _attention(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor) -> None:
    """Attention of `q`, `[tokens, heads, d]`, into `out`; caches are `[slots, kv_heads, d]`."""
    metadata = _current
    tokens, heads, d = q.shape
    if metadata is None or metadata.num_tokens != tokens:
        raise RuntimeError(f"attention was called with {tokens} rows, but the metadata is {metadata}")
    kv_heads = k.shape[1]
    if not metadata.is_decode:
        k_cache[:tokens].copy_(k)
        v_cache[:tokens].copy_(v)
        queries, keys, values = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        out.copy_(attended[0].transpose(0, 1))
        return
    # Sequence i has the slots from i * context on. Views by as_strided, since each view costs the host time.
    row, context = kv_heads * d, metadata.context_tokens
    new = (tokens, kv_heads, d), (context * row, d, 1)
    k_cache.as_strided(*new, k_cache.storage_offset() + (context - 1) * row).copy_(k)
    v_cache.as_strided(*new, v_cache.storage_offset() + (context - 1) * row).copy_(v)
    whole = (tokens, kv_heads, context, d), (context * row, d, row, 1)
    queries = q.view(tokens, kv_heads, heads // kv_heads, d)
    attended = F.scaled_dot_product_attention(queries, k_cache.as_strided(*whole), v_cache.as_strided(*whole))
    out.view(attended.shape).copy_(attended)  # this way round, since kernels may return it transposed in memory


# Registered without `custom_op`, whose Python kernels for autograd cost the host more than the attention does.
_LIBRARY = torch.library.Library("gpu_stage", "DEF")
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) out) -> ()",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("attention", _attention, _key)


@torch.library.register_fake("gpu_stage::attention", lib=_LIBRARY)
def _(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor) -> None:
    return None


Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]


class Attention(nn.Module):
    k_cache: Tensor
    v_cache: Tensor

    def __init__(self, shape: Shape, slots: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        self.attend: Attend | None = None
        self.q_size, self.kv_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.qkv = nn.Linear(shape.hidden, self.q_size + 2 * self.kv_size, bias=shape.qkv_bias, dtype=dtype)
        self.out = nn.Linear(self.q_size, shape.hidden, bias=False, dtype=dtype)
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.empty(slots, shape.kv_heads, shape.head_dim, dtype=dtype))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q = rotate(q.view(-1, self.shape.heads, self.shape.head_dim), cos, sin)
        k = rotate(k.view(-1, self.shape.kv_heads, self.shape.head_dim), cos, sin)
        v = v.view(-1, self.shape.kv_heads, self.shape.head_dim)
        attended = torch.empty_like(q)
        if self.attend is None:
            torch.ops.gpu_stage.attention(q, k, v, self.k_cache, self.v_cache, attended)
        else:
            self.attend(q, k, v, self.k_cache, self.v_cache, attended)
        return self.out(attended.view(-1, self.q_size))


class Layer(nn.Module):
    def __init__(self, shape: Shape, slots: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_norm = nn.Parameter(torch.empty(shape.hidden, dtype=dtype))
        self.attention = Attention(shape, slots, dtype)
        self.mlp_norm = nn.Parameter(torch.empty(shape.hidden, dtype=dtype))
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.intermediate, bias=False, dtype=dtype)
        self.down = nn.Linear(shape.intermediate, shape.hidden, bias=False, dtype=dtype)

    def forward(self, hidden_states: Tensor, residual: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        residual = residual + hidden_states
        hidden_states = self.attention(rms_norm(residual, self.input_norm), cos, sin)
        residual = residual + hidden_states
        gate, up = self.gate_up(rms_norm(residual, self.mlp_norm)).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up), residual


class GPUStage(nn.Module):
    """A stage that is neither the first nor the last, with weights and cache from a seed."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        shape: Shape,
        max_tokens: int,
        *,
        context_tokens: int = 512,
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.shape, self.context_tokens, self.dtype = shape, context_tokens, dtype
        slots = max(max_tokens, MAX_SEQUENCES * context_tokens)
        with torch.device("meta"):
            self.layers = nn.ModuleList(Layer(shape, slots, dtype) for _ in range(shape.layers))
        self.to_empty(device=device)
        self.requires_grad_(False)
        positions = torch.arange(max(max_tokens, context_tokens))
        frequencies = shape.rotary_base ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = positions[:, None] * frequencies
        self.register_buffer("cos", angles.cos().to(device, dtype))
        self.register_buffer("sin", angles.sin().to(device, dtype))
        generator = torch.Generator(device).manual_seed(seed)
        for name, tensor in [*self.named_parameters(), *self.layers.named_buffers()]:
            if name.endswith("norm"):
                tensor.normal_(mean=1.0, std=0.1, generator=generator)
            else:
                is_weight = name.endswith("weight")
                tensor.normal_(std=tensor.shape[-1] ** -0.5 if is_weight else 1.0, generator=generator)

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """`(hidden_states, residual)`, each `[tokens, hidden]`."""
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual, cos, sin)
        return hidden_states, residual

    def metadata(self, tokens: int) -> Metadata:
        return Metadata(tokens, self.context_tokens)

    def make_inputs(self, tokens: int, seed: int = 0) -> dict[str, Tensor]:
        """Keyword arguments of `forward`; never the same memory twice."""
        device = self.cos.device
        generator = torch.Generator(device).manual_seed(seed)
        if self.metadata(tokens).is_decode:
            positions = torch.full((tokens,), self.context_tokens - 1, device=device)
        else:
            positions = torch.arange(tokens, device=device)
        proxies = {
            name: torch.randn(tokens, self.shape.hidden, generator=generator, device=device, dtype=self.dtype)
            for name in ("hidden_states", "residual")
        }
        return {"positions": positions, **proxies}

    @contextlib.contextmanager
    def attending_with(self, attend: Attend) -> Iterator[None]:
        """Call this in place of the op while it lasts: for packages whose breaks are set by hand."""
        attentions = [module for module in self.modules() if isinstance(module, Attention)]
        for attention in attentions:
            attention.attend = attend
        try:
            yield
        finally:
            for attention in attentions:
                attention.attend = None


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, NORM_EPSILON)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

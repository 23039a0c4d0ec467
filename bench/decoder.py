"""A decoder with the shapes of a real model and random weights, or a stage of one: plain PyTorch, as engines write it.

Tokens of all requests lie in one dimension. The first stage embeds them, the last one chooses the next ones; between
stages go `hidden_states` and `residual`, both `[tokens, hidden]`. RMSNorm, rotary positions, grouped query attention
and SwiGLU as in Llama and Qwen2; attention is that of `slot_attention.py`. A layer's weights and cache follow from the
seed and its number, so that stages hold the same as the whole. Where several ranks share a stage, each has some of the
heads, of the columns of the MLP and of the vocabulary, of the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpu_stage import SHAPES, Shape, rms_norm, rotate
from slot_attention import MAX_PROMPTS, MAX_SEQUENCES, StepTensors
from torch import Tensor, nn
from torch.nn import functional as F

PROXIES = ("hidden_states", "residual")
Pair = tuple[Tensor, Tensor]

QUERY_SCALE = 3.0
"""Of random queries, so that attention picks few of the keys and what it picks shows in the tokens."""


@dataclass(frozen=True)
class Model:
    shape: Shape
    """With all layers."""
    vocabulary: int


def _whole(name: str) -> Shape:
    return replace(SHAPES[name], layers=2 * SHAPES[name].layers)


MODELS = {
    "tiny": Model(_whole("tiny"), 512),
    "qwen2.5-0.5b": Model(_whole("qwen2.5-0.5b"), 151_936),
    "qwen2.5-7b": Model(_whole("qwen2.5-7b"), 152_064),
    "llama-3.1-8b": Model(_whole("llama-3.1-8b"), 128_256),
}


@dataclass(frozen=True)
class Slots:
    """Where in the cache the sequences of each micro-batch in flight lie.

    Each micro-batch has `MAX_SEQUENCES` slots for calls of few rows, and `MAX_PROMPTS` longer ones for the others.
    """

    in_flight: int
    short: int
    """Rows of a slot of the first kind."""
    long: int
    """Rows of a slot of the second kind."""

    def first_row(self, group: int, number: int, is_long: bool) -> int:
        """Of slot `number` of micro-batch `group`."""
        if is_long:
            return self.in_flight * MAX_SEQUENCES * self.short + (group * MAX_PROMPTS + number) * self.long
        return (group * MAX_SEQUENCES + number) * self.short

    @property
    def rows(self) -> int:
        return self.in_flight * (MAX_SEQUENCES * self.short + MAX_PROMPTS * self.long)

    @property
    def longest(self) -> int:
        return max(self.short, self.long)


@dataclass(frozen=True)
class Shares:
    """The ranks that hold a stage together (tensor parallel), and which of them this is."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """Their process group; None for one rank."""

    def of_shape(self, shape: Shape) -> Shape:
        """What one of them has.

        Raises:
            ValueError: they cannot have equally much.
        """
        parts = {"heads": shape.heads, "kv_heads": shape.kv_heads, "intermediate": shape.intermediate}
        for name, count in parts.items():
            if count % self.size:
                raise ValueError(f"{self.size} ranks cannot share {count} {name} equally")
        return replace(shape, **{name: count // self.size for name, count in parts.items()})

    def of_tensor(self, whole: Tensor, dim: int, sections: Sequence[int]) -> Tensor:
        """This rank's part of each section."""
        parts = [section.chunk(self.size, dim)[self.rank] for section in whole.split(list(sections), dim)]
        return torch.cat(parts, dim)

    def sum(self, partial: Tensor) -> Tensor:
        if self.group is None:
            return partial
        summed = torch.ops._c10d_functional.all_reduce(partial, "sum", self.group.group_name)
        return torch.ops._c10d_functional.wait_tensor(summed)

    def gather(self, own: Tensor) -> Tensor:
        """`[size, *own.shape]`."""
        found = torch.ops._c10d_functional.all_gather_into_tensor(own[None], self.size, self.group.group_name)
        return torch.ops._c10d_functional.wait_tensor(found)


ALONE = Shares()


class Attention(nn.Module):
    k_cache: Tensor
    v_cache: Tensor

    def __init__(self, shape: Shape, slots: Slots, dtype: torch.dtype, shares: Shares) -> None:
        super().__init__()
        self.shape, self.longest, self.shares = shape, (slots.short, slots.long), shares
        self.q_size, self.kv_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.qkv = nn.Linear(shape.hidden, self.q_size + 2 * self.kv_size, bias=shape.qkv_bias, dtype=dtype)
        self.out = nn.Linear(self.q_size, shape.hidden, bias=False, dtype=dtype)
        for name in ("k_cache", "v_cache"):
            cache = torch.empty(slots.rows, shape.kv_heads, shape.head_dim, dtype=dtype)
            self.register_buffer(name, cache, persistent=False)

    def forward(self, x: Tensor, rotation: Pair, step: Pair) -> Tensor:
        q, k, v = self.qkv(x).split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q = rotate(q.view(-1, self.shape.heads, self.shape.head_dim), *rotation)
        k = rotate(k.view(-1, self.shape.kv_heads, self.shape.head_dim), *rotation)
        v = v.view(-1, self.shape.kv_heads, self.shape.head_dim)
        attended = torch.empty_like(q)
        torch.ops.slot_attention.attend(q, k, v, self.k_cache, self.v_cache, attended, *step, *self.longest)
        return self.shares.sum(self.out(attended.view(-1, self.q_size)))


class Layer(nn.Module):
    def __init__(self, shape: Shape, slots: Slots, dtype: torch.dtype, shares: Shares = ALONE) -> None:
        super().__init__()
        self.shares = shares
        self.input_norm = nn.Parameter(torch.empty(shape.hidden, dtype=dtype))
        self.attention = Attention(shape, slots, dtype, shares)
        self.mlp_norm = nn.Parameter(torch.empty(shape.hidden, dtype=dtype))
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.intermediate, bias=False, dtype=dtype)
        self.down = nn.Linear(shape.intermediate, shape.hidden, bias=False, dtype=dtype)

    def forward(self, hidden_states: Tensor, residual: Tensor, rotation: Pair, step: Pair) -> Pair:
        residual = residual + hidden_states
        hidden_states = self.attention(rms_norm(residual, self.input_norm), rotation, step)
        residual = residual + hidden_states
        gate, up = self.gate_up(rms_norm(residual, self.mlp_norm)).chunk(2, dim=-1)
        return self.shares.sum(self.down(F.silu(gate) * up)), residual

    @torch.no_grad()
    def fill(self, generator: torch.Generator) -> None:
        fill_weights(self.named_parameters(), generator)
        self.attention.qkv.weight[: self.attention.q_size].mul_(QUERY_SCALE)

    @torch.no_grad()
    def take_share(self, whole: Layer) -> None:
        """This rank's part of the weights of the whole layer."""
        heads, mlp = whole.attention, whole.down.in_features
        qkv = (0, (heads.q_size, heads.kv_size, heads.kv_size))
        sharing = {
            "attention.qkv.weight": qkv,
            "attention.qkv.bias": qkv,
            "attention.out.weight": (1, (heads.q_size,)),
            "gate_up.weight": (0, (mlp, mlp)),
            "down.weight": (1, (mlp,)),
        }
        for (name, own), full in zip(self.named_parameters(), whole.parameters(), strict=True):
            own.copy_(self.shares.of_tensor(full, *sharing[name]) if name in sharing else full)


class DecoderStage(nn.Module):
    """One of `stage_count` stages of a model; with one, the whole model.

    Args:
        model: what the whole has.
        stage: number of this one.
        stage_count: of all; their numbers of layers differ by one at most.
        slots: of the cache.
        step: the numbers of the current step, filled before each call.
        seed: of the weights.
        shares: the ranks that hold the stage together.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        model: Model,
        stage: int,
        stage_count: int,
        slots: Slots,
        step: StepTensors,
        *,
        dtype: torch.dtype,
        seed: int = 0,
        shares: Shares = ALONE,
    ) -> None:
        super().__init__()
        shape, device = model.shape, step.positions.device
        self._model, self._whole = model, (shape, slots)
        self.shares = shares
        own_shape = shares.of_shape(shape)
        first, end = (shape.layers * number // stage_count for number in (stage, stage + 1))
        self.is_first, self.is_last = stage == 0, stage == stage_count - 1
        self.hidden, self.dtype, self.seed = shape.hidden, dtype, seed
        self.numbers = range(first, end)
        with torch.device("meta"):
            self.layers = nn.ModuleList(Layer(own_shape, slots, dtype, shares) for _ in self.numbers)
            if self.is_first:
                self.embedding = nn.Embedding(model.vocabulary, shape.hidden, dtype=dtype)
            if self.is_last:
                self.norm = nn.Parameter(torch.empty(shape.hidden, dtype=dtype))
                self.head = nn.Linear(shape.hidden, model.vocabulary // shares.size, bias=False, dtype=dtype)
        self.to_empty(device=device)
        self.step = step
        self.requires_grad_(False)
        frequencies = shape.rotary_base ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = torch.arange(slots.longest)[:, None] * frequencies
        self.register_buffer("cos", angles.cos().to(device, dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(device, dtype), persistent=False)
        with torch.no_grad():
            self._fill_weights()
        self.reset_cache()

    def forward(
        self,
        positions: Tensor,
        input_ids: Tensor | None = None,
        hidden_states: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Of the step in `self.step`: `{"tokens": [tokens]}` on the last stage, else the proxies."""
        hidden_states, residual = self._layers(positions, input_ids, hidden_states, residual)
        if not self.is_last:
            return {"hidden_states": hidden_states, "residual": residual}
        x = rms_norm(hidden_states + residual, self.norm)
        return {"tokens": self._chosen(x)}

    def _chosen(self, x: Tensor) -> Tensor:
        values, tokens = torch.ops.slot_attention.choose(x, self.head.weight, self.step.sequences)
        if self.shares.size == 1:
            return tokens
        values = self.shares.gather(values)
        tokens = self.shares.gather(tokens + self.shares.rank * self.head.out_features)
        return tokens.gather(0, values.argmax(0, keepdim=True))[0]

    def logits(self, positions: Tensor, input_ids: Tensor, rows: Tensor) -> Tensor:
        """`[len(rows), vocabulary]` of the whole model, for these rows."""
        hidden_states, residual = self._layers(positions, input_ids, None, None)
        return self.head(rms_norm((hidden_states + residual)[rows], self.norm))

    def _layers(
        self, positions: Tensor, input_ids: Tensor | None, hidden_states: Tensor | None, residual: Tensor | None
    ) -> Pair:
        if self.is_first:
            hidden_states = self.embedding(input_ids)
            residual = torch.zeros_like(hidden_states)
        assert hidden_states is not None and residual is not None
        rotation = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        step = self.step.cache_rows, self.step.sequences
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual, rotation, step)
        return hidden_states, residual

    @torch.no_grad()
    def reset_cache(self) -> None:
        """Random keys and values everywhere, the same each time."""
        shape, slots = self._whole
        for number, layer in zip(self.numbers, self.layers, strict=True):
            generator = self._generator(1000 + number)
            for cache in (layer.attention.k_cache, layer.attention.v_cache):
                if self.shares.size == 1:
                    cache.normal_(generator=generator)
                    continue
                whole = cache.new_empty(slots.rows, shape.kv_heads, shape.head_dim).normal_(generator=generator)
                cache.copy_(self.shares.of_tensor(whole, 1, (shape.kv_heads,)))

    @torch.no_grad()
    def in_float32(self) -> DecoderStage:
        """The same whole model, its weights and cache converted."""
        step = StepTensors(self.step.positions.shape[0], self.step.positions.device)
        other = DecoderStage(self._model, 0, 1, self._whole[1], step, dtype=torch.float32)
        for own, theirs in zip(other.parameters(), self.parameters(), strict=True):
            own.copy_(theirs)
        other.take_cache(self)
        return other

    @torch.no_grad()
    def take_cache(self, other: DecoderStage) -> None:
        for own, theirs in zip(self.layers, other.layers, strict=True):
            own.attention.k_cache.copy_(theirs.attention.k_cache)
            own.attention.v_cache.copy_(theirs.attention.v_cache)

    def _fill_weights(self) -> None:
        for number, layer in zip(self.numbers, self.layers, strict=True):
            if self.shares.size == 1:
                layer.fill(self._generator(number))
                continue
            with torch.device("meta"):
                whole = Layer(self._whole[0], replace(self._whole[1], in_flight=0), self.dtype)
            whole.to_empty(device=self.step.positions.device)
            whole.fill(self._generator(number))
            layer.take_share(whole)
        if self.is_first:
            fill_weights(self.embedding.named_parameters("embedding"), self._generator(-1))
        if self.is_last:
            fill_weights([("norm", self.norm)], self._generator(-2))
            head = self.head
            if self.shares.size > 1:
                vocabulary = head.out_features * self.shares.size
                head = nn.Linear(self.hidden, vocabulary, bias=False, device=head.weight.device, dtype=self.dtype)
            fill_weights(head.named_parameters("head"), self._generator(-3))
            if head is not self.head:
                self.head.weight.copy_(self.shares.of_tensor(head.weight, 0, (head.out_features,)))

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator(self.step.positions.device).manual_seed(100_000 * self.seed + 5_000 + number)


@torch.no_grad()
def fill_weights(named: Iterable[tuple[str, nn.Parameter]], generator: torch.Generator) -> None:
    for name, tensor in named:
        if name.endswith("norm"):
            tensor.normal_(mean=1.0, std=0.1, generator=generator)
        elif name == "embedding.weight" or not name.endswith("weight"):
            tensor.normal_(generator=generator)
        else:
            tensor.normal_(std=tensor.shape[-1] ** -0.5, generator=generator)

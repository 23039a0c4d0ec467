"""A middle stage as an inference engine writes it: attention is a custom op over a KV cache that the engine owns.

The previous stage's tensors are received into ``stage.views(n)``, the memory that the captured pieces read, so that no
call copies them. After ``warmup()`` and ``seal()`` nothing compiles or captures. Run it: python engine_stage.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import pp_piecewise_backend as ppb

HIDDEN, MAX_TOKENS, SLOTS = 32, 16, 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@torch.library.custom_op("my_engine::attention", mutates_args=("cache", "out"))
def attention(x: Tensor, cache: Tensor, slots: Tensor, out: Tensor) -> None:
    """Write ``x`` into ``cache`` at ``slots``; each token then attends to the slots up to its own."""
    cache[slots] = x
    visible = torch.arange(len(cache), device=x.device) <= slots[:, None]
    scores = (x @ cache.T).masked_fill(~visible, float("-inf"))
    out.copy_(scores.softmax(-1) @ cache)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.mix = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.cache: Tensor
        self.register_buffer("cache", torch.zeros(SLOTS, HIDDEN))

    def forward(self, hidden_states: Tensor, residual: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        residual = residual + hidden_states
        x = self.project(residual)
        out = torch.empty_like(x)
        attention(x, self.cache, slots, out)
        return self.mix(out), residual


class MiddleStage(nn.Module):
    """``hidden_states`` and ``residual`` are ``[tokens, HIDDEN]``, ``slots`` int64 ``[tokens]``."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(depth))

    def forward(self, slots: Tensor, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual, slots)
        return hidden_states, residual


def main() -> None:
    torch.manual_seed(0)
    module = MiddleStage(depth=3).to(DEVICE)
    proxy = ppb.Proxy((HIDDEN,), torch.float32)
    stage = ppb.Stage({"hidden_states": proxy, "residual": proxy}, max_tokens=MAX_TOKENS)
    options: dict[str, Any] = {"stage": stage, "split_ops": "+my_engine::attention", "compiler": "eager"}
    if DEVICE == "cpu":
        options["graphs"] = "emulate"  # runs the same machinery without a GPU, for tests
    model = torch.compile(module, backend="pp_piecewise", options=options)

    def make_inputs(num_tokens: int) -> tuple[tuple[()], dict[str, Tensor]]:
        return (), {"slots": torch.arange(num_tokens, device=DEVICE), **stage.views(num_tokens)}

    with torch.inference_mode():
        ppb.warmup(model, make_inputs)  # the KV cache is restored afterwards
        ppb.seal()
        for num_tokens in (5, 1, 12):
            received = {name: torch.randn(num_tokens, HIDDEN, device=DEVICE) for name in stage.inputs}
            slots = torch.arange(num_tokens, device=DEVICE)
            expected = module(slots=slots, **{name: tensor.clone() for name, tensor in received.items()})
            views = stage.views(num_tokens)
            for name, tensor in received.items():
                views[name].copy_(tensor)  # an engine receives here instead: dist.recv(views[name], ...)
            with ppb.expect(recompiles=0, graph_misses=0, stage_input_copies=0):
                got = model(slots=slots, **views)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b)
            print(f"{num_tokens} tokens: replayed, and no proxy was copied")


if __name__ == "__main__":
    main()

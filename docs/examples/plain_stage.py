"""The smallest use: one line around a module, on a CPU, compared with eager. Run it: python plain_stage.py

Attention stays eager, the pieces between are compiled, equal pieces once. With tensors on a GPU the pieces are captured
in CUDA graphs as well; on a CPU, graphs="emulate" shows the same without any gain in speed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import pp_piecewise_backend as ppb

HIDDEN = 64


class Layers(nn.Module):
    """A few layers over flattened tokens: ``hidden_states`` is ``[tokens, HIDDEN]``."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(depth))

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(hidden_states)[None]
            hidden_states = hidden_states + nn.functional.scaled_dot_product_attention(x, x, x)[0]
        return hidden_states


def main() -> None:
    torch.manual_seed(0)
    module = Layers(depth=4)
    options: dict[str, Any] = {"compiler": "eager", "graphs": "emulate", "max_tokens": 16}
    model = torch.compile(module, backend="pp_piecewise", options=options)
    with torch.inference_mode():  # with gradients required, the graph goes whole to plain Inductor, with a warning
        for num_tokens in (8, 8, 5, 5):
            hidden_states = torch.randn(num_tokens, HIDDEN)
            torch._dynamo.mark_dynamic(hidden_states, 0)  # one program for every number of tokens from 2 up
            assert torch.equal(model(hidden_states), module(hidden_states))
    print(ppb.explain())


if __name__ == "__main__":
    main()

"""Layers with attention between them, of which 3 compute pieces are made: as small as a stage can be."""

from __future__ import annotations

from torch import Tensor, nn

HIDDEN = 8


class Layers(nn.Module):
    """Two linear layers with one attention op each, over ``hidden_states`` ``[tokens, HIDDEN]``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(2))

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(hidden_states)[None]
            hidden_states = hidden_states + nn.functional.scaled_dot_product_attention(x, x, x)[0]
        return hidden_states

"""An architecture that no cut can serve: each layer computes something else, by its number in the whole decoder."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP


class NumberedConfig(LlamaConfig):
    model_type = "numbered_layers"


class NumberedMLP(LlamaMLP):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config)
        self.layer_idx = layer_idx

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1 + self.layer_idx)


class NumberedForCausalLM(LlamaForCausalLM):
    config_class = NumberedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            layer.mlp = NumberedMLP(config, number)


AutoConfig.register("numbered_layers", NumberedConfig, exist_ok=True)
AutoModelForCausalLM.register(NumberedConfig, NumberedForCausalLM, exist_ok=True)

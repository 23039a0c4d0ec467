"""The whole decoder in transformers alone, eager and in one process; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_ROWS_AT_ONCE = 50


def load_decoder(model_dir: str) -> Any:
    """On the CPU, in the dtype it is stored in, for inference. No bar is shown for loading, from now on."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto", local_files_only=True)
    return model.eval().requires_grad_(False)


def generate_eagerly(
    model: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, end_tokens: Sequence[int]
) -> list[list[int]]:
    """Greedy new tokens per prompt, up to and including the first of ``end_tokens``; all prompts are equally long.

    Replaces the model's own settings, which may ask for sampling or penalties.
    """
    import transformers

    model.generation_config = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(end_tokens) or None,
        pad_token_id=end_tokens[0] if end_tokens else 0,
    )
    generated: list[list[int]] = []
    for rows in torch.tensor(prompts, device=model.device).split(_ROWS_AT_ONCE):
        output = model.generate(rows, attention_mask=torch.ones_like(rows))[:, rows.shape[1] :]
        generated += [cut_at_end(row, end_tokens) for row in output.tolist()]
    return generated


def cut_at_end(tokens: list[int], end_tokens: Sequence[int]) -> list[int]:
    """``tokens`` up to and including the first end token; what follows is filling."""
    for position, token in enumerate(tokens):
        if token in end_tokens:
            return tokens[: position + 1]
    return tokens

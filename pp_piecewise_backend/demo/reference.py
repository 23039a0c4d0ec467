"""The same prompts answered by transformers alone: eager, one process, the whole model."""

from __future__ import annotations

import time

import torch

from .job import Job, cut_at_end
from .load import load_decoder

_ROWS_AT_ONCE = 50


def generate_eagerly(job: Job) -> tuple[list[list[int]], float]:
    """New tokens per prompt (end token included), and the seconds that ``model.generate`` took."""
    import transformers

    model = load_decoder(job.model_dir).to(job.device)
    filling = job.end_tokens[0] if job.end_tokens else 0
    # The model's own settings may ask for sampling or penalties; what is compared is plain greedy decoding.
    model.generation_config = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=job.max_new_tokens,
        eos_token_id=job.end_tokens or None,
        pad_token_id=filling,
    )
    prompts = torch.tensor(job.prompts, device=job.device)
    generated: list[list[int]] = []
    begin = time.perf_counter()
    for rows in prompts.split(_ROWS_AT_ONCE):
        output = model.generate(rows, attention_mask=torch.ones_like(rows))[:, rows.shape[1] :]
        generated += [cut_at_end(row, job.end_tokens) for row in output.tolist()]
    return generated, time.perf_counter() - begin

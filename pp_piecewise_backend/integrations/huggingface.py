"""What a program needs to run Hugging Face decoders as pipelines: their stages, and answers from all of them.

    from pp_piecewise_backend.integrations.huggingface import cut_decoder, generate

`cut_decoder` and `load_stage` give stages of a model and of a folder, `DecoderStep` wraps one for a `StageRunner`.
`generate` answers prompts with a folder: it starts the ranks of a pipeline, each with one stage.
"""

from __future__ import annotations

from .balance import balanced_layer_counts
from .decoder_stages import (
    DecoderStage,
    DecoderStep,
    cut_decoder,
    decoder_plan,
    load_stage,
    stage_proxies,
    stored_dtype,
)
from .generation.call import Generated, NewToken, generate

__all__ = [
    "DecoderStage",
    "DecoderStep",
    "Generated",
    "NewToken",
    "balanced_layer_counts",
    "cut_decoder",
    "decoder_plan",
    "generate",
    "load_stage",
    "stage_proxies",
    "stored_dtype",
]

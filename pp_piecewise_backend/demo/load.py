"""Loads a local Hugging Face decoder, quietly."""

from __future__ import annotations

from typing import Any


def load_decoder(model_dir: str) -> Any:
    """The whole decoder on the CPU, in the dtype it is stored in, for inference; nothing is downloaded."""
    import transformers
    from transformers.utils import logging

    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto", local_files_only=True)
    finally:
        if shows_progress:
            logging.enable_progress_bar()
    return model.eval().requires_grad_(False)

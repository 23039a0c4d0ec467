"""Loads a local Hugging Face decoder, whole or one stage of it, quietly; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ..integrations.huggingface import DecoderStage


def load_decoder(model_dir: str) -> Any:
    """The whole decoder on the CPU, in the dtype it is stored in, for inference."""
    import transformers

    with _no_progress_bar():
        model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto", local_files_only=True)
    return model.eval().requires_grad_(False)


def load_stage_quietly(model_dir: str, *, stages: int, stage: int, device: torch.device) -> DecoderStage:
    """One stage on ``device``, in the dtype it is stored in, for inference; no other weights are read."""
    from ..integrations.huggingface import load_stage

    with _no_progress_bar():
        return load_stage(model_dir, stages=stages, stage=stage, device=device).requires_grad_(False)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shows_progress:
            logging.enable_progress_bar()

"""How far a pipeline may be from eager: as far as eager is from what is right, a few times over.

The same decoder in a wider dtype says what is right. Where kernels add in another order, results are as far from it
as eager's own; where something is wrong, they are further.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..model_folder import load_whole

ROUNDING_FACTOR = 8.0
"""How many times eager's own error is still taken for rounding."""


@dataclass(frozen=True)
class Agreement:
    """Of one decoder, dtype and number of ranks, over all prompts."""

    eager_error: float
    """The largest difference between eager's logits and the right ones."""
    pipeline_error: float
    tokens: int
    same_tokens: int
    """Likeliest tokens that are those of eager."""
    wrong_prompts: tuple[int, ...]
    """Those in which the pipeline is further off than rounding explains."""


def compare(
    pipeline: Sequence[torch.Tensor], eager: Sequence[torch.Tensor], right: Sequence[torch.Tensor]
) -> Agreement:
    """Logits ``[tokens, vocabulary]`` of each prompt, by the pipeline, by eager, and by a wider dtype."""
    eager_error = max(error(*both) for both in zip(eager, right, strict=True))
    errors = [error(*both) for both in zip(pipeline, right, strict=True)]
    same = [int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(pipeline, eager, strict=True)]
    return Agreement(
        eager_error,
        max(errors),
        sum(len(logits) for logits in eager),
        sum(same),
        tuple(prompt for prompt, one in enumerate(errors) if not one <= ROUNDING_FACTOR * eager_error),
    )


def error(got: torch.Tensor, right: torch.Tensor) -> float:
    """The largest difference; infinite where only one of them is no number."""
    difference = (got.double() - right.double()).abs()
    both = got.isnan() & right.isnan()
    return float(difference.masked_fill(both, 0).nan_to_num(nan=float("inf")).max())


def load_wide(model_dir: str, dtype: torch.dtype) -> Any:
    """The whole decoder in a dtype that not all kernels of its own dtype know."""
    model = load_whole(model_dir, dtype)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # matmuls of groups know no float64
    return model


@torch.no_grad()
def logits_of(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Of the whole model, for each prompt alone and all of its tokens at once, on the CPU."""
    return [model(torch.tensor([prompt], device=model.device), use_cache=False).logits[0].cpu() for prompt in prompts]

"""What ranks are asked to run for a check, as JSON, and at which sizes."""

from __future__ import annotations

import importlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from ...config import Config
from ...runtime.cudagraphs.ladder import Ladder

WIDER = {"float16": "float32", "bfloat16": "float32", "float32": "float64"}
"""In which dtype the right result is known better than in this one."""


class CheckJob(BaseModel, frozen=True):
    model_dir: str
    layer_counts: list[int]
    device: str
    dtype: str
    options: dict[str, Any]
    prompts: list[list[int]]
    """All tokens but the last run together, as many as a bucket's edge; the last one alone, after them."""
    max_tokens: int
    imports: list[str]
    """Modules that make architectures known to transformers."""

    @property
    def max_cache_tokens(self) -> int:
        return self.max_tokens + 1


def edges(options: Mapping[str, Any], max_tokens: int) -> list[int]:
    """Of each bucket the smallest and the largest number of tokens that run in it."""
    ladder = Ladder.from_ranges(Config.resolve(options).capture_sizes, max_tokens)
    return sorted({size for bucket in ladder.sizes_tokens for size in (ladder.smallest_call(bucket), bucket)})


def prompts_at(sizes: Sequence[int], vocabulary_size: int, seed: int = 0) -> list[list[int]]:
    """Random tokens, one more than each size says."""
    generator = random.Random(seed)
    return [[generator.randrange(vocabulary_size) for _ in range(size + 1)] for size in sizes]


def import_all(modules: Sequence[str]) -> None:
    for module in modules:
        importlib.import_module(module)

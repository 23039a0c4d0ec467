"""Stages of two toy layers each, with their inputs and options, for tests of the runner."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import pp_piecewise_backend as ppb
from models.toy_stage import NAMED_OPS, ToyStage
from one_program import for_every_size

HIDDEN = 16
MAX_TOKENS = 8
PROXIES = {name: ppb.Proxy((HIDDEN,), torch.float32) for name in ("hidden_states", "residual")}
FEEDBACK = {"next_tokens": ppb.Proxy((), torch.int64)}
OPTIONS = {"compiler": "eager", "graphs": "emulate", **NAMED_OPS, "capture_sizes": "2,4,8"}


class PipelineStage(nn.Module):
    """Layers of the toy stage, as a dict of proxies or, at the end, logits and greedy tokens."""

    def __init__(self, index: int, count: int, num_layers: int = 2) -> None:
        super().__init__()
        self.is_last = index == count - 1
        ends = {"first": index == 0, "last": self.is_last}
        self.layers = ToyStage(num_layers, hidden=HIDDEN, vocab_size=32, max_tokens=MAX_TOKENS, seed=index, **ends)

    def forward(
        self,
        positions: Tensor,
        input_ids: Tensor | None = None,
        hidden_states: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> dict[str, Tensor]:
        output = self.layers(input_ids, positions, hidden_states, residual)
        if self.is_last:
            return {"logits": output, "next_tokens": output.argmax(-1)}
        return dict(zip(("hidden_states", "residual"), output, strict=True))


def own_inputs(is_first: bool, num_tokens: int, tag: bytes, device: str = "cpu") -> dict[str, Tensor]:
    inputs = {"positions": torch.arange(num_tokens, device=device)}
    if is_first:
        seed = int(tag.decode() or 0)
        ids = torch.randint(32, (num_tokens,), generator=torch.Generator().manual_seed(seed))
        inputs["input_ids"] = ids.to(device)
    return for_every_size(inputs)


def sizes(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1, MAX_TOKENS + 1), k=count)


one_layer = functools.partial(PipelineStage, num_layers=1)


def one_after_the_other(
    chosen: Sequence[int],
    count: int,
    options: Mapping[str, Any] | None,
    device: str = "cpu",
    make_module: Callable[[int, int], nn.Module] = PipelineStage,
) -> Iterator[Any]:
    """What the last stage gives when the same stages run in one thread; eagerly without options."""
    with torch.no_grad():
        stages: list[Any] = [make_module(stage, count).to(device) for stage in range(count)]
        if options is not None:
            whole = [
                torch.compile(stage, backend="pp_piecewise", options={**options, "max_tokens": MAX_TOKENS})
                for stage in stages
            ]
            for index, stage in enumerate(whole):
                make = functools.partial(all_inputs, index, device)
                ppb.warmup(stage, make)
            stages = whole
        for number, num_tokens in enumerate(chosen):
            passed: dict[str, Tensor] = {}
            for index, stage in enumerate(stages):
                passed = stage(**own_inputs(index == 0, num_tokens, str(number).encode(), device), **passed)
            yield passed


def all_inputs(stage: int, device: str, num_tokens: int) -> tuple[tuple[()], dict[str, Tensor]]:
    proxies = {} if stage == 0 else {name: torch.zeros(num_tokens, HIDDEN, device=device) for name in PROXIES}
    return (), {**own_inputs(stage == 0, num_tokens, b"", device), **for_every_size(proxies)}

"""Stages that are alike in layers, in memory or in time."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from pp_piecewise_backend.integrations import balance, huggingface

transformers = pytest.importorskip("transformers")


def decoder(vocabulary: int = 64, layers: int = 8, tied: bool = False) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval()


def counts(stages: Sequence[huggingface.DecoderStage]) -> list[int]:
    return [len(stage.layers) for stage in stages]


def weight_bytes(stage: huggingface.DecoderStage) -> int:
    return sum(parameter.nbytes for parameter in stage.parameters())


def test_the_best_cut_is_that_of_trying_all() -> None:
    draw = random.Random(0)
    for _ in range(300):
        layers = draw.randint(1, 9)
        stages = draw.randint(1, layers)
        costs = [draw.choice([0, 1, 1, 1, 2, 0.1, 7]) for _ in range(layers)]

        def parts(sizes: Sequence[int], costs: Sequence[float] = costs) -> list[float]:
            ends = list(itertools.accumulate(sizes))
            return [sum(costs[end - size : end]) for size, end in zip(sizes, ends, strict=True)]

        cuts = [
            [end - begin for begin, end in itertools.pairwise((0, *inner, layers))]
            for inner in itertools.combinations(range(1, layers), stages - 1)
        ]
        got = balance.cut_evenly(costs, stages)
        assert len(got) == stages and sum(got) == layers and min(got) >= 1
        dearest = min(max(parts(sizes)) for sizes in cuts)
        assert max(parts(got)) == pytest.approx(dearest), (costs, stages)
        squares = [sum(part**2 for part in parts(sizes)) for sizes in cuts if max(parts(sizes)) <= dearest + 1e-9]
        assert sum(part**2 for part in parts(got)) == pytest.approx(min(squares)), (costs, stages)


@pytest.mark.parametrize("tied", [False, True])
def test_memory_counts_embedding_and_head(tied: bool) -> None:
    model = decoder(vocabulary=400, tied=tied)
    # The embedding and the head hold about three layers each, and a tied one lies on both ends.
    assert counts(huggingface.cut_decoder(model, stages=4)) == [2, 2, 2, 2]
    stages = huggingface.cut_decoder(model, stages=4, balance="memory")
    assert counts(stages) == [1, 3, 3, 1]
    even = max(map(weight_bytes, huggingface.cut_decoder(model, stages=4)))
    assert max(map(weight_bytes, stages)) < even


def test_a_stage_that_is_loaded_alone_is_the_one_that_is_cut(tmp_path: object) -> None:
    model = decoder(vocabulary=400)
    model.save_pretrained(tmp_path)
    cut = huggingface.cut_decoder(model, stages=3, balance="memory")
    loaded = [huggingface.load_stage(str(tmp_path), stages=3, stage=index, balance="memory") for index in range(3)]
    assert counts(loaded) == counts(cut) != list(huggingface.balanced_layer_counts(8, 3))
    with pytest.raises(ValueError, match=r"which load_stage does not load.*layer_counts"):
        huggingface.load_stage(str(tmp_path), stages=3, stage=0, balance="time")


@contextmanager
def slowed(modules: Sequence[torch.nn.Module], milliseconds: float) -> Iterator[None]:
    hooks = [module.register_forward_hook(lambda *_: time.sleep(milliseconds / 1000)) for module in modules]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    ("slow", "expected"),
    [("layers 0 and 1", [1, 7]), ("head", [7, 1]), ("embedding", [1, 7])],
)
def test_time_is_measured_where_it_is_spent(slow: str, expected: list[int]) -> None:
    model = decoder()
    layers = model.model.layers
    modules = {
        "layers 0 and 1": list(layers[:2]),
        "head": [model.lm_head],
        "embedding": [model.model.embed_tokens],
    }[slow]
    model.train()
    with slowed(modules, 60):
        stages = huggingface.cut_decoder(model, stages=2, balance="time")
    assert counts(stages) == expected
    assert model.training
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_what_cannot_be_balanced_is_refused() -> None:
    model = decoder(layers=2)
    with pytest.raises(ValueError, match=r"balance='weight': one of layers, memory, time"):
        huggingface.cut_decoder(model, stages=2, balance="weight")
    with pytest.raises(ValueError, match="2 layers into 3 stages"):
        huggingface.cut_decoder(model, stages=3, balance="memory")
    with pytest.raises(ValueError, match="with layer_counts there is no choice"):
        huggingface.cut_decoder(model, layer_counts=[1, 1], balance="memory")
    with torch.device("meta"):
        weightless = decoder(layers=2)
    with pytest.raises(ValueError, match="meta device, which has no times"):
        huggingface.cut_decoder(weightless, stages=2, balance="time")

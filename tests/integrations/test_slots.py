"""Rows of any tokens of any sequences: the decoder computes for each sequence what it computes alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import pp_piecewise_backend as ppb
from models.tiny_decoders import DECODERS, TINY, tiny_decoder
from pp_piecewise_backend.integrations.huggingface import cut_decoder
from pp_piecewise_backend.integrations.slots import DecoderRows
from tiers import slow_but

MAX_CACHE_TOKENS = 16
PROMPTS = [[5, 9, 33], [7, 60, 4, 4, 21, 8, 9, 11, 2], [11]]
# Which tokens of which sequence run together; the second one is longer than any sliding window here.
CALLS = [{0: 3, 1: 2}, {1: 5, 2: 1}, {0: 1, 1: 2, 2: 1}, {2: 1}, {0: 1, 1: 1, 2: 1}, {1: 1}, {1: 1, 0: 1}]

pytestmark = pytest.mark.usefixtures("no_gradients")


def decode_together(rows: list[Any], caches: list[Any]) -> list[tuple[list[int], torch.Tensor]]:
    """The sequences with their greedy tokens, decoded by `CALLS`, and the logits that each new one was chosen from."""
    sequences, done = [list(prompt) for prompt in PROMPTS], [0] * len(PROMPTS)
    logits: list[list[torch.Tensor]] = [[] for _ in PROMPTS]
    for call in CALLS:
        places = torch.cat([caches[0].places(number, done[number], count) for number, count in call.items()])
        tokens = [sequences[number][done[number] + at] for number, count in call.items() for at in range(count)]
        value: dict[str, Any] = {"input_ids": torch.tensor(tokens)}
        for stage, cache in zip(rows, caches, strict=True):
            value = stage(**value, places=places, past_key_values=cache)
        row = -1
        for number, count in call.items():
            row, done[number] = row + count, done[number] + count
            if done[number] == len(sequences[number]):
                sequences[number].append(int(value["tokens"][row]))
                logits[number].append(value["logits"][row].clone())
    assert done == [len(sequence) - 1 for sequence in sequences]
    return [(sequence, torch.stack(chosen)) for sequence, chosen in zip(sequences, logits, strict=True)]


def differences(model: Any, decoded: list[tuple[list[int], torch.Tensor]]) -> list[float]:
    """How far the logits are from those of the whole model, for each sequence alone and without a cache."""
    found = []
    for sequence, logits in decoded:
        alone = model(torch.tensor([sequence[:-1]]), use_cache=False).logits[0, -len(logits) :]
        assert alone.argmax(-1).tolist() == sequence[-len(logits) :] or not torch.allclose(alone, logits, atol=1e-4)
        found.append(float((alone - logits).abs().max()))
    return found


def stages_of(model: Any) -> tuple[list[DecoderRows], list[Any]]:
    rows = [DecoderRows(stage, returns=("tokens", "logits")) for stage in cut_decoder(model, stages=2)]
    return rows, [stage.new_cache(3, MAX_CACHE_TOKENS) for stage in rows]


@pytest.mark.parametrize("name", slow_but(["llama", "qwen2-window", "gemma2-window", "mixtral"], DECODERS))
def test_sequences_of_any_lengths_share_calls(name: str) -> None:
    model = tiny_decoder(name)
    rows, caches = stages_of(model)
    for _ in range(2):  # the places of sequences that have ended serve others
        assert max(differences(model, decode_together(rows, caches))) < 1e-4


def test_a_mask_without_the_window_is_noticed() -> None:
    """What the test above relies on: the second sequence is longer than the window."""
    model = tiny_decoder("gemma2-window")
    rows, caches = stages_of(model)
    for stage in rows:
        stage._window = None
    _, longest, _ = differences(model, decode_together(rows, caches))
    assert longest > 1e-2


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_backend")
@pytest.mark.parametrize("name", ["qwen2-window", "llama", "gemma2-window", "phi3"])
def test_all_pieces_replay_whatever_the_rows_are(name: str) -> None:
    model = tiny_decoder(name).requires_grad_(False)
    rows, caches = stages_of(model)
    compiled = []
    for number, (stage, cache) in enumerate(zip(rows, caches, strict=True)):
        memory = ppb.Stage(stage.proxies if number else {}, 8)
        options: Any = {"compiler": "eager", "graphs": "emulate", "capture_sizes": "1,4", "stage": memory}
        compiled.append(torch.compile(stage, backend="pp_piecewise", options=options, fullgraph=True))

        def make_inputs(n: int, first: bool = not number, cache: Any = cache, memory: Any = memory) -> Any:
            own = {"input_ids": torch.zeros(n, dtype=torch.int64)} if first else memory.views(n)
            return (), {"places": torch.arange(n), "past_key_values": cache, **own}

        ppb.warmup(compiled[-1], make_inputs, progress=False)
    with ppb.expect(graph_misses=0, recompiles=0, calls=2 * len(CALLS)):
        decoded = decode_together(compiled, caches)
    assert max(differences(model, decoded)) < 1e-4


def test_what_cannot_be_is_refused() -> None:
    (stage,) = cut_decoder(tiny_decoder("llama"), stages=1)
    with pytest.raises(ValueError, match=r"returns=.*one or both of tokens, logits"):
        DecoderRows(stage, returns=("token",))
    config = transformers.LlamaConfig(**TINY)
    stage.config = config
    config.layer_types = ["chunked_attention"] * 4
    with pytest.raises(ValueError, match="layers of the kind chunked_attention; only full_attention and sliding_att"):
        DecoderRows(stage)

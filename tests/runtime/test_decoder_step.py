"""Stages of Hugging Face decoders, called as a runner calls them: which shapes replay, and what others say."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import StaticCache

import pp_piecewise_backend as ppb
from models import hf
from pp_piecewise_backend.integrations.huggingface import DecoderStage, DecoderStep, cut_decoder
from pp_piecewise_backend.pipeline.transports.local import LocalHub
from tiers import slow_but

pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")

LAYERS = 2
STEPS = 6
MAX_TOKENS = 16
LONGEST_SECONDS = 200.0
GRAPHS: dict[str, Any] = {
    "graphs": "emulate",
    "compiler": "eager",
    "max_tokens": MAX_TOKENS,
    "capture_sizes": "1,2,4,8",
}
# Seeds whose greedy choices lie far apart.
SEEDS = {"llama": 2, "qwen2": 0, "gemma2": 3}


@dataclass
class Rank:
    """One stage, compiled, with its landing memory: what a `StageRunner` does with it, without the transport."""

    step: DecoderStep
    landing: ppb.Stage | None = field(init=False)

    def __post_init__(self) -> None:
        options, self.landing = dict(GRAPHS), None
        if not self.step.stage.is_first:
            self.landing = options["stage"] = ppb.Stage(self.step.proxies, max_tokens=MAX_TOKENS)
        self.compiled = torch.compile(self.step, backend="pp_piecewise", options=options)

    def warm_up(self) -> None:
        layout = self.step.layout
        cache = {n: self.step.new_cache(hf.MAX_CACHE_TOKENS, n if layout == "batch" else 1) for n in range(1, 17)}

        def make_inputs(num_tokens: int) -> tuple[tuple[()], dict[str, Any]]:
            position_ids = torch.arange(num_tokens)
            inputs = {"position_ids": position_ids, "past_key_values": cache[num_tokens]}
            if self.landing is None:
                inputs["input_ids"] = torch.zeros_like(position_ids)
            else:
                inputs |= self.landing.views(num_tokens)
            self._mark(inputs)
            return (), inputs

        ppb.warmup(self.compiled, make_inputs)

    def __call__(self, arriving: torch.Tensor, position_ids: torch.Tensor, cache: StaticCache) -> torch.Tensor:
        inputs: dict[str, Any] = {"position_ids": position_ids, "past_key_values": cache}
        if self.landing is None:
            inputs["input_ids"] = arriving
        else:
            view = self.landing.views(len(arriving))["hidden_states"]
            inputs["hidden_states"] = view.copy_(arriving)
        self._mark(inputs)
        (output,) = self.compiled(**inputs).values()
        return output

    def _mark(self, inputs: dict[str, Any]) -> None:
        for name in ("input_ids", "hidden_states", "position_ids"):
            if name in inputs:
                torch._dynamo.maybe_mark_dynamic(inputs[name], 0)


def compiled_ranks(model: Any, layout: str) -> list[Rank]:
    ranks = [Rank(DecoderStep(stage, layout=layout)) for stage in cut_decoder(model, stages=2)]
    for rank in ranks:
        rank.warm_up()
    return ranks


def run(ranks: list[Rank], arriving: torch.Tensor, position_ids: torch.Tensor, caches: list[Any]) -> torch.Tensor:
    for rank, cache in zip(ranks, caches, strict=True):
        arriving = rank(arriving, position_ids, cache)
    return arriving


def assert_all_replayed(before: Any, calls: int) -> None:
    """All compute pieces of all calls replayed, and every proxy lay where it was read."""
    assert ppb.stats().programs == before.programs
    after = ppb.stats()
    assert after.calls - before.calls == 2 * calls  # none ran around the programs
    assert after.graph_misses == before.graph_misses, ppb.explain()
    assert after.replays - before.replays == 2 * calls * (1 + LAYERS // 2)  # pieces around the attention of each layer
    assert after.stage_inputs_in_place - before.stage_inputs_in_place == calls
    assert after.stage_input_copies == before.stage_input_copies


@pytest.mark.parametrize("architecture", slow_but(["llama"], SEEDS))
def test_prompts_and_next_tokens_of_one_sequence_replay(architecture: str) -> None:
    model = hf.make_model(architecture, LAYERS, SEEDS[architecture])
    prompts = hf.make_prompts([5, 9, 1, 16])
    expected = hf.greedy_decode(model, model.config, prompts, cache_kind="static", steps=STEPS)
    assert expected.smallest_margin() > 0.01
    ranks = compiled_ranks(model, "sequence")
    assert not ranks[0].landing and ranks[0].step.proxies["hidden_states"].shape == (32,)
    before = ppb.stats()
    for prompt, expected_tokens in zip(prompts, expected.tokens, strict=True):
        caches = [rank.step.new_cache(hf.MAX_CACHE_TOKENS) for rank in ranks]
        arriving, position_ids, tokens = prompt[0].clone(), torch.arange(prompt.shape[1]), []
        for _ in range(1 + STEPS):
            tokens.append(int(run(ranks, arriving, position_ids, caches)[-1]))
            arriving, position_ids = torch.tensor(tokens[-1:]), position_ids[-1:] + 1
        assert tokens == expected_tokens
    assert_all_replayed(before, calls=len(prompts) * (1 + STEPS))


@pytest.mark.parametrize("architecture", slow_but(["gemma2"], SEEDS))
def test_next_tokens_of_several_sequences_replay(architecture: str) -> None:
    model = hf.make_model(architecture, LAYERS, SEEDS[architecture])
    ranks = compiled_ranks(model, "batch")
    eager = [DecoderStep(stage, layout="batch", returns=["tokens", "logits"]) for stage in cut_decoder(model, stages=2)]
    before, calls = ppb.stats(), 0
    for sequences in (5, 16, 1, 5):
        tokens, position_ids = hf.make_prompts([sequences])[0][0], torch.zeros(sequences, dtype=torch.int64)
        caches = [rank.step.new_cache(hf.MAX_CACHE_TOKENS, sequences) for rank in ranks]
        eager_caches = [step.new_cache(hf.MAX_CACHE_TOKENS, sequences) for step in eager]
        for _ in range(STEPS):
            inputs = {"position_ids": position_ids, "past_key_values": eager_caches[0]}
            hidden = eager[0](input_ids=tokens, **inputs)
            inputs["past_key_values"] = eager_caches[1]
            expected = eager[1](**hidden, **inputs)
            assert expected["logits"].shape == (sequences, hf.VOCAB_SIZE)
            tokens = run(ranks, tokens, position_ids, caches).clone()
            calls += 1
            assert torch.equal(tokens, expected["tokens"])
            position_ids = position_ids + 1
    assert_all_replayed(before, calls)


@pytest.mark.parametrize("layout", slow_but(["sequence"], ["sequence", "batch"]))
def test_runners_hand_over_the_hidden_states_of_either_layout(layout: str) -> None:
    """Two stages in threads; each micro-batch continues the sequences of the one before with the same number."""
    model = hf.make_model("qwen2", LAYERS, SEEDS["qwen2"])
    steps = [DecoderStep(stage, layout=layout) for stage in cut_decoder(model, stages=2)]
    sizes = {"sequence": [5, 1, 1, 9, 1, 1], "batch": [5, 5, 16, 1, 5, 16]}[layout]
    plan: list[tuple[int, int, int]] = []  # tokens, number of the caches, position
    for num_tokens in sizes:
        if layout == "batch":
            key, position = num_tokens, sum(rows == num_tokens for rows, _, _ in plan)
        else:
            key = plan[-1][1] + (num_tokens > 1) if plan else 0
            position = sum(rows for rows, sequence, _ in plan if sequence == key)
        plan.append((num_tokens, key, position))

    def caches_of(step: DecoderStep) -> dict[int, StaticCache]:
        keys = range(1, MAX_TOKENS + 1) if layout == "batch" else range(2)
        return {key: step.new_cache(hf.MAX_CACHE_TOKENS, key if layout == "batch" else 1) for key in keys}

    def positions(num_tokens: int, position: int) -> torch.Tensor:
        at = torch.full((num_tokens,), position)
        return at + torch.arange(num_tokens) if layout == "sequence" else at

    inputs = [torch.arange(n) * 7 % 125 + 3 + index for index, (n, _, _) in enumerate(plan)]
    expected = []
    eager_caches = [caches_of(step) for step in steps]
    for tokens, (num_tokens, key, position) in zip(inputs, plan, strict=True):
        at = positions(num_tokens, position)
        hidden = steps[0](input_ids=tokens, position_ids=at, past_key_values=eager_caches[0][key])
        expected.append(steps[1](**hidden, position_ids=at, past_key_values=eager_caches[1][key])["tokens"])

    hub = LocalHub(2, setup_seconds=LONGEST_SECONDS)
    one_at_a_time, got, failures = threading.Lock(), [], []
    snapshots: list[Any] = []

    def run_stage(index: int) -> None:
        step, caches = steps[index], caches_of(steps[index])

        def make_inputs(num_tokens: int, tag: bytes) -> dict[str, Any]:
            key, position = map(int, tag.split()) if tag else (num_tokens if layout == "batch" else 0, 0)
            own = {"position_ids": positions(num_tokens, position), "past_key_values": caches[key]}
            return own if index else {**own, "input_ids": torch.zeros(num_tokens, dtype=torch.int64)}

        try:
            with ppb.StageRunner(
                step,
                make_inputs=make_inputs,
                max_tokens=MAX_TOKENS,
                inputs=step.proxies if index else None,
                outputs=None if index else step.proxies,
                transport=hub.transport(index),
                options={"mode": "piecewise", **{name: v for name, v in GRAPHS.items() if name != "max_tokens"}},
            ) as runner:
                with one_at_a_time:
                    runner.warmup()
                microbatches = [
                    ppb.MicroBatch(n, tag, {**make_inputs(n, tag), "input_ids": tokens})
                    for tokens, (n, key, position) in zip(inputs, plan, strict=True)
                    for tag in [f"{key} {position}".encode()]
                ]
                got.extend(output["tokens"] for output in runner.run(None if index else microbatches) if output)
            snapshots.append(runner.stats)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run_stage, args=(index,), daemon=True) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONGEST_SECONDS)
    assert not failures and not any(thread.is_alive() for thread in threads)
    assert [tokens.tolist() for tokens in got] == [tokens.tolist() for tokens in expected]
    stats = ppb.stats()
    assert stats.graph_misses == 0, ppb.explain()
    assert stats.replays == 2 * len(plan) * (1 + LAYERS // 2) and stats.stage_inputs_in_place == len(plan)
    for snapshot in snapshots:
        assert (snapshot.microbatches, snapshot.proxy_copies, snapshot.recv_allocations) == (len(plan), 0, 0)


def test_a_batch_gives_what_its_sequences_give_alone() -> None:
    (stage,) = cut_decoder(hf.make_model("llama", LAYERS, SEEDS["llama"]), stages=1)
    batch, single = DecoderStep(stage, layout="batch", returns=["logits"]), DecoderStep(stage, returns=["logits"])
    batch_cache = batch.new_cache(8, sequences=3)
    single_caches = [single.new_cache(8) for _ in range(3)]
    assert [layer.keys.shape[0] for layer in batch_cache.layers] == [3] * LAYERS
    for step in range(4):
        tokens = torch.tensor([5, 60, 7]) + step
        got = batch(tokens, position_ids=torch.full((3,), step), past_key_values=batch_cache)["logits"]
        for row, cache in enumerate(single_caches):
            one = single(tokens[row : row + 1], position_ids=torch.tensor([step]), past_key_values=cache)
            torch.testing.assert_close(got[row : row + 1], one["logits"])


def test_new_caches_are_empty_and_stay_where_they_are() -> None:
    _, last = cut_decoder(hf.make_model("gemma2", LAYERS), stages=2)
    step = DecoderStep(last)
    cache = step.new_cache(24)
    addresses = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    assert len(cache.layers) == LAYERS // 2 and {tuple(layer.keys.shape) for layer in cache.layers} == {(1, 2, 24, 8)}
    hidden_states, position_ids = torch.randn(5, 32), torch.arange(5)
    results = []
    for _ in range(2):
        assert not any(layer.keys.any() or layer.values.any() or layer.cumulative_length for layer in cache.layers)
        results.append(step(hidden_states=hidden_states, position_ids=position_ids, past_key_values=cache)["tokens"])
        assert all(layer.keys.any() and layer.cumulative_length == 5 for layer in cache.layers)
        cache.reset()
    assert torch.equal(*results)
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers] == addresses


def test_longer_prompts_run_without_graphs_and_say_so() -> None:
    model = hf.make_model("llama", 1, SEEDS["llama"])
    (stage,) = cut_decoder(model, stages=1)
    rank = Rank(DecoderStep(stage))
    rank.warm_up()
    (prompt,) = hf.make_prompts([MAX_TOKENS + 1])
    expected = model(prompt).logits[0].argmax(-1)
    before = ppb.stats()
    tokens = rank(prompt[0].clone(), torch.arange(MAX_TOKENS + 1), rank.step.new_cache(hf.MAX_CACHE_TOKENS))
    assert torch.equal(tokens, expected)
    assert ppb.stats().programs == before.programs and ppb.stats().replays == before.replays
    assert ppb.stats().miss_reasons["over-max"] == 1 + 1
    assert "missed      over-max: " in ppb.explain()


def test_several_prompts_at_once_run_without_graphs_and_say_so() -> None:
    """``[batch, tokens]`` with both changing has no one token count; a stage itself takes it, right and un-captured."""
    model = hf.make_model("llama", 1, SEEDS["llama"])
    (stage,) = cut_decoder(model, stages=1)
    compiled = torch.compile(stage, backend="pp_piecewise", options=GRAPHS)
    for sequences, num_tokens in [(2, 3), (3, 4), (5, 2), (4, 4), (5, 2), (3, 4)]:
        tokens = torch.randint(3, hf.VOCAB_SIZE, (sequences, num_tokens))
        caches = [StaticCache(config=stage.config, max_cache_len=hf.MAX_CACHE_TOKENS) for _ in range(2)]
        position_ids = torch.arange(num_tokens)[None]
        before = ppb.stats()
        got = compiled(input_ids=tokens, position_ids=position_ids, past_key_values=caches[0])
        expected = stage(input_ids=tokens, position_ids=position_ids, past_key_values=caches[1])
        torch.testing.assert_close(got, expected)
        assert ppb.stats().calls == before.calls + 1
    assert ppb.stats().replays == 0
    assert "missed      other-dynamic-dimension: " in ppb.explain()


def test_wrong_arguments_are_refused() -> None:
    stage: DecoderStage = cut_decoder(hf.make_model("llama", LAYERS), stages=1)[0]
    with pytest.raises(ValueError, match="layout='rows': one of sequence, batch is expected"):
        DecoderStep(stage, layout="rows")
    for returns in ([], ["probabilities"]):
        with pytest.raises(ValueError, match="one or both of tokens, logits are expected"):
            DecoderStep(stage, returns=returns)

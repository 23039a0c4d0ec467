"""Stages cut from tiny random-weight Hugging Face decoders compute bit for bit what the whole model does."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

from pp_piecewise_backend.integrations import huggingface

LAYERS = 4
TINY = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
EXPERTS = dict(moe_intermediate_size=24, num_experts=4, num_local_experts=4, num_experts_per_tok=2)
WINDOW = dict(
    sliding_window=6,
    layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
)
DECODERS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", dict(tie_word_embeddings=True)),
    "qwen2-window": ("Qwen2ForCausalLM", "Qwen2Config", dict(use_sliding_window=True, **WINDOW)),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", dict(head_dim=8)),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", dict(head_dim=8, **EXPERTS)),
    "gemma2-window": ("Gemma2ForCausalLM", "Gemma2Config", dict(head_dim=8, **WINDOW)),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", dict(head_dim=8)),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", EXPERTS),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", dict(no_rope_layers=[1, 0, 1, 1])),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", dict(head_dim=8, **EXPERTS, **WINDOW)),
}


def tiny_decoder(name: str) -> transformers.PreTrainedModel:
    model_class, config_class, extra = DECODERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**TINY, **extra})
    model = getattr(transformers, model_class)(config).eval()
    # Zero biases and unit norms would hide a stage that took the wrong ones.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def new_cache(kind: str, config: transformers.PretrainedConfig) -> transformers.Cache:
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=16)


def run_stages(stages, caches, tokens, positions, mask):
    value = None
    for stage, cache in zip(stages, caches, strict=True):
        given = {"input_ids": tokens} if stage.is_first else {"hidden_states": value}
        value = stage(**given, position_ids=positions, attention_mask=mask, past_key_values=cache)
    return value


@pytest.mark.parametrize("cache_kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_prefill_and_cached_decoding_equal_the_whole_model(name: str, cache_kind: str) -> None:
    model = tiny_decoder(name)
    cuts = [huggingface.cut_decoder(model, stages=stage_count) for stage_count in range(1, LAYERS + 1)]
    caches = [[new_cache(cache_kind, stage.config) for stage in stages] for stages in cuts]
    whole_cache = new_cache(cache_kind, model.config)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])  # the first row is padded on the left
    tokens = torch.tensor([[0, 0, 5, 9, 33], [7, 60, 4, 4, 21]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for step in range(6):  # past the sliding window of 6 tokens
        expected = model(
            tokens, position_ids=positions, attention_mask=mask, past_key_values=whole_cache, use_cache=True
        ).logits
        assert torch.isfinite(expected[mask[:, -tokens.shape[1] :].bool()]).all()
        for stages, stage_caches in zip(cuts, caches, strict=True):
            actual = run_stages(stages, stage_caches, tokens, positions, mask)
            assert torch.equal(actual, expected), f"{len(stages)} stages, step {step}"
        tokens = expected[:, -1:].argmax(-1)
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)


@torch.no_grad()
def test_without_cache_and_mask_and_with_given_layer_counts() -> None:
    model = tiny_decoder("llama")
    stages = huggingface.cut_decoder(model, layer_counts=[1, 3])
    tokens = torch.tensor([[5, 9, 33, 7]])
    hidden_states = stages[0](input_ids=tokens)
    logits = stages[1](hidden_states=hidden_states, logits_to_keep=1)
    assert hidden_states.shape == (1, 4, TINY["hidden_size"])
    assert torch.equal(logits, model(tokens, use_cache=False, logits_to_keep=1).logits)


def test_each_stage_holds_its_part_only_and_shares_parameters() -> None:
    model = tiny_decoder("llama-tied")
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    first, middle, last = huggingface.cut_decoder(model, stages=3)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert [stage.layers for stage in (first, middle, last)] == [range(0, 1), range(1, 2), range(2, 4)]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]

    embedding, norm = model.model.embed_tokens.weight, model.model.norm.weight
    held = [{id(parameter) for parameter in stage.parameters()} for stage in (first, middle, last)]
    assert [id(embedding) in ids for ids in held] == [True, False, True]  # tied: also the head of the last
    assert [id(norm) in ids for ids in held] == [False, False, True]
    for stage, ids in zip((first, middle, last), held, strict=True):
        local = {id(p) for layer in stage.layers for p in model.model.layers[layer].parameters()}
        assert ids - {id(embedding), id(norm)} == local
    assert last.decoder.lm_head.weight is embedding
    assert last.config.num_hidden_layers == 2 and model.config.num_hidden_layers == LAYERS


def test_config_lists_with_one_entry_per_layer_are_cut() -> None:
    model = tiny_decoder("gemma2-window")
    stages = huggingface.cut_decoder(model, stages=2)
    assert [stage.config.layer_types for stage in stages] == [
        ["full_attention", "sliding_attention"],
        ["sliding_attention", "full_attention"],
    ]
    assert model.config.layer_types == WINDOW["layer_types"]


@pytest.mark.parametrize(
    ("layers", "stages", "counts"), [(4, 1, (4,)), (4, 3, (1, 1, 2)), (10, 4, (2, 3, 2, 3)), (7, 7, (1,) * 7)]
)
def test_balanced_layer_counts(layers: int, stages: int, counts: tuple[int, ...]) -> None:
    assert huggingface.balanced_layer_counts(layers, stages) == counts


def test_numbers_that_do_not_fit_are_refused() -> None:
    model = tiny_decoder("llama")
    with pytest.raises(ValueError, match="4 layers into 5 stages: the number of stages must be 1 to 4"):
        huggingface.cut_decoder(model, stages=5)
    with pytest.raises(ValueError, match="4 layers into 0 stages"):
        huggingface.cut_decoder(model, stages=0)
    with pytest.raises(ValueError, match=r"\(2, 3\) do not fit.*got the sum 5"):
        huggingface.cut_decoder(model, layer_counts=[2, 3])
    with pytest.raises(ValueError, match="exactly one of stages"):
        huggingface.cut_decoder(model)


def test_wrong_inputs_of_a_stage_are_refused() -> None:
    first, last = huggingface.cut_decoder(tiny_decoder("llama"), stages=2)
    with pytest.raises(ValueError, match="stage 0 of 2 takes input_ids, and not hidden_states"):
        first(hidden_states=torch.zeros(1, 1, 32))
    with pytest.raises(ValueError, match="stage 1 of 2 takes hidden_states"):
        last(input_ids=torch.zeros(1, 1, dtype=torch.long))


def test_a_model_without_a_plan_is_refused() -> None:
    config = transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(config)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no pp_plan"):
        huggingface.cut_decoder(model, stages=2)


def test_a_model_that_computes_outside_its_plan_is_refused() -> None:
    config = transformers.GraniteConfig(**{**TINY, "embedding_multiplier": 2.0})
    model = transformers.GraniteForCausalLM(config)
    with pytest.raises(ValueError, match="computes something outside the parts of its pp_plan"):
        huggingface.cut_decoder(model, stages=2)


@torch.no_grad()
def test_stages_compile_without_graph_breaks() -> None:
    torch._dynamo.reset()
    stages = huggingface.cut_decoder(tiny_decoder("llama"), stages=2)
    compiled = [torch.compile(stage, backend="eager", fullgraph=True) for stage in stages]
    caches = [StaticCache(config=stage.config, max_cache_len=16) for stage in stages]
    expected_caches = [StaticCache(config=stage.config, max_cache_len=16) for stage in stages]
    tokens = torch.tensor([[5, 9, 33, 7]])
    for step in range(3):
        positions = torch.arange(tokens.shape[1])[None] + (0 if step == 0 else 3 + step)
        expected = run_stages(stages, expected_caches, tokens, positions, None)
        value = compiled[0](input_ids=tokens, position_ids=positions, past_key_values=caches[0])
        value = compiled[1](hidden_states=value, position_ids=positions, past_key_values=caches[1])
        # While compiling, transformers builds a mask where eager relies on is_causal: not bit for bit.
        torch.testing.assert_close(value, expected)
        assert torch.equal(value.argmax(-1), expected.argmax(-1))
        tokens = value[:, -1:].argmax(-1)

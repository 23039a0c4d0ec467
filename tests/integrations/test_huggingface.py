"""Stages cut from tiny random-weight Hugging Face decoders compute bit for bit what the whole model does."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, StaticCache

from models.tiny_decoders import DECODERS, LAYERS, TINY, WINDOW, tiny_decoder
from pp_piecewise_backend.integrations import huggingface
from tiers import slow_but


def new_cache(kind: str, config: transformers.PretrainedConfig) -> transformers.Cache:
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=16)


def run_stages(stages, caches, tokens, positions, mask):
    value = None
    for stage, cache in zip(stages, caches, strict=True):
        given = {"input_ids": tokens} if stage.is_first else {"hidden_states": value}
        value = stage(**given, position_ids=positions, attention_mask=mask, past_key_values=cache)
    return value


@pytest.mark.parametrize(
    ("name", "cache_kind"),
    slow_but(
        [*((name, "static") for name in DECODERS), *((name, "dynamic") for name in ("llama", "qwen2-window"))],
        itertools.product(DECODERS, ["dynamic", "static"]),
    ),
)
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


# ------------------------------------------------------------------------------ loading one stage

MOST_BYTES_OF_A_SHARD = 20_000  # a quarter of a layer or more: several shards for each model above


def save(name: str, directory: Path, *, sharded: bool = False, dtype: torch.dtype = torch.float32) -> None:
    size = MOST_BYTES_OF_A_SHARD if sharded else "1GB"
    tiny_decoder(name).to(dtype).save_pretrained(directory, max_shard_size=size)
    assert len(list(directory.glob("*.safetensors"))) == 1 or sharded


def whole_model(directory: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(directory)


def tensors_of(stage: huggingface.DecoderStage) -> dict[str, torch.Tensor]:
    return {**dict(stage.named_parameters()), **dict(stage.named_buffers())}


def assert_same_tensors(got: huggingface.DecoderStage, expected: huggingface.DecoderStage) -> None:
    got_tensors, expected_tensors = tensors_of(got), tensors_of(expected)
    assert got_tensors.keys() == expected_tensors.keys()
    for name, tensor in got_tensors.items():
        assert tensor.dtype == expected_tensors[name].dtype and torch.equal(tensor, expected_tensors[name]), name


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "sharded"),
    slow_but(
        [*((name, False) for name in DECODERS), *((name, True) for name in ("llama-tied", "qwen3-moe"))],
        itertools.product(DECODERS, [False, True]),
    ),
)
@torch.no_grad()
def test_loaded_stages_equal_those_cut_from_the_loaded_model(name: str, sharded: bool, tmp_path: Path) -> None:
    save(name, tmp_path, sharded=sharded)
    cut = huggingface.cut_decoder(whole_model(tmp_path), layer_counts=[1, 2, 1])
    loaded = [huggingface.load_stage(tmp_path, layer_counts=[1, 2, 1], stage=index) for index in range(3)]
    for expected, got in zip(cut, loaded, strict=True):
        assert_same_tensors(got, expected)
        assert (got.index, got.count, got.layers, got.training) == (expected.index, 3, expected.layers, False)
        assert got.config.to_dict() == expected.config.to_dict()
    tokens, positions = torch.tensor([[5, 9, 33, 7], [7, 60, 4, 21]]), torch.arange(4)[None]
    caches = [[new_cache("static", stage.config) for stage in stages] for stages in (cut, loaded)]
    for _ in range(4):  # past the sliding window of 6 tokens
        expected_logits = run_stages(cut, caches[0], tokens, positions, None)
        assert torch.isfinite(expected_logits).all()
        assert torch.equal(run_stages(loaded, caches[1], tokens, positions, None), expected_logits)
        tokens, positions = expected_logits[:, -1:].argmax(-1), positions[:, -1:] + 1


class ReadObserver:
    """Stands in for ``safetensors.safe_open``, and keeps which weights were read from which files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys: list[str] = []
        self.bytes_read = 0
        self.files: set[str] = set()
        really_open, observer = safetensors.safe_open, self

        class Opened:
            def __init__(self, path: Path, **options: Any) -> None:
                self._path, self._file = Path(path), really_open(path, **options)

            def __enter__(self) -> Opened:
                self._file.__enter__()
                return self

            def __exit__(self, *error: Any) -> None:
                self._file.__exit__(*error)

            def keys(self) -> list[str]:
                return self._file.keys()

            def get_tensor(self, key: str) -> torch.Tensor:
                tensor = self._file.get_tensor(key)
                observer.keys.append(key)
                observer.bytes_read += tensor.nbytes
                observer.files.add(self._path.name)
                return tensor

        monkeypatch.setattr(safetensors, "safe_open", Opened)


def expected_keys(directory: Path, stage: int, stages: int, tied: bool) -> set[str]:
    """Written without the code under test: what stage ``stage`` of a Llama-like decoder needs."""
    layers = range(LAYERS * stage // stages, LAYERS * (stage + 1) // stages)
    every_key = [key for file in directory.glob("*.safetensors") for key in load_file(file)]
    keys = {key for key in every_key if any(key.startswith(f"model.layers.{layer}.") for layer in layers)}
    keys |= {"model.embed_tokens.weight"} if stage == 0 else set()
    if stage == stages - 1:
        keys |= {"model.norm.weight", "model.embed_tokens.weight" if tied else "lm_head.weight"}
    return keys


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "gemma2-window"])
def test_only_local_weights_are_read(name: str, sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(name, tmp_path, sharded=sharded)
    every_file = {file.name for file in tmp_path.glob("*.safetensors")}
    wanted = [expected_keys(tmp_path, index, 4, tied=name != "llama") for index in range(4)]
    for index in range(4):
        with monkeypatch.context() as patch:
            observer = ReadObserver(patch)
            stage = huggingface.load_stage(tmp_path, stages=4, stage=index)
        assert sorted(observer.keys) == sorted(wanted[index])  # each once
        assert observer.bytes_read == sum(parameter.nbytes for parameter in stage.parameters())
        assert not any(tensor.is_meta for tensor in tensors_of(stage).values())
        assert (observer.files < every_file) == sharded


def test_weights_are_read_in_the_stored_or_the_given_dtype(tmp_path: Path) -> None:
    save("llama", tmp_path, dtype=torch.bfloat16)
    stored = huggingface.load_stage(tmp_path, stages=2, stage=1)
    assert_same_tensors(stored, huggingface.cut_decoder(whole_model(tmp_path), stages=2)[1])
    assert stored.decoder.lm_head.weight.dtype == torch.bfloat16
    assert stored.decoder.model.rotary_emb.inv_freq.dtype == torch.float32
    wide = huggingface.load_stage(tmp_path, stages=2, stage=1, dtype=torch.float32, device="cpu")
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    assert torch.equal(wide.decoder.lm_head.weight, stored.decoder.lm_head.weight.float())

    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_tensors(huggingface.load_stage(tmp_path, stages=2, stage=1), stored)


def test_tied_embeddings_stay_tied_where_both_are_local_and_stored_ones_are_taken_as_they_are(tmp_path: Path) -> None:
    save("qwen2-tied", tmp_path)
    (only,) = (huggingface.load_stage(tmp_path, stages=1, stage=0),)
    assert only.decoder.lm_head.weight is only.decoder.model.embed_tokens.weight
    # A config that says tied and a checkpoint that has two: transformers takes the two.
    rewrite(tmp_path, lambda weights: weights.update({"lm_head.weight": 2 * weights["model.embed_tokens.weight"]}))
    cut = huggingface.cut_decoder(whole_model(tmp_path), stages=2)
    for index in range(2):
        assert_same_tensors(huggingface.load_stage(tmp_path, stages=2, stage=index), cut[index])
    # And one that has the head only: it is the embedding too.
    rewrite(tmp_path, lambda weights: weights.pop("model.embed_tokens.weight"))
    cut = huggingface.cut_decoder(whole_model(tmp_path), stages=2)
    for index in range(2):
        assert_same_tensors(huggingface.load_stage(tmp_path, stages=2, stage=index), cut[index])


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_names(tmp_path: Path) -> None:
    save("llama", tmp_path)
    original = load_file(tmp_path / "model.safetensors")
    missing = "model.layers.3.mlp.up_proj.weight"

    rewrite(tmp_path, lambda weights: weights.pop(missing))
    with pytest.raises(ValueError, match=f"does not fit LlamaForCausalLM: it lacks {missing}"):
        huggingface.load_stage(tmp_path, stages=2, stage=1)
    assert huggingface.load_stage(tmp_path, stages=2, stage=0).layers == range(0, 2)  # it is not of this stage

    rewrite(tmp_path, lambda weights: weights.update({**original, "model.layers.0.mlp.extra": torch.ones(2)}))
    for index in range(2):
        with pytest.raises(ValueError, match=r"it has model.layers.0.mlp.extra, which the model does not know"):
            huggingface.load_stage(tmp_path, stages=2, stage=index)

    rewrite(
        tmp_path, lambda weights: (weights.pop("model.layers.0.mlp.extra"), weights.update({missing: torch.ones(2)}))
    )
    with pytest.raises(ValueError, match=rf"{missing} is \(2,\), expected \(48, 32\)"):
        huggingface.load_stage(tmp_path, stages=2, stage=1)

    # Checkpoints of the first Llamas hold the rotary frequencies of each layer; transformers ignores them.
    old = {**original, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    rewrite(tmp_path, lambda weights: weights.update(old))
    huggingface.load_stage(tmp_path, stages=2, stage=0)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        huggingface.load_stage(tmp_path, stages=2, stage=0)
    save("llama", tmp_path, sharded=True)
    index_file = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    norm_file = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    index_file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lacks model\.norm\.weight, which the index says it has"):
        huggingface.load_stage(tmp_path, stages=2, stage=1)
    index["weight_map"]["model.norm.weight"] = norm_file
    index_file.write_text(json.dumps(index))
    (tmp_path / norm_file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{norm_file} is missing, although the index"):
        huggingface.load_stage(tmp_path, stages=2, stage=1)
    index_file.unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        huggingface.load_stage(tmp_path, stages=2, stage=1)


def test_what_load_stage_cannot_do_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("llama", tmp_path)
    with pytest.raises(ValueError, match="stage 2 of 2: stages are numbered from 0 to 1"):
        huggingface.load_stage(tmp_path, stages=2, stage=2)
    with pytest.raises(ValueError, match="4 layers into 5 stages"):
        huggingface.load_stage(tmp_path, stages=5, stage=0)
    with monkeypatch.context() as patch:
        patch.setattr(transformers.LlamaPreTrainedModel, "_init_weights", lambda self, module: None)
        with pytest.raises(ValueError, match=r"does not compute model\.rotary_emb\.inv_freq.* of LlamaForCausalLM"):
            huggingface.load_stage(tmp_path, stages=2, stage=1)

    config = transformers.GraniteConfig(**{**TINY, "embedding_multiplier": 2.0})
    transformers.GraniteForCausalLM(config).save_pretrained(tmp_path / "granite")
    with pytest.raises(ValueError, match="computes something outside the parts of its pp_plan"):
        huggingface.load_stage(tmp_path / "granite", stages=2, stage=1)

    quantised = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(ValueError, match="is quantised, which load_stage does not read"):
        huggingface.load_stage(tmp_path, stages=2, stage=0)

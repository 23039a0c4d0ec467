"""Cuts a Hugging Face decoder into pipeline stages by its own ``pp_plan``.

    from pp_piecewise_backend.integrations.huggingface import cut_decoder

    first, last = cut_decoder(model, stages=2)
    cache = StaticCache(config=first.config, max_cache_len=128)     # the layers of this stage only
    hidden_states = first(input_ids=tokens, position_ids=positions, past_key_values=cache)
    logits = last(hidden_states=hidden_states, position_ids=positions, past_key_values=last_cache)

`load_stage` gives one of these stages from a folder of safetensors and reads the weights of this stage only.

`DecoderStep` wraps a stage for a `StageRunner`: one row per token, results in a dict.

A stage runs the model's **own** forward: a copy of its modules (sharing every parameter and buffer) that
holds the local layers only. So masks, rotary embeddings, sliding windows, scaled embeddings and soft-capped
logits are those of the library, and the stages together compute bit for bit what the whole model computes.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..runtime.stage import Proxy
from .balance import layer_counts_by
from .decoder_plan import DecoderPlan

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, StaticCache


def decoder_plan(model: PreTrainedModel) -> DecoderPlan:
    """Reads and checks the ``pp_plan`` of ``model``. Raises `ValueError` if the model cannot be cut by it.

    A model on the meta device computes nothing, so what it computes outside its plan cannot be seen.
    """
    name = type(model).__name__
    base = model.base_model
    plan = model.config.base_model_pp_plan
    if base is model:
        raise ValueError(f"{name} is a base model without a head; load the decoder with AutoModelForCausalLM.")
    if not plan:
        raise ValueError(
            f"{name} has no pp_plan (config.base_model_pp_plan), so where to cut it is unknown. Use "
            "an architecture with one (Llama, Qwen2, Qwen3, Gemma2, Phi-3, Mixtral, ...) or cut it yourself."
        )
    children = {child: getattr(base, child, None) for child in plan}
    lists = {child: module for child, module in children.items() if isinstance(module, nn.ModuleList)}
    if len(lists) != 1:
        raise ValueError(
            f"the pp_plan of {name} names {len(lists)} lists of layers ({', '.join(lists) or 'none'}) among "
            f"{', '.join(plan)}; exactly one is expected."
        )
    if getattr(model.config, "num_kv_shared_layers", 0) or getattr(model.config, "kv_sharing_modes", None):
        raise ValueError(
            f"{name} shares keys and values between layers; a cut would separate layers that need each other."
        )
    names = [child for child, module in children.items() if module is not None]
    [(layers, layer_list)] = lists.items()
    position = names.index(layers)
    result = DecoderPlan(tuple(names[:position]), layers, tuple(names[position + 1 :]), len(layer_list))
    if not next(base.parameters()).is_meta:
        _check_that_layers_are_all_there_is(model, result)
    return result


class DecoderStage(nn.Module):
    """One pipeline stage of a Hugging Face decoder.

    Attributes: ``index`` and ``count`` (this stage of how many), ``layers`` (a `range` of the whole model's
    layers), ``config`` (the model's, restricted to these layers: build caches with it,
    ``StaticCache(config=stage.config, ...)``), ``is_first``, ``is_last``. Parameters and buffers are shared
    with the model that it was cut from.
    """

    def __init__(
        self, decoder: PreTrainedModel, *, index: int, count: int, layers: range, config: PretrainedConfig
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.config = config
        self.index = index
        self.count = count
        self.layers = layers
        self.is_first, self.is_last = index == 0, index == count - 1
        self.train(decoder.training)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        hidden_states: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """Hidden states ``[batch, tokens, hidden]``; the last stage logits ``[batch, tokens, vocabulary]``.

        The first stage takes ``input_ids`` (int64 ``[batch, tokens]``), later stages ``hidden_states`` (what
        the stage before returned). ``position_ids`` (int64 ``[batch or 1, tokens]``), ``attention_mask``
        (2-d, over all tokens seen so far, as the model takes it) and ``model_kwargs`` (such as
        ``logits_to_keep`` on the last stage) go to the model as they are. ``past_key_values`` is a
        transformers cache for the layers of this stage; it is updated in place. The returned tensor belongs
        to the caller. Raises `ValueError` if this stage's input is missing or the other's is given.
        """
        if (input_ids is not None) != self.is_first or (hidden_states is not None) == self.is_first:
            expected, other = ("input_ids", "hidden_states") if self.is_first else ("hidden_states", "input_ids")
            raise ValueError(
                f"stage {self.index} of {self.count} takes {expected}, and not {other}; got "
                f"input_ids={'None' if input_ids is None else 'a tensor'}, "
                f"hidden_states={'None' if hidden_states is None else 'a tensor'}."
            )
        output = self.decoder(
            input_ids=input_ids,
            inputs_embeds=hidden_states,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            **model_kwargs,
        )
        return output.logits if self.is_last else output.last_hidden_state


LAYOUTS = ("sequence", "batch")


class DecoderStep(nn.Module):
    """A `DecoderStage` as engines and runners call one: all tensors have one row per token, the proxies too.

    ``layout`` says what the n tokens of a call are, and how the decoder sees them: ``"sequence"``, n tokens of one
    sequence (``[1, n]``: a prompt, a part of one, or one next token); ``"batch"``, the next token of n sequences of
    equal length (``[n, 1]``). ``returns`` says what the last stage gives. Raises `ValueError` for other names.
    """

    def __init__(self, stage: DecoderStage, *, layout: str = "sequence", returns: Sequence[str] = ("tokens",)) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"layout={layout!r}: one of {', '.join(LAYOUTS)} is expected.")
        if not returns or not set(returns) <= {"tokens", "logits"}:
            raise ValueError(f"returns={returns!r}: one or both of tokens, logits are expected.")
        self.stage = stage
        self.layout = layout
        self.returns = tuple(returns)
        self._sequence_dim = 0 if layout == "sequence" else 1

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        hidden_states: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
    ) -> dict[str, torch.Tensor]:
        """``{"hidden_states": [n, hidden]}``; on the last stage what ``returns`` names of ``"tokens"`` (int64 ``[n]``,
        the likeliest token after each of the n) and ``"logits"`` (``[n, vocabulary]``).

        The first stage takes ``input_ids`` (int64 ``[n]``), later ones ``hidden_states`` (``[n, hidden]``).
        ``position_ids`` (int64 ``[n]``) are their places in their sequences. ``past_key_values`` is a cache for the
        layers of this stage, of batch 1 or n as the layout says; it is updated in place. What is returned belongs
        to the caller.
        """
        output = self.stage(
            input_ids=self._as_batch(input_ids),
            hidden_states=self._as_batch(hidden_states),
            position_ids=self._as_batch(position_ids),
            past_key_values=past_key_values,
        ).squeeze(self._sequence_dim)
        if not self.stage.is_last:
            return {"hidden_states": output}
        results = {"tokens": output.argmax(-1)} if "tokens" in self.returns else {}
        return results | ({"logits": output} if "logits" in self.returns else {})

    @property
    def proxies(self) -> dict[str, Proxy]:
        """What one stage hands to the next: ``outputs`` of each runner but the last, ``inputs`` but of the first."""
        return stage_proxies(self.stage)

    @torch.no_grad()
    def new_cache(self, max_cache_tokens: int, sequences: int = 1) -> StaticCache:
        """An empty cache for the local layers, of ``max_cache_tokens`` for each of ``sequences`` of equal length.

        Its memory is there at once and never moves; ``reset()`` empties it. Layers with a sliding window get memory
        for all tokens too (the mask hides what lies outside): transformers' own layer for them counts in Python, and
        no graph replays while a number changes.
        """
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

        cache = StaticCache(config=self.stage.config, max_cache_len=max_cache_tokens)
        cache.layers = [
            StaticLayer(max_cache_len=max_cache_tokens) if type(layer) is StaticSlidingWindowLayer else layer
            for layer in cache.layers
        ]
        base = self.stage.decoder.base_model
        device = next(base.parameters()).device
        # The layers know the shapes of keys and values once they see some.
        if self.stage.is_first:
            first = {"input_ids": torch.zeros(sequences, 1, dtype=torch.int64, device=device)}
        else:
            shape = (sequences, 1, base.config.hidden_size)
            first = {"hidden_states": torch.zeros(shape, dtype=base.dtype, device=device)}
        self.stage(**first, position_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), past_key_values=cache)
        cache.reset()
        return cache

    def _as_batch(self, rows: torch.Tensor | None) -> torch.Tensor | None:
        return None if rows is None else rows.unsqueeze(self._sequence_dim)


def stage_proxies(stage: DecoderStage) -> dict[str, Proxy]:
    """What a stage hands to the next one, with one row per token."""
    base = stage.decoder.base_model
    return {"hidden_states": Proxy((base.config.hidden_size,), base.dtype)}


def cut_decoder(
    model: PreTrainedModel,
    stages: int | None = None,
    layer_counts: Sequence[int] | None = None,
    *,
    balance: str = "layers",
) -> tuple[DecoderStage, ...]:
    """All stages of ``model``: ``stages`` balanced ones, or one per entry of ``layer_counts``.

    ``balance`` says in what the stages are alike, as far as whole layers allow: ``"layers"`` (their number),
    ``"memory"`` (bytes of weights) or ``"time"`` (of a prompt, measured here and now); embedding, final norm and head
    are counted where they lie.

    The embedding goes to the first stage; the final norm and the head go to the last; what the layers share
    (rotary embedding, masks) goes to each. Tied embeddings stay tied to the model's own parameter. ``model``
    itself is not changed. Raises `ValueError` when the model has no usable ``pp_plan`` or the numbers do not
    fit.
    """
    plan = decoder_plan(model)
    layers_of_stages = _layers_of_stages(model, plan, stages, layer_counts, balance)
    return tuple(
        _build_stage(model, plan, index=index, count=len(layers_of_stages), layers=layers)
        for index, layers in enumerate(layers_of_stages)
    )


def load_stage(
    directory: str | Path,
    *,
    stage: int,
    stages: int | None = None,
    layer_counts: Sequence[int] | None = None,
    balance: str = "layers",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> DecoderStage:
    """Stage number ``stage`` of the decoder in ``directory``, with memory for and reads of its own weights only.

    ``directory`` holds ``config.json`` and ``model.safetensors``, or its shards and
    ``model.safetensors.index.json``. The result is the one that `cut_decoder` gives for the whole model loaded
    by transformers, in evaluation mode, with parameters of its own: every rank of a pipeline calls this with its
    own ``stage`` and the same ``stages`` (and ``balance``, ``"layers"`` or ``"memory"``) or ``layer_counts``. With tied
    embeddings the last stage reads the embedding as its head. ``dtype`` None: the one in ``config.json``, else the one
    stored. ``device`` None: the CPU. Nothing is downloaded, and no code in the directory is run.

    Raises `FileNotFoundError` for a missing file, and `ValueError` for a model that cannot be cut, numbers that
    do not fit, a quantised checkpoint, and weights that are missing, unexpected or of another shape.
    """
    import transformers

    if balance == "time":
        raise ValueError(
            "balance='time' measures the whole model, which load_stage does not load, and each rank would find other "
            "times: measure once with cut_decoder(model, stages, balance='time'), and give all ranks layer_counts, "
            "which are [len(stage.layers) for stage in the stages that it returned]."
        )
    checkpoint = _Checkpoint(Path(directory))
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{directory} is quantised, which load_stage does not read; load it whole and cut it.")
    with torch.device("meta"):
        whole = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype or config.dtype or checkpoint.stored_dtype()
        )
    plan = decoder_plan(whole)
    layers_of_stages = _layers_of_stages(whole, plan, stages, layer_counts, balance)
    count = len(layers_of_stages)
    if not 0 <= stage < count:
        raise ValueError(f"stage {stage} of {count}: stages are numbered from 0 to {count - 1}.")
    layers = layers_of_stages[stage]
    device = torch.device(device or "cpu")
    _load_weights(whole, checkpoint, _names_in_stage(whole, plan, stage, count, layers), device)
    result = _build_stage(whole.eval(), plan, index=stage, count=count, layers=layers)
    _compute_buffers(result.decoder, device)
    _check_that_layers_are_all_there_is(result.decoder, plan)
    return result


def _layers_of_stages(
    model: PreTrainedModel,
    plan: DecoderPlan,
    stages: int | None,
    layer_counts: Sequence[int] | None,
    balance: str,
) -> tuple[range, ...]:
    if (stages is None) == (layer_counts is None):
        raise ValueError("give exactly one of stages (their number) and layer_counts (layers per stage).")
    if stages is None and balance != "layers":
        raise ValueError(f"balance={balance!r} chooses the layers of each stage; with layer_counts there is no choice.")
    counts = layer_counts_by(balance, model, plan, stages) if stages is not None else tuple(layer_counts or ())
    layer_count = plan.layer_count
    if sum(counts) != layer_count or any(count < 1 for count in counts):
        raise ValueError(
            f"layer_counts {counts} do not fit: each must be at least 1 and their sum the {layer_count} "
            f"layers of the model; got the sum {sum(counts)}."
        )
    return tuple(range(end - count, end) for count, end in zip(counts, itertools.accumulate(counts), strict=True))


def _build_stage(model: PreTrainedModel, plan: DecoderPlan, *, index: int, count: int, layers: range) -> DecoderStage:
    config = _config_of_layers(model.config, layers)
    decoder = _copy_with_layers(model, plan, config, layers, keep_head=index == count - 1)
    for child in plan.absent(index, count):
        setattr(decoder.base_model, child, nn.Identity())
    return DecoderStage(decoder, index=index, count=count, layers=layers, config=config)


def _copy_with_layers(
    model: PreTrainedModel, plan: DecoderPlan, config: PretrainedConfig, layers: range, *, keep_head: bool
) -> PreTrainedModel:
    """A copy of the modules with some of the layers, numbered from 0; tensors are shared, not copied."""
    source: Any = model if keep_head else model.base_model
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    shared[id(model.config)] = config
    all_layers = getattr(model.base_model, plan.layers)
    local_layers = nn.ModuleList(copy.deepcopy(all_layers[layer], shared) for layer in layers)
    # A cache of the local layers is indexed by what the attention modules believe their number to be.
    for local_index, (layer_index, layer) in enumerate(zip(layers, local_layers, strict=True)):
        for module in layer.modules():
            if getattr(module, "layer_idx", None) == layer_index:
                module.layer_idx = local_index  # type: ignore[assignment]
    shared[id(all_layers)] = local_layers
    return copy.deepcopy(source, shared)


# Lists of layer numbers, not one entry per layer; used only when a model is built.
_LISTS_OF_LAYER_NUMBERS = frozenset({"mlp_only_layers"})


def _config_of_layers(config: PretrainedConfig, layers: range) -> PretrainedConfig:
    """A copy of ``config`` for a model of these layers: attributes with one entry per layer are cut too."""
    local = copy.deepcopy(config)
    local.num_hidden_layers = len(layers)
    for name, value in vars(config).items():
        is_list = isinstance(value, (list, tuple)) and len(value) == config.num_hidden_layers
        if is_list and "layer" in name and name not in _LISTS_OF_LAYER_NUMBERS:
            setattr(local, name, value[layers.start : layers.stop])
    return local


def _check_that_layers_are_all_there_is(model: PreTrainedModel, plan: DecoderPlan) -> None:
    """Refuses models that compute more before or after the layers than the plan names (learned positions).

    Every stage would do it again. With all parts of the plan taken out, the base model must be the identity.
    """
    parameter = next(model.base_model.parameters())
    config = _config_of_layers(model.config, range(0))
    empty = _copy_with_layers(model, plan, config, range(0), keep_head=False)
    for child in (*plan.before_layers, *plan.after_layers):
        setattr(empty, child, nn.Identity())
    hidden_size = model.config.hidden_size
    probe = torch.linspace(-1, 1, 2 * hidden_size, device=parameter.device, dtype=parameter.dtype)
    probe = probe.reshape(1, 2, hidden_size)
    with torch.no_grad():
        output = empty(inputs_embeds=probe, position_ids=torch.arange(2, device=probe.device)[None], use_cache=False)
    if not torch.equal(output.last_hidden_state, probe):
        raise ValueError(
            f"{type(model).__name__} computes something outside the parts of its pp_plan "
            f"({', '.join((*plan.before_layers, plan.layers, *plan.after_layers))}) that every stage "
            "would repeat, so it cannot be cut by its plan alone."
        )


# ------------------------------------------------------------------------------ loading one stage


def stored_dtype(directory: str | Path) -> str:
    """Name of the dtype of the first floating weight in a folder with safetensors; ``"float32"`` if there is none."""
    return str(_Checkpoint(Path(directory)).stored_dtype() or torch.float32).removeprefix("torch.")


class _Checkpoint:
    """Which weights lie in which safetensors file of a directory; reads single ones."""

    def __init__(self, directory: Path) -> None:
        from safetensors import safe_open

        self._open = safe_open
        self._directory = directory
        index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
        if not (directory / "config.json").is_file():
            raise FileNotFoundError(f"{directory} has no config.json; a decoder in Hugging Face format is expected.")
        if index.is_file():
            self.file_of: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
        elif single.is_file():
            with safe_open(single, framework="pt") as file:
                self.file_of = dict.fromkeys(file.keys(), single.name)
        else:
            raise FileNotFoundError(
                f"{directory} has neither {single.name} nor {index.name}; weights in safetensors files are expected."
            )

    def stored_dtype(self) -> torch.dtype | None:
        """That of the first floating weight; its header is read, not the weight."""
        dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        for key, name in self.file_of.items():
            with self._open(self._path(name), framework="pt") as file:
                if (dtype := dtypes.get(file.get_slice(key).get_dtype())) is not None:
                    return dtype
        return None

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """These weights on the CPU, as they are stored; files without any of them stay closed."""
        keys_in: dict[str, list[str]] = {}
        for key in keys:
            keys_in.setdefault(self.file_of[key], []).append(key)
        weights = {}
        for name, keys_of_file in keys_in.items():
            with self._open(self._path(name), framework="pt") as file:
                if absent := sorted(set(keys_of_file).difference(file.keys())):
                    raise ValueError(f"{self._path(name)} lacks {_listed(absent)}, which the index says it has.")
                weights.update({key: file.get_tensor(key) for key in keys_of_file})
        return weights

    def _path(self, name: str) -> Path:
        path = self._directory / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, although the index of the checkpoint names it.")
        return path


def _names_in_stage(model: PreTrainedModel, plan: DecoderPlan, index: int, count: int, layers: range) -> set[str]:
    """Names in the whole model's state dict that are parts of this stage; what the plan does not name is in each."""
    base = f"{model.base_model_prefix}."
    other_layers = [f"{plan.layers}.{layer}" for layer in range(plan.layer_count) if layer not in layers]
    elsewhere = tuple(f"{base}{part}." for part in (*plan.absent(index, count), *other_layers))
    if index < count - 1:
        elsewhere += tuple(name for name in model.state_dict() if not name.startswith(base))  # the head
    return {name for name in model.state_dict() if not name.startswith(elsewhere)}


def _load_weights(model: PreTrainedModel, checkpoint: _Checkpoint, names: set[str], device: torch.device) -> None:
    """Gives the parameters ``names`` of a model on the meta device their values; all others stay there.

    Checkpoints of mixtures of experts, and old ones, name and shape weights otherwise than the model: transformers
    has the rules for it, and is asked to load these only.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    conversions = get_model_conversion_mapping(model)
    name_of = _names_of_keys(model, checkpoint.file_of, conversions)
    state = model.state_dict(keep_vars=True)
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$"]
    unexpected = [
        key for key, name in name_of.items() if name not in state and not any(re.search(p, key) for p in ignored)
    ]
    stored = set(name_of.values())
    tied = {name: {other for other in state if state[other] is state[name]} for name in names - stored}
    missing = sorted(name for name, others in tied.items() if not others & stored)
    if missing or unexpected:
        parts = [f"it lacks {_listed(missing)}"] if missing else []
        parts += [f"it has {_listed(sorted(unexpected))}, which the model does not know"] if unexpected else []
        raise ValueError(f"the checkpoint does not fit {type(model).__name__}: {'; '.join(parts)}.")
    # What is tied and stored once is read under the name that it is stored by.
    wanted = names.union(*tied.values())
    weights = checkpoint.read(key for key, name in name_of.items() if name in wanted)
    result, _ = convert_and_load_state_dict_in_model(
        model,
        weights,
        LoadStateDictConfig(
            device_map={"": device},
            dtype=model.dtype,
            dtype_plan=model._get_dtype_plan(model.dtype),
            weight_mapping=conversions,
        ),
    )
    differences = [
        f"{name} is {tuple(got)}, expected {tuple(expected)}" for name, got, expected in result.mismatched_keys
    ]
    if differences:
        raise ValueError(f"{type(model).__name__} and the checkpoint differ: {'; '.join(sorted(differences))}.")
    if result.conversion_errors:
        raise ValueError(f"transformers could not convert {_listed(sorted(result.conversion_errors.values()))}.")
    if not wanted.isdisjoint([*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()]):
        model.tie_weights(missing_keys=result.missing_keys, recompute_mapping=False)


def _names_of_keys(model: PreTrainedModel, keys: Iterable[str], conversions: Sequence[Any]) -> dict[str, str]:
    """Key in a checkpoint -> name in the model's state dict (of the first weight that it becomes a part of)."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    state, names = model.state_dict(), {}
    for key in keys:
        names[key], _ = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if names[key] not in state and key in state:
            names[key], _ = rename_source_key(key, [], [], model.base_model_prefix, state)
    return names


def _compute_buffers(decoder: PreTrainedModel, device: torch.device) -> None:
    """Buffers that no checkpoint holds (rotary frequencies) get memory, and their values from transformers."""
    fresh = {}
    for path, module in decoder.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                fresh[f"{path}.{name}"] = torch.empty_like(buffer, device=device)
                setattr(module, name, fresh[f"{path}.{name}"])
    decoder.initialize_weights()  # leaves alone what was loaded
    unknown = [name for name, buffer in fresh.items() if buffer._version == 0]
    unknown += [
        f"{path}.{name}"
        for path, module in decoder.named_modules()
        for name, value in [*vars(module).items(), *module.named_parameters(recurse=False)]
        if isinstance(value, torch.Tensor) and value.is_meta
    ]
    if unknown:
        raise ValueError(
            f"transformers does not compute {_listed(unknown)} of {type(decoder).__name__} without loading the "
            "whole model; load it whole and cut it."
        )


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

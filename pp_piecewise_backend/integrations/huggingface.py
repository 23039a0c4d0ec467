"""Cuts a Hugging Face decoder into pipeline stages by its own ``pp_plan``.

    from pp_piecewise_backend.integrations.huggingface import cut_decoder

    first, last = cut_decoder(model, stages=2)
    cache = StaticCache(config=first.config, max_cache_len=128)     # the layers of this stage only
    hidden_states = first(input_ids=tokens, position_ids=positions, past_key_values=cache)
    logits = last(hidden_states=hidden_states, position_ids=positions, past_key_values=last_cache)

A stage runs the model's **own** forward: a copy of its modules (sharing every parameter and buffer) that
holds the local layers only. So masks, rotary embeddings, sliding windows, scaled embeddings and soft-capped
logits are those of the library, and the stages together compute bit for bit what the whole model computes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class DecoderPlan:
    """Where a decoder may be cut, as its ``pp_plan`` tells: names of children of its base model, in order."""

    before_layers: tuple[str, ...]
    layers: str
    after_layers: tuple[str, ...]
    layer_count: int


def decoder_plan(model: PreTrainedModel) -> DecoderPlan:
    """Reads and checks the ``pp_plan`` of ``model``. Raises `ValueError` if the model cannot be cut by it."""
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
    lists = [child for child, module in children.items() if isinstance(module, nn.ModuleList)]
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
    position = names.index(lists[0])
    layer_list = children[lists[0]]
    assert isinstance(layer_list, nn.ModuleList)
    result = DecoderPlan(
        before_layers=tuple(names[:position]),
        layers=lists[0],
        after_layers=tuple(names[position + 1 :]),
        layer_count=len(layer_list),
    )
    _check_that_layers_are_all_there_is(model, result)
    return result


def balanced_layer_counts(layer_count: int, stages: int) -> tuple[int, ...]:
    """Layers per stage, as even as possible: ``balanced_layer_counts(10, 4) == (2, 3, 2, 3)``."""
    if not 1 <= stages <= layer_count:
        raise ValueError(
            f"cannot cut {layer_count} layers into {stages} stages: the number of stages must be 1 to {layer_count}."
        )
    return tuple(layer_count * (stage + 1) // stages - layer_count * stage // stages for stage in range(stages))


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
        self.train(decoder.training)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

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

    def extra_repr(self) -> str:
        return f"stage {self.index} of {self.count}, layers {self.layers.start} to {self.layers.stop - 1}"


def cut_decoder(
    model: PreTrainedModel, stages: int | None = None, layer_counts: Sequence[int] | None = None
) -> tuple[DecoderStage, ...]:
    """All stages of ``model``: ``stages`` balanced ones, or one per entry of ``layer_counts``.

    The embedding goes to the first stage; the final norm and the head go to the last; what the layers share
    (rotary embedding, masks) goes to each. Tied embeddings stay tied to the model's own parameter. ``model``
    itself is not changed. Raises `ValueError` when the model has no usable ``pp_plan`` or the numbers do not
    fit.
    """
    plan = decoder_plan(model)
    counts = _checked_layer_counts(plan.layer_count, stages, layer_counts)
    ends = [sum(counts[: index + 1]) for index in range(len(counts))]
    return tuple(
        _build_stage(model, plan, index=index, count=len(counts), layers=range(end - counts[index], end))
        for index, end in enumerate(ends)
    )


def _checked_layer_counts(layer_count: int, stages: int | None, layer_counts: Sequence[int] | None) -> tuple[int, ...]:
    if (stages is None) == (layer_counts is None):
        raise ValueError("give exactly one of stages (their number) and layer_counts (layers per stage).")
    if stages is not None:
        return balanced_layer_counts(layer_count, stages)
    assert layer_counts is not None
    counts = tuple(layer_counts)
    if sum(counts) != layer_count or any(count < 1 for count in counts):
        raise ValueError(
            f"layer_counts {counts} do not fit: each must be at least 1 and their sum the {layer_count} "
            f"layers of the model; got the sum {sum(counts)}."
        )
    return counts


def _build_stage(model: PreTrainedModel, plan: DecoderPlan, *, index: int, count: int, layers: range) -> DecoderStage:
    config = _config_of_layers(model.config, layers)
    is_first, is_last = index == 0, index == count - 1
    decoder = _copy_with_layers(model, plan, config, layers, keep_head=is_last)
    base = decoder.base_model
    dropped = () if is_first else plan.before_layers
    if not is_last:
        dropped += plan.after_layers
    for child in dropped:
        setattr(base, child, nn.Identity())
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
    for local_index, (layer_index, layer) in enumerate(zip(layers, local_layers, strict=True)):
        _renumber(layer, layer_index, local_index)
    shared[id(all_layers)] = local_layers
    return copy.deepcopy(source, shared)


def _renumber(layer: nn.Module, layer_index: int, local_index: int) -> None:
    """A cache of the local layers is indexed by what the attention modules believe their number to be."""
    for module in layer.modules():
        if getattr(module, "layer_idx", None) == layer_index:
            module.layer_idx = local_index  # type: ignore[assignment]


# Lists of layer numbers, not one entry per layer; used only when a model is built.
_LISTS_OF_LAYER_NUMBERS = frozenset({"mlp_only_layers"})


def _config_of_layers(config: PretrainedConfig, layers: range) -> PretrainedConfig:
    """A copy of ``config`` for a model of these layers: attributes with one entry per layer are cut too."""
    layer_count = config.num_hidden_layers
    local = copy.deepcopy(config)
    per_layer = {
        name: value[layers.start : layers.stop]
        for name, value in vars(config).items()
        if "layer" in name
        and name not in _LISTS_OF_LAYER_NUMBERS
        and isinstance(value, (list, tuple))
        and len(value) == layer_count
    }
    local.num_hidden_layers = len(layers)
    for name, value in per_layer.items():
        setattr(local, name, value)
    return local


def _check_that_layers_are_all_there_is(model: PreTrainedModel, plan: DecoderPlan) -> None:
    """Refuses models that compute more before or after the layers than the plan names (learned positions).

    Every stage would do it again. With all parts of the plan taken out, the base model must be the identity.
    """
    parameter = next(model.base_model.parameters())
    if parameter.is_meta:
        return
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

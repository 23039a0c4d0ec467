"""A folder with a Hugging Face decoder: its configuration, its text and tokens, and how its layers lie on the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .balance import balanced_layer_counts, layer_counts_by

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def read_config(model_dir: Path) -> Any:
    """Raises `ValueError` that says what was got and what is expected, where the decoder cannot be cut."""
    if not (model_dir / "config.json").is_file():
        raise ValueError(f"{model_dir}: no config.json there; a local folder in Hugging Face format is expected.")
    try:
        import transformers
    except ImportError:
        raise ValueError("this needs transformers: pip install 'pp_piecewise_backend[demo]'") from None
    try:
        config = transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{model_dir}: its config.json cannot be used: {str(error).splitlines()[0]}") from None
    if not config.base_model_pp_plan:
        raise ValueError(
            f"{model_dir}: the architecture {config.model_type!r} has no pp_plan that "
            "says where to cut; one with a plan is expected, such as Llama, Qwen2, Gemma2, Phi-3 or Mixtral."
        )
    if not any((model_dir / name).is_file() for name in WEIGHTS):
        raise ValueError(f"{model_dir}: no weights there; {' or '.join(WEIGHTS)} is expected.")
    return config


def check_rank_count(ranks: int, config: Any, named: str = "ranks") -> None:
    """Raises `ValueError` where there are not as many ranks as layers, or fewer."""
    layer_count = config.num_hidden_layers
    if not 1 <= ranks <= layer_count:
        raise ValueError(f"{named} {ranks}: the decoder has {layer_count} layers, so 1 to {layer_count} is possible.")


def end_tokens(model_dir: Path, config: Any) -> list[int]:
    """Tokens with which an answer ends."""
    import transformers

    if (model_dir / "generation_config.json").is_file():
        end = transformers.GenerationConfig.from_pretrained(model_dir, local_files_only=True).eos_token_id
    else:
        end = config.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def choose_device(wanted: str, ranks: int, graphs: str | None = None) -> str:
    """``"cpu"`` or ``"cuda"``, for ``"auto"`` the latter where each rank has a GPU of its own.

    Raises `ValueError` where it is not there, or has not the ``graphs`` that the backend was asked for.
    """
    import torch

    gpu_count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and gpu_count < ranks:
        raise ValueError(
            f"device cuda: {ranks} ranks need {ranks} GPUs (NCCL wants one for each), there "
            f"are {gpu_count}; use fewer ranks or the device cpu."
        )
    device = ("cuda" if gpu_count >= ranks else "cpu") if wanted == "auto" else wanted
    if graphs == "cuda" and device == "cpu":
        raise ValueError("graphs cuda needs the device cuda: on the CPU, emulate or off is possible.")
    return device


def layer_counts(model_dir: Path, config: Any, ranks: int, balance: str, device: str) -> list[int]:
    """Layers of each rank, to be found once and passed on: two ranks that measure time could differ."""
    if balance == "layers":
        return list(balanced_layer_counts(config.num_hidden_layers, ranks))
    import torch
    import transformers

    from .decoder_stages import decoder_plan

    if balance == "time":
        model = load_whole(model_dir).to(device)
    else:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    return list(layer_counts_by(balance, model, decoder_plan(model), ranks))


def load_whole(model_dir: str | Path, dtype: Any = "auto") -> Any:
    """The whole decoder for inference, on the CPU, by default in the dtype that it is stored in.

    No bar is shown for loading, from now on.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, local_files_only=True)
    return model.eval().requires_grad_(False)


class Vocabulary(NamedTuple):
    encode: Callable[[str], list[int]]
    """Raises `ValueError` that says what to write instead."""
    decode: Callable[[Sequence[int]], str]


def vocabulary_of(model_dir: Path, config: Any, *, chat: bool = False) -> Vocabulary:
    """The tokenizer in the folder; without one, comma-separated token ids.

    Args:
        chat: whether a text is what a user says, to be put into the chat template of the tokenizer.

    Raises:
        ValueError: there is no chat template.
    """
    if any((model_dir / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        import transformers

        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        if chat and not tokenizer.chat_template:
            raise ValueError(f"{model_dir}: its tokenizer has no chat template; leave chat out to continue plain text.")

        def encode(text: str) -> list[int]:
            if chat:
                said = [{"role": "user", "content": text}]
                text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
            return list(tokenizer(text, add_special_tokens=not chat)["input_ids"])

        return Vocabulary(encode, lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)))
    if chat:
        raise ValueError(f"{model_dir}: it has no tokenizer, so there is no chat template; leave chat out.")

    def token_ids(text: str) -> list[int]:
        try:
            tokens = [int(part) for part in text.split(",")]
        except ValueError:
            tokens = []
        if not tokens or not all(0 <= token < config.vocab_size for token in tokens):
            raise ValueError(
                f"{model_dir} has no tokenizer, so a prompt must be comma-separated token ids in "
                f"0..{config.vocab_size - 1}, such as 1,15,7; got {text!r}."
            )
        return tokens

    return Vocabulary(token_ids, lambda tokens: ",".join(map(str, tokens)))

"""Text to tokens and back, for the demo's own decoder and for any other local one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import questions

OWN_MODEL_DIR = Path(__file__).parent / "model"


class Vocabulary(NamedTuple):
    encode: Callable[[str], list[int]]
    """Raises `ValueError` that says what to write instead."""
    decode: Callable[[Sequence[int]], str]


def is_own_model(config: Any) -> bool:
    """Whether the decoder was made by the demo's training script."""
    return getattr(config, "demo_alphabet", None) == questions.ALPHABET


def vocabulary_of(model_dir: Path, config: Any) -> Vocabulary:
    """Arithmetic questions for the demo's decoder, else the tokenizer in the folder, else comma-separated token ids."""
    if is_own_model(config):
        return Vocabulary(lambda text: questions.encode_prompt(questions.parse_question(text)), _decode_answer)
    if any((model_dir / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        import transformers

        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        return Vocabulary(
            lambda text: list(tokenizer(text)["input_ids"]),
            lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)),
        )

    def token_ids(text: str) -> list[int]:
        try:
            tokens = [int(part) for part in text.split(",")]
        except ValueError:
            tokens = []
        if not tokens or not all(0 <= token < config.vocab_size for token in tokens):
            raise ValueError(
                f"{model_dir} has no tokenizer, so --prompt must be comma-separated token ids in "
                f"0..{config.vocab_size - 1}, such as 1,15,7; got {text!r}."
            )
        return tokens

    return Vocabulary(token_ids, lambda tokens: ",".join(map(str, tokens)))


def _decode_answer(tokens: Sequence[int]) -> str:
    answer = questions.decode_answer(tokens)
    return questions.decode(tokens) if answer is None else str(answer)

"""Text to tokens and back, for the demo's own decoder and for any other local one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from . import questions

OWN_MODEL_DIR = Path(__file__).parent / "model"


class PromptError(ValueError):
    """A prompt or model folder that cannot be used; the message says what to give instead."""


class Vocabulary(Protocol):
    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class ArithmeticVocabulary:
    """Questions in usual order to the demo's tokens, and answers back."""

    def encode(self, text: str) -> list[int]:
        try:
            return questions.encode_prompt(questions.parse_question(text))
        except ValueError as error:
            raise PromptError(str(error)) from None

    def decode(self, tokens: Sequence[int]) -> str:
        answer = questions.decode_answer(tokens)
        return questions.decode(tokens) if answer is None else str(answer)


class TokenizerVocabulary:
    """The tokenizer that lies in the model's folder."""

    def __init__(self, model_dir: Path) -> None:
        import transformers

        self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model_dir, local_files_only=True)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


class TokenNumbers:
    """Comma-separated token ids, for a folder without a tokenizer."""

    def __init__(self, model_dir: Path, vocabulary_size: int) -> None:
        self._model_dir = model_dir
        self._vocabulary_size = vocabulary_size

    def encode(self, text: str) -> list[int]:
        try:
            tokens = [int(part) for part in text.split(",")]
        except ValueError:
            tokens = []
        if not tokens or not all(0 <= token < self._vocabulary_size for token in tokens):
            raise PromptError(
                f"{self._model_dir} has no tokenizer, so --prompt must be comma-separated token ids in "
                f"0..{self._vocabulary_size - 1}, such as 1,15,7; got {text!r}."
            )
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        return ",".join(map(str, tokens))


def is_own_model(config: Any) -> bool:
    """Whether the decoder was made by the demo's training script."""
    return getattr(config, "demo_alphabet", None) == questions.ALPHABET


def vocabulary_of(model_dir: Path, config: Any) -> Vocabulary:
    if is_own_model(config):
        return ArithmeticVocabulary()
    if any((model_dir / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return TokenizerVocabulary(model_dir)
    return TokenNumbers(model_dir, config.vocab_size)

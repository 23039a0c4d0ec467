"""What the demo asks its own decoder: questions ``a+b`` and ``a-b``, and their tokens.

Tokens of the demo's own decoder are single characters. Numbers are written with the least significant digit first and
padded with zeros to a fixed width, so that a digit of the answer stands at the same distance from the two digits (and
the carry) that it is made of, and a batch of questions needs no padding:

    12-345      ->  ^ 2 1 0 - 5 4 3 =          9 prompt tokens
    -333        ->  - 3 3 3 0 $                6 answer tokens: sign, four digits, end

What people read (``Question.text``, `decode_answer`) is in the usual order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..integrations.model_folder import Vocabulary

OWN_MODEL_DIR = Path(__file__).parent / "model"

BEGIN = "^"
END = "$"
ALPHABET = "0123456789+-=" + BEGIN + END

OPERAND_DIGITS = 3
ANSWER_DIGITS = 4
LARGEST_OPERAND = 10**OPERAND_DIGITS - 1
PROMPT_TOKENS = 1 + OPERAND_DIGITS + 1 + OPERAND_DIGITS + 1
ANSWER_TOKENS = 1 + ANSWER_DIGITS + 1


@dataclass(frozen=True)
class Question:
    """``left operation right`` with operands 0..999 and operation ``+`` or ``-``."""

    left: int
    operation: str
    right: int

    @property
    def text(self) -> str:
        return f"{self.left}{self.operation}{self.right}"

    @property
    def answer(self) -> int:
        return self.left + self.right if self.operation == "+" else self.left - self.right


def parse_question(text: str) -> Question:
    """Reads ``12+34`` or ``5 - 678``. Raises `ValueError` that says what was got and what is expected."""
    match = re.fullmatch(r"\s*(\d{1,3})\s*([+-])\s*(\d{1,3})\s*=?\s*", text)
    if match is None:
        raise ValueError(
            f"the demo's decoder answers a+b and a-b with a and b in 0..{LARGEST_OPERAND}; got {text!r}. "
            "Write for example 12+34, or choose another decoder with --model DIR."
        )
    return Question(int(match[1]), match[2], int(match[3]))


def held_out_questions() -> list[Question]:
    """200 questions. No question in the training has the same two operands, in either order, with either operation."""
    return [parse_question(line) for line in (OWN_MODEL_DIR / "held_out_questions.txt").read_text().splitlines()]


def encode(characters: str) -> list[int]:
    return [ALPHABET.index(character) for character in characters]


def decode(tokens: Sequence[int]) -> str:
    return "".join(ALPHABET[token] for token in tokens)


def encode_prompt(question: Question) -> list[int]:
    """The `PROMPT_TOKENS` tokens that the decoder reads."""
    left, right = (f"{number:0{OPERAND_DIGITS}d}"[::-1] for number in (question.left, question.right))
    return encode(f"{BEGIN}{left}{question.operation}{right}=")


def encode_answer(question: Question) -> list[int]:
    """The `ANSWER_TOKENS` tokens that a right answer consists of."""
    written = f"{question.answer:+0{1 + ANSWER_DIGITS}d}"
    return encode(written[0] + written[:0:-1] + END)


def decode_answer(tokens: Sequence[int]) -> str:
    """The number that generated tokens stand for; their characters if they are no answer of the fixed form."""
    characters = decode(tokens)
    match = re.fullmatch(rf"([+-])(\d{{{ANSWER_DIGITS}}})\$", characters)
    return characters if match is None else str(int(match[1] + match[2][::-1]))


def is_own_model(config: Any) -> bool:
    """Whether the decoder was made by the demo's training script."""
    return getattr(config, "demo_alphabet", None) == ALPHABET


OWN_VOCABULARY = Vocabulary(lambda text: encode_prompt(parse_question(text)), decode_answer)

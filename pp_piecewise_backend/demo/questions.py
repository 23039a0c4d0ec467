"""Questions ``a+b`` and ``a-b``, their tokens, and the split between training and held-out questions.

Tokens are single characters. Numbers are written with the least significant digit first and padded with
zeros to a fixed width, so that a digit of the answer stands at the same distance from the two digits (and the
carry) that it is made of, and a batch of questions needs no padding:

    12-345      ->  ^ 2 1 0 - 5 4 3 =          9 prompt tokens
    -333        ->  - 3 3 3 0 $                6 answer tokens: sign, four digits, end

What people read (``Question.text``, `decode_answer`) is in the usual order.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

BEGIN = "^"
END = "$"
ALPHABET = "0123456789+-=" + BEGIN + END

OPERAND_DIGITS = 3
ANSWER_DIGITS = 4
LARGEST_OPERAND = 10**OPERAND_DIGITS - 1
PROMPT_TOKENS = 1 + OPERAND_DIGITS + 1 + OPERAND_DIGITS + 1
ANSWER_TOKENS = 1 + ANSWER_DIGITS + 1

HELD_OUT_COUNT = 200
HELD_OUT_SEED = 20260


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

    @property
    def operands(self) -> frozenset[int]:
        return frozenset((self.left, self.right))


def parse_question(text: str) -> Question:
    """Reads ``12+34`` or ``5 - 678``. Raises `ValueError` that says what was got and what is expected."""
    match = re.fullmatch(r"\s*(\d{1,3})\s*([+-])\s*(\d{1,3})\s*=?\s*", text)
    if match is None:
        raise ValueError(
            f"the demo's decoder answers a+b and a-b with a and b in 0..{LARGEST_OPERAND}; got {text!r}. "
            "Write for example 12+34, or choose another decoder with --model DIR."
        )
    return Question(int(match[1]), match[2], int(match[3]))


def _reversed_digits(number: int, width: int) -> str:
    return f"{number:0{width}d}"[::-1]


def encode(characters: str) -> list[int]:
    return [ALPHABET.index(character) for character in characters]


def decode(tokens: Sequence[int]) -> str:
    return "".join(ALPHABET[token] for token in tokens)


def encode_prompt(question: Question) -> list[int]:
    """The `PROMPT_TOKENS` tokens that the decoder reads."""
    left = _reversed_digits(question.left, OPERAND_DIGITS)
    right = _reversed_digits(question.right, OPERAND_DIGITS)
    return encode(f"{BEGIN}{left}{question.operation}{right}=")


def encode_answer(question: Question) -> list[int]:
    """The `ANSWER_TOKENS` tokens that a right answer consists of."""
    sign = "-" if question.answer < 0 else "+"
    return encode(sign + _reversed_digits(abs(question.answer), ANSWER_DIGITS) + END)


def decode_answer(tokens: Sequence[int]) -> int | None:
    """The number that generated tokens stand for, or None if they are not an answer of the fixed form."""
    match = re.fullmatch(rf"([+-])(\d{{{ANSWER_DIGITS}}})\$", decode(tokens))
    if match is None:
        return None
    magnitude = int(match[2][::-1])
    return -magnitude if match[1] == "-" else magnitude


def held_out_questions() -> list[Question]:
    """The `HELD_OUT_COUNT` questions no part of which training sees, the same on every machine.

    No training question has the same two operands, in either order and with either operation. Half of the
    questions have operands uniform in 0..999, half have operands of one, two or three digits equally often.
    """
    # Only random() is promised to give the same numbers in every version of Python.
    generator = random.Random(HELD_OUT_SEED)
    seen: set[frozenset[int]] = set()
    questions: list[Question] = []
    while len(questions) < HELD_OUT_COUNT:
        limits = [LARGEST_OPERAND + 1] * 2
        if len(questions) % 2:
            limits = [10 ** (1 + int(generator.random() * OPERAND_DIGITS)) for _ in range(2)]
        left, right = (int(generator.random() * limit) for limit in limits)
        question = Question(left, "+" if generator.random() < 0.5 else "-", right)
        if question.operands not in seen:
            seen.add(question.operands)
            questions.append(question)
    return questions

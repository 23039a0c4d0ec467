"""Trains the demo's decoder from nothing, on one or two CPU cores in a few minutes.

    python tests/models/train_demo.py --out DIR

writes ``config.json`` and ``model.safetensors`` of a small Llama that answers ``a+b`` and ``a-b``. Fresh
random batches, none with the operands of a held-out question; the held-out questions are scored at the end.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from pp_piecewise_backend.demo import questions
from pp_piecewise_backend.demo.questions import Question
from pp_piecewise_backend.demo.verdict import accuracy, generate_eagerly

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def new_decoder(seed: int = 0) -> LlamaForCausalLM:
    """An untrained float32 decoder; the same weights for the same seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    marker: dict[str, Any] = {"demo_alphabet": questions.ALPHABET}
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(questions.ALPHABET),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            bos_token_id=questions.ALPHABET.index(questions.BEGIN),
            eos_token_id=questions.ALPHABET.index(questions.END),
            pad_token_id=None,
            tie_word_embeddings=False,
            **marker,
        )
    )


HELD_OUT_COUNT = 200


def draw_held_out_questions(seed: int = 20260) -> list[Question]:
    """What ``held_out_questions.txt`` has, the same on every machine: no two questions with the same operands.

    Half of the questions have operands uniform in 0..999, half have operands of one, two or three digits equally often.
    """
    # Only random() is promised to give the same numbers in every version of Python.
    generator = random.Random(seed)
    drawn: dict[frozenset[int], Question] = {}
    while len(drawn) < HELD_OUT_COUNT:
        limits = [questions.LARGEST_OPERAND + 1] * 2
        if len(drawn) % 2:
            limits = [10 ** (1 + int(generator.random() * questions.OPERAND_DIGITS)) for _ in range(2)]
        left, right = (int(generator.random() * limit) for limit in limits)
        question = Question(left, "+" if generator.random() < 0.5 else "-", right)
        drawn.setdefault(frozenset((left, right)), question)
    return list(drawn.values())


def held_out_operands() -> torch.Tensor:
    """bool [1000, 1000]: True where training must not use the two operands."""
    forbidden = torch.zeros(questions.LARGEST_OPERAND + 1, questions.LARGEST_OPERAND + 1, dtype=torch.bool)
    for question in questions.held_out_questions():
        forbidden[question.left, question.right] = True
        forbidden[question.right, question.left] = True
    return forbidden


def _draw_operands(count: int, generator: torch.Generator) -> torch.Tensor:
    """int64 [count]: half of them uniform in 0..999, half with one, two or three digits equally often."""
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    digits = torch.randint(1, questions.OPERAND_DIGITS + 1, (count,), generator=generator)
    any_size = torch.rand(count, generator=generator) < 0.5
    limits = torch.where(any_size, questions.OPERAND_DIGITS, digits)
    return (uniform * 10**limits).long()


def training_batch(size: int, forbidden: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """int64 [size, PROMPT_TOKENS + ANSWER_TOKENS]: random questions with their answers, none held out."""
    left = _draw_operands(size, generator)
    right = _draw_operands(size, generator)
    while (again := forbidden[left, right]).any():
        count = int(again.sum())
        left[again] = _draw_operands(count, generator)
        right[again] = _draw_operands(count, generator)
    is_sum = torch.rand(size, generator=generator) < 0.5
    asked = map(Question, left.tolist(), ("+" if add else "-" for add in is_sum.tolist()), right.tolist())
    return torch.tensor([questions.encode_prompt(question) + questions.encode_answer(question) for question in asked])


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth (at most 100 steps), then a cosine down to a hundredth."""
    warm_up = max(1, min(100, steps // 20))
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: LlamaForCausalLM, *, steps: int, batch_size: int, peak_learning_rate: float, seed: int = 0) -> float:
    """Trains in place on answer tokens only; returns the last loss (nats per token)."""
    generator = torch.Generator().manual_seed(seed)
    forbidden = held_out_operands()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    bar = tqdm(range(steps), desc="training", unit="step")
    last_loss = float("nan")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_learning_rate)
        batch = training_batch(batch_size, forbidden, generator)
        logits = model(batch[:, :-1], use_cache=False, logits_to_keep=questions.ANSWER_TOKENS).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, questions.PROMPT_TOKENS :].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        last_loss = loss.item()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{last_loss:.4f}")
    model.eval()
    return last_loss


def held_out_accuracy(model: Any) -> float:
    """The fraction of held-out questions that greedy decoding answers with exactly the right tokens."""
    asked = questions.held_out_questions()
    generated = generate_eagerly(
        model,
        [questions.encode_prompt(question) for question in asked],
        max_new_tokens=questions.ANSWER_TOKENS,
        end_tokens=questions.encode(questions.END),
    )
    return accuracy([questions.encode_answer(question) for question in asked], generated)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for config.json and model.safetensors")
    parser.add_argument("--steps", type=int, default=2500, help="optimizer steps (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="questions per step (default %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default %(default)s)")
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    model = new_decoder(options.seed)
    loss = train(
        model,
        steps=options.steps,
        batch_size=options.batch_size,
        peak_learning_rate=options.learning_rate,
        seed=options.seed,
    )
    model.save_pretrained(options.out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{parameters} parameters, {options.steps} steps in {time.perf_counter() - begin:.0f} s, "
        f"last loss {loss:.5f}, {held_out_accuracy(model):.1%} of {HELD_OUT_COUNT} held-out questions right, "
        f"written to {options.out}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

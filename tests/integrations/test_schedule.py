"""Which tokens run together: each prompt whole and in order, tags that say it to all ranks, and drawn tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st

from pp_piecewise_backend.integrations.generation.job import Job
from pp_piecewise_backend.integrations.generation.sampling import draw
from pp_piecewise_backend.integrations.generation.schedule import (
    MAX_SEQUENCES,
    Action,
    Timetable,
    Turn,
    from_tag,
    to_tag,
    turns,
)

END = 0


def a_job(prompts: Sequence[Sequence[int]], max_new_tokens: int = 4, **others: Any) -> Job:
    ranks = others.pop("ranks", 2)
    sequences, max_tokens = Job.rows(prompts, ranks, others.pop("sequences", 8), others.pop("max_tokens", 100))
    return Job(
        model_dir="dir", ranks=ranks, layer_counts=[1] * ranks, device="cpu", options={}, prompts=prompts,
        max_new_tokens=max_new_tokens, end_tokens=[END], sequences=sequences, max_tokens=max_tokens, **others,
    )  # fmt: skip


def play(job: Job, answers: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[Turn], int]:
    """A job in a pipeline that gives these answers: the new tokens, the turns, and the most that were under way."""
    given = [iter(answer) for answer in answers]
    generated: list[list[int]] = [[] for _ in answers]
    ended: list[int] = []
    queue: list[list[int]] = []
    most, seen = 0, []

    def hear(prompt: int, token: int, is_last: bool) -> None:
        generated[prompt].append(token)
        ended.extend([prompt] if is_last else [])

    for turn in turns(job, lambda: queue.pop(0), hear):
        seen.append(turn)
        if answered := [next(given[run.prompt]) for run in turn.runs if run.is_answered]:
            queue.append(answered)
        most = max(most, len(queue))
    assert not queue and sorted(ended) == list(range(len(answers)))
    return generated, seen, most


def test_a_prompt_alone_runs_whole_and_then_token_by_token() -> None:
    generated, seen, _ = play(a_job([[5, 6, 7]], max_new_tokens=3), [[8, 9, 8]])
    assert generated == [[8, 9, 8]]
    assert [turn.tokens for turn in seen] == [[5, 6, 7], [8], [9]]
    assert [(run.position, run.length) for turn in seen for run in turn.runs] == [(0, 3), (3, 1), (4, 1)]


def test_a_long_prompt_runs_in_parts_while_others_go_on() -> None:
    prompts = [[1] * 2, [2] * 9]
    _, seen, _ = play(a_job(prompts, ranks=1, sequences=2, max_tokens=4, max_new_tokens=2), [[3, END], [3, END]])
    assert max(len(turn.tokens) for turn in seen) <= 4
    parts = [run for turn in seen for run in turn.runs if run.prompt == 1]
    assert [run.is_answered for run in parts] == [False] * (len(parts) - 2) + [True, True]


@hypothesis.given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    answered=st.lists(st.integers(1, 5), min_size=12, max_size=12),
    ranks=st.integers(1, 3),
    sequences=st.integers(1, 5),
    max_tokens=st.integers(1, 20),
)
@hypothesis.settings(max_examples=60)
def test_any_prompts_in_any_micro_batches(
    lengths: list[int], answered: list[int], ranks: int, sequences: int, max_tokens: int
) -> None:
    prompts = [[10 * number + at + 1 for at in range(length)] for number, length in enumerate(lengths)]
    answers = [[*range(1, count), END][:4] for count, _ in zip(answered, prompts, strict=False)]
    job = a_job(prompts, ranks=ranks, sequences=sequences, max_tokens=max_tokens)
    generated, seen, most = play(job, answers)
    assert generated == answers and most <= job.groups
    table = Timetable(job)
    fed: list[list[int]] = [[] for _ in prompts]
    holders: dict[tuple[int, int], int] = {}
    for turn in seen:
        assert 1 <= len(turn.tokens) == sum(run.length for run in turn.runs) <= job.max_tokens
        assert len(turn.tag) <= 24
        # Every other rank knows the same rows from the tag.
        group, actions = from_tag(turn.tag, job.sequences)
        assert table.advance(group, actions) == turn.runs
        tokens = iter(turn.tokens)
        for run in turn.runs:
            assert run.position == len(fed[run.prompt])
            assert run.position + run.length <= job.max_cache_tokens
            if run.position == 0:  # a prompt that has ended leaves its cache to the next one
                before = holders.get((group, run.sequence))
                assert before is None or len(fed[before]) == len(prompts[before]) + len(answers[before]) - 1
                holders[group, run.sequence] = run.prompt
            assert holders[group, run.sequence] == run.prompt
            fed[run.prompt] += itertools.islice(tokens, run.length)
    assert fed == [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]


def test_tags_read_back() -> None:
    actions = [Action(at % 3) for at in range(MAX_SEQUENCES)]
    assert len(to_tag(255, actions)) == 24
    assert from_tag(to_tag(255, actions), MAX_SEQUENCES) == (255, actions)


def test_prompts_are_spread_over_what_is_under_way() -> None:
    assert Job.rows([[1]] * 16, 2, sequences=8, max_tokens=100) == (4, 4)  # four groups of four
    assert Job.rows([[1] * 9] * 16, 2, sequences=3, max_tokens=20) == (3, 20)
    assert Job.rows([[1] * 9], 2, sequences=8, max_tokens=100) == (1, 9)
    assert Job.rows([[1] * 9] * 40, 1, sequences=8, max_tokens=2) == (8, 8)  # each sequence has a row


# Drawn tokens


def drawn(logits: torch.Tensor, keys: Sequence[tuple[int, ...]], **others: Any) -> list[int]:
    return draw(logits, keys, **{"temperature": 1.0, "top_p": 1.0, "seed": 0, **others}).tolist()


def test_what_is_drawn_depends_on_seed_and_key_and_not_on_the_micro_batch() -> None:
    logits = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    keys = [(row, 3) for row in range(40)]
    together = drawn(logits, keys)
    assert together == [drawn(logits[[row]], [keys[row]])[0] for row in range(40)]
    assert together != drawn(logits, keys, seed=1)
    assert together != drawn(logits, [(row, 4) for row in range(40)])


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    probabilities = torch.tensor([0.05, 0.5, 0.15, 0.3])
    logits = probabilities.log().expand(4000, 4)
    keys = [(row, 0) for row in range(4000)]
    for temperature, top_p, expected in [
        (1.0, 1.0, probabilities),
        (1.0, 0.6, torch.tensor([0, 0.5, 0, 0.3]) / 0.8),
        (0.5, 1.0, probabilities**2 / (probabilities**2).sum()),
        (1.0, 1e-9, torch.tensor([0, 1.0, 0, 0])),
    ]:
        counts = torch.bincount(torch.tensor(drawn(logits, keys, temperature=temperature, top_p=top_p)), minlength=4)
        assert torch.allclose(counts / 4000, expected.float(), atol=0.03), (temperature, top_p, counts)
        assert not counts[expected == 0].any()

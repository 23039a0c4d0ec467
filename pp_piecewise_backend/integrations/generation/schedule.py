"""Which tokens of which sequences run together: continuous batching with parts of prompts, the same on all ranks.

Sequences that are under way lie in groups; the sequences of a group share micro-batches and a cache. The first rank
decides what each sequence of a group does next and writes that into the tag of the micro-batch, two bits a sequence.
All ranks know the prompts, so what the rows of a micro-batch are follows from the tags so far: nothing else is sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

from .job import Job

_TAG_BYTES = 24
MAX_SEQUENCES = (_TAG_BYTES - 1) * 4
MAX_GROUPS = 256


class Action(IntEnum):
    """Of one sequence of a group."""

    IDLE = 0
    CONTINUE = 1
    START = 2
    """The next prompt that nobody has started."""


class Run(NamedTuple):
    """Tokens of one sequence that lie side by side in a micro-batch."""

    sequence: int
    """Its number in the group."""
    prompt: int
    position: int
    """Of the first of them."""
    length: int
    is_answered: bool
    """Whether a token is chosen after the last of them; not after a part of a prompt."""


def to_tag(group: int, actions: Sequence[Action]) -> bytes:
    packed = sum(action << (2 * at) for at, action in enumerate(actions))
    return bytes([group]) + packed.to_bytes(-(-len(actions) // 4), "little")


def from_tag(tag: bytes, sequences: int) -> tuple[int, list[Action]]:
    packed = int.from_bytes(tag[1:], "little")
    return tag[0], [Action(packed >> (2 * at) & 3) for at in range(sequences)]


class Timetable:
    """What has run of each sequence, as far as the tags say; every rank has one."""

    def __init__(self, job: Job) -> None:
        self._prompt_tokens = [len(prompt) for prompt in job.prompts]
        self._max_tokens = job.max_tokens
        self._sequences = [[(0, 0)] * job.sequences for _ in range(job.groups)]
        """Prompt and tokens that have run, of each sequence of each group."""
        self._started = 0

    def advance(self, group: int, actions: Sequence[Action]) -> list[Run]:
        """The rows of the next micro-batch: a token of each sequence that is not idle, and room goes to prompts."""
        room = self._max_tokens - sum(action is not Action.IDLE for action in actions)
        runs = []
        for sequence, action in enumerate(actions):
            if action is Action.IDLE:
                continue
            prompt, position = self._sequences[group][sequence]
            if action is Action.START:
                prompt, position = self._started, 0
                self._started += 1
            left = self._prompt_tokens[prompt] - position
            more = max(0, min(left - 1, room))
            room -= more
            runs.append(Run(sequence, prompt, position, 1 + more, is_answered=1 + more >= left))
            self._sequences[group][sequence] = prompt, position + 1 + more
        return runs


class Turn(NamedTuple):
    """One micro-batch."""

    tag: bytes
    runs: list[Run]
    tokens: list[int]


def turns(
    job: Job,
    next_answers: Callable[[], Sequence[int]],
    on_token: Callable[[int, int, bool], object],
) -> Iterator[Turn]:
    """All micro-batches of a job, in order; on the first rank.

    Args:
        next_answers: the tokens that were chosen for the oldest micro-batch that has answers and was not asked for.
        on_token: gets prompt, new token, and whether it is the last one of that prompt.
    """
    timetable = Timetable(job)
    generated: list[list[int]] = [[] for _ in job.prompts]
    actions = [[Action.IDLE] * job.sequences for _ in range(job.groups)]
    waiting = len(job.prompts)
    ready, under_way = deque(range(job.groups)), deque[tuple[int, list[Run]]]()
    while ready or under_way:
        if not ready:
            group, answered = under_way.popleft()
            for run, token in zip(answered, next_answers(), strict=True):
                generated[run.prompt].append(token)
                is_last = token in job.end_tokens or len(generated[run.prompt]) == job.max_new_tokens
                if is_last:
                    actions[group][run.sequence] = Action.IDLE
                on_token(run.prompt, token, is_last)
            ready.append(group)
            continue
        group = ready.popleft()
        for sequence, action in enumerate(actions[group]):
            if action is Action.IDLE and waiting:
                actions[group][sequence] = Action.START
                waiting -= 1
        if not any(actions[group]):
            continue  # nothing is left for this group
        tag = to_tag(group, actions[group])
        runs = timetable.advance(group, actions[group])
        actions[group] = [action and Action.CONTINUE for action in actions[group]]
        if answered := [run for run in runs if run.is_answered]:
            under_way.append((group, answered))
        else:
            ready.append(group)
        yield Turn(tag, runs, [token for run in runs for token in _tokens(job, generated, run)])


def _tokens(job: Job, generated: Sequence[Sequence[int]], run: Run) -> Sequence[int]:
    prompt = job.prompts[run.prompt]
    if run.position < len(prompt):
        return prompt[run.position : run.position + run.length]
    return [generated[run.prompt][run.position - len(prompt)]]

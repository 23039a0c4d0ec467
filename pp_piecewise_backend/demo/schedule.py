"""Which micro-batch the first rank starts next, so that several prompts are in the pipeline at once."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from .job import Job

_LAYOUT = struct.Struct("<III")


class Turn(NamedTuple):
    """What one micro-batch is; every rank reads it from the tag."""

    prompt: int
    slot: int
    """Which of its key-value caches a rank takes. Prompts that are under way at once have different ones."""
    position: int
    """Of the first token of the micro-batch in its sequence; 0 starts a sequence, in an emptied cache."""

    def to_tag(self) -> bytes:
        return _LAYOUT.pack(*self)

    @classmethod
    def from_tag(cls, tag: bytes) -> Turn:
        return cls(*_LAYOUT.unpack(tag))


def turns(
    job: Job,
    slot_count: int,
    generated: list[list[int]],
    next_result: Callable[[], tuple[bytes, int]],
    on_end: Callable[[], object],
) -> Iterator[tuple[Turn, list[int]]]:
    """Greedy decoding of a job's prompts, at most ``slot_count`` of them at once: turns in order, with their tokens.

    Each prompt is one micro-batch of all its tokens, and then one micro-batch for each new token, which the last rank
    chose and ``next_result`` brings back: ``(tag, chosen token)`` of the oldest micro-batch that was not asked for.
    ``generated``, a list per prompt, gets the new tokens, the end token included; ``on_end`` is called when it has all.
    """
    waiting, free_slots = deque(enumerate(job.prompts)), deque(range(slot_count))
    while waiting or len(free_slots) < slot_count:
        if waiting and free_slots:
            prompt, tokens = waiting.popleft()
            yield Turn(prompt, free_slots.popleft(), position=0), tokens
            continue
        tag, token = next_result()
        turn = Turn.from_tag(tag)
        chosen = generated[turn.prompt]
        chosen.append(token)
        if token in job.end_tokens or len(chosen) == job.max_new_tokens:
            free_slots.append(turn.slot)
            on_end()
        else:
            yield turn._replace(position=len(job.prompts[turn.prompt]) + len(chosen) - 1), [token]

"""Which micro-batch the first rank starts next, so that several prompts are in the pipeline at once."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .job import Job

_LAYOUT = struct.Struct("<III")


@dataclass(frozen=True)
class Turn:
    """What one micro-batch is; every rank reads it from the tag."""

    prompt: int
    slot: int
    """Which of its key-value caches a rank takes. Prompts that are under way at once have different ones."""
    position: int
    """Of the first token of the micro-batch in its sequence; 0 starts a sequence, in an emptied cache."""

    def to_tag(self) -> bytes:
        return _LAYOUT.pack(self.prompt, self.slot, self.position)

    @classmethod
    def from_tag(cls, tag: bytes) -> Turn:
        return cls(*_LAYOUT.unpack(tag))


class Schedule:
    """Greedy decoding of a job's prompts, at most ``slot_count`` of them at once.

    Each prompt is one micro-batch of all its tokens, and then one micro-batch for each new token, which the last rank
    chose and ``next_result`` brings back: ``(tag, chosen token)`` of the oldest micro-batch that was not asked for.
    ``generated`` are the new tokens of each prompt, the end token included; ``on_end`` is called when one has all.
    """

    def __init__(
        self,
        job: Job,
        slot_count: int,
        next_result: Callable[[], tuple[bytes, int]],
        on_end: Callable[[], object] = lambda: None,
    ) -> None:
        self.generated: list[list[int]] = [[] for _ in job.prompts]
        self._job = job
        self._free_slots = deque(range(slot_count))
        self._next_result = next_result
        self._on_end = on_end

    def turns(self) -> Iterator[tuple[Turn, list[int]]]:
        """Turns in the order to run them, with their tokens."""
        waiting, under_way = deque(enumerate(self._job.prompts)), 0
        while waiting or under_way:
            if waiting and self._free_slots:
                prompt, tokens = waiting.popleft()
                under_way += 1
                yield Turn(prompt, self._free_slots.popleft(), position=0), tokens
                continue
            tag, token = self._next_result()
            turn = Turn.from_tag(tag)
            chosen = self.generated[turn.prompt]
            chosen.append(token)
            if token in self._job.end_tokens or len(chosen) == self._job.max_new_tokens:
                under_way -= 1
                self._free_slots.append(turn.slot)
                self._on_end()
            else:
                position = len(self._job.prompts[turn.prompt]) + len(chosen) - 1
                yield Turn(turn.prompt, turn.slot, position), [token]

"""What each step of the pipeline benchmark is about: whose tokens, and how long their sequences are by then."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from decoder import Slots
from slot_attention import MAX_PROMPTS, MAX_SEQUENCES, StepBatch, step_batch

KINDS = ("decode", "jumps", "mixed", "prompts")
GROWTH = 64
"""Steps for which sequences grow before they are as long as at first."""
_TAG = struct.Struct("<BBI")


class Call(NamedTuple):
    """One step of one micro-batch in flight; all ranks know from it what is in the step.

    - "decode": each row is the next token of a sequence.
    - "jumps": the same, but at another length in each step.
    - "mixed": half of the rows are a part of a prompt, the others as in "jumps".
    - "prompts": parts of up to `MAX_PROMPTS` prompts.
    """

    tokens: int
    kind: str
    group: int
    """Number of the micro-batch in flight."""
    step: int

    def to_tag(self) -> bytes:
        return _TAG.pack(KINDS.index(self.kind), self.group, self.step)

    @staticmethod
    def from_tag(tokens: int, tag: bytes) -> Call:
        kind, group, step = _TAG.unpack(tag)
        return Call(tokens, KINDS[kind], group, step)


def usual_kind(tokens: int) -> str:
    return "decode" if tokens <= MAX_SEQUENCES else "prompts"


@dataclass(frozen=True)
class Schedule:
    """Batches of all calls, each the same in every process.

    Args:
        max_tokens: rows of the largest call.
        context_tokens: most tokens that a sequence has before the run.
        in_flight: most micro-batches in flight.
    """

    max_tokens: int
    context_tokens: int
    in_flight: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "_known", {})

    @property
    def slots(self) -> Slots:
        largest_short = min(self.max_tokens, MAX_SEQUENCES)
        return Slots(
            self.in_flight, self.context_tokens + max(GROWTH, largest_short), self.max_tokens + self.context_tokens
        )

    def batch(self, call: Call) -> StepBatch:
        known: dict[Call, StepBatch] = self._known  # type: ignore[attr-defined]
        call = call._replace(step=call.step % GROWTH)
        if call not in known:
            known[call] = self._make(call)
        return known[call]

    def _make(self, call: Call) -> StepBatch:
        tokens, kind, group, step = call
        most = self.context_tokens
        of_the_group = np.random.default_rng((KINDS.index(kind), tokens, group))
        of_the_step = np.random.default_rng((KINDS.index(kind), tokens, group, step))
        new = [1] * tokens
        if kind == "decode":
            old = of_the_group.integers(most // 4, most, size=tokens, endpoint=True) + step
        elif kind == "jumps":
            old = of_the_step.integers(0, most, size=tokens, endpoint=True)
        elif kind == "mixed":
            part = max(1, tokens // 2)
            new = [part, *[1] * (tokens - part)]
            old = of_the_step.integers(0, most, size=len(new), endpoint=True)
        else:
            count = int(of_the_step.integers(1, min(MAX_PROMPTS, tokens), endpoint=True))
            cuts = np.sort(of_the_step.choice(np.arange(1, tokens), size=count - 1, replace=False))
            new = np.diff([0, *cuts, tokens]).tolist()
            old = of_the_step.integers(0, most, size=count, endpoint=True) * of_the_step.integers(0, 2, size=count)
        slots = [self.slots.first_row(group, number, kind == "prompts") for number in range(len(new))]
        return step_batch(slots, old.tolist(), new)

"""Why something was not done: one kind of answer, carried whole from where it arises to where a person reads it.

Note [one reason per miss]
Every compute piece that does not replay although graphs are on is counted under exactly one code of ``SENTENCES``. The
codes are for counters and tests; the sentence that goes with one says what happened and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Reason(NamedTuple):
    """Why something was not done, for a program and for a person."""

    code: str
    sentence: str
    """Without a full stop, so that it can stand inside another sentence."""


SENTENCES: Mapping[str, str] = {
    "first-call": "the first call of a bucket runs without its graph; the second one captures it",
    "not-warmed-up": "capture='warmup' captures in warmup() only, and this bucket was not warmed up like that",
    "over-max": "the call has more tokens than max_tokens",
    "padding-off": "padding='never', and no bucket has exactly this many tokens",
    "padding-unsafe": "padded rows could change the real ones, so padded calls run the piece on the real rows",
    "address-moved": "parameters or large tensors lie elsewhere than at capture; what stays is captured again",
    "moved-too-often": "parameters, large tensors or numbers change so often that a capture waits for more calls",
    "scalar-changed": "an integer other than the token count, or an object, differs from the one at capture",
    "scalar-made-in-call": "an integer that the piece takes is made in the middle of the call",
    "float-varies": "the piece takes a Python float that varies, which a graph would freeze",
    "other-dynamic-dimension": "a size other than the token count varies in what the piece takes or gives",
    "no-token-count": "no input tells the number of tokens",
    "random": "the piece draws random numbers, which a graph would freeze or draw otherwise than eager",
    "writes-state": "the piece writes a tensor that outlives the call",
    "mixed-devices": "the piece takes or gives tensors of more than one device, or of another than the graphs'",
    "guard": "the compiled code does not hold for the size of the bucket",
    "capture-failed": "the piece could not be captured",
    "no-tensor": "the piece takes or gives something that is no tensor",
    "graph-memory": "graph_memory_bytes leaves no room for this bucket",
    "not-faster": "keep='if_faster', and the warm-up found that a replay of this bucket saves no time",
    "verify-failed": "a replay differed from its piece, so this bucket is no longer replayed",
    "concurrent-call": "another call is using the static memory of this stage",
    "rows-disagree": "an input has other sizes or another dtype than the token count and the capture say",
    "unexpected-tensor": "an eager step gave a tensor of another size or dtype than traced",
    "inputs-overlap": "inputs that the graph writes, or landing memory of another input, share memory with an input",
}
"""Code of a miss -> what is said of it where nothing more specific is known."""


def miss(code: str, detail: str = "") -> Reason:
    """Why a compute piece does not replay.

    Args:
        code: one of ``SENTENCES``.
        detail: what is known of this very case; by default what can be said of all of them.
    """
    sentence = SENTENCES[code]
    return Reason(code, detail or sentence)


class Missed(Exception):
    """What was to replay or to be captured is not.

    Args:
        reason: why not.
        by_step: compute steps that have a reason of their own.
    """

    def __init__(self, reason: Reason, by_step: Mapping[int, Reason] | None = None) -> None:
        super().__init__(reason.sentence)
        self.reason = reason
        self.by_step = by_step or {}

"""The control header that goes ahead of each micro-batch: 64 bytes, the same for every link.

===== ===== ======================================================================
bytes type  meaning
===== ===== ======================================================================
0     4s    magic, with the version of this layout
4     B     kind
5     B     length of the tag
6     H     what the last stage answers; 0 where no data follows
8     Q     fingerprint of the plan
16    Q     sequence number: micro-batches of this link announced before it
24    I     tokens; 0 where no data follows
28    I     bucket in tokens; 0 where no data follows
32    I     rank: who announces, or whose failure is reported
36    24s   tag of the user, or why the rank failed; zeros after its end
60    I     CRC-32 of the 60 bytes before
===== ===== ======================================================================

Numbers are little-endian.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from .. import errors
from .plan import Plan
from .transports.base import MESSAGE_BYTES

MAGIC = b"PPH1"
MAX_TAG_BYTES = 24

_LAYOUT = struct.Struct("<4sBBHQQIII24s")
_CHECKSUM = struct.Struct("<I")


@dataclass(frozen=True)
class MicroBatch:
    """What the first stage is to run next.

    Args:
        num_tokens: rows of the proxies, 1 to ``max_tokens``.
        tag: at most 24 bytes of the user's; every stage gets it with this micro-batch.
        inputs: replaces ``make_inputs`` on the first stage.
        feedback: whether the last stage sends feedback for it, where the pipeline has feedback. False, as for all but
            the last chunk of a long prompt: ``StageRunner.feedback`` passes it over.
    """

    num_tokens: int
    tag: bytes = b""
    inputs: Mapping[str, Any] | None = None
    feedback: bool = True

    def __post_init__(self) -> None:
        fits = (
            isinstance(self.num_tokens, int) and not isinstance(self.num_tokens, bool) and self.num_tokens >= 1,
            isinstance(self.tag, bytes) and len(self.tag) <= MAX_TAG_BYTES,
            self.inputs is None or isinstance(self.inputs, Mapping),
            isinstance(self.feedback, bool),
        )
        if not all(fits):
            name, expected = _EXPECTED[fits.index(False)]
            raise errors.ConfigError(errors.micro_batch_argument(name, getattr(self, name), expected))


_EXPECTED = (
    ("num_tokens", "a whole number of at least 1"),
    ("tag", f"at most {MAX_TAG_BYTES} bytes"),
    ("inputs", "None, or a dict of arguments by name"),
    ("feedback", "True or False"),
)
"""Of each argument of a micro-batch."""


class Kind(IntEnum):
    """What a header announces."""

    DATA = 1
    """The tensors of one micro-batch follow."""
    KEEP_ALIVE = 2
    """Nothing, but the rank lives; where it is, as in ``POSITION``."""
    STOP = 3
    """No micro-batch follows; from the receiving end: please send no more."""
    FAILED = 4
    """The pipeline is broken: ``rank`` failed, ``tag`` says how, ``num_tokens`` is 1 + its micro-batch, if known.

    ``sequence`` is the longest step that it may take, in microseconds, where it took longer; else 0."""
    CLOSED = 5
    """After STOP of both ends: the rank closes."""
    NOTICE = 6
    """The last stage has ended a micro-batch of which no tensors follow."""
    TIMES = 7
    """Of a stage whose run has ended: ``bucket_tokens`` is the stage, ``num_tokens`` its micro-batches."""
    POSITION = 8
    """Where rank ``bucket_tokens`` is: ``tag`` says it, ``num_tokens`` is 1 + its micro-batch, if it has one."""


_KINDS: dict[int, Kind] = {kind.value: kind for kind in Kind}


class Answer(IntEnum):
    """What the last stage sends to the first one when it has ended a micro-batch."""

    FEEDBACK = 0
    """Its tensors, if the pipeline has any."""
    NOTICE = 1
    """That it has ended, for a first stage that counts what is in flight."""
    NOTHING = 2


_ANSWERS: dict[int, Answer] = {answer.value: answer for answer in Answer}


@dataclass(slots=True)  # frozen ones take several times as long to make
class Header:
    """One control message.

    Raises:
        ValueError: the tag is longer than 24 bytes.
    """

    kind: Kind
    fingerprint: int
    sequence: int
    rank: int
    num_tokens: int = 0
    bucket_tokens: int = 0
    tag: bytes = b""
    answer: Answer = Answer.FEEDBACK

    def __post_init__(self) -> None:
        if len(self.tag) > MAX_TAG_BYTES:
            raise ValueError(errors.tag_too_long(self.tag, MAX_TAG_BYTES))

    def pack(self) -> bytes:
        numbers = self.fingerprint, self.sequence, self.num_tokens, self.bucket_tokens, self.rank
        body = _LAYOUT.pack(MAGIC, self.kind, len(self.tag), self.answer, *numbers, self.tag)
        return body + _CHECKSUM.pack(zlib.crc32(body))

    @classmethod
    def unpack(cls, message: bytes) -> Header:
        """The header in a message.

        Raises:
            ValueError: it is none, with what was got and expected.
        """
        if len(message) != MESSAGE_BYTES:
            raise _differs("length in bytes", len(message), MESSAGE_BYTES)
        body, (got_checksum,) = message[: _LAYOUT.size], _CHECKSUM.unpack_from(message, _LAYOUT.size)
        magic, kind, tag_bytes, answer, fingerprint, sequence, num_tokens, bucket_tokens, rank, tag = _LAYOUT.unpack(
            body
        )
        if magic != MAGIC:
            raise _differs("magic", magic, MAGIC)
        if got_checksum != (checksum := zlib.crc32(body)):
            raise _differs("checksum", got_checksum, checksum, "08x")
        if kind not in _KINDS:
            raise _differs("kind", kind, "one of " + ", ".join(str(k.value) for k in Kind))
        if tag_bytes > MAX_TAG_BYTES:
            raise _differs("length of the tag", tag_bytes, f"at most {MAX_TAG_BYTES}")
        if answer not in _ANSWERS:
            raise _differs("answer", answer, "one of " + ", ".join(str(a.value) for a in Answer))
        numbers = fingerprint, sequence, rank, num_tokens, bucket_tokens
        return cls(_KINDS[kind], *numbers, tag[:tag_bytes], _ANSWERS[answer])

    def check(self, plan: Plan, sequence: int, rank: int) -> None:
        """Compare with what the plan and the order of the link ask for.

        Raises:
            ValueError: with the first difference, what was got and expected.
        """
        if self.fingerprint != plan.fingerprint:
            raise _differs("plan", self.fingerprint, plan.fingerprint, "016x")
        if self.kind is Kind.FAILED:
            return  # its rank is another's, and the order is broken anyway
        if self.rank != rank:
            raise _differs("rank", self.rank, rank)
        if self.sequence != sequence:
            raise _differs("sequence number", self.sequence, sequence)
        if self.kind is not Kind.DATA:
            return
        bucket_tokens = plan.ladder.bucket(self.num_tokens)
        if bucket_tokens is None:
            raise _differs("number of tokens", self.num_tokens, f"1 to {plan.ladder.max_tokens}")
        if self.bucket_tokens != bucket_tokens:
            raise _differs(f"bucket of {self.num_tokens} tokens", self.bucket_tokens, bucket_tokens)


def _differs(what: str, got: int | bytes, expected: int | bytes | str, spelling: str = "") -> ValueError:
    shown = expected if isinstance(expected, str) else format(expected, spelling)
    return ValueError(errors.header_differs(what, format(got, spelling), shown))

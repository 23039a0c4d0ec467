"""Names and times of steps: for profilers, and for a trace that Perfetto and ``chrome://tracing`` show.

Profilers see ``ppb.piece[3]`` and ``ppb.eager[attention]``. A program asks ``profiler_is_running()`` once per call, and
only then runs steps that ``wrap`` has wrapped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ..compilation.split import Piece
from ..utils import torch_compat

Result = TypeVar("Result")


_ATTENTION = ("attention", "attn", "sdpa", "mla", "fmha")


def step_name(piece: Piece) -> str:
    """The name under which a profiler shows a step; it does not depend on the layer for eager steps."""
    if piece.kind == "compute":
        return f"ppb.piece[{piece.index}]"
    return f"ppb.eager[{eager_label(piece.ops)}]"


def eager_label(ops: Sequence[str]) -> str:
    """A short name for an eager step with these ops: "attention", else its last op."""
    names = [name.replace("::", ".").split(".")[-1] for name in ops]
    if any(word in name.lower() for name in names for word in _ATTENTION):
        return "attention"
    return names[-1] if names else "results"


profiler_is_running = torch_compat.profiler_is_enabled
"""Whether someone would see the names: ``torch.profiler``, the autograd profiler or ``emit_nvtx``."""


class Span(NamedTuple):
    """Something that took its time, by the clock of the host: on a GPU, a replay is no more than its launch."""

    lane: str
    name: str
    begin_ns: int
    """Nanoseconds since the epoch, so that ranks of one machine share a clock."""
    end_ns: int
    micro_batch: int | None


class Timeline:
    """The spans of one rank; threads may add to it at the same time."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.micro_batch: int | None = None
        """The one whose steps run now."""

    def add(self, lane: str, name: str, begin_ns: int, micro_batch: int | None = None) -> None:
        """A span that ends now."""
        micro_batch = self.micro_batch if micro_batch is None else micro_batch
        self.spans.append(Span(lane, name, begin_ns, time.time_ns(), micro_batch))

    @contextmanager
    def span(self, lane: str, name: str) -> Iterator[None]:
        begin_ns = time.time_ns()
        try:
            yield
        finally:
            self.add(lane, name, begin_ns)

    def to_text(self) -> str:
        return json.dumps(self.spans)

    @staticmethod
    def spans_of(text: str) -> list[Span]:
        return [Span(*fields) for fields in json.loads(text)]


def wrap(call: Callable[..., Result], name: str, timeline: Timeline | None = None) -> Callable[..., Result]:
    """The same callable, shown under a name by a profiler, and noted as a step in the timeline if there is one."""

    def run(*args: object) -> Result:
        noted = nullcontext() if timeline is None else timeline.span("steps", name)
        with torch.profiler.record_function(name), noted:
            return call(*args)

    return run


LANES = ("steps", "receive", "send", "feedback")


def write_trace(path: Path, own: Timeline, rank: int, exchange: Callable[[str], Sequence[str]] | None) -> None:
    """One Chrome trace of all ranks, which the first one writes.

    Args:
        rank: this one; its number is in the name of its own file, if each writes one.
        exchange: the texts of all ranks, in their order, for the one of this rank; None: each rank writes its own.
    """
    texts = [own.to_text()] if exchange is None else exchange(own.to_text())
    if exchange is None:
        path = path.with_suffix(f".rank{rank}{path.suffix}")
    if exchange is None or rank == 0:
        path.write_text(json.dumps(chrome_trace([Timeline.spans_of(text) for text in texts])))


def chrome_trace(spans_by_rank: Sequence[Sequence[Span]]) -> dict[str, Any]:
    """The trace event format: one process per rank, one thread for its steps and one per direction of transfers.

    Source: "Trace Event Format", the JSON object form; times are in microseconds.
    """
    begin_ns = min((span.begin_ns for spans in spans_by_rank for span in spans), default=0)
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(spans_by_rank):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        events += [
            {"ph": "M", "name": "thread_name", "pid": rank, "tid": tid, "args": {"name": lane}}
            for tid, lane in enumerate(LANES)
        ]
        events += [
            {
                "ph": "X",
                "name": span.name,
                "cat": span.lane,
                "pid": rank,
                "tid": LANES.index(span.lane),
                "ts": (span.begin_ns - begin_ns) / 1000,
                "dur": (span.end_ns - span.begin_ns) / 1000,
                "args": {} if span.micro_batch is None else {"micro_batch": span.micro_batch},
            }
            for span in sorted(spans, key=lambda span: span.begin_ns)
        ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}

"""Who was busy when: a line per rank, from the trace of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = 84
SHOWN_MICRO_BATCHES = 12


def busy_lines(trace: Mapping[str, Any], columns: int = COLUMNS, shown: int = SHOWN_MICRO_BATCHES) -> list[str]:
    """One line per rank: the last digit of the micro-batch that it works on, a space where it waits.

    Of a long run, ``shown`` micro-batches from its middle; the first line says what is seen. Empty without steps.

    Args:
        trace: as `StageRunner.trace` writes it.
    """
    steps = [event for event in trace["traceEvents"] if event["ph"] == "X" and _is_work(event)]
    numbers = sorted({event["args"]["micro_batch"] for event in steps})
    if not numbers:
        return []
    first = numbers[max(0, (len(numbers) - shown) // 2)]
    last = numbers[min(len(numbers), max(0, (len(numbers) - shown) // 2) + shown) - 1]
    seen = [event for event in steps if first <= event["args"]["micro_batch"] <= last]
    begin = min(event["ts"] for event in seen)
    end = max(event["ts"] + event["dur"] for event in seen)
    width = max(end - begin, 1e-3) / columns
    lines = []
    for rank in sorted({event["pid"] for event in steps}):
        # What else ran in these moments is drawn, too.
        own = [event for event in steps if event["pid"] == rank]
        lines.append(f"  rank {rank} |{_line(own, begin, width, columns)}|")
    which = f"micro-batches {first} to {last} of {len(numbers)}" if len(numbers) > shown else "all micro-batches"
    heading = f"{which}, {(end - begin) / 1000:.1f} ms from left to right; a digit is the end of the number of one"
    return [heading, *lines]


def _is_work(event: Mapping[str, Any]) -> bool:
    """Pieces, eager steps and the choice of tokens, and no waits."""
    name = event["name"]
    return event["cat"] == "steps" and "micro_batch" in event["args"] and (name.startswith("ppb.") or name == "answer")


def _line(events: Sequence[Mapping[str, Any]], begin: float, width: float, columns: int) -> str:
    cells: list[dict[int, float]] = [defaultdict(float) for _ in range(columns)]
    for event in events:
        left, right = event["ts"] - begin, event["ts"] + event["dur"] - begin
        for column in range(max(0, int(left / width)), min(columns - 1, int(right / width)) + 1):
            overlap = min(right, (column + 1) * width) - max(left, column * width)
            if overlap > 0:
                cells[column][event["args"]["micro_batch"]] += overlap
    return "".join(
        str(max(cell, key=cell.__getitem__) % 10) if sum(cell.values()) >= width / 2 else " " for cell in cells
    )

"""What the trace of a pipeline says, for tests of what else says it."""

from __future__ import annotations

import json
from pathlib import Path


def bubbles_in(trace: Path) -> dict[int, float]:
    """Rank -> percent of the time between its first and last step, by the trace, in which it waited for others."""
    spans = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    found = {}
    for rank in {span["pid"] for span in spans}:
        steps = [span for span in spans if span["pid"] == rank and span["cat"] == "steps"]
        forward = [s for s in steps if s["name"].startswith("ppb.") and s["args"]]  # without: in the warm-up
        begin, end = forward[0]["ts"], forward[-1]["ts"] + forward[-1]["dur"]
        waits = [s for s in steps if s["name"].startswith("wait") and begin < s["ts"] and s["ts"] + s["dur"] < end]
        found[rank] = 100 * sum(span["dur"] for span in waits) / (end - begin)
    return found

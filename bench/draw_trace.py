"""Draws a trace that `StageRunner.trace` wrote: one group of lanes per rank, its steps above its transfers.

    python bench/handoff.py --trace bench/results/pipeline_trace.json
    python bench/draw_trace.py bench/results/pipeline_trace.json docs/pipeline_trace.png --from-ms 40 --to-ms 70

Numbers in the boxes are micro-batches; a tick on the lane of steps is where the landing memory was released. Transfers
end where their stage learns of it: a receive when the next step begins, a send before the next results are written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LANES = ("steps", "receive", "send", "feedback")
COLORS = {
    "piece": "#3b6ea5",
    "attention": "#e0a458",
    "receive": "#7fb069",
    "send": "#9a6fb0",
    "feedback": "#9aa5b1",
    "wait": "#dddddd",
    "release": "#c0392b",
}
NUMBERED = ("attention", "receive", "send", "feedback")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--from-ms", type=float, default=0.0, help="start of the window, from the start of the trace")
    parser.add_argument("--to-ms", type=float, help="its end; that of the trace by default")
    options = parser.parse_args(arguments)
    events = json.loads(options.trace.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    ends_ms = max(span["ts"] + span["dur"] for span in spans) / 1000
    draw(spans, options.picture, options.from_ms, ends_ms if options.to_ms is None else options.to_ms)
    print(options.picture)


def kind_of(span: dict[str, Any]) -> str:
    """What the span is drawn as: a key of `COLORS`."""
    name = span["name"]
    if span["cat"] != "steps":
        return str(span["cat"])
    if name == "release":
        return "release"
    if name.startswith("wait"):
        return "wait"
    return "piece" if name.startswith("ppb.piece") else "attention"


def draw(spans: Sequence[dict[str, Any]], path: Path, from_ms: float, to_ms: float) -> None:
    """Write the picture of what happened between two times."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    ranks = sorted({span["pid"] for span in spans})
    used = {
        rank: [lane for lane in LANES if any((s["pid"], s["cat"]) == (rank, lane) for s in spans)] for rank in ranks
    }
    places: dict[tuple[int, str], float] = {}
    bottom = 0.0
    for rank in ranks:
        for lane in used[rank]:
            places[rank, lane] = bottom
            bottom += 1.0
        bottom += 0.6
    figure, axes = pyplot.subplots(figsize=(13, 0.42 * bottom + 1.2))
    for span in sorted(spans, key=lambda span: kind_of(span) != "wait"):
        begin, length = span["ts"] / 1000, span["dur"] / 1000
        if begin + length < from_ms or begin > to_ms:
            continue
        kind, place = kind_of(span), places[span["pid"], span["cat"]]
        if kind == "release":
            axes.plot([begin, begin], [place - 0.5, place + 0.5], color=COLORS[kind], linewidth=2, zorder=4)
            continue
        axes.barh(place, length, left=begin, height=0.8, color=COLORS[kind], zorder=1 if kind == "wait" else 2)
        if kind in NUMBERED and length > (to_ms - from_ms) / 60 and from_ms <= begin + length / 2 <= to_ms:
            label = str(span.get("args", {}).get("micro_batch", ""))
            axes.text(begin + length / 2, place, label, ha="center", va="center", fontsize=7, zorder=5)
    axes.set_yticks(list(places.values()), [f"rank {rank} {lane}" for rank, lane in places], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(from_ms, to_ms)
    axes.set_xlabel("milliseconds")
    present = [kind for kind in COLORS if any(kind_of(span) == kind for span in spans)]
    axes.legend(
        handles=[Patch(color=COLORS[kind], label=kind) for kind in present],
        ncols=len(present),
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        frameon=False,
        fontsize=8,
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main(sys.argv[1:])

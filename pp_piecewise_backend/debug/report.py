"""``report.html``: one page about one program, without scripts, styles or pictures from elsewhere.

What is on it is in ``report.html.j2``, how it looks and behaves in ``report.css`` and ``report.js``; here is what the
template cannot see in a ``Summary`` by itself. Every value is escaped by the template.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from ..runtime.tracing import eager_label
from ..utils.counters import counted
from .summary import PieceEntry, Summary
from .text import fold, folded_inputs, grouped, meaning, plain_runs, ranges, signature

_COLOURS = 6
"""Number of colours by which distinct pieces are told apart, before they come again."""
_NARROWEST_PIXELS, _WIDEST_PIXELS = 92, 280


def report_page(summary: Summary, texts: Mapping[str, str]) -> str:
    """The page. ``texts``: what each distinct piece unfolds to, by file name."""
    pieces = summary.pieces
    has_graphs = summary.graphs.buckets or (summary.graphs.full is not None and summary.graphs.full.buckets)
    working = "captured" if has_graphs else "compiled"
    distinct = list(grouped(pieces, meaning).values())
    return _template().render(
        summary=summary,
        graphs=summary.graphs,
        plain_runs=plain_runs(pieces),
        statuses={
            piece.index: "eager" if piece.kind == "eager" else "broken" if piece.failure or piece.plain_run else working
            for piece in pieces
        },
        proxies=[f"{entry.label} {entry.type}" for entry in summary.inputs if entry.kind == "stage-input"],
        colours={key: index % _COLOURS for index, key in enumerate(summary.distinct_keys)},
        widths_pixels=_widths_pixels(pieces),
        blocks=fold([(*signature(piece), bool(piece.plain_run)) for piece in pieces]),
        results=_results(pieces),
        inputs=folded_inputs(summary.inputs),
        distinct=distinct,
        shown_at={piece.index: alike[0].index for alike in distinct for piece in alike},
        texts={name: _graph_only(text) for name, text in texts.items()},
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"counted": counted, "json": json.dumps, "number": _number, "ranges": ranges}
    environment.filters["eager_label"] = eager_label
    environment.globals["typed"] = _typed
    return environment.get_template("report.html.j2")


def _number(value: object) -> str:
    """Seconds with three digits, all else as JSON."""
    return f"{value:.3f}" if isinstance(value, float) else json.dumps(value)


def _widths_pixels(pieces: Sequence[PieceEntry]) -> dict[int, int]:
    """Index of each compute piece whose time is known -> how wide it is drawn."""
    seconds = {piece.index: piece.step_seconds or 0.0 for piece in pieces}
    scale = (_WIDEST_PIXELS - _NARROWEST_PIXELS) / (max(seconds.values(), default=0.0) or 1.0)
    timed = (piece.index for piece in pieces if piece.kind == "compute" and piece.step_seconds is not None)
    return {index: round(_NARROWEST_PIXELS + scale * seconds[index]) for index in timed}


def _results(pieces: Sequence[PieceEntry]) -> list[str]:
    """Values that leave the steps which give results and that no later step takes, with their types."""
    taken = {name.partition(".")[0] for piece in pieces for name in piece.inputs}
    return [
        _without_stride(f"{name} {kind}")
        for piece in pieces
        if piece.writes_stage_outputs
        for name, kind in zip(piece.outputs, piece.output_types, strict=True)
        if name not in taken
    ]


def _graph_only(text: str) -> str:
    """The part of a piece's script that is the piece: its classes."""
    classes = re.search(r"^class .*?(?=^def make_inputs\()", text, re.DOTALL | re.MULTILINE)
    return (classes[0] if classes else text).strip("\n")


def _typed(names: Sequence[str], types: Sequence[str]) -> str:
    return ", ".join(_without_stride(f"{name}: {kind}") for name, kind in zip(names, types, strict=True))


def _without_stride(text: str) -> str:
    return text.partition(" stride")[0]

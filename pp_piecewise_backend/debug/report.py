"""``report.html``: one page about one program, without scripts, styles or pictures from elsewhere.

What is on it is in ``report.html.j2``, how it looks and behaves in ``report.css`` and ``report.js``; here is what these
show. Every value is escaped by the template.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from ..runtime.tracing import eager_label
from ..utils.counters import counted
from .piece_script import HARNESS_MARK
from .summary import PieceEntry, Summary
from .text import fold, folded_inputs, steps_by_reason, without_numbers

_COLOURS = 6
"""Number of colours by which distinct pieces are told apart, before they come again."""
_NARROWEST_PIXELS, _WIDEST_PIXELS = 92, 280


class _Row(NamedTuple):
    cells: Sequence[object]
    is_marked: bool = False
    kind: bool = False
    """Whether the first cell is the kind of an input."""


class _Box(NamedTuple):
    """A step in the picture of the stage."""

    name: str
    detail: str
    title: str
    look: str
    """Its style classes."""
    shown_at: int
    """Index of the step under which its contents are shown."""
    width_pixels: int
    """0: as wide as its text."""
    marks: Sequence[str]


class _Run(NamedTuple):
    """Steps of the picture; ``period`` of them, ``repeats`` times."""

    steps: Sequence[_Box]
    period: int
    repeats: int
    first: int
    last: int


def report_page(summary: Summary, texts: Mapping[str, str]) -> str:
    """The page. ``texts``: what each distinct piece unfolds to, by file name."""
    graphs = summary.graphs
    matches = [f"{pattern} ({count})" for pattern, count in summary.split_matches.items()]
    values: dict[str, Any] = {
        "summary": summary,
        "graphs": graphs,
        "figures": _figures(summary),
        "plain_runs": _plain_runs(summary.pieces),
        "misses": [
            _Row((miss.reason, miss.sentence, miss.pieces, _or_dash(miss.tokens), _or_dash(miss.call)))
            for miss in graphs.misses
        ],
        "buckets": [_Row((b.tokens, b.pieces, _bytes(b.bytes), f"{b.seconds:.3f}")) for b in graphs.buckets],
        "addresses": [json.dumps(address) for address in graphs.addresses],
        "split_at": ", ".join(matches),
        "statuses": dict.fromkeys(_status(piece, summary) for piece in summary.pieces),
        "proxies": [f"{i.label} {i.type}" for i in summary.inputs if i.kind == "stage-input"],
        "flow": _flow(summary),
        "results": [_without_stride(f"{name} {kind}") for name, kind in _results(summary.pieces)],
        "inputs": [
            _Row((members[0].kind, name, len(members), members[0].type, members[0].reason), kind=True)
            for name, members in folded_inputs(summary.inputs)
        ],
        "distinct": _distinct_steps(summary.pieces, texts),
        "settings": [_Row((o.option, o.value, o.source), is_marked=o.source != "default") for o in summary.config],
        "counters": [_Row((name, json.dumps(value))) for name, value in summary.counters.items() if value],
        "versions": [_Row(version) for version in summary.versions.items()],
        "problems": [_Row((problem,)) for problem in summary.extras.problems],
    }
    return _template().render(values)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["counted"] = counted
    return environment.get_template("report.html.j2")


# ------------------------------------------------------------------------------------------ parts


def _figures(summary: Summary) -> list[tuple[object, str]]:
    compute = [piece for piece in summary.pieces if piece.kind == "compute"]
    counters = summary.counters
    figures: list[tuple[object, str]] = [
        (len(compute), "compute pieces"),
        (len(summary.distinct_keys), "distinct"),
        (len(summary.pieces) - len(compute), "eager steps"),
        (counters.get("calls", 0), "calls"),
        (f"{counters.get('compile_seconds', 0.0):.1f} s", "compiling"),
    ]
    if summary.graphs.mode not in ("none", "off"):
        figures += [
            (counters.get("replays", 0), "replays"),
            (counters.get("graph_misses", 0), "misses"),
            (_bytes(sum(bucket.bytes for bucket in summary.graphs.buckets)), "in graphs"),
        ]
    return figures


def _plain_runs(pieces: Sequence[PieceEntry]) -> dict[str, list[int]]:
    """Why pieces ran as plain FX -> which."""
    failures = steps_by_reason({piece.index: piece.failure for piece in pieces if piece.failure})
    return failures | steps_by_reason({piece.index: piece.plain_run for piece in pieces if piece.plain_run})


def _flow(summary: Summary) -> list[_Run]:
    """The steps in order, those that repeat right after themselves as one."""
    pieces = summary.pieces
    colours = {key: index % _COLOURS for index, key in enumerate(summary.distinct_keys)}
    slowest = max((piece.step_seconds or 0.0 for piece in pieces), default=0.0)
    shown_at: dict[object, int] = {}
    for piece in pieces:
        shown_at.setdefault(_meaning(piece), piece.index)

    def box(piece: PieceEntry) -> _Box:
        marks = []
        if piece.index == summary.landing_free_behind:
            marks.append("release: after this step the next proxies may land")
        if piece.index == summary.results_written_from:
            marks.append("send: this step writes results, so it waits until the last ones have left")
        look = f"compute {_status(piece, summary)} c{colours[piece.key]}" if piece.kind == "compute" else "eager"
        return _box(piece, look, shown_at[_meaning(piece)], slowest, marks)

    return [
        _Run([box(piece) for piece in pieces[start : start + period * repeats]], period, repeats,
             start, start + period * repeats - 1)
        for start, period, repeats in fold([_signature(piece) for piece in pieces])
    ]  # fmt: skip


def _box(piece: PieceEntry, look: str, shown_at: int, slowest: float, marks: Sequence[str]) -> _Box:
    seconds = piece.step_seconds
    time = "" if seconds is None else f", {1e6 * seconds:.0f} us"
    if piece.kind == "eager":
        title = f"piece[{piece.index}] eager: {piece.reason}"
        return _Box(eager_label(piece.ops), f"eager{time}", title, look, shown_at, 0, marks)
    width = 0
    if slowest and seconds is not None:
        width = round(_NARROWEST_PIXELS + (_WIDEST_PIXELS - _NARROWEST_PIXELS) * seconds / slowest)
    ops = counted(len(piece.ops), "op")
    title = f"piece[{piece.index}] compute: {ops}, key {piece.key}, padding {piece.padding}"
    return _Box(f"piece {piece.index}", f"{ops}{time}", title, look, shown_at, width, marks)


def _results(pieces: Sequence[PieceEntry]) -> list[tuple[str, str]]:
    """Values that leave the steps which give results and that no later step takes."""
    taken = {name.partition(".")[0] for piece in pieces for name in piece.inputs}
    return [
        (name, kind)
        for piece in pieces
        if piece.writes_stage_outputs
        for name, kind in zip(piece.outputs, piece.output_types, strict=True)
        if name not in taken
    ]


def _status(piece: PieceEntry, summary: Summary) -> str:
    if piece.kind == "eager":
        return "eager"
    if piece.failure or piece.plain_run:
        return "broken"
    return "captured" if summary.graphs.buckets else "compiled"


def _meaning(piece: PieceEntry) -> tuple[str, str]:
    """Equal for steps that a reader takes for the same; eager ones may differ in numbers, such as the layer's."""
    return piece.kind, piece.key if piece.kind == "compute" else without_numbers(piece.reason)


def _signature(piece: PieceEntry) -> tuple[object, ...]:
    return (*_meaning(piece), tuple(piece.reads_stage_inputs), piece.writes_stage_outputs, bool(piece.plain_run))


def _distinct_steps(pieces: Iterable[PieceEntry], texts: Mapping[str, str]) -> list[dict[str, Any]]:
    alike: dict[object, list[PieceEntry]] = {}
    for piece in pieces:
        alike.setdefault(_meaning(piece), []).append(piece)
    steps = []
    for members in alike.values():
        first = members[0]
        is_compute = first.kind == "compute"
        times = f", {len(members)} times" if len(members) > 1 else ""
        compiled = "" if first.compiled is None else f"{first.compiled} in {first.compile_seconds or 0:.2f} s"
        steps.append(
            {
                "piece": first,
                "name": f"{'piece' if is_compute else eager_label(first.ops)} {first.index}{times}",
                "text": _graph_only(texts.get(first.file, "")),
                "facts": [
                    ("why", first.reason),
                    ("key", first.key if is_compute else ""),
                    ("compiled", compiled),
                    ("failure", first.failure or ""),
                    ("holds for", " and ".join(first.conditions)),
                    ("padding", first.padding if is_compute else ""),
                    ("takes", _typed(first.inputs, first.input_types)),
                    ("gives", _typed(first.outputs, first.output_types)),
                ],
            }
        )
    return steps


def _graph_only(text: str) -> str:
    """The part of a piece's script that is the piece: its classes."""
    script, mark, _ = text.partition(HARNESS_MARK)
    begin, end = script.find("\nclass "), script.find("\ndef make_inputs(")
    return (script[begin:end] if mark and 0 <= begin < end else script).strip("\n")


def _typed(names: Sequence[str], types: Sequence[str]) -> str:
    return ", ".join(_without_stride(f"{name}: {kind}") for name, kind in zip(names, types, strict=True))


def _without_stride(text: str) -> str:
    return text.partition(" stride")[0]


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)

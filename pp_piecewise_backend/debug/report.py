"""``report.html``: one page about one program, without scripts, styles or pictures from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from ..runtime.tracing import eager_label
from .explain import fold, folded_name, without_numbers
from .piece_script import HARNESS_MARK
from .summary import InputEntry, PieceEntry, Summary

_KINDS = ("token-count", "stage-input", "per-token", "state", "scalar", "other-tensor", "parameter")
_COLOURS = 6
"""Number of colours by which distinct pieces are told apart, before they come again."""
_NARROWEST_PIXELS, _WIDEST_PIXELS = 92, 280


def report_page(summary: Summary, texts: Mapping[str, str]) -> str:
    """The page. ``texts``: what each distinct piece unfolds to, by file name."""
    parts = [
        _header(summary),
        _section("Why did this call not replay?", _misses(summary)),
        _section("The stage", _picture(summary), "_stage") if summary.pieces else "",
        _section(f"Inputs ({len(summary.inputs)})", _inputs(summary.inputs)) if summary.inputs else "",
        _section("Distinct steps", _distinct_steps(summary, texts)) if summary.pieces else "",
        _section("Settings", _settings(summary)),
        _section("Counters and versions", _counters(summary)),
    ]
    title = escape(f"{summary.name}, rank {summary.rank}")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head>\n<body><main>\n'
        + "\n".join(part for part in parts if part)
        + f"\n</main><script>{_SCRIPT}</script></body></html>\n"
    )


# ------------------------------------------------------------------------------------------ parts


def _header(summary: Summary) -> str:
    compute = [piece for piece in summary.pieces if piece.kind == "compute"]
    eager = len(summary.pieces) - len(compute)
    facts = [f"rank {summary.rank}", f"torch {summary.versions.get('torch', '?')}", f"written {summary.written_at}"]
    figures = [
        (len(compute), "compute pieces"),
        (len(summary.distinct_keys), "distinct"),
        (eager, "eager steps"),
        (summary.counters.get("calls", 0), "calls"),
        (f"{summary.counters.get('compile_seconds', 0.0):.1f} s", "compiling"),
    ]
    if summary.graphs.mode not in ("none", "off"):
        figures += [
            (summary.counters.get("replays", 0), "replays"),
            (summary.counters.get("graph_misses", 0), "misses"),
            (_bytes(sum(bucket.bytes for bucket in summary.graphs.buckets)), "in graphs"),
        ]
    shown = "".join(f"<div><b>{escape(str(value))}</b><span>{escape(name)}</span></div>" for value, name in figures)
    return (
        f"<header><h1>{escape(summary.name)}</h1><p>{escape(' · '.join(facts))}</p>"
        f'<div class="figures">{shown}</div></header>'
    )


def _section(title: str, body: str, name: str = "") -> str:
    identity = f' id="{name}"' if name else ""
    return f"<section{identity}><h2>{escape(title)}</h2>{body}</section>"


def _misses(summary: Summary) -> str:
    graphs = summary.graphs
    lines = [f'<p class="bad">This graph is not split: {escape(summary.not_split)}</p>'] if summary.not_split else []
    if summary.whole_plain_run:
        lines.append(f'<p class="bad">A call ran the graph as it came: {escape(summary.whole_plain_run)}</p>')
    problems: dict[str, list[int]] = {}
    for piece in summary.pieces:
        for problem in filter(None, (piece.failure, piece.plain_run)):
            problems.setdefault(problem, []).append(piece.index)
    for problem, indices in problems.items():
        which = ", ".join(map(str, indices[:12])) + (", ..." if len(indices) > 12 else "")
        lines.append(f'<p class="bad">piece {which} ran as plain FX: {escape(problem)}</p>')
    if graphs.mode in ("none", "off") and not summary.not_split:
        why = "graphs are off" if graphs.mode == "off" else "the program was not built"
        lines.append(f'<p class="calm">Nothing is replayed: {why}. Every piece runs compiled.</p>')
    elif graphs.misses:
        rows: list[tuple[object, ...]] = [
            (miss.reason, miss.sentence, miss.pieces, _or_dash(miss.tokens), _or_dash(miss.call))
            for miss in graphs.misses
        ]
        lines.append(_table(("reason", "what happened", "pieces", "tokens", "call"), rows))
    elif not summary.not_split:
        lines.append('<p class="good">Every piece of every call replayed.</p>')
    if graphs.buckets:
        rows = [(b.tokens, b.pieces, _bytes(b.bytes), f"{b.seconds:.3f}") for b in graphs.buckets]
        lines.append("<h3>Buckets</h3>" + _table(("tokens", "pieces", "memory", "capture seconds"), rows))
    if graphs.addresses:
        shown = "\n".join(json.dumps(address) for address in graphs.addresses)
        lines.append(
            f"<details><summary>{len(graphs.addresses)} addresses that the graphs rely on</summary>"
            f"<pre>{escape(shown)}</pre></details>"
        )
    return "".join(lines)


def _picture(summary: Summary) -> str:
    pieces = summary.pieces
    matches = ", ".join(f"{pattern} ({count})" for pattern, count in summary.split_matches.items())
    head = [
        f"<b>split at</b> {escape(matches or 'nothing: no op of this graph matches split_ops')}",
        f"<b>tokens</b> {escape(summary.token_reason)}",
    ]
    if summary.attention_like:
        head.append(f"<b>not split at, though named alike</b> {escape(', '.join(summary.attention_like))}")
    lines = "".join(f"<p>{line}</p>" for line in head)
    colours = {key: index % _COLOURS for index, key in enumerate(summary.distinct_keys)}
    slowest = max((piece.step_seconds or 0.0 for piece in pieces), default=0.0)

    shown_at: dict[object, int] = {}
    for piece in pieces:
        shown_at.setdefault(_meaning(piece), piece.index)

    def box(piece: PieceEntry) -> str:
        marks = []
        if piece.index == summary.landing_free_behind:
            marks.append("release: after this step the next proxies may land")
        if piece.index == summary.results_written_from:
            marks.append("send: this step writes results, so it waits until the last ones have left")
        look = f"{_status(piece, summary)} c{colours[piece.key]}" if piece.kind == "compute" else ""
        return _box(piece, look, f"#step-{shown_at[_meaning(piece)]}", slowest, marks)

    proxies = [i for i in summary.inputs if i.kind == "stage-input"]
    flow = [_end("proxies in", [f"{i.label} {i.type}" for i in proxies])] if proxies else []
    for start, period, repeats in fold([_signature(piece) for piece in pieces]):
        block = pieces[start : start + period]
        if repeats == 1:
            flow += [box(piece) for piece in block]
            continue
        every = "".join(box(piece) for piece in pieces[start : start + period * repeats])
        first, last = start, start + period * repeats - 1
        flow.append(
            f'<details class="repeat"><summary title="click to unfold"><span class="count">'
            f'{repeats} &times;<span class="range">{first} to {last}</span></span>'
            f'<span class="block">{"".join(box(piece) for piece in block)}</span></summary>'
            f'<div class="all">{every}</div></details>'
        )
    results = [_without_stride(f"{name} {kind}") for name, kind in _results(pieces)]
    flow.append(_end("results out", results))
    statuses = dict.fromkeys(_status(piece, summary) for piece in pieces)
    legend = "".join(f'<span class="{status}">{status}</span>' for status in statuses)
    legend += "<em>one colour for each distinct piece; click a step to see what is in it</em>"
    return (
        f'{lines}<div class="legend">{legend}<button type="button" id="unfold">unfold all</button></div>'
        f'<div class="flow">{"".join(flow)}</div>'
    )


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


def _box(piece: PieceEntry, look: str, target: str, slowest: float, marks: Sequence[str]) -> str:
    time = "" if piece.step_seconds is None else f", {1e6 * piece.step_seconds:.0f} us"
    notes = "".join(f'<i title="{escape(mark)}">{escape(_short_mark(mark))}</i>' for mark in marks)
    if piece.kind == "eager":
        return (
            f'<a class="box eager" href="{target}" title="{escape(f"piece[{piece.index}] eager: {piece.reason}")}">'
            f"<b>{escape(eager_label(piece.ops))}</b><span>eager{time}</span>{notes}</a>"
        )
    width = ""
    if slowest and piece.step_seconds is not None:
        pixels = _NARROWEST_PIXELS + (_WIDEST_PIXELS - _NARROWEST_PIXELS) * piece.step_seconds / slowest
        width = f' style="width:{pixels:.0f}px"'
    title = f"piece[{piece.index}] compute: {len(piece.ops)} ops, key {piece.key}, padding {piece.padding}"
    return (
        f'<a class="box compute {look}" href="{target}"{width} title="{escape(title)}">'
        f"<b>piece {piece.index}</b><span>{len(piece.ops)} ops{time}</span>{notes}</a>"
    )


def _short_mark(mark: str) -> str:
    return mark.partition(":")[0]


def _end(title: str, lines: Sequence[str]) -> str:
    body = "".join(f"<span>{escape(line)}</span>" for line in lines[:4])
    more = f"<span>and {len(lines) - 4} more</span>" if len(lines) > 4 else ""
    return f'<div class="end"><b>{title}</b>{body}{more}</div>'


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


def _inputs(inputs: Sequence[InputEntry]) -> str:
    groups: dict[tuple[str, ...], list[InputEntry]] = {}
    for entry in sorted(inputs, key=lambda i: _KINDS.index(i.kind) if i.kind in _KINDS else len(_KINDS)):
        name = re.sub(r"\d+", "#", entry.source or entry.name)
        groups.setdefault((entry.kind, entry.reason, name, re.sub(r"\bs\d+", "s#", entry.type)), []).append(entry)
    rows = []
    for members in groups.values():
        first = members[0]
        name = folded_name([member.source or member.name for member in members])
        rows.append((f"{first.kind}", name, len(members), first.type, first.reason))
    return _table(("kind", "input", "count", "type", "how it is known"), rows, kinds=True)


def _distinct_steps(summary: Summary, texts: Mapping[str, str]) -> str:
    alike: dict[object, list[PieceEntry]] = {}
    for piece in summary.pieces:
        alike.setdefault(_meaning(piece), []).append(piece)
    parts = []
    for pieces in alike.values():
        first = pieces[0]
        file = first.file
        times = f", {len(pieces)} times" if len(pieces) > 1 else ""
        what = (
            f"piece {first.index}{times}"
            if first.kind == "compute"
            else f"{eager_label(first.ops)} {first.index}{times}"
        )
        compiled = ""
        if first.compiled is not None:
            compiled = f"{first.compiled} in {first.compile_seconds or 0:.2f} s"
        facts = [
            ("why", first.reason),
            ("key", first.key if first.kind == "compute" else ""),
            ("compiled", compiled),
            ("failure", first.failure or ""),
            ("holds for", " and ".join(first.conditions)),
            ("padding", first.padding if first.kind == "compute" else ""),
            ("takes", _typed(first.inputs, first.input_types)),
            ("gives", _typed(first.outputs, first.output_types)),
        ]
        shown = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts if text)
        text = _graph_only(texts.get(file, ""))
        parts.append(
            f'<details class="step {first.kind}" id="step-{first.index}"><summary><b>{escape(what)}</b> '
            f"<span>{len(first.ops)} ops</span> <code>{escape(file)}</code></summary>"
            f"<dl>{shown}</dl><pre>{escape(text)}</pre></details>"
        )
    return "".join(parts)


def _graph_only(text: str) -> str:
    """The part of a piece's script that is the piece: its classes."""
    script, mark, _ = text.partition(HARNESS_MARK)
    begin, end = script.find("\nclass "), script.find("\ndef make_inputs(")
    return (script[begin:end] if mark and 0 <= begin < end else script).strip("\n")


def _typed(names: Sequence[str], types: Sequence[str]) -> str:
    return ", ".join(_without_stride(f"{name}: {kind}") for name, kind in zip(names, types, strict=True))


def _without_stride(text: str) -> str:
    return text.partition(" stride")[0]


def _settings(summary: Summary) -> str:
    rows = [(o.option, o.value, o.source) for o in summary.config]
    return _table(("option", "value", "source"), rows, mark=[o.source != "default" for o in summary.config])


def _counters(summary: Summary) -> str:
    counted = [(name, json.dumps(value)) for name, value in summary.counters.items() if value]
    problems = [(line,) for line in summary.extras.problems]
    return (
        f'<div class="columns">{_table(("counter", "value"), counted)}'
        f"{_table(('version of', ''), list(summary.versions.items()))}</div>"
        f"{_table(('could not be done',), problems) if problems else ''}"
    )


def _table(
    head: Sequence[str], rows: Iterable[Sequence[object]], mark: Sequence[bool] = (), kinds: bool = False
) -> str:
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    lines = []
    for index, row in enumerate(rows):
        cells = "".join(
            f'<td><span class="kind {escape(str(cell))}">{escape(str(cell))}</span></td>' if kinds and column == 0
            else f"<td>{escape(str(cell))}</td>"
            for column, cell in enumerate(row)
        )  # fmt: skip
        lines.append(f"<tr{' class=marked' if mark and mark[index] else ''}>{cells}</tr>")
    return f'<div class="table"><table><thead><tr>{titles}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


_STYLE = """
:root { --ink: #1f2733; --soft: #66717f; --line: #dfe4ea; --paper: #f6f7f9; --card: #fff;
  --eager: #f3ead7; --eager-line: #d9bf85; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 14px/1.45 system-ui, -apple-system, "Segoe UI",
  Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 20px; }
header { background: #22304a; color: #fff; border-radius: 10px; padding: 18px 22px; margin-bottom: 16px; }
header p { margin: 2px 0 14px; color: #b9c4d8; }
h1 { font-size: 24px; margin: 0; }
h2 { font-size: 16px; margin: 0 0 10px; }
h3 { font-size: 14px; margin: 14px 0 6px; }
.figures { display: flex; gap: 32px; flex-wrap: wrap; }
.figures div { display: flex; flex-direction: column; }
.figures b { font-size: 22px; line-height: 1.1; }
.figures span { color: #b9c4d8; font-size: 12px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 20px;
  margin-bottom: 16px; }
section p { margin: 4px 0; overflow-wrap: anywhere; }
.good, .bad, .calm { padding: 8px 12px; border-radius: 6px; }
.good { background: #e3f4e8; } .bad { background: #fde6e3; } .calm { background: #eef1f5; }
.legend { display: flex; gap: 14px; align-items: center; margin: 10px 0; color: var(--soft); font-size: 12px; }
.legend span::before { content: ""; display: inline-block; width: 12px; height: 12px; border-radius: 3px;
  margin-right: 5px; vertical-align: -1px; border: 1px solid #8fa4c4; background: #dce8f8; }
.legend .eager::before { background: var(--eager); border-color: var(--eager-line); border-radius: 6px; }
.legend .broken::before { background: #fde6e3; border-color: #c8442f; }
.legend .captured::before { border: 2px solid #2f9e5b; }
.legend em { font-style: normal; }
button { margin-left: auto; font: inherit; padding: 4px 12px; border: 1px solid var(--line); border-radius: 6px;
  background: #fff; cursor: pointer; color: var(--ink); }
button:hover { background: var(--paper); }
.flow, .all, .block { display: flex; flex-wrap: wrap; align-items: center; gap: 14px 22px; }
.flow > *, .all > *, .block > * { position: relative; }
.flow > * + *::before, .all > * + *::before, .block > * + *::before { content: "\\2192"; position: absolute;
  left: -19px; top: 50%; transform: translateY(-50%); color: #9aa5b3; font-size: 16px; font-weight: normal; }
.box { display: flex; flex-direction: column; align-items: center; min-width: 92px; padding: 8px 10px;
  border-radius: 8px; border: 1px solid #8fa4c4; text-decoration: none; color: var(--ink); text-align: center; }
.box span, .end span { font-size: 12px; color: var(--soft); }
.box i { font-style: normal; font-size: 11px; margin-top: 3px; padding: 0 6px; border-radius: 8px; background: #22304a;
  color: #fff; }
.box:hover, .box:focus { box-shadow: 0 0 0 2px #22304a55; }
.c0 { background: #dce8f8; } .c1 { background: #dff2ec; } .c2 { background: #e9e2f7; }
.c3 { background: #fbe3ee; } .c4 { background: #e6edd3; } .c5 { background: #d9eef3; }
.captured.compute { border: 2px solid #2f9e5b; }
.box.broken { background: #fde6e3; border-color: #c8442f; }
.box.eager { background: var(--eager); border-color: var(--eager-line); border-radius: 22px; }
.end { display: flex; flex-direction: column; border-left: 3px solid #22304a; padding-left: 10px; max-width: 320px; }
.end span { overflow-wrap: anywhere; }
.repeat { border: 1px dashed #9aa5b3; border-radius: 10px; padding: 10px 12px; background: #fafbfc; }
.repeat[open] { flex-basis: 100%; }
.repeat > summary { list-style: none; cursor: pointer; display: flex; align-items: center; gap: 14px; flex-wrap: wrap; }
.repeat > summary::-webkit-details-marker { display: none; }
.repeat[open] > summary .block { display: none; }
.repeat[open] > summary { margin-bottom: 10px; }
.count { font-size: 18px; font-weight: 600; white-space: nowrap; display: flex; flex-direction: column; }
.range { color: var(--soft); font-size: 12px; font-weight: 400; }
.range::after { content: " \\25B8"; } .repeat[open] .range::after { content: " \\25BE"; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 12px; }
th, td { padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; }
tr.marked td { font-weight: 600; }
.kind { white-space: nowrap; padding: 1px 8px; border-radius: 9px; background: #eef1f5; font-size: 12px; }
.kind.stage-input { background: #22304a; color: #fff; } .kind.state { background: var(--eager); }
.kind.per-token, .kind.token-count { background: #dce8f8; }
.columns { display: grid; grid-template-columns: 1fr 1fr; gap: 28px; align-items: start; }
details.step { border-top: 1px solid var(--line); padding: 6px 0; }
details.step > summary { cursor: pointer; }
details.step span, details.step code { color: var(--soft); font-size: 12px; }
dl { display: grid; grid-template-columns: 90px 1fr; gap: 2px 12px; margin: 10px 0; font-size: 13px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
pre { background: #1d2433; color: #dfe6f3; padding: 14px; border-radius: 8px; overflow: auto; max-height: 480px;
  font: 12px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
@media (max-width: 800px) { .columns { grid-template-columns: 1fr; } }
"""

_SCRIPT = """
const folds = () => document.querySelectorAll("details.repeat");
const button = document.getElementById("unfold");
if (button) {
  if (!folds().length) { button.remove(); }
  button.addEventListener("click", () => {
    const open = ![...folds()].every((fold) => fold.open);
    folds().forEach((fold) => { fold.open = open; });
  });
  const label = () => {
    button.textContent = [...folds()].every((fold) => fold.open) ? "fold all" : "unfold all";
  };
  folds().forEach((fold) => fold.addEventListener("toggle", label));
}
document.querySelectorAll("a.box").forEach((box) => box.addEventListener("click", (event) => {
  const step = document.getElementById(box.getAttribute("href").slice(1));
  event.preventDefault();
  event.stopPropagation();
  if (step) { step.open = true; step.scrollIntoView({ behavior: "smooth" }); }
}));
"""

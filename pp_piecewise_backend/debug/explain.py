"""The report that a person reads: what was split where and why, what each input is, what was not done and why."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..compilation.placeholders import GraphInput, InputKind
from ..compilation.split import Piece
from ..utils.reasons import Reason

if TYPE_CHECKING:
    from ..runtime.dispatch import Misses
    from ..runtime.program import Program

WIDTH = 120
_LONGEST_REPEAT = 12
_LONGEST_REASON = 600
_KIND_ORDER: tuple[InputKind, ...] = (
    "token-count", "stage-input", "per-token", "state", "scalar", "other-tensor", "parameter",
)  # fmt: skip


def explain_program(program: Program) -> str:
    """The report on one program, at most ``WIDTH`` columns wide; repeated layers fold into one line with a count."""
    compute = [piece for piece in program.pieces if piece.kind == "compute"]
    distinct = len({piece.key for piece in compute})
    eager = len(program.pieces) - len(compute)
    stats = program.stats.snapshot()
    lines = [
        *_entry(
            f"{program.name}:",
            f"{len(compute)} compute pieces ({distinct} distinct), {eager} eager steps, {stats.calls} calls",
            indent=2,
        ),
        *_entry("  settings", str(program.config)),
        *_entry("  tokens", program.table.token_reason),
        *_entry("  split at", _matches(program)),
    ]
    lines.append(f"  inputs ({len(program.inputs)})")
    lines += _input_lines(program.inputs)
    lines.append(f"  steps ({len(program.pieces)})")
    lines += _step_lines(program)
    if program.table.unmatched_stage_inputs:
        lines += _entry("  not found", f"stage inputs {', '.join(program.table.unmatched_stage_inputs)}")
    if program.whole_plain_run:
        lines += _entry("  ran as plain FX", f"the whole graph: {program.whole_plain_run}")
    for index, reason in sorted(program.plain_runs.items()):
        lines += _entry("  ran as plain FX", f"piece[{index}]: {reason}")
    failures: dict[str, list[int]] = {}
    for index, compiled in enumerate(program.compiled):
        if compiled is not None and compiled.failure is not None:
            failures.setdefault(compiled.failure, []).append(index)
    for failure, indices in failures.items():
        lines += _entry("  not compiled", f"piece[{_ranges(indices)}]: {_shortened(failure)}")
    lines += _entry(
        "  compiled",
        f"{stats.pieces_compiled} pieces in {stats.compile_seconds:.2f} s, {stats.pieces_reused} served by equal ones",
    )
    lines += _graph_lines(program)
    return "\n".join(lines)


def explain_unsplit(name: str, compiler: str, reason: str) -> str:
    """The report on a graph that went whole to the stock backend ``compiler``."""
    return "\n".join(_entry(f"{name}:", f"not split, given whole to {compiler}: {_shortened(reason)}", indent=2))


def explain_all(reports: Sequence[str], frames_given_up: int, graph_breaks: int) -> str:
    """The reports on all programs of the process, after what Dynamo did that no program can see."""
    lines = [f"{len(reports)} live programs"]
    if frames_given_up:
        lines += _entry(
            "  given up by Dynamo",
            f"{frames_given_up} times a frame hit torch._dynamo.config.recompile_limit; its further kinds of input run "
            f"eagerly and never reach this backend. Raise the limit, or let fewer kinds of input vary.",
        )
    if graph_breaks:
        lines += _entry("  graph breaks", f"{graph_breaks}; see TORCH_LOGS=graph_breaks")
    return "\n\n".join(("\n".join(lines), *reports))


# ------------------------------------------------------------------------------- graphs


def _graph_lines(program: Program) -> list[str]:
    """What is captured, what never can be, and why compute pieces ran without their graphs."""
    graphs = program.graphs
    if graphs is None:
        return _entry("  graphs", f"off: {program.graphs_off_reason}")
    plan = graphs.plan
    static = "" if plan.token_symbol is not None else "; this graph has one size only"
    lines = _entry("  graphs", f"{plan.config.mode}, {plan.kind}; buckets of {plan.ladder} tokens{static}")
    for bucket, _ in graphs.buckets:
        lines += _entry(
            "  captured",
            f"{bucket.tokens} tokens: {len(bucket.graphs)} pieces in {bucket.seconds:.2f} s, "
            f"{bucket.graph_bytes} bytes more",
        )
        lines += _by_reason("    not here", {step: o.sentence for step, o in bucket.obstacles.items()})
    for tokens, obstacle in graphs.dropped.items():
        lines += _entry("  dropped", f"{tokens} tokens ({obstacle.code}): {obstacle.sentence}")
    lines += _by_reason("  never captured", {step: f"{o.code}: {o.sentence}" for step, o in plan.obstacles.items()})
    lines += _by_reason("  padding", {step: graphs.padding_of(step) for step in plan.capturable})
    by_arrival: dict[str, list[str]] = {}
    for register, arrival in plan.arrivals.items():
        if register < len(plan.inputs):
            by_arrival.setdefault(arrival, []).append(plan.inputs[register].label)
    for how, labels in by_arrival.items():
        names = ", ".join(dict.fromkeys(labels)) if how != "parameter" else f"{len(labels)} tensors"
        lines += _entry("  read from", f"{_ARRIVALS[how]}: {_shortened(names)}")
    return lines + _miss_lines(graphs.miss_log)


def _miss_lines(log: Mapping[tuple[Reason, int | None], Misses]) -> list[str]:
    """One line per reason; sentences that differ in numbers only, such as a layer's, share one."""
    alike: dict[tuple[str, str], list[Reason]] = {}
    for reason in dict.fromkeys(reason for reason, _ in log):
        alike.setdefault((reason.code, without_numbers(reason.sentence)), []).append(reason)
    lines = []
    for (code, _), reasons in alike.items():
        found = [(tokens, misses) for (reason, tokens), misses in log.items() if reason in reasons]
        calls: dict[int | None, int] = {}
        for tokens, misses in found:  # one call can miss for several of them
            calls[tokens] = max(misses.calls, calls.get(tokens, 0))
        sizes = _ranges(tokens for tokens in calls if tokens is not None)
        where = f"of {sizes} tokens" if sizes else "without a token count"
        pieces = counted(sum(misses.pieces for _, misses in found), "piece")
        sentence = _shortened(_common_text([reason.sentence for reason in reasons]))
        lines += _entry("  missed", f"{code}: {pieces} in {counted(sum(calls.values()), 'call')} {where}: {sentence}")
    return lines


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


_ARRIVALS = {
    "landing": "landing memory, where the previous stage or the caller puts it",
    "copied": "static memory, copied in each call",
    "parameter": "parameters at their own addresses, checked in each call",
    "address": "large tensors at their own addresses, checked in each call",
    "constant": "constants of the graph",
}


def _by_reason(head: str, reasons: Mapping[int, str]) -> list[str]:
    """One line per reason, with the pieces that it holds for."""
    pieces: dict[str, list[int]] = {}
    for step, reason in reasons.items():
        pieces.setdefault(reason, []).append(step)
    lines = []
    for reason, steps in pieces.items():
        lines += _entry(head, f"piece[{_ranges(steps)}]: {_shortened(reason)}")
    return lines


# ------------------------------------------------------------------------------- inputs


def short_source(source: str) -> str:
    """``L['self']._modules['layers']._modules['0']._parameters['weight']`` as ``self.layers.0.weight``."""
    text = re.sub(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", r".\1", source)
    return re.sub(r"^[LG]\['([^']+)'\]", r"\1", text)


def _input_lines(inputs: Sequence[GraphInput]) -> list[str]:
    groups: dict[tuple[object, ...], list[GraphInput]] = {}
    for graph_input in sorted(inputs, key=lambda i: _KIND_ORDER.index(i.kind)):
        pattern = re.sub(r"\d+", "#", short_source(graph_input.source) or graph_input.name)
        shape = _shape(graph_input)
        groups.setdefault((graph_input.kind, graph_input.reason, pattern, re.sub(r"\bs\d+", "s#", shape)), []).append(
            graph_input
        )
    lines = []
    for members in groups.values():
        first = members[0]
        count = f" x{len(members)}" if len(members) > 1 else ""
        name = folded_name([short_source(m.source) or m.name for m in members])
        lines += _entry(f"    {first.kind}", f"{name}{count} {_shape(first)}: {first.reason}", indent=18)
    return lines


def _shape(graph_input: GraphInput) -> str:
    return str(graph_input.expression) if graph_input.spec is None else str(graph_input.spec)


def folded_name(names: Sequence[str]) -> str:
    """One name for several that differ in their numbers only: ``layers.{0..31}.weight``."""
    columns = zip(*(re.split(r"(\d+)", name) for name in names), strict=True)
    folded = []
    for column in columns:
        values = list(dict.fromkeys(column))
        folded.append(values[0] if len(values) == 1 else f"{{{_ranges([int(value) for value in values])}}}")
    return "".join(folded)


def _ranges(numbers: Iterable[int]) -> str:
    """``0..3, 5, 8..9`` for 0, 1, 2, 3, 5, 8, 9; steps other than 1 as ``0, 2..30``."""
    ordered = sorted(set(numbers))
    runs: list[str] = []
    start = 0
    while start < len(ordered):
        stride = ordered[start + 1] - ordered[start] if start + 1 < len(ordered) else 1
        end = start
        while end + 1 < len(ordered) and ordered[end + 1] - ordered[end] == stride:
            end += 1
        if stride != 1 and end - start < 3:
            end = start
        first = str(ordered[start]) if stride == 1 or end == start else f"{ordered[start]}, {ordered[start + 1]}"
        runs.append(first if end == start else f"{first}..{ordered[end]}")
        start = end + 1
    return ", ".join(runs)


# -------------------------------------------------------------------------------- steps


class _Line(NamedTuple):
    piece: Piece
    signature: tuple[object, ...]
    text: str


def _step_lines(program: Program) -> list[str]:
    steps = [_step(piece) for piece in program.pieces]
    lines = []
    for start, period, repeats in fold([step.signature for step in steps]):
        block = steps[start : start + period]
        if repeats > 1:
            last = start + period * repeats - 1
            lines.append(f"    piece[{start}..{last}]: {repeats} times the same {period} steps:")
        for offset, step in enumerate(block):
            text = _common_text([steps[start + offset + period * repeat].text for repeat in range(repeats)])
            lines += _entry(f"    {'  ' if repeats > 1 else ''}piece[{step.piece.index}]", text, indent=18)
    return lines


def _step(piece: Piece) -> _Line:
    reads = f"; reads {', '.join(piece.reads_stage_inputs)}" if piece.reads_stage_inputs else ""
    writes = "; returns results" if piece.writes_stage_outputs else ""
    if piece.kind == "eager":
        text = f"eager: {piece.reason}{reads}{writes}"
        return _Line(piece, ("eager", without_numbers(text)), text)
    text = f"compute: {_summary(piece.ops)}; key {piece.key}{reads}{writes}"
    return _Line(piece, ("compute", piece.key, reads, writes), text)


def without_numbers(text: str) -> str:
    """What is left of a text when layers and the suffixes of node names no longer count."""
    return re.sub(r"\d+", "#", re.sub(r"_\d+\b", "", text))


def _common_text(texts: Sequence[str]) -> str:
    """One text for several steps that are equal but for numbers."""
    patterns = {re.sub(r"\d+", "#", text) for text in texts}
    return texts[0] if len(set(texts)) == 1 or len(patterns) > 1 else folded_name(texts)


def _summary(ops: Iterable[str]) -> str:
    """The ops of a piece, most frequent kinds only, in the order of their first appearance."""
    names = [name.rpartition(".")[2] for name in ops]
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    shown = sorted(counts, key=lambda name: counts[name], reverse=True)[:5]
    listed = ", ".join(f"{name} x{counts[name]}" if counts[name] > 1 else name for name in counts if name in shown)
    rest = len(names) - sum(counts[name] for name in shown)
    return f"{len(names)} ops ({listed}{f', {rest} more' if rest else ''})"


def fold(signatures: Sequence[tuple[object, ...]]) -> list[tuple[int, int, int]]:
    """Cut a sequence into blocks ``(start, period, repeats)``, folding what repeats right after itself."""
    blocks: list[tuple[int, int, int]] = []
    start = 0
    while start < len(signatures):
        best = (1, 1)
        for period in range(1, min(_LONGEST_REPEAT, (len(signatures) - start) // 2) + 1):
            block = signatures[start : start + period]
            repeats = 1
            while signatures[start + period * repeats : start + period * (repeats + 1)] == block:
                repeats += 1
            if repeats > 1 and period * repeats > best[0] * best[1]:
                best = (period, repeats)
        blocks.append((start, *best))
        start += best[0] * best[1]
    return blocks


def _matches(program: Program) -> str:
    cuts = program.split.cuts
    found = ", ".join(f"{pattern} ({count} ops)" for pattern, count in cuts.matches.items())
    like = f"; not split at, though named alike: {', '.join(cuts.attention_like)}" if cuts.attention_like else ""
    return (found or "nothing: no op of this graph matches split_ops") + like


def _shortened(text: str) -> str:
    return textwrap.shorten(text, _LONGEST_REASON, placeholder=" [...]")


def _entry(head: str, text: str, indent: int = 14) -> list[str]:
    """A line with a heading, wrapped under its text."""
    if len(head) > WIDTH // 2:
        return [*_wrap(head, "", ""), *_wrap(text, " " * indent, " " * indent)]
    return _wrap(text, f"{head} " if len(head) >= indent else head.ljust(indent), " " * indent)


def _wrap(text: str, first: str, rest: str) -> list[str]:
    lines = textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
    return lines or [first.rstrip()]

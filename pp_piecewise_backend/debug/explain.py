"""``explain()``: what was split where and why, what each input is, what was not done and why; as text, from data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from ..utils.counters import counted
from .summary import BucketEntry, FullGraphs, Graphs, MissEntry, PieceEntry, Summary
from .text import common_text, entry, fold, folded_inputs, grouped, ranges, shortened, signature, without_numbers

_ADDRESS = re.compile(r"\b0x[0-9a-f]{6,}\b")


def explain(summary: Summary) -> str:
    """The report on one program, at most ``WIDTH`` columns wide; repeated layers fold into one line with a count."""
    summary = _without_addresses(summary)
    if summary.not_split is not None:
        compiler = next((o.value for o in summary.config if o.option == "compiler"), "the stock backend")
        why = f"not split, given whole to {compiler}: {shortened(summary.not_split)}"
        return "\n".join(entry(f"{summary.name}:", why, indent=2))
    compute = [piece for piece in summary.pieces if piece.kind == "compute"]
    counters = summary.counters
    text = (
        f"{counted(len(compute), 'compute piece')} ({len(summary.distinct_keys)} distinct), "
        f"{counted(len(summary.pieces) - len(compute), 'eager step')}, {counted(counters.get('calls', 0), 'call')}"
    )
    lines = [
        *entry(f"{summary.name}:", text, indent=2),
        *entry("  settings", summary.settings),
        *entry("  tokens", summary.token_reason),
        *entry("  split at", _matches(summary)),
    ]
    if summary.entrance:
        lines += entry("  entered", summary.entrance)
    for link in summary.links:
        lines += entry("  hand-off", link)
    lines.append(f"  inputs ({len(summary.inputs)})")
    for name, members in folded_inputs(summary.inputs):
        first = members[0]
        times = f" x{len(members)}" if len(members) > 1 else ""
        lines += entry(f"    {first.kind}", f"{name}{times} {first.type}: {first.reason}", indent=18)
    lines.append(f"  steps ({len(summary.pieces)})")
    lines += _step_lines(summary.pieces)
    if summary.unmatched_stage_inputs:
        lines += entry("  not found", f"stage inputs {', '.join(summary.unmatched_stage_inputs)}")
    if summary.whole_plain_run is not None:
        lines += entry("  ran as plain FX", f"the whole graph: {summary.whole_plain_run}")
    lines += _by_reason("  ran as plain FX", {piece.index: piece.plain_run for piece in compute})
    lines += _by_reason("  not compiled", {piece.index: piece.failure for piece in compute})
    lines += entry(
        "  compiled",
        f"{counted(counters.get('pieces_compiled', 0), 'piece')} in {counters.get('compile_seconds', 0.0):.2f} s, "
        f"{counters.get('pieces_reused', 0)} served by equal ones",
    )
    if captured := counters.get("foreign_captures", 0):
        why = "captured into graphs of somebody else: its pieces ran without graphs of this package, which is no miss"
        lines += entry("  inside a capture", f"{counted(captured, 'call')} {why}")
    return "\n".join([*lines, *_graph_lines(summary.graphs, compute, counters.get("graph_misses", 0))])


def _without_addresses(summary: Summary) -> Summary:
    """The summary with ``#1``, ``#2``, ... for addresses of objects, which differ from run to run."""
    text = summary.model_dump_json()
    names = {address: f"#{number}" for number, address in enumerate(dict.fromkeys(_ADDRESS.findall(text)), 1)}
    return Summary.model_validate_json(_ADDRESS.sub(lambda found: names[found[0]], text)) if names else summary


def explain_all(reports: Sequence[str], frames_given_up: int, graph_breaks: int) -> str:
    """The reports on all programs of the process, after what Dynamo did that no program can see."""
    lines = [counted(len(reports), "live program")]
    if frames_given_up:
        lines += entry(
            "  given up by Dynamo",
            f"{counted(frames_given_up, 'time')} a frame hit torch._dynamo.config.recompile_limit; its further kinds "
            f"of input run eagerly and never reach this backend. Raise the limit, or let fewer kinds of input vary.",
        )
    if graph_breaks:
        lines += entry("  graph breaks", f"{graph_breaks}; see TORCH_LOGS=graph_breaks")
    return "\n\n".join(("\n".join(lines), *reports))


# ------------------------------------------------------------------------------- graphs


_ARRIVALS = {
    "landing": "landing memory, where the previous stage or the caller puts it",
    "copied": "static memory, copied in each call",
    "parameter": "parameters at their own addresses, checked in each call",
    "address": "large tensors at their own addresses, checked in each call",
}


def _graph_lines(graphs: Graphs, compute: Sequence[PieceEntry], missed: int) -> list[str]:
    """What is captured, what never can be, and why compute pieces ran without their graphs."""
    if graphs.mode in ("off", "none"):
        return entry("  graphs", f"{graphs.mode}: {graphs.reason}".removesuffix(": "))
    only = "; this graph has one size only" if graphs.has_one_size else ""
    lines = entry("  graphs", f"{graphs.mode}; buckets of {graphs.ladder} tokens{only}")
    if graphs.full is not None:
        lines += _full_lines(graphs.full)
    for tokens, buckets in grouped(graphs.buckets, lambda bucket: bucket.tokens).items():
        several = f", {len(buckets)} times: for other parameters, large tensors or numbers" if len(buckets) > 1 else ""
        lines += entry(
            "  captured",
            f"{counted(tokens, 'token')}: {counted(sum(bucket.pieces for bucket in buckets), 'piece')} in "
            f"{sum(bucket.seconds for bucket in buckets):.2f} s, {sum(b.bytes for b in buckets)} bytes more{several}"
            f"{_saving(buckets[0])}",
        )
        lines += _by_reason("    not here", dict(item for bucket in buckets for item in bucket.not_captured.items()))
    if held := [*graphs.buckets, *(graphs.full.buckets if graphs.full is not None else ())]:
        lines += entry("  in all", f"{sum(bucket.bytes for bucket in held)} bytes of graphs")
    for dropped in graphs.dropped:
        lines += entry("  dropped", f"{counted(dropped.tokens, 'token')} ({dropped.reason}): {dropped.sentence}")
    never = {never.piece: f"{never.reason}: {never.sentence}" for never in graphs.never_captured}
    lines += _by_reason("  never captured", never)
    lines += _by_reason("  padding", {piece.index: piece.padding for piece in compute if piece.index not in never})
    for how, addresses in grouped(graphs.addresses, lambda address: address["arrival"]).items():
        if how in _ARRIVALS:
            labels = dict.fromkeys(address["input"] for address in addresses)
            names = ", ".join(labels) if how != "parameter" else counted(len(addresses), "tensor")
            lines += entry("  read from", f"{_ARRIVALS[how]}: {shortened(names)}")
    return lines + _miss_lines(graphs.misses, missed)


def _saving(bucket: BucketEntry) -> str:
    if bucket.replay_us is None or bucket.otherwise_us is None:
        return ""
    return f"; a call takes {bucket.replay_us:.0f} us with it, {bucket.otherwise_us:.0f} us without"


def _full_lines(full: FullGraphs) -> list[str]:
    """Which calls replay everything as one graph, and why others replay the pieces."""
    if full.why_not:
        return entry("  full graphs", f"none, the pieces replay instead: {full.why_not}")
    writes = "the part of each that writes results" if "results_are_written" in full.notices else "each"
    lands = "once its first part has read them" if "mark_landing_read" in full.notices else "at its end"
    lines = entry(
        "  full graphs",
        f"up to {counted(full.max_tokens, 'token')}{full.why and f', since {full.why}'}; {writes} starts once the "
        f"results of the last call have left, and the next proxies may land {lands}",
    )
    lines += entry("    padding", full.padding)
    for tokens, buckets in grouped(full.buckets, lambda bucket: bucket.tokens).items():
        seconds, num_bytes = sum(b.seconds for b in buckets), sum(b.bytes for b in buckets)
        saving = _saving(buckets[0])
        if left := max(b.comparisons_left for b in buckets):
            saving += f"; to be compared with its pieces in {counted(left, 'call')} more that differ from earlier ones"
        lines += entry("    captured", f"{counted(tokens, 'token')}: {seconds:.2f} s, {num_bytes} bytes more{saving}")
        for bucket in buckets:
            for sentence in bucket.not_captured.values():
                lines += entry("    not here", sentence)
    for dropped in full.dropped:
        lines += entry("    dropped", f"{counted(dropped.tokens, 'token')} ({dropped.reason}): {dropped.sentence}")
    for (code, sentence), misses in grouped(full.misses, lambda miss: (miss.reason, miss.sentence)).items():
        sizes = ranges(miss.tokens for miss in misses if miss.tokens is not None)
        calls = counted(sum(miss.calls for miss in misses), "call")
        lines += entry(
            "    pieces instead",
            f"{code}: {calls} of {sizes} {'token' if sizes == '1' else 'tokens'}: {shortened(sentence)}",
        )
    return lines


def _miss_lines(misses: Sequence[MissEntry], missed: int) -> list[str]:
    """One line per reason; sentences that differ in numbers only, such as a layer's, share one."""
    lines = []
    for (code, _), members in grouped(misses, lambda miss: (miss.reason, without_numbers(miss.sentence))).items():
        calls: dict[int | None, int] = {}
        for miss in members:  # one call can miss for several of them
            calls[miss.tokens] = max(miss.calls, calls.get(miss.tokens, 0))
        sizes = ranges(tokens for tokens in calls if tokens is not None)
        where = f"of {sizes} tokens" if sizes else "without a token count"
        times = f"{counted(sum(m.pieces for m in members), 'piece')} in {counted(sum(calls.values()), 'call')}"
        sentence = shortened(common_text(list(dict.fromkeys(miss.sentence for miss in members))))
        lines += entry("  missed", f"{code}: {times} {where}: {sentence}")
    if (earlier := missed - sum(miss.pieces for miss in misses)) > 0:
        lines += entry("  missed", f"{counted(earlier, 'piece')} more, longer ago than the last {len(misses)} kinds")
    return lines


def _by_reason(head: str, reasons: Mapping[int, str | None]) -> list[str]:
    """One line per reason, with the pieces that it holds for; none for pieces without one."""
    lines = []
    for reason, steps in grouped(reasons, lambda step: reasons[step]).items():
        if reason is not None:
            lines += entry(head, f"piece[{ranges(steps)}]: {shortened(reason)}")
    return lines


# -------------------------------------------------------------------------------- steps


def _step_lines(pieces: Sequence[PieceEntry]) -> list[str]:
    lines = []
    for start, period, repeats in fold([signature(piece) for piece in pieces]):
        if repeats > 1:
            last = start + period * repeats - 1
            lines.append(f"    piece[{start}..{last}]: {repeats} times the same {counted(period, 'step')}:")
        for at in range(start, start + period):
            text = common_text([_step_text(piece) for piece in pieces[at : start + period * repeats : period]])
            lines += entry(f"    {'  ' if repeats > 1 else ''}piece[{pieces[at].index}]", text, indent=18)
    return lines


def _step_text(piece: PieceEntry) -> str:
    what = piece.reason if piece.kind == "eager" else f"{_ops(piece.ops)}; key {piece.key}"
    reads = f"; reads {', '.join(piece.reads_stage_inputs)}" if piece.reads_stage_inputs else ""
    return f"{piece.kind}: {what}{reads}{'; returns results' if piece.writes_stage_outputs else ''}"


def _ops(ops: Iterable[str]) -> str:
    """The ops of a piece, most frequent kinds only, in the order of their first appearance."""
    names = [name.rpartition(".")[2] for name in ops]
    counts = Counter(names)
    shown = dict(counts.most_common(5))
    listed = ", ".join(f"{name} x{counts[name]}" if counts[name] > 1 else name for name in counts if name in shown)
    rest = len(names) - sum(shown.values())
    return f"{counted(len(names), 'op')} ({listed}{f', {rest} more' if rest else ''})"


def _matches(summary: Summary) -> str:
    found = ", ".join(f"{pattern} ({counted(count, 'op')})" for pattern, count in summary.split_matches.items())
    alike = summary.attention_like
    like = f"; not split at, though named alike: {', '.join(alike)}" if alike else ""
    return (found or "nothing: no op of this graph matches split_ops") + like

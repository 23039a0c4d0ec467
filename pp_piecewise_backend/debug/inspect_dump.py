"""``python -m pp_piecewise_backend inspect``: a dump on a terminal, or what differs between two.

What is read from a dump is validated as data and printed; nothing in it is unpickled, imported or run.
It needs no torch.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .. import errors
from ..utils.counters import counted
from .explain import explain
from .summary import EVENTS, REPORT, SCHEMA_VERSION, SUMMARY, PieceEntry, Summary

DESCRIPTION = """\
Prints what a dump (dump_dir, PP_PIECEWISE_DUMP_DIR) says: why calls did not replay, where the graph was split and why,
what each input is, what happened when. With two folders: what differs between them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument(
        "folders", type=Path, nargs="*", metavar="DIR", help="a dump_dir, one rank in it, or one program; two: compare"
    )
    parser.add_argument("--call", type=int, metavar="K", help="only misses of the K-th call; the first is 1")
    parser.add_argument("--tokens", type=int, metavar="N", help="only misses of this bucket, or number of tokens")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of summary.json instead")


def run(options: argparse.Namespace) -> int:
    """The exit code: 0, or 2 if there is nothing to read."""
    try:
        for line in _output(options):
            print(printable(line))
    except errors.DumpError as error:
        print(f"inspect: {printable(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads has seen enough
        sys.stderr.close()
    return 0


def _output(options: argparse.Namespace) -> Iterator[str]:
    if options.schema:
        yield json.dumps(Summary.model_json_schema(), indent=2)
    elif len(options.folders) == 1:
        for number, folder in enumerate(find_programs(options.folders[0])):
            yield from [""] * (number > 0)
            yield from program_lines(folder, options.call, options.tokens)
    elif len(options.folders) == 2:
        before, after = (read_programs(folder) for folder in options.folders)
        yield from comparison_lines(before, after)
    else:
        raise errors.DumpError(errors.wrong_number_of_dumps(len(options.folders)))


def printable(text: str) -> str:
    """Without control characters, which a terminal would act upon."""
    return "".join(character if character.isprintable() or character == "\n" else "?" for character in text)


# ------------------------------------------------------------------------------------------ reading


def find_programs(folder: Path) -> list[Path]:
    """The program folders in ``folder``: of every rank its newest run.

    Raises:
        DumpError: there are none.
    """
    if (folder / SUMMARY).is_file():
        return [folder]
    ranks = {}
    for path in sorted(folder.glob("rank_*"), key=_natural):
        ranks[path.name.partition(".")[0]] = path  # rank_0.2 is newer than rank_0
    holders = list(ranks.values()) or [folder]
    found = [path.parent for holder in holders for path in sorted(holder.glob(f"*/{SUMMARY}"), key=_natural)]
    if not found:
        raise errors.DumpError(errors.not_a_dump(folder))
    return found


def read_summary(folder: Path) -> Summary:
    """The summary of one program.

    Raises:
        DumpError: it is not there, or not one that this version can read.
    """
    path = folder / SUMMARY
    try:
        text = path.read_text(encoding="utf-8")
        summary = Summary.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise errors.DumpError(errors.unreadable_dump(path, f"{where}: {first['msg']}".strip(": "))) from None
    except (OSError, UnicodeDecodeError) as error:
        raise errors.DumpError(errors.unreadable_dump(path, str(error))) from None
    if summary.schema_version != SCHEMA_VERSION:
        detail = f"its schema_version is {summary.schema_version}, expected {SCHEMA_VERSION}"
        raise errors.DumpError(errors.unreadable_dump(path, detail))
    return summary


def read_programs(folder: Path) -> dict[str, Summary]:
    """Rank and folder name -> summary, for every program in ``folder``."""
    summaries = ((path, read_summary(path)) for path in find_programs(folder))
    return {f"rank {summary.rank} {path.name}": summary for path, summary in summaries}


def read_events(folder: Path) -> list[dict[str, Any]]:
    """The events so far; a last line that is still being written is left out."""
    events = []
    try:
        lines = (folder / EVENTS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            events.append(event)
    return events


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


# ------------------------------------------------------------------------------------- one program


def program_lines(folder: Path, call: int | None = None, tokens: int | None = None) -> Iterator[str]:
    """What a dump says about one program."""
    summary = read_summary(folder)
    yield f"{summary.name}, rank {summary.rank}, {summary.progress}, written {summary.written_at} ({folder})"
    yield "why did this call not replay?"
    yield from (f"  {line}" for line in misses(summary, call, tokens))
    if summary.graphs.buckets:
        yield "buckets"
        for bucket in summary.graphs.buckets:
            size, pieces = counted(bucket.tokens, "token"), counted(bucket.pieces, "piece")
            yield f"  {size}: {pieces}, {bucket.bytes} bytes, captured in {bucket.seconds:.3f} s"
    yield from explain(summary).splitlines()
    given = [f"{o.option}={o.value} ({o.source})" for o in summary.config if o.source != "default"]
    yield f"settings that were given: {', '.join(given) or 'none'}"
    for problem in summary.extras.problems:
        yield f"could not be done: {problem}"
    yield "what happened"
    yield from (f"  {line}" for line in event_lines(read_events(folder)))
    yield f"look at {folder / REPORT}; run a piece: {_example(summary, folder)}"


def misses(summary: Summary, call: int | None = None, tokens: int | None = None) -> list[str]:
    """Why calls did not replay, one line per reason, bucket and call; ``call`` and ``tokens`` pick some."""
    if summary.not_split is not None:
        return [f"the graph is not split: {summary.not_split}"]
    lines = [
        f"{which} ran as plain FX: {reason}"
        for which, reason in (
            ("the whole graph", summary.whole_plain_run),
            *((f"piece[{piece.index}]", piece.failure or piece.plain_run) for piece in summary.pieces),
        )
        if reason is not None
    ]
    graphs = summary.graphs
    if graphs.mode == "none":
        return [*lines, "no call replays: the program was not built, or its graph was not split"]
    if graphs.mode == "off":
        graphs_option = next((o for o in summary.config if o.option == "graphs"), None)
        how = "" if graphs_option is None else f" (graphs={graphs_option.value}, {graphs_option.source})"
        return [*lines, f"no call replays: graphs are off{how}, every piece runs compiled"]
    wanted = [
        miss
        for miss in graphs.misses
        if (call is None or miss.call == call) and (tokens is None or miss.tokens == tokens)
    ]
    for miss in wanted:
        where = "" if miss.call is None else f"call {miss.call}, "
        size = "" if miss.tokens is None else f"{counted(miss.tokens, 'token')}, "
        lines.append(f"{where}{size}{counted(miss.pieces, 'piece')}: {miss.reason}: {miss.sentence}")
    if not wanted:
        picked = "" if call is None and tokens is None else " that was asked for"
        lines.append(f"every piece of every call{picked} replayed")
    return lines


def event_lines(events: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One line per event, those of one kind that follow each other in one."""
    start = 0
    while start < len(events):
        end = start + 1
        while end < len(events) and events[end]["event"] == events[start]["event"]:
            end += 1
        run, name = events[start:end], events[start]["event"]
        details = {key: value for key, value in run[0].items() if key not in ("event", "at", "seconds")}
        if name in ("compiled", "reused") or len(run) > 1:
            text = f"{len(run)} times" if len(run) > 1 else ""
            if all(isinstance(event.get("piece"), int) for event in run):
                pieces = [str(event["piece"]) for event in run]
                text = f"piece {', '.join(pieces[:8])}{', ...' if len(pieces) > 8 else ''}"
        else:
            text = ", ".join(f"{key} {value}" for key, value in details.items() if value is not None)
        at = run[0].get("at")
        yield f"{at if isinstance(at, str) else '?'}  {name}{f': {text}' if text else ''}"
        start = end


def _example(summary: Summary, folder: Path) -> str:
    file = next((piece.file for piece in summary.pieces if piece.kind == "compute"), None)
    return "none" if file is None else f"python {folder / file}"


# -------------------------------------------------------------------------------------- comparison


def comparison_lines(before: dict[str, Summary], after: dict[str, Summary]) -> Iterator[str]:
    """What differs between the programs of two dumps, matched by rank and name."""
    for name in dict.fromkeys((*before, *after)):
        if name not in after:
            yield f"{name}: only in the first dump"
        elif name not in before:
            yield f"{name}: only in the second dump"
        else:
            lines = list(_differences(before[name], after[name]))
            yield f"{name}: {'no difference' if not lines else ''}".rstrip()
            yield from (f"  {line}" for line in lines)


def _differences(before: Summary, after: Summary) -> Iterator[str]:
    yield from _changed("version of", before.versions, after.versions)
    values = [
        {o.option: f"{o.value} ({o.source})" for o in summary.config if o.option != "dump_dir"}
        for summary in (before, after)
    ]
    yield from _changed("option", *values)
    for what in ("not_split", "token_reason", "split_matches"):
        yield from _changed(what.replace("_", " "), {"": getattr(before, what)}, {"": getattr(after, what)})
    inputs = [{i.source or i.name: f"{i.kind} {i.type}: {i.reason}" for i in s.inputs} for s in (before, after)]
    yield from _folded(_changed("input", *inputs))
    yield from _piece_differences(before.pieces, after.pieces)
    for what in ("graph_misses", "miss_reasons", "captures", "graph_bytes"):
        yield from _changed(f"counter {what}", {"": before.counters.get(what)}, {"": after.counters.get(what)})


def _piece_differences(before: Sequence[PieceEntry], after: Sequence[PieceEntry]) -> Iterator[str]:
    """Pieces gone, added and changed, aligned by meaning; equal changes of many layers come once, with a count."""
    keys = [[f"{piece.kind} {piece.key}" for piece in pieces] for pieces in (before, after)]
    changes: Counter[tuple[str, ...]] = Counter()
    for tag, a, b, c, d in difflib.SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        paired = min(b - a, d - c)
        for old, new in zip(before[a : a + paired], after[c : c + paired], strict=True):
            change = ("changed", *_change(old, new))
            changes[change] += 1
        for piece in before[a + paired : b]:
            changes[("gone", _described(piece))] += 1
        for piece in after[c + paired : d]:
            changes[("added", _described(piece))] += 1
    for (what, *texts), count in changes.items():
        times = f" (and {count - 1} more alike)" if count > 1 else ""
        yield f"piece {what}: {texts[0]}{times}"
        yield from (f"  {text}" for text in texts[1:])


def _change(old: PieceEntry, new: PieceEntry) -> list[str]:
    """How one piece differs from another, without its index so that equal changes are equal."""
    lines = [f"{_described(old)} -> {_described(new)}" if _described(old) != _described(new) else _described(old)]
    if old.reason != new.reason:
        lines.append(f"why: {old.reason!r} -> {new.reason!r}")
    ops = [
        line
        for line in difflib.unified_diff(old.ops, new.ops, lineterm="", n=0)
        if line[0] in "+-" and line[:3] not in ("+++", "---")
    ]
    if ops:
        lines.append(f"ops: {' '.join(ops[:20])}{' ...' if len(ops) > 20 else ''}")
    for what in ("input_types", "output_types"):
        types = Counter(getattr(old, what)), Counter(getattr(new, what))
        gone, added = list((types[0] - types[1]).elements()), list((types[1] - types[0]).elements())
        if gone or added:
            lines.append(f"{what.replace('_', ' ')}: {_listed(gone)} -> {_listed(added)}")
    if len(lines) == 1:
        lines.append(f"same ops and types, other arguments: compare {old.file} of the one with {new.file} of the other")
    return lines


def _described(piece: PieceEntry) -> str:
    return f"{piece.kind}, {len(piece.ops)} ops"


def _listed(items: Sequence[str]) -> str:
    return f"{', '.join(items[:4])}{', ...' if len(items) > 4 else ''}" or "none"


def _changed(what: str, before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys((*before, *after)):
        old, new = before.get(name), after.get(name)
        if old != new:
            text = "gone" if name not in after else "added" if name not in before else f"{old} -> {new}"
            detail = f" ({new if text == 'added' else old})" if text in ("gone", "added") else ""
            yield f"{f'{what} {name}'.rstrip()}: {text}{detail}"


def _folded(lines: Iterable[str]) -> Iterator[str]:
    """Lines that differ in numbers only come once, with a count."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(re.sub(r"\d+", "#", line), []).append(line)
    for members in groups.values():
        yield members[0] + (f" (and {len(members) - 1} more alike)" if len(members) > 1 else "")

"""``python -m pp_piecewise_backend inspect``: a dump on a terminal, or what differs between two.

What is read from a dump is validated as data and printed; nothing in it is unpickled, imported or run.
It needs no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import itertools
import json
import re
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .. import errors
from ..utils.counters import counted
from .explain import explain
from .summary import EVENTS, REPORT, SCHEMA_VERSION, SUMMARY, MissEntry, PieceEntry, Summary
from .text import grouped, pattern, plain_runs, ranges

DESCRIPTION = """\
Prints what a dump (dump_dir, PP_PIECEWISE_DUMP_DIR) says: an overview, then why calls did not replay, where the graph
was split and why, what each input is, what happened when. With --call or --tokens: why those calls did not replay, and
nothing else. With two folders: what differs between them; two programs are compared whatever their names."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument(
        "folders", type=Path, nargs="*", metavar="DIR", help="a dump_dir, one rank in it, or one program; two: compare"
    )
    parser.add_argument("--call", type=_from_1, metavar="K", help="only misses of the K-th call of a program, from 1")
    parser.add_argument("--tokens", type=_from_1, metavar="N", help="only misses of calls of N tokens")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of summary.json instead")


def _from_1(text: str) -> int:
    if not re.fullmatch("0*[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 is expected")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """The exit code: 0, or 2 if there is nothing to read."""
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    try:
        for line in _output(options):
            print(fitted(printable(line), columns))
    except errors.DumpError as error:
        print(f"inspect: {printable(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads has seen enough
        sys.stderr.close()
    return 0


def _output(options: argparse.Namespace) -> Iterator[str]:
    folders, is_picking = options.folders, options.call is not None or options.tokens is not None
    if len(folders) > (0 if options.schema else 1 if is_picking else 2) or (options.schema and is_picking):
        raise errors.DumpError(errors.wrong_number_of_dumps(len(folders)))
    if options.schema:
        yield json.dumps(Summary.model_json_schema(), indent=2)
    elif len(folders) == 1:
        found = {folder: read_summary(folder) for folder in find_programs(folders[0])}
        if is_picking:
            yield from picked_lines(found, options.call, options.tokens)
            return
        yield from overview_lines(list(found.values()))
        for folder, summary in found.items():
            yield ""
            yield from program_lines(folder, summary)
    elif len(folders) == 2:
        before, after = (read_programs(folder) for folder in folders)
        yield from comparison_lines(before, after)
    else:
        raise errors.DumpError(errors.wrong_number_of_dumps(len(folders)))


def fitted(line: str, columns: int | None) -> str:
    """Wrapped where it is wider than the terminal; a path stays whole, to be copied."""
    if columns is None or len(line) <= columns:
        return line
    indent = " " * min(len(line) - len(line.lstrip()) + 4, columns // 2)
    wrapped = textwrap.wrap(line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrapped)


def printable(text: str) -> str:
    """Without control characters, which a terminal would act upon."""
    return "".join(character if character.isprintable() or character == "\n" else "?" for character in text)


# ------------------------------------------------------------------------------------------ reading


def find_programs(folder: Path) -> list[Path]:
    """The program folders in ``folder``: of every rank its newest run.

    Raises:
        DumpError: there are none.
    """
    if folder.name == SUMMARY and folder.is_file():
        folder = folder.parent
    if (folder / SUMMARY).is_file():
        return [folder]
    # rank_0.2 comes after rank_0, and is newer
    ranks = {path.name.partition(".")[0]: path for path in sorted(folder.glob("rank_*"), key=_natural)}
    holders = list(ranks.values()) or [folder]
    found = [path.parent for holder in holders for path in sorted(holder.glob(f"*/{SUMMARY}"), key=_natural)]
    if not found:
        raise errors.DumpError(errors.not_a_dump(folder, folder.exists()))
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
        with contextlib.suppress(ValueError, RecursionError):
            event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                events.append(event)
    return events


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


# ------------------------------------------------------------------------------------- one program


def overview_lines(summaries: Sequence[Summary]) -> Iterator[str]:
    """How many programs, calls and misses there are, and which program has them."""
    ranks = len({summary.rank for summary in summaries})
    calls = sum(summary.counters.get("calls", 0) for summary in summaries)
    missed = sum(summary.counters.get("graph_misses", 0) for summary in summaries)
    counts = f"{counted(len(summaries), 'program')} of {counted(ranks, 'rank')}, {counted(calls, 'call')}"
    yield f"{counts}; {counted(missed, 'time')} a piece missed its graph"
    for summary in summaries:
        compute = sum(piece.kind == "compute" for piece in summary.pieces)
        parts = [
            counted(compute, "piece") + f" ({len(summary.distinct_keys)} distinct)",
            counted(summary.counters.get("calls", 0), "call"),
        ]
        if summary.not_split is not None:
            parts[0] = "not split"
        elif summary.graphs.mode in ("off", "none"):
            parts.append(f"graphs {summary.graphs.mode}")
        else:
            buckets = len({bucket.tokens for bucket in summary.graphs.buckets})
            reasons = summary.counters.get("miss_reasons", {})
            misses = ", ".join(f"{code} {count}" for code, count in reasons.items())
            parts += [f"{counted(buckets, 'bucket')} captured", f"missed: {misses or 'none'}"]
        yield f"  rank {summary.rank} {summary.name}: {', '.join(parts)}"


def program_lines(folder: Path, summary: Summary) -> Iterator[str]:
    """What a dump says about one program."""
    yield _heading(folder, summary)
    yield "why did this call not replay?"
    yield from (f"  {line}" for line in misses(summary))
    yield from explain(summary).splitlines()
    given = [f"{o.option}={o.value} ({o.source})" for o in summary.config if o.source != "default"]
    yield f"settings that were given: {', '.join(given) or 'none'}"
    for problem in summary.extras.problems:
        yield f"could not be done: {problem}"
    yield "what happened"
    yield from (f"  {line}" for line in event_lines(read_events(folder)))
    files = [piece.file for piece in summary.pieces if piece.kind == "compute"]
    yield f"look at {folder / REPORT}; run a piece: {f'python {folder / files[0]}' if files else 'none'}"


def _heading(folder: Path, summary: Summary) -> str:
    return f"{summary.name}, rank {summary.rank}, {summary.progress}, written {summary.written_at} ({folder})"


def picked_lines(found: Mapping[Path, Summary], call: int | None, tokens: int | None) -> Iterator[str]:
    """Why one call, or calls of one size, did not replay, of each program that can have had them.

    Raises:
        DumpError: no program can.
    """
    events = {folder: read_events(folder) for folder in found}
    calls = {folder: _known_calls(summary, events[folder]) for folder, summary in found.items()}
    if call is not None and call > max(calls.values()):
        raise errors.DumpError(errors.no_such_call(call, max(calls.values())))
    for folder, summary in found.items():
        if call is None or call <= calls[folder]:
            yield _heading(folder, summary)
            yield from (f"  {line}" for line in misses(summary, call, tokens, events[folder]))


def _known_calls(summary: Summary, events: Sequence[dict[str, Any]]) -> int:
    """How many calls of the program the dump has seen."""
    missed = [miss.call or 0 for miss in (*summary.graphs.misses, *_missed(events))]
    return max(summary.counters.get("calls", 0), *missed, 0)


def _missed(events: Sequence[dict[str, Any]]) -> list[MissEntry]:
    """The misses among the events, one by one; a summary has only the last one of each kind."""
    found = []
    for event in events:
        if event["event"] == "missed":
            with contextlib.suppress(ValidationError):
                found.append(MissEntry.model_validate({name: event.get(name) for name in _EVENT_FIELDS}))
    return found


_EVENT_FIELDS = ("reason", "sentence", "pieces", "tokens", "call")


def misses(
    summary: Summary, call: int | None = None, tokens: int | None = None, events: Sequence[dict[str, Any]] = ()
) -> list[str]:
    """Why calls did not replay, one line per reason, bucket and call; ``call`` and ``tokens`` pick some."""
    if summary.not_split is not None:
        return [f"the graph is not split: {summary.not_split}"]
    lines = [f"piece[{ranges(steps)}] ran as plain FX: {why}" for why, steps in plain_runs(summary.pieces).items()]
    if summary.whole_plain_run is not None:
        lines.insert(0, f"the whole graph ran as plain FX: {summary.whole_plain_run}")
    graphs = summary.graphs
    if graphs.mode == "none":
        return [*lines, "no call replays: the program was not built, or its graph was not split"]
    if graphs.mode == "off":
        return [*lines, f"no call replays: graphs are off ({graphs.reason}), every piece runs compiled"]
    known = graphs.misses
    if call is not None:
        single = _missed(events)
        kinds = {(miss.call, miss.reason, miss.tokens) for miss in single}
        known = [*single, *(miss for miss in known if (miss.call, miss.reason, miss.tokens) not in kinds)]
    wanted = [
        miss for miss in known if (call is None or miss.call == call) and (tokens is None or miss.tokens == tokens)
    ]
    for miss in wanted:
        where = "" if miss.call is None else f"call {miss.call}, "
        size = "" if miss.tokens is None else f"{counted(miss.tokens, 'token')}, "
        lines.append(f"{where}{size}{counted(miss.pieces, 'piece')}: {miss.reason}: {miss.sentence}")
    if not wanted:
        number = "every call" if call is None else f"call {call}"
        size = "" if tokens is None else f" of {counted(tokens, 'token')}"
        recorded, all_of_them = sum(miss.pieces for miss in known), summary.counters.get("graph_misses", 0)
        if recorded >= all_of_them:
            lines.append(f"every piece of {number}{size} replayed{', if there was any such call' if size else ''}")
        else:
            lines.append(f"no miss of {number}{size} is recorded, but only {recorded} of {all_of_them} misses are")
    return lines


def event_lines(events: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One line per event, those of one kind that follow each other in one."""
    for name, group in itertools.groupby(events, lambda event: event["event"]):
        run = list(group)
        if all(isinstance(event.get("piece"), int) for event in run):
            text = f"piece {', '.join(str(event['piece']) for event in run[:8])}{', ...' if len(run) > 8 else ''}"
        elif len(run) > 1:
            text = f"{len(run)} times"
        else:
            details = {key: value for key, value in run[0].items() if key not in ("event", "at", "seconds")}
            text = ", ".join(f"{key} {value}" for key, value in details.items() if value is not None)
        at = run[0].get("at")
        yield f"{at if isinstance(at, str) else '?'}  {name}{f': {text}' if text else ''}"


# -------------------------------------------------------------------------------------- comparison


def comparison_lines(before: dict[str, Summary], after: dict[str, Summary]) -> Iterator[str]:
    """What differs between the programs of two dumps, matched by rank and name; of one program each, between these."""
    if len(before) == len(after) == 1 and before.keys() != after.keys():
        ((name, old),), ((other, new),) = before.items(), after.items()
        before, after = {f"{name} -> {other}": old}, {f"{name} -> {other}": new}
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
    """Equal changes of many layers come once, with a count."""
    for alike in grouped(_changed(_facts(before), _facts(after)), pattern).values():
        yield _with_count(alike[0], len(alike))
    for (first, *more), count in _piece_changes(before.pieces, after.pieces).items():
        yield _with_count(f"piece {first}", count)
        yield from (f"  {line}" for line in more)


def _with_count(line: str, count: int) -> str:
    return line + (f" (and {count - 1} more alike)" if count > 1 else "")


def _facts(summary: Summary) -> dict[str, object]:
    """What is compared by its name."""
    facts: dict[str, object] = {f"version of {name}": version for name, version in summary.versions.items()}
    facts |= {f"option {o.option}": f"{o.value} ({o.source})" for o in summary.config if o.option != "dump_dir"}
    for what in ("not_split", "token_reason", "split_matches"):
        facts[what.replace("_", " ")] = getattr(summary, what)
    facts |= {f"input {i.source or i.name}": f"{i.kind} {i.type}: {i.reason}" for i in summary.inputs}
    for what in ("graph_misses", "miss_reasons", "captures"):
        facts[f"counter {what}"] = summary.counters.get(what)
    # Not the gauge, which falls when a program dies.
    facts["bytes in graphs"] = sum(bucket.bytes for bucket in summary.graphs.buckets)
    return facts


def _changed(before: Mapping[str, object], after: Mapping[str, object]) -> Iterator[str]:
    for name in dict.fromkeys((*before, *after)):
        if name not in after:
            yield f"{name}: gone ({before[name]})"
        elif name not in before:
            yield f"{name}: added ({after[name]})"
        elif before[name] != after[name]:
            yield f"{name}: {before[name]} -> {after[name]}"


def _piece_changes(before: Sequence[PieceEntry], after: Sequence[PieceEntry]) -> Counter[tuple[str, ...]]:
    """Pieces gone, added and changed, aligned by meaning; how often each change occurs."""
    keys = [[f"{piece.kind} {piece.key}" for piece in pieces] for pieces in (before, after)]
    changes: Counter[tuple[str, ...]] = Counter()
    for tag, a, b, c, d in difflib.SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_opcodes():
        if tag != "equal":
            changes.update(itertools.starmap(_change, itertools.zip_longest(before[a:b], after[c:d])))
    return changes


def _change(old: PieceEntry | None, new: PieceEntry | None) -> tuple[str, ...]:
    """What became of a piece, line by line and without its index, so that equal changes are equal."""
    if old is None or new is None:
        (piece,) = filter(None, (old, new))
        return (f"{'gone' if new is None else 'added'}: {_described(piece)}",)
    lines = ["changed: " + " -> ".join(dict.fromkeys((_described(old), _described(new))))]
    if old.reason != new.reason:
        lines.append(f"why: {old.reason!r} -> {new.reason!r}")
    for what in ("ops", "input_types", "output_types"):
        diff = difflib.unified_diff(getattr(old, what), getattr(new, what), lineterm="", n=0)
        changed = [line for line in itertools.islice(diff, 2, None) if line[0] in "+-"]
        if changed:
            lines.append(f"{what.replace('_', ' ')}: {', '.join(changed[:20])}{', ...' if len(changed) > 20 else ''}")
    if len(lines) == 1:
        lines.append(f"same ops and types, other arguments: compare {old.file} of the one with {new.file} of the other")
    return tuple(lines)


def _described(piece: PieceEntry) -> str:
    return f"{piece.kind}, {counted(len(piece.ops), 'op')}"

"""Text for people: what repeats is folded, numbers become ranges, long lines are wrapped."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from .summary import InputEntry, PieceEntry

T = TypeVar("T")
K = TypeVar("K")

WIDTH = 120
_LONGEST_REPEAT = 12
_LONGEST_REASON = 600
_KIND_ORDER = ("token-count", "stage-input", "per-token", "state", "scalar", "other-tensor", "parameter")


def ranges(numbers: Iterable[int]) -> str:
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


def without_numbers(text: str) -> str:
    """What is left of a text when layers and the suffixes of node names no longer count."""
    return pattern(re.sub(r"_\d+\b", "", text))


def pattern(text: str) -> str:
    """The text with one sign for every number."""
    return re.sub(r"\d+", "#", text)


def folded_name(names: Sequence[str]) -> str:
    """One name for several that differ in their numbers only: ``layers.{0..31}.weight``."""
    columns = zip(*(re.split(r"(\d+)", name) for name in names), strict=True)
    folded = []
    for column in columns:
        values = list(dict.fromkeys(column))
        folded.append(values[0] if len(values) == 1 else f"{{{ranges([int(value) for value in values])}}}")
    return "".join(folded)


def common_text(texts: Sequence[str]) -> str:
    """One text for several that are equal but for numbers."""
    patterns = set(map(pattern, texts))
    return texts[0] if len(set(texts)) == 1 or len(patterns) > 1 else folded_name(texts)


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


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Key -> the items that have it, in order."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def folded_inputs(inputs: Sequence[InputEntry]) -> list[tuple[str, list[InputEntry]]]:
    """Inputs of one kind, reason and shape whose names differ in numbers only, each group with one name for all."""
    groups = grouped(
        sorted(inputs, key=lambda i: _KIND_ORDER.index(i.kind) if i.kind in _KIND_ORDER else len(_KIND_ORDER)),
        lambda i: (i.kind, i.reason, pattern(i.source or i.name), re.sub(r"\bs\d+", "s#", i.type)),
    )
    return [(folded_name([m.source or m.name for m in members]), members) for members in groups.values()]


def plain_runs(pieces: Iterable[PieceEntry]) -> dict[str, list[int]]:
    """Why pieces ran as plain FX -> which."""
    why = {piece.index: piece.failure or piece.plain_run or "" for piece in pieces}
    return grouped(filter(why.get, why), lambda index: why[index])


def meaning(piece: PieceEntry) -> tuple[object, ...]:
    """Equal for steps that a reader takes for the same; eager ones may differ in numbers, such as the layer's."""
    return piece.kind, piece.key if piece.kind == "compute" else without_numbers(piece.reason)


def signature(piece: PieceEntry) -> tuple[object, ...]:
    """Equal for steps of one meaning that also take proxies and give results alike."""
    return (*meaning(piece), tuple(piece.reads_stage_inputs), piece.writes_stage_outputs)


def shortened(text: str) -> str:
    return textwrap.shorten(text, _LONGEST_REASON, placeholder=" [...]")


def entry(head: str, text: str, indent: int = 14) -> list[str]:
    """A line with a heading, wrapped under its text."""
    if len(head) > WIDTH // 2:
        return [*_wrap(head, "", ""), *_wrap(text, " " * indent, " " * indent)]
    return _wrap(text, f"{head} " if len(head) >= indent else head.ljust(indent), " " * indent)


def _wrap(text: str, first: str, rest: str) -> list[str]:
    lines = textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
    return lines or [first.rstrip()]

"""Compares what the pipeline generated with eager, decides the exit code, and writes the table."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .job import HANDOFF_COUNTERS, RankReport

REQUIRED_ACCURACY = 0.98


@dataclass(frozen=True)
class Difference:
    """The first token in which two answers to one prompt differ; None stands for an answer that had ended."""

    prompt: int
    position: int
    expected: int | None
    got: int | None


def first_differences(expected: Sequence[Sequence[int]], got: Sequence[Sequence[int]]) -> list[Difference]:
    """One `Difference` per prompt whose answers differ. Raises `ValueError` if some have no answer."""
    if len(expected) != len(got):
        raise ValueError(f"{len(got)} answers came back for {len(expected)} prompts")
    differences = []
    for prompt, (expected_row, got_row) in enumerate(zip(expected, got, strict=True)):
        for position in range(max(len(expected_row), len(got_row))):
            wanted = expected_row[position] if position < len(expected_row) else None
            token = got_row[position] if position < len(got_row) else None
            if wanted != token:
                differences.append(Difference(prompt, position, wanted, token))
                break
    return differences


def accuracy(right: Sequence[Sequence[int]], got: Sequence[Sequence[int]]) -> float:
    """The fraction of prompts answered with exactly the right tokens."""
    return sum(list(a) == list(b) for a, b in zip(right, got, strict=True)) / len(right)


def answers(reports: Sequence[RankReport]) -> list[list[int]]:
    """What the pipeline generated, as its first rank heard of it."""
    generated = reports[0].generated
    assert generated is not None
    return generated


@dataclass(frozen=True)
class Verdict:
    """Everything that decides the demo's exit code; ``problems`` is empty when all is well."""

    problems: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        return 1 if self.problems else 0


def judge(
    prompt_texts: Sequence[str],
    eager: Sequence[Sequence[int]],
    reports: Sequence[RankReport],
    right: Sequence[Sequence[int]] | None = None,
) -> Verdict:
    """Holds the pipeline to eager's tokens, and both to the right answers where these are known."""
    problems = [
        f"prompt {difference.prompt} ({prompt_texts[difference.prompt]}), new token {difference.position}: "
        f"eager gives {_token(difference.expected)}, the pipeline {_token(difference.got)}"
        for difference in first_differences(eager, answers(reports))
    ]
    for report in reports:
        if report.generated is not None and report.generated != answers(reports):
            problems.append(f"rank {report.rank} saw other tokens than rank 0")
        if report.calls_without_program:
            problems.append(
                f"rank {report.rank}: {report.calls_without_program} of {report.calls} calls ran without a "
                "program of the backend (TORCH_LOGS=recompiles says why; see also "
                "torch._dynamo.config.recompile_limit)"
            )
    if right is not None:
        for name, tokens in (("eager", eager), ("the pipeline", answers(reports))):
            if (fraction := accuracy(right, tokens)) < REQUIRED_ACCURACY:
                problems.append(f"accuracy of {name} is {fraction:.1%}; {REQUIRED_ACCURACY:.0%} is expected at least")
    return Verdict(tuple(problems))


def _token(token: int | None) -> str:
    return "nothing more" if token is None else f"token {token}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def answers_table(
    eager: Sequence[Sequence[int]],
    eager_seconds: float,
    reports: Sequence[RankReport],
    right: Sequence[Sequence[int]] | None,
) -> str:
    """Eager against the pipeline: accuracy (where the right answers are known), tokens, seconds."""
    pipeline = answers(reports)
    token_count = sum(map(len, eager))
    same = sum(a == b for row, other in zip(eager, pipeline, strict=True) for a, b in zip(row, other, strict=False))

    def row(name: str, tokens: Sequence[Sequence[int]], agreement: str, seconds: float) -> list[str]:
        score = "-" if right is None else f"{accuracy(right, tokens):.1%}"
        return [name, score, str(sum(map(len, tokens))), agreement, f"{seconds:.2f}"]

    return format_table(
        ["", "accuracy", "tokens", "same as eager", "seconds"],
        [
            row("eager transformers, 1 process", eager, "-", eager_seconds),
            row(
                f"pipeline, {len(reports)} {'rank' if len(reports) == 1 else 'ranks'}",
                pipeline,
                f"{same} of {token_count}",
                reports[0].generate_seconds,  # ranks wait for one another: one clock is the pipeline's
            ),
        ],
    )


def ranks_table(reports: Sequence[RankReport]) -> str:
    """Per rank what was split and compiled."""
    return format_table(
        [
            "rank",
            "layers",
            "calls",
            "programs",
            "pieces",
            "compiled (distinct)",
            "eager steps run",
            "load seconds",
            "compile seconds",
        ],
        [
            [
                report.rank,
                f"{report.layers[0]}-{report.layers[-1]}",
                report.calls,
                report.programs,
                report.pieces,
                report.pieces_compiled,
                report.eager_steps,
                f"{report.load_seconds:.2f}",
                f"{report.compile_seconds:.2f}",
            ]
            for report in reports
        ],
    )


def handoff_table(reports: Sequence[RankReport]) -> str:
    """Per rank how proxies and graphs fared while prompts were answered; counters as in ``ppb.stats()``."""
    return format_table(
        ["rank", *HANDOFF_COUNTERS],
        [[report.rank, *(report.handoff[name] for name in HANDOFF_COUNTERS)] for report in reports],
    )


def eager_lines(reports: Sequence[RankReport], width: int = 110) -> list[str]:
    """What runs eagerly between the compiled pieces, how often over all ranks and programs, and why."""
    parts: Counter[str] = Counter()
    for report in reports:
        parts.update(report.eager_parts)
    return [
        line
        for part, count in parts.items()
        for line in textwrap.wrap(f"{count} x {part}", width, initial_indent="  ", subsequent_indent="      ")
    ]

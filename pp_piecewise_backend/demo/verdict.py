"""Generates eagerly with the whole decoder in transformers alone, compares the pipeline with it, writes the tables."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, TypeAlias

import torch

from ..integrations.generation.job import RankReport
from ..utils.counters import counted

HANDOFF_COUNTERS = (
    "replays",
    "graph_misses",
    "stage_inputs_in_place",
    "proxy_copies",
    "recv_allocations",
    "pickles",
    "blocking_metadata",
)
"""Names in ``ppb.stats()`` of what the table says about the hand-off."""
REQUIRED_ACCURACY = 0.98
_ROWS_AT_ONCE = 50

Tokens: TypeAlias = Sequence[Sequence[int]]
"""Of each prompt."""


def generate_eagerly(model: Any, prompts: Tokens, *, max_new_tokens: int, end_tokens: Sequence[int]) -> list[list[int]]:
    """Greedy new tokens per prompt, up to and including the first of ``end_tokens``; all prompts are equally long.

    Replaces the model's own settings, which may ask for sampling or penalties.
    """
    import transformers

    model.generation_config = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(end_tokens) or None,
        pad_token_id=end_tokens[0] if end_tokens else 0,
    )
    generated: list[list[int]] = []
    for rows in torch.tensor(prompts, device=model.device).split(_ROWS_AT_ONCE):
        output = model.generate(rows, attention_mask=torch.ones_like(rows))[:, rows.shape[1] :]
        generated += [cut_at_end(row, end_tokens) for row in output.tolist()]
    return generated


def cut_at_end(tokens: list[int], end_tokens: Sequence[int]) -> list[int]:
    """``tokens`` up to and including the first end token; what follows is filling."""
    ends = (position for position, token in enumerate(tokens, 1) if token in end_tokens)
    return tokens[: next(ends, len(tokens))]


def accuracy(right: Tokens, got: Tokens) -> float:
    """The fraction of prompts answered with exactly the right tokens."""
    return sum(list(a) == list(b) for a, b in zip(right, got, strict=True)) / len(right)


def problems(
    prompt_texts: Sequence[str],
    eager: Tokens,
    pipeline: Tokens,
    reports: Sequence[RankReport],
    right: Tokens | None = None,
) -> list[str]:
    """Holds the pipeline to eager's tokens, each rank to the backend's programs, and both to the right answers where
    these are known; empty if all is well.

    Of a prompt whose answers differ, it names the first token that does.
    """
    found = []
    for prompt, (text, *both) in enumerate(zip(prompt_texts, eager, pipeline, strict=True)):
        for position, tokens in enumerate(zip_longest(*both)):
            if tokens[0] != tokens[1]:
                expected, got = ("nothing more" if token is None else f"token {token}" for token in tokens)
                where = f"prompt {prompt} ({text}), new token {position}"
                found.append(f"{where}: eager gives {expected}, the pipeline {got}")
                break
    for report in reports:
        calls, programs_ran = report.counters["microbatches"], report.counters["calls"]
        if programs_ran < calls:  # Dynamo fell back to plain Python
            found.append(
                f"rank {report.rank}: {calls - programs_ran} of {calls} calls ran without a program of the backend "
                "(TORCH_LOGS=recompiles says why; see also torch._dynamo.config.recompile_limit)"
            )
    if right is not None:
        for name, answers in (("eager", eager), ("the pipeline", pipeline)):
            if (fraction := accuracy(right, answers)) < REQUIRED_ACCURACY:
                found.append(f"accuracy of {name} is {fraction:.1%}; {REQUIRED_ACCURACY:.0%} is expected at least")
    return found


def format_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Aligned columns, named by the keys of the first row: the first to the left, the others to the right."""
    cells = [list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def answers_table(
    eager: Tokens, eager_seconds: float, pipeline: Tokens, reports: Sequence[RankReport], right: Tokens | None
) -> str:
    """Eager against the pipeline: accuracy (where the right answers are known), tokens, seconds."""
    same = sum(a == b for row, other in zip(eager, pipeline, strict=True) for a, b in zip(row, other, strict=False))
    agreement, ranks = f"{same} of {sum(map(len, eager))}", counted(len(reports), "rank")
    rows = [
        ("eager transformers, 1 process", eager, "-", eager_seconds),
        # Ranks wait for one another: one clock is the pipeline's.
        (f"pipeline, {ranks}", pipeline, agreement, reports[0].generate_seconds),
    ]
    return format_table(
        [
            {
                "": name,
                "accuracy": "-" if right is None else f"{accuracy(right, tokens):.1%}",
                "tokens": sum(map(len, tokens)),
                "same as eager": as_eager,
                "seconds": f"{seconds:.2f}",
            }
            for name, tokens, as_eager, seconds in rows
        ]
    )


def ranks_table(reports: Sequence[RankReport]) -> str:
    """Per rank what was split and compiled."""
    return format_table(
        [
            {
                "rank": report.rank,
                "layers": f"{report.layers[0]}-{report.layers[-1]}",
                "calls": report.counters["microbatches"],
                "programs": report.counters["programs"],
                "pieces": report.counters["pieces"],
                "compiled (distinct)": report.counters["pieces_compiled"],
                "eager steps run": report.counters["eager_steps"],
                "load seconds": f"{report.load_seconds:.2f}",
                "warm-up seconds": f"{report.compile_seconds:.2f}",
            }
            for report in reports
        ]
    )


def handoff_table(reports: Sequence[RankReport]) -> str:
    """Per rank how proxies and graphs fared while prompts were answered; counters as in ``ppb.stats()``."""
    return format_table(
        [{"rank": report.rank, **{name: report.counters[name] for name in HANDOFF_COUNTERS}} for report in reports]
    )


def eager_lines(reports: Sequence[RankReport], width: int = 110) -> list[str]:
    """What runs eagerly between the compiled pieces, how often over all ranks and programs, and why."""
    parts = sum((Counter(report.eager_parts) for report in reports), Counter[str]())
    return [
        line
        for part, count in parts.items()
        for line in textwrap.wrap(f"{count} x {part}", width, initial_indent="  ", subsequent_indent="      ")
    ]

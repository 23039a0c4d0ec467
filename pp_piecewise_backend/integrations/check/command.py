"""The command ``check``: its arguments, its table, and its exit code."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ConfigError, PPPiecewiseWarning, RankFailed
from ...utils.counters import counted
from .. import smollm2
from ..generation.command import add_pipeline_arguments, backend_options
from ..model_folder import check_rank_count, choose_device, layer_counts, load_whole, read_config
from ..ranks import run_ranks
from .job import WIDER, CheckJob, edges, import_all, prompts_at

DESCRIPTION = """\
Runs decoders as pipelines at every edge of every bucket (the smallest and the largest number of tokens that replay the
same graphs), and compares all logits with eager transformers: in float32 and in the dtype of the weights, for each
number of ranks. It says what replays, what does not and why. The exit code is 0 if nothing is further from the right
logits than rounding explains, 1 if something is, with the piece that it comes from, and 2 for bad arguments."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument(
        "models", nargs="+", metavar="DIR", help="folders of Hugging Face decoders with a pp_plan, or smollm2"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=32, metavar="N", help="the largest micro-batch (default %(default)s)"
    )
    parser.add_argument("--capture-sizes", metavar="SIZES", help="buckets, as the option capture_sizes takes them")
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="a Python module that makes your own architecture known to transformers; imported by each rank, too",
    )
    add_pipeline_arguments(parser, ranks="2")


@dataclass
class Outcome:
    """Of one decoder, number of ranks and dtype."""

    name: str
    architecture: str
    ranks: int
    dtype: str
    layer_counts: list[int]
    replays: int = 0
    misses: int = 0
    agreement: Any = None
    """`compare.Agreement`; None if a rank failed."""
    why: Counter[str] = field(default_factory=Counter)
    """Why pieces did not replay, how often."""
    problems: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.name}, {counted(self.ranks, 'rank')}, {self.dtype}"


def run(options: argparse.Namespace) -> int:
    """0; 1 if something is wrong; 2 for bad arguments."""
    try:
        jobs = list(plan(options))
    except (ValueError, ConfigError, ImportError) as error:
        print(f"check: {error}", file=sys.stderr)
        return 2
    outcomes = []
    for job, outcome in jobs:
        print(f"{outcome.title} ...", file=sys.stderr, flush=True)
        check(job, outcome)
        outcomes.append(outcome)
    print(table(outcomes))
    if reasons := reason_lines([one.why for one in outcomes]):
        print("\nnot replayed, by how many pieces and calls:", *reasons, sep="\n")
    for outcome in outcomes:
        for problem in outcome.problems:
            print(f"check: {outcome.title}: {problem}", file=sys.stderr)
    return 1 if any(outcome.problems for outcome in outcomes) else 0


def plan(options: argparse.Namespace) -> Iterator[tuple[CheckJob, Outcome]]:
    """Every decoder, number of ranks and dtype. Raises `ValueError` or `ConfigError` for what cannot be used."""
    try:
        rank_counts = [int(count) for count in options.ranks.split(",")]
    except ValueError:
        raise ValueError(f"--ranks {options.ranks}: numbers are expected, such as 2 or 2,3.") from None
    if options.max_tokens < 1:
        raise ValueError(f"--max-tokens {options.max_tokens}: at least 1 is needed.")
    backend = backend_options(options)
    if options.capture_sizes is not None:
        backend["capture_sizes"] = options.capture_sizes
    sizes = edges(backend, options.max_tokens)
    folders = [smollm2.model_folder(given) for given in options.models]
    import_all(options.imports)
    for folder in folders:
        config = read_config(folder)
        for ranks in rank_counts:
            check_rank_count(ranks, config, "--ranks")
            device = choose_device(options.device, ranks, options.graphs)
            counts = layer_counts(folder, config, ranks, options.balance, device)
            for dtype in _dtypes(options.dtype, folder):
                job = CheckJob(
                    model_dir=str(folder.resolve()),
                    layer_counts=counts,
                    device=device,
                    dtype=dtype,
                    options={"graphs": "cuda" if device == "cuda" else "emulate", **backend},
                    prompts=prompts_at(sizes, config.vocab_size),
                    max_tokens=options.max_tokens,
                    imports=options.imports,
                )
                yield job, Outcome(folder.name, config.model_type, ranks, dtype, counts)


def _dtypes(given: str | None, folder: Path) -> list[str]:
    from ..decoder_stages import stored_dtype

    dtypes = ["float32", stored_dtype(folder)] if given is None else [given]
    if unknown := [dtype for dtype in dtypes if dtype not in WIDER]:
        raise ValueError(f"dtype {unknown[0]}: {', '.join(WIDER)} can be checked.")
    return list(dict.fromkeys(dtypes))


def check(job: CheckJob, outcome: Outcome) -> None:
    """Runs the ranks and eager; ``outcome`` gets what was found."""
    import torch

    from . import compare, pieces
    from .rank import TARGET

    logits: list[Any] = []

    def hear(rank: int, event: Any) -> None:
        if "logits" in event:
            logits.extend(torch.load(event["logits"]))
            return
        replayed = event["replayed"]
        outcome.replays += replayed["replays"]
        outcome.misses += replayed["misses"]
        outcome.why.update(replayed["why"])
        if without := replayed["micro_batches"] - replayed["calls"]:
            outcome.problems.append(f"rank {rank}: {without} calls ran without a program of the backend")

    try:
        run_ranks(TARGET, outcome.ranks, job.model_dump(), hear)
    except RankFailed as error:
        outcome.problems.append(f"{error}\n{error.trace}".rstrip())
        return
    model = load_whole(job.model_dir, getattr(torch, job.dtype))
    wide = compare.load_wide(job.model_dir, getattr(torch, WIDER[job.dtype]))
    found = compare.compare(logits, compare.logits_of(model, job.prompts), compare.logits_of(wide, job.prompts))
    outcome.agreement = found
    if found.wrong_prompts:
        sizes = ", ".join(str(len(job.prompts[prompt]) - 1) for prompt in found.wrong_prompts)
        outcome.problems.append(
            f"logits are up to {found.pipeline_error:.2g} from the right ones, those of eager up to "
            f"{found.eager_error:.2g}; at {sizes} tokens"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PPPiecewiseWarning)  # of stages that are compiled in between
            outcome.problems += pieces.find(model, wide, job, job.prompts[found.wrong_prompts[-1]][:-1])


def reason_lines(counts: Iterable[Mapping[str, int]]) -> list[str]:
    """One line for sentences that differ in numbers only, with ``*`` for these, and how often each kind occurred."""
    alike: dict[str, Counter[str]] = {}
    for sentence, times in ((sentence, times) for why in counts for sentence, times in why.items()):
        alike.setdefault(re.sub(r"\d+", "*", sentence), Counter())[sentence] += times
    return [
        f"  {sum(times.values())} x {pattern if len(times) > 1 else next(iter(times))}"
        for pattern, times in alike.items()
    ]


def table(outcomes: list[Outcome]) -> str:
    names = ("decoder", "type", "ranks", "layers", "dtype", "tokens as eager", "error", "of eager", "replays", "misses")
    rows: list[tuple[str, ...]] = [names]
    for one in outcomes:
        found = one.agreement
        rows.append(
            (
                one.name,
                one.architecture,
                str(one.ranks),
                "+".join(map(str, one.layer_counts)),
                one.dtype,
                "-" if found is None else f"{found.same_tokens} of {found.tokens}",
                "-" if found is None else f"{found.pipeline_error:.1e}",
                "-" if found is None else f"{found.eager_error:.1e}",
                str(one.replays),
                str(one.misses),
            )
        )
    verdicts = ["", *("FAILED" if one.problems else "passed" for one in outcomes)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([*map(str.ljust, row, widths), verdict]).rstrip() for row, verdict in zip(rows, verdicts, strict=True)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

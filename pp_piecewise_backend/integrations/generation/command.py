"""The command ``generate``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ...errors import ConfigError, RankFailed
from .. import smollm2
from ..balance import BALANCES

DESCRIPTION = """\
Answers prompts with a local Hugging Face decoder, run as a pipeline of processes on this machine. One prompt is
answered as its tokens come; the answers of several are printed as they end, each with the number of its prompt."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("model", metavar="DIR", help="folder of a Hugging Face decoder with a pp_plan, or smollm2")
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="may be given several times; token ids like 1,15,7 for a model without a tokenizer",
    )
    parser.add_argument("--prompts", metavar="FILE", help="a prompt on each line; - reads them from the input")
    parser.add_argument("--chat", action="store_true", help="put each prompt into the chat template of the tokenizer")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="M", help="longest answer (%(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest token (default); more: drawn"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw of the likeliest tokens (1.0)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default %(default)s)")
    parser.add_argument(
        "--sequences-per-micro-batch", type=int, default=8, metavar="K", help="at most (default %(default)s)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=128, metavar="N", help="rows of a micro-batch, at most (default %(default)s)"
    )
    add_pipeline_arguments(parser)


def add_pipeline_arguments(parser: argparse.ArgumentParser, ranks: int | str = 2) -> None:
    """What all commands that start ranks take; ``ranks`` as text may list several numbers."""
    several = ", or several numbers, such as 2,3" if isinstance(ranks, str) else ""
    parser.add_argument(
        "--ranks", type=type(ranks), default=ranks, metavar="N", help=f"pipeline stages{several} (default %(default)s)"
    )
    parser.add_argument(
        "--balance",
        choices=BALANCES,
        default="layers",
        help="in what the stages are alike: number of layers, bytes of weights, or time, measured here, with embedding "
        "and head counted where they lie (default %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="cuda: one GPU per rank; auto: cuda if there are enough GPUs, else cpu (default %(default)s)",
    )
    parser.add_argument("--dtype", metavar="NAME", help="such as float32 (default: as the weights are stored)")
    parser.add_argument(
        "--compiler",
        choices=["inductor", "aot_eager", "eager"],
        default="inductor",
        help="what compiles the pieces (default %(default)s)",
    )
    parser.add_argument(
        "--graphs",
        choices=["emulate", "cuda", "off"],
        help="how pieces are captured and replayed (default: cuda on GPUs, else emulate)",
    )


def backend_options(options: argparse.Namespace) -> dict[str, Any]:
    """Of ``add_pipeline_arguments``; graphs are left out where they follow from the device."""
    chosen = {"compiler": options.compiler}
    return chosen | ({"graphs": options.graphs} if options.graphs else {})


def run(options: argparse.Namespace) -> int:
    """0; 1 if a rank failed; 2 for bad arguments."""
    from tqdm import tqdm

    from .call import NewToken, generate

    try:
        prompts = _prompts(options)
    except ValueError as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    texts = [""] * len(prompts)

    def show(token: NewToken) -> None:
        if len(prompts) == 1:
            print(token.text, end="\n" if token.is_last else "", flush=True)
            return
        texts[token.prompt] += token.text
        if token.is_last:
            with tqdm.external_write_mode():  # the bar makes room
                print(f"[{token.prompt}] {texts[token.prompt]}", flush=True)

    try:
        generate(
            smollm2.model_folder(options.model),
            prompts,
            options.ranks,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            chat=options.chat,
            balance=options.balance,
            device=options.device,
            dtype=options.dtype,
            sequences_per_micro_batch=options.sequences_per_micro_batch,
            max_tokens=options.max_tokens,
            options=backend_options(options),
            on_token=show,
            progress=len(prompts) > 1 and sys.stderr.isatty(),  # no bar runs through an answer that streams
        )
    except (ValueError, ConfigError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    except RankFailed as error:
        print(f"{error.trace}generate: {error}", file=sys.stderr)
        return 1
    return 0


def _prompts(options: argparse.Namespace) -> list[str]:
    prompts = list(options.prompt)
    if options.prompts is not None:
        try:
            text = sys.stdin.read() if options.prompts == "-" else Path(options.prompts).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompts {options.prompts}: {getattr(error, 'strerror', error)}.") from None
        prompts += [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError("there is no prompt: give --prompt TEXT or --prompts FILE.")
    return prompts

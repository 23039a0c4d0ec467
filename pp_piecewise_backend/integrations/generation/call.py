"""``generate``: from prompts and a folder to answers."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config import Config
from ..model_folder import (
    Vocabulary,
    check_rank_count,
    choose_device,
    end_tokens,
    layer_counts,
    read_config,
    vocabulary_of,
)
from ..ranks import run_ranks
from .job import Job, RankReport
from .schedule import MAX_GROUPS, MAX_SEQUENCES

TARGET = "pp_piecewise_backend.integrations.generation.worker:run_rank"


@dataclass(frozen=True)
class NewToken:
    """What the pipeline has just chosen."""

    prompt: int
    """Number of the prompt, from 0."""
    token: int
    text: str
    """What it adds to the answer; "" while a character is incomplete."""
    is_last: bool


@dataclass(frozen=True)
class Generated:
    """The answer to one prompt."""

    prompt_tokens: list[int]
    tokens: list[int]
    """The end token included, if there was one."""
    text: str


OnToken = Callable[[NewToken], object]


def generate(
    model_dir: str | Path,
    prompts: Sequence[str | Sequence[int]],
    ranks: int = 2,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    balance: str = "layers",
    device: str = "auto",
    dtype: str | None = None,
    sequences_per_micro_batch: int = 8,
    max_tokens: int = 128,
    options: Mapping[str, Any] | None = None,
    on_token: OnToken | None = None,
    progress: bool | None = None,
) -> list[Generated]:
    """Answers of a local Hugging Face decoder, run as a pipeline of processes that this call starts and ends.

    Several micro-batches are under way at once, two for each rank; sequences of any lengths share them. Under torchrun
    each process that calls this is a rank, ``ranks`` is not read, and all but the first one get an empty list.

    Args:
        model_dir: with ``config.json``, safetensors, and a tokenizer if prompts are texts.
        prompts: texts, or tokens.
        ranks: pipeline stages.
        max_new_tokens: of each answer, which ends earlier at an end token of the decoder.
        temperature: 0 takes the likeliest token each time; more draws tokens, the same ones for the same ``seed``.
        top_p: draw of the likeliest tokens that together have this probability.
        chat: put texts into the chat template of the tokenizer, as what a user says.
        balance: in what the stages are alike: "layers", "memory" or "time", see ``cut_decoder``.
        device: "cpu", "cuda" (a GPU for each rank), or "auto": "cuda" where there are enough.
        dtype: such as "float32"; None: as the weights are stored.
        sequences_per_micro_batch: at most.
        max_tokens: rows of a micro-batch, at most; longer prompts run in parts.
        options: of the backend.
        on_token: called here with each new token, as it comes.
        progress: whether to show a bar; by default on a terminal only, and not where ``on_token`` may print there.

    Raises:
        ValueError: an argument or the folder cannot be used.
        ConfigError: one of ``options``, or of the environment, cannot.
        RankFailed: a rank raised or died, named in the message; no process is left.
    """
    if not prompts:
        return []
    launched = _launched_ranks()
    ranks = launched or ranks
    job, vocabulary = plan(
        model_dir,
        prompts,
        ranks,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chat=chat,
        balance=balance,
        device=device,
        dtype=dtype,
        sequences_per_micro_batch=sequences_per_micro_batch,
        max_tokens=max_tokens,
        options=options,
    )
    if progress is None and on_token is not None:
        progress = False
    with showing_progress(len(prompts), progress) as count_token:

        def hear(token: NewToken) -> None:
            count_token(token)
            if on_token is not None:
                on_token(token)

        answers = Answers(job, vocabulary, hear)
        if launched:
            is_first = _run_launched(job, answers) == 0
        else:
            run_ranks(TARGET, job.ranks, job.model_dump(), answers.hear)
            is_first = True
    return answers.generated if is_first else []


def plan(
    model_dir: str | Path,
    prompts: Sequence[str | Sequence[int]],
    ranks: int,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    balance: str = "layers",
    device: str = "auto",
    dtype: str | None = None,
    sequences_per_micro_batch: int = 8,
    max_tokens: int = 128,
    options: Mapping[str, Any] | None = None,
) -> tuple[Job, Vocabulary]:
    """What `generate` runs. Raises `ValueError` or `ConfigError` for what cannot be used."""
    folder = Path(model_dir)
    _check_prompts(prompts)
    _check_numbers(max_new_tokens, temperature, top_p, sequences_per_micro_batch, max_tokens)
    config = read_config(folder)
    check_rank_count(ranks, config)
    _check_dtype(dtype)
    given = options or {}
    device = choose_device(device, ranks, given.get("graphs"))
    vocabulary = vocabulary_of(folder, config, chat=chat)
    tokens = [_tokens_of(number, prompt, vocabulary, config.vocab_size) for number, prompt in enumerate(prompts)]
    sequences, max_rows = Job.rows(tokens, ranks, sequences_per_micro_batch, max_tokens)
    if 2 * ranks > MAX_GROUPS:
        raise ValueError(f"ranks {ranks}: at most {MAX_GROUPS // 2} are possible.")
    Config.resolve(given)  # or ranks would be the first to refuse it
    job = Job(
        model_dir=str(folder.resolve()),
        ranks=ranks,
        layer_counts=layer_counts(folder, config, ranks, balance, device),
        device=device,
        options={
            "graphs": "cuda" if device == "cuda" else "emulate",
            "capture_sizes": ",".join(str(2**power) for power in range(max_rows.bit_length())),
            **given,
        },
        prompts=tokens,
        max_new_tokens=max_new_tokens,
        end_tokens=end_tokens(folder, config),
        max_tokens=max_rows,
        sequences=sequences,
        dtype=dtype,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    return job, vocabulary


def _check_numbers(
    max_new_tokens: int, temperature: float, top_p: float, sequences_per_micro_batch: int, max_tokens: int
) -> None:
    for name, value in (
        ("max_new_tokens", max_new_tokens),
        ("sequences_per_micro_batch", sequences_per_micro_batch),
        ("max_tokens", max_tokens),
    ):
        if value < 1:
            raise ValueError(f"{name} {value}: at least 1 is needed.")
    if sequences_per_micro_batch > MAX_SEQUENCES:
        raise ValueError(f"sequences_per_micro_batch {sequences_per_micro_batch}: at most {MAX_SEQUENCES} fit.")
    if not temperature >= 0:  # which holds for what is no number, too
        raise ValueError(f"temperature {temperature}: 0 (the likeliest token) or more is expected.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p}: more than 0 and at most 1 is expected.")


def _check_dtype(dtype: str | None) -> None:
    import torch

    kind = torch.float32 if dtype is None else getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ValueError(f"dtype {dtype!r}: a floating torch dtype such as float32 or bfloat16 is expected.")


def _check_prompts(prompts: Any) -> None:
    """A text is a sequence of texts, too, and a list of tokens is none of prompts."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts {prompts!r}: a list is expected, also of one prompt.")
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, Iterable):
            raise ValueError(f"prompt {number} ({prompt!r}): a text or a list of tokens is expected.")


def _tokens_of(number: int, prompt: str | Sequence[int], vocabulary: Vocabulary, vocabulary_size: int) -> list[int]:
    tokens = vocabulary.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
    if not tokens:
        raise ValueError(f"prompt {number} ({prompt!r}) has no tokens; at least one is needed.")
    if wrong := [token for token in tokens if not 0 <= token < vocabulary_size]:
        raise ValueError(f"prompt {number} has the token {wrong[0]}; 0 to {vocabulary_size - 1} is possible.")
    return tokens


@dataclass
class Answers:
    """What the ranks of a job have emitted so far."""

    job: Job
    vocabulary: Vocabulary
    on_token: OnToken = lambda token: None
    tokens: list[list[int]] = field(init=False)
    reports: list[RankReport] = field(default_factory=list)
    """In the order of the ranks, once all have ended."""
    trace: Any = None
    """What `StageRunner.trace` wrote, if the job asks for it."""

    def __post_init__(self) -> None:
        self.tokens = [[] for _ in self.job.prompts]
        self._said = [""] * len(self.tokens)

    def hear(self, rank: int, event: Any) -> None:
        """For `ranks.run_ranks`."""
        for prompt, token, is_last in event.get("tokens", ()):
            self.tokens[prompt].append(token)
            self.on_token(NewToken(prompt, token, self._text_added(prompt, is_last), is_last))
        self.trace = event.get("trace", self.trace)
        if "report" in event:
            self.reports.append(RankReport.model_validate(event["report"]))
            self.reports.sort(key=lambda report: report.rank)

    def _text_added(self, prompt: int, is_last: bool) -> str:
        text = self.vocabulary.decode(self.tokens[prompt])
        if text.endswith("\ufffd") and not is_last:  # the first bytes of a character
            return ""
        begin, self._said[prompt] = len(self._said[prompt]), text
        return text[begin:]

    @property
    def generated(self) -> list[Generated]:
        return [
            Generated(list(prompt), tokens, self.vocabulary.decode(tokens))
            for prompt, tokens in zip(self.job.prompts, self.tokens, strict=True)
        ]


@contextmanager
def showing_progress(prompt_count: int, progress: bool | None) -> Iterator[OnToken]:
    """A bar that counts prompts with an answer, and tokens; what is yielded is to be called with each new token."""
    from tqdm import tqdm

    is_shown = sys.stderr.isatty() if progress is None else progress
    count = 0
    with tqdm(total=prompt_count, desc="pipeline", unit="prompt", disable=not is_shown) as bar:

        def hear(token: NewToken) -> None:
            nonlocal count
            count += 1
            bar.set_postfix(tokens=count, refresh=False)
            bar.update(token.is_last)

        yield hear


def _launched_ranks() -> int | None:
    """How many ranks torchrun has launched, of which this process is one; None if it has not."""
    if "torch" not in sys.modules and "TORCHELASTIC_RUN_ID" not in os.environ:
        return None  # and torch need not be imported to see that
    import torch.distributed as dist

    if not dist.is_available() or not (dist.is_initialized() or dist.is_torchelastic_launched()):
        return None
    if not dist.is_initialized():
        dist.init_process_group()
    return dist.get_world_size()


def _run_launched(job: Job, answers: Answers) -> int:
    """The number of this rank."""
    import torch
    import torch.distributed as dist

    from .worker import run_stage

    rank = dist.get_rank()
    decided: list[Any] = [job.layer_counts]  # times that were measured differ from rank to rank
    dist.broadcast_object_list(decided, src=0)
    job = job.model_copy(update={"layer_counts": decided[0]})
    device = torch.device("cuda", torch.cuda.current_device()) if job.device == "cuda" else torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="pp_piecewise_ranks_") as folder:
        run_stage(job, rank, device, Path(folder), lambda event: answers.hear(rank, event))
    return rank

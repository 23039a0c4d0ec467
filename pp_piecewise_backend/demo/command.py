"""The command ``demo``: its arguments, and the whole run from prompts to exit code."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..integrations.balance import BALANCES, balanced_layer_counts, layer_counts_by
from ..utils.counters import counted
from . import questions
from .questions import OWN_MODEL_DIR, Vocabulary, is_own_model, vocabulary_of

if TYPE_CHECKING:
    from .rank import Job

DESCRIPTION = """\
Runs a decoder as a pipeline of processes on this machine, each with a StageRunner that compiles its half (third, ...)
with torch.compile(stage, backend="pp_piecewise"), and compares every token with eager transformers in one process.
Without --prompt, a small decoder that comes with the package answers 200 arithmetic questions that it was not
trained on. The exit code is 0 only if no token differs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="pipeline stages (default %(default)s)")
    parser.add_argument(
        "--model",
        type=Path,
        default=OWN_MODEL_DIR,
        metavar="DIR",
        help="folder of a Hugging Face decoder with a pp_plan, to be given with --prompt "
        "(default: the decoder in the package)",
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
        default=16,
        metavar="M",
        help="longest answer of another model (default %(default)s)",
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
        help="cuda: one GPU per rank and NCCL (not tested by the authors); auto: cuda if there are "
        "enough GPUs, else cpu, with gloo (default %(default)s)",
    )
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
    except ValueError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return execute(task)


def plan(options: argparse.Namespace) -> Task:
    """Checks the arguments. Raises `ValueError` that says what was got and what is expected."""
    check_quickly(options)
    config = _read_config(options.model)
    from .rank import Job

    layer_count = config.num_hidden_layers
    if options.ranks > layer_count:
        raise ValueError(too_many_ranks(options.ranks, layer_count))
    device = _device(options.device, options.ranks)
    if options.graphs == "cuda" and device != "cuda":
        raise ValueError("--graphs cuda needs --device cuda: on the CPU, emulate or off is possible.")
    vocabulary = vocabulary_of(options.model, config)
    right = None
    if options.prompt is not None:
        texts, prompts = [options.prompt], [vocabulary.encode(options.prompt)]
    elif is_own_model(config):
        asked = questions.held_out_questions()[: options.questions]
        texts = [question.text for question in asked]
        prompts = [questions.encode_prompt(question) for question in asked]
        right = [questions.encode_answer(question) for question in asked]
    else:
        raise ValueError(f"--model {options.model}: give a --prompt; the arithmetic questions are for our own decoder.")
    job = Job(
        model_dir=str(options.model.resolve()),
        ranks=options.ranks,
        layer_counts=list(_layer_counts(options, config, device)),
        device=device,
        options={
            "compiler": options.compiler,
            "graphs": options.graphs or ("cuda" if device == "cuda" else "emulate"),
            # One bucket for each next token; the largest, max_tokens, is a whole prompt.
            "capture_sizes": "1",
        },
        prompts=prompts,
        max_new_tokens=questions.ANSWER_TOKENS if is_own_model(config) else options.max_new_tokens,
        end_tokens=_end_tokens(options.model, config),
    )
    return Task(job, texts, right, vocabulary)


def check_quickly(options: argparse.Namespace) -> None:
    """What can be seen before torch and transformers are imported, which takes seconds. Raises as `plan`."""
    config_path = options.model / "config.json"
    if not config_path.is_file():
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
    if options.model != OWN_MODEL_DIR:
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
    from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

    from . import rank, verdict

    job = task.job
    transport = "NCCL, one GPU per rank (not tested by the authors)" if job.device == "cuda" else "gloo, on the CPU"
    print(
        f"{counted(len(job.prompts), 'prompt')}, {counted(job.ranks, 'rank')}, {transport}, "
        f"compiler {job.options['compiler']}, graphs {job.options['graphs']}",
        flush=True,
    )
    try:
        reports = rank.run_ranks(job)
    except (ProcessRaisedException, ProcessExitedException) as error:
        print(f"demo: rank {error.error_index} of {job.ranks} failed: {str(error).strip()}", file=sys.stderr)
        return 1
    decoder = verdict.load_decoder(job.model_dir).to(job.device)
    begin = time.perf_counter()
    eager = verdict.generate_eagerly(decoder, job.prompts, max_new_tokens=job.max_new_tokens, end_tokens=job.end_tokens)
    eager_seconds = time.perf_counter() - begin
    problems = verdict.problems(task.texts, eager, reports, task.right)
    if len(task.texts) == 1:
        print(f"{task.texts[0]} -> {task.vocabulary.decode(reports[0].generated[0])}")
    answers, ranks = verdict.answers_table(eager, eager_seconds, reports, task.right), verdict.ranks_table(reports)
    print("", answers, "", ranks, sep="\n")
    print("\nhand-off, and graphs, since the warm-up:")
    print(verdict.handoff_table(reports))
    print(f"\nwhere the time went, in microseconds per micro-batch:\n{reports[0].times}")
    print("\nsplit out, and run eagerly between the compiled pieces (all ranks and programs):")
    print("\n".join(verdict.eager_lines(reports)))
    for problem in problems:
        print(f"demo: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _read_config(model_dir: Path) -> Any:
    try:
        import transformers
    except ImportError:
        raise ValueError("the demo needs transformers: pip install 'pp_piecewise_backend[demo]'") from None
    config = transformers.AutoConfig.from_pretrained(model_dir, local_files_only=True)
    if not config.base_model_pp_plan:
        raise ValueError(
            f"--model {model_dir}: the architecture {config.model_type!r} has no pp_plan that "
            "says where to cut; one with a plan is expected, such as Llama, Qwen2, Gemma2, Phi-3 or Mixtral."
        )
    return config


def _layer_counts(options: argparse.Namespace, config: Any, device: str) -> tuple[int, ...]:
    """Layers per stage, found once, here: two ranks that measure time could differ."""
    if options.balance == "layers":
        return balanced_layer_counts(config.num_hidden_layers, options.ranks)
    import torch
    import transformers

    from ..integrations.huggingface import decoder_plan
    from . import verdict

    if options.balance == "time":
        model = verdict.load_decoder(options.model).to(device)
    else:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    return layer_counts_by(options.balance, model, decoder_plan(model), options.ranks)


def _end_tokens(model_dir: Path, config: Any) -> list[int]:
    import transformers

    if (model_dir / "generation_config.json").is_file():
        end = transformers.GenerationConfig.from_pretrained(model_dir, local_files_only=True).eos_token_id
    else:
        end = config.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def _device(wanted: str, ranks: int) -> str:
    import torch

    gpu_count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and gpu_count < ranks:
        raise ValueError(
            f"--device cuda: {ranks} ranks need {ranks} GPUs (NCCL wants one for each), there "
            f"are {gpu_count}; use fewer --ranks or --device cpu."
        )
    if wanted == "auto":
        return "cuda" if gpu_count >= ranks else "cpu"
    return wanted

"""``generate``: answers of a pipeline are those of eager transformers, and arguments are checked before ranks start."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import started_in_tests
from checkout import CHECKOUT, TESTS
from models.tiny_decoders import TINY, tiny_decoder
from pp_piecewise_backend.__main__ import main
from pp_piecewise_backend.demo import questions
from pp_piecewise_backend.errors import ConfigError
from pp_piecewise_backend.integrations import model_folder
from pp_piecewise_backend.integrations.balance import BALANCES, layer_counts_by
from pp_piecewise_backend.integrations.generation import call
from pp_piecewise_backend.integrations.huggingface import NewToken, decoder_plan, generate

OPTIONS = {"compiler": "eager"}
PROMPTS = [[number + 3 * at + 3 for at in range(1 + number % 6)] for number in range(16)]
SECONDS = 250
NOT_TEXT = questions.OWN_MODEL_DIR / "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("decoder")
    tiny_decoder("llama-tied", layers=2).save_pretrained(made)
    return made


@pytest.fixture
def forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ranks").mkdir()
    monkeypatch.setattr(call, "run_ranks", started_in_tests.forked(tmp_path / "ranks"))


def eagerly(folder: Path, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Greedy answers of the whole model, one prompt at a time."""
    model = model_folder.load_whole(folder)
    answers = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            generation_config=transformers.GenerationConfig(
                do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=2, pad_token_id=0
            ),
        )
        answers.append(output[0, len(prompt) :].tolist())
    return answers


@pytest.mark.process
@pytest.mark.usefixtures("forked")
def test_answers_of_prompts_of_different_lengths_are_those_of_eager(folder: Path) -> None:
    heard: list[NewToken] = []
    options = {**OPTIONS, "capture_sizes": "1"}  # and max_tokens, in which all else is padded
    got = generate(
        folder, PROMPTS, 2, max_new_tokens=6, max_tokens=8, device="cpu", options=options, on_token=heard.append
    )
    assert [one.tokens for one in got] == eagerly(folder, PROMPTS, 6)
    assert [one.prompt_tokens for one in got] == PROMPTS
    assert {one.prompt for one in heard if one.is_last} == set(range(16))
    for prompt, one in enumerate(got):
        assert [token.token for token in heard if token.prompt == prompt] == one.tokens
        assert "".join(token.text for token in heard if token.prompt == prompt) == one.text


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.usefixtures("forked")
def test_one_rank_alone_runs_long_prompts_in_parts_and_draws_by_seed(folder: Path) -> None:
    prompts = [PROMPTS[5] * 3, PROMPTS[2]]
    given: Any = {"max_new_tokens": 4, "device": "cpu", "options": {**OPTIONS, "graphs": "off"}, "max_tokens": 4}
    assert [one.tokens for one in generate(folder, prompts, 1, **given)] == eagerly(folder, prompts, 4)
    drawn = [
        [one.tokens for one in generate(folder, prompts, 1, temperature=3.0, seed=seed, **given)] for seed in (1, 1)
    ]
    assert drawn[0] == drawn[1] != eagerly(folder, prompts, 4)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drawn_tokens_do_not_depend_on_how_sequences_share_micro_batches(folder: Path, temperature: float) -> None:
    """With ranks that are really started."""
    given: Any = {"max_new_tokens": 6, "device": "cpu", "options": OPTIONS, "temperature": temperature, "seed": 5}
    answers = [
        [one.tokens for one in generate(folder, PROMPTS, ranks, sequences_per_micro_batch=sequences, **given)]
        for ranks, sequences in [(2, 8), (1, 1)]
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"ranks": 3}, "ranks 3: the decoder has 2 layers, so 1 to 2 is possible."),
        ({"max_new_tokens": 0}, "max_new_tokens 0: at least 1 is needed."),
        ({"temperature": -1.0}, "temperature -1.0: 0 (the likeliest token) or more is expected."),
        ({"temperature": float("nan")}, "temperature nan: 0 (the likeliest token) or more is expected."),
        ({"top_p": 0.0}, "top_p 0.0: more than 0 and at most 1 is expected."),
        ({"dtype": "int8"}, "dtype 'int8': a floating torch dtype such as float32 or bfloat16 is expected."),
        ({"prompts": [[1], []]}, "prompt 1 ([]) has no tokens; at least one is needed."),
        ({"prompts": "Hello"}, "prompts 'Hello': a list is expected, also of one prompt."),
        ({"prompts": [1, 15, 7]}, "prompt 0 (1): a text or a list of tokens is expected."),
        ({"prompts": [[61]]}, "prompt 0 has the token 61; 0 to 60 is possible."),
        ({"prompts": ["hello"]}, "has no tokenizer, so a prompt must be comma-separated token ids in 0..60"),
        ({"chat": True}, "it has no tokenizer, so there is no chat template; leave chat out."),
        ({"sequences_per_micro_batch": 93}, "sequences_per_micro_batch 93: at most 92 fit."),
        ({"device": "cpu", "options": {"graphs": "cuda"}}, "graphs cuda needs the device cuda: on the CPU, emulate"),
        ({"device": "cuda"}, "2 ranks need 2 GPUs (NCCL wants one for each), there are 0"),
        ({"model_dir": Path("nowhere")}, "nowhere: no config.json there; a local folder in Hugging Face format"),
    ],
)
def test_bad_arguments_are_refused_before_ranks_start(
    arguments: dict[str, Any], sentence: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call, "run_ranks", lambda *_: pytest.fail("ranks were started"))
    if "cuda" in sentence or "GPUs" in sentence:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        generate(**{"model_dir": folder, "prompts": [[1]], **arguments})


def test_options_of_the_backend_are_refused_before_ranks_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(call, "run_ranks", lambda *_: pytest.fail("ranks were started"))
    with pytest.raises(ConfigError, match="unknown option 'compler'"):
        generate(folder, [[1]], device="cpu", options={"compler": "eager"})
    monkeypatch.setenv("PP_PIECEWISE_PADDING", "sometimes")
    for command in (["generate", str(folder), "--prompt", "1"], ["demo"], ["check", str(folder)]):
        assert main([*command, "--device", "cpu"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{command[0]}: environment variable PP_PIECEWISE_PADDING has the value 'sometimes'")


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("config.json", "{oops", "its config.json cannot be used: It looks like the config file at"),
        (
            "config.json",
            '{"model_type": "no such"}',
            "its config.json cannot be used: The checkpoint you are trying to",
        ),
        ("config.json", "{}", "its config.json cannot be used: Unrecognized model in"),
        ("model.safetensors", None, "no weights there; model.safetensors or model.safetensors.index.json is expected."),
    ],
)
def test_folders_that_cannot_be_used_are_refused_in_one_line(
    file: str, content: str | None, sentence: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    assert main(["generate", str(tmp_path), "--prompt", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"generate: {tmp_path}: {sentence}")


def test_no_prompts_have_no_answers(folder: Path) -> None:
    assert generate(folder, []) == []


def test_layers_are_balanced_as_asked(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{**TINY, "vocab_size": 900, "num_hidden_layers": 6, "eos_token_id": None})
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    found = {balance: call.plan(tmp_path, [[1]], 4, balance=balance, device="cpu")[0] for balance in BALANCES}
    assert found["layers"].layer_counts == [1, 2, 1, 2]
    assert found["memory"].layer_counts == [*layer_counts_by("memory", model, decoder_plan(model), 4)] != [1, 2, 1, 2]
    assert sum(found["time"].layer_counts) == 6


def test_characters_come_when_they_are_complete() -> None:
    job = call.Job(
        model_dir="", ranks=1, layer_counts=[1], device="cpu", options={}, prompts=[[1]], max_new_tokens=9,
        end_tokens=[], max_tokens=1,
    )  # fmt: skip
    heard: list[str] = []
    vocabulary = model_folder.Vocabulary(lambda text: [], lambda tokens: bytes(tokens).decode(errors="replace"))
    answers = call.Answers(job, vocabulary, lambda token: heard.append(token.text))
    answers.hear(0, {"tokens": [[0, byte, False] for byte in "aéz".encode()]})
    answers.hear(0, {"tokens": [[0, "é".encode()[0], True]]})
    assert heard == ["a", "", "é", "z", "\ufffd"]


# The command


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pp_piecewise_backend", "generate", *arguments]
    command += ["--device", "cpu", "--compiler", "eager"]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=SECONDS)


def test_the_command_streams_one_answer_and_numbers_several(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(target: str, count: int, job: Any, on_event: Any) -> None:
        for at in range(2):
            for prompt in reversed(range(len(job["prompts"]))):
                on_event(0, {"tokens": [[prompt, 10 * prompt + at, at == 1]]})

    monkeypatch.setattr(call, "run_ranks", answer)
    assert main(["generate", str(folder), "--device", "cpu", "--prompt", "5,6", "--prompt", "7"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "[1] 10,11\n[0] 0,1\n"
    assert printed.err == ""  # the bar is for terminals
    assert main(["generate", str(folder), "--device", "cpu", "--prompt", "5,6"]) == 0
    assert capsys.readouterr().out == "0,1\n"


def test_no_bar_runs_through_answers_on_a_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(target: str, count: int, job: Any, on_event: Any) -> None:
        for prompt in range(len(job["prompts"])):
            on_event(0, {"tokens": [[prompt, 7, False], [prompt, 8, True]]})

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def shown(*prompts: str) -> str:
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "stderr", terminal)
        assert main(["generate", str(folder), "--device", "cpu", *(f"--prompt={prompt}" for prompt in prompts)]) == 0
        return terminal.getvalue()

    monkeypatch.setattr(call, "run_ranks", answer)
    assert shown("5,6") == "7,8\n"
    several = shown("5,6", "7")
    assert "pipeline: " in several and len(re.findall(r"\r *\r\[[01]\] 7,8\n", several)) == 2

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    generate(folder, [[5]], device="cpu", on_token=lambda token: None)
    assert terminal.getvalue() == ""
    generate(folder, [[5]], device="cpu")
    assert "pipeline: " in terminal.getvalue()


@pytest.mark.slow
@pytest.mark.process
def test_the_command_with_ranks_of_its_own_and_a_rank_that_fails(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("5,6\n\n7\n")
    done = run_command(str(folder), "--prompts", str(tmp_path / "prompts"), "--max-new-tokens", "3", "--ranks", "2")
    assert done.returncode == 0, done.stderr
    assert [line[:4] for line in sorted(done.stdout.splitlines())] == ["[0] ", "[1] "]
    weights = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    failed = run_command(str(tmp_path), "--prompt", "5,6")
    assert failed.returncode == 1 and failed.stdout == ""
    assert re.search(r"^generate: rank [01] of 2 failed: SafetensorError: ", failed.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere", "--prompt", "1"], "generate: nowhere: no config.json there"),
        (["nowhere"], "generate: there is no prompt: give --prompt TEXT or --prompts FILE."),
        (["nowhere", "--prompts", "no_file"], "generate: --prompts no_file: No such file or directory."),
        (["nowhere", "--prompts", str(NOT_TEXT)], "codec can't decode byte"),
    ],
)
def test_bad_arguments_of_the_command(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *arguments]) == 2
    assert sentence in capsys.readouterr().err


TORCHRUN_PROGRAM = """
import sys
import torch.distributed as dist
from pp_piecewise_backend.integrations.huggingface import generate
for seed in (1, 2):  # a second call in the same processes
    got = generate(sys.argv[1], [[5, 6], [7, 8, 9]], max_new_tokens=4, device="cpu", options={"compiler": "eager"})
if dist.get_rank() == 0:
    print([one.tokens for one in got])
else:
    assert got == []
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.process
def test_under_torchrun_its_processes_are_the_ranks(folder: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(TORCHRUN_PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(CHECKOUT), str(TESTS)])}
    done = subprocess.run(
        [*torchrun, str(program), str(folder)], env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(eagerly(folder, [[5, 6], [7, 8, 9]], 4))

"""The command line: help texts, and errors that say what to do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import pp_piecewise_backend as ppb
from checkout import CHECKOUT
from pp_piecewise_backend import __main__
from pp_piecewise_backend.__main__ import main
from pp_piecewise_backend.demo import command
from pp_piecewise_backend.demo.questions import OWN_MODEL_DIR


def test_help_without_the_demo_dependencies() -> None:
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "import runpy; sys.argv[1:] = ['demo', '--help']\n"
        "runpy.run_module('pp_piecewise_backend', run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    text = " ".join(result.stdout.split())
    for option in ("--ranks", "--model", "--prompt", "--questions", "--device", "--compiler", "--graphs"):
        assert option in text
    assert 'backend="pp_piecewise"' in text
    assert "cuda: one GPU per rank" in text


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    assert "demo" in capsys.readouterr().out


BAD_ARGUMENTS = [
    (["dance"], "invalid choice: 'dance'"),
    (["demo", "--compiler", "gcc"], "invalid choice: 'gcc'"),
    (["demo", "--ranks", "two"], "invalid int value: 'two'"),
    (["demo", "--ranks", "5"], "--ranks 5: the decoder has 4 layers, so 1 to 4 is possible"),
    (["demo", "--ranks", "0"], "--ranks 0: at least 1"),
    (["demo", "--questions", "201"], "--questions 201: 1 to 200 is possible"),
    (["demo", "--questions", "0"], "--questions 0: 1 to 200 is possible"),
    (["demo", "--prompt", "1+2", "--questions", "3"], "exclude one another"),
    (["demo", "--prompt", "what?"], "got 'what?'. Write for example 12+34"),
    (["demo", "--max-new-tokens", "0"], "--max-new-tokens 0: at least 1"),
    (["demo", "--graphs", "cuda", "--device", "cpu"], "--graphs cuda needs --device cuda"),
    (["demo", "--model", "nowhere"], "--model nowhere: no config.json there"),
]


def test_it_runs_without_an_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it after >&-
    assert main(["env"]) == 0


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments_end_with_code_2_and_say_why(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_they_are_refused_before_torch_is_imported() -> None:
    cases = [case for case in BAD_ARGUMENTS if case[0][0] == "demo"]
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from pp_piecewise_backend.__main__ import main\n"
        f"for arguments, _ in {cases!r}:\n"
        "    try: code = main(arguments)\n"
        "    except SystemExit as ended: code = ended.code\n"
        "    assert code == 2, arguments"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [message for _, message in cases if message not in done.stderr] == []


def test_alone_it_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: ") and "demo" in printed and "--version" in printed


def test_versions_without_an_import_of_torch() -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from pp_piecewise_backend.__main__ import main\n"
        "sys.exit(main(['--version']))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [f"pp_piecewise_backend {ppb.__version__}", f"torch {torch.__version__}"]


@pytest.mark.parametrize(
    ("ended_by", "code", "line"),
    [
        (KeyboardInterrupt, 130, "demo: interrupted\n"),
        (BrokenPipeError, 141, "demo: stopped, since what reads its output has ended\n"),
    ],
)
def test_what_stops_a_command_from_outside_is_one_line(
    ended_by: type[BaseException],
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(options: object) -> int:
        raise ended_by

    monkeypatch.setattr(command, "run", run)
    assert main(["demo"]) == code
    assert capsys.readouterr().err == line


def test_a_closed_pipe_is_no_traceback_at_exit() -> None:
    """What was printed, but not written yet, is dropped."""
    program = (
        "import sys\nfrom pp_piecewise_backend.__main__ import main\nsys.stdin.readline()\nsys.exit(main(['env']))"
    )
    buffered = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=CHECKOUT,
        env=buffered,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as env:
        assert env.stdin is not None and env.stdout is not None and env.stderr is not None
        env.stdout.close()
        env.stdin.write("\n")
        env.stdin.close()
        said = env.stderr.read()
        assert env.wait(timeout=60) == 141 and said == "env: stopped, since what reads its output has ended\n"


def test_the_installed_command_is_this_one() -> None:
    text = (CHECKOUT / "pyproject.toml").read_text()
    (line,) = re.findall(r"^\[project\.scripts\]\n(.*)$", text, flags=re.MULTILINE)
    assert line == f'{__main__.CONSOLE_SCRIPT} = "{main.__module__}:{main.__name__}"'


@pytest.mark.parametrize("called", ["/bin/pp-piecewise", "/package/__main__.py"])
def test_help_shows_the_command_as_it_was_called(
    called: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    main([])
    by = "pp-piecewise" if "bin" in called else "python -m pp_piecewise_backend"
    assert capsys.readouterr().out.startswith(f"usage: {by} [-h]")


def test_cuda_without_enough_gpus_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main(["demo", "--device", "cuda"]) == 2
    assert "2 ranks need 2 GPUs (NCCL wants one for each), there are 1" in capsys.readouterr().err


@pytest.mark.parametrize(("gpu_count", "device"), [(0, "cpu"), (1, "cpu"), (2, "cuda"), (3, "cuda")])
def test_auto_takes_gpus_only_when_there_is_one_per_rank(
    gpu_count: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu_count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpu_count)
    job = plan().job
    assert (job.device, job.options["graphs"]) == (device, "cuda" if device == "cuda" else "emulate")


def plan(*arguments: str) -> command.Task:
    from pp_piecewise_backend.__main__ import build_parser

    return command.plan(build_parser().parse_args(["demo", *arguments]))


def test_the_default_job_asks_200_questions() -> None:
    task = plan("--device", "cpu")
    job = task.job
    assert job.ranks == 2
    assert job.options == {"compiler": "inductor", "graphs": "emulate", "capture_sizes": "1"}
    assert len(job.prompts) == len(task.texts) == 200 and task.right is not None
    assert {len(prompt) for prompt in job.prompts} == {9}
    assert job.max_new_tokens == 6 and job.end_tokens == [14]


def test_one_prompt_has_no_known_answer() -> None:
    task = plan("--prompt", "12+34", "--ranks", "3", "--compiler", "eager")
    assert task.texts == ["12+34"] and task.right is None
    assert (task.job.ranks, len(task.job.prompts), task.job.options["compiler"]) == (3, 1, "eager")
    assert task.vocabulary.decode(task.job.prompts[0]) == "^210+430="
    assert len(plan("--questions", "7").job.prompts) == 7
    assert plan("--graphs", "off").job.options["graphs"] == "off"


def test_another_decoder_needs_a_prompt_of_its_token_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers.LlamaConfig(vocab_size=50, num_hidden_layers=6, eos_token_id=[2, 3]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()  # not read
    assert main(["demo", "--model", str(tmp_path)]) == 2
    assert "give a --prompt" in capsys.readouterr().err
    for bad in ["hello", "1,50", "-1", ""]:
        assert main(["demo", "--model", str(tmp_path), "--prompt", bad]) == 2
        error = capsys.readouterr().err
        assert "has no tokenizer, so a prompt must be comma-separated token ids in 0..49" in error
    task = plan("--model", str(tmp_path), "--prompt", "1, 49,3", "--ranks", "6", "--max-new-tokens", "4")
    assert task.job.prompts == [[1, 49, 3]] and task.job.end_tokens == [2, 3] and task.job.max_new_tokens == 4
    assert task.vocabulary.decode([4, 5]) == "4,5"


def test_an_architecture_without_a_plan_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers.GPT2Config().save_pretrained(tmp_path)
    assert main(["demo", "--model", str(tmp_path), "--prompt", "1"]) == 2
    assert "the architecture 'gpt2' has no pp_plan" in capsys.readouterr().err


def test_a_tokenizer_in_the_folder_is_used(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="transformers' own dependency")
    transformers.LlamaConfig(vocab_size=3, num_hidden_layers=2).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()  # not read
    model = tokenizers.models.WordLevel({"one": 0, "two": 1, "[UNK]": 2}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    task = plan("--model", str(tmp_path), "--prompt", "two one two")
    assert task.job.prompts == [[1, 0, 1]]
    assert task.vocabulary.decode([0, 1]) == "one two"


def test_the_package_carries_its_decoder() -> None:
    assert {"config.json", "model.safetensors"} <= {file.name for file in OWN_MODEL_DIR.iterdir()}

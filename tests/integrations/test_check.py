"""``check``: sizes and prompts, what counts as rounding, the exit code, and decoders that are broken on purpose."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import started_in_tests
from checkout import CHECKOUT, TESTS
from models.tiny_decoders import DECODERS, TINY, tiny_decoder
from pp_piecewise_backend.__main__ import build_parser, main
from pp_piecewise_backend.errors import RankFailed
from pp_piecewise_backend.integrations.check import command
from pp_piecewise_backend.integrations.check.compare import compare, error, load_wide, logits_of
from pp_piecewise_backend.integrations.check.job import edges, prompts_at

SECONDS = 850
"""Inductor compiles three pieces of each stage twice, on ranks and to find the piece; that may be a busy machine."""


def test_edges_are_the_smallest_and_the_largest_calls_of_each_bucket() -> None:
    assert edges({"capture_sizes": "1,4"}, 9) == [1, 2, 4, 5, 9]
    assert edges({}, 4) == [1, 2, 3, 4]
    prompts = prompts_at([1, 4, 9], vocabulary_size=50)
    assert [len(prompt) for prompt in prompts] == [2, 5, 10] and prompts == prompts_at([1, 4, 9], 50)
    assert all(0 <= token < 50 for prompt in prompts for token in prompt)


def test_as_far_from_right_as_eager_is_rounding() -> None:
    right = [torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64)] * 2
    eager = [logits.float() + 1e-3 for logits in right]
    assert compare([logits.float() - 7e-3 for logits in right], eager, right).wrong_prompts == ()
    found = compare([eager[0], right[1].float() + 9e-3], eager, right)
    assert found.wrong_prompts == (1,) and found.pipeline_error == pytest.approx(9e-3, rel=1e-3)
    assert (found.tokens, found.same_tokens) == (4, 4)
    swapped = compare([eager[0].flip(1), eager[1]], eager, right)
    assert swapped.same_tokens == 2 and swapped.wrong_prompts == (0,)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_experts_run_in_a_wider_dtype(name: str, tmp_path: Path) -> None:
    model = tiny_decoder(name)
    model.save_pretrained(tmp_path)
    wide = load_wide(str(tmp_path), torch.float64)
    (logits,), (right,) = (logits_of(one, [[5, 9, 33]]) for one in (model, wide))
    assert right.dtype is torch.float64 and 0 < error(logits, right) < 1e-4


def test_no_number_is_equal_only_to_no_number() -> None:
    one, none = torch.tensor([1.0]), torch.tensor([float("nan")])
    assert error(none, none) == 0 and error(one, none) == error(none, one) == float("inf")
    assert compare([none[None]], [one[None]], [one[None]]).wrong_prompts == (0,)


def test_reasons_that_differ_in_numbers_only_are_one() -> None:
    counts = [{"index 7 of 16": 1, "padding off at 3": 2}, {"index * of 8": 4, "padding off at 3": 1}]
    assert command.reason_lines(counts) == ["  5 x index * of *", "  3 x padding off at 3"]


# The command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A decoder whose weights are stored in bfloat16."""
    made = tmp_path / "decoder"
    tiny_decoder("llama", layers=2).bfloat16().save_pretrained(made)
    return made


@pytest.mark.process
def test_a_decoder_passes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ranks").mkdir()
    monkeypatch.setattr(command, "run_ranks", started_in_tests.forked(tmp_path / "ranks"))
    arguments = ["--device", "cpu", "--compiler", "eager", "--max-tokens", "2", "--dtype", "float32"]
    assert main(["check", str(folder), *arguments]) == 0
    header, _, row = capsys.readouterr().out.splitlines()
    cells = dict(zip(header.split("  "), row.split("  "), strict=False))
    assert cells["decoder"] == "decoder" and row.endswith("passed") and " 5 of 5 " in row
    # Two stages of one layer each: one graph of all, replayed for 2, 1, 1 and 1 tokens.
    assert row.split()[-3:] == [str(2 * 4), "0", "passed"]


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["qwen3", "gemma2-window", "phi3", "mixtral", "smollm3", "gpt-oss"])
def test_decoders_of_other_architectures_pass(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert name in DECODERS
    tiny_decoder(name).bfloat16().save_pretrained(tmp_path / "decoder")
    (tmp_path / "ranks").mkdir()
    monkeypatch.setattr(command, "run_ranks", started_in_tests.forked(tmp_path / "ranks"))
    arguments = ["--device", "cpu", "--compiler", "eager", "--max-tokens", "4", "--ranks", "2,3"]
    assert main(["check", str(tmp_path / "decoder"), *arguments]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.endswith("passed")]
    assert sorted((row[2], row[4]) for row in rows) == [
        ("2", "bfloat16"), ("2", "float32"), ("3", "bfloat16"), ("3", "float32"),
    ]  # fmt: skip
    assert ("not replayed" in printed) == (name in ("mixtral", "gpt-oss"))  # experts are chosen by rows


def run_check(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(CHECKOUT), str(TESTS)])
    return subprocess.run(
        [sys.executable, "-m", "pp_piecewise_backend", "check", *arguments, "--device", "cpu", "--dtype", "float32"],
        cwd=CHECKOUT, capture_output=True, text=True, timeout=SECONDS,
        env={**os.environ, "PYTHONPATH": paths, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(900)
def test_a_compiler_that_is_broken_on_purpose_fails_and_the_piece_is_named(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{**TINY, "num_hidden_layers": 2, "hidden_act": "mish"})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "decoder")
    done = run_check(
        *(str(tmp_path / "decoder"), "--max-tokens", "2", "--graphs", "off", "--import", "models.broken_compiler"),
        cache=tmp_path / "cache",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[2].endswith("FAILED")
    assert "rank 0 (layers 0-0), piece[2] (" in done.stderr and "rank 1 (layers 1-1), piece[2] (" in done.stderr
    assert "mish" in done.stderr and "its compiled code differs from its graph by" in done.stderr


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(900)
def test_layers_that_depend_on_their_number_fail_and_the_stage_is_named(tmp_path: Path) -> None:
    from models.numbered_layers import NumberedConfig, NumberedForCausalLM

    config = NumberedConfig(**{**TINY, "num_hidden_layers": 3})
    NumberedForCausalLM(config).save_pretrained(tmp_path / "decoder")
    done = run_check(
        *(str(tmp_path / "decoder"), "--max-tokens", "2", "--compiler", "eager", "--graphs", "off", "--ranks", "3"),
        *("--import", "models.numbered_layers"),
        cache=tmp_path / "cache",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "rank 1 (layers 1-1) computes something else than these layers of the whole decoder" in done.stderr
    assert "rank 0 (layers 0-0) computes" not in done.stderr and "piece[" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "check: nowhere: no config.json there; a local folder in Hugging Face format is expected."),
        (["nowhere", "--ranks", "2,x"], "check: --ranks 2,x: numbers are expected, such as 2 or 2,3."),
        (["nowhere", "--max-tokens", "0"], "check: --max-tokens 0: at least 1 is needed."),
        (["nowhere", "--capture-sizes", "4,2"], "capture_sizes"),
        (["nowhere", "--import", "no_such_module"], "check: No module named 'no_such_module'"),
        (["DIR", "--ranks", "3"], "check: --ranks 3: the decoder has 2 layers, so 1 to 2 is possible."),
        (
            ["DIR", "--graphs", "cuda", "--device", "cpu"],
            "check: graphs cuda needs the device cuda: on the CPU, emulate",
        ),
        (["DIR", "--dtype", "float64"], "check: dtype float64: float16, bfloat16, float32 can be checked."),
    ],
)
def test_bad_arguments_end_with_code_2_and_say_why(
    arguments: list[str], sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *(str(folder) if one == "DIR" else one for one in arguments)]) == 2
    assert sentence in capsys.readouterr().err


def test_every_number_of_ranks_is_checked_in_float32_and_in_the_stored_dtype(folder: Path) -> None:
    options = build_parser().parse_args(["check", str(folder), "--ranks", "1,2", "--device", "cpu"])
    assert [(len(job.layer_counts), job.dtype) for job, _ in command.plan(options)] == [
        (1, "float32"), (1, "bfloat16"), (2, "float32"), (2, "bfloat16"),
    ]  # fmt: skip


def test_a_rank_that_fails_and_calls_without_a_program_fail_the_check(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise RankFailed("rank 1 of 2 failed: KeyError: 'x'", 1, "a traceback\n")

    shared = ["check", str(folder), "--device", "cpu", "--dtype", "float32"]
    monkeypatch.setattr(command, "run_ranks", fail)
    assert main(shared) == 1
    assert "decoder, 2 ranks, float32: rank 1 of 2 failed: KeyError: 'x'\na traceback" in capsys.readouterr().err

    def run_eagerly(target: str, count: int, job: Any, hear: Any) -> None:
        from pp_piecewise_backend.integrations.model_folder import load_whole

        torch.save(logits_of(load_whole(folder, torch.float32), job["prompts"]), folder / "logits.pt")
        why = {"first-call: the first call": 3}
        hear(0, {"replayed": {"replays": 7, "misses": 3, "calls": 2, "micro_batches": 4, "why": why}})
        hear(1, {"logits": str(folder / "logits.pt")})

    monkeypatch.setattr(command, "run_ranks", run_eagerly)
    assert main(shared) == 1
    printed = capsys.readouterr()
    assert "rank 0: 2 calls ran without a program of the backend" in printed.err
    assert "  3 x first-call: the first call" in printed.out and printed.out.splitlines()[2].endswith("FAILED")

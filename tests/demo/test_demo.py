"""The demo: questions and their split, the shipped weights, the verdict, the command with real ranks."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import started_in_tests
from checkout import CHECKOUT
from models import train_demo as train
from pp_piecewise_backend.__main__ import build_parser, main
from pp_piecewise_backend.demo import bars, command, questions, verdict
from pp_piecewise_backend.demo.questions import OWN_MODEL_DIR, Question
from pp_piecewise_backend.demo.verdict import HANDOFF_COUNTERS, cut_at_end
from pp_piecewise_backend.integrations.generation import call
from pp_piecewise_backend.integrations.generation.job import RankReport
from pp_piecewise_backend.integrations.model_folder import Vocabulary, load_whole

TIMEOUT_SECONDS = 280
HELD_OUT_DIGEST = "ad73cdcaa322be1486f7b89218ae764f65f4c4367923d8ebcb861b95ab8b9f3a"


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pp_piecewise_backend", "demo", "--device", "cpu", *arguments],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )


# Questions


def test_prompts_and_answers_are_written_least_significant_digit_first() -> None:
    question = questions.parse_question("12 - 345")
    assert question == Question(12, "-", 345)
    assert questions.decode(questions.encode_prompt(question)) == "^210-543="
    assert questions.decode(questions.encode_answer(question)) == "-3330$"
    assert questions.decode(questions.encode_answer(Question(999, "+", 999))) == "+8991$"
    assert questions.decode(questions.encode_answer(Question(7, "-", 7))) == "+0000$"


def test_answers_read_back_and_malformed_ones_do_not() -> None:
    for question in questions.held_out_questions():
        assert len(questions.encode_prompt(question)) == questions.PROMPT_TOKENS
        assert len(questions.encode_answer(question)) == questions.ANSWER_TOKENS
        assert questions.decode_answer(questions.encode_answer(question)) == str(question.answer)
    for characters in ["", "+123", "+1234", "1234$", "+12345$", "+12-4$", "$+1234"]:
        assert questions.decode_answer(questions.encode(characters)) == characters


@pytest.mark.parametrize("text", ["", "12", "1+", "+1", "1000+1", "1*2", "1+2+3", "-1+2", "a+b"])
def test_what_is_no_question_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"got '.*'\. Write for example 12\+34"):
        questions.parse_question(text)


# The split between training and held-out questions


def test_held_out_questions_never_change() -> None:
    asked = questions.held_out_questions()
    assert len(asked) == len(set(asked)) == 200
    digest = hashlib.sha256("\n".join(question.text for question in asked).encode()).hexdigest()
    assert digest == HELD_OUT_DIGEST
    assert asked == train.draw_held_out_questions()


def test_held_out_questions_cover_both_operations_all_sizes_and_both_signs() -> None:
    asked = questions.held_out_questions()
    assert {question.operation for question in asked} == {"+", "-"}
    assert {len(str(question.left)) for question in asked} == {1, 2, 3}
    assert {len(str(question.right)) for question in asked} == {1, 2, 3}
    assert min(question.answer for question in asked) < 0 < 999 < max(question.answer for question in asked)


def test_training_never_sees_the_operands_of_a_held_out_question() -> None:
    held_out = {frozenset((question.left, question.right)) for question in questions.held_out_questions()}
    forbidden = train.held_out_operands()
    batch = train.training_batch(50_000, forbidden, torch.Generator().manual_seed(0))
    place = torch.tensor([1, 10, 100])
    left, right = (batch[:, 1:4] * place).sum(1), (batch[:, 5:8] * place).sum(1)
    seen = set(map(frozenset, zip(left.tolist(), right.tolist(), strict=True)))
    assert not seen & held_out
    # The check above must be able to fail: unfiltered batches do contain them.
    unfiltered = train.training_batch(50_000, torch.zeros_like(forbidden), torch.Generator().manual_seed(0))
    left, right = (unfiltered[:, 1:4] * place).sum(1), (unfiltered[:, 5:8] * place).sum(1)
    assert set(map(frozenset, zip(left.tolist(), right.tolist(), strict=True))) & held_out


def test_training_batches_are_right_and_reproducible() -> None:
    forbidden = train.held_out_operands()
    batch = train.training_batch(500, forbidden, torch.Generator().manual_seed(3))
    assert torch.equal(batch, train.training_batch(500, forbidden, torch.Generator().manual_seed(3)))
    for row in batch.tolist():
        written = questions.decode(row)
        question = Question(int(written[3:0:-1]), written[4], int(written[7:4:-1]))
        assert row == questions.encode_prompt(question) + questions.encode_answer(question)


# Training and the shipped weights


def test_the_trainer_learns_and_writes_a_decoder(tmp_path: Path) -> None:
    assert train.main(["--out", str(tmp_path), "--steps", "2", "--batch-size", "8"]) == 0
    trained = load_whole(str(tmp_path))
    fresh = train.new_decoder()
    assert not torch.equal(trained.lm_head.weight, fresh.lm_head.weight)
    shipped = load_whole(str(OWN_MODEL_DIR))
    assert {name: tensor.shape for name, tensor in trained.state_dict().items()} == {
        name: tensor.shape for name, tensor in shipped.state_dict().items()
    }


def test_the_loss_falls() -> None:
    model = train.new_decoder()
    first = train.train(model, steps=1, batch_size=64, peak_learning_rate=3e-3)
    last = train.train(model, steps=40, batch_size=64, peak_learning_rate=3e-3)
    assert last < 0.75 * first


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [train.learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert max(rates) == rates[50] == 1.0 and rates[0] == 0.02
    assert rates[50:] == sorted(rates[50:], reverse=True) and rates[-1] < 0.011


def test_the_shipped_decoder_is_small_and_right() -> None:
    size_bytes = sum(file.stat().st_size for file in OWN_MODEL_DIR.glob("*.safetensors"))
    assert 0 < size_bytes <= 5 * 2**20
    decoder = load_whole(str(OWN_MODEL_DIR))
    assert isinstance(decoder, transformers.LlamaForCausalLM) and decoder.config.num_hidden_layers >= 4
    assert train.held_out_accuracy(decoder) >= 0.98


# The verdict


HANDOFF = {name: 10 + index for index, name in enumerate(HANDOFF_COUNTERS)}


def report(rank: int = 0, programs_ran: int = 12) -> RankReport:
    counters = {"programs": 2, "pieces": 6, "pieces_compiled": 3, "eager_steps": 48, **HANDOFF}
    return RankReport(
        rank=rank,
        layers=[2 * rank, 2 * rank + 1],
        counters={**counters, "microbatches": 12, "calls": programs_ran},
        eager_parts={"index_copy_, scaled_dot_product_attention: split op": 4},
        load_seconds=0.5,
        compile_seconds=2.25,
        generate_seconds=1.5,
        times="bubble 23 %",
    )


def test_first_differences_name_prompt_position_and_tokens() -> None:
    assert verdict.problems(["1+1", "2+2"], [[1, 2], [3]], [[1, 2], [3]], [report()]) == []
    assert verdict.problems(["a", "b", "c"], [[1, 2, 3], [4, 5], [6]], [[1, 9, 9], [4], [6, 7]], [report()]) == [
        "prompt 0 (a), new token 1: eager gives token 2, the pipeline token 9",
        "prompt 1 (b), new token 1: eager gives token 5, the pipeline nothing more",
        "prompt 2 (c), new token 1: eager gives nothing more, the pipeline token 7",
    ]
    with pytest.raises(ValueError, match="shorter"):
        verdict.problems(["a", "b"], [[1], [2]], [[1]], [report()])


def test_equal_tokens_are_accepted() -> None:
    tokens = [[1, 2], [3]]
    assert verdict.problems(["1+1", "2+2"], tokens, tokens, [report(), report(rank=1)], right=tokens) == []


def test_a_call_without_a_program_fails() -> None:
    (problem,) = verdict.problems(["1+1"], [[1]], [[1]], [report(programs_ran=9)])
    assert "rank 0: 3 of 12 calls ran without a program" in problem


def test_low_accuracy_fails_although_the_tokens_agree() -> None:
    texts = [str(index) for index in range(100)]
    right = [[index] for index in range(100)]
    for wrong_count, problem_count in [(2, 0), (3, 2)]:
        tokens = [[-1]] * wrong_count + right[wrong_count:]
        assert len(verdict.problems(texts, tokens, tokens, [report()], right=right)) == problem_count


@pytest.mark.parametrize(("generated", "exit_code"), [([1, 2], 0), ([1, 3], 1)])
def test_one_other_token_fails_the_command(
    generated: list[int], exit_code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(target: str, count: int, job: Any, on_event: Any) -> None:
        on_event(0, {"tokens": [[0, token, token == generated[-1]] for token in generated]})
        on_event(0, {"report": report().model_dump()})

    monkeypatch.setattr(call, "run_ranks", run)
    monkeypatch.setattr(verdict, "generate_eagerly", lambda *_, **__: [[1, 2]])
    job = call.Job(
        model_dir=str(OWN_MODEL_DIR), ranks=1, layer_counts=[4], device="cpu", prompts=[[0]], max_new_tokens=2,
        options={"compiler": "eager", "graphs": "off"}, end_tokens=[0], max_tokens=1,
    )  # fmt: skip
    task = command.Task(job, ["1+1"], None, Vocabulary(lambda text: [], lambda tokens: "3"))
    assert command.execute(task) == exit_code
    output = capsys.readouterr()
    assert "1+1 -> 3" in output.out and ("new token 1: eager gives token 2" in output.err) == bool(exit_code)


def test_tables_show_what_was_measured() -> None:
    reports = [report(), report(rank=1)]
    answers = verdict.answers_table([[1, 2], [4]], 0.125, [[1, 2], [3]], reports, right=[[1, 2], [3]])
    eager, pipeline = answers.splitlines()[2:]
    assert eager.split()[-5:] == ["process", "50.0%", "3", "-", "0.12"]
    assert "100.0%" in pipeline and "2 of 3" in pipeline and "1.50" in pipeline
    assert verdict.ranks_table(reports).splitlines()[3].split() == [
        "1",
        "2-3",
        "12",
        "2",
        "6",
        "3",
        "48",
        "0.50",
        "2.25",
    ]
    header, _, first, second = verdict.handoff_table(reports).splitlines()
    assert header.split() == ["rank", *HANDOFF_COUNTERS]
    assert [line.split() for line in (first, second)] == [
        [rank, *(str(count) for count in HANDOFF.values())] for rank in ("0", "1")
    ]
    assert verdict.eager_lines(reports) == ["  8 x index_copy_, scaled_dot_product_attention: split op"]
    assert max(map(len, verdict.eager_lines(reports, width=40))) <= 40


def test_tokens_after_the_end_do_not_count() -> None:
    assert cut_at_end([5, 6, 2, 2, 7], [2]) == [5, 6, 2]
    assert cut_at_end([5, 6], [2]) == [5, 6]
    assert cut_at_end([5, 6], []) == [5, 6]


def test_reports_survive_their_files() -> None:
    assert RankReport.model_validate_json(report().model_dump_json()) == report()


# Who was busy when


def traced(*spans: tuple[int, int, float, float], name: str = "ppb.replay") -> dict[str, Any]:
    """Spans ``(rank, micro-batch, begin, duration)`` as a trace has them."""
    return {
        "traceEvents": [
            {"ph": "X", "cat": "steps", "name": name, "pid": rank, "ts": ts, "dur": dur, "args": {"micro_batch": at}}
            for rank, at, ts, dur in spans
        ]
    }


def test_bars_show_which_micro_batch_a_rank_works_on_and_when_it_waits() -> None:
    work = traced((0, 8, 1000, 20), (1, 8, 1020, 20), (0, 11, 1030, 10), (1, 11, 1060, 20))
    waits = traced((0, 11, 1040, 40), name="wait for feedback")
    both = {"traceEvents": [*work["traceEvents"], *waits["traceEvents"], {"ph": "M", "name": "process_name", "pid": 0}]}
    heading, *lines = bars.busy_lines(both, columns=8)
    assert heading.startswith("all micro-batches, 0.1 ms from left to right")
    assert lines == ["  rank 0 |88 1    |", "  rank 1 |  88  11|"]


def test_bars_of_a_long_run_are_of_its_middle() -> None:
    spans = [(rank, at, 10.0 * (2 * at + rank), 10.0) for at in range(100) for rank in range(2)]
    heading, *lines = bars.busy_lines(traced(*spans), columns=8, shown=4)
    assert heading.startswith("micro-batches 48 to 51 of 100, 0.1 ms")
    assert lines == ["  rank 0 |8 9 0 1 |", "  rank 1 | 8 9 0 1|"]
    assert bars.busy_lines({"traceEvents": []}) == []


# Which layers lie where


@pytest.mark.parametrize(("balance", "expected"), [("layers", [1, 2, 1, 2]), ("memory", [1, 2, 2, 1]), ("time", None)])
def test_the_job_says_how_many_layers_each_rank_has(balance: str, expected: list[int] | None, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2, vocab_size=400
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    arguments = ["demo", "--device", "cpu", "--ranks", "4", "--model", str(tmp_path), "--prompt", "1,2"]
    counts = command.plan(build_parser().parse_args([*arguments, "--balance", balance])).job.layer_counts
    assert sum(counts) == 6 and len(counts) == 4
    assert expected in (counts, None)


# The command, with real processes


def handoff_of(output: str) -> list[dict[str, int]]:
    """What the demo's table says of each rank."""
    lines = output.splitlines()
    begin = next(index for index, line in enumerate(lines) if "stage_inputs_in_place" in line)
    names = lines[begin].split()
    rows = []
    for line in lines[begin + 2 :]:
        if not line.strip():
            break
        rows.append(dict(zip(names, map(int, line.split()), strict=True)))
    return rows


def test_the_pipeline_answers_as_eager_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The demo itself, which README runs first, starts its ranks; here they are forked."""
    monkeypatch.setattr(call, "run_ranks", started_in_tests.forked(tmp_path))
    code = main(["demo", "--device", "cpu", "--compiler", "eager", "--questions", "4"])
    printed = capfd.readouterr()
    assert code == 0, printed.err
    check_answers(printed.out, printed.err, ranks=2, asked=4)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "asked"), [(2, 200), (4, 200)])
def test_the_pipeline_answers_all_questions_as_eager_does(ranks: int, asked: int) -> None:
    result = run_demo("--ranks", str(ranks), "--compiler", "eager", "--questions", str(asked))
    assert result.returncode == 0, result.stdout + result.stderr
    check_answers(result.stdout, result.stderr, ranks, asked)


def check_answers(printed: str, errors: str, ranks: int, asked: int) -> None:
    assert f"{asked} prompts, {ranks} ranks" in printed
    assert f"{6 * asked} of {6 * asked}" in printed
    assert "scaled_dot_product_attention" in printed
    assert printed.startswith("A decoder is cut into") and "That shows that replays are right, and is slower" in printed
    assert "bubble" in printed and len(re.findall(r"^  rank \d \|[\d ]+\|$", printed, flags=re.MULTILINE)) == ranks
    assert "capturing" not in errors and "pipeline:" not in errors  # bars are for terminals
    counts = handoff_of(printed)
    assert [row["rank"] for row in counts] == list(range(ranks))
    calls = asked * questions.ANSWER_TOKENS  # a prompt, and all of its answer but the end
    layers = load_whole(str(OWN_MODEL_DIR)).config.num_hidden_layers // ranks
    for row in counts:
        assert row["graph_misses"] == 0 and calls < row["replays"] < calls * (1 + layers)
        assert (row["replays"] - calls) % layers == 0, "a call replays all of its pieces, or one graph of everything"
        assert row["stage_inputs_in_place"] == (calls if row["rank"] > 0 else 0)
        for name in ("proxy_copies", "recv_allocations", "pickles", "blocking_metadata"):
            assert row[name] == 0, (name, counts)


@pytest.mark.slow
def test_another_decoder_and_token_ids(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=None,
        )
    ).save_pretrained(tmp_path)
    result = run_demo(
        *("--model", str(tmp_path), "--prompt", "1,15,7", "--ranks", "3"),
        *("--max-new-tokens", "5", "--compiler", "eager", "--graphs", "off"),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert all(row["replays"] == row["graph_misses"] == 0 for row in handoff_of(result.stdout))
    assert "captured nothing" not in result.stderr  # as was asked for
    assert "1,15,7 -> " in result.stdout and "5 of 5" in result.stdout


@pytest.mark.slow
def test_one_rank_alone_needs_no_feedback() -> None:
    result = run_demo("--ranks", "1", "--questions", "3", "--compiler", "eager")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "18 of 18" in result.stdout


@pytest.mark.slow
def test_a_rank_that_fails_fails_the_command_and_shows_its_error(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(OWN_MODEL_DIR, broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    result = run_demo("--model", str(broken), "--prompt", "1+1", "--compiler", "eager")
    assert result.returncode == 1
    assert "of 2 failed: " in result.stderr
    assert "SafetensorError" in result.stderr


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("when", ["imports", "ranks start", "ranks run"])
def test_ctrl_c_ends_all_ranks_in_one_line(when: str) -> None:
    arguments = [sys.executable, "-m", "pp_piecewise_backend", "demo", "--device", "cpu", "--compiler", "eager"]
    # In a session of its own, as on a terminal: the interrupt goes to all of its processes.
    demo = subprocess.Popen(
        arguments,
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # where the tests run in the background
    )
    try:
        assert demo.stdout is not None
        if when == "imports":
            while "libtorch" not in Path(f"/proc/{demo.pid}/maps").read_text():
                time.sleep(0.01)
        else:
            while "200 prompts, 2 ranks" not in demo.stdout.readline():
                assert demo.poll() is None
            time.sleep(0.5 if when == "ranks start" else 8)
        assert demo.poll() is None
        os.killpg(demo.pid, signal.SIGINT)
        _, said = demo.communicate(timeout=20)  # until no process that writes to it is left
        assert (demo.returncode, said) == (130, "demo: interrupted\n")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(demo.pid, signal.SIGKILL)

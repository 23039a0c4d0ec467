"""The report: what a reader can tell from it, and that it stays short however deep the model is."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pp_piecewise_backend as ppb
from models.hf import greedy_decode, make_model, make_prompts
from models.toy_stage import NAMED_OPS, ToyStage
from pp_piecewise_backend.backend import backend
from pp_piecewise_backend.debug import describe, explain
from pp_piecewise_backend.debug.text import fold, ranges
from pp_piecewise_backend.runtime.program import Program, UnsplitProgram
from tiers import slow_but

WIDTH, MOST_LINES = 120, 60


pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")


def assert_fits(report: str, lines: int = MOST_LINES) -> None:
    assert max(len(line) for line in report.splitlines()) <= WIDTH
    assert len(report.splitlines()) <= lines


def flat(report: str) -> str:
    """The report with wrapped lines joined, to look for sentences."""
    return " ".join(report.split())


# ---------------------------------------------------------------------------- whole reports


def _llama_programs(num_layers: int) -> tuple[Any, ...]:
    model = make_model("llama", num_layers)
    run = torch.compile(model, backend="pp_piecewise", options={"compiler": "eager"})
    prompts = make_prompts([5, 7] if num_layers <= 8 else [5])
    greedy_decode(run, model.config, prompts, cache_kind="static", steps=1)
    return ppb.programs()


@pytest.mark.parametrize("num_layers", slow_but([2], [2, 8, 32]))
def test_llama_of_any_depth_fits_a_screen_and_names_everything(num_layers: int) -> None:
    programs = _llama_programs(num_layers)
    assert len(programs) == (3 if num_layers <= 8 else 2)
    for program in programs:
        report = program.explain()
        assert_fits(report)
        text = flat(report)
        assert f"{num_layers + 1} compute pieces (3 distinct), {num_layers} eager steps" in text
        # every split, where and why
        assert f"split at scaled_dot_product_attention ({num_layers} ops)" in text
        assert "split op scaled_dot_product_attention" in text
        assert "add_ writes graph input cumulative_length" in text
        # every input: its kind, how many, which, why
        layers = f"{{0..{num_layers - 1}}}"
        assert f"state past_key_values.layers[{layers}].cumulative_length x{num_layers} int64[]" in text
        assert re.search(r"per-token input_ids int64\[1, \w+\]: dimension 1 is the token count", text)
        assert f"parameter self.model.layers.{layers}.self_attn.q_proj.weight x{num_layers} float32[32, 32]" in text
        assert "parameter self.model.rotary_emb.inv_freq float32[4]: module buffer" in text
        if any(graph_input.label == "keys" for graph_input in program.inputs):
            assert f".layers[{layers}].keys x{num_layers} float32[1, 2, 64, 8]: the graph writes it" in text
            assert "index_copy_ writes graph input keys; index_copy_ writes graph input values" in text
        assert_every_input_is_counted(program, report)
        assert_every_step_is_counted(program, report)
    assert_fits(ppb.explain(), MOST_LINES * len(programs) + 5)


def assert_every_input_is_counted(program: Program, report: str) -> None:
    """The counts of the folded lines add up, kind by kind."""
    section = report[report.index("  inputs (") : report.index("  steps (")]
    entries = re.findall(r"^    ([a-z-]+) +(.*(?:\n {18}.*)*)", section, re.MULTILINE)
    counted: dict[str, int] = {}
    for kind, text in entries:
        count = re.search(r" x(\d+) ", " ".join(text.split(":")[0].split()) + " ")
        counted[kind] = counted.get(kind, 0) + (int(count.group(1)) if count else 1)
    expected: dict[str, int] = {}
    for graph_input in program.inputs:
        expected[graph_input.kind] = expected.get(graph_input.kind, 0) + 1
    assert counted == expected


def assert_every_step_is_counted(program: Program, report: str) -> None:
    """Unfolding the step lines gives the program's steps, in order."""
    kinds: list[str] = []
    repeats, period, block = 0, 0, []
    for line in report[report.index("  steps (") :].splitlines()[1:]:
        if folded := re.match(r"    piece\[(\d+)\.\.(\d+)\]: (\d+) times the same (\d+) steps:", line):
            first, last, repeats, period = map(int, folded.groups())
            assert first == len(kinds) and last == first + repeats * period - 1
            block = []
        elif single := re.match(r"    (?:  )?piece\[(\d+)\] +(eager|compute):", line):
            if repeats:
                assert int(single.group(1)) == len(kinds) + len(block)
                block.append(single.group(2))
                if len(block) == period:
                    kinds += block * repeats
                    repeats = 0
            else:
                assert int(single.group(1)) == len(kinds)
                kinds.append(single.group(2))
    assert kinds == [piece.kind for piece in program.pieces]


@pytest.mark.compat
@pytest.mark.parametrize("num_layers", [2, 8])
def test_toy_stage(num_layers: int) -> None:
    stage = ToyStage(num_layers)
    run = torch.compile(stage, backend="pp_piecewise", options={"compiler": "eager", **NAMED_OPS})
    for tokens in (5, 6):
        run(**stage.make_inputs(tokens))
    for program in ppb.programs():
        report = program.explain()
        assert_fits(report)
        text = flat(report)
        assert f"toy::attention* ({num_layers} ops)" in text
        for label in ("hidden_states", "residual"):
            assert f"stage-input {label} float32[" in text and f"registered as '{label}'" in text
        assert f"k_cache x{num_layers} float32[64, 2, 16]: module buffer that the graph writes" in text
        assert re.search(r"reads (hidden_states, residual|residual, hidden_states)", text) and "returns results" in text
        assert num_layers == 2 or f"{num_layers - 1} times the same 2 steps" in text
        assert_every_input_is_counted(program, report)
        assert_every_step_is_counted(program, report)
    assert "token-count" in flat(ppb.programs()[-1].explain())


def test_caches_in_a_list_fold_with_their_indices() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linears = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
            self.caches = [torch.zeros(8, 4) for _ in range(6)]

        def forward(self, hidden_states: Tensor, positions: Tensor) -> Tensor:
            for linear, cache in zip(self.linears, self.caches, strict=True):
                x = linear(hidden_states)
                cache[positions] = x
                q = (x + cache.sum(0))[None, None]
                hidden_states = torch.nn.functional.scaled_dot_product_attention(q, q, q)[0, 0]
            return hidden_states

    torch.compile(Listed(), backend="pp_piecewise", options={"compiler": "eager"})(torch.randn(3, 4), torch.arange(3))
    (program,) = ppb.programs()
    report = program.explain()
    assert "self.caches[{0..5}] x6" in report
    assert re.search(r"times the same \d steps", report)
    assert re.search(r"writes graph input caches\[\{\d\.\.\d\}\]", flat(report))
    assert_every_input_is_counted(program, report)
    assert_every_step_is_counted(program, report)


def test_long_names_are_wrapped() -> None:
    name = "AStageWithAVeryLongClassName" * 6
    attribute = "a_linear_layer_with_a_name_that_nobody_would_type_twice_" * 4

    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, attribute, nn.Linear(4, 4))

        def forward(self, hidden_states: Tensor, **more: Tensor) -> Tensor:
            return getattr(self, attribute)(hidden_states) + sum(more.values())

    Long.__name__ = name
    arguments = {f"argument_{index}_" + "x" * 130: torch.randn(3, 4) for index in range(2)}
    torch.compile(Long(), backend="pp_piecewise", options={"compiler": "eager"})(torch.randn(3, 4), **arguments)
    (program,) = ppb.programs()
    report = program.explain()
    assert_fits(report)
    assert name in re.sub(r"\n *", "", report) and attribute in re.sub(r"\n +", "", report)
    assert_fits(ppb.explain())


# ------------------------------------------------------------------------- what went otherwise


def _small_program(options: dict[str, Any] | None = None) -> Program:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            q = self.first(x)[None, None]
            return self.second(torch.nn.functional.scaled_dot_product_attention(q, q, q)[0, 0])

    options = {"compiler": "eager", **(options or {})}
    torch.compile(Small(), backend="pp_piecewise", options=options)(torch.randn(3, 4))
    (program,) = ppb.programs()
    assert isinstance(program, Program)
    return program


@pytest.mark.compat
def test_names_that_were_not_found() -> None:
    assert "not found stage inputs hidden_states, residual" in flat(_small_program().explain())


def test_pieces_that_did_not_compile_or_ran_plain() -> None:
    program = _small_program()
    failure = "inductor could not compile this piece: RuntimeError: " + "no C++ compiler found\n" * 200
    program.compiled = tuple(None if c is None else dataclasses.replace(c, failure=failure) for c in program.compiled)
    program.plain_runs[2] = "the compiled code does not hold for sizes [5000]"
    program.whole_plain_run = "inputs that the graph writes share memory"
    report = program.explain()
    assert_fits(report)
    assert "ran as plain FX the whole graph: inputs that the graph writes share memory" in flat(report)
    compute = [piece.index for piece in program.pieces if piece.kind == "compute"]
    assert len(compute) == 2
    text = flat(report)
    assert f"not compiled piece[{compute[0]}, {compute[1]}]: inductor could not compile this piece" in text
    assert text.count("not compiled") == 1
    assert "ran as plain FX piece[2]: the compiled code does not hold for sizes [5000]" in text


def test_objects_have_names_instead_of_addresses() -> None:
    """Reports of two runs differ only where the runs do, and layers with objects of their own fold."""
    program = _small_program()
    reports = []
    for addresses in ((0x7F3A5C0041D0, 0x55E0A1B2C3D4), (0x7FAB12CD34E0, 0x562211AABBCC)):
        one, other = (f"<demo.Box object at {address:#x}>" for address in addresses)
        program.whole_plain_run = f"{one} is no tensor"
        program.plain_runs.update({0: f"{one} is no tensor", 2: f"{other} is no tensor"})
        reports.append(program.explain())
    assert reports[0] == reports[1] and "0x" not in reports[0]
    assert reports[0].count("<demo.Box object at #1> is no tensor") == 2
    assert "piece[2]: <demo.Box object at #2> is no tensor" in reports[0]


def test_a_program_without_a_split_says_so() -> None:
    torch.compile(lambda x: x + 1, backend="pp_piecewise", options={"compiler": "eager"})(torch.randn(3))
    (program,) = ppb.programs()
    assert "split at nothing: no op of this graph matches split_ops" in flat(program.explain())


def test_a_graph_that_is_not_split_is_explained_within_the_width() -> None:
    graph_module = torch.fx.symbolic_trace(lambda x: x + 1)
    program = backend(graph_module, [], options={"compiler": "eager"})
    assert isinstance(program, UnsplitProgram)
    assert "1 placeholders but 0 example inputs" in flat(program.explain())
    assert_fits(program.explain())


@pytest.mark.compat
def test_the_report_on_all_programs() -> None:
    assert ppb.explain().startswith("0 live programs")
    program = _small_program()
    report = ppb.explain()
    assert report.startswith("1 live program\n") and program.explain() in report


@pytest.mark.compat
@pytest.mark.parametrize("reason", ["short", "word " * 500, "x" * 1000])
def test_a_long_reason_not_to_split_is_shortened(reason: str) -> None:
    program = UnsplitProgram("Model#0", lambda: (), ppb.Config(compiler="eager"), reason)
    report = explain.explain(describe.describe(program))
    assert_fits(report, lines=10)
    assert flat(report).startswith("Model#0: not split, given whole to eager: ")
    assert reason in flat(report) or report.endswith("[...]")


def test_numbers_agree_with_what_they_count() -> None:
    report = _small_program({"graphs": "emulate"}).explain()
    assert not re.search(r"\b1 (\w+ )?(pieces|steps|calls|ops|tokens|programs|tensors|times)\b", flat(report))
    assert "2 compute pieces (2 distinct), 1 eager step, 1 call" in report


def test_a_program_shows_what_it_is() -> None:
    assert repr(_small_program()) == "<Small#0: 3 steps, 2 pieces (2 distinct), 1 call, 0 misses>"
    program = UnsplitProgram("Model#0", lambda: (), ppb.Config(), "a tensor subclass")
    program(), program()
    assert repr(program) == "<Model#0: not split, 2 calls>"


# ------------------------------------------------------------------------------------ folding


@pytest.mark.compat
@given(st.lists(st.sampled_from("abc"), max_size=60))
def test_unfolding_gives_back_the_sequence(letters: list[str]) -> None:
    signatures = [(letter,) for letter in letters]
    unfolded: list[tuple[object, ...]] = []
    for start, period, repeats in fold(signatures):
        assert start == len(unfolded) and period >= 1 and repeats >= 1
        unfolded += signatures[start : start + period] * repeats
    assert unfolded == signatures


@pytest.mark.compat
@given(st.text("ab", min_size=1, max_size=5), st.integers(3, 40), st.text("cd", max_size=3))
def test_a_repeated_block_folds_into_few_lines(block: str, repeats: int, tail: str) -> None:
    signatures = [(letter,) for letter in block * repeats + tail]
    folded = fold(signatures)
    assert folded[0][0] == 0 and folded[0][1] * folded[0][2] >= len(block) * (repeats - 1)
    assert len(folded) <= 1 + len(block) + len(tail)


@pytest.mark.compat
@given(st.sets(st.integers(0, 99), min_size=1, max_size=30))
def test_ranges_say_exactly_which_numbers(numbers: set[int]) -> None:
    found: set[int] = set()
    parts = ranges(numbers).split(", ")
    previous: int | None = None
    for part in parts:
        if ".." not in part:
            previous = int(part)
            found.add(previous)
            continue
        first, last = map(int, part.split(".."))
        # "0, 2..30": the number before a range tells its step, unless the range starts a run of its own.
        steps = [1] if previous is None or previous not in found else [1, first - previous]
        candidates = [found | set(range(first, last + 1, step)) for step in steps]
        found = next((c for c in candidates if c <= numbers and last in c), candidates[0])
        previous = last
    assert found == numbers


@pytest.mark.compat
def test_ranges() -> None:
    assert ranges([0, 1, 2, 3, 5, 8, 9]) == "0..3, 5, 8..9"
    assert ranges([0, 2, 4, 6]) == "0, 2..6"
    assert ranges([7]) == "7"
    assert ranges([0, 2]) == "0, 2"

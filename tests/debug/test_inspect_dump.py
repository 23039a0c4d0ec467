"""``inspect``: what a terminal shows of a dump, what differs between two, and what a bad dump cannot do."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pp_piecewise_backend as ppb
from checkout import CHECKOUT, PACKAGE
from dumping import Small, program_folders, run_small, run_toy_stage, summary_of
from pp_piecewise_backend.__main__ import main
from pp_piecewise_backend.config import FIELD_NAMES
from pp_piecewise_backend.debug import inspect_dump

pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["inspect", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def change_summary(folder: Path, **changes: Any) -> None:
    path = folder / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


MISSES = [
    {"reason": "first-call", "sentence": "first call of bucket 8", "pieces": 2, "tokens": 8, "call": 1},
    {"reason": "address", "sentence": "input weight moved", "pieces": 1, "tokens": 8, "call": 7},
    {"reason": "over-max", "sentence": "4096 tokens are over max_tokens 2048", "pieces": 2, "tokens": 4096, "call": 9},
]


# ------------------------------------------------------------------------------------- one dump


@pytest.mark.compat
def test_it_opens_on_an_overview_and_why_a_call_did_not_replay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_small(tmp_path)
    (folder,) = program_folders(tmp_path)
    text = shown(capsys, tmp_path)
    lines = text.splitlines()
    assert lines[:3] == [
        "1 program of 1 rank, 1 call; 0 times a piece missed its graph",
        "  rank 0 Small#0: 2 pieces (2 distinct), 1 call, graphs off",
        "",
    ]
    assert lines[4] == "why did this call not replay?"
    assert "graphs are off (graphs='auto' and no input is on a CUDA device), every" in lines[5]
    assert ppb.programs()[0].explain() in text
    assert "settings that were given: compiler=eager (option), dump_dir=" in text
    assert re.search(r"traced: nodes \d+, inputs \d+\n.*split: pieces 2.*\n.*compiled: piece 0, 2\n.*built", text)
    assert f"python {folder / 'piece_00_compute.py'}" in text
    assert shown(capsys, folder) == text == shown(capsys, folder.parent) == shown(capsys, folder / "summary.json")


def test_the_overview_has_a_line_for_each_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_toy_stage(tmp_path, sizes=(5, 6, 6, 7), graphs="emulate")
    change_summary(program_folders(tmp_path)[1], rank=1)
    lines = shown(capsys, tmp_path).splitlines()
    assert lines[:4] == [
        "2 programs of 2 ranks, 4 calls; 6 times a piece missed its graph",
        "  rank 0 ToyStage#0: 3 pieces (3 distinct), 1 call, 0 buckets captured, missed: first-call 3",
        "  rank 1 ToyStage#1: 3 pieces (3 distinct), 3 calls, 1 bucket captured, missed: first-call 3",
        "",
    ]


@pytest.fixture
def missing(tmp_path: Path) -> Path:
    """A dump with these misses."""
    run_small(tmp_path)
    (folder,) = program_folders(tmp_path)
    buckets = [{"tokens": 8, "bytes": 4096, "seconds": 0.25, "pieces": 2}]
    counters = {"calls": 12, "graph_misses": sum(miss["pieces"] for miss in MISSES), "miss_reasons": {"first-call": 2}}
    change_summary(folder, counters=counters, graphs={"mode": "emulate", "buckets": buckets, "misses": MISSES})
    return tmp_path


def test_misses_by_call_and_bucket_and_nothing_else(missing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = shown(capsys, missing).splitlines()
    assert everything[5:8] == [
        "  call 1, 8 tokens, 2 pieces: first-call: first call of bucket 8",
        "  call 7, 8 tokens, 1 piece: address: input weight moved",
        "  call 9, 4096 tokens, 2 pieces: over-max: 4096 tokens are over max_tokens 2048",
    ]
    assert "  captured    8 tokens: 2 pieces in 0.25 s, 4096 bytes more" in everything

    def picked(*arguments: object) -> list[str]:
        heading, *lines = shown(capsys, missing, *arguments).splitlines()
        assert heading.startswith("Small#0, rank 0, built, written ")
        return lines

    assert picked("--call", 7, "--tokens", 8) == [everything[6]]
    assert picked("--tokens", 8) == everything[5:7]
    assert picked("--call", 12) == ["  every piece of call 12 replayed"]
    assert picked("--tokens", 999) == ["  every piece of every call of 999 tokens replayed, if there was any such call"]


def test_a_call_that_never_was_is_refused(missing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--call 13: the calls that this dump knows of are 1 to 12" in refused(capsys, missing, "--call", 13)
    for option in ("--call", "--tokens"):
        for bad in ("0", "-1", "1.5", "many"):
            with pytest.raises(SystemExit) as exit_:
                main(["inspect", str(missing), f"{option}={bad}"])
            assert exit_.value.code == 2
            assert f"'{bad}': a whole number from 1 is expected" in capsys.readouterr().err


def test_misses_that_nobody_wrote_down_are_not_denied(missing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A summary has the last miss of each kind, so that it cannot say of another call that it replayed."""
    (folder,) = program_folders(missing)
    counters = {"calls": 12, "graph_misses": 40}
    change_summary(folder, counters=counters)
    assert "no miss of call 8 is recorded, but only 5 of 40 misses are" in shown(capsys, missing, "--call", 8)
    event = {"event": "missed", "reason": "address", "sentence": "input weight moved", "pieces": 35, "tokens": 8}
    with (folder / "events.jsonl").open("a") as events:
        events.write(json.dumps({**event, "call": 5}) + "\n")
    assert "call 5, 8 tokens, 35 pieces: address: input weight moved" in shown(capsys, missing, "--call", 5)
    assert "every piece of call 8 replayed" in shown(capsys, missing, "--call", 8)


def test_what_a_dump_really_says_of_one_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_toy_stage(tmp_path, sizes=(5, 6, 6, 7), graphs="emulate", capture_sizes="6,7")
    lines = shown(capsys, tmp_path, "--call", 3).splitlines()
    assert len(lines) == 2 and lines[0].startswith("ToyStage#1, ") and "call 3, 7 tokens, 3 pieces: " in lines[1]
    assert "every piece of call 2 replayed" in shown(capsys, tmp_path / "rank_0" / "ToyStage_1", "--call", 2)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"graphs": {"mode": "off", "reason": "graphs='off'"}}, "no call replays: graphs are off (graphs='off'), "),
        ({"graphs": {"mode": "emulate"}}, "every piece of every call replayed"),
        ({"not_split": "a tensor subclass"}, "the graph is not split: a tensor subclass"),
        ({"whole_plain_run": "inputs overlap"}, "the whole graph ran as plain FX: inputs overlap"),
    ],
)
def test_other_answers(changes: dict[str, Any], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_small(tmp_path)
    change_summary(program_folders(tmp_path)[0], **changes)
    assert line in shown(capsys, tmp_path).splitlines()[5]


@pytest.mark.parametrize("columns", [40, 80])
def test_lines_fit_the_terminal(columns: int, tmp_path: Path) -> None:
    run_toy_stage(tmp_path, sizes=(5,))
    (folder,) = program_folders(tmp_path)
    lines = list(inspect_dump.program_lines(folder, inspect_dump.read_summary(folder)))
    fitted = "\n".join(inspect_dump.fitted(line, columns) for line in lines).splitlines()
    too_long = [line.strip() for line in fitted if len(line) > columns < max(map(len, lines))]
    assert too_long and all(" " not in line for line in too_long)
    assert " ".join(fitted).split() == " ".join(lines).split()
    assert [inspect_dump.fitted(line, None) for line in lines] == lines


def test_only_the_newest_run_of_each_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in ("rank_0", "rank_0.2", "rank_0.10", "rank_1"):
        run_small(tmp_path / "made" / rank)
        (folder,) = program_folders(tmp_path / "made" / rank)
        (tmp_path / "dump").mkdir(exist_ok=True)
        folder.parent.rename(tmp_path / "dump" / rank)
    found = inspect_dump.find_programs(tmp_path / "dump")
    assert [path.parent.name for path in found] == ["rank_0.10", "rank_1"]


def test_it_needs_no_torch(tmp_path: Path) -> None:
    run_small(tmp_path)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pp_piecewise_backend.__main__ import main\n"
        f"sys.exit(main(['inspect', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "why did this call not replay?" in done.stdout, done.stderr


def test_a_reader_that_stops_early() -> None:
    command = f"{sys.executable} -m pp_piecewise_backend inspect --schema | head -n 1"
    done = subprocess.run(command, shell=True, cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "{" and "Traceback" not in done.stderr


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(shown(capsys, "--schema"))["title"] == "Summary"


def test_events_that_follow_each_other_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_toy_stage(tmp_path, num_layers=12, sizes=(5,))
    text = shown(capsys, tmp_path)
    assert len([line for line in text.splitlines() if "reused:" in line]) == 1
    assert "reused: piece 4, 6, 8, 10, 12, 14, 16, 18, ..." in text


# ------------------------------------------------------------------------------------ two dumps


def test_comparing_two_dumps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_small(tmp_path / "before")
    torch._dynamo.reset()
    ppb.reset()

    class Changed(Small):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states).relu()

    Changed.__name__ = "Small"
    run_small(tmp_path / "after", Changed(), stage_inputs="none", strict=True)
    (folder,) = program_folders(tmp_path / "after")
    versions = {**json.loads((folder / "summary.json").read_text())["versions"], "torch": "9.9"}
    change_summary(folder, versions=versions)
    lines = shown(capsys, tmp_path / "before", tmp_path / "after").splitlines()
    assert lines[0] == "rank 0 Small_0:"
    assert f"  version of torch: {torch.__version__} -> 9.9" in lines
    assert "  option strict: 0 (default) -> 1 (option)" in lines
    assert not any("dump_dir" in line for line in lines)
    assert any(line.startswith("  input hidden_states: stage-input") and "-> per-token" in line for line in lines)
    assert any(line.startswith("  piece changed: compute, ") for line in lines)
    assert "    ops: +relu" in lines


@pytest.mark.compat
def test_comparing_depths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, layers in (("three", 3), ("five", 5)):
        torch._dynamo.reset()
        ppb.reset()
        run_toy_stage(tmp_path / name, layers, sizes=(5,))
    text = shown(capsys, tmp_path / "three", tmp_path / "five")
    assert "piece added: eager, 2 ops" in text and "(and 1 more alike)" in text
    assert "split matches: {'toy::attention*': 3} -> {'toy::attention*': 5}" in text
    assert "input self.layers.3.attention.qkv.weight: added" in text
    assert text.count("qkv.weight: added") == 1, "equal changes of many layers come once"


def test_two_programs_are_compared_whatever_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_toy_stage(tmp_path, sizes=(5, 6))
    first, second = program_folders(tmp_path)
    lines = shown(capsys, first, second).splitlines()
    assert lines[0] == "rank 0 ToyStage_0 -> rank 0 ToyStage_1:"
    assert any(line.startswith("  token reason: static 5") for line in lines)
    assert shown(capsys, first, first) == "rank 0 ToyStage_0: no difference\n"


def test_graphs_of_a_program_that_died_are_compared_as_they_were(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_toy_stage(tmp_path / "one", sizes=(5, 5), graphs="emulate")
    (folder,) = program_folders(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    counters = summary_of(folder).counters
    assert counters["graph_bytes"] > 0
    change_summary(folder, counters={**counters, "graph_bytes": 0})  # a gauge: nothing is held any more
    assert shown(capsys, tmp_path / "one", tmp_path / "two") == "rank 0 ToyStage_0: no difference\n"
    graphs = summary_of(folder).graphs.model_dump()
    change_summary(folder, graphs={**graphs, "buckets": []})
    assert f"  bytes in graphs: 0 -> {counters['graph_bytes']}" in shown(capsys, tmp_path / "one", tmp_path / "two")


def test_equal_dumps_and_programs_of_one_dump_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_toy_stage(tmp_path / "one", sizes=(5, 6))
    torch._dynamo.reset()
    ppb.reset()
    run_toy_stage(tmp_path / "two", sizes=(5,))
    assert shown(capsys, tmp_path / "one", tmp_path / "one") == (
        "rank 0 ToyStage_0: no difference\nrank 0 ToyStage_1: no difference\n"
    )
    text = shown(capsys, tmp_path / "one", tmp_path / "two")
    assert "rank 0 ToyStage_0: no difference\nrank 0 ToyStage_1: only in the first dump" in text
    assert "only in the second dump" in shown(capsys, tmp_path / "two", tmp_path / "one")


# ------------------------------------------------------------------------------------ bad dumps


def test_what_is_no_dump(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no dump" in refused(capsys, tmp_path)
    assert "nowhere does not exist: expected a folder" in refused(capsys, tmp_path / "nowhere")
    assert "folders given: 0" in refused(capsys)
    assert "folders given: 3" in refused(capsys, "a", "b", "c")
    assert "folders given: 2" in refused(capsys, "a", "b", "--call", 1)
    assert "folders given: 1. Expected" in refused(capsys, "a", "--schema")
    assert "--schema, which goes with nothing else" in refused(capsys, "--tokens", 1, "--schema")


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("", "Invalid JSON"),
        ("{", "Invalid JSON"),
        ("[]", "Input should be an object"),
        ("[" * 100_000, "Invalid JSON"),
        ("{}", "progress: Field required"),
        ("\udcff", "utf-8"),
    ],
)
def test_what_cannot_be_read(text: str, detail: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "summary.json").write_bytes(text.encode(errors="surrogateescape"))
    message = refused(capsys, tmp_path)
    assert "cannot be read as a dump" in message and detail in message


def test_a_dump_of_another_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_small(tmp_path)
    change_summary(program_folders(tmp_path)[0], schema_version=99)
    assert "its schema_version is 99, expected 1" in refused(capsys, tmp_path)


def test_half_an_event_and_hostile_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_small(tmp_path)
    (folder,) = program_folders(tmp_path)
    change_summary(folder, name="\x1b]0;owned\x07Model", token_reason="\x1b[2Jgone")
    with (folder / "events.jsonl").open("ab") as events:
        events.write(b'[1]\n{"event": 3}\n{"event": "odd", "at": 3}\n\xff\xfe\n{"event": "mis')
    text = shown(capsys, tmp_path)
    assert "\x1b" not in text and "?]0;owned?Model" in text
    assert "odd" in text


def test_nothing_that_is_read_is_ever_run() -> None:
    banned = {"pickle", "dill", "marshal", "shelve", "runpy", "importlib", "subprocess", "code", "torch", "yaml"}
    for module in ("inspect_dump", "explain", "text", "summary"):
        tree = ast.parse((PACKAGE / "debug" / f"{module}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not banned & {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in banned
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec", "compile", "__import__"}


# ---------------------------------------------------------------------------------------- options


def test_env_shows_every_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PP_PIECEWISE_COMPILER", "eager")
    assert main(["env"]) == 0
    printed = capsys.readouterr().out.splitlines()
    lines = [re.split(r"\s{2,}", line) for line in printed if not line.startswith(" ")]
    assert lines[0] == ["option", "environment", "source", "value"]
    assert ["compiler", "PP_PIECEWISE_COMPILER", "environment", "eager"] in lines
    assert ["dump_dir", "PP_PIECEWISE_DUMP_DIR", "default", "unset"] in lines
    assert len(lines) == 1 + len(ppb.Config().table())
    after = printed[1 + next(at for at, line in enumerate(printed) if line.startswith("compiler "))]
    assert after == "    What compiles each distinct piece: inductor, aot_eager or eager."


@pytest.mark.parametrize("columns", [80, 120])
def test_env_fits_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert columns - 10 < max(map(len, lines)) <= columns
    assert lines[1 + next(at for at, line in enumerate(lines) if line.startswith("capture_sizes"))].startswith(
        "    1,2,4"
    )


def test_env_as_markdown_shows_defaults_and_meanings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PP_PIECEWISE_COMPILER", "eager")
    assert main(["env", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["| option | environment | default | meaning |", "|---|---|---|---|"]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]
    assert all(len(row) == 4 for row in rows) and [row[0].strip("`") for row in rows] == list(FIELD_NAMES)
    meaning = "What compiles each distinct piece: inductor, aot_eager or eager."
    assert ["`compiler`", "`PP_PIECEWISE_COMPILER`", "`inductor`", meaning] in rows


def test_env_with_a_mistake_in_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PP_PIECEWISE_COMPILER", "gcc")
    assert main(["env"]) == 2
    assert "environment variable PP_PIECEWISE_COMPILER has the value 'gcc'" in capsys.readouterr().err

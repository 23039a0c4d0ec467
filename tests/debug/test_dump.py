"""Dumps: what is in them, and that they never disturb what they tell of."""

from __future__ import annotations

import errno
import gc
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import depyf
import pytest
import torch
import torch._inductor.config as inductor_config
from torch import nn
from torch._inductor.codecache import PyCodeCache

import pp_piecewise_backend as ppb
from dumping import EAGER, Small, events_of, program_folders, run_small, run_toy_stage, summary_of
from forked import run_program
from pp_piecewise_backend.backend import backend
from pp_piecewise_backend.compilation.inductor import PieceCompiler
from pp_piecewise_backend.config import Config
from pp_piecewise_backend.debug import describe, dump, dynamo_frame
from pp_piecewise_backend.debug.explain import explain
from pp_piecewise_backend.debug.summary import BucketEntry, Graphs, MissEntry
from pp_piecewise_backend.runtime.hooks import NO_EVENTS, Events
from pp_piecewise_backend.runtime.program import Program
from pp_piecewise_backend.utils.reasons import miss
from rank_processes import run_ranks

pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")


WHOLE_FILES = {"dynamo_graph.py", "split_parent.py", "explain.txt", "events.jsonl", "summary.json", "report.html"}
FRAME_FILES = {"guards.txt", "transformed_code.py"}


# ------------------------------------------------------------------------------ what is in it


@pytest.mark.compat
def test_two_programs_of_a_stage(tmp_path: Path) -> None:
    run_toy_stage(tmp_path, num_layers=3)
    assert [path.name for path in tmp_path.iterdir()] == ["rank_0"]
    folders = program_folders(tmp_path)
    assert [folder.name for folder in folders] == ["ToyStage_0", "ToyStage_1"]
    eager = {f"piece_{index:02d}_eager.txt" for index in range(1, 6, 2)}  # each names its layer
    for folder in folders:
        files = {path.name for path in folder.iterdir()}
        assert files == WHOLE_FILES | FRAME_FILES | eager | {
            "piece_00_compute.py", "piece_02_compute.py", "piece_06_compute.py",
        }  # fmt: skip
    # The summary says what the program says.
    for folder, program in zip(folders, ppb.programs(), strict=True):
        summary = summary_of(folder)
        assert (summary.name, summary.rank, summary.progress) == (program.name, 0, "built")
        assert [i.kind for i in summary.inputs] == [i.kind for i in program.inputs]
        assert [(p.kind, p.key, p.reason) for p in summary.pieces] == [
            (p.kind, p.key, p.reason) for p in program.pieces
        ]
        assert summary.counters == program.stats.as_dict() and summary.counters["calls"] == 1
        assert explain(summary) == program.explain()
        assert (folder / "explain.txt").read_text().strip() == program.explain()
        assert {o.option: o.source for o in summary.config}["dump_dir"] == "option"
        assert summary.versions["torch"] == torch.__version__
        assert summary.graphs.mode == "off"
        assert "hidden_states" in (folder / "dynamo_graph.py").read_text()
        assert "GraphModule" in runpy.run_path(str(folder / "dynamo_graph.py"))
        compile((folder / "split_parent.py").read_text(), "split_parent.py", "exec")
        assert "self.piece_02_compute(" in (folder / "split_parent.py").read_text()
        assert "toy.attention_with_output" in (folder / "piece_01_eager.txt").read_text()
    # Equal pieces share one file, and say who was compiled.
    compute = [piece for piece in summary_of(folders[0]).pieces if piece.kind == "compute"]
    assert [(p.index, p.file, p.compiled) for p in compute] == [
        (0, "piece_00_compute.py", "compiled"),
        (2, "piece_02_compute.py", "compiled"),
        (4, "piece_02_compute.py", "reused"),
        (6, "piece_06_compute.py", "compiled"),
    ]
    # What happened when.
    first, second = folders
    assert [e["event"] for e in events_of(first)] == [
        "traced", "split", "compiled", "compiled", "reused", "compiled", "built",
    ]  # fmt: skip
    assert [e["event"] for e in events_of(second)][:3] == ["traced", "recompiled", "split"]
    assert events_of(second)[1]["programs_before"] == 1
    for folder in (first, second):
        seconds = [event["seconds"] for event in events_of(folder)]
        assert seconds == sorted(seconds)


def test_a_graph_that_is_not_split_has_a_dump_too(tmp_path: Path) -> None:
    with torch.enable_grad(), pytest.warns(ppb.errors.PPPiecewiseWarning, match="gradients are required"):
        run_small(tmp_path)
    (folder,) = program_folders(tmp_path)
    summary = summary_of(folder)
    assert summary.progress == "not split" and "gradients are required" in (summary.not_split or "")
    assert events_of(folder)[-1]["event"] == "not split"
    assert summary.counters["grad_fallbacks"] == 1


def test_a_compilation_that_dies_leaves_what_was_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PieceCompiler, "compile", die)
    with pytest.raises(KeyboardInterrupt):
        run_small(tmp_path)
    (folder,) = program_folders(tmp_path)
    assert summary_of(folder).progress == "split"
    assert {"dynamo_graph.py", "split_parent.py", "piece_00_compute.py"} <= {p.name for p in folder.iterdir()}


def test_final_counters_of_a_program_that_is_gone(tmp_path: Path) -> None:
    run = torch.compile(Small(), backend="pp_piecewise", options={**EAGER, "dump_dir": tmp_path})
    for _ in range(3):
        run(torch.randn(3, 4))
    del run
    torch._dynamo.reset()
    gc.collect()
    assert ppb.programs() == ()
    backend.dumps.finish()
    (folder,) = program_folders(tmp_path)
    assert summary_of(folder).counters["calls"] == 3
    assert summary_of(folder).pieces


def generated(folder: Path) -> dict[str, str]:
    """What Inductor generated for the pieces of the one program dumped there, without what numbers a compilation."""
    (program,) = program_folders(folder)
    texts = {path.name: path.read_text() for path in program.glob("piece_*_inductor.py")}
    return {name: re.sub(r"(?m)^# AOT ID.*|^_frozen_param.*", "", text) for name, text in texts.items()}


@pytest.mark.compat
@pytest.mark.parametrize("settings", [{}, {"freezing": True}, {"fx_graph_cache": False}], ids=str)
def test_inductor_output_is_there(tmp_path: Path, settings: dict[str, bool]) -> None:
    """Also of pieces that were compiled before, whose file Inductor may not load again."""
    with inductor_config.patch(settings):
        run_small(tmp_path / "first", compiler="inductor")
        ppb.reset()
        torch._dynamo.reset()
        run_small(tmp_path / "again", compiler="inductor")
    texts = generated(tmp_path / "first")
    assert sorted(texts) == ["piece_00_inductor.py", "piece_02_inductor.py"]
    assert all("def call(" in text for text in texts.values()) and len(set(texts.values())) == 2
    assert generated(tmp_path / "again") == texts


def test_inductor_output_is_there_of_pieces_of_an_earlier_program(tmp_path: Path) -> None:
    for folder in ("first", "second"):
        run_small(tmp_path / folder, compiler="inductor")
    (second,) = program_folders(tmp_path / "second")
    assert [event["event"] for event in events_of(second)].count("reused") == 2
    assert generated(tmp_path / "second") == generated(tmp_path / "first") != {}


def test_code_that_others_load_meanwhile_is_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_piece = PieceCompiler.compile

    def meanwhile(*arguments: Any) -> Any:
        PyCodeCache.load("ANOTHER = 'piece'")
        return compile_piece(*arguments)

    monkeypatch.setattr(PieceCompiler, "compile", meanwhile)
    run_small(tmp_path, compiler="inductor")
    texts = generated(tmp_path)
    assert len(texts) == 2 and not any("ANOTHER" in text for text in texts.values())


def test_equal_pieces_share_what_inductor_generated(tmp_path: Path) -> None:
    run_toy_stage(tmp_path, num_layers=3, sizes=(5,), compiler="inductor")
    assert sorted(generated(tmp_path)) == [f"piece_{index:02d}_inductor.py" for index in (0, 2, 6)]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_what_inductor_generated_nothing_for_has_no_file_of_it(tmp_path: Path, compiler: str) -> None:
    run_small(tmp_path / "inductor", compiler="inductor")
    run_small(tmp_path / "other", compiler=compiler)
    assert generated(tmp_path / "other") == {} != generated(tmp_path / "inductor")


def test_what_a_program_says_of_its_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_small(tmp_path)
    graphs = Graphs(
        mode="emulate",
        buckets=[BucketEntry(tokens=8, bytes=4096, seconds=0.25, pieces=2)],
        addresses=[{"input": "weight", "arrival": "parameter"}],
    )
    monkeypatch.setattr(describe, "describe_graphs", lambda program: graphs)
    (events,) = backend.dumps.unfinished
    events.captured(tokens=8, pieces=2, graph_bytes=4096, seconds=0.25)
    graphs.misses.append(MissEntry(reason="over-max", sentence="9 of 8", pieces=2, tokens=9, call=7))
    events.missed(miss("over-max", "9 of 8"), pieces=2, tokens=9, call=7)
    events.sealed()
    (folder,) = program_folders(tmp_path)
    told = summary_of(folder).graphs
    assert (
        told.mode == "emulate"
        and told.buckets[0].bytes == 4096
        and told.addresses == [{"input": "weight", "arrival": "parameter"}]
    )
    assert (told.misses[0].reason, told.misses[0].tokens, told.misses[0].call) == ("over-max", 9, 7)
    assert [e["event"] for e in events_of(folder)][-3:] == ["captured", "missed", "sealed"]


def test_misses_do_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dump, "_MOST_MISS_EVENTS", 20)
    run_small(tmp_path)
    refreshed: list[int] = []
    events = backend.dumps.unfinished[0]
    monkeypatch.setattr(type(events), "refresh", lambda self: refreshed.append(1))
    for call in range(100):
        events.missed(miss("over-max", "too many"), pieces=2, tokens=9, call=call)
    (folder,) = program_folders(tmp_path)
    assert sum(e["event"] == "missed" for e in events_of(folder)) == 20
    assert len(refreshed) < 50  # the first of its kind, then one a second


def test_a_dump_that_was_removed_is_not_brought_up_to_date(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_small(tmp_path)
    shutil.rmtree(tmp_path / "rank_0")
    backend.dumps.finish()
    assert not list(tmp_path.iterdir()) and messages(caplog) == []


# --------------------------------------------------------------------------- it changes nothing


def test_off_means_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert backend.dumps.start("Model#0", Config()) is NO_EVENTS
    torch.compile(Small(), backend="pp_piecewise", options=EAGER)(torch.randn(3, 4))
    assert not backend.dumps.unfinished and not list(tmp_path.iterdir())


def test_every_event_is_there_while_dumping_is_off() -> None:
    own = {name for name in vars(Events) if not name.startswith("_")}
    assert own <= {name for name in vars(dump.ProgramDump) if not name.startswith("_")}
    assert own == {
        "traced", "split", "compiled", "reused", "built", "captured", "missed", "sealed",
    }  # fmt: skip


@pytest.mark.compat
def test_the_results_and_counters_are_the_same(tmp_path: Path) -> None:
    def outcome(options: dict[str, Any]) -> tuple[Any, ...]:
        torch._dynamo.reset()
        ppb.reset()
        torch.manual_seed(0)
        run = torch.compile(Small(), backend="pp_piecewise", options={**EAGER, **options})
        results = [run(torch.randn(tokens, 4)) for tokens in (3, 5, 1)]
        counted = {name: n for name, n in ppb.stats().items() if not name.endswith("seconds")}
        return results, counted, torch.random.get_rng_state()

    without, with_dump = outcome({}), outcome({"dump_dir": tmp_path})
    assert all(map(torch.equal, without[0], with_dump[0]))
    assert without[1] == with_dump[1] and torch.equal(without[2], with_dump[2])
    assert program_folders(tmp_path)


# ------------------------------------------------------------------------------- what goes wrong


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.compat
def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("mine")
    right = right_result()
    for tokens in (3, 3):
        torch._dynamo.reset()
        assert torch.equal(run_small(in_the_way / "dump"), right), tokens
    (message,) = messages(caplog)
    assert f"cannot write the dump into {in_the_way / 'dump'}: NotADirectoryError" in message
    assert "its results are not affected" in message
    assert in_the_way.read_text() == "mine"


def right_result() -> torch.Tensor:
    torch.manual_seed(0)
    return Small()(torch.randn(3, 4))


def test_a_disk_that_fills_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        right = right_result()
        assert torch.equal(run_small(disk), right)
        (message,) = messages(caplog)
        assert "No space left on device" in message and "some MB free" in message
        for path in disk.rglob("*"):
            assert not path.name.endswith(".tmp"), "a part of a file was left behind"
        for folder in program_folders(disk):
            summary_of(folder)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    dump.write_whole(path, "old")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        dump.write_whole(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["summary.json"]


def test_a_mistake_of_ours_ends_one_dump_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: object) -> None:
        raise KeyError("no such thing")

    with monkeypatch.context() as patched:
        patched.setattr(dump, "piece_files", wrong)
        assert torch.equal(run_small(tmp_path), right_result())
    said = [message for message in messages(caplog) if "structured trace" not in message]
    assert len(said) == 1 and "the dump of Small#0" in said[0] and "KeyError: 'no such thing'" in said[0]
    torch._dynamo.reset()
    assert torch.equal(run_small(tmp_path), right_result())
    assert [summary_of(folder).progress for folder in program_folders(tmp_path)] == ["traced", "built"]


def test_a_piece_that_cannot_be_written_down_costs_only_its_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(*args: object) -> None:
        raise KeyError("it's odd")

    monkeypatch.setattr(dump, "piece_script", wrong)
    assert torch.equal(run_small(tmp_path), right_result())
    (folder,) = program_folders(tmp_path)
    assert summary_of(folder).progress == "built" and messages(caplog) == []
    done = subprocess.run([sys.executable, folder / "piece_00_compute.py"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "cannot run here" in done.stdout


def test_integers_of_subclasses_and_fakes_are_not_read() -> None:
    class Subclass(torch.Tensor):
        pass

    assert dump._is_readable(torch.tensor([1, 2]))
    assert not dump._is_readable(torch.tensor([1, 2]).as_subclass(Subclass))
    for other in (
        torch.tensor([1.0]),
        torch.tensor([], dtype=torch.int64),
        torch.zeros(2, dtype=torch.int64, device="meta"),
    ):
        assert not dump._is_readable(other)
    with dump.torch_compat.FakeTensorMode():
        assert not dump._is_readable(torch.zeros(2, dtype=torch.int64))


def test_somebody_reads_while_it_is_written(tmp_path: Path) -> None:
    run_small(tmp_path)
    (folder,) = program_folders(tmp_path)
    events, stop, seen = backend.dumps.unfinished[0], threading.Event(), []

    def write() -> None:
        call = 0
        while not stop.is_set():
            call += 1
            events.missed(miss("over-max", "too many"), pieces=2, tokens=call, call=call)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            seen.append((summary_of(folder), len(events_of(folder))))
            assert (folder / "report.html").read_text().endswith("</html>\n")
    finally:
        stop.set()
        writer.join(timeout=10)
    assert len({count for _, count in seen}) > 1, "nothing was written meanwhile"


@pytest.mark.parametrize(
    ("ranks", "folders"),
    [
        (["1", "1"], ["rank_1", "rank_1.2"]),
        ([None, "1", "1"], ["rank_0", "rank_1", "rank_1.2"]),
    ],
)
def test_ranks_and_processes_with_the_same_rank_share_a_directory(
    ranks: list[str | None], folders: list[str], tmp_path: Path
) -> None:
    ended = run_ranks("dumping:one_rank", len(ranks), tmp_path, {"ranks": ranks})
    assert [rank.exit_code for rank in ended] == [0] * len(ranks), ended
    said, dumped = [rank.log for rank in ended], tmp_path / "dumps"
    assert sorted(path.name for path in dumped.iterdir()) == folders
    summaries = [summary_of(folder) for folder in program_folders(dumped)]
    assert [summary.rank for summary in summaries] == [int(rank or 0) for rank in ranks]
    assert len({summary.process_id for summary in summaries}) == len(ranks)
    assert [text.count("is there already") for text in said if text.count("is there already")] == [1]
    assert ranks[0] is not None or "is there already" not in said[0]


# ------------------------------------------------------------------------------ depyf and torch


def test_depyf_and_guards(tmp_path: Path) -> None:
    run_small(tmp_path)
    (folder,) = program_folders(tmp_path)
    assert summary_of(folder).extras.files == ["transformed_code.py", "guards.txt"]
    assert "__compiled_fn" in (folder / "transformed_code.py").read_text()
    assert "TENSOR_MATCH: check_tensor(L['hidden_states']" in (folder / "guards.txt").read_text()


def test_a_depyf_that_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def wrong(code: object) -> str:
        raise RuntimeError("no such\nopcode")

    monkeypatch.setattr(depyf, "decompile", wrong)
    assert torch.equal(run_small(tmp_path), right_result())
    (folder,) = program_folders(tmp_path)
    (problem,) = summary_of(folder).extras.problems
    assert problem == "depyf could not make transformed_code.py: RuntimeError: no such opcode."
    assert not (folder / "transformed_code.py").exists()
    assert messages(caplog) == []


def test_frames_that_depyf_would_take_minutes_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamo_frame, "_MOST_INSTRUCTIONS", 3)
    run_small(tmp_path)
    (folder,) = program_folders(tmp_path)
    (problem,) = summary_of(folder).extras.problems
    assert "at most 3 are decompiled" in problem and "depyf.prepare_debug()" in problem


@pytest.mark.filterwarnings("ignore:.*You are trying to debug.*")
@pytest.mark.parametrize("needs_gradients", [False, True])
def test_depyfs_own_debugging_works_with_our_programs(needs_gradients: bool, tmp_path: Path) -> None:
    with torch.set_grad_enabled(needs_gradients), depyf.prepare_debug(str(tmp_path / "depyf")):
        assert torch.equal(run_small(tmp_path / "dump"), right_result())
    (full,) = (tmp_path / "depyf").glob("full_code_for_forward_*.py")
    assert "__compiled_fn" in full.read_text() and "check_tensor" in full.read_text()
    (folder,) = program_folders(tmp_path / "dump")
    assert "transformed_code.py" in summary_of(folder).extras.files


def test_a_frame_with_a_graph_break(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            hidden_states = hidden_states * 2
            torch._dynamo.graph_break()
            return hidden_states + 1

    assert run_small(tmp_path, Broken()).shape == (3, 4)
    assert len(program_folders(tmp_path)) == 2


def test_torchs_structured_trace_gets_it(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import torch; from dumping import *; torch.set_grad_enabled(False)\n"
        "torch.compile(Small(), backend='pp_piecewise', options=EAGER)(torch.randn(3, 4))"
    )
    done = run_program(tmp_path / "program.py", environment={"TORCH_TRACE": str(tmp_path / "trace")})
    assert done.exit_code == 0, done.log
    (log,) = (tmp_path / "trace").glob("*.log")
    text = log.read_text()
    for name in ("pp_piecewise_explain", "pp_piecewise_split", "pp_piecewise_summary"):
        assert f'"name": "{name}"' in text
    assert "scaled_dot_product_attention" in text


def test_a_trace_that_fails_is_said_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(*args: object) -> None:
        raise OSError("no trace")

    monkeypatch.setattr(dump.torch_compat, "trace_artifact", wrong)
    torch.compile(Small(), backend="pp_piecewise", options=EAGER)(torch.randn(3, 4))
    assert isinstance(ppb.programs()[0], Program)
    (message,) = messages(caplog)
    assert "structured trace does not get it" in message


def test_the_logger_says_where_the_dump_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="pp_piecewise_backend")
    run_small(tmp_path)
    assert any(r.name == "pp_piecewise_backend.debug.dump" and str(tmp_path) in r.message for r in caplog.records)

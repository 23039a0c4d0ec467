"""The benchmark runs and writes what it promises; what it measures is nobody's test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
PHASES = {"toolchain", "dynamo", "split", "compile", "first_run", "total"}


@pytest.mark.timeout(240)
def test_compile_time_writes_its_result(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "compile_time.py"), "--layers", "2", "4", "--repeats", "1"]
    command += ["--compiler", "eager", "--caches", "cold", "--output", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stdout + finished.stderr

    result = json.loads((tmp_path / "compile_time.json").read_text())
    assert set(result) == {
        "benchmark",
        "command",
        "finished",
        "environment",
        "parameters",
        "summary",
        "ratios",
        "runs",
    }
    assert result["benchmark"] == "compile_time"
    assert result["command"].startswith("python bench/compile_time.py --layers 2 4")
    assert {"python", "device", "packages", "processor", "torch_threads"} <= set(result["environment"])
    assert "torch" in result["environment"]["packages"]
    assert (tmp_path / "compile_time.png").read_bytes().startswith(b"\x89PNG")

    methods = ["pp_piecewise", "unshared", "stock"]
    assert [(entry["method"], entry["layers"]) for entry in result["summary"]] == [
        (method, layers) for method in methods for layers in (2, 4)
    ]
    for entry in result["summary"]:
        assert entry["caches"] == "cold"
        assert set(entry["seconds"]) == PHASES
        for spread in entry["seconds"].values():
            assert spread["count"] == 1
            assert 0 <= spread["min"] <= spread["median"] <= spread["max"]
    counts = {(entry["method"], entry["layers"]): entry["counts"] for entry in result["summary"]}
    assert counts["pp_piecewise", 4] == {"pieces": 5, "pieces_compiled": 3}
    assert counts["unshared", 4] == {"pieces": 5, "pieces_compiled": 5}
    assert [ratio["method"] for ratio in result["ratios"]] == methods
    for ratio in result["ratios"]:
        assert set(ratio) == {"caches", "method", "layers", "compile_seconds_ratio", "target"}
        assert ratio["layers"] == [2, 4]


@pytest.mark.timeout(120)
def test_host_overhead_writes_its_result(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "host_overhead.py"), "--layers", "2", "3", "--rounds", "2", "--calls", "2"]
    finished = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert finished.returncode == 0, finished.stdout + finished.stderr

    result = json.loads((tmp_path / "host_overhead.json").read_text())
    assert result["benchmark"] == "host_overhead"
    assert set(result["adaptations"]) == {"piecewise_cuda_graphs", "dispatch"}
    assert (tmp_path / "host_overhead.png").read_bytes().startswith(b"\x89PNG")
    assert [run["layers"] for run in result["runs"]] == [2, 3]
    for run in result["runs"]:
        assert run["counts"]["replays"] == run["layers"] + 1
        assert run["counts"]["eager_steps"] == run["layers"]
        assert run["counts"]["stage_inputs"] == 2
        for clocks in run["microseconds"].values():
            for spread in clocks.values():
                assert spread["count"] == 2
                assert 0 <= spread["min"] <= spread["median"] <= spread["max"]
        assert set(run["parts"]["wall"]) == set(run["parts"]["processor"])
    assert [target["layers"] for target in result["targets"]] == [2, 3]
    assert not any(target["is_the_target"] for target in result["targets"])


@pytest.mark.timeout(240)
def test_dump_cost_writes_its_result(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "dump_cost.py"), "--layers", "2", "--calls", "3", "--compiler", "eager"]
    finished = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "cannot write" not in finished.stderr

    summary = json.loads((tmp_path / "dump_cost.json").read_text())["summary"]
    assert summary["dump_seconds"] > 0 and summary["depyf_seconds"] > 0
    assert summary["dump_bytes"] > 10_000 and summary["depyf_bytes"] > 100
    assert {name: times["count"] for name, times in summary["call_seconds"].items()} == {
        "dumping": 3, "not dumping": 3,
    }  # fmt: skip


@pytest.mark.timeout(240)
def test_gpu_latency_runs_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "gpu_latency.py"), "--device", "cpu", "--stages", "tiny"]
    command += ["--tokens", "1", "8", "96", "--compiler", "eager", "--context-tokens", "16", "--repeats", "3"]
    finished = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stdout + finished.stderr

    result = json.loads((tmp_path / "gpu_latency.json").read_text())
    assert result["benchmark"] == "gpu_latency"
    assert (tmp_path / "gpu_latency.png").read_bytes().startswith(b"\x89PNG")
    cells = {(cell["method"], cell["tokens"]): cell for cell in result["cells"]}
    assert {tokens for _, tokens in cells} == {1, 8, 96} and len(cells) == 9 * 3
    for (method, _), cell in cells.items():
        if method in ("reduce_overhead", "piecewise_cuda_graphs", "limit"):
            assert (cell["status"], cell["reason"]) == ("skipped", "needs CUDA")
            continue
        assert cell["status"] == "ok", cell
        assert cell["check"]["largest_row_error"] <= cell["check"]["tolerance"]
        assert cell["microseconds"]["latency_us"]["count"] == 3
        if method.startswith("ours"):
            per_call = cell["per_call"]
            assert per_call["graph_misses"] == 0
            assert per_call["replays"] == (1 if method == "ours_full" else 3)
            assert per_call["stage_input_copies"] == (2 if method == "ours_copied" else 0)
            assert per_call["output_copies"] == 0
    for entry in result["summary"]:
        assert entry["stage"] == "tiny"
        assert entry["speed_over"]["eager"]["eager"]["latency_us"] == 1.0


@pytest.mark.timeout(60)
def test_gpu_latency_starts_nothing_once_the_budget_is_spent(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "gpu_latency.py"), "--device", "cpu", "--stages", "tiny"]
    command += ["--tokens", "8", "--budget-seconds", "-1", "--output", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    cells = json.loads((tmp_path / "gpu_latency.json").read_text())["cells"]
    assert len(cells) == 9 and {cell["status"] for cell in cells} == {"not started"}


@pytest.mark.timeout(240)
def test_gpu_startup_runs_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "gpu_startup.py"), "--device", "cpu", "--stage", "tiny"]
    command += ["--sizes", "1", "8", "96", "--compiler", "eager", "--context-tokens", "16", "--caches", "off"]
    finished = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stdout + finished.stderr

    result = json.loads((tmp_path / "gpu_startup.json").read_text())
    assert result["benchmark"] == "gpu_startup"
    assert (tmp_path / "gpu_startup.png").read_bytes().startswith(b"\x89PNG")
    ours, unshared, reduce_overhead = result["runs"]
    assert [ours["status"], unshared["status"], reduce_overhead["status"]] == ["ok", "ok", "skipped"]
    for run in (ours, unshared):
        assert set(run["seconds"]) == {"toolchain", "compile", "capture", "total"}
        assert run["counts"]["programs"] == 2  # one for a single token, one for all other sizes
        assert run["counts"]["captures"] == 9
    assert [ratio["ours_over"] for ratio in result["ratios"]] == ["unshared"]

"""The benchmark runs and writes what it promises; what it measures is nobody's test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from checkout import BENCH

PHASES = {"toolchain", "dynamo", "split", "compile", "first_run", "total"}


@pytest.mark.bench
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


@pytest.mark.bench
@pytest.mark.timeout(120)
def test_host_overhead_writes_its_result(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "host_overhead.py"), "--layers", "2", "3", "--rounds", "2", "--calls", "2"]
    finished = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert finished.returncode == 0, finished.stdout + finished.stderr

    result = json.loads((tmp_path / "host_overhead.json").read_text())
    assert result["benchmark"] == "host_overhead"
    assert set(result["adaptations"]) == {"breakable_cuda_graphs", "dispatch"}
    assert (tmp_path / "host_overhead.png").read_bytes().startswith(b"\x89PNG")
    assert [run["layers"] for run in result["runs"]] == [2, 3]
    for run in result["runs"]:
        assert run["counts"]["replays"] == run["layers"] + 1
        assert run["counts"]["eager_steps"] == run["layers"]
        assert run["counts"]["stage_inputs"] == 2
        assert run["counts"]["uncaptured_pieces"] == run["layers"] + 1
        for clocks in run["microseconds"].values():
            for spread in clocks.values():
                assert spread["count"] == 2
                assert 0 <= spread["min"] <= spread["median"] <= spread["max"]
        assert set(run["parts"]["wall"]) == set(run["parts"]["processor"])
    assert [target["layers"] for target in result["targets"]] == [2, 3]
    assert not any(target["is_the_target"] for target in result["targets"])
    for target, run in zip(result["targets"], result["runs"], strict=True):
        for clock in ("wall", "processor"):
            call = run["microseconds"]["uncaptured"][clock]["median"]
            assert target[clock]["uncaptured_piece"] == pytest.approx(call / run["counts"]["uncaptured_pieces"])


@pytest.mark.bench
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


@pytest.mark.bench
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
        if method in ("reduce_overhead", "breakable_cuda_graphs", "limit"):
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


@pytest.mark.bench
@pytest.mark.timeout(60)
def test_gpu_latency_starts_nothing_once_the_budget_is_spent(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "gpu_latency.py"), "--device", "cpu", "--stages", "tiny"]
    command += ["--tokens", "8", "--budget-seconds", "-1", "--output", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    cells = json.loads((tmp_path / "gpu_latency.json").read_text())["cells"]
    assert len(cells) == 9 and {cell["status"] for cell in cells} == {"not started"}


@pytest.mark.bench
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


@pytest.mark.bench
@pytest.mark.timeout(240)
def test_gpu_handoff_runs_without_a_gpu(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(BENCH / "gpu_handoff.py"),
        "--device",
        "cpu",
        "--stage",
        "tiny",
        "--tokens",
        "1",
        "8",
    ]
    command += ["--compiler", "eager", "--context-tokens", "16", "--repeats", "3", "--micro-batches", "6"]
    finished = subprocess.run(
        [*command, "--in-flight", "1", "2", "--output", str(tmp_path)], capture_output=True, text=True, timeout=200
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr

    result = json.loads((tmp_path / "gpu_handoff.json").read_text())
    assert result["benchmark"] == "gpu_handoff"
    assert (tmp_path / "gpu_handoff.png").read_bytes().startswith(b"\x89PNG")
    assert [(cell["tokens"], cell["proxy_bytes"]) for cell in result["cells"]] == [(1, 512), (8, 4096)]
    for cell in result["cells"]:
        assert {way: figures["count"] for way, figures in cell["gap_us"].items()} == {"in_place": 3, "copy_in": 3}
        assert cell["copy_us"]["median"] > 0
        assert set(cell["micro_batches_per_second"]) == {"one_stream", "1", "2"}


def test_what_is_found_in_a_profile() -> None:
    sys.path.insert(0, str(BENCH))
    from gpu_profile import findings

    def event(cat: str, name: str, ts: float, dur: float = 1.0, **args: int) -> dict[str, Any]:
        return {"cat": cat, "name": name, "ts": ts, "dur": dur, "tid": args.pop("stream", 1), "args": args}

    copy = "Memcpy DtoD (Device -> Device)"
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name"},
        event("cuda_runtime", "cudaStreamSynchronize", 1.0),
        event("cuda_runtime", "cudaMalloc", 2.0),
        event("cuda_runtime", "cudaGraphLaunch", 3.0),
        event("cuda_runtime", "cudaDeviceSynchronize", 90.0),  # the profiler's own
        event("gpu_user_annotation", "ppb.piece[0]", 10.0, 5.0, stream=7),
        event("gpu_user_annotation", "ppb.piece[2]", 16.0, 4.0, stream=7),
        event("gpu_user_annotation", "ppb.piece[0]", 30.0, 5.0, stream=7),
        event("gpu_user_annotation", "ppb.piece[2]", 36.0, 4.0, stream=7),
        event("kernel", "triton_poi_0", 10.0, 5.0, stream=7),
        event("kernel", "gemm", 20.0, 5.0, stream=8),
        event("gpu_memcpy", copy, 12.0, 1.0, bytes=64, stream=9),
        event("gpu_memcpy", copy, 25.0, 5.0, bytes=64, stream=9),
        event("gpu_memcpy", copy, 15.0, 1.0, bytes=8, stream=7),
        event("gpu_memcpy", copy, 35.0, 1.0, bytes=8, stream=7),
        event("gpu_memcpy", copy, 35.0, 1.0, bytes=8, stream=8),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 21.0, 1.0, bytes=8, stream=7),
    ]
    assert findings(events) == {
        "forwards_of_the_second_stage": 2,
        "synchronisations": {"cudaStreamSynchronize": 1},
        "allocations": {"cudaMalloc": 1},
        "hand_over_copies": 2,
        "landing_in_a_forward": 1,
        "copies_in_the_second_stage": {"8": 1.0},
        "kernels_in_the_second_stage": 0.5,
    }


@pytest.mark.bench
@pytest.mark.timeout(240)
def test_handoff_writes_its_result(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "handoff.py"), "--stages", "2", "--rounds", "2", "--block", "5"]
    command += ["--stage-ms", "2", "--link-ms", "0.5", "2", "--in-flight", "1", "2", "--micro-batches", "12"]
    command += ["--skipped", "4", "--output", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stdout + finished.stderr

    result = json.loads((tmp_path / "handoff.json").read_text())
    assert result["benchmark"] == "handoff"
    assert (tmp_path / "handoff.png").read_bytes().startswith(b"\x89PNG")
    (host,) = result["host"]
    ours = ["ours_step", "ours_early", "ours_step_p2p", "ours_early_p2p"]
    methods = ["engine", "engine_one_object", "copy_in", *ours]
    for situation in ("saturated", "single"):
        assert list(host["handoff_us_per_hop"][situation]) == methods
        for clocks in host["handoff_us_per_hop"][situation].values():
            assert {clock: spread["count"] for clock, spread in clocks.items()} == {
                "wall": 2, "processor": 2, "main_thread": 2,
            }  # fmt: skip
    assert host["observed_per_micro_batch"]["engine"]["copies_into_landing"] == 2
    assert host["observed_per_micro_batch"]["ours_early"]["copies_into_landing"] == 0
    cells = {(cell["method"], cell["in_flight"], cell["link_ms"]): cell for cell in result["throughput"]}
    overlapping = {(method, m, ms) for method in ("ours_early", "ours_step") for m in (1, 2) for ms in (0.5, 2.0)}
    others = {(m, 3, ms) for m in ("ours_end", *ours[2:], *methods[:3]) for ms in (0.5, 2.0)}
    assert set(cells) == overlapping | others
    for cell in cells.values():
        assert 0 < cell["measured"] <= cell["predicted"] + 0.05
        assert cell["predicted_with_host"] < cell["predicted"]
    assert {target["target"] for target in result["targets"]} == {"host"} and result["repeats"] == []


def test_the_prediction_of_the_handoff_follows_its_rules() -> None:
    sys.path.insert(0, str(BENCH))
    from handoff_prediction import completion_seconds, relative_throughput

    # Two stages of 4, a link of 3: by hand.
    stages, links = [[4.0] * 4, [4.0] * 4], [3.0] * 4
    assert completion_seconds(stages, links, 1, "early") == [11.0, 22.0, 33.0, 44.0]
    # The second stage begins micro-batch i + 1 when it ended i, since it has landed by then.
    assert completion_seconds(stages, links, 4, "early") == [11.0, 15.0, 19.0, 23.0]
    # Posted at the end, it arrives 3 later.
    assert completion_seconds(stages, links, 4, "end") == [11.0, 18.0, 25.0, 32.0]
    # The first stage begins again when its results have left, just in time for the second one.
    assert completion_seconds(stages, links, 4, "engine") == [11.0, 18.0, 25.0, 32.0]
    assert completion_seconds(stages, links, 4, "early", host_seconds=1.0) == [13.0, 18.0, 23.0, 28.0]
    assert relative_throughput([11.0, 18.0, 25.0, 32.0], 1, 4.0) == pytest.approx(4 / 7)


@pytest.mark.bench
@pytest.mark.timeout(60)
def test_a_trace_is_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "trace.png"
    command = [
        sys.executable,
        str(BENCH / "draw_trace.py"),
        str(BENCH / "results" / "pipeline_trace.json"),
        str(picture),
    ]
    finished = subprocess.run([*command, "--from-ms", "1", "--to-ms", "20"], capture_output=True, text=True, timeout=50)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")

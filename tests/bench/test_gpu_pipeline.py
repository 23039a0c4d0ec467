"""The pipeline benchmark runs on the CPU from end to end, with emulated graphs and toy sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from checkout import BENCH

sys.path.insert(0, str(BENCH))
import gpu_pipeline
from decoder import MODELS, DecoderStage
from pipeline_hops import hops, kernels_of, read
from pipeline_rank import Plan, Record, compared, covered, figures, rotated
from slot_attention import StepTensors
from step_schedule import Call, Schedule


def run(folder: Path, *arguments: str) -> tuple[dict[str, Any], subprocess.CompletedProcess[str]]:
    command = [sys.executable, str(BENCH / "gpu_pipeline.py"), "--device", "cpu", "--models", "tiny"]
    command += ["--context-tokens", "16", "--block-s", "0.1", "--count", "6", "--output", str(folder), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=220)
    return json.loads((folder / "gpu_pipeline.json").read_text()), finished


@pytest.mark.bench
@pytest.mark.timeout(240)
def test_it_measures_every_cell_and_compares_tokens(tmp_path: Path) -> None:
    variants = ["eager", "reduce_overhead", "transformers", "ours_piecewise_shm", "ours_full_gloo"]
    arguments = ["--tokens", "1", "8", "96", "--in-flight", "1", "2", "--rounds", "2", "--check"]
    result, finished = run(tmp_path, *arguments, "--variants", *variants)
    assert finished.returncode == 0, finished.stdout + finished.stderr

    assert result["benchmark"] == "gpu_pipeline" and "over" not in result
    assert (tmp_path / "gpu_pipeline.png").read_bytes().startswith(b"\x89PNG")
    status = {entry["variant"]: entry["status"] for entry in result["variants"]}
    assert status == dict.fromkeys(variants, "ok") | {"reduce_overhead": "skipped"}
    checked = {(check["variant"], check["tokens"]): check for check in result["checks"]}
    assert set(checked) == {(v, n) for v in ("eager", *variants[3:]) for n in (1, 8, 96)}
    for check in checked.values():
        assert check["ok"] and check["different"] == 0 and check["choices"] >= 12
    cells = {(cell["variant"], cell["tokens"], cell["in_flight"]): cell for cell in result["cells"]}
    many = {(v, n, m) for v in ("eager", *variants[3:]) for n in (1, 8, 96) for m in (1, 2)}
    assert set(cells) == many | {("transformers", n, 1) for n in (1, 8, 96)}
    for (variant, tokens, _), cell in cells.items():
        assert 0 < cell["ms"]["min"] <= cell["ms"]["median"] and cell["ms"]["count"] == 2
        assert cell["tokens_per_second"] == pytest.approx(tokens / cell["ms"]["median"] * 1e3)
        for rank in cell["ranks"]:
            assert rank["main_thread_us"] > 0 and rank["process_us"] > 0
            if variant.startswith("ours"):
                counters = rank["counters"]
                assert counters["graph_misses"] == counters["recompiles"] == counters["captures"] == 0
                assert counters["replays"] == (1 if "full" in variant else 3)
                assert counters["direct_entries"] == 1  # although the engine counts in an object of the stage
    assert result["ratios"][0]["ms_over"]["eager"].keys() >= {"ours_piecewise_shm", "ours_full_gloo"}


@pytest.mark.bench
@pytest.mark.timeout(120)
def test_three_ranks(tmp_path: Path) -> None:
    variants = ["ours_piecewise_shm", "eager"]
    result, finished = run(
        tmp_path, "--ranks", "3", "--tokens", "8", "--check", "--rounds", "0", "--variants", *variants
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert len(result["ranks"]) == 3 and result["cells"] == []
    assert {check["variant"]: check["different"] for check in result["checks"]} == dict.fromkeys(variants, 0)


@pytest.mark.bench
@pytest.mark.timeout(180)
def test_ranks_that_share_a_stage_choose_the_tokens_of_the_whole_model(tmp_path: Path) -> None:
    variants = ["ours_full_and_piecewise_gloo", "eager"]
    result, finished = run(
        tmp_path, "--tp", "2", "--tokens", "8", "96", "--check", "--rounds", "0", "--variants", *variants
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert len(result["ranks"]) == 4
    found = [(check["variant"], check["different"]) for check in result["checks"]]
    assert found == [("eager", 0), ("ours_full_and_piecewise_gloo", 0)] * 2
    for check in result["checks"]:
        if check["variant"] != "eager":
            assert all(rank["graph_misses"] == 0 and rank["proxy_copies"] == 0 for rank in check["counters"])


@pytest.mark.bench
@pytest.mark.timeout(60)
def test_nothing_is_begun_once_the_budget_is_used_up(tmp_path: Path) -> None:
    result, finished = run(tmp_path, "--variants", "eager", "--tokens", "8", "--budget-s", "0")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "budget" in result["over"] and result["cells"] == result["variants"] == []


def test_names_of_variants() -> None:
    on_gpus = gpu_pipeline.parse([]).variants
    assert on_gpus[:3] == ["eager", "reduce_overhead", "transformers"]
    assert "ours_full_and_piecewise_ipc" in on_gpus and "ours_piecewise_nccl" in on_gpus
    for arguments in ([], ["--device", "cpu"], ["--one-gpu"]):
        assert gpu_pipeline.parse(arguments).variants[-1] == "ours_auto_auto", "all defaults"
    assert gpu_pipeline.parse(["--variants", "eager", "full_ipc"]).variants == ["eager", "ours_full_ipc"]
    assert not any("nccl" in name for name in gpu_pipeline.parse(["--one-gpu"]).variants)
    quick = gpu_pipeline.parse(["--quick", "--tokens", "64"])
    assert (quick.tokens, quick.in_flight, quick.models) == ([64], [1, 2], ["qwen2.5-0.5b"])


def test_figures_of_a_cell() -> None:
    assert covered([(5.0, 7.0), (0.0, 2.0), (1.0, 3.0), (6.0, 6.5)]) == 5.0
    one = {"ms": 2.0, "host_ms": 2.5, "main_thread_us": 30.0, "process_us": 40.0, "counters": {}}
    found = figures(8, [[one, one], [one | {"ms": 4.0}, one]], [{"busy_us": 1500.0, "kernels": 9.0}, {}])
    assert found["ms"] == {"median": 3.0, "min": 2.0, "max": 4.0, "count": 2}
    assert found["tokens_per_second"] == pytest.approx(8 / 3e-3)
    assert found["ranks"][0]["bubble"] == pytest.approx(0.5) and "bubble" not in found["ranks"][1]
    times = {"eager": 4.0, "ours": 1.0}
    cells = [
        {"model": "m", "tokens": 8, "in_flight": 1, "variant": name, "ms": {"median": ms}} for name, ms in times.items()
    ]
    assert gpu_pipeline.ratios(cells) == [
        {"model": "m", "tokens": 8, "in_flight": 1, "ms_over": {"eager": {"ours": 0.25}}}
    ]


class Ordered:
    """Stands in for the first rank: writes down which blocks are ordered, where each micro-batch takes 10 ms.

    Args:
        failing: the variant whose block of this number fails, from 0 on.
    """

    def __init__(self, folder: Path, variants: list[str], rounds: int, failing: tuple[str, int] | None = None) -> None:
        self.folder, self.deadline = folder, float("inf")
        self.schedule = Schedule(max_tokens=8, context_tokens=16, in_flight=2)
        self.request = {"models": ["m"], "tokens": [8], "in_flight": [2], "variants": variants, "rounds": rounds}
        self.request |= {"check": False, "profile": False, "trace_variants": []}
        self.request |= {"block_seconds": 1.0, "count": 20, "least_count": 4}
        self.blocks: list[SimpleNamespace] = []
        self._failing = failing

    def say(self, name: str, **order: Any) -> list[dict[str, Any]]:
        if name != "block":
            return [{}, {}]
        number = sum(block.variant == order["variant"] for block in self.blocks)
        self.blocks.append(SimpleNamespace(**order))
        if (order["variant"], number) == self._failing:
            return [{}, {"error": "lost"}]
        clocks = dict.fromkeys(("ms", "host_ms"), 10.0) | dict.fromkeys(("main_thread_us", "process_us"), 1.0)
        return [{**clocks, "counters": {}}] * 2

    def run(self) -> list[dict[str, Any]]:
        """The cells that come of it."""
        Plan(self).run()  # type: ignore[arg-type]
        found = [json.loads(line) for line in (self.folder / "found.jsonl").read_text().splitlines()]
        return [each for each in found if each["what"] == "cell"]


def test_every_variant_is_first_in_one_of_as_many_rounds(tmp_path: Path) -> None:
    variants = ["eager", "reduce_overhead", "ours_auto_auto"]
    rank = Ordered(tmp_path, variants, rounds=3)
    cells = rank.run()
    trials, warming, counted = rank.blocks[:3], rank.blocks[3], rank.blocks[4:]
    assert [block.variant for block in trials] == variants
    assert warming.variant == "eager"
    assert 0.9 < (warming.warm + warming.count + warming.in_flight) * 10e-3 <= 1.0, "seconds of a block"
    turns = [[block.variant for block in counted[at : at + 3]] for at in (0, 3, 6)]
    assert [turn[0] for turn in turns] == variants and len(counted) == 9
    assert all(sorted(turn) == sorted(variants) for turn in turns)
    assert {cell["variant"]: cell["ms"]["count"] for cell in cells} == dict.fromkeys(variants, 3)
    assert all(block.count == 20 for block in counted)


@pytest.mark.parametrize(("failing_block", "blocks_of_it"), [(0, 1), (1, 2), (2, 3)])
def test_a_variant_that_fails_takes_no_turn_of_another_one(
    tmp_path: Path, failing_block: int, blocks_of_it: int
) -> None:
    rank = Ordered(tmp_path, ["a", "b", "c"], rounds=2, failing=("b", failing_block))
    cells = rank.run()
    assert sum(block.variant == "b" for block in rank.blocks) == blocks_of_it
    others = [block.variant for block in rank.blocks if block.variant != "b"]
    assert others == [*"ac", "a", *"ac", *"ca"]
    assert {cell["variant"]: cell["ms"]["count"] for cell in cells} == {"a": 2, "c": 2}


def test_blocks_that_hold_fewer_micro_batches_than_a_trial_are_not_warmed_up_for(tmp_path: Path) -> None:
    rank = Ordered(tmp_path, ["a", "b"], rounds=1)
    rank.request["block_seconds"] = 0.03
    rank.run()
    assert [block.variant for block in rank.blocks] == [*"ab", *"ab"]


def test_variants_that_take_turns() -> None:
    assert [rotated("abc", by) for by in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    assert rotated([], 2) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_at_other_lengths_is_found(dtype: torch.dtype) -> None:
    schedule = Schedule(max_tokens=8, context_tokens=48, in_flight=1)
    stage = DecoderStage(MODELS["tiny"], 0, 1, schedule.slots, StepTensors(8, "cpu"), dtype=dtype)
    precise = None if dtype == torch.float32 else stage.in_float32()
    ids = torch.arange(8)

    def record(stale_from: int) -> Record:
        """From this step on, attention reads the numbers of the one before."""
        stage.reset_cache()
        found: Record = []
        for number in range(3):
            call = Call(8, "jumps", 0, number)
            positions = stage.step.fill(schedule.batch(call if number < stale_from else found[-1][0]))
            found.append((call, ids, stage(positions, ids)["tokens"]))
        return found

    right, wrong = (compared(stage, schedule, record(stale_from), precise) for stale_from in (3, 2))
    assert right["ok"] and right["different"] == 0 and right["choices"] == 24
    assert not wrong["ok"] and wrong["different"] >= 4
    assert wrong["largest_regret"] > 2 * wrong["allowed_regret"] > 0


def events_of(rank: int, *passes_us: float, kernels: int = 5) -> list[dict[str, Any]]:
    """Kernels of 10 us with pauses of 2 us between them, from each of these times on."""
    kernel = {"ph": "X", "cat": "kernel", "name": "gemm", "pid": rank, "tid": 7, "dur": 10.0}
    return [{**kernel, "ts": begin_us + 12.0 * at} for begin_us in passes_us for at in range(kernels)]


def test_a_step_consists_of_stages_and_hops() -> None:
    first, last = events_of(0, 0, 200, 400, 600, 800), events_of(1, 88, 290, 488, 688, 890)
    copies = [{**event, "cat": "gpu_memcpy"} for event in events_of(1, 60, 265, kernels=1)]
    early, waiting = events_of(0, 120, 320, 525, kernels=1), events_of(1, 0, 200, kernels=9)
    found = hops([*first, *last, *copies, *early, *({**event, "name": "ncclDevKernel"} for event in waiting)])
    assert found.steps == 3 and found.step_us == 200 and found.stage_us == (58, 58)
    assert found.hop_us == (30, 54)
    assert sum(found.stage_us) + sum(found.hop_us) == found.step_us


def test_ranks_that_do_not_take_turns_have_no_hops() -> None:
    with pytest.raises(ValueError, match=r"ran in the order 001100101.*expected turns"):
        hops([*events_of(0, 0, 150, 600, 750, 1100), *events_of(1, 300, 450, 900, 1200)])


def test_traces_of_ranks_are_put_on_one_clock() -> None:
    event = {"ph": "X", "cat": "kernel", "name": "k" * 99, "ts": 5.0, "dur": 1.0, "tid": 1, "args": {"stream": 1}}
    trace = {"baseTimeNanoseconds": 2000, "traceEvents": [event, {**event, "cat": "cpu_op"}, {"ph": "M"}]}
    (found,) = kernels_of(trace, 1)
    assert found == {"ph": "X", "cat": "kernel", "name": "k" * 60, "ts": 7.0, "dur": 1.0, "tid": 1, "pid": 1}


def test_the_page_says_what_the_trace_of_two_gpus_has() -> None:
    events = read(BENCH / "results" / "gpu_pipeline_trace_7b.json.gz")
    found = hops(events)
    first, last = found.stage_us
    there, back = found.hop_us
    page = " ".join((BENCH.parent / "docs" / "benchmarks.md").read_text().split())
    for words in (
        "All defaults took CUDA IPC, as the trace below shows",
        f"in a trace of {found.steps} steps of 8 tokens",
        f"the stages take {first:.0f} and {last:.0f} us",
        f"{there:.0f} us lie between the first and the second, {back:.0f} us between the second and the first one",
    ):
        assert words in page
    assert found.step_us <= first + last + 2 * 60
    assert not any("nccl" in event["name"].lower() for event in events)
    assert {event["pid"] for event in events if "PtoP" in event["name"]} == {0, 1}

"""A pipeline of processes whose tensors lie on GPUs: results, counters, and ranks that die or stop."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from against_eager import assert_same
from gpu_ranks import FAULTY_STEP
from models.small_pipeline import OPTIONS, one_after_the_other, sizes
from rank_processes import Ended, run_ranks

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.process,
    pytest.mark.usefixtures("fresh_backend"),
    pytest.mark.timeout(120),
]

MICRO_BATCHES = 100
TIMEOUT_SECONDS = 4.0
MARGIN_SECONDS = 2.0

over_both = pytest.mark.parametrize("transport", ["cuda_ipc", "p2p"])


def run(folder: Path, transport: str, count: int, **job: object) -> list[Ended]:
    if transport == "p2p" and torch.cuda.device_count() < count:
        pytest.skip(f"NCCL needs a GPU for each of {count} ranks, and there are {torch.cuda.device_count()}")
    job = {
        "transport": transport,
        "default_group": "gloo",
        "feedback_rows": "any",
        "confirmed": True,
        "timeout_seconds": TIMEOUT_SECONDS,
        "microbatches": MICRO_BATCHES,
        **job,
    }
    stopped = [job["victim"]] if job.get("kind") == "SIGSTOP" else []
    return run_ranks("gpu_ranks:one_rank", count, folder, job, left_alone=stopped)  # type: ignore[arg-type]


@over_both
@pytest.mark.parametrize(
    ("count", "job"),
    [
        (2, {}),
        (2, {"feedback_rows": "tokens"}),
        (2, {"feedback_rows": "tokens", "confirmed": False}),
        (2, {"default_group": "nccl"}),
        (4, {}),
    ],
    ids=str,
)
def test_results_and_counters_in_steady_state(transport: str, count: int, job: dict[str, Any], tmp_path: Path) -> None:
    for ended in run(tmp_path, transport, count, **job):
        assert ended.exit_code == 0, ended.log
    found = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(count)]
    for rank, stats in enumerate(one["counted"] for one in found):
        assert stats["microbatches"] == MICRO_BATCHES
        for counter in ("proxy_copies", "recv_allocations", "pickles", "graph_misses"):
            assert stats[counter] == 0, (rank, counter, stats)
        assert stats["replays"] > 0
        assert stats["stage_inputs_in_place"] == (0 if rank == 0 else 2 * MICRO_BATCHES)
        assert stats["early_releases"] == (0 if rank == 0 else MICRO_BATCHES)
    options = {**OPTIONS, "graphs": "cuda"}
    outputs = torch.load(tmp_path / "outputs")
    expected = one_after_the_other(sizes(MICRO_BATCHES), count, options, "cuda")
    for got, wanted in zip(outputs, expected, strict=True):
        assert_same(got, {name: tensor.cpu() for name, tensor in wanted.items()})
    assert found[0]["told"] == [[str(number), got["next_tokens"].tolist()] for number, got in enumerate(outputs)]


@over_both
@pytest.mark.parametrize("kind", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_or_stops_is_lost_to_the_other(transport: str, kind: str, victim: int, tmp_path: Path) -> None:
    ended = run(tmp_path, transport, 2, victim=victim, kind=kind)
    (began,) = re.findall(r"fault at ([\d.]+)", ended[victim].log)
    survivor = ended[1 - victim]
    lost = re.findall(r"lost at ([\d.]+)", survivor.log)
    assert survivor.exit_code == 1 and "PeerLost" in survivor.log and lost, survivor.log
    seconds = float(lost[0]) - float(began)
    print(f"{transport} {kind} of {victim}: raised {seconds:.2f} s after the fault")
    assert seconds < TIMEOUT_SECONDS + MARGIN_SECONDS


def test_no_output_leaves_the_last_stage_before_its_proxies_have_landed(tmp_path: Path) -> None:
    ended = run(tmp_path, "cuda_ipc", 2, victim=0, kind="announces and dies")
    (outputs,) = re.findall(r"lost at [\d.]+, after (\d+) outputs", ended[1].log)
    assert ended[1].exit_code == 1 and int(outputs) == FAULTY_STEP + 1, ended[1].log

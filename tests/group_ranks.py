"""Ranks of which some are in a pipeline, and the others have other things to do."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import pp_piecewise_backend as ppb
from pp_piecewise_backend.errors import PeerLost
from rank_processes import LONGEST_SECONDS

WIDTH = 4
OPTIONS = {"graphs": "emulate", "compiler": "eager", "capture_sizes": "8"}
SETUP_SECONDS = LONGEST_SECONDS / 2
"""Who waits in vain says so before it is late."""


class Adds(nn.Module):
    def forward(self, x: Tensor | None = None, h: Tensor | None = None) -> dict[str, Tensor]:
        return {"h": x + 1} if h is None else {"y": h.sum(-1)}


def runner_in(group: Any, stage: int, layout: str = "replicated", **changes: Any) -> ppb.StageRunner:
    proxies = {"h": ppb.Proxy((WIDTH,), torch.float32, layout=layout)}
    feedback = {"y": ppb.Proxy((), torch.float32)}
    ends: dict[str, Any] = {
        "make_inputs": lambda num_tokens, tag: {} if stage else {"x": torch.ones(num_tokens, WIDTH)},
        "max_tokens": 8,
        "inputs": proxies if stage else None,
        "outputs": None if stage else proxies,
        "feedback": feedback,
        "setup_timeout_s": SETUP_SECONDS,
        "options": OPTIONS,
    }
    return ppb.StageRunner(Adds(), group=group, **{**ends, **changes})


def passes_through(runner: ppb.StageRunner, stage: int) -> list[float]:
    """What comes back of two micro-batches."""
    came = []

    def given() -> Any:
        for number in (1, 2):
            yield ppb.MicroBatch(number)
            came.extend(runner.feedback()[1]["y"].tolist())

    with runner:
        for output in runner.run(None if stage else given()):
            came += output["y"].tolist() if stage else []
    return came


def in_a_group(rank: int, job: Mapping[str, Any], all_are_up: Callable[[], None]) -> Any:
    """Two runners on ranks 1 and 2, one after the other; all ranks make groups before, meanwhile and after."""
    before = dist.new_group([0, 1, 2])
    pipeline = dist.new_group([1, 2])
    came = []
    for _ in range(2):
        if rank:
            came.append(passes_through(runner_in(pipeline, rank - 1, transport=job["transport"]), rank - 1))
        between = dist.new_group([0, 2])
    sums = []
    for group, ranks in ((before, (0, 1, 2)), (between, (0, 2)), (dist.new_group([0, 1]), (0, 1)), (None, (0, 1, 2))):
        if rank in ranks:
            ones = torch.ones(1)
            dist.all_reduce(ones, group=group)
            sums.append(int(ones) == len(ranks))
    dist.destroy_process_group()
    return {"came": came, "sums": sums}


def never_looked_after(rank: int, job: Mapping[str, Any], all_are_up: Callable[[], None]) -> Any:
    """Rank 0 ends when all have the group."""
    pipeline = dist.new_group([1, 2])
    all_are_up()
    if rank == 0:
        return None
    return passes_through(runner_in(pipeline, rank - 1, transport=job["transport"]), rank - 1)


def tensor_parallel(rank: int, job: Mapping[str, Any], all_are_up: Callable[[], None]) -> Any:
    """Two pipelines side by side on ranks 1 to 4, whose second ends have each other's shares."""
    groups = {ranks: dist.new_group(ranks) for ranks in ((1, 3), (2, 4), (1, 2), (3, 4))}
    all_are_up()
    if rank == 0:
        return None
    pair = tuple(groups[ranks] for ranks in groups if rank in ranks)
    stage = int(rank > 2)
    return passes_through(runner_in(pair, stage, layout="scattered", transport=job["transport"]), stage)


def comes_late(rank: int, job: Mapping[str, Any], all_are_up: Callable[[], None]) -> Any:
    """Rank 2 makes its runner when rank 1 has given up the first time, and so has a try less behind it."""
    pipeline = dist.new_group([1, 2])
    all_are_up()
    if rank == 0:
        return None
    said = ""
    if rank == 1:
        try:
            runner_in(pipeline, 0, setup_timeout_s=1, transport=job["transport"])
        except PeerLost as error:
            said = str(error)
    dist.barrier(pipeline)
    return said, passes_through(runner_in(pipeline, rank - 1, transport=job["transport"]), rank - 1)


def fails(rank: int, job: Mapping[str, Any], all_are_up: Callable[[], None]) -> Any:
    pipeline = dist.new_group([1, 2])
    all_are_up()
    if rank == 0:
        return None
    try:
        with runner_in(pipeline, rank - 1, transport=job["transport"]) as runner:
            for _ in runner.run(None if rank == 2 else [ppb.MicroBatch(3)] * 9):
                if rank == 2:
                    raise ArithmeticError("the caller fails")
    except (PeerLost, ArithmeticError) as error:
        return f"{type(error).__name__}: {error}"


SCENARIOS = {
    function.__name__: function for function in (in_a_group, never_looked_after, tensor_parallel, comes_late, fails)
}


def one_rank(rank: int, count: int, folder: Path, job: Mapping[str, Any]) -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    store = dist.FileStore(f"{folder}/up", count)

    def all_are_up() -> None:
        """A rank that ends while others still connect to it would break their process groups."""
        store.set(str(rank), "is up")
        store.wait([str(other) for other in range(count)])

    value = SCENARIOS[job["scenario"]](rank, job, all_are_up)
    (folder / f"value_{rank}.json").write_text(json.dumps(value))
    return 0

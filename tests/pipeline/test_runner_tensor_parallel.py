"""``StageRunner`` on two stages of two ranks each, which share the last layer by columns of what they receive."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rank_processes import SETUP_SECONDS, run_ranks

pytestmark = pytest.mark.process

HIDDEN, VOCABULARY, MAX_TOKENS = 16, 50, 8
COUNTS_TOKENS = (1, 3, 8, 5, 2, 7, 4, 6) * 3


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"hidden_states": self.linear(self.embedding(ids))}


class Last(nn.Module):
    """This rank's columns of the last layer; all ranks add up."""

    def __init__(self, weight: torch.Tensor, rank: int, group: Any) -> None:
        super().__init__()
        self.columns = slice(rank * HIDDEN // 2, (rank + 1) * HIDDEN // 2)
        self.weight = nn.Parameter(weight[:, self.columns].clone())
        self.group = group

    def forward(self, hidden_states: torch.Tensor) -> dict[str, torch.Tensor]:
        from torch.distributed._functional_collectives import all_reduce

        partial = hidden_states[:, self.columns] @ self.weight.t()
        return {"tokens": all_reduce(partial, "sum", self.group).argmax(-1)}


def one_rank(rank: int, count: int, folder: Path, job: Mapping[str, Any]) -> int:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    import pp_piecewise_backend as ppb

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    is_first = mesh.get_local_rank("pp") == 0
    torch.manual_seed(0)
    first, weight = First(), torch.randn(VOCABULARY, HIDDEN)
    last = Last(weight, mesh.get_local_rank("tp"), mesh.get_group("tp"))
    proxies = {"hidden_states": ppb.Proxy((HIDDEN,), torch.float32, layout=job["layout"])}
    runner = ppb.StageRunner(
        first if is_first else last,
        make_inputs=lambda n, tag: {"ids": torch.zeros(n, dtype=torch.int64)} if is_first else {},
        max_tokens=MAX_TOKENS,
        mesh=mesh,
        inputs=None if is_first else proxies,
        outputs=proxies if is_first else None,
        feedback={"tokens": ppb.Proxy((), torch.int64)},
        options={"compiler": "eager", "graphs": "emulate", "capture_sizes": "1,2,4,8"},
        setup_timeout_s=SETUP_SECONDS,
    )
    ids = [(torch.arange(n) * 7 + number) % VOCABULARY for number, n in enumerate(COUNTS_TOKENS)]
    tokens = []
    with runner:
        runner.warmup()
        batches = (ppb.MicroBatch(len(own), b"%d" % number, {"ids": own}) for number, own in enumerate(ids))
        for number, _ in enumerate(runner.run(batches) if is_first else runner.run()):
            if number == 3 and job.get("leaves") == mesh.get_local_rank("pp"):
                break
        if "leaves" in job:
            return 0
        if is_first:
            with torch.no_grad():
                expected = [(first(own)["hidden_states"] @ weight.t()).argmax(-1).tolist() for own in ids]
            for number, own in enumerate(expected):
                tag, out = runner.feedback()
                tokens.append(out["tokens"].tolist())
                assert (tag, tokens[-1]) == (b"%d" % number, own)
    counted = runner.stats
    report = {"tokens": sum(map(len, tokens)), "sent": counted.bytes_sent, "received": counted.bytes_received}
    (folder / f"rank_{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()
    return 0


@pytest.mark.parametrize(("layout", "share"), [("replicated", 1), ("scattered", 2)])
def test_both_layouts_give_the_tokens_of_the_unsplit_model(layout: str, share: int, tmp_path: Path) -> None:
    ended = run_ranks("pipeline.test_runner_tensor_parallel:one_rank", 4, tmp_path, {"layout": layout})
    assert [end.exit_code for end in ended] == [0] * 4, "\n".join(end.log for end in ended)
    reports = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(4)]
    tokens = sum(COUNTS_TOKENS)
    proxy_bytes, feedback_bytes = tokens * HIDDEN * 4 // share, tokens * 8
    first = {"tokens": tokens, "sent": proxy_bytes, "received": feedback_bytes}
    assert reports == [first, first, *[{"tokens": 0, "sent": feedback_bytes, "received": proxy_bytes}] * 2]


def test_the_ranks_of_the_first_stage_may_leave_early_together(tmp_path: Path) -> None:
    ended = run_ranks(
        "pipeline.test_runner_tensor_parallel:one_rank", 4, tmp_path, {"layout": "scattered", "leaves": 0}
    )
    assert [end.exit_code for end in ended] == [0] * 4, "\n".join(end.log for end in ended)


def test_another_stage_that_leaves_early_breaks_the_pipeline(tmp_path: Path) -> None:
    ended = run_ranks(
        "pipeline.test_runner_tensor_parallel:one_rank", 4, tmp_path, {"layout": "scattered", "leaves": 1}
    )
    for end in ended[:2]:
        assert end.exit_code == 1 and "failed (GeneratorExit)" in end.log, end.log

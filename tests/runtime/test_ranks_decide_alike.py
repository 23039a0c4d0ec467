"""Note [ranks decide alike]: what one rank of a tensor parallel stage finds holds for all; all ask equally often."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import one_program
import pp_piecewise_backend as ppb
from captured import HIDDEN, Pair, misses_between, net, rows
from one_program import for_every_size
from pp_piecewise_backend.runtime.cudagraphs.device import CaptureError
from pp_piecewise_backend.runtime.cudagraphs.emulated import EmulatedDevice
from pp_piecewise_backend.runtime.padding_test import Trial
from rank_processes import SETUP_SECONDS, run_ranks

pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")


@torch.library.custom_op("aliketest::attention", mutates_args=())
def attention(x: Tensor) -> Tensor:
    return torch.tanh(x.cumsum(0) + x.mean(0))


attention.register_fake(torch.empty_like)

FROZEN = {"scale": 1.0}
"""What the next op reads besides its arguments, so that a full graph freezes it."""


@torch.library.custom_op("aliketest::scaled", mutates_args=())
def scaled(x: Tensor) -> Tensor:
    return x * FROZEN["scale"]


scaled.register_fake(torch.empty_like)


def forward(self: Any, hidden_states: Tensor) -> Tensor:
    for _ in range(2):
        hidden_states = torch.ops.aliketest.attention(hidden_states @ self.w)
    return hidden_states @ self.w


def says_the_same(said: Any) -> Any:
    return said


class Made:
    """One of two ranks; ``other`` makes what the other one says of what this one says."""

    def __init__(self, other: Callable[[Any], Any] = says_the_same, **options: Any) -> None:
        self.said: list[Any] = []
        self.other = other
        stage = ppb.Stage({"hidden_states": ppb.Proxy((HIDDEN,), torch.float32)}, 8, "cpu")
        stage.exchange = self._exchange
        self.pair = Pair(net(forward, "cpu"), "cpu", split_ops="+aliketest::*", stage=stage, **options)

    def _exchange(self, text: str) -> Sequence[str]:
        self.said.append(json.loads(text))
        return [text, json.dumps(self.other(json.loads(text)))]

    def call(self, *counts_tokens: int) -> Mapping[str, int]:
        """Calls, after those that capture the bucket of 8; what they missed comes back."""
        for num_tokens in (8, 7):
            self.pair(rows(num_tokens, "cpu"))
        before = ppb.stats()
        for num_tokens in counts_tokens:
            self.pair(rows(num_tokens, "cpu"))
        return misses_between(before, ppb.stats())


def test_a_piece_that_another_rank_cannot_capture_is_replayed_by_none() -> None:
    steps = iter([None, ("capture-failed", "it is full"), None])

    def other(said: Any) -> Any:
        return [*said[:2], next(steps)]

    made = Made(other)
    assert made.call(8, 6) == {"capture-failed": 2}
    ((bucket, _),) = made.pair.program.all_buckets
    assert list(bucket.graphs) == [0, 4]
    assert "on rank 1 of this stage, it is full" in " ".join(ppb.explain().split())


def test_rows_that_leak_on_another_rank_are_padded_by_none() -> None:
    made = Made(lambda said: [said[0], said[0] and ("padding-unsafe", "row 3 leaks"), None])
    assert made.call(8, 6) == {"padding-unsafe": 3}
    assert set(made.pair.padding.values()) == {"on rank 1 of this stage, row 3 leaks"}


def test_no_verdict_is_one_only_if_all_ranks_have_come_to_it() -> None:
    made = Made(lambda said: [False, None, ("capture-failed", "it raised in the test of padding")])
    assert made.call(8) == {"capture-failed": 3}
    ((_, parameters),) = made.pair.program.all_buckets
    assert parameters.verdicts.by_step == {}


def test_a_bucket_that_is_wrong_on_another_rank_is_replayed_by_none() -> None:
    made = Made(lambda said: said if len(said) == 3 else [("verify-failed", "row 2"), said[1]], verify_every=1)
    assert made.call(8) == {} and made.call(8) == {"verify-failed": 3}
    assert "on rank 1 of this stage, row 2" in " ".join(ppb.explain().split())


@pytest.mark.parametrize("other_is_new", [True, False])
def test_a_comparison_counts_only_if_it_does_on_all_ranks(other_is_new: bool) -> None:
    def other(said: Any) -> Any:
        return [None, other_is_new] if isinstance(said, list) and len(said) == 2 else said

    made = Made(other, mode="full_and_piecewise")
    for seed in range(4):
        made.pair(rows(8, "cpu", seed=seed))
    assert made.pair.program.full is not None
    ((bucket, _),) = made.pair.program.full.buckets
    assert bucket.proofs is not None and bucket.proofs.left == (1 if other_is_new else 3)


def test_graphs_that_are_too_large_on_another_rank_are_dropped_by_all() -> None:
    made = Made(lambda said: True if isinstance(said, bool) else said, graph_memory_bytes="1G")
    assert made.call(8) == {"graph-memory": 3}


@pytest.mark.parametrize("fails_in", ["capture", "examine"])
def test_a_rank_asks_equally_often_whatever_it_finds(fails_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    well = Made()
    well.call(8, 3, 3)
    capture = EmulatedDevice.capture

    def failing_capture(self: Any, call: Any, inputs: Any, *pools: Any) -> Any:
        if inputs[0].shape[0] == 8:
            raise CaptureError("full")
        return capture(self, call, inputs, *pools)

    def failing_trial(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no memory")

    if fails_in == "capture":
        monkeypatch.setattr(EmulatedDevice, "capture", failing_capture)
    else:
        monkeypatch.setattr(Trial, "__init__", failing_trial)
    failing = Made(lambda said: [True, None, None])
    failing.call(8, 3, 3)
    assert len(failing.said) == len(well.said) == 6
    assert failing.said != well.said


# ------------------------------------------------------------------------------- two real ranks


class Halves(nn.Module):
    """Each rank has half of the columns of both layers; all add up, inside of what is captured."""

    def __init__(self, rank: int, group: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, HIDDEN)
        self.columns = slice(rank * HIDDEN // 2, (rank + 1) * HIDDEN // 2)
        self.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN)[:, self.columns].clone())
        self.group = group

    def forward(self, ids: Tensor) -> Tensor:
        from torch.distributed._functional_collectives import all_reduce

        x = self.embedding(ids)
        for _ in range(2):
            x = torch.ops.aliketest.attention(all_reduce(x[:, self.columns] @ self.weight.t(), "sum", self.group))
        return torch.ops.aliketest.scaled(x)


def one_rank(rank: int, count: int, folder: Path, job: Mapping[str, Any]) -> int:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    mesh = init_device_mesh("cpu", (1, count), mesh_dim_names=("pp", "tp"))
    one_program.on()
    capture, captured_pieces = EmulatedDevice.capture, []

    def failing_capture(self: Any, call: Any, inputs: Any, *pools: Any) -> Any:
        captured_pieces.append(num_tokens := inputs[0].shape[0])
        graph = capture(self, call, inputs, *pools)  # which runs the collectives of the piece, unlike a real one
        if (rank, num_tokens, captured_pieces.count(8), job["mode"]) == (1, 8, 2, "piecewise"):
            graph.release()
            raise CaptureError("this rank is full")
        return graph

    EmulatedDevice.capture = failing_capture  # type: ignore[method-assign]
    module = Halves(rank, mesh.get_group("tp"))
    runner = ppb.StageRunner(
        module,
        make_inputs=lambda n, tag: for_every_size({"ids": torch.arange(n) % 50}),
        max_tokens=8,
        mesh=mesh,
        options={
            **{"compiler": "eager", "graphs": "emulate", "split_ops": "+aliketest::*", "capture_sizes": "1,4,8"},
            **{"row_wise_ops": "_c10d_functional::*", "graph_safe_ops": "*::*", "mode": job["mode"]},
        },
        setup_timeout_s=SETUP_SECONDS,
    )
    with runner:
        runner.warmup()
        FROZEN["scale"] += rank * (job["mode"] != "piecewise")
        sizes = (8, 6, 7, 3, 1, 5)
        for num_tokens, got in zip(sizes, runner.run([ppb.MicroBatch(n) for n in sizes]), strict=True):
            with torch.no_grad():
                torch.testing.assert_close(got, module(torch.arange(num_tokens) % 50), rtol=1e-5, atol=1e-5)
        (program,) = ppb.programs()
        graphs = [g for g in (program.graphs, program.full and program.full.graphs) if g is not None]
        report = {b.tokens: [sorted(b.graphs), sorted(b.obstacles)] for g in graphs for b, _ in g.buckets}
        dropped = {tokens: reason.code for g in graphs for tokens, reason in g.dropped.items()}
    stats = ppb.stats()
    counted = {name: stats[name] for name in ("replays", "graph_misses", "padded_tokens")}
    (folder / f"rank_{rank}.json").write_text(json.dumps([report, counted, dropped]))
    dist.destroy_process_group()
    return 0


@pytest.mark.process
def test_two_ranks_of_which_one_cannot_capture_a_piece(tmp_path: Path) -> None:
    one = same_on_both(tmp_path, "piecewise")
    assert one[1]["graph_misses"] > 0 and one[1]["padded_tokens"] > 0, one
    assert sum(len(missing) for _, missing in one[0].values()) == 1


@pytest.mark.process
def test_two_ranks_of_which_one_has_a_full_graph_that_is_wrong(tmp_path: Path) -> None:
    one = same_on_both(tmp_path, "full_and_piecewise")
    assert one[2] == {"8": "verify-failed", "1": "verify-failed"}, one


def same_on_both(tmp_path: Path, mode: str) -> Any:
    """What both ranks say of their graphs."""
    ended = run_ranks("runtime.test_ranks_decide_alike:one_rank", 2, tmp_path, {"mode": mode})
    assert [end.exit_code for end in ended] == [0, 0], "\n".join(end.log for end in ended)
    one, other = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2))
    assert one == other
    return one

"""Small dumped programs, for the tests of dumps and of those who read them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.toy_stage import NAMED_OPS, ToyStage
from pp_piecewise_backend.backend import backend
from pp_piecewise_backend.debug.summary import Summary

EAGER = {"compiler": "eager"}


class Small(nn.Module):
    """Two pieces with attention between them."""

    def __init__(self, gain: float = 2.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.gain = gain

    def forward(self, hidden_states: Tensor) -> Tensor:
        q = self.first(hidden_states)[None, None]
        attended = nn.functional.scaled_dot_product_attention(q, q, q)[0, 0]
        return self.second(attended) * self.gain


def run_small(folder: Path, module: nn.Module | None = None, **options: Any) -> Tensor:
    """Compile and run once with a dump; the result."""
    torch.manual_seed(0)
    module = module or Small()
    run = torch.compile(module, backend="pp_piecewise", options={**EAGER, "dump_dir": folder, **options})
    result = run(torch.randn(3, 4))
    backend.dumps.finish()
    return result


def one_rank(rank: int, count: int, folder: Path, job: Mapping[str, list[str | None]]) -> int:
    """Of processes that dump the small model into one folder, with these values of ``RANK``."""
    os.environ.pop("RANK", None)
    if (name := job["ranks"][rank]) is not None:
        os.environ["RANK"] = name
    torch.set_grad_enabled(False)
    run_small(folder / "dumps")
    return 0


def run_toy_stage(folder: Path, num_layers: int = 2, sizes: tuple[int, ...] = (5, 6), **options: Any) -> ToyStage:
    """Run a toy stage with a dump; the first size makes a static program, the others a dynamic one."""
    stage = ToyStage(num_layers)
    options = {**EAGER, **NAMED_OPS, "dump_dir": folder, **options}
    run = torch.compile(stage, backend="pp_piecewise", options=options)
    for tokens in sizes:
        run(**stage.make_inputs(tokens))
    backend.dumps.finish()
    return stage


def program_folders(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("rank_*/*/summary.json"))


def summary_of(folder: Path) -> Summary:
    return Summary.model_validate_json((folder / "summary.json").read_text())


def events_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]

"""What the demo's parent process sends its ranks, and what they report; both travel as JSON files."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """Prompts to continue greedily with a pipeline of ``ranks`` stages."""

    model_dir: str
    ranks: int
    device: str
    """``cpu`` or ``cuda`` (one GPU per rank)."""
    backend: str
    """The ``torch.compile`` backend."""
    options: dict[str, str]
    """Its options."""
    prompts: list[list[int]]
    """Tokens; all rows have the same length."""
    max_new_tokens: int
    end_tokens: list[int]
    """A row that generated one of these is finished."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Job:
        return cls(**json.loads(path.read_text()))


HANDOFF_COUNTERS = (
    "replays",
    "graph_misses",
    "stage_inputs_in_place",
    "proxy_copies",
    "recv_allocations",
    "pickles",
    "blocking_metadata",
)
"""Names in ``ppb.stats()`` of what the table says about the hand-off."""


@dataclass(frozen=True)
class RankReport:
    """What one rank did."""

    rank: int
    layers: list[int]
    programs: int
    pieces: int
    pieces_compiled: int
    eager_steps: int
    eager_parts: dict[str, int]
    """How often which ops run eagerly between the compiled pieces, and why; layers that differ only in their
    number count as one."""
    calls: int
    calls_without_program: int
    """Calls of the stage in which the backend's program did not run (Dynamo fell back to plain Python)."""
    handoff: dict[str, int]
    """``HANDOFF_COUNTERS`` after warm-up."""
    load_seconds: float
    compile_seconds: float
    generate_seconds: float
    generated: list[list[int]] | None
    """New tokens per prompt, the end token included; on the first and the last rank, which know them."""

    def write(self, folder: Path) -> None:
        (folder / f"rank{self.rank}.json").write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, folder: Path, rank: int) -> RankReport:
        content: dict[str, Any] = json.loads((folder / f"rank{rank}.json").read_text())
        return cls(**content)


def cut_at_end(tokens: list[int], end_tokens: list[int]) -> list[int]:
    """``tokens`` up to and including the first end token; what follows is filling."""
    for position, token in enumerate(tokens):
        if token in end_tokens:
            return tokens[: position + 1]
    return tokens

"""Continuous batching with chunked prefill over StageRunner: where the runner ends and an engine begins.

The runner moves micro-batches and answers. The `Scheduler` decides what is in them: sequences that decode are split
evenly over the micro-batches in flight, and what is left of each one's budget of tokens goes to the next chunks of
waiting prompts. Only chunks that end a prompt yield a token; micro-batches without such rows ask for no feedback. Every
answer is compared with the same prompt run alone, eagerly.

Run it: python scheduler.py (two processes on the CPU), or torchrun --nproc-per-node 3 scheduler.py
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import pp_piecewise_backend as ppb

VOCABULARY, HIDDEN, MAX_LENGTH, NEW_TOKENS = 64, 32, 64, 6
SLOTS = 8  # sequences whose keys and values are kept at once
MAX_TOKENS = 12  # the budget of each micro-batch
PROMPT_LENGTHS = (3, 30, 1, 9, 17, 5, 2, 12, 21, 4)
PART = struct.Struct("<BBH")
MAX_PARTS = 24 // PART.size  # that fit into a tag; an engine with more sends them its own way, and a number as the tag


class Part(NamedTuple):
    """Rows of one sequence in a micro-batch; every rank reads them from the tag."""

    slot: int  # where its keys and values are
    start: int  # the position of the first row
    rows: int
    yields: bool  # whether the token after the last row is wanted

    def to_bytes(self) -> bytes:
        return PART.pack(self.slot, self.rows, self.start << 1 | self.yields)

    @classmethod
    def from_tag(cls, tag: bytes) -> list[Part]:
        return [cls(slot, start >> 1, rows, bool(start & 1)) for slot, rows, start in PART.iter_unpack(tag)]


def places(parts: list[Part]) -> dict[str, Tensor]:
    """What attention is to know of each row: the metadata of this engine."""
    return {
        "slots": torch.cat([torch.full((part.rows,), part.slot) for part in parts]),
        "positions": torch.cat([torch.arange(part.start, part.start + part.rows) for part in parts]),
    }


@torch.library.custom_op("my_scheduler::attention", mutates_args=("cache", "out"))
def attention(x: Tensor, cache: Tensor, slots: Tensor, positions: Tensor, out: Tensor) -> None:
    """Each row is written to its place in ``cache`` and attends to its own sequence up to there."""
    cache[slots, positions] = x
    visible = torch.arange(cache.size(1)) <= positions[:, None]
    scores = torch.einsum("nh,nth->nt", x, cache[slots]).masked_fill(~visible, float("-inf"))
    out.copy_(torch.einsum("nt,nth->nh", scores.softmax(-1), cache[slots]))


class Stage(nn.Module):
    """All rows of a micro-batch, of whichever sequences: only attention looks at ``slots`` and ``positions``."""

    def __init__(self, stage: int, stages: int) -> None:
        super().__init__()
        torch.manual_seed(stage)  # every rank can make every stage
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN) if stage == 0 else None
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(2))
        self.head = nn.Linear(HIDDEN, VOCABULARY) if stage == stages - 1 else None
        self.caches: Tensor
        self.register_buffer("caches", torch.zeros(2, SLOTS, MAX_LENGTH, HIDDEN))

    def forward(
        self, slots: Tensor, positions: Tensor, input_ids: Tensor | None = None, hidden_states: Tensor | None = None
    ) -> dict[str, Tensor]:
        x = hidden_states if self.embedding is None else self.embedding(input_ids)
        assert x is not None
        for layer, cache in zip(self.layers, self.caches, strict=True):
            projected = layer(x)
            attended = torch.empty_like(projected)
            attention(projected, cache, slots, positions, attended)
            x = x + attended
        return {"hidden_states": x} if self.head is None else {"logits": self.head(x)}


@dataclass
class Sequence:
    tokens: list[int]
    prompt_tokens: int
    computed: int = 0  # tokens whose keys and values are cached, or on their way


class Scheduler:
    """Which rows the next micro-batch has. It knows sequences, slots and budgets, and nothing of ranks."""

    def __init__(self, sequences: list[Sequence], depth: int) -> None:
        self.waiting = deque(sequences)
        self.depth = depth  # micro-batches in flight
        self.running: dict[int, Sequence] = {}  # by slot
        self.free_slots = deque(range(SLOTS))
        self.ready: deque[int] = deque()  # slots whose next token is known
        self.decoding = 0  # sequences past their prompt, ready or in flight
        self.in_prefill: int | None = None  # a slot of which the next chunk can follow without an answer

    def next_parts(self) -> list[Part]:
        """None where all that could run is in flight."""
        even_share = -(-self.decoding // self.depth)
        decoding = min(even_share, len(self.ready), MAX_PARTS, MAX_TOKENS)
        parts = [self._part(self.ready.popleft(), 1) for _ in range(decoding)]
        budget = MAX_TOKENS - len(parts)
        while budget and len(parts) < MAX_PARTS:
            if self.in_prefill is None:
                if not self.waiting or not self.free_slots:
                    break
                self.in_prefill = self.free_slots.popleft()
                self.running[self.in_prefill] = self.waiting.popleft()
            parts.append(self._part(self.in_prefill, budget))
            budget -= parts[-1].rows
            if parts[-1].yields:
                self.in_prefill = None
                self.decoding += 1
        return parts

    def _part(self, slot: int, most_rows: int) -> Part:
        sequence = self.running[slot]
        start, rows = sequence.computed, min(most_rows, len(sequence.tokens) - sequence.computed)
        sequence.computed += rows
        return Part(slot, start, rows, yields=sequence.computed == len(sequence.tokens))

    def accept(self, slot: int, token: int) -> None:
        sequence = self.running[slot]
        sequence.tokens.append(token)
        if len(sequence.tokens) < sequence.prompt_tokens + NEW_TOKENS:
            self.ready.append(slot)
        else:
            del self.running[slot]
            self.free_slots.append(slot)
            self.decoding -= 1


def micro_batches(runner: ppb.StageRunner, scheduler: Scheduler) -> Iterator[ppb.MicroBatch]:
    in_flight: deque[list[int]] = deque()  # slots that get a token of each micro-batch
    while True:
        parts = scheduler.next_parts() if len(in_flight) < scheduler.depth else []
        if parts:
            ids = [scheduler.running[part.slot].tokens[part.start : part.start + part.rows] for part in parts]
            in_flight.append([part.slot for part in parts if part.yields])
            yield ppb.MicroBatch(
                sum(part.rows for part in parts),
                tag=b"".join(part.to_bytes() for part in parts),
                inputs={"input_ids": torch.tensor(list(chain(*ids))), **places(parts)},
                feedback=bool(in_flight[-1]),
            )
        elif not in_flight:
            return
        elif slots := in_flight.popleft():  # the oldest one ends first
            _, results = runner.feedback()
            for slot, token in zip(slots, results["next_tokens"].tolist(), strict=True):
                scheduler.accept(slot, token)


def eagerly(prompt: list[int], stages: list[Stage]) -> list[int]:
    tokens, computed = list(prompt), 0
    with torch.inference_mode():
        while len(tokens) < len(prompt) + NEW_TOKENS:
            rows = {"input_ids": torch.tensor(tokens[computed:])}
            part = Part(0, computed, len(tokens) - computed, yields=True)
            for stage in stages:
                rows = stage(**places([part]), **rows)
            computed = len(tokens)
            tokens.append(int(rows["logits"][-1].argmax()))
    return tokens


def run_rank() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    first, last, depth = rank == 0, rank == ranks - 1, ranks + 1
    assert ranks > 1, "the answers of the last rank go to the first: start two or more"
    proxies = {"hidden_states": ppb.Proxy((HIDDEN,), torch.float32)}

    def make_inputs(num_tokens: int, tag: bytes) -> dict[str, Tensor]:
        parts = Part.from_tag(tag) or [Part(0, 0, num_tokens, True)]  # the tag is b"" at warm-up
        return places(parts) | ({"input_ids": torch.zeros(num_tokens, dtype=torch.int64)} if first else {})

    def choose(output: dict[str, Tensor], tag: bytes) -> dict[str, Tensor]:
        """A token for each part that yields one: here an engine samples."""
        parts = Part.from_tag(tag)
        ends = torch.tensor([part.rows for part in parts]).cumsum(0) - 1
        return {"next_tokens": output["logits"][ends[[part.yields for part in parts]]].argmax(-1)}

    with ppb.StageRunner(
        Stage(rank, ranks),
        make_inputs=make_inputs,
        max_tokens=MAX_TOKENS,
        inputs=None if first else proxies,
        outputs=None if last else proxies,
        feedback={"next_tokens": ppb.Proxy((), torch.int64)} if first or last else None,
        finish=choose if last else None,
        max_in_flight=depth,
        options={"compiler": "eager", "graphs": "emulate", "split_ops": "+my_scheduler::attention"},  # see pipeline.py
    ) as runner:
        runner.warmup()
        prompts = [torch.randint(VOCABULARY, (length,)).tolist() for length in PROMPT_LENGTHS]
        sequences = [Sequence(list(prompt), len(prompt)) for prompt in prompts]
        for _ in runner.run(micro_batches(runner, Scheduler(sequences, depth)) if first else None):
            pass
        if first:
            stages = [Stage(stage, ranks) for stage in range(ranks)]
            assert [sequence.tokens for sequence in sequences] == [eagerly(prompt, stages) for prompt in prompts]
            print(f"{len(prompts)} prompts in {runner.stats.microbatches} micro-batches: each as eager says alone")
        print(f"rank {rank}: {runner.stats.graph_misses} graph misses, {runner.stats.proxy_copies} proxies copied")
    dist.destroy_process_group()


def run_alone(rank: int, ranks: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    run_rank()


if __name__ == "__main__":
    if "RANK" in os.environ:  # under torchrun
        dist.init_process_group("gloo")
        run_rank()
    else:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(run_alone, (2, folder), nprocs=2)

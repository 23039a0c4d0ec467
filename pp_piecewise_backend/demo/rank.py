"""One rank of the demo: ``python -m pp_piecewise_backend.demo.rank JOB.json REPORT_FOLDER`` under torchrun.

Loads the model, keeps its stage, compiles it with the backend, and answers the job's prompts together with
the other ranks. Proxies travel by plain blocking send and receive, one batch at a time.
"""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

import pp_piecewise_backend as ppb

from ..integrations.huggingface import DecoderStage, cut_decoder
from .job import Job, RankReport, cut_at_end
from .load import load_decoder


@record
def main() -> None:
    job, report_folder = Job.read(Path(sys.argv[1])), Path(sys.argv[2])
    torch.set_num_threads(1)  # the ranks share the cores of one machine
    dist.init_process_group("nccl" if job.device == "cuda" else "gloo")
    try:
        _run(job).write(report_folder)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _run(job: Job) -> RankReport:
    rank = dist.get_rank()
    device = torch.device("cuda", rank) if job.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    begin = time.perf_counter()
    stage = cut_decoder(load_decoder(job.model_dir), stages=job.ranks)[rank]
    worker = StageWorker(job, stage.to(device), device)
    loaded = time.perf_counter()
    worker.compile(show_progress=rank == 0)
    compiled = time.perf_counter()
    dist.barrier()  # or the first batch would be charged with waiting for the slowest compilation

    generating = time.perf_counter()
    generated: list[list[int]] = []
    with tqdm(total=len(job.prompts), desc="pipeline", unit="prompt", disable=rank != 0) as bar:
        for rows, count in _batches(job, device):
            tokens = worker.generate(rows).tolist()[:count]
            generated += [cut_at_end(row, job.end_tokens) for row in tokens]
            bar.update(count)

    stats = ppb.stats()
    return RankReport(
        rank=rank,
        layers=list(worker.stage.layers),
        programs=stats.programs,
        pieces=stats.pieces,
        pieces_compiled=stats.pieces_compiled,
        eager_steps=stats.eager_steps,
        eager_parts=_eager_parts(),
        calls=worker.calls,
        calls_without_program=worker.calls_without_program,
        load_seconds=loaded - begin,
        compile_seconds=compiled - loaded,
        generate_seconds=time.perf_counter() - generating,
        generated=generated,
    )


def _batches(job: Job, device: torch.device) -> Iterator[tuple[torch.Tensor, int]]:
    """Batches of always the same number of rows, and how many of them count (the last one is filled up)."""
    prompts = torch.tensor(job.prompts, device=device)
    for rows in prompts.split(job.batch_size):
        missing = job.batch_size - rows.shape[0]
        yield torch.cat([rows, rows[-1:].expand(missing, -1)]), rows.shape[0]


def _eager_parts() -> dict[str, int]:
    parts: Counter[str] = Counter()
    for program in ppb.programs():
        for piece in program.pieces:
            if piece.kind == "eager":
                reason = re.sub(r"\d+", "*", piece.reason)
                parts[f"{', '.join(piece.ops)}: {reason}"] += 1
    return dict(parts)


class StageWorker:
    """A compiled stage with its key-value cache, generating in step with the other ranks."""

    def __init__(self, job: Job, stage: DecoderStage, device: torch.device) -> None:
        from transformers import StaticCache

        self.stage = stage
        self.calls = 0
        self.calls_without_program = 0
        self._job = job
        self._device = device
        self._dtype = next(stage.decoder.base_model.parameters()).dtype
        options: dict[str, Any] = dict(job.options)
        self._compiled = torch.compile(stage, backend=job.backend, options=options)
        cache_tokens = len(job.prompts[0]) + job.max_new_tokens
        self._cache = StaticCache(config=stage.config, max_cache_len=cache_tokens)
        # The cache allocates its memory in its first call; done here, the compiled graphs find it in place.
        first_token = torch.zeros(job.batch_size, 1, dtype=torch.long, device=device)
        with torch.no_grad():
            stage(**self._inputs(first_token, self._new_hidden_states(1)), past_key_values=self._cache)

    @torch.no_grad()
    def compile(self, *, show_progress: bool) -> None:
        """Runs the stage once on a prompt and once on a next token, of zeros, so that all ranks compile at once."""
        prompt_tokens = len(self._job.prompts[0])
        steps = [range(prompt_tokens), range(prompt_tokens, prompt_tokens + 1)]
        for step in tqdm(steps, desc="compiling", unit="program", disable=not show_progress):
            tokens = torch.zeros(self._job.batch_size, len(step), dtype=torch.long, device=self._device)
            positions = torch.tensor([list(step)], device=self._device)
            self._call(self._inputs(tokens, self._new_hidden_states(len(step))), positions)

    @torch.no_grad()
    def generate(self, prompts: torch.Tensor) -> torch.Tensor:
        """int64 ``[batch, new tokens]`` for int64 ``[batch, prompt tokens]``; ends when all rows have."""
        self._cache.reset()
        rank, last_rank = dist.get_rank(), dist.get_world_size() - 1
        end_tokens = torch.tensor(self._job.end_tokens, dtype=torch.long, device=self._device)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=self._device)
        tokens, columns = prompts, []
        positions = torch.arange(prompts.shape[1], device=self._device)[None]
        for _ in range(self._job.max_new_tokens):
            hidden_states = self._new_hidden_states(tokens.shape[1])
            if rank > 0:
                dist.recv(hidden_states, src=rank - 1)
            output = self._call(self._inputs(tokens, hidden_states), positions)
            new_tokens = torch.empty(len(prompts), dtype=torch.long, device=self._device)
            if rank < last_rank:
                dist.send(output.contiguous(), dst=rank + 1)
            else:
                new_tokens = output[:, -1].argmax(-1)
            dist.broadcast(new_tokens, src=last_rank)
            columns.append(new_tokens)
            ended |= torch.isin(new_tokens, end_tokens)
            if ended.all():
                break
            tokens = new_tokens[:, None]
            positions = positions[:, -1:] + 1
        return torch.stack(columns, dim=1)

    def _new_hidden_states(self, token_count: int) -> torch.Tensor:
        shape = (self._job.batch_size, token_count, self.stage.config.hidden_size)
        return torch.zeros(shape, dtype=self._dtype, device=self._device)

    def _inputs(self, tokens: torch.Tensor, hidden_states: torch.Tensor) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": tokens} if self.stage.is_first else {"hidden_states": hidden_states}
        return inputs | ({"logits_to_keep": 1} if self.stage.is_last else {})

    def _call(self, inputs: dict[str, Any], positions: torch.Tensor) -> torch.Tensor:
        eager_steps = ppb.stats().eager_steps
        output = self._compiled(**inputs, position_ids=positions, past_key_values=self._cache)
        self.calls += 1
        # Every stage has attention, so a program that ran has run an eager step.
        self.calls_without_program += ppb.stats().eager_steps == eager_steps
        return output


if __name__ == "__main__":
    main()

"""One rank of the demo: ``python -m pp_piecewise_backend.demo.rank JOB.json REPORT_FOLDER`` under torchrun.

Loads the weights of its stage, and answers the job's prompts together with the other ranks: a `StageRunner` on each,
several prompts in the pipeline at once, and the tokens that the last rank chooses come back to the first.
"""

from __future__ import annotations

import re
import sys
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

import pp_piecewise_backend as ppb

from ..integrations.huggingface import DecoderStep, load_stage
from .job import Job, RankReport, report_path
from .schedule import Turn, turns

PROMPTS_AT_ONCE_PER_RANK = 2
FEEDBACK = {"tokens": ppb.Proxy((), torch.int64)}


@record
def main() -> None:
    job, report_folder = Job.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the ranks share the cores of one machine
    dist.init_process_group("nccl" if job.device == "cuda" else "gloo")
    try:
        report = _run(job)
        report_path(report_folder, report.rank).write_text(report.model_dump_json())
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _run(job: Job) -> RankReport:
    rank = dist.get_rank()
    device = torch.device("cuda", rank) if job.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    begin = time.perf_counter()
    stage = load_stage(job.model_dir, stages=job.ranks, stage=rank, device=device).requires_grad_(False)
    loaded = time.perf_counter()
    worker = Worker(job, DecoderStep(stage), device)
    with worker.runner:
        worker.runner.warmup(progress=rank == 0)
        compiled = time.perf_counter()
        dist.barrier()  # or the first prompt would be charged with waiting for the slowest compilation
        generating = time.perf_counter()
        generated = worker.generate()
        seconds = time.perf_counter() - generating
    return RankReport(
        rank=rank,
        layers=list(stage.layers),
        counters=dict(ppb.stats().items()),
        eager_parts=_eager_parts(),
        calls=worker.calls,
        calls_without_program=worker.calls_without_program,
        load_seconds=loaded - begin,
        compile_seconds=compiled - loaded,
        generate_seconds=seconds,
        generated=generated,
    )


def _eager_parts() -> dict[str, int]:
    parts: Counter[str] = Counter()
    for program in ppb.programs():
        for piece in program.pieces:
            if piece.kind == "eager":
                reason = re.sub(r"\d+", "*", piece.reason)
                parts[f"{', '.join(piece.ops)}: {reason}"] += 1
    return dict(parts)


class Worker:
    """One stage with its key-value caches and its runner, in step with the other ranks."""

    def __init__(self, job: Job, step: DecoderStep, device: torch.device) -> None:
        self.calls = 0
        self.calls_without_program = 0
        self._job = job
        self._device = device
        self._is_first, self._is_last = step.stage.is_first, step.stage.is_last
        self._is_alone = self._is_first and self._is_last
        self._slot_count = PROMPTS_AT_ONCE_PER_RANK * job.ranks
        prompt_tokens = len(job.prompts[0])
        self._caches = [step.new_cache(prompt_tokens + job.max_new_tokens) for _ in range(self._slot_count)]
        self._tag = b""
        self._own_results: deque[tuple[bytes, int]] = deque()
        self.runner = ppb.StageRunner(
            step,
            make_inputs=self._make_inputs,
            max_tokens=prompt_tokens,
            inputs=None if self._is_first else step.proxies,
            outputs=None if self._is_last else step.proxies,
            feedback=FEEDBACK if self._is_first != self._is_last else None,
            max_in_flight=self._slot_count,
            options=job.options,
        )

    def generate(self) -> list[list[int]] | None:
        """The new tokens of each prompt, as the first rank heard of them and as the last rank chose them; None between.

        Ends on all ranks when the first one has all that it needs.
        """
        generated: list[list[int]] = [[] for _ in self._job.prompts]
        chosen: list[list[int]] = [[] for _ in self._job.prompts]
        with tqdm(total=len(chosen), desc="pipeline", unit="prompt", disable=not self._is_first) as bar:
            schedule = turns(self._job, self._slot_count, generated, self._next_result, bar.update)
            eager_steps = ppb.stats().eager_steps
            for output in self.runner.run(map(self._microbatch, schedule) if self._is_first else None):
                self.calls += 1
                # Every stage has attention, so a program that ran has run an eager step.
                self.calls_without_program += ppb.stats().eager_steps == eager_steps
                eager_steps = ppb.stats().eager_steps
                if self._is_last:
                    token = int(output["tokens"][-1])
                    chosen[Turn.from_tag(self._tag).prompt].append(token)
                    if self._is_alone:
                        self._own_results.append((self._tag, token))
        return generated if self._is_first else chosen if self._is_last else None

    def _microbatch(self, planned: tuple[Turn, list[int]]) -> ppb.MicroBatch:
        turn, tokens = planned
        tag = turn.to_tag()
        inputs = {**self._make_inputs(len(tokens), tag), "input_ids": torch.tensor(tokens, device=self._device)}
        return ppb.MicroBatch(len(tokens), tag, inputs)

    def _next_result(self) -> tuple[bytes, int]:
        if self._is_alone:
            return self._own_results.popleft()
        tag, results = self.runner.feedback()
        return tag, int(results["tokens"][-1])

    def _make_inputs(self, num_tokens: int, tag: bytes) -> dict[str, Any]:
        self._tag = tag
        turn = Turn.from_tag(tag) if tag else Turn(prompt=0, slot=0, position=0)
        cache = self._caches[turn.slot]
        if turn.position == 0:
            cache.reset()
        position_ids = torch.arange(turn.position, turn.position + num_tokens, device=self._device)
        inputs: dict[str, Any] = {"position_ids": position_ids, "past_key_values": cache}
        return inputs | ({"input_ids": torch.zeros_like(position_ids)} if self._is_first else {})


if __name__ == "__main__":
    main()

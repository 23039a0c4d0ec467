"""One rank: loads its stage, drives it with a `StageRunner`, and on the last rank chooses the next tokens."""

from __future__ import annotations

import json
import re
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import pp_piecewise_backend as ppb

from ..decoder_stages import load_stage
from ..ranks import Emit, process_group
from ..slots import DecoderRows
from . import sampling
from .job import Job, RankReport
from .schedule import Run, Timetable, Turn, from_tag, turns

FEEDBACK = {"tokens": ppb.Proxy((), torch.int64)}


def run_rank(rank: int, count: int, folder: Path, job: Any, emit: Emit) -> None:
    """All that one process does: a target of `ranks.run_ranks`, which says what it emits in `run_stage`."""
    given = Job.model_validate(job)
    with process_group(rank, count, folder, given.device) as device:
        run_stage(given, rank, device, folder, emit)


def run_stage(job: Job, rank: int, device: torch.device, folder: Path, emit: Emit) -> None:
    """One rank of a process group that exists.

    It emits ``{"ready": True}`` once it is warm and ``{"report": ...}`` at its end; the first rank also
    ``{"tokens": [[prompt, token, whether it is the last], ...]}``, and ``{"trace": ...}`` if the job asks for it.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    begin = time.perf_counter()
    stage = load_stage(
        job.model_dir,
        layer_counts=job.layer_counts,
        stage=rank,
        device=device,
        dtype=None if job.dtype is None else getattr(torch, job.dtype),
    ).requires_grad_(False)
    loaded = time.perf_counter()
    worker = Worker(job, DecoderRows(stage, returns=("logits",) if job.temperature else ("tokens",)), device, emit)
    trace = folder / "trace.json"
    with worker.runner:
        if job.trace:
            worker.runner.trace(str(trace))
        with warnings.catch_warnings():
            if job.options.get("graphs") == "off":  # as was asked for
                warnings.filterwarnings("ignore", r"warmup\(\) captured nothing")
            worker.runner.warmup(progress=None if rank == 0 else False)  # a bar on a terminal only
        compiled = time.perf_counter()
        emit({"ready": True})
        dist.barrier()  # or the first prompt would be charged with waiting for the slowest compilation
        generating = time.perf_counter()
        worker.generate()
        seconds = time.perf_counter() - generating
    report = RankReport(
        rank=rank,
        layers=list(stage.layers),
        counters=dict(ppb.stats()),
        eager_parts=_eager_parts(),
        load_seconds=loaded - begin,
        compile_seconds=compiled - loaded,
        generate_seconds=seconds,
        times=str(worker.runner.report()),
    )
    emit({"report": report.model_dump()})
    if job.trace and rank == 0:
        emit({"trace": json.loads(trace.read_text())})


def _eager_parts() -> dict[str, int]:
    eager = (piece for program in ppb.programs() for piece in program.pieces if piece.kind == "eager")
    return dict(Counter(re.sub(r"\d+", "*", f"{', '.join(piece.ops)}: {piece.reason}") for piece in eager))


class Worker:
    """One stage with its caches and its runner, in step with the other ranks."""

    def __init__(self, job: Job, rows: DecoderRows, device: torch.device, emit: Emit) -> None:
        self._job = job
        self._device = device
        self._emit = emit
        self._is_first, self._is_last = rows.stage.is_first, rows.stage.is_last
        self._is_alone = self._is_first and self._is_last
        self._caches = [rows.new_cache(job.sequences, job.max_cache_tokens) for _ in range(job.groups)]
        self._timetable = Timetable(job)
        self._runs: Sequence[Run] = ()
        """Of the micro-batch that runs or ran last."""
        self._own_answers: deque[list[int]] = deque()
        self._new_tokens: list[tuple[int, int, bool]] = []
        self._warm_up_calls = 0
        self.runner = ppb.StageRunner(
            rows,
            make_inputs=self._make_inputs,
            max_tokens=job.max_tokens,
            inputs=None if self._is_first else rows.proxies,
            outputs=None if self._is_last else rows.proxies,
            feedback=FEEDBACK if self._is_first != self._is_last else None,
            finish=self._finish if self._is_last and not self._is_alone else None,
            max_in_flight=job.groups,
            options=job.options,
        )

    def generate(self) -> None:
        """Ends on all ranks when the first one has the last token of each prompt."""
        for output in self.runner.run(self._microbatches() if self._is_first else None):
            if self._is_alone and any(run.is_answered for run in self._runs):
                self._own_answers.append(self._finish(output, b"")["tokens"].tolist())

    def _microbatches(self) -> Iterator[ppb.MicroBatch]:
        for turn in turns(self._job, self._next_answers, lambda *token: self._new_tokens.append(token)):
            self._runs = turn.runs
            yield self._microbatch(turn)
        self._emit_tokens()

    def _microbatch(self, turn: Turn) -> ppb.MicroBatch:
        inputs = {
            **self._inputs(turn.tag[0], turn.runs),
            "input_ids": torch.tensor(turn.tokens, dtype=torch.int64, device=self._device),
        }
        is_answered = any(run.is_answered for run in turn.runs)
        return ppb.MicroBatch(len(turn.tokens), turn.tag, inputs, feedback=is_answered)

    def _next_answers(self) -> list[int]:
        self._emit_tokens()
        if self._is_alone:
            return self._own_answers.popleft()
        _, answers = self.runner.feedback()
        return answers["tokens"].tolist()

    def _emit_tokens(self) -> None:
        if self._new_tokens:
            self._emit({"tokens": self._new_tokens})
            self._new_tokens = []

    def _make_inputs(self, num_tokens: int, tag: bytes) -> dict[str, Any]:
        if tag:
            group, actions = from_tag(tag, self._job.sequences)
            self._runs = self._timetable.advance(group, actions)
            return self._inputs(group, self._runs)
        cache = self._caches[0]
        self._warm_up_calls += 1  # at other places each time: full graphs are compared under different contexts
        places = (torch.arange(num_tokens, device=self._device) + self._warm_up_calls) % cache.place_count
        inputs = {"places": places, "past_key_values": cache}
        return inputs | ({"input_ids": torch.zeros_like(places)} if self._is_first else {})

    def _inputs(self, group: int, runs: Sequence[Run]) -> dict[str, Any]:
        cache = self._caches[group]
        places = torch.cat([cache.places(run.sequence, run.position, run.length) for run in runs])
        return {"places": places, "past_key_values": cache}

    def _finish(self, output: Any, tag: bytes) -> dict[str, torch.Tensor]:
        """The tokens chosen for the micro-batch that just ran."""
        answered, row = [], -1
        for run in self._runs:
            row += run.length
            if run.is_answered:
                answered.append((row, run))
        rows = torch.tensor([row for row, _ in answered], device=self._device)
        if not self._job.temperature:
            return {"tokens": output["tokens"][rows]}
        keys = [(run.prompt, run.position + run.length) for _, run in answered]
        job = self._job
        drawn = sampling.draw(output["logits"][rows], keys, temperature=job.temperature, top_p=job.top_p, seed=job.seed)
        return {"tokens": drawn}

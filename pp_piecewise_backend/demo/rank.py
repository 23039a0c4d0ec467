"""The ranks of the demo: processes on this machine, each of which loads its stage and answers the job's prompts.

Each drives a `StageRunner`, several prompts are in the pipeline at once, and the tokens that the last rank chooses come
back to the first.
"""

from __future__ import annotations

import os
import re
import signal
import struct
import tempfile
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from pydantic import BaseModel
from tqdm import tqdm

import pp_piecewise_backend as ppb

from ..integrations.huggingface import DecoderStep, load_stage

PROMPTS_AT_ONCE_PER_RANK = 2
ENDING_SECONDS = 5.0
"""How long ranks that are asked to end may take before they are killed."""
FEEDBACK = {"tokens": ppb.Proxy((), torch.int64)}


class Job(BaseModel, frozen=True):
    """Prompts to continue greedily with a pipeline of ``ranks`` stages."""

    model_dir: str
    ranks: int
    layer_counts: list[int]
    """Layers of each rank's stage."""
    device: str
    """``cpu`` or ``cuda`` (one GPU per rank)."""
    options: dict[str, str]
    """Those of the backend."""
    prompts: list[list[int]]
    """Tokens; all rows have the same length."""
    max_new_tokens: int
    end_tokens: list[int]
    """A row that generated one of these is finished."""


class RankReport(BaseModel, frozen=True):
    """What one rank did; a file in JSON, by which it tells the process that started it."""

    rank: int
    layers: list[int]
    counters: dict[str, Any]
    """``ppb.stats()``, in which the calls of the warm-up do not count."""
    eager_parts: dict[str, int]
    """How often which ops run eagerly between the compiled pieces, and why; layers that differ only in their
    number count as one."""
    load_seconds: float
    compile_seconds: float
    generate_seconds: float
    times: str
    """Where the time of all ranks went, and the verdict."""
    generated: list[list[int]]
    """New tokens per prompt, the end token included; on the first rank only, which hears of them."""


def run_ranks(job: Job) -> list[RankReport]:
    """Runs ``job.ranks`` processes to their end; their output goes to this process's.

    Raises `torch.multiprocessing.ProcessRaisedException` or `ProcessExitedException` when one fails, once the others
    are stopped. After an interrupt, too, no rank is left.
    """
    with tempfile.TemporaryDirectory(prefix="pp_piecewise_demo_") as folder:
        run_processes(run_rank, (job, Path(folder)), job.ranks)
        return read_reports(job, Path(folder))


def run_processes(function: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """Run ``function(rank, *arguments)`` in processes to their end; ``function`` calls ``may_be_interrupted`` first.

    A terminal sends Ctrl-C to all of them. This process answers it, by ending the others, which would each print where
    they were.
    """
    # Blocked while they start, which they inherit: an interrupt in an import would be a traceback.
    resource_tracker.ensure_running()  # it would unblock it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    processes: Sequence[BaseProcess] = ()
    try:
        context = torch.multiprocessing.spawn(function, arguments, nprocs=count, join=False)
        processes = context.processes
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        while not context.join():
            pass
    except torch.multiprocessing.ProcessExitedException as error:
        if error.signal_name == "SIGINT":  # a rank was faster than this process
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _end(processes)


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + ENDING_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()


def may_be_interrupted() -> None:
    """An interrupt ends this process at once and without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def read_reports(job: Job, folder: Path) -> list[RankReport]:
    return [RankReport.model_validate_json((folder / f"rank{rank}.json").read_text()) for rank in range(job.ranks)]


def run_rank(rank: int, job: Job, folder: Path) -> None:
    """All that one process does. ``folder``, the same for all ranks and empty at first, gets the report."""
    may_be_interrupted()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # the ranks share the cores of one machine
    os.environ["RANK"] = str(rank)  # by which a dump names its folder
    device = torch.device("cuda", rank) if job.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=(folder / "rendezvous").as_uri(),
        rank=rank,
        world_size=job.ranks,
    )
    try:
        report = _run(job, rank, device)
        (folder / f"rank{rank}.json").write_text(report.model_dump_json())
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _run(job: Job, rank: int, device: torch.device) -> RankReport:
    begin = time.perf_counter()
    stage = load_stage(job.model_dir, layer_counts=job.layer_counts, stage=rank, device=device).requires_grad_(False)
    loaded = time.perf_counter()
    worker = Worker(job, DecoderStep(stage), device)
    with worker.runner:
        with warnings.catch_warnings():
            if job.options["graphs"] == "off":  # as was asked for
                warnings.filterwarnings("ignore", "warmup\\(\\) captured nothing")
            worker.runner.warmup(progress=None if rank == 0 else False)  # a bar on a terminal only
        compiled = time.perf_counter()
        dist.barrier()  # or the first prompt would be charged with waiting for the slowest compilation
        generating = time.perf_counter()
        generated = worker.generate()
        seconds = time.perf_counter() - generating
    return RankReport(
        rank=rank,
        layers=list(stage.layers),
        counters=dict(ppb.stats()),
        eager_parts=_eager_parts(),
        load_seconds=loaded - begin,
        compile_seconds=compiled - loaded,
        generate_seconds=seconds,
        times=str(worker.runner.report()),
        generated=generated,
    )


def _eager_parts() -> dict[str, int]:
    eager = (piece for program in ppb.programs() for piece in program.pieces if piece.kind == "eager")
    return dict(Counter(re.sub(r"\d+", "*", f"{', '.join(piece.ops)}: {piece.reason}") for piece in eager))


_LAYOUT = struct.Struct("<III")


class Turn(NamedTuple):
    """What one micro-batch is; every rank reads it from the tag."""

    prompt: int
    slot: int
    """Which of its key-value caches a rank takes. Prompts that are under way at once have different ones."""
    position: int
    """Of the first token of the micro-batch in its sequence; 0 starts a sequence, in an emptied cache."""

    def to_tag(self) -> bytes:
        return _LAYOUT.pack(*self)

    @classmethod
    def from_tag(cls, tag: bytes) -> Turn:
        return cls(*_LAYOUT.unpack(tag))


def turns(
    job: Job,
    slot_count: int,
    generated: list[list[int]],
    next_result: Callable[[], tuple[bytes, int]],
    on_end: Callable[[], object],
) -> Iterator[tuple[Turn, list[int]]]:
    """Greedy decoding of a job's prompts, at most ``slot_count`` of them at once: turns in order, with their tokens.

    Each prompt is one micro-batch of all its tokens, and then one micro-batch for each new token, which the last rank
    chose and ``next_result`` brings back: ``(tag, chosen token)`` of the oldest micro-batch that was not asked for.
    ``generated``, a list per prompt, gets the new tokens, the end token included; ``on_end`` is called when it has all.
    """
    waiting, free_slots = deque(enumerate(job.prompts)), deque(range(slot_count))
    while waiting or len(free_slots) < slot_count:
        if waiting and free_slots:
            prompt, tokens = waiting.popleft()
            yield Turn(prompt, free_slots.popleft(), position=0), tokens
            continue
        tag, token = next_result()
        turn = Turn.from_tag(tag)
        chosen = generated[turn.prompt]
        chosen.append(token)
        if token in job.end_tokens or len(chosen) == job.max_new_tokens:
            free_slots.append(turn.slot)
            on_end()
        else:
            yield turn._replace(position=len(job.prompts[turn.prompt]) + len(chosen) - 1), [token]


class Worker:
    """One stage with its key-value caches and its runner, in step with the other ranks."""

    def __init__(self, job: Job, step: DecoderStep, device: torch.device) -> None:
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

    def generate(self) -> list[list[int]]:
        """The new tokens of each prompt, on the first rank. Ends on all ranks when the first one has all of them."""
        generated: list[list[int]] = [[] for _ in self._job.prompts] if self._is_first else []
        with tqdm(
            total=len(generated), desc="pipeline", unit="prompt", disable=None if self._is_first else True
        ) as bar:
            schedule = turns(self._job, self._slot_count, generated, self._next_result, bar.update)
            for output in self.runner.run(map(self._microbatch, schedule) if self._is_first else None):
                if self._is_alone:
                    self._own_results.append((self._tag, int(output["tokens"][-1])))
        return generated

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

"""One rank of a check: runs its stage at every size, and says what replayed and why the rest did not."""

from __future__ import annotations

import itertools
import struct
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import pp_piecewise_backend as ppb

from ...debug.describe import describe
from ..decoder_stages import load_stage
from ..ranks import Emit, process_group
from ..slots import DecoderRows
from .job import CheckJob, import_all

TARGET = f"{__name__}:run_rank"
_TAG = struct.Struct("<I")


def run_rank(rank: int, count: int, folder: Path, job: Any, emit: Emit) -> None:
    """A target of `ranks.run_ranks`. It emits ``{"replayed": {...}}``, and the last rank ``{"logits": file}``: for each
    prompt the logits of all of its tokens."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    given = CheckJob.model_validate(job)
    import_all(given.imports)
    with process_group(rank, count, folder, given.device) as device:
        _run(given, rank, device, folder, emit)


def _run(job: CheckJob, rank: int, device: torch.device, folder: Path, emit: Emit) -> None:
    stage = load_stage(
        job.model_dir, layer_counts=job.layer_counts, stage=rank, device=device, dtype=getattr(torch, job.dtype)
    ).requires_grad_(False)
    rows = DecoderRows(stage, returns=("logits",))
    cache = rows.new_cache(1, job.max_cache_tokens)
    is_first, is_last = stage.is_first, stage.is_last

    warm_up_calls = itertools.count()

    def make_inputs(num_tokens: int, tag: bytes) -> dict[str, Any]:
        # Warm-up calls are at other places each time: full graphs are compared under different contexts.
        last = job.max_cache_tokens - num_tokens
        position = _TAG.unpack(tag)[0] if tag else next(warm_up_calls) % (last + 1)
        places = cache.places(0, position, num_tokens)
        inputs = {"places": places, "past_key_values": cache}
        return inputs | ({"input_ids": torch.zeros_like(places)} if is_first else {})

    def microbatches() -> Iterator[ppb.MicroBatch]:
        for prompt in job.prompts:
            for position, tokens in ((0, prompt[:-1]), (len(prompt) - 1, prompt[-1:])):
                tag = _TAG.pack(position)
                ids = torch.tensor(tokens, dtype=torch.int64, device=device)
                inputs = {**make_inputs(len(tokens), tag), "input_ids": ids}
                yield ppb.MicroBatch(len(tokens), tag, inputs)

    with ppb.StageRunner(
        rows,
        make_inputs=make_inputs,
        max_tokens=job.max_tokens,
        inputs=None if is_first else rows.proxies,
        outputs=None if is_last else rows.proxies,
        options=job.options,
    ) as runner:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"warmup\(\) captured nothing")
            runner.warmup(progress=None if rank == 0 else False)
        logits = [
            output["logits"].float().cpu() if job.dtype != "float32" else output["logits"].cpu()
            for output in runner.run(microbatches() if is_first else None)
            if output is not None
        ]
        emit({"replayed": replayed()})  # before graphs, and what is known of them, are released
    if is_last:
        path = folder / "logits.pt"
        torch.save([torch.cat(logits[at : at + 2]) for at in range(0, len(logits), 2)], path)
        emit({"logits": str(path)})


def replayed() -> dict[str, Any]:
    """What the programs of this process replayed, and in sentences what they did not."""
    stats = ppb.stats()
    why: Counter[str] = Counter()
    for program in ppb.programs():
        summary = describe(program)
        graphs = summary.graphs
        if summary.not_split:
            why[f"not split: {summary.not_split}"] += 1
        if graphs.reason:
            why[f"no graphs: {graphs.reason}"] += 1
        why.update(f"never captured, {piece.reason}: {piece.sentence}" for piece in graphs.never_captured)
        for bucket in graphs.buckets:
            why.update(f"not captured: {sentence}" for sentence in bucket.not_captured.values())
        why.update(f"bucket dropped, {bucket.reason}: {bucket.sentence}" for bucket in graphs.dropped)
        full = () if graphs.full is None else graphs.full.dropped
        why.update(f"full graph dropped, {bucket.reason}: {bucket.sentence}" for bucket in full)
        for miss in graphs.misses:
            why[f"{miss.reason}: {miss.sentence}"] += miss.pieces * miss.calls
    return {
        "replays": stats.replays,
        "misses": stats.graph_misses,
        "calls": stats.calls,
        "micro_batches": stats.microbatches,
        "why": dict(why),
    }

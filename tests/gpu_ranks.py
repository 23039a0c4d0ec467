"""Ranks of a pipeline whose tensors lie on GPUs, one for each rank or one for several; see ``test_runner_gpus.py``."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import pp_piecewise_backend as ppb
from models.small_pipeline import FEEDBACK, MAX_TOKENS, OPTIONS, PROXIES, PipelineStage, own_inputs, sizes
from rank_processes import LONGEST_SECONDS, SETUP_SECONDS

FAULTY_STEP = 5
HANGS_AFTER_SECONDS = LONGEST_SECONDS - 10


def one_rank(rank: int, count: int, folder: Path, job: Mapping[str, Any]) -> int:
    """Runs micro-batches, as the test wants it, and leaves counters and what came out in files."""
    faulthandler.dump_traceback_later(HANGS_AFTER_SECONDS)  # where, if it hangs
    index = rank % torch.cuda.device_count()
    torch.cuda.set_device(index)
    device = f"cuda:{index}"
    dist.init_process_group(
        job["default_group"], init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count
    )
    is_first, is_last = rank == 0, rank == count - 1
    with torch.no_grad():
        module = PipelineStage(rank, count).to(device)
    with ppb.StageRunner(
        module,
        make_inputs=lambda num_tokens, tag: own_inputs(is_first, num_tokens, tag, device),
        max_tokens=MAX_TOKENS,
        inputs=None if is_first else PROXIES,
        outputs=None if is_last else PROXIES,
        feedback=FEEDBACK if is_first or is_last else None,
        feedback_rows=job["feedback_rows"],
        transport=job["transport"],
        timeout_s=job["timeout_seconds"],
        setup_timeout_s=SETUP_SECONDS,
        options={**OPTIONS, "graphs": "cuda"},
    ) as runner:
        runner.warmup()
        before = ppb.stats()
        batches = (ppb.MicroBatch(n, str(number).encode()) for number, n in enumerate(sizes(job["microbatches"])))
        outputs, told = [], []
        try:
            steps = runner.run(batches if is_first else None, confirmed=job["confirmed"])
            for number, output in enumerate(steps):
                if output is not None:
                    outputs.append({name: tensor.clone() for name, tensor in output.items()})
                if rank == job.get("victim") and number == FAULTY_STEP:
                    if job["kind"] == "announces and dies":
                        runner._links.outgoing.send = die_late
                    else:
                        die(getattr(signal, job["kind"]))
                if is_first and number >= 3:
                    told.append(told_tokens(runner))
            if is_first:
                told += [told_tokens(runner) for _ in range(3)]
        except ppb.errors.PeerLost as error:
            print(f"lost at {time.time()}, after {len(outputs)} outputs: {error}", flush=True)
            raise
        after = ppb.stats()
    torch.cuda.synchronize()
    counted = {name: after[name] - before[name] for name in after if isinstance(after[name], int)}
    (folder / f"rank_{rank}.json").write_text(json.dumps({"counted": counted, "told": told}))
    if is_last:
        torch.save([{name: tensor.cpu() for name, tensor in output.items()} for output in outputs], folder / "outputs")
    dist.destroy_process_group()
    return 0


def die(*arguments: Any) -> None:
    print(f"fault at {time.time()}", flush=True)
    os.kill(os.getpid(), arguments[0] if isinstance(arguments[0], signal.Signals) else signal.SIGKILL)


def die_late(*_: Any) -> None:
    time.sleep(0.5)  # the neighbour hands out what had landed before
    die(signal.SIGKILL)


def told_tokens(runner: ppb.StageRunner) -> list[Any]:
    tag, tensors = runner.feedback(confirmed=False)
    runner.confirm_feedback()
    return [tag.decode(), tensors["next_tokens"].tolist()]

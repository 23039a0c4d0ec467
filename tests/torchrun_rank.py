"""One rank of a pipeline, as torchrun starts it: in its first life rank 1 dies, in its second all goes well.

    torchrun --nproc-per-node 2 --max-restarts 1 torchrun_rank.py FOLDER

What came of it goes into FOLDER/life_LIFE_rank_RANK.json. It ends by the ordinary end of the interpreter.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from handoff_ranks import play
from pp_piecewise_backend.pipeline.transports.torch_distributed import P2P

LONGEST_SECONDS = 100.0


def join_world(life: int) -> None:
    """``init_process_group`` from what torchrun sets for each rank, also after it has restarted them.

    The store of torchrun outlives the ranks, and with it the addresses that they had before a restart; under these
    gloo waits for the dead. So each restart gets keys of its own.
    """
    timeout = timedelta(seconds=LONGEST_SECONDS)
    store, rank, rank_count = next(iter(dist.rendezvous("env://", timeout=timeout)))
    fresh = dist.PrefixStore(f"restart_{life}", store)
    dist.init_process_group("gloo", store=fresh, rank=rank, world_size=rank_count, timeout=timeout)


def main() -> int:
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    join_world(life)
    transport = P2P("cpu", setup_seconds=LONGEST_SECONDS)
    if life == 0:
        outcome = play("fault", transport, silence_seconds=20.0, kind="exit", victim=1)
    else:
        outcome = play("steady", transport, silence_seconds=20.0, microbatches=20)
    report = Path(sys.argv[1]) / f"life_{life}_rank_{transport.stage}.json"
    report.write_text(json.dumps(asdict(outcome)))
    if outcome.error is None:
        dist.destroy_process_group()
    return outcome.exit_code


def one_rank(rank: int, count: int, folder: Path, job: Mapping[str, Any]) -> int:
    """The same in its first life, forked."""
    world = {"RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job["port"]}
    os.environ.update({name: str(value) for name, value in world.items()}, TORCHELASTIC_RESTART_COUNT="0")
    sys.argv[1:] = [str(folder)]
    return main()


if __name__ == "__main__":
    sys.exit(main())

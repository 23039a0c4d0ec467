"""Ranks in processes of their own, which start in milliseconds: forked from a server that has imported torch already.

    ended = run_ranks("handoff_ranks:one_rank", count=4, folder=tmp_path, job={...})

Each rank runs ``one_rank(rank, count, folder, job)`` and exits with what it returns, or with 1 and a traceback in its
log when it raises; it leaves by ``os._exit``, since taking torch down takes an interpreter a second, unless the job
says that it ``ends_itself``. Nothing here can outlive its time: the server kills what is late, and each rank asks the
kernel to do the same. How long ranks were ready to run while no processor was free is measured, and adds to what they
are allowed; nothing else does.

Run as a script, this file is the server.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

LONGEST_SECONDS = 60.0
"""No rank may take longer, whatever goes wrong in it, but for the time in which it waited for a processor."""
SETUP_SECONDS = 4 * LONGEST_SECONDS
"""For what ranks wait for in one another; and no rank may take longer, however busy the machine is."""
_POLL_SECONDS = 0.005


@dataclass
class Ended:
    """How one rank ended."""

    exit_code: int
    """Negative: the signal that killed it."""
    at: float
    """In seconds since the epoch."""
    waited_seconds: float
    """How long it waited for a processor, from when the first rank ended or stopped."""
    log: str = field(repr=False)


def run_ranks(
    target: str, count: int, folder: Path, job: Mapping[str, Any], left_alone: Sequence[int] = ()
) -> list[Ended]:
    """Run ``target`` ("module:function") on ``count`` ranks; fails when one of them hangs.

    Ranks ``left_alone`` are not waited for, and killed when the others have ended: one that was stopped never ends.
    """
    request = {"target": target, "count": count, "folder": str(folder), "job": job, "left_alone": [*left_alone]}
    answer = _Server.running().ask(request)
    logs = [_log(folder, rank).read_text() for rank in range(count)]
    if answer["late"]:
        told = "\n".join(f"--- rank {rank}\n{log}" for rank, log in enumerate(logs))
        raise AssertionError(f"ranks {answer['late']} hang\n{told}")
    return [Ended(*ended, log) for ended, log in zip(answer["ended"], logs, strict=True)]


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.log"


def waited_seconds(pid: int | str = "self") -> float:
    """How long the living threads of a process, together, were ready to run while no processor was free."""
    try:
        schedstats = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    except OSError:  # it ended meanwhile
        return 0.0
    return sum(int(waited_ns) for _, waited_ns, _ in schedstats) / 1e9


def leave_guards_unmeasured() -> None:
    """Keep Dynamo from measuring its guards, which only a debug log names.

    It empties the processor's caches for that, which takes a tenth of the time in which a small program is compiled.
    """
    if (guards := sys.modules.get("torch._dynamo.guards")) is not None:
        guards.profile_guard_manager = lambda *arguments: 0.0  # type: ignore[attr-defined]


class _Server:
    _only: _Server | None = None

    @classmethod
    def running(cls) -> _Server:
        if cls._only is None or cls._only._process.poll() is not None:
            cls._only = cls()
        return cls._only

    def __init__(self) -> None:
        here = Path(__file__).parent
        path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            # Asked otherwise whether there are GPUs, CUDA would begin in the server, and not work in forked ranks.
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self._process.kill)

    def ask(self, request: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the server of the ranks died"
        return json.loads(answer)


# ------------------------------------------------------------------------------- in the server


def _serve() -> None:
    # What is here is paid once, and not by each rank.
    import torch._dynamo
    import torch.distributed

    import pp_piecewise_backend.backend
    import pp_piecewise_backend.pipeline.transports.cuda_ipc
    import pp_piecewise_backend.pipeline.transports.shared_memory
    import pp_piecewise_backend.pipeline.transports.torch_distributed  # noqa: F401

    torch.set_num_threads(1)
    leave_guards_unmeasured()
    if not torch.cuda.is_available():  # Dynamo begins CUDA where there are GPUs
        _compile_once()
    for line in sys.stdin:
        request = json.loads(line)
        importlib.import_module(request["target"].partition(":")[0])  # once, and not in each rank
        pids = []
        for rank in range(request["count"]):
            pids.append(os.fork())
            if pids[-1] == 0:
                _run_rank(rank, request)
        print(json.dumps(_wait_for(pids, request["left_alone"])), flush=True)


def _compile_once() -> None:
    """Dynamo makes its tables, and what is imported at first use is."""
    import torch

    import pp_piecewise_backend as ppb

    def attend(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = (x @ weight)[None]
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)[0] @ weight

    x = torch.ones(3, 4)
    torch._dynamo.mark_dynamic(x, 0)
    compiled = torch.compile(attend, backend="pp_piecewise", options={"compiler": "eager", "graphs": "emulate"})
    with torch.no_grad():
        for _ in range(2):
            compiled(x, torch.ones(4, 4))
    torch._dynamo.reset()
    ppb.reset()


def _run_rank(rank: int, request: Mapping[str, Any]) -> NoReturn:
    signal.alarm(int(SETUP_SECONDS) + 5)
    log = os.open(_log(Path(request["folder"]), rank), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()
    module, _, function = request["target"].partition(":")
    exit_code = 1
    try:
        run = getattr(importlib.import_module(module), function)
        exit_code = run(rank, request["count"], Path(request["folder"]), request["job"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if not request["job"].get("ends_itself"):
            os._exit(exit_code)
    sys.exit(exit_code)


def _wait_for(pids: Sequence[int], left_alone: Sequence[int]) -> dict[str, Any]:
    ended: dict[int, tuple[int, float, float]] = {}
    late: list[int] = []
    began_at = time.monotonic()
    before: dict[int, float] = {}  # what each rank had waited for a processor when the first one ended or stopped
    waited = dict.fromkeys(range(len(pids)), 0.0)
    while len(ended) < len(pids):
        running = [rank for rank in range(len(pids)) if rank not in ended]
        seconds = time.monotonic() - began_at
        if not late and seconds > LONGEST_SECONDS:
            is_late = seconds > min(
                SETUP_SECONDS, LONGEST_SECONDS + max(waited_seconds(pids[rank]) for rank in running)
            )
            late = running if is_late else []
        if not before and (ended or any(_is_stopped(pids[rank]) for rank in running)):
            before = {rank: waited_seconds(pids[rank]) for rank in running}
        for rank in before.keys() & running:
            waited[rank] = max(waited[rank], waited_seconds(pids[rank]) - before[rank])
        if late or set(running) <= set(left_alone):
            for rank in running:
                os.kill(pids[rank], signal.SIGKILL)
        for rank in running:
            pid, status = os.waitpid(pids[rank], os.WNOHANG)
            if pid:
                ended[rank] = (os.waitstatus_to_exitcode(status), time.time(), waited[rank])
        time.sleep(_POLL_SECONDS)
    return {"ended": [ended[rank] for rank in range(len(pids))], "late": late}


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


if __name__ == "__main__":
    _serve()

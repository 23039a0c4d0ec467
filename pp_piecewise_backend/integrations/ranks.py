"""Ranks as processes of this machine: starts them, hears of what they do, and leaves none of them behind.

A rank is a fresh interpreter that calls ``target(rank, count, folder, job, emit)``. It is no child of
``multiprocessing``, so programs that start ranks need no ``if __name__ == "__main__"``, and notebooks can start them.
What it emits (JSON) goes through a pipe of its own; what it prints goes to stderr of the process that started it.

Note [no rank stays behind]
Each rank leads a session of its own, so Ctrl-C in a terminal reaches the starting process alone, which then ends the
rank with all that the rank started (compilers, for example). The job comes through the rank's stdin, which stays open:
when it closes, the starting process is gone, however it ended, and the rank kills its own session.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import RankFailed

if TYPE_CHECKING:
    import torch

Emit = Callable[[Any], None]
Target = Callable[[int, int, Path, Any, Emit], None]

CAUSE_SECONDS = 5.0
"""How long after a rank has lost another one the cause is waited for."""
_LAST_WORDS_SECONDS = 1.0
_STOP_SECONDS = 2.0
_POLL_SECONDS = 0.05
_CONSEQUENCES = ("PeerLost",)


def run_ranks(target: str, count: int, job: Any, on_event: Callable[[int, Any], None]) -> None:
    """Run ``target`` ("module:function") on ``count`` ranks to their end.

    Args:
        job: what JSON can hold; each rank gets it.
        on_event: called here, ``(rank, what it emitted)``, in the order of each rank.

    Raises:
        RankFailed: a rank raised or died; all others are stopped.
        Whatever ``on_event`` raises, and KeyboardInterrupt, once all ranks are stopped.
    """
    with tempfile.TemporaryDirectory(prefix="pp_piecewise_ranks_") as folder, _Ranks(target, count, folder) as ranks:
        ranks.send(json.dumps(job))
        ranks.listen(on_event)


class _Ranks(contextlib.AbstractContextManager["_Ranks"]):
    def __init__(self, target: str, count: int, folder: str) -> None:
        self._count = count
        self._processes: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []
        self._events: queue.Queue[tuple[int, str]] = queue.Queue()
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": paths, "RANK": "", "OMP_NUM_THREADS": _threads(count)}
        try:
            for rank in range(count):
                process = subprocess.Popen(
                    [sys.executable, "-m", __name__, target, str(rank), str(count), folder],
                    env={**environment, "RANK": str(rank)},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
                reader = threading.Thread(target=self._read, args=(rank, process), daemon=True)
                self._processes.append(process)
                self._readers.append(reader)
                reader.start()
        except BaseException:
            self.stop()
            raise

    def _read(self, rank: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._events.put((rank, line))

    def send(self, job: str) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it is dead, which is heard of
                process.stdin.write(job + "\n")
                process.stdin.flush()

    def listen(self, on_event: Callable[[int, Any], None]) -> None:
        """Until all ranks have ended well; raises when one has not."""
        failures: dict[int, tuple[str, str, str]] = {}  # kind, sentence, traceback
        running = set(range(self._count))
        deadline = float("inf")
        while running and time.monotonic() < deadline:
            try:
                rank, line = self._events.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                for rank, code in self._ended(running).items():
                    running.discard(rank)
                    if code and rank not in failures:
                        failures[rank] = ("", _how_it_ended(code), "")
            else:
                event = json.loads(line)
                if "failed" in event:
                    failures[rank] = tuple(event["failed"])
                else:
                    on_event(rank, event["event"])
            causes = [rank for rank, (kind, *_) in failures.items() if kind not in _CONSEQUENCES]
            if failures:
                deadline = min(deadline, time.monotonic() + (0 if causes else CAUSE_SECONDS))
        if failures:
            rank = next(iter(causes or failures))
            _, sentence, trace = failures[rank]
            raise RankFailed(f"rank {rank} of {self._count} failed: {sentence}", rank, trace)

    def _ended(self, running: Collection[int]) -> dict[int, int]:
        """Ranks of which nothing more will be heard, and their exit codes."""
        codes = {rank: code for rank in running if (code := _exit_code(self._processes[rank])) is not None}
        for rank in codes:
            # A child of the rank may have the pipe, too, which then stays open.
            self._readers[rank].join(_LAST_WORDS_SECONDS)
        return codes if self._events.empty() else {}

    def stop(self) -> None:
        """End all ranks, and what they started. See Note [no rank stays behind]."""
        deadline = time.monotonic() + _STOP_SECONDS
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            for process in self._processes:
                # A rank that ended is not reaped yet, so its number is still its own.
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(process.pid, signal_number)
            while time.monotonic() < deadline and any(_exit_code(p) is None for p in self._processes):
                time.sleep(_POLL_SECONDS / 10)
        for process, reader in zip(self._processes, self._readers, strict=True):
            process.wait()
            reader.join(_LAST_WORDS_SECONDS)
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
            if process.stdout is not None and not reader.is_alive():
                process.stdout.close()

    def __exit__(self, *_: Any) -> None:
        self.stop()


def _threads(count: int) -> str:
    """Ranks share the processors of one machine."""
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))


def _exit_code(process: subprocess.Popen[str]) -> int | None:
    """How it ended, if it did, as `subprocess` says it; it stays unreaped, so that its number is not given away."""
    if process.returncode is not None:
        return process.returncode
    ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _how_it_ended(code: int) -> str:
    if code > 0:
        return f"it ended with code {code}; what it printed is above"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return f"it was killed by {name}{hint}"


# ---------------------------------------------------------------------------------- in the rank


@contextlib.contextmanager
def process_group(rank: int, count: int, folder: Path, device_type: str) -> Iterator[torch.device]:
    """All ranks as one process group while the body runs; its value is the rank's own device.

    When the body ends well, all ranks wait for one another.
    """
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=(folder / "rendezvous").as_uri(), rank=rank, world_size=count)
    try:
        yield device
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _main(target: str, rank: str, count: str, folder: str) -> NoReturn:
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    lock = threading.Lock()

    def say(what: dict[str, Any]) -> None:
        with lock:
            events.write(json.dumps(what) + "\n")
            events.flush()

    exit_code = 1
    try:
        job = json.loads(_first_line())
        threading.Thread(target=_end_with_the_starting_process, daemon=True).start()
        module, _, function = target.partition(":")
        run: Target = getattr(importlib.import_module(module), function)
        run(int(rank), int(count), Path(folder), job, lambda event: say({"event": event}))
        exit_code = 0
    except BaseException as error:
        sentence = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
        with contextlib.suppress(OSError):
            say({"failed": [type(error).__name__, sentence, traceback.format_exc()]})
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    # Taking torch down takes a second, and threads of a broken pipeline may hold it up.
    os._exit(exit_code)


def _first_line() -> bytes:
    """Of stdin, and nothing after it."""
    line = b""
    while not line.endswith(b"\n"):
        got = os.read(0, 1 << 16)
        if not got:
            os._exit(1)
        line += got
    return line


def _end_with_the_starting_process() -> None:
    """See Note [no rank stays behind]."""
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    _main(*sys.argv[1:])

"""Ranks that are started as processes: what is heard of them, and that none of them stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkout import CHECKOUT, TESTS
from pp_piecewise_backend.errors import RankFailed
from pp_piecewise_backend.integrations.ranks import run_ranks

LONGEST_SECONDS = 60.0

pytestmark = pytest.mark.process


def run(target: str, count: int, job: Any, on_event: Callable[[int, Any], None] = lambda rank, event: None) -> None:
    run_ranks(f"started_ranks:{target}", count, job, on_event)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONGEST_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kill(pids: list[int]) -> None:
    """Where the test fails, nothing stays behind either."""
    for pid in filter(is_alive, pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def assert_all_end(pids: list[int]) -> None:
    assert pids
    wait_until(lambda: not any(map(is_alive, pids)))


def test_what_ranks_emit_is_heard_in_their_order_and_what_they_print_is_not(capfd: pytest.CaptureFixture[str]) -> None:
    heard: list[tuple[int, Any]] = []
    run("count_up", 2, {"up_to": 3}, lambda rank, event: heard.append((rank, event)))
    for rank in range(2):
        assert [event for by, event in heard if by == rank] == [{"number": n, "of": 2} for n in range(3)]
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.count("a line for people") == 2


def test_a_rank_that_raises_is_named_and_not_those_that_lost_it() -> None:
    with pytest.raises(RankFailed, match=r"^rank 1 of 3 failed: KeyError: 'the cause'$") as failed:
        run("raise_on_one", 3, {})
    assert failed.value.rank == 1 and "in raise_on_one" in failed.value.trace


def test_a_rank_that_is_killed_is_named_and_the_others_end() -> None:
    pids: list[int] = []
    with pytest.raises(RankFailed, match=r"^rank 1 of 2 failed: it was killed by SIGKILL"):
        run("kill_one", 2, {}, lambda rank, pid: pids.append(pid))
    assert_all_end(pids)


def test_a_rank_that_ends_without_a_word_is_named() -> None:
    with pytest.raises(RankFailed, match=r"^rank 0 of 1 failed: it ended with code 3"):
        run("leave", 1, {})


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_what_is_raised_while_listening_ends_all_ranks_and_what_they_started(error: type[BaseException]) -> None:
    pids: list[int] = []

    def hear(rank: int, event: list[int]) -> None:
        pids.extend(event)
        if len(pids) == 4:
            raise error

    try:
        with pytest.raises(error):
            run("sleep_with_a_child", 2, {}, hear)
        assert_all_end(pids)
    finally:
        kill(pids)


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_rank_outlives_the_process_that_started_it(signal_number: int, tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import signal
        from pp_piecewise_backend.integrations.ranks import run_ranks
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have jobs in the background ignore it
        run_ranks("started_ranks:sleep_with_a_child", 2, {}, lambda rank, pids: print(*pids, flush=True))
    """)  # without __main__: nothing imports the program again
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(CHECKOUT), str(TESTS)])}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    pids: list[int] = []
    try:
        assert process.stdout is not None
        pids += [int(pid) for _ in range(2) for pid in process.stdout.readline().split()]
        assert len(pids) == 4 and all(map(is_alive, pids))
        process.send_signal(signal_number)
        assert process.wait(LONGEST_SECONDS) != 0
        assert_all_end(pids)
    finally:
        process.kill()
        kill(pids)

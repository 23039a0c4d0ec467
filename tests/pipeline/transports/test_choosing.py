"""``transport="auto"``: of two ways that work the faster, the other one where one fails, and all ranks know why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import pp_piecewise_backend as ppb
import stream_scenarios
from handoff_ranks import MAX_TOKENS, Outcome, all_well, run
from models.small_pipeline import own_inputs
from plain_stage import Plain
from pp_piecewise_backend.pipeline.report import PipelineReport, RankTimes
from pp_piecewise_backend.pipeline.transports.base import LinkChoice
from pp_piecewise_backend.pipeline.transports.choosing import _decide
from pp_piecewise_backend.pipeline.transports.local import LocalHub

LINKS = [("proxies", 0, 1), ("proxies", 1, 2), ("feedback", 2, 0)]
BYTES_PER_TOKEN = {"proxies": 4 * 8 + 2 * 6, "feedback": 8}
SLOW_SECONDS = 0.02


def choose(folder: Path, transport: str = "auto", stages: int = 3, **arguments: Any) -> list[Outcome]:
    outcomes = all_well(run(transport, stream_scenarios.chooses, stages, folder, microbatches=10, **arguments))
    for outcome in outcomes:
        assert outcome.value == outcomes[0].value, "all ranks know of all links, and the same"
    return outcomes


@pytest.mark.process
@pytest.mark.parametrize("slow", ["emulated", "p2p"])
def test_the_faster_of_two_ways_is_taken_by_both_ends(slow: str, tmp_path: Path) -> None:
    faster = {"emulated": "p2p", "p2p": "emulated"}[slow]
    seconds = {"sharing": {"all": {"seconds": SLOW_SECONDS}}} if slow == "emulated" else {"sharing": {}}
    outcomes = choose(tmp_path, **seconds, p2p_seconds=SLOW_SECONDS if slow == "p2p" else 0.0)
    found = outcomes[0].value
    assert [(link["name"], link["source_rank"], link["target_rank"]) for link in found] == LINKS
    for link in found:
        assert link["transport"] == faster and not link["failed"], link
        assert link["sizes_bytes"] == [n * BYTES_PER_TOKEN[link["name"]] for n in (1, MAX_TOKENS)]
        assert [len(link["times_us"][way]) for way in ("emulated", "p2p")] == [2, 2]
        # What an answer takes is subtracted by an estimate.
        assert all(us > 0.5e6 * SLOW_SECONDS for us in link["times_us"][slow]), link
        assert all(us < 0.5e6 * SLOW_SECONDS for us in link["times_us"][faster]), link
        assert f"go over {faster}; emulated takes " in link["text"] and "; p2p takes " in link["text"]


@pytest.mark.process
@pytest.mark.parametrize(
    ("what", "cause", "failing_links"),
    [
        ("end", "RuntimeError: end fails here", [0, 1]),
        ("make", "RuntimeError: make fails here", [0]),
        pytest.param("take", "RuntimeError: take fails here", [1], marks=pytest.mark.slow),
        ("copy", "on rank 1: ConnectionError: what landed is not what was sent", [1]),
    ],
)
@pytest.mark.parametrize("has_rival", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_way_that_fails_on_one_rank_is_taken_by_neither_end_and_the_cause_is_logged_once(
    what: str, cause: str, failing_links: list[int], has_rival: bool, tmp_path: Path
) -> None:
    sharing = {"all": {"has_rival": has_rival}, "1": {"fails": what, "has_rival": has_rival}}
    p2p_seconds = SLOW_SECONDS if has_rival else 0.0
    outcomes = choose(tmp_path, sharing=sharing, p2p_seconds=p2p_seconds)
    for number, link in enumerate(outcomes[0].value):
        fails = number in failing_links
        assert link["transport"] == ("p2p" if fails else "emulated")
        assert ("emulated" in link["failed"]) is fails
        assert bool(link["times_us"]) is has_rival
        _, source, target = LINKS[number]
        for rank, outcome in enumerate(outcomes):
            lines = [line for line in outcome.log.splitlines() if link["text"] in line]
            assert len(lines) == (fails and rank in (source, target)), "one line on each end"
    for number in failing_links:
        assert cause in outcomes[0].value[number]["failed"]["emulated"], outcomes[0].value


@pytest.mark.process
@pytest.mark.parametrize("rank", [0, 1])
def test_where_torch_distributed_fails_memory_is_shared_though_it_is_slower(rank: int, tmp_path: Path) -> None:
    sharing = {"all": {"seconds": SLOW_SECONDS}}
    outcomes = choose(tmp_path, stages=2, sharing=sharing, p2p_fails=[rank])
    for link in outcomes[0].value:
        assert link["transport"] == "emulated" and set(link["failed"]) == {"p2p"}, link
        assert f"on rank {rank}: PeerLost: " in link["failed"]["p2p"] and "p2p fails here" in link["failed"]["p2p"]


@pytest.mark.process
def test_where_nothing_works_all_ranks_say_why(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"sharing": {"1": {"fails": "end"}}, "p2p_fails": [0]}
    outcomes = run("auto", stream_scenarios.chooses, 3, tmp_path, **arguments)
    for outcome in outcomes:
        assert outcome.error == "PeerLost" and "proxies from rank 0 to rank 1 have no transport" in outcome.message
        assert "end fails here" in outcome.message and "p2p fails here" in outcome.message, outcome.message


# ------------------------------------------------------------------------------- who reads of it

CHOICE = LinkChoice("proxies", 0, 1, "p2p", [8, 64], {"cuda_ipc": [20.0, 41.0], "p2p": [10.0, 40.0]})
SENTENCE = (
    "proxies from rank 0 to rank 1 go over p2p; cuda_ipc takes 20 us for 8 bytes, 41 us for 64 bytes; p2p takes "
    "10 us for 8 bytes, 40 us for 64 bytes"
)


def test_a_report_says_how_links_were_chosen_where_there_was_a_choice() -> None:
    times = (RankTimes(0, 2, 10.0, 10.0),)
    report = PipelineReport(times, links=(CHOICE, LinkChoice("proxies", 1, 2, "shared_memory")))
    assert SENTENCE in str(report).splitlines() and "shared_memory" not in str(report)
    assert str(report).splitlines()[-1] == report.verdict


@pytest.mark.usefixtures("fresh_backend")
def test_the_runner_and_explain_say_how_links_were_chosen() -> None:
    transport = LocalHub(1).transport(0)
    transport.choices = [CHOICE]  # type: ignore[attr-defined]
    options = {"compiler": "eager", "graphs": "off"}
    with ppb.StageRunner(
        Plain(0, 1), make_inputs=lambda n, tag: own_inputs(True, n, b""), max_tokens=4, transport=transport,
        options=options,
    ) as runner:  # fmt: skip
        runner.warmup()
        assert runner.report().links == (CHOICE,)
        explained = " ".join(ppb.explain().split())
        assert f"hand-off {SENTENCE}" in explained
        assert [program.explain() for program in ppb.programs()]


@pytest.mark.parametrize(
    ("p2p_us", "chosen"),
    [([40.0, 200.0], "cuda_ipc"), ([36.0, 150.0], "cuda_ipc"), ([20.0, 30.0], "p2p"), ([20.0, 180.0], "p2p")],
)
def test_nccl_is_taken_where_it_is_clearly_faster(p2p_us: list[float], chosen: str) -> None:
    found = {"cuda_ipc": ("", [40.0, 200.0]), "p2p": ("", p2p_us)}
    assert _decide(("proxies", 0, 1), [8, 64], found, found).transport == chosen


# ------------------------------------------------------------------------------------- on GPUs


@pytest.mark.process
@pytest.mark.cuda
def test_both_ways_between_two_gpus_are_measured_and_the_faster_is_taken(tmp_path: Path) -> None:
    outcomes = choose(tmp_path, "auto on GPUs", stages=2)
    for link in outcomes[0].value:
        print(link["text"])
        assert set(link["times_us"]) == {"cuda_ipc", "p2p"} and not link["failed"], link
        products = {way: small * large for way, (small, large) in link["times_us"].items()}
        assert link["transport"] == ("p2p" if products["p2p"] < 0.7**2 * products["cuda_ipc"] else "cuda_ipc")

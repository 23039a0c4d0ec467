"""What is read from the log of an engine that starts, and what is printed of it; engines need vLLM."""

from __future__ import annotations

import json
import logging
import logging.config
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkout import BENCH

sys.path.insert(0, str(BENCH))
from gpu_vllm import ENGINES, line, logging_config, phases, read_log


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    """The file that the messages of a logger named ``vllm`` go to, for this test."""
    path, logger = tmp_path / "vllm.log", logging.getLogger("vllm")
    before = logger.handlers, logger.level, logger.propagate
    logging.config.dictConfig(json.loads(json.dumps(logging_config(str(path)))))
    yield path
    for handler in logger.handlers:
        handler.close()
    logger.handlers, logger.level, logger.propagate = before


def test_phases_and_times_are_read_from_what_is_logged(log: Path) -> None:
    logger = logging.getLogger("vllm.worker")
    logger.info("before the engine")
    began = time.time() + 0.002
    time.sleep(0.01)
    logger.info("Starting to load model %s...", "/a/folder")
    for seconds in (3.25, 4.5):  # of two workers
        logger.info("Model loading took %s GiB memory and %.6f seconds", "7.1", seconds)
    logger.info("Graph capturing finished in %.0f secs, took %.2f GiB", 2.6, 1.25)
    logger.info("Found\n%s", "lines\tof a\ttable")
    logger.warning("init engine (profile, create kv cache, warmup model) took %.2f s", 9.5e-05)
    ready = time.time() + 0.002
    time.sleep(0.01)
    logger.info("Model loading took %s GiB memory and %.6f seconds", "7.1", 99.0)

    seconds, said = read_log(log.read_text(), began, ready)
    assert 0.005 < seconds.pop("processes") < ready - began
    assert seconds == {"weights": 4.5, "capture_by_vllm": 2.6, "profile_and_warm_up": 9.5e-05}
    assert [text.partition(": ")[2] for text in said] == [
        "Starting to load model %s...",
        *(["Model loading took %s GiB memory and %.6f seconds"] * 2),
        "Graph capturing finished in %.0f secs, took %.2f GiB",
        "init engine (profile, create kv cache, warmup model) took %.2f s",
    ]
    assert "/a/folder" not in "".join(said) and all("MainProcess" in text for text in said)


@pytest.mark.parametrize("text", ["", "INFO 11-30 14:15:06 [core.py:386] init engine took 3 s", "1.000\tMainProcess\n"])
def test_a_log_that_says_nothing_gives_no_phases(text: str) -> None:
    assert read_log(text, 0.0, 1e12) == ({}, [])
    assert phases({"phases_s": {"engine": {}, "workers": [{}, {}]}}) == phases({}) == ""


def test_the_line_has_the_slowest_workers_whoever_captured() -> None:
    engine = {"processes": 26.0, "weights": 4.5, "capture_by_vllm": 2.0, "profile_and_warm_up": 20.0}
    workers = [{"compile_pieces": 7.5, "capture_pieces": 4.0}, {"compile_pieces": 8.75, "capture_pieces": 3.0}]
    run = {"engine": "ours", "caches": "cold", "status": "ok", "ready_s": 60.0, "ms_per_token": {"1": 4.5}}
    run["ms_per_token_extremes"] = {"1": (4.4, 4.7)}
    run |= {"prefill_tokens_per_s": 1000.0, "kv_cache_blocks": 7, "phases_s": {"engine": engine, "workers": workers}}
    expected = "ready 60.0 s (processes 26.0, weights 4.5, compile 8.8, capture 6.0)"
    assert f"{expected}  1: 4.50 ms (4.40 to 4.70)  prefill 1000 tokens/s" in line(run)


def test_by_default_nothing_is_asked_for_but_the_backend() -> None:
    assert ENGINES["ours"] == {"compilation_config": {"backend": "pp_piecewise"}}

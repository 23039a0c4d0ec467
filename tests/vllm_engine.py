"""One engine of vLLM in a process of its own: ``vllm_engine.py MODEL OUT.json KEYWORDS``, as JSON and for ``LLM``.

It answers the same prompts whatever the keywords are, and writes down the token ids and what its workers report.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

SETTINGS = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
NEW_TOKENS = 6
VOCABULARY = 126
BATCHES = (1, 2, 7, 32)
"""Prompts that are answered together, one batch after the other."""


def prompts(count: int) -> list[list[int]]:
    """Token ids of prompts of 1 to 200 tokens, some of which begin alike."""
    state, made = 12345, []
    for number in range(count):
        length = 1 if number == 0 else 200 if number == 5 else 1 + (number * 37) % 90
        tokens = []
        for _ in range(length):
            state = (state * 1103515245 + 12345) % (1 << 31)
            tokens.append((state >> 8) % VOCABULARY)
        if number % 4 == 3:
            tokens = [*made[-1][:64], *tokens[:100]]
        made.append(tokens)
    return made


def main(model: str, out: str, keywords: str) -> None:
    os.environ.update({name: value for name, value in SETTINGS.items() if name not in os.environ})
    from vllm import LLM, SamplingParams

    given: dict[str, Any] = {"max_model_len": 256, "max_num_batched_tokens": 256, "max_num_seqs": 32, "seed": 0}
    given |= {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "disable_log_stats": False,
        "kv_cache_memory_bytes": 2**26,
        "enable_prefix_caching": False,
        **json.loads(keywords),
    }
    if given.get("node_rank"):
        serve_another_machine(model, given)
    engine = LLM(model=model, **given)
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    asked, answers = prompts(sum(BATCHES)), []
    for size in BATCHES:
        batch = [{"prompt_token_ids": tokens} for tokens in asked[len(answers) : len(answers) + size]]
        answers += [list(a.outputs[0].token_ids) for a in engine.generate(batch, greedy, use_tqdm=False)]
    written: dict[str, Any] = {"answers": answers, "lengths": [len(tokens) for tokens in asked]}
    written["metrics"] = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
    if "compilation_config" in given:
        written["workers"] = engine.collective_rpc("pp_piecewise_report")
    Path(out).write_text(json.dumps(written))
    engine.llm_engine.engine_core.shutdown()
    os._exit(0)  # threads of vLLM may be left


def serve_another_machine(model: str, given: dict[str, Any]) -> NoReturn:
    """The workers of another machine than the first, until the first one ends: what ``vllm serve --headless`` does."""
    from vllm import AsyncEngineArgs
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    config = AsyncEngineArgs(model=model, **given).create_engine_config(headless=True)
    MultiprocExecutor(config, monitor_workers=False).start_worker_monitor(inline=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])

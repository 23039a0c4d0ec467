"""A pipeline of ranks with StageRunner. Run it: torchrun --nproc-per-node 2 pipeline.py (any number of ranks works)

The first rank sends prompts of different lengths; each rank receives into the memory that its captured pieces read; the
last rank chooses a token per row, which comes back to the first. Every token is compared with all stages run eagerly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import pp_piecewise_backend as ppb

VOCABULARY, HIDDEN, MAX_TOKENS = 32, 16, 8


class Stage(nn.Module):
    """``input_ids`` int64 ``[tokens]`` on the first stage, ``hidden_states`` ``[tokens, HIDDEN]`` on the others."""

    def __init__(self, stage: int, stages: int) -> None:
        super().__init__()
        torch.manual_seed(stage)  # every rank can make every stage
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN) if stage == 0 else None
        self.layers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(2))
        self.head = nn.Linear(HIDDEN, VOCABULARY) if stage == stages - 1 else None

    def forward(self, input_ids: Tensor | None = None, hidden_states: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embedding(input_ids) if self.embedding is not None else hidden_states
        assert x is not None
        for layer in self.layers:
            q = layer(x)[None]
            x = x + nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)[0]
        return {"hidden_states": x} if self.head is None else {"next_tokens": self.head(x).argmax(-1)}


def eagerly(input_ids: Tensor, stages: int) -> Tensor:
    rows = {"input_ids": input_ids}
    with torch.inference_mode():
        for stage in range(stages):
            rows = Stage(stage, stages)(**rows)
    return rows["next_tokens"]


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    first, last = rank == 0, rank == ranks - 1
    proxies = {"hidden_states": ppb.Proxy((HIDDEN,), torch.float32)}
    feedback = {"next_tokens": ppb.Proxy((), torch.int64)}
    prompts = [torch.arange(length) for length in (3, 8, 1, 5)]

    def make_inputs(num_tokens: int, tag: bytes) -> dict[str, Any]:
        """This stage's own arguments; ``tag`` is b"" at warm-up."""
        return {"input_ids": torch.zeros(num_tokens, dtype=torch.int64)} if first else {}

    def microbatches(runner: ppb.StageRunner) -> Iterator[ppb.MicroBatch]:
        for number, prompt in enumerate(prompts):  # all are in flight before the first result is read
            yield ppb.MicroBatch(len(prompt), tag=str(number).encode(), inputs={"input_ids": prompt})
        for _ in prompts if ranks > 1 else ():
            tag, results = runner.feedback()
            assert torch.equal(results["next_tokens"], eagerly(prompts[int(tag)], ranks))
            print(f"prompt {int(tag)}: {results['next_tokens'].tolist()}, as eager says")

    with ppb.StageRunner(
        Stage(rank, ranks),
        make_inputs=make_inputs,
        max_tokens=MAX_TOKENS,
        inputs=None if first else proxies,
        outputs=None if last else proxies,
        feedback=feedback if ranks > 1 and (first or last) else None,
        options={"compiler": "eager", "graphs": "emulate"},  # on GPUs: leave both out, and use the nccl back end
    ) as runner:
        runner.warmup()
        outputs = list(runner.run(microbatches(runner) if first else None))
        if last:
            for prompt, output in zip(prompts, outputs, strict=True):
                assert torch.equal(output["next_tokens"], eagerly(prompt, ranks))
        print(f"rank {rank}: {runner.stats.proxy_copies} proxies copied, {runner.stats.pickles} objects pickled")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

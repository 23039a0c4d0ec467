"""The attention of the pipeline benchmark is right at lengths that change from step to step, in graphs too."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from checkout import BENCH

sys.path.insert(0, str(BENCH))
import slot_attention
from decoder import MODELS, DecoderStage
from slot_attention import StepTensors, rows_with_choice, step_batch
from step_schedule import Call, Schedule

import pp_piecewise_backend as ppb

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
SLOT_ROWS, SLOTS = 160, 10
MAX_TOKENS = 96

# (old length of each sequence, new tokens of each), one after the other in the same memory; a sequence goes on, or
# begins again at any length that its slot has had.
FEW_ROWS = [
    ([0, 0, 0], [6, 1, 1]),
    ([6, 1, 1], [1, 1, 6]),
    ([7, 2, 7], [1, 6, 1]),
    ([2, 8, 3], [6, 1, 1]),
]
MANY_ROWS = [
    ([0], [96]),
    ([0, 0, 0], [40, 26, 30]),
    ([40, 26, 30, 0, 0, 0, 0, 0], [1, 1, 1, 40, 50, 1, 1, 1]),
    ([30, 7], [95, 1]),
]
BATCHES = {"few rows": FEW_ROWS, "many rows": MANY_ROWS}

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])


def by_hand(
    history: dict[int, list[tuple[torch.Tensor, torch.Tensor]]],
    old: list[int],
    new: list[int],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> torch.Tensor:
    """Row by row, over keys and values of each sequence in a list."""
    found, row = [], 0
    for number, (length, count) in enumerate(zip(old, new, strict=True)):
        past = history.setdefault(number, [])
        for position in range(length, length + count):
            past[position:] = [(k[row], v[row]), *past[position + 1 :]]
            keys, values = (torch.stack(each[: position + 1]) for each in zip(*past, strict=True))
            keys, values = (each.repeat_interleave(HEADS // KV_HEADS, dim=1) for each in (keys, values))
            weights = (torch.einsum("hd,nhd->hn", q[row], keys) / HEAD_DIM**0.5).softmax(-1)
            found.append(torch.einsum("hn,nhd->hd", weights, values))
            row += 1
    return torch.stack(found)


@devices
@pytest.mark.parametrize("rows", list(BATCHES))
def test_attention_replays_rightly_when_lengths_change(device: str, rows: str) -> None:
    """On a GPU the launch is recorded once, at the lengths of the first step."""
    is_cuda = device == "cuda"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    batches = BATCHES[rows]
    tokens = sum(batches[0][1])
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    step = StepTensors(MAX_TOKENS, device)
    q, out = random(tokens, HEADS, HEAD_DIM), random(tokens, HEADS, HEAD_DIM)
    k, v = random(tokens, KV_HEADS, HEAD_DIM), random(tokens, KV_HEADS, HEAD_DIM)
    caches = [torch.full((SLOTS * SLOT_ROWS, KV_HEADS, HEAD_DIM), 9.0, dtype=dtype, device=device) for _ in range(2)]

    def run() -> None:
        torch.ops.slot_attention.attend(q, k, v, *caches, out, step.cache_rows, step.sequences, SLOT_ROWS, SLOT_ROWS)

    replay: Callable[[], Any] | None = None
    history: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for old, new in batches:
        step.fill(step_batch([SLOT_ROWS * number for number in range(len(new))], old, new))
        for tensor in (q, k, v):
            tensor.normal_(generator=generator)
        out.fill_(float("nan"))
        if replay is None:
            replay = captured(run) if is_cuda else run
        replay()
        wanted = by_hand(history, old, new, *(tensor.double().cpu() for tensor in (q, k, v)))
        torch.testing.assert_close(
            out.double().cpu(), wanted, atol=2e-2 if is_cuda else 1e-5, rtol=2e-2 if is_cuda else 1e-5
        )


def captured(run: Callable[[], None]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@devices
@pytest.mark.usefixtures("fresh_backend")
def test_a_full_graph_chooses_the_tokens_that_eager_does_when_lengths_change(device: str) -> None:
    """And tokens of lengths that stood still would be others."""
    schedule = Schedule(max_tokens=MAX_TOKENS, context_tokens=48, in_flight=1)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    step = StepTensors(MAX_TOKENS, device)
    stage = DecoderStage(MODELS["tiny"], 0, 1, schedule.slots, step, dtype=dtype)
    compiled = torch.compile(
        stage,
        backend="pp_piecewise",
        options={
            **slot_attention.OPTIONS,
            "mode": "full",
            "graphs": "cuda" if device == "cuda" else "emulate",
            "compiler": "eager",
            "capture_sizes": "8,96",
            "max_tokens": MAX_TOKENS,
        },
    )
    calls = [Call(8, kind, 0, number) for number in range(3) for kind in ("jumps", "mixed")]
    calls += [Call(96, "prompts", 0, number) for number in range(4)]
    ids = torch.randint(MODELS["tiny"].vocabulary, (MAX_TOKENS,), device=device)
    warm_up_calls = iter(range(100))

    def make_inputs(tokens: int) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        call = Call(tokens, "jumps" if tokens <= 64 else "prompts", 0, next(warm_up_calls))
        return (stage.step.fill(schedule.batch(call)), ids[:tokens]), {}

    with torch.no_grad():
        ppb.warmup(compiled, make_inputs, progress=False)
        before = ppb.stats()
        got, wanted, frozen = [], [], []
        for found, run, is_frozen in ((wanted, stage, False), (got, compiled, False), (frozen, stage, True)):
            stage.reset_cache()
            for number, call in enumerate(calls):
                batch = schedule.batch(call)
                if number == 0 or not is_frozen or call.tokens != calls[number - 1].tokens:
                    positions = stage.step.fill(batch)
                tokens = run(positions, ids[: call.tokens])["tokens"]
                found.append(tokens[: len(rows_with_choice(batch))].tolist())
        after = ppb.stats()
    assert got == wanted
    assert after["replays"] - before["replays"] == len(calls)
    assert after["graph_misses"] == before["graph_misses"]
    changed = [a != b for number, (a, b) in enumerate(zip(frozen, wanted, strict=True)) if number not in (0, 6)]
    assert all(changed)


def test_sequences_of_many_rows_are_bounded() -> None:
    with pytest.raises(ValueError, match="100 rows belong to 10 sequences, but at most 8"):
        step_batch([0] * 10, [0] * 10, [10] * 10)


def test_all_ranks_know_a_call_from_its_tag() -> None:
    call = Call(96, "prompts", 3, 1_000_000)
    assert len(call.to_tag()) <= 24 and Call.from_tag(96, call.to_tag()) == call
    schedules = [Schedule(max_tokens=MAX_TOKENS, context_tokens=16, in_flight=4) for _ in range(2)]
    for kind, tokens in (("decode", 8), ("jumps", 64), ("mixed", 8), ("mixed", 1), ("prompts", 96)):
        for step in range(70):
            a, b = (schedule.batch(Call(tokens, kind, 3, step)) for schedule in schedules)
            assert (a.cache_rows == b.cache_rows).all() and (a.sequences == b.sequences).all()
            assert len(set(a.cache_rows.tolist())) == tokens == a.num_tokens
            assert a.cache_rows.max() < schedules[0].slots.rows
            assert a.sequences[2].max() <= schedules[0].slots.longest

"""The engine-style stage, compiled with the one line: results, effects, and how often anything compiles."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import pp_piecewise_backend as ppb
from models.toy_stage import NAMED_OPS, ToyStage
from tiers import slow_but

ATTENTION = "toy::attention"
VARIANTS: dict[str, dict[str, Any]] = {
    "middle": {},
    "middle-inplace-norm": {"inplace_norm": True},
    "middle-returned-attention": {"attention_output_argument": False},
    "first": {"first": True},
    "first-inplace-norm": {"first": True, "inplace_norm": True},
    "last-inplace-norm": {"last": True, "inplace_norm": True},
    "whole": {"first": True, "last": True},
}
# (tokens, first position): prefill, continuation, decode, the largest, and sizes seen before.
CALLS = ((8, 0), (5, 8), (1, 13), (16, 0), (8, 16), (1, 24), (2, 25))


pytestmark = pytest.mark.usefixtures("fresh_backend")


def compile_stage(stage: ToyStage, compiler: str = "eager") -> Any:
    return torch.compile(stage, backend="pp_piecewise", options={"compiler": compiler, **NAMED_OPS})


def mark_tokens_dynamic(inputs: dict[str, Tensor | None]) -> None:
    for tensor in inputs.values():
        if tensor is not None:
            torch._dynamo.mark_dynamic(tensor, 0)


def assert_call_equals_eager(
    compiled: Any,
    stage: ToyStage,
    reference: ToyStage,
    tokens: int,
    start: int,
    *,
    mark: bool = False,
    tolerance: float = 0.0,
) -> None:
    """One call of both; compares outputs, what became of the arguments, and the KV caches."""
    inputs = stage.make_inputs(tokens, start, seed=tokens + start)
    expected_inputs = copy.deepcopy(inputs)
    if mark:
        mark_tokens_dynamic(inputs)
    output, expected = compiled(**inputs), reference(**expected_inputs)
    assert type(output) is type(expected)
    outputs, expected_outputs = (value if isinstance(value, tuple) else (value,) for value in (output, expected))
    for got, want in zip(outputs, expected_outputs, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        assert got.stride() == want.stride()
    for name, want_input in expected_inputs.items():
        if want_input is not None:
            torch.testing.assert_close(
                inputs[name],
                want_input,
                rtol=tolerance,
                atol=tolerance,
                msg=lambda text, name=name: f"{name}: {text}",
            )
    for got_input, want_input in zip(inputs.values(), expected_inputs.values(), strict=True):
        if want_input is not None:
            aliases = [value is got_input for value in outputs]
            assert aliases == [value is want_input for value in expected_outputs]
    for (name, got), want in zip(stage.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(
            got, want, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def attention_steps(program: Any) -> int:
    return sum(piece.kind == "eager" and any(ATTENTION in name for name in piece.ops) for piece in program.pieces)


@pytest.mark.compat
@pytest.mark.parametrize("variant", slow_but(["first-inplace-norm", "last-inplace-norm"], list(VARIANTS)))
def test_equal_to_eager_bit_by_bit(variant: str) -> None:
    stage = ToyStage(2, **VARIANTS[variant])
    reference = copy.deepcopy(stage)
    compiled = compile_stage(stage)
    for index, (tokens, start) in enumerate(CALLS):
        assert_call_equals_eager(compiled, stage, reference, tokens, start, mark=index == 0)
    programs = ppb.programs()
    assert sum(program.stats.calls for program in programs) == len(CALLS)
    assert [attention_steps(program) for program in programs] == [2] * len(programs)
    assert ppb.stats().unmatched_split_ops == 0


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["middle", "middle-inplace-norm", "whole"])
def test_equal_to_eager_with_inductor(variant: str) -> None:
    stage = ToyStage(2, **VARIANTS[variant])
    reference = copy.deepcopy(stage)
    compiled = compile_stage(stage, "inductor")
    for index, (tokens, start) in enumerate(CALLS):
        assert_call_equals_eager(compiled, stage, reference, tokens, start, mark=index == 0, tolerance=2e-5)
    assert sum(program.stats.calls for program in ppb.programs()) == len(CALLS)


@pytest.mark.compat
@pytest.mark.parametrize(
    ("num_layers", "inplace_norm"),
    slow_but([(3, False), (5, True)], [(3, False), (5, True), (10, False), (10, True), (64, False), (64, True)]),
)
def test_three_pieces_are_compiled_at_any_depth(num_layers: int, inplace_norm: bool) -> None:
    stage = ToyStage(num_layers, inplace_norm=inplace_norm)
    compiled = compile_stage(stage)
    inputs = stage.make_inputs(8)
    mark_tokens_dynamic(inputs)
    with ppb.expect(programs=1, pieces=num_layers + 1, pieces_compiled=3, pieces_reused=num_layers - 2, recompiles=0):
        compiled(**inputs)
    (program,) = ppb.programs()
    compute = [piece for piece in program.pieces if piece.kind == "compute"]
    assert len(compute) == num_layers + 1
    assert len({piece.key for piece in compute}) == 3
    assert len({piece.key for piece in compute[1:-1]}) == 1
    assert attention_steps(program) == num_layers


def test_three_pieces_are_compiled_with_inductor() -> None:
    stage = ToyStage(3, inplace_norm=True)
    reference = copy.deepcopy(stage)
    compiled = compile_stage(stage, "inductor")
    with ppb.expect(programs=1, pieces=4, pieces_compiled=3, pieces_reused=1, calls=3):
        for tokens, start in ((8, 0), (5, 8), (16, 0)):
            assert_call_equals_eager(compiled, stage, reference, tokens, start, mark=start == 0, tolerance=2e-5)


def test_what_the_explanation_is_made_of() -> None:
    stage = ToyStage(2)
    inputs = stage.make_inputs(8)
    mark_tokens_dynamic(inputs)
    compile_stage(stage)(**inputs)
    (program,) = ppb.programs()
    kinds = {graph_input.source: graph_input.kind for graph_input in program.inputs}
    assert kinds["L['hidden_states']"] == kinds["L['residual']"] == "stage-input"
    assert kinds["L['positions']"] == "per-token"
    by_module = [graph_input for graph_input in program.inputs if graph_input.source.startswith("L['self']")]
    caches = {graph_input.kind for graph_input in by_module if "_cache" in graph_input.source}
    weights = {graph_input.kind for graph_input in by_module if "weight" in graph_input.source}
    assert caches == {"state"}
    assert weights == {"parameter"}
    assert all(graph_input.reason for graph_input in program.inputs)
    assert any(piece.reads_stage_inputs for piece in program.pieces)
    assert program.pieces[-1].writes_stage_outputs
    assert ATTENTION in program.explain()


def test_two_instances_through_one_program() -> None:
    stages = [ToyStage(2, inplace_norm=True, seed=seed) for seed in range(3)]
    references = [copy.deepcopy(stage) for stage in stages]
    compiled = [compile_stage(stage) for stage in stages]
    for round_index, (tokens, start) in enumerate(CALLS[:2] + CALLS[3:5]):
        for index, (stage, reference) in enumerate(zip(stages, references, strict=True)):
            assert_call_equals_eager(compiled[index], stage, reference, tokens, start, mark=round_index == index == 0)
    (program,) = ppb.programs()
    assert program.stats.calls == 4 * len(stages)
    assert ppb.stats().pieces_compiled == 3


@pytest.mark.compat
def test_several_programs_of_one_model() -> None:
    """Without a mark: the first size is static, the second makes it dynamic, one token is its own."""
    stage = ToyStage(2)
    reference = copy.deepcopy(stage)
    compiled = compile_stage(stage)
    for tokens, start in CALLS:
        assert_call_equals_eager(compiled, stage, reference, tokens, start)
    assert len(ppb.programs()) == ppb.stats().programs == 3
    assert ppb.stats().recompiles == 2
    assert [attention_steps(program) for program in ppb.programs()] == [2, 2, 2]
    assert sum(program.stats.calls for program in ppb.programs()) == len(CALLS)


def test_stages_of_one_process_share_pieces() -> None:
    """Stages of unlike depth are two programs, made of the same three pieces."""
    for num_layers, compiled_pieces in ((3, 3), (4, 0)):
        stage = ToyStage(num_layers)
        inputs = stage.make_inputs(8)
        mark_tokens_dynamic(inputs)
        with ppb.expect(programs=1, pieces_compiled=compiled_pieces):
            compile_stage(stage)(**inputs)


@pytest.mark.slow
def test_different_models_do_not_disturb_one_another() -> None:
    stages = [ToyStage(2, **options) for options in VARIANTS.values()]
    references = [copy.deepcopy(stage) for stage in stages]
    compiled = [compile_stage(stage) for stage in stages]
    with torch._dynamo.config.patch(recompile_limit=32):
        for tokens, start in CALLS:
            for index, stage in enumerate(stages):
                assert_call_equals_eager(compiled[index], stage, references[index], tokens, start)
        assert sum(program.stats.calls for program in ppb.programs()) == len(CALLS) * len(stages)


@pytest.mark.timeout(120)
def test_threads_compile_at_the_same_time() -> None:
    stages = [ToyStage(1, inplace_norm=bool(index % 2), hidden=32 * (1 + index)) for index in range(2)]
    references = [copy.deepcopy(stage) for stage in stages]
    compiled = [compile_stage(stage) for stage in stages]
    barrier = threading.Barrier(len(stages))
    failures: list[BaseException] = []

    def run(index: int) -> None:
        try:
            barrier.wait(timeout=30)
            # One code object for all: two models with three programs each. The setting is a thread's own.
            with torch._dynamo.config.patch(recompile_limit=32):
                for tokens, start in CALLS:
                    assert_call_equals_eager(compiled[index], stages[index], references[index], tokens, start)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(stages))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    if failures:
        raise failures[0]
    assert sum(program.stats.calls for program in ppb.programs()) == len(CALLS) * len(stages)

"""``warmup()``: everything is captured afterwards, and nothing else has changed."""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from itertools import count, repeat
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pp_piecewise_backend as ppb
from captured import misses_between
from models.toy_stage import NAMED_OPS, ToyStage
from one_program import for_every_size
from pp_piecewise_backend import Proxy, Stage
from pp_piecewise_backend.errors import ConfigError, PPPiecewiseError, PPPiecewiseWarning
from pp_piecewise_backend.runtime import padding_test
from pp_piecewise_backend.runtime.bucket import BucketCapture
from pp_piecewise_backend.runtime.warmup import Session, _calls, current_session
from tiers import slow_but

pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")

MAX_TOKENS = 6
OPTIONS = {"compiler": "eager", "graphs": "emulate", **NAMED_OPS, "capture_sizes": "1,4"}
VARIANTS: list[dict[str, bool]] = [{}, {"inplace_norm": True}, {"first": True}, {"last": True}]
NOTHING_NEW = {"programs": 0, "recompiles": 0, "pieces_compiled": 0, "captures": 0, "graph_misses": 0}


def compiled_stage(module: nn.Module, **options: Any) -> Any:
    options = {**OPTIONS, **({} if "stage" in options else {"max_tokens": MAX_TOKENS}), **options}
    return torch.compile(module, backend="pp_piecewise", options=options)


def inputs_of(stage: ToyStage) -> Callable[[int], tuple[tuple[()], dict[str, Any]]]:
    return lambda num_tokens: ((), for_every_size(stage.make_inputs(num_tokens, seed=num_tokens)))


def graphs_held() -> int:
    return sum(len(bucket.graphs) for p in ppb.programs() if p.graphs is not None for bucket, _ in p.graphs.buckets)


# ------------------------------------------------------------------- nothing is left to do


@pytest.mark.parametrize(
    ("variant", "inference"),
    slow_but(
        [({"inplace_norm": True}, True), ({"first": True}, False)],
        itertools.product(VARIANTS, [False, True]),
    ),
    ids=str,
)
def test_no_size_compiles_or_captures_after_it(variant: dict[str, bool], inference: bool) -> None:
    stage = ToyStage(2, hidden=16, heads=2, kv_heads=1, max_tokens=16, **variant)
    reference = copy.deepcopy(stage)
    run = compiled_stage(stage)
    with torch.inference_mode(inference):
        ppb.warmup(run, inputs_of(stage))
        calls = [*range(1, MAX_TOKENS + 1), *range(MAX_TOKENS, 0, -1)]
        with ppb.expect(**NOTHING_NEW, replays=3 * len(calls), calls=len(calls)):
            for num_tokens in calls:
                theirs = stage.make_inputs(num_tokens, seed=num_tokens)
                ours = copy.deepcopy(theirs)
                got, expected = run(**ours), reference(**theirs)
                for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, expected)), strict=True):
                    torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)
        for one, other in zip(stage.buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures("one_program")
def test_capture_in_warmup_only() -> None:
    stage = ToyStage(1, hidden=16, heads=2, kv_heads=1)
    run = compiled_stage(stage, capture="warmup")
    with ppb.expect(captures=0, replays=0):
        for _ in range(3):
            run(**for_every_size(stage.make_inputs(3)))
    ppb.warmup(run, inputs_of(stage))
    with ppb.expect(**NOTHING_NEW):
        for num_tokens in range(1, MAX_TOKENS + 1):
            run(**stage.make_inputs(num_tokens))
    with ppb.expect(captures=0, miss_reasons={"over-max": 2}):
        run(**stage.make_inputs(MAX_TOKENS + 1))


@pytest.mark.usefixtures("one_program")
def test_warming_up_twice_captures_once() -> None:
    stage = ToyStage(1, hidden=16, heads=2, kv_heads=1)
    run = compiled_stage(stage)
    ppb.warmup(run, inputs_of(stage))
    with ppb.expect(**NOTHING_NEW, static_bytes=0, graph_bytes=0):
        ppb.warmup(run, inputs_of(stage))


def test_only_the_sizes_asked_for() -> None:
    stage = ToyStage(1, hidden=16, heads=2, kv_heads=1)
    run = compiled_stage(stage)
    asked: list[int] = []

    def make_inputs(num_tokens: int) -> tuple[tuple[()], dict[str, Any]]:
        asked.append(num_tokens)
        return (), stage.make_inputs(num_tokens)

    ppb.warmup(run, make_inputs, sizes=[3, 5])
    assert set(asked) == {3, 5}
    tokens = {bucket.tokens for p in ppb.programs() for bucket, _ in p.graphs.buckets}
    assert tokens <= {3, 4, 5, 6} and {4} <= tokens
    with ppb.expect(captures=0, graph_misses=0):
        run(**stage.make_inputs(3))


@pytest.mark.usefixtures("one_program")
def test_sealed_after_it() -> None:
    stage = ToyStage(1, hidden=16, heads=2, kv_heads=1)
    run = compiled_stage(stage, strict=1)
    ppb.warmup(run, inputs_of(stage))
    ppb.seal()
    with ppb.expect(**NOTHING_NEW, recompiles_after_seal=0):
        for num_tokens in range(1, MAX_TOKENS + 1):
            run(**stage.make_inputs(num_tokens))


# --------------------------------------------------------------------------- no trace is left


@pytest.mark.parametrize(
    ("graphs", "inplace_norm"),
    slow_but([("emulate", True), ("off", False)], itertools.product(["emulate", "off"], [False, True])),
)
@pytest.mark.filterwarnings("ignore::pp_piecewise_backend.errors.PPPiecewiseWarning")
def test_state_and_proxies_are_as_before(graphs: str, inplace_norm: bool) -> None:
    stage = ToyStage(1, hidden=16, heads=2, kv_heads=1, inplace_norm=inplace_norm)
    for buffer in stage.buffers():
        buffer.normal_()
    before = [buffer.clone() for buffer in stage.buffers()]
    given: list[dict[str, Any]] = []
    copies: list[dict[str, Any]] = []

    def make_inputs(num_tokens: int) -> tuple[tuple[()], dict[str, Any]]:
        given.append(stage.make_inputs(num_tokens))
        copies.append(copy.deepcopy(given[-1]))
        return (), given[-1]

    ppb.warmup(compiled_stage(stage, graphs=graphs), make_inputs)
    assert len(given) == (7 if graphs == "emulate" else 2)
    for buffer, copied in zip(stage.buffers(), before, strict=True):
        assert torch.equal(buffer, copied)
    for one, other in zip(given, copies, strict=True):
        assert all(one[name] is None or torch.equal(one[name], other[name]) for name in one)


def test_landing_memory_is_as_before() -> None:
    module = ToyStage(1, hidden=16, heads=2, kv_heads=1, inplace_norm=True)
    proxy = Proxy((16,), torch.float32)
    stage = Stage({"hidden_states": proxy, "residual": proxy}, MAX_TOKENS, "cpu")
    views = stage.views(MAX_TOKENS)
    for view in views.values():
        view.normal_()
    before = {name: view.clone() for name, view in views.items()}
    run = compiled_stage(module, stage=stage)
    ppb.warmup(run, inputs_of(module))
    assert all(torch.equal(views[name], before[name]) for name in views)

    def landing(num_tokens: int) -> tuple[tuple[()], dict[str, Any]]:
        return (), {**module.make_inputs(num_tokens), **stage.views(num_tokens)}

    ppb.warmup(run, landing)
    assert all(torch.equal(views[name], before[name]) for name in views)
    with ppb.expect(**NOTHING_NEW, stage_input_copies=0, stage_inputs_in_place=2):
        run(**{**module.make_inputs(5), **stage.views(5)})


@pytest.mark.usefixtures("one_program")
def test_generators_are_as_before() -> None:
    stage = ToyStage(1, hidden=16, heads=2, kv_heads=1)
    before = torch.get_rng_state()

    def make_inputs(num_tokens: int) -> tuple[tuple[()], dict[str, Any]]:
        torch.rand(3)
        return (), for_every_size(stage.make_inputs(num_tokens))

    ppb.warmup(compiled_stage(stage), make_inputs)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ZeroDivisionError):
        ppb.warmup(compiled_stage(stage), lambda n: (torch.rand(3), 1 / 0))  # type: ignore[arg-type, return-value]
    assert torch.equal(torch.get_rng_state(), before)


def test_calls_of_it_are_not_counted() -> None:
    stage = ToyStage(1, hidden=16, heads=2, kv_heads=1)
    with ppb.expect(calls=0, replays=0, graph_misses=0, eager_steps=0, input_copies=0, padded_tokens=0,
                    stage_input_copies=0, stage_inputs_in_place=0, output_copies=0, programs=2):  # fmt: skip
        ppb.warmup(compiled_stage(stage), inputs_of(stage))
    assert ppb.stats().captures == graphs_held() > 0


@pytest.mark.usefixtures("one_program")
def test_an_error_leaves_no_session_and_no_writes() -> None:
    stage = ToyStage(1, hidden=16, heads=2, kv_heads=1)
    run = compiled_stage(stage)
    ppb.warmup(run, inputs_of(stage))
    before = [buffer.clone() for buffer in stage.buffers()]
    wrong = {**stage.make_inputs(3), "positions": torch.tensor([0, 1, 10_000])}  # attention cannot write there
    with pytest.raises(IndexError):
        ppb.warmup(run, lambda n: ((), wrong))
    assert current_session() is None
    assert all(torch.equal(b, c) for b, c in zip(stage.buffers(), before, strict=True))
    with ppb.expect(calls=1, **NOTHING_NEW):
        run(**stage.make_inputs(3))


# ------------------------------------------------------------------------------- what it says


@pytest.mark.usefixtures("one_program")
def test_one_line_in_the_log(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    stage = ToyStage(1, hidden=16, heads=2, kv_heads=1)
    with caplog.at_level(logging.INFO, "pp_piecewise_backend"):
        ppb.warmup(compiled_stage(stage), inputs_of(stage))
    (line,) = [r.getMessage() for r in caplog.records if "warmed up" in r.getMessage()]
    assert line.index("; per bucket 6: ") < line.index("; 4: ") < line.index("; 1: ")
    assert line.endswith(" bytes of graphs in all")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("progress", "terminal", "shown"), [(True, False, True), (False, True, False),
                                                             (None, True, True), (None, False, False)])  # fmt: skip
def test_a_bar_where_somebody_looks(
    progress: bool | None,
    terminal: bool,
    shown: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    run = compiled_stage(nn.Sequential(nn.Linear(4, 4), nn.Softmax(1)), split_ops="softmax", capture_sizes="2")
    ppb.warmup(run, lambda num_tokens: ((torch.randn(num_tokens, 4),), {}), progress=progress)
    assert ("capturing" in capsys.readouterr().err) is shown


# ------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("made", [None, {}, [(), {}], ((),), ((), {}, {}), ((), [])])
def test_what_make_inputs_must_not_return(made: Any) -> None:
    with pytest.raises(ConfigError, match=rf"make_inputs returned {type(made).__name__}: expected a tuple"):
        ppb.warmup(compiled_stage(ToyStage(1)), lambda num_tokens: made)
    assert current_session() is None


@pytest.mark.parametrize("sizes", [[], [0, 3], [-1]])
def test_sizes_that_no_call_has(sizes: list[int]) -> None:
    stage = ToyStage(1)
    with pytest.raises(ConfigError, match="warmup\\(\\) got sizes="):
        ppb.warmup(compiled_stage(stage), inputs_of(stage), sizes)


def test_it_does_not_nest() -> None:
    stage = ToyStage(1, hidden=16, heads=2, kv_heads=1)
    run = compiled_stage(stage)

    def make_inputs(num_tokens: int) -> Any:
        ppb.warmup(run, inputs_of(stage))

    with pytest.raises(PPPiecewiseError, match="inside warmup"):
        ppb.warmup(run, make_inputs)
    assert current_session() is None


@pytest.mark.usefixtures("one_program")
def test_a_module_that_was_not_compiled() -> None:
    stage = ToyStage(1, hidden=16, heads=2, kv_heads=1)
    with pytest.raises(PPPiecewiseError, match="no program of backend 'pp_piecewise' ran"):
        ppb.warmup(stage, inputs_of(stage))
    ppb.warmup(compiled_stage(stage), inputs_of(stage))
    with pytest.raises(PPPiecewiseError, match="no program of backend 'pp_piecewise' ran"):
        ppb.warmup(stage, inputs_of(stage))  # programs of others do not count


@pytest.mark.usefixtures("one_program")
def test_nothing_to_capture_is_said() -> None:
    stage = ToyStage(1, hidden=16, heads=2, kv_heads=1)
    with pytest.warns(PPPiecewiseWarning, match=r"warmup\(\) captured nothing: graphs='off'\."):
        ppb.warmup(compiled_stage(stage, graphs="off"), inputs_of(stage))


def test_gradients_are_named_where_they_are_why_nothing_is_captured() -> None:
    run = torch.compile(nn.Linear(4, 4), backend="pp_piecewise", options=OPTIONS)
    with torch.enable_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ppb.warmup(run, lambda num_tokens: ((torch.zeros(num_tokens, 4),), {}))
    (said,) = [str(w.message) for w in caught if "warmup()" in str(w.message)]
    assert "captured nothing: to serve, call" in said and "gradients are required by" in said


@pytest.mark.filterwarnings("ignore::pp_piecewise_backend.errors.PPPiecewiseWarning")
def test_without_graphs_no_size_compiles_after_it() -> None:
    stage = ToyStage(1, hidden=16, heads=2, kv_heads=1)
    run = compiled_stage(stage, graphs="off")
    ppb.warmup(run, inputs_of(stage))
    with ppb.expect(programs=0, pieces_compiled=0, calls=MAX_TOKENS):
        for num_tokens in range(1, MAX_TOKENS + 1):
            run(**stage.make_inputs(num_tokens))


@pytest.mark.filterwarnings("ignore::pp_piecewise_backend.errors.PPPiecewiseWarning")
def test_a_program_that_is_not_split_is_warmed_up_too() -> None:
    layer = nn.Linear(4, 4)
    run = torch.compile(layer, backend="pp_piecewise", options={**OPTIONS, "max_tokens": MAX_TOKENS})
    with torch.enable_grad(), ppb.expect(calls=0, grad_fallbacks=0):
        ppb.warmup(run, lambda num_tokens: ((torch.randn(num_tokens, 4),), {}))
    with torch.enable_grad(), ppb.expect(programs=0, calls=3, grad_fallbacks=3):
        for num_tokens in (1, 3, MAX_TOKENS):
            run(torch.randn(num_tokens, 4))


@pytest.mark.usefixtures("one_program")
def test_another_thread_serves_meanwhile() -> None:
    stage, other = (ToyStage(1, hidden=16, heads=2, kv_heads=1, seed=seed) for seed in (0, 1))
    run, serve = compiled_stage(stage), compiled_stage(other)
    serve(**other.make_inputs(2))
    served: list[int] = []

    def serve_once() -> None:
        with torch.no_grad():
            before = ppb.stats().calls
            serve(**other.make_inputs(2))
            served.append(ppb.stats().calls - before)

    def make_inputs(num_tokens: int) -> tuple[tuple[()], dict[str, Any]]:
        if not served:
            thread = threading.Thread(target=serve_once)
            thread.start()
            thread.join(timeout=60)
        return (), for_every_size(stage.make_inputs(num_tokens))

    ppb.warmup(run, make_inputs)
    assert served == [1]  # a call of another thread is no call of the warm-up


# ----------------------------------------------------------------------------------- release


def tensors_alive() -> int:
    gc.collect()
    return sum(type(item) is Tensor for item in gc.get_objects())


@pytest.mark.usefixtures("one_program")
def test_release_and_warmup_again_leave_no_memory_behind() -> None:
    stage = ToyStage(1, hidden=16, heads=2, kv_heads=1)
    run = compiled_stage(stage)
    ppb.warmup(run, inputs_of(stage))
    warm = ppb.stats()
    assert warm.graph_bytes > 0 and warm.static_bytes > 0

    def release() -> None:
        for program in ppb.programs():
            program.release()

    release()
    assert (ppb.stats().graph_bytes, ppb.stats().static_bytes) == (0, 0) and graphs_held() == 0
    cold = tensors_alive()
    for _ in range(3):
        ppb.warmup(run, inputs_of(stage))
        assert (ppb.stats().graph_bytes, ppb.stats().static_bytes) == (warm.graph_bytes, warm.static_bytes)
        with ppb.expect(**NOTHING_NEW):
            run(**stage.make_inputs(5))
        release()
        assert (ppb.stats().graph_bytes, ppb.stats().static_bytes) == (0, 0)
        assert tensors_alive() <= cold


@pytest.mark.parametrize("sizes", ["1,2,64", "2,64"])
def test_a_limit_on_graph_memory_keeps_the_small_buckets(sizes: str) -> None:
    """Those of all programs: a single token has one of its own, whose graphs go and come back with the others."""
    stage = ToyStage(1, hidden=16, heads=2, kv_heads=1)
    run = compiled_stage(stage, capture_sizes=sizes, max_tokens=64, graph_memory_bytes=8192, capture="warmup")
    ppb.warmup(run, inputs_of(stage))
    assert len(ppb.programs()) == 2 and 0 < ppb.stats().graph_bytes <= 8192
    with ppb.expect(captures=0, graph_misses=0, replays=2 * 2):
        run(**stage.make_inputs(1))
        run(**stage.make_inputs(2))
    with ppb.expect(captures=0, miss_reasons={"graph-memory": 2}):
        run(**stage.make_inputs(60))
    assert "graph_memory_bytes allows 8192" in ppb.explain().replace("\n", " ").replace("  ", "")


# ---------------------------------------------------------------------------------- the calls


@pytest.mark.parametrize(
    ("buckets", "smallest", "expected"),
    [
        ([8, 4, 2, 1], 1, [7, 8, 3, 4, 2, 1]),
        ([8, 4, 2, 1], 2, [7, 8, 3, 4, 2, 1]),
        ([3], 1, [2, 3]),
        ([8, 7], 1, [8, 6, 7]),
        ([64, 32, 16, 8, 4, 2, 1], 1, [63, 64, 3, 4, 31, 32, 15, 16, 7, 8, 2, 1]),
        ([8, 4], 4, [7, 8, 4]),
        ([5], 5, [5]),
        ([1], 1, [1]),
    ],
)
def test_calls_inside_of_each_bucket_and_filling_it(buckets: list[int], smallest: int, expected: list[int]) -> None:
    session = Session(smallest={"a": smallest, "b": 1})
    assert _calls(buckets, session, None) == expected
    assert _calls(buckets, session, [3, 99, 3]) == [99, 3]


def test_buckets_of_full_graphs_are_called_again_to_be_proven() -> None:
    session = Session(smallest={"a": 1}, proven_tokens=4)
    assert _calls([8, 4, 1], session, None) == [7, 8, 3, 4, 4, 4, 1, 1, 1]


def test_sizes_asked_for_come_in_the_same_order() -> None:
    session = Session(smallest={"a": 1})
    assert _calls([16, 8, 4, 2, 1], session, [1, 2, 4, 8, 9, 16]) == [16, 9, 4, 8, 2, 1]
    assert _calls([], session, [1, 4]) == [4, 1]


def test_static_programs_are_called_again_whatever_the_buckets() -> None:
    session = Session(smallest={"a": 2}, max_tokens=9, has_static_programs=True)
    assert _calls([8, 4], session, None) == [9, 7, 8, 3, 4, 1]
    assert _calls([9, 4], session, None) == [8, 9, 3, 4, 1]
    assert _calls([], session, None) == [9, 1]


@pytest.mark.parametrize("mark", [None, torch._dynamo.mark_dynamic, torch._dynamo.decorators.mark_unbacked])
def test_buckets_are_captured_in_order_whatever_the_programs(
    mark: Callable[[Tensor, int], None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One program may serve all sizes, or one all but a single token, or two."""
    captured: list[int] = []
    run_one = BucketCapture.run

    def noting(self: BucketCapture, args: Any, real_tokens: int, fixed: Any) -> Any:
        captured.append(self.bucket.tokens)
        return run_one(self, args, real_tokens, fixed)

    monkeypatch.setattr(BucketCapture, "run", noting)
    serves_all = mark is torch._dynamo.decorators.mark_unbacked

    def forward(x: Tensor) -> Tensor:
        return torch.softmax(x @ x.new_ones(8, 8), 0) @ x.new_ones(8, 8)

    def make_inputs(num_tokens: int) -> tuple[tuple[Tensor], dict[str, Any]]:
        x = torch.randn(num_tokens, 8)
        if mark is not None and (num_tokens > 1 or serves_all):
            mark(x, 0)
        return (x,), {}

    sizes = {"capture_sizes": "1,2,4,8,16", "max_tokens": 16}
    options = {**OPTIONS, "mode": "piecewise", "split_ops": "softmax", **sizes}
    ppb.warmup(torch.compile(forward, backend="pp_piecewise", options=options), make_inputs)
    assert captured == [16, 4, 8, 2, 1]
    assert len(ppb.programs()) == (1 if serves_all else 2)


@pytest.mark.parametrize("dynamic", [None, False])
def test_static_programs_are_captured_too(dynamic: bool | None) -> None:
    stage = ToyStage(1, hidden=16, heads=2, kv_heads=1)
    options = {**OPTIONS, "capture_sizes": "4", "max_tokens": MAX_TOKENS, "capture": "warmup"}
    run = torch.compile(stage, backend="pp_piecewise", options=options, dynamic=dynamic)
    ppb.warmup(run, inputs_of(stage))
    with ppb.expect(**NOTHING_NEW, replays=2 * 2):
        for num_tokens in (1, MAX_TOKENS):
            run(**stage.make_inputs(num_tokens))


def test_padding_is_tested_in_the_largest_and_in_the_smallest_bucket_only(monkeypatch: pytest.MonkeyPatch) -> None:
    tested: list[int] = []
    examine = padding_test.examine

    def counting(trial: padding_test.Trial, inputs: Any, real_tokens: int) -> str | None:
        tested.append(real_tokens)
        return examine(trial, inputs, real_tokens)

    monkeypatch.setattr(padding_test, "examine", counting)
    stage = ToyStage(1, hidden=16, heads=2, kv_heads=1, max_tokens=128)
    run = compiled_stage(stage, capture_sizes="32:128:32", max_tokens=128)
    with ppb.expect(captures=2 * (4 + 1)):  # those of one token are a program of their own
        ppb.warmup(run, inputs_of(stage))
    assert tested == [64] * 2 + [16] * 2  # half of each bucket
    with ppb.expect(**NOTHING_NEW, replays=2 * 128):
        for num_tokens in range(1, 129):
            run(**stage.make_inputs(num_tokens))


# ------------------------------------------------------------------------------ Hugging Face


def hf_prompts(batch: int, num_tokens: int, seed: int) -> Tensor:
    """Token ids ``[batch, num_tokens]`` (int64)."""
    from models import hf

    return torch.cat(hf.make_prompts([num_tokens] * batch, seed))


@pytest.mark.slow  # test_decoder_step.py warms up stages of such models
@pytest.mark.parametrize("batch", [1, 2])
def test_the_hugging_face_llama_compiles_nothing_after_it(batch: int) -> None:
    from models import hf

    model = hf.make_model("llama")
    cache = hf.make_cache("static", model.config)
    model(input_ids=torch.ones(batch, 1, dtype=torch.int64), past_key_values=cache)  # allocates it
    options = {"compiler": "eager", "graphs": "emulate", "max_tokens": MAX_TOKENS, "capture_sizes": "1,4"}
    run = torch.compile(model, backend="pp_piecewise", options=options)

    def make_inputs(num_tokens: int) -> tuple[tuple[()], dict[str, Any]]:
        cache.reset()
        return (), {"input_ids": hf_prompts(batch, num_tokens, num_tokens), "past_key_values": cache, "use_cache": True}

    ppb.warmup(run, make_inputs)
    assert graphs_held() > 0
    reference = hf.make_cache("static", model.config)
    with ppb.expect(programs=0, recompiles=0, pieces_compiled=0, captures=0):
        for num_tokens in range(1, MAX_TOKENS + 1):
            cache.reset()
            reference.reset()
            ids = hf_prompts(batch, num_tokens, 100 + num_tokens)
            for _ in range(3):  # a prefill and two decode steps
                got = run(input_ids=ids, past_key_values=cache, use_cache=True).logits
                expected = model(input_ids=ids, past_key_values=reference, use_cache=True).logits
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
                ids = expected[:, -1:].argmax(-1)
    assert ppb.stats().replays > 0


class GrowingCaches:
    """A Llama with ``DynamicCache``, compiled; calls on caches of any length, compared with eager."""

    def __init__(self, batch: int) -> None:
        from models import hf

        self.batch = batch
        self.model = hf.make_model("llama")
        sizes = {"max_tokens": MAX_TOKENS, "capture_sizes": "1,4"}
        options = {"mode": "piecewise", "compiler": "eager", "graphs": "emulate", **sizes}
        self.run = torch.compile(self.model, backend="pp_piecewise", options=options)

    def inputs(self, num_tokens: int, length: int) -> dict[str, Any]:
        """Tokens for a call on a new cache that holds ``length`` tokens already."""
        from models import hf

        cache = hf.make_cache("dynamic", self.model.config)
        if length:
            self.model(input_ids=hf_prompts(self.batch, length, length), past_key_values=cache, use_cache=True)
        return {"input_ids": hf_prompts(self.batch, num_tokens, 100), "past_key_values": cache, "use_cache": True}

    def warm_up(self, lengths: Iterator[int]) -> None:
        ppb.warmup(self.run, lambda num_tokens: ((), self.inputs(num_tokens, next(lengths))))

    def call(self, num_tokens: int, length: int) -> dict[str, int]:
        """What the call missed, by reason; its numbers of programs and of captures go by these names."""
        before = ppb.stats()
        got = self.run(**self.inputs(num_tokens, length)).logits
        after = ppb.stats()
        torch.testing.assert_close(got, self.model(**self.inputs(num_tokens, length)).logits, rtol=1e-4, atol=1e-4)
        new = {name: after[name] - before[name] for name in ("programs", "captures") if after[name] > before[name]}
        return {**misses_between(before, after), **new}


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
def test_the_hugging_face_llama_with_caches_that_grow(batch: int) -> None:
    """Warmed up with empty caches, with caches of one token, and with longer ones of at least two lengths.

    Dynamo makes programs of their own for sizes 0, 1 and more, of tokens as of the cache. Warmed up for each, no
    number of tokens compiles or captures on a cache of any length. Longer caches vary in length next to the token
    count: the pieces that append to them have two sizes that vary, so they are never captured and say so. The last
    piece, behind the last attention, always replays.
    """
    caches = GrowingCaches(batch)
    for lengths in (repeat(0), repeat(1), count(3)):
        caches.warm_up(lengths)
    assert ppb.stats().programs == 3 * 2  # for one token, and for more
    calls = [(num_tokens, length) for length in (0, 1, 2, 7, 8) for num_tokens in range(1, MAX_TOKENS + 1)]
    never = {"other-dynamic-dimension": 2}
    with ppb.expect(programs=0, recompiles=0, pieces_compiled=0, captures=0, calls=len(calls)):
        for num_tokens, length in calls:
            missed = caches.call(num_tokens, length)
            # Appended to one token, n are n + 1 in the middle of the call, which is not safely cut.
            padded_behind_one = {"padding-unsafe": 2} if length == 1 and num_tokens in (2, 3, 5) else {}
            assert missed == (never if length > 1 else padded_behind_one), (num_tokens, length)
    replays = 3 * (MAX_TOKENS + 3) + 1 * (3 + 3 * MAX_TOKENS)
    assert ppb.stats().replays == replays
    report = ppb.explain()
    assert report.count("missed      other-dynamic-dimension: ") == 2  # programs: one token, and more
    assert "varies, next to the token count" in report


@pytest.mark.slow
def test_the_hugging_face_llama_warmed_up_with_empty_caches_only() -> None:
    """Prefills compile nothing. Decoding does, for the first length, and for the second one, which makes it vary."""
    caches = GrowingCaches(batch=1)
    caches.warm_up(repeat(0))
    with ppb.expect(programs=0, captures=0, graph_misses=0, replays=3 * MAX_TOKENS):
        for num_tokens in range(1, MAX_TOKENS + 1):
            caches.call(num_tokens, length=0)
    assert caches.call(1, length=4) == {"programs": 1, "first-call": 3}
    assert caches.call(1, length=5) == {"programs": 1, "first-call": 1, "other-dynamic-dimension": 2}
    assert caches.call(1, length=6) == {"captures": 1, "other-dynamic-dimension": 2}
    for length in (7, 8, 9):
        assert caches.call(1, length) == {"other-dynamic-dimension": 2}

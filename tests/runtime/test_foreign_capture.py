"""An engine captures a graph of its own around a call: Note [inside a foreign capture]."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import pp_piecewise_backend as ppb
from captured import DEVICES, HIDDEN, SIZES, Pair, misses_between, net, rows
from pp_piecewise_backend import errors
from pp_piecewise_backend.runtime.cudagraphs import emulated
from pp_piecewise_backend.runtime.cudagraphs.device import CaptureError
from pp_piecewise_backend.runtime.cudagraphs.emulated import EmulatedDevice
from pp_piecewise_backend.runtime.program import Program
from pp_piecewise_backend.runtime.tracing import Timeline

pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")
on_devices = pytest.mark.parametrize("device", DEVICES)


@torch.library.custom_op("foreigntest::attention", mutates_args=())
def attention(x: Tensor) -> Tensor:
    return torch.tanh(x.cumsum(0) + x.mean(0))


attention.register_fake(torch.empty_like)


def two_layers(self: Any, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    x = hidden_states @ self.w + residual
    for _ in range(2):
        x = torch.ops.foreigntest.attention(x @ self.w)
    return x @ self.w, x * 2


class Listener:
    """A stage whose memory is handed over in time; inside a foreign capture nobody may be notified."""

    timeline: Timeline | None = None
    is_deaf = False

    def landing_was_read(self) -> None:
        assert not self.is_deaf, "landing memory was declared free, but nothing was read"

    mark_landing_read = landing_was_read

    def results_are_written(self) -> None:
        assert not self.is_deaf, "waited for the send of earlier results"


class Made:
    """A stage of two layers with landing memory, next to its eager twin."""

    def __init__(self, device: str, **options: Any) -> None:
        proxy = ppb.Proxy((HIDDEN,), torch.float32)
        self.device = device
        self.stage = ppb.Stage({"hidden_states": proxy, "residual": proxy}, 8, device)
        self.listener = self.stage.listener = Listener()
        options = {"split_ops": "+foreigntest::*", "stage": self.stage, **options}
        self.pair = Pair(net(two_layers, device), device, **options)

    def land(self, num_tokens: int, seed: int = 0) -> list[Tensor]:
        """Proxies in landing memory, with other contents for another seed."""
        views = list(self.stage.views(num_tokens).values())
        for at, view in enumerate(views):
            view.copy_(rows(num_tokens, self.device, seed=2 * seed + at))
        return views

    def call(self, num_tokens: int, seed: int = 0) -> None:
        self.pair(*self.land(num_tokens, seed))

    def captured_by_an_engine(self, num_tokens: int) -> tuple[Any, Sequence[Tensor]]:
        """A graph around one call, and the results that its replays leave."""
        self.listener.is_deaf = True
        graph = graph_around(self.pair, self.land(num_tokens))
        self.listener.is_deaf = False
        return graph


def graph_around(pair: Pair, arguments: Sequence[Tensor]) -> tuple[Any, Sequence[Tensor]]:
    if pair.device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # in the global mode, which refuses waits and queries of events
            results = pair.compiled(*arguments)
        return graph, results
    # Dynamo does not call programs under the mode that records ops.
    program = pair.program
    given = {"w": pair.function.w, **dict(zip(("hidden_states", "residual"), arguments, strict=True))}
    inputs = [arguments[0].shape[0] if i.spec is None else given[i.label] for i in program.inputs]
    device = EmulatedDevice()
    emulated_graph = device.capture(lambda values: program(*values), inputs, device.new_pool())
    return emulated_graph, emulated_graph.outputs


@contextmanager
def being_captured(device: str) -> Iterator[None]:
    """A capture that holds nothing of what the body does; on the CPU Dynamo calls programs in it."""
    if device == "cpu":
        with emulated.capturing():
            yield
        return
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device=device)
        yield


IN_A_CAPTURE = {"foreign_captures": 1, "calls": 1, "eager_steps": 2, "graph_misses": 0, "replays": 0, "captures": 0}
NOTHING_COPIED = {"stage_input_copies": 0, "input_copies": 0, "output_copies": 0, "graph_bytes": 0, "static_bytes": 0}


@on_devices
@pytest.mark.parametrize(
    "options",
    [{}, {"static_outputs": True, "strict": True, "verify_every": 1}, {"mode": "none"}, {"mode": "full_and_piecewise"}],
    ids=["piecewise", "static-outputs", "none", "full-and-piecewise"],
)
def test_an_engine_captures_a_graph_around_a_program(device: str, options: dict[str, Any]) -> None:
    made = Made(device, **options)
    for num_tokens in SIZES * 2:
        made.call(num_tokens)
    made.captured_by_an_engine(7)  # what torch keeps for the stream of a capture is there from then on
    before = ppb.stats()
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    with ppb.expect(**IN_A_CAPTURE, **NOTHING_COPIED):
        graph, results = made.captured_by_an_engine(7)
    for seed in range(1, 4):
        expected = made.pair.twin(*made.land(7, seed))
        graph.replay()
        for result, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)
        kept = [result.clone() for result in results]
        for num_tokens in (8, 5, 7):
            made.call(num_tokens, seed)
        assert all(map(torch.equal, results, kept)), "our graphs wrote into memory of the engine's"
    overwritten = [bucket.overwritten for bucket, _ in made.pair.program.all_buckets]
    assert not any(memory.holds(result) for memory in overwritten for result in results)
    after = ppb.stats()
    assert misses_between(before, after) == {}
    assert (after.captures, after.graph_bytes) == (before.captures, before.graph_bytes)
    graph.release() if device == "cpu" else graph.reset()
    del graph, results, kept, result, expected, wanted
    gc.collect()
    if device == "cuda":
        made.pair._last = None
        assert torch.cuda.memory_allocated() <= held, "something that the engine's graph allocated was kept"
    for num_tokens in SIZES:
        made.call(num_tokens, 9)
    assert "2 calls captured into graphs of somebody else" in " ".join(ppb.explain().split())


@on_devices
def test_calls_inside_a_capture_bring_no_bucket_nearer_to_its_own(device: str) -> None:
    made = Made(device)
    made.call(8), made.call(8)
    for _ in range(3):
        made.captured_by_an_engine(4)
    with ppb.expect(miss_reasons={"first-call": 3}, captures=0):
        made.call(4)
    for _ in range(3):
        made.captured_by_an_engine(4)
    with ppb.expect(graph_misses=0, captures=3):  # it was put off
        made.call(4)


def test_a_program_that_does_not_ask_breaks_the_capture() -> None:
    made = Made("cpu")
    made.call(8), made.call(8), made.call(8)
    made.pair.program._is_captured = lambda: False
    with pytest.raises(CaptureError, match=r"a graph is replayed inside a capture|nothing was read"):
        made.captured_by_an_engine(8)


def writes_both(self: Any, hidden_states: Tensor, residual: Tensor) -> Tensor:
    hidden_states.add_(1)
    residual.mul_(2)
    return torch.ops.foreigntest.attention(hidden_states @ self.w) @ self.w


def test_a_call_that_must_run_whole_counts_no_miss_either() -> None:
    """Nor does it raise under ``strict``."""
    pair = Pair(net(writes_both, "cpu"), "cpu", split_ops="+foreigntest::*", strict=True)
    for _ in range(3):
        pair(rows(5, "cpu"), rows(5, "cpu", seed=1))
    memory = rows(6, "cpu")
    theirs = memory.clone()
    expected = pair.twin(theirs[:5], theirs[1:])
    with ppb.expect(foreign_captures=1, graph_misses=0, replays=0), emulated.capturing():
        torch.testing.assert_close(pair.compiled(memory[:5], memory[1:]), expected)
    torch.testing.assert_close(memory, theirs)
    assert "share memory with other inputs" in str(pair.program.whole_plain_run)


@on_devices
def test_what_needs_the_host_is_refused_inside_a_capture(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(net(two_layers, device), device, split_ops="+foreigntest::*")
    arguments = [rows(4, device), rows(4, device)]

    why = r"a graph is being captured|during CUDA graph capture"
    with pytest.raises(Exception, match=why) as refused, being_captured(device):
        pair.compiled(*arguments)
    if device == "cpu":  # on a GPU, Dynamo refuses before it asks a backend
        error = getattr(refused.value, "inner_exception", None) or refused.value.__cause__ or refused.value
        assert isinstance(error, errors.PPPiecewiseError) and "call the module once" in str(error)
    assert ppb.programs() == () and ppb.stats().recompiles == 0
    pair(*arguments)
    with monkeypatch.context() as patched:
        # Generators of a GPU can be neither read nor set there.
        patched.setattr(torch.random, "fork_rng", lambda **_: pytest.fail("generators were read inside a capture"))
        with pytest.raises(errors.PPPiecewiseError, match="call it before"), being_captured(device):
            ppb.warmup(pair.compiled, lambda n: (arguments, {}))
    pair(*arguments)
    assert isinstance(pair.program, Program) and ppb.stats().foreign_captures == 0

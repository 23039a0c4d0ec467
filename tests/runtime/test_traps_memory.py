"""Traps of memory: stale addresses, aliases, state, and what one call could leave behind for the next.

Read ``test_traps_padding.py`` first; the table works as there.
"""

from __future__ import annotations

import copy
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pp_piecewise_backend as ppb
from against_eager import assert_same
from captured import DEVICES, HIDDEN, SIZES, Pair, Trap, Traps, Wrong, misses_between, net, rows
from models.toy_stage import NAMED_OPS, ToyStage
from pp_piecewise_backend.compilation import specs, split
from pp_piecewise_backend.debug.describe import describe_graphs
from pp_piecewise_backend.runtime import dispatch, padding_test, replay
from pp_piecewise_backend.runtime.stage import StageMemory

pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")

TRAPS = Traps()
trap = TRAPS.trap
FAILING = {"now": False}


@torch.library.custom_op("traps::mix", mutates_args=())
def mix(x: Tensor) -> Tensor:
    if FAILING["now"]:
        raise ValueError("told to fail")
    return torch.tanh(x.cumsum(0) + x.mean(0))


@mix.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("traps::attend", mutates_args=())
def attend(q: Tensor, cache: Tensor, positions: Tensor) -> Tensor:
    """Each row sees the cache up to its own position."""
    visible = torch.arange(cache.shape[0], device=q.device) <= positions[:, None]
    return torch.where(visible, q @ cache.t(), 0.0) @ cache


@attend.register_fake
def _(q: Tensor, cache: Tensor, positions: Tensor) -> Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("traps::accumulate", mutates_args=("state",))
def accumulate(state: Tensor, x: Tensor) -> None:
    state.add_(x.mean(0))


@accumulate.register_fake
def _(state: Tensor, x: Tensor) -> None:
    return None


@torch.library.custom_op("traps::mix_in_place", mutates_args=("x",))
def mix_in_place(x: Tensor) -> None:
    x.add_(x.mean(0))


# An op that breaks the contract of custom ops: it says that its result is a tensor of its own.
_LIBRARY = torch.library.Library("trapslib", "DEF")
_LIBRARY.define("nothing(Tensor x) -> Tensor")
_LIBRARY.impl("nothing", lambda x: x, "CPU")
_LIBRARY.impl("nothing", lambda x: x, "CUDA")
_LIBRARY.impl("nothing", lambda x: torch.empty_like(x), "Meta")


# And one that writes its second argument without saying so.
_LIBRARY.define("write_unseen(Tensor x, Tensor state) -> Tensor")
_LIBRARY.impl("write_unseen", lambda x, state: x + state.add_(1.0), "CPU")
_LIBRARY.impl("write_unseen", lambda x, state: x + state.add_(1.0), "CUDA")
_LIBRARY.impl("write_unseen", lambda x, state: torch.empty_like(x), "Meta")


class Add(nn.Module):
    """The usual start of a stage, out of place."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(HIDDEN, HIDDEN) / HIDDEN**0.5, requires_grad=False)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = residual + hidden_states
        x = torch.ops.traps.mix((residual - 0.5 * hidden_states) @ self.w)
        return x @ self.w, residual


def stage(device: str, hidden: int = HIDDEN, max_tokens: int = 8) -> ppb.Stage:
    proxies = {name: ppb.Proxy((hidden,), torch.float32) for name in ("hidden_states", "residual")}
    return ppb.Stage(proxies, max_tokens, device=device)


def proxies(num_tokens: int, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    return rows(num_tokens, device, seed=seed), rows(num_tokens, device, seed=seed + 1)


def in_landing_memory(landing: ppb.Stage, num_tokens: int, device: str) -> tuple[Tensor, Tensor]:
    views = landing.views(num_tokens)
    for view, value in zip(views.values(), proxies(num_tokens, device), strict=True):
        view.copy_(value)
    return views["hidden_states"], views["residual"]


# --------------------------------------------------------------------------------- landing memory


def copy_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay._Replay, "run", lambda self, call: self.replay())


def warm_up_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padding_test, "like", lambda tensor: tensor)


def take_all_for_landed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay._Copy, "is_in_place", lambda self, value: True)


def take_none_for_landed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay._Copy, "is_in_place", lambda self, value: False)


def copy_nothing_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay._Copy, "run", lambda self, call: None)


def toy_pair(device: str, landing: ppb.Stage | None = None, **options: Any) -> Pair:
    model = ToyStage(2, hidden=16, inplace_norm=True, max_tokens=64).to(device)
    options |= {} if landing is None else {"stage": landing}
    return Pair(model, device, dims=(None, 0, 0, 0), **NAMED_OPS, **options)


@trap(breaks=copy_nothing_back)
def in_place_norm_on_foreign_proxies(device: str) -> None:
    pair = toy_pair(device)

    def make(n: int) -> list[Any]:
        return [None if v is None else v.to(device) for v in pair.function.make_inputs(n, seed=n).values()]

    pair.run_sizes(make)
    # Two in; two back behind the first piece and the residual behind each of the others, in each of four calls.
    assert ppb.stats().stage_inputs_in_place == 0 and ppb.stats().stage_input_copies == 4 * (2 + 4)


@trap(breaks=copy_nothing_back)
def in_place_norm_that_a_compiler_functionalised(device: str) -> None:
    pair = toy_pair(device, compiler="aot_eager")
    pair.run_sizes(
        lambda n: [None if v is None else v.to(device) for v in pair.function.make_inputs(n, seed=n).values()]
    )


@trap(breaks=warm_up_in_place)
def in_place_norm_on_landing_views(device: str) -> None:
    landing = stage(device, hidden=16)
    pair = toy_pair(device, landing)

    def make(n: int) -> list[Any]:
        made = pair.function.make_inputs(n, seed=n)
        views = landing.views(n)
        for name, view in views.items():
            view.copy_(made[name])
        return [None, made["positions"].to(device), views["hidden_states"], views["residual"]]

    for num_tokens in SIZES:
        pair(*make(num_tokens))
    assert set(pair.padding.values()) == {"safe"}
    stats = ppb.stats()
    assert (stats.stage_inputs_in_place, stats.stage_input_copies) == (4 * 2, 0)
    assert stats.replays == 4 * len(pair.compute)


@trap(breaks=take_all_for_landed)
def foreign_proxies(device: str) -> None:
    landing = stage(device)
    pair = Pair(Add().to(device), device, stage=landing)
    pair.run_sizes(lambda n: proxies(n, device), stage_input_copies=8)


@trap(breaks=take_none_for_landed, counters_only=True)
def proxies_with_a_batch_dimension(device: str) -> None:
    """``[1, tokens, hidden]``, as Hugging Face has them; the traced strides of the first dimension count tokens."""
    landing = stage(device)

    def forward(self: Any, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return torch.ops.traps.mix((hidden_states + residual).squeeze(0) @ self.w) @ self.w

    pair = Pair(net(forward, device), device, dims=(1, 1), stage=landing)
    for num_tokens in SIZES:
        pair(*(view.unsqueeze(0) for view in in_landing_memory(landing, num_tokens, device)))
    assert ppb.stats().replays == 4 * 2
    assert (ppb.stats().stage_inputs_in_place, ppb.stats().stage_input_copies) == (8, 0)


@trap("landing")
def proxies_in_swapped_order(device: str) -> None:
    landing = stage(device)
    pair = Pair(Add().to(device), device, stage=landing)
    for num_tokens in SIZES:
        pair(*in_landing_memory(landing, num_tokens, device))
    for num_tokens in SIZES:
        hidden_states, residual = in_landing_memory(landing, num_tokens, device)
        before = ppb.stats()
        pair(residual, hidden_states)
        assert misses_between(before, ppb.stats()) == {"inputs-overlap": 2}
    before = ppb.stats()
    pair(*in_landing_memory(landing, 5, device))
    assert ppb.stats().replays - before.replays == 2


@trap("landing")
def proxy_in_the_memory_of_one_that_the_graph_does_not_use(device: str) -> None:
    """Bringing it to its own memory would overwrite the other one, which the program never sees."""
    landing = stage(device)

    def forward(self: Any, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return torch.ops.traps.mix(hidden_states @ self.w) @ self.w

    pair = Pair(net(forward, device), device, stage=landing)
    for num_tokens in SIZES:
        pair(*in_landing_memory(landing, num_tokens, device))
    for num_tokens in SIZES:
        hidden_states, residual = in_landing_memory(landing, num_tokens, device)
        before, kept = ppb.stats(), hidden_states.clone()
        pair(residual, hidden_states)
        assert_same(hidden_states, kept)
        assert misses_between(before, ppb.stats()) == {"inputs-overlap": 2}


@trap("landing")
def proxies_that_lie_elsewhere_in_landing_memory(device: str) -> None:
    """Rows further down, and another layout at the very same address."""
    landing = stage(device)
    pair = Pair(Add().to(device), device, stage=landing)
    for num_tokens in SIZES:
        pair(*in_landing_memory(landing, num_tokens, device))
    hidden_states, residual = in_landing_memory(landing, 8, device)
    pair(hidden_states[2:], residual[:6])
    hidden_states, residual = in_landing_memory(landing, 8, device)
    pair(hidden_states[2:7], rows(5, device))
    hidden_states, residual = in_landing_memory(landing, 8, device)
    pair(hidden_states.t(), residual)


@trap("M2")
def output_that_is_a_view_of_a_proxy(device: str) -> None:
    def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.ops.traps.mix(hidden_states @ self.w)
        return x @ self.w, hidden_states[:, :4], hidden_states

    Pair(net(forward, device), device).run_sizes(lambda n: (rows(n, device),))


def hand_over_static_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "hand_over", lambda *arguments: 0)


@trap(breaks=hand_over_static_memory)
def outputs_that_share_memory(device: str) -> None:
    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.ops.traps.mix(x @ self.w) @ self.w
        return x, x[:, 1:4], x.t()

    Pair(net(forward, device), device).run_sizes(lambda n: (rows(n, device),))


# ------------------------------------------------------------------------------------ eager steps


@trap(breaks=copy_nothing_in)
def attention_output_in_a_fresh_tensor(device: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.ops.traps.mix(x @ self.w) @ self.w

    # In each of three replayed calls behind the capture: the argument, and what attention gave.
    Pair(net(forward, device), device).run_sizes(lambda n: (rows(n, device),), input_copies=6)


def believe_what_ops_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay._OnRealRows, "_hidden_aliases", lambda self, outputs: ())


@trap(breaks=believe_what_ops_say)
def attention_that_returns_its_argument_unseen(device: str) -> None:
    """The result is kept over later pieces, which may take the memory of the argument."""

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.ops.trapslib.nothing(x @ self.w)
        x = x @ self.w
        for _ in range(3):
            x = torch.ops.traps.mix(x) @ self.w
        return torch.ops.traps.mix(x + kept) @ self.w, kept

    pair = Pair(net(forward, device), device, split_ops="+traps::*,trapslib::*")
    pair.run_sizes(lambda n: (rows(n, device),))


@trap("R2")
def write_that_no_op_tells_of(device: str) -> None:
    """Pieces read a copy of small state, so what a captured one wrote there would never reach the caller."""

    def forward(self: Any, x: Tensor, state: Tensor) -> Tensor:
        x = torch.ops.traps.mix(x @ self.w)
        return torch.ops.trapslib.write_unseen(x @ self.w, state) @ self.w

    pair = Pair(net(forward, device), device, dims=(0, None))
    state = torch.zeros(HIDDEN, device=device)
    for num_tokens in SIZES:
        pair(rows(num_tokens, device), state)
    assert ppb.stats().miss_reasons == {"first-call": 2, "writes-state": 4}
    assert ppb.stats().replays == 4


def believe_that_writes_reach_what_was_renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split._Splitter, "written_by", lambda self, node: self.facts.nodes[node].writes)


@trap(breaks=believe_that_writes_reach_what_was_renamed, counters_only=True)
def residual_born_in_the_first_piece_and_written_twice_in_each(device: str) -> None:
    """As engines' fused norms do on a first stage, in pieces and in an eager step: nothing of it outlives the call."""

    def forward(self: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        residual = self.embed(tokens)
        x = torch.ops.traps.mix(residual @ self.w) @ self.w
        for _ in range(2):
            residual.add_(x)
            residual.mul_(0.5)
            x = torch.ops.traps.mix(residual @ self.w)
            torch.ops.traps.mix_in_place(residual)
            x = x @ self.w
        return x, residual.sub_(x)

    model = net(forward, device, embed=nn.Embedding(50, HIDDEN).requires_grad_(False))
    pair = Pair(model, device)
    pair.run_sizes(lambda n: (torch.arange(n, device=device) % 50,))
    assert not any("writes" in piece.reason for piece in pair.program.pieces)


@trap(breaks=lambda monkeypatch: monkeypatch.setattr(specs.TensorSpec, "is_dense", True))
def in_place_op_on_every_other_column(device: str) -> None:
    """A copy of it would have other strides than the result of eager has."""

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        half = (x @ self.w)[:, ::2]
        half.add_(torch.ops.traps.mix(x @ self.w)[:, 1::2])
        return torch.ops.traps.mix(half @ self.w[1::2]) @ self.w, half

    pair = Pair(net(forward, device), device)
    pair.run_sizes(lambda n: (rows(n, device),))
    assert "a copy of half would have other strides" in pair.program.pieces[1].reason


@trap("M1", "R2", "R3", "mixing")
def cache_write_with_padded_rows(device: str) -> None:
    def forward(self: Any, x: Tensor, positions: Tensor) -> Tensor:
        x = (x @ self.w) * self.angles[positions]
        self.cache[positions] = x
        return torch.ops.traps.attend(x, self.cache, positions) @ self.w

    model = net(forward, device, angles=torch.randn(32, 1, device=device))
    model.register_buffer("cache", torch.zeros(32, HIDDEN, device=device))
    pair = Pair(model, device)
    start = iter((0, 3, 11, 2, 20))
    pair.run_sizes(lambda n: (rows(n, device), torch.arange(n, device=device) + next(start)))
    reasons = [piece.reason for piece in pair.program.pieces if piece.kind == "eager"]
    assert any("writes graph input cache" in reason for reason in reasons), reasons


def refresh_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = replay._OnRealRows.__init__

    def make(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        self.refreshed = ()

    monkeypatch.setattr(replay._OnRealRows, "__init__", make)


@trap(breaks=refresh_nothing)
def small_state_that_attention_writes_and_a_piece_reads(device: str) -> None:
    """Pieces read a copy of it, which must follow what eager steps write in the middle of the call."""

    def forward(self: Any, x: Tensor, state: Tensor) -> Tensor:
        x = x @ self.w
        for _ in range(2):
            torch.ops.traps.accumulate(state, x)
            x = x @ self.w + state
        return x

    state = torch.zeros(HIDDEN, device=device)
    pair = Pair(net(forward, device), device, dims=(0, None))
    pair.run_sizes(lambda n: (rows(n, device), state))


@trap("aliases")
def state_that_is_passed_twice(device: str) -> None:
    """Attention writes one argument; a piece reads another one that lies in the same memory."""

    def forward(self: Any, x: Tensor, state: Tensor, view: Tensor) -> Tensor:
        x = x @ self.w
        for _ in range(2):
            torch.ops.traps.accumulate(state, x)
            x = x @ self.w + view[0]
        return x

    state = torch.zeros(HIDDEN, device=device)
    pair = Pair(net(forward, device), device, dims=(0, None, None))
    pair.run_sizes(lambda n: (rows(n, device), state, state.view(1, HIDDEN)))


@trap("aliases")
def state_that_is_passed_twice_in_later_calls_only(device: str) -> None:
    def forward(self: Any, x: Tensor, state: Tensor, view: Tensor) -> Tensor:
        x = x @ self.w
        torch.ops.traps.accumulate(state, x)
        return x @ self.w + view[0]

    state = torch.zeros(HIDDEN, device=device)
    pair = Pair(net(forward, device), device, dims=(0, None, None))
    pair.run_sizes(lambda n: (rows(n, device), state, torch.ones(1, HIDDEN, device=device)))
    before = ppb.stats()
    pair(rows(5, device), state, state.view(1, HIDDEN))
    assert misses_between(before, ppb.stats()) == {"inputs-overlap": 2}
    pair(rows(5, device), state, torch.ones(1, HIDDEN, device=device))
    assert ppb.stats().replays - before.replays == 2
    assert len(ppb.programs()) == 1


@trap("M1", "R2", "R3", "R7")
def two_alternating_conversations(device: str) -> None:
    """Each with a cache of its own, as an argument; the graph writes it."""

    def forward(self: Any, x: Tensor, positions: Tensor, cache: Tensor) -> Tensor:
        torch._check(x.shape[0] == positions.shape[0])  # torch 2.11 does not learn it from index_copy_
        x = x @ self.w
        cache.index_copy_(0, positions, x)
        return torch.ops.traps.attend(x, cache, positions) @ self.w

    caches = [torch.zeros(32, HIDDEN, device=device) for _ in range(2)]
    pair = Pair(net(forward, device), device, dims=(0, 0, None))
    turn = iter((0, 1, 0, 1, 1))
    pair.run_sizes(lambda n: (rows(n, device), torch.arange(n, device=device) + 2, caches[next(turn)]))
    for turn_of, num_tokens in enumerate((1, 1, 1, 1, 1, 1)):
        pair(rows(num_tokens, device), torch.tensor([10 + turn_of], device=device), caches[turn_of % 2])
    assert ppb.stats().miss_reasons == {"first-call": 4}
    assert not torch.equal(*caches)


def never_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that stays taken when an exception passes by."""

    class Stuck:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def acquire(self, blocking: bool) -> bool:
            return self.lock.acquire(blocking)

        def release(self) -> None:
            if sys.exc_info()[0] is None:
                self.lock.release()

    made = StageMemory.__init__

    def make(self: StageMemory) -> None:
        made(self)
        self.lock = Stuck()  # type: ignore[assignment]

    monkeypatch.setattr(StageMemory, "__init__", make)


@trap(breaks=never_let_go, counters_only=True)
def exception_inside_attention(device: str) -> None:
    """In a call without graphs, in one that captures, and in one that replays, each followed by a good call."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.ops.traps.mix(x @ self.w) @ self.w

    pair = Pair(net(forward, device), device)
    pair(rows(7, device))
    for num_tokens in (6, 8, 5, 8):
        FAILING["now"] = True
        try:
            with pytest.raises(ValueError, match="told to fail"):
                pair.compiled(rows(num_tokens, device, seed=3))
        finally:
            FAILING["now"] = False
        pair(rows(num_tokens, device))
    assert ppb.stats().replays == 4 * 2
    assert ppb.stats().miss_reasons == {"first-call": 2}


# --------------------------------------------------------------------------------------- addresses


@trap("R7")
def tensor_replaced_at_the_same_shape(device: str) -> None:
    """Large enough to be read where it is. What stays is captured again."""

    def forward(self: Any, x: Tensor, mask: Tensor) -> Tensor:
        x = torch.ops.traps.mix(x @ self.w)
        return (x @ mask)[:, :HIDDEN] @ self.w

    masks = [torch.randn(HIDDEN, 4096, device=device) for _ in range(2)]
    pair = Pair(net(forward, device), device, dims=(0, None))
    for num_tokens in SIZES:
        pair(rows(num_tokens, device), masks[0])
    for call, reasons in enumerate(({"address-moved": 1}, {}, {})):
        before = ppb.stats()
        pair(rows(5 + call, device), masks[1])
        assert misses_between(before, ppb.stats()) == reasons, call
        assert ppb.stats().replays - before.replays == 2 - len(reasons)
    assert "address-moved" in [miss.reason for miss in describe_graphs(pair.program).misses]


@trap("R7")
def parameter_swapped_by_data(device: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.ops.traps.mix(x @ self.w) @ self.w

    pair = Pair(net(forward, device), device)
    pair.run_sizes(lambda n: (rows(n, device),))
    # Both are made before a swap frees memory: in it, new weights would be what a stale address reads.
    changed = [torch.full((HIDDEN, HIDDEN), 0.25, device=device) for _ in range(2)]
    for model, weight in zip((pair.function, pair.twin), changed, strict=True):
        model.w.data = weight
    for reasons in ({"address-moved": 2}, {}, {}):
        before = ppb.stats()
        pair(rows(5, device))
        assert misses_between(before, ppb.stats()) == reasons


@trap("R7")
def two_instances_through_one_program(device: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.ops.traps.mix(x @ self.w) @ self.w

    models = [net(forward, device)]
    models.append(copy.deepcopy(models[0]))
    models[1].w.data = models[1].w.data.t().contiguous()

    def chosen(model: nn.Module, x: Tensor) -> Tensor:
        return model(x)

    pair = Pair(chosen, device, dims=(None, 0))
    for num_tokens in (*SIZES, *SIZES):
        for model in models:
            pair(model, rows(num_tokens, device), theirs=(model, rows(num_tokens, device)))
    assert len(ppb.programs()) == 1
    assert ppb.stats().miss_reasons == {"first-call": 2, "address-moved": 2}
    assert ppb.stats().replays == 2 * 2 * 9


@trap("R7")
def ten_stages_of_one_class(device: str) -> None:
    models = [ToyStage(1, hidden=16, seed=seed).to(device) for seed in range(10)]
    torch._dynamo.reset()
    ppb.reset()
    pairs = []
    options = {"compiler": "eager", **NAMED_OPS, "capture_sizes": "1,2,4,8", "max_tokens": 8}
    options["graphs"] = "emulate" if device == "cpu" else "cuda"
    for model in models:
        twin = ToyStage(1, hidden=16, seed=0).to(device)
        twin.load_state_dict(model.state_dict())
        pairs.append((torch.compile(model, backend="pp_piecewise", options=options), twin, model))
    for start, num_tokens in enumerate((*SIZES, 7, 1, 1, 1)):
        for index, (compiled, twin, model) in enumerate(pairs):
            made = {
                k: None if v is None else v.to(device) for k, v in model.make_inputs(num_tokens, start, index).items()
            }
            if start == 0 and num_tokens > 1:
                for name in ("positions", "hidden_states", "residual"):
                    torch._dynamo.mark_dynamic(made[name], 0)
            expected = twin(**{k: None if v is None else v.clone() for k, v in made.items()})
            for got, wanted in zip(compiled(**made), expected, strict=True):
                if not torch.allclose(got, wanted, rtol=1e-5, atol=1e-5):
                    raise Wrong(f"stage {index}, call {start}")
            for name, value in model.state_dict().items():
                if not torch.allclose(value, twin.state_dict()[name], rtol=1e-5, atol=1e-5):
                    raise Wrong(f"stage {index}, call {start}: {name}")
    assert ppb.stats().calls == 90, "a call did not reach a program"
    assert ppb.stats().replays >= 2 * 10 * 6


@trap("R5")
def transposed_inputs(device: str) -> None:
    """Per-token tensors whose tokens are innermost in memory; a kernel reads them by their strides."""

    def forward(self: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.ops.traps.mix(x @ self.w)
        z = (y * 2).relu()
        return x @ self.w + z, z

    def make(n: int) -> tuple[Tensor, Tensor]:
        return rows(n, device), torch.randn(HIDDEN, n, device=device).t()

    Pair(net(forward, device), device).run_sizes(make)


@trap("rows")
def zero_stride_inputs(device: str) -> None:
    def forward(self: Any, x: Tensor, y: Tensor) -> Tensor:
        return torch.ops.traps.mix(x @ self.w + y) @ self.w

    def make(n: int) -> tuple[Tensor, Tensor]:
        return rows(n, device), torch.randn(1, HIDDEN, device=device).expand(n, HIDDEN)

    Pair(net(forward, device), device).run_sizes(make)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("trap", TRAPS, ids=str)
def test_trap(trap: Trap, device: str) -> None:
    trap.body(device)


@pytest.mark.parametrize("trap", TRAPS.closing())
def test_trap_closes_without_its_defence(trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    # Emulated only: on a GPU, what a stale address gives is undefined and may end the process.
    trap.must_close("cpu", monkeypatch)

"""Traps of memory that several storage objects hold: slices of numpy arrays, buffers and dlpack overlap unseen.

Read ``test_traps_padding.py`` first; the table works as there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_traps_memory import mix, stage
from torch import Tensor

import pp_piecewise_backend as ppb
from captured import HIDDEN, Pair, Trap, Traps, misses_between, net, rows
from pp_piecewise_backend.runtime import apart, dispatch, replay
from pp_piecewise_backend.utils.addresses import MemoryMap, span

pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")

TRAPS = Traps()
trap = TRAPS.trap
RETURNS = {"its argument": False}
_LIBRARY = torch.library.Library("trapsoverlap", "DEF")
_LIBRARY.define("same(Tensor x) -> Tensor")
_LIBRARY.impl("same", lambda x: torch.from_numpy(x.numpy()) if RETURNS["its argument"] else x * 1, "CPU")
_LIBRARY.impl("same", lambda x: torch.empty_like(x), "Meta")


def two_in_one_array(num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """The second begins two rows after the first."""
    array = rows(num_tokens + 2, "cpu", seed=seed).numpy()
    return torch.from_numpy(array[:num_tokens]), torch.from_numpy(array[2:])


def two_in_one_buffer(num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    raw = bytearray(rows(num_tokens + 2, "cpu", seed=seed).numpy().tobytes())
    count, begin = num_tokens * HIDDEN, 2 * HIDDEN * 4
    tensors = (torch.frombuffer(raw, dtype=torch.float32, offset=offset, count=count) for offset in (0, begin))
    first, second = (tensor.view(num_tokens, HIDDEN) for tensor in tensors)
    return first, second


def one_through_dlpack(num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    whole = rows(num_tokens + 2, "cpu", seed=seed)
    return whole[:num_tokens], torch.from_dlpack(whole[2:])


def two_apart(num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    return rows(num_tokens, "cpu", seed=seed), rows(num_tokens, "cpu", seed=seed + 100)


def call_all(pair: Pair, make: Callable[..., Any], *calls: Any) -> list[dict[str, int]]:
    """Per call, after three apart from which the captures come, what missed; eager gets equal arguments of its own."""
    missed = []
    for seed, call in enumerate(calls):
        before = ppb.stats()
        pair(*make(call, seed), theirs=make(call, seed))
        missed.append(misses_between(before, ppb.stats()))
    return missed


def see_no_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart.Apart, "are_broken", lambda self, args, addresses=(): False)


@trap(breaks=see_no_overlap)
def written_input_over_one_that_is_read(device: str) -> None:
    """Its write was moved to the front of the graph."""

    def forward(self: Any, written: Tensor, x: Tensor) -> Tensor:
        y = x @ self.w
        written.add_(1)
        return mix(y + mix(x @ self.w)) @ self.w

    pair = Pair(net(forward, device), device)
    makers = (two_apart, two_apart, two_in_one_array, two_in_one_buffer, one_through_dlpack, two_apart)
    missed = call_all(pair, lambda make, seed: make(7, seed), *makers)
    assert missed == [{"first-call": 2}, {}, *[{"inputs-overlap": 2}] * 3, {}]


@trap(breaks=see_no_overlap)
def state_that_attention_writes_over_a_small_tensor_that_is_copied(device: str) -> None:
    def forward(self: Any, x: Tensor, state: Tensor, view: Tensor) -> Tensor:
        x = x @ self.w
        for _ in range(2):
            torch.ops.traps.accumulate(state, x)
            x = x @ self.w + view
        return x

    def make(shift: int | None, seed: int) -> tuple[Tensor, ...]:
        array = torch.zeros(64).numpy()
        begin = 40 if shift is None else shift
        return rows(7, device, seed=seed), *map(torch.from_numpy, (array[:HIDDEN], array[begin : begin + HIDDEN]))

    missed = call_all(Pair(net(forward, device), device, dims=(0, None, None)), make, None, None, 3, 0, None)
    assert missed == [{"first-call": 3}, {}, {"inputs-overlap": 3}, {"inputs-overlap": 3}, {}]


@trap(breaks=see_no_overlap)
def weights_over_a_written_stage_input(device: str) -> None:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        hidden_states.add_(1)
        return mix(hidden_states @ self.w) @ self.w

    pair = Pair(net(forward, device), device)

    def part(module: Any) -> Tensor:
        return torch.from_numpy(module.w.detach().numpy()[1:8])

    for seed in range(3):
        pair(rows(7, device, seed=seed))
    before = ppb.stats()
    pair(part(pair.function), theirs=[part(pair.twin)])
    assert misses_between(before, ppb.stats()) == {"inputs-overlap": 2}


@trap("landing")
def proxies_through_numpy_elsewhere_in_landing_memory(device: str) -> None:
    landing = stage(device)

    def forward(self: Any, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return mix((hidden_states + 2 * residual) @ self.w) @ self.w

    def make(shift: int, seed: int) -> list[Tensor]:
        whole = list(landing.views(8).values())
        for at, view in enumerate(whole):
            view.copy_(rows(8, device, seed=2 * seed + at))
        if shift:
            whole = [torch.from_numpy(view.numpy()) for view in reversed(whole)]
        return [view[shift : 5 + shift] for view in whole]

    pair = Pair(net(forward, device), device, stage=landing)
    for seed, shift in enumerate((0, 0, 2, 0)):
        before, given = ppb.stats(), make(shift, seed)
        pair(*given)  # eager gets copies
        missed = misses_between(before, ppb.stats())
        assert shift == 0 or missed == {"inputs-overlap": 2}, missed


def look_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = replay._OnRealRows.__init__

    def make(self: Any, *arguments: Any) -> None:
        made(self, *arguments)
        self.is_opaque = False

    monkeypatch.setattr(replay._OnRealRows, "__init__", make)


@trap(breaks=look_once)
def attention_that_returns_its_argument_in_some_calls(device: str) -> None:
    """In a storage of its own; the result is kept over later pieces, which may take the memory of the argument."""

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.ops.trapsoverlap.same(x @ self.w)
        x = x @ self.w
        for _ in range(3):
            x = mix(x) @ self.w
        return mix(x + kept) @ self.w, kept

    pair = Pair(net(forward, device), device, split_ops="+traps::*,trapsoverlap::*")
    for seed, returns in enumerate((False, False, False, True, False)):
        RETURNS["its argument"] = returns
        try:
            pair(rows(7, device, seed=seed))
        finally:
            RETURNS["its argument"] = False


def take_what_was_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.Graphs, "_takes_what_was_given_out", lambda self, args, addresses: False)


@trap(breaks=take_what_was_given_out)
def static_result_that_comes_back_as_an_argument(device: str) -> None:
    """Attention reads it where it is, after the piece that writes the same result again."""

    def forward(self: Any, x: Tensor, y: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        first = mix(x @ self.w) @ self.w
        return torch.ops.traps.attend(first, y, positions) @ self.w, first

    pair = Pair(net(forward, device), device, static_outputs=True, mark=False)
    x, y, positions = rows(8, device), rows(8, device, seed=1), torch.arange(8, device=device)
    for _ in range(3):
        _, static = pair(x, y, positions)
    before = ppb.stats()
    pair(x, static, positions)
    assert misses_between(before, ppb.stats()) == {"inputs-overlap": 3}


@trap(breaks=take_what_was_given_out)
def static_result_that_the_module_keeps(device: str) -> None:
    """It is known early, and what it was in the last call is read late, where it lies."""

    def forward(self: Any, x: Tensor, positions: Tensor) -> Tensor:
        first = mix(x @ self.w) @ self.w
        kept, self.kept = self.kept, first.mean(0)
        return torch.ops.traps.attend(first, first, positions) @ self.w + kept

    pair = Pair(net(forward, device, kept=torch.zeros(HIDDEN)), device, static_outputs=True, mark=False)
    positions = torch.arange(8, device=device)
    for _ in range(2):  # what a capture gave is there when the next one captures
        kept = pair.function.kept

        def make_inputs(num_tokens: int, kept: Tensor = kept) -> Any:
            pair.function.kept = kept
            return (rows(num_tokens, device), positions), {}

        ppb.warmup(pair.compiled, make_inputs, sizes=[8], progress=False)
    pair.function.kept = kept.zero_()
    for seed in range(4):
        pair(rows(8, device, seed=seed), positions)


@pytest.mark.parametrize("trap", TRAPS, ids=str)
def test_trap(trap: Trap) -> None:
    trap.body("cpu")


@pytest.mark.parametrize("trap", TRAPS, ids=str)
def test_trap_closes_without_its_defence(trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    trap.must_close("cpu", monkeypatch)


def test_a_map_knows_all_storages_of_each_byte() -> None:
    array = torch.zeros(12).numpy()
    left, middle, right = (torch.from_numpy(array[begin : begin + 4]) for begin in (0, 2, 8))
    known = MemoryMap([(span(left), 1), (span(middle), 2), (span(right), 3), ((0, 0), 4)])
    gap = torch.from_numpy(array[6:8])
    whole = span(torch.from_numpy(array))
    assert known.numbers_in(span(left)) == known.numbers_in(span(middle)) == {1, 2}
    assert known.numbers_in(span(right)) == {3} and known.numbers_in(whole) == {1, 2, 3}
    assert not known.numbers_in(span(gap)) and not known.numbers_in((0, 0)) and not MemoryMap().numbers_in(whole)
    assert [known.holds(t) for t in (left, left[3:], middle, gap, right, right[:0])] == [True] * 3 + [
        False,
        True,
        False,
    ]


def test_inputs_that_overlap_when_traced_are_one_memory() -> None:
    def forward(self: Any, written: Tensor, x: Tensor) -> Tensor:
        written.add_(1)
        return mix(x @ self.w) @ self.w

    pair = Pair(net(forward, "cpu"), "cpu")
    call_all(pair, lambda make, seed: make(7, seed), two_in_one_array)
    numbers = {i.label: i.spec.storage for i in pair.program.inputs if i.spec is not None}
    assert numbers["written"] == numbers["x"] != numbers["w"]

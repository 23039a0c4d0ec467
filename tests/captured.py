"""A function compiled with graphs next to its eager twin: every call is compared, every replay and miss is counted."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pp_piecewise_backend as ppb
from against_eager import aliasing, assert_same, tensors
from pp_piecewise_backend.runtime.program import Program
from switches import RULES, switch_off

DEVICES = [pytest.param("cpu", id="emulate"), pytest.param("cuda", id="cuda", marks=pytest.mark.cuda)]
HIDDEN = 8
SIZES = (7, 6, 8, 5, 7)
"""Calls in one bucket of 8: the first runs without graphs, the second captures, all but the third are padded."""


def net(forward: Callable[..., Any], device: str, seed: int = 0, **members: Any) -> nn.Module:
    """A module with a weight ``w`` and this ``forward(self, ...)``; other members are set as they are."""
    module = type("Net", (nn.Module,), {"forward": forward})()
    generator = torch.Generator().manual_seed(seed)
    module.w = nn.Parameter(torch.randn(HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5, requires_grad=False)
    for name, value in members.items():
        setattr(module, name, value)
    return module.to(device)


def rows(num_tokens: int, device: str, width: int = HIDDEN, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + num_tokens)
    return torch.randn(num_tokens, width, generator=generator).to(device)


class Wrong(AssertionError):
    """A compiled call crashed, or what the caller can see differs from eager."""


class Pair:
    """``function`` compiled with graphs, and the same run eagerly. Calls compare all that a caller can see.

    Args:
        dims: for each positional argument the dimension to mark as dynamic in the first call; 0 for all by default.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        device: str,
        *,
        dims: Sequence[int | None] | None = None,
        mark: bool = True,
        **options: Any,
    ) -> None:
        torch._dynamo.reset()
        ppb.reset()
        self.device = device
        self.function = function
        self.twin = copy.deepcopy(function) if isinstance(function, nn.Module) else function
        self.options = {
            "compiler": "eager",
            "mode": "piecewise",
            "graphs": "emulate" if device == "cpu" else "cuda",
            "split_ops": "+traps::*",
            "graph_safe_ops": "*::*",  # those of tests read their arguments
            "capture_sizes": "1,2,4,8",
            **({} if "stage" in options else {"max_tokens": 8}),
            **options,
        }
        self.compiled = torch.compile(function, backend="pp_piecewise", options=self.options, fullgraph=True)
        self._dims = dims
        self._marks = mark
        self._calls = 0
        self._last: tuple[Any, Any] | None = None

    def __call__(self, *arguments: Any, theirs: Sequence[Any] | None = None) -> Any:
        """One call of both, compared; the compiled one gets the arguments themselves, eager copies or ``theirs``."""
        theirs = copy.deepcopy(list(arguments)) if theirs is None else theirs
        if self._calls == 0 and self._marks:
            self._mark(arguments)
        self._calls += 1
        states = _generator_states(self.device)
        expected = self.twin(*theirs)
        after = _generator_states(self.device)
        _set_generator_states(self.device, states)
        try:
            got = self.compiled(*arguments)
            self._compare(arguments, got, theirs, expected, after)
        except Exception as error:
            raise Wrong(f"call {self._calls}: {error}") from error
        return got

    def _compare(
        self, arguments: Sequence[Any], got: Any, theirs: Sequence[Any], expected: Any, states: Sequence[Tensor]
    ) -> None:
        for state, wanted in zip(_generator_states(self.device), states, strict=True):
            assert torch.equal(state, wanted), "the random generator was advanced otherwise"
        assert_same(got, expected, 1e-5)
        assert_same(list(arguments), list(theirs), 1e-5)
        assert aliasing(arguments, got) == aliasing(theirs, expected)
        if isinstance(self.function, nn.Module):
            assert_same(self.function.state_dict(), self.twin.state_dict(), 1e-5)
        if self._last is not None:
            assert_same(*self._last, 1e-5)  # what an earlier call returned is still as it was
        owned = not {_where(t) for t in tensors(arguments)} & {_where(t) for t in tensors(got)}
        self._last = (got, copy.deepcopy(expected)) if owned and not self.options.get("static_outputs") else None

    def _mark(self, arguments: Sequence[Any]) -> None:
        first = next(a for a in arguments if isinstance(a, Tensor))
        for index, argument in enumerate(arguments):
            dim = 0 if self._dims is None else self._dims[index]
            if isinstance(argument, Tensor) and dim is not None and argument.dim():
                if self._dims is None and argument.shape[0] != first.shape[0]:
                    continue
                torch._dynamo.mark_dynamic(argument, dim)

    @property
    def program(self) -> Program:
        """The last program with a varying token count, or the last one."""
        programs = [p for p in ppb.programs() if isinstance(p, Program)]
        varying = [p for p in programs if p.graphs is not None and p.graphs.plan.token_symbol is not None]
        return (varying or programs)[-1]

    @property
    def compute(self) -> list[int]:
        return [piece.index for piece in self.program.pieces if piece.kind == "compute"]

    @property
    def padding(self) -> dict[int, str]:
        return {piece.index: piece.padding for piece in self.program.pieces if piece.kind == "compute"}

    def run_sizes(
        self,
        make: Callable[[int], Sequence[Any]],
        unsafe: Mapping[int, str] | None = None,
        then: Sequence[tuple[int, Sequence[Any]]] = (),
        **expected: int,
    ) -> None:
        """Call with ``SIZES``: all pieces must replay, but for those of ``unsafe`` in padded calls.

        Args:
            unsafe: step -> words with which its padding must be refused.
            then: further calls in the same bucket, each a number of tokens and arguments.
            expected: further counters, over all calls.
        """
        unsafe = unsafe or {}
        before = ppb.stats()
        calls = [*((num_tokens, make(num_tokens)) for num_tokens in SIZES), *then]
        for _, arguments in calls:
            self(*arguments)
        after, pieces = ppb.stats(), len(self.compute)
        assert pieces > len(unsafe), "a test with no safe piece says nothing about capture"
        padding = self.padding
        for step, words in unsafe.items():
            assert words in padding[step], padding
        assert {step for step, found in padding.items() if found != "safe"} == set(unsafe), padding
        missed = len(unsafe) * sum(num_tokens < 8 for num_tokens, _ in calls[1:])
        assert misses_between(before, after) == {"first-call": pieces, **({"padding-unsafe": missed} if missed else {})}
        assert after.replays - before.replays == (len(calls) - 1) * pieces - missed
        for name, amount in expected.items():
            assert after[name] - before[name] == amount, (name, after[name] - before[name])


def misses_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, int]:
    counts = Counter(after["miss_reasons"])
    counts.subtract(before["miss_reasons"])
    return {reason: count for reason, count in counts.items() if count}


Body = Callable[[str], None]


@dataclass(frozen=True)
class Trap:
    """A body that holds on every device, and that must fail once what defends it is switched off."""

    body: Body
    rules: tuple[str, ...]
    """Rules that, switched off together, let the trap close."""
    breaks: Callable[[pytest.MonkeyPatch], None] | None
    """What stands for such a rule where the defence is no rule: it breaks one mechanism."""
    counters_only: bool
    """Whether results stay right without the rules, at a cost."""
    ends_cuda: bool
    """Whether, without the rules, a kernel fails in a way after which no CUDA call of the process works."""

    def __str__(self) -> str:
        return self.body.__name__

    def must_close(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        assert set(self.rules) <= RULES, "no such rule"
        if self.ends_cuda and device == "cuda":
            pytest.skip("an assertion in a CUDA kernel would end CUDA for all later tests")
        switch_off(self.rules, monkeypatch)
        if self.breaks is not None:
            self.breaks(monkeypatch)
        with pytest.raises(AssertionError if self.counters_only else Wrong):
            self.body(device)


class Traps(list[Trap]):
    def closing(self) -> list[Any]:
        """For ``parametrize``: traps are slow whose rules another one before has shown to be needed."""
        shown: list[tuple[str, ...]] = []
        params = []
        for trap in self:
            is_shown = trap.breaks is None and trap.rules in shown
            params.append(pytest.param(trap, marks=pytest.mark.slow if is_shown else (), id=str(trap)))
            shown.append(trap.rules)
        return params

    def trap(
        self,
        *rules: str,
        breaks: Callable[[pytest.MonkeyPatch], None] | None = None,
        counters_only: bool = False,
        ends_cuda: bool = False,
    ) -> Callable[[Body], Body]:
        """Register a body."""
        assert rules or breaks, "a trap that nothing closes proves nothing"

        def register(body: Body) -> Body:
            self.append(Trap(body, rules, breaks, counters_only, ends_cuda))
            return body

        return register


def _where(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _generator_states(device: str) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if device == "cuda" else [])]


def _set_generator_states(device: str, states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device == "cuda":
        torch.cuda.set_rng_state(states[1])

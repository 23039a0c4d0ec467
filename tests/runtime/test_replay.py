"""The hot path of a replayed call: which tensors it makes, and whether the counters say what it copies."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pp_piecewise_backend as ppb
from models.replaced_work import replace_work
from models.toy_stage import NAMED_OPS, ToyStage
from pp_piecewise_backend.runtime.program import Program
from pp_piecewise_backend.runtime.replay import FlatProgram

pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")

MAX_TOKENS = 16
LAYERS = 3
COPIES = ("copy_", "_foreach_copy_")


class Observer(TorchDispatchMode):
    """Sees what runs outside of replays and of the bodies of eager steps: tensors that come into being, and copies."""

    def __init__(self, stage: ppb.Stage) -> None:
        super().__init__()
        self.looks_away = False
        self.created: list[Tensor] = []
        self.copied: Counter[str] = Counter()
        """Where to -> tensors copied; the tail of padded rows is filled from its first row and counts apart."""
        self._landing = {stage.landing(name).untyped_storage().data_ptr() for name in stage.inputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.looks_away:
            return result
        taken = {id(leaf) for leaf in torch.utils._pytree.tree_leaves((args, kwargs))}
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf) not in taken:
                self.created.append(leaf)
        if func.overloadpacket.__name__ in COPIES:
            pairs = [args[:2]] if isinstance(args[0], Tensor) else zip(*args[:2], strict=True)
            for target, source in pairs:
                where, whence = (value.untyped_storage().data_ptr() for value in (target, source))
                kind = "tail" if where == whence else "landing" if where in self._landing else "elsewhere"
                if kind == "elsewhere" and whence in self._landing:
                    kind = "back"
                self.copied[kind] += 1
        return result

    @contextlib.contextmanager
    def looking_away(self) -> Iterator[None]:
        self.looks_away = True
        try:
            yield
        finally:
            self.looks_away = False

    def hide(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def hidden(*args: Any) -> Any:
            with self.looking_away():
                return call(*args)

        return hidden

    def watch(self, flat: FlatProgram) -> None:
        replace_work(flat, self.hide, self.hide)


class Compiled:
    """A stage that replays all its pieces, with what Dynamo calls its program with."""

    def __init__(self, **variant: Any) -> None:
        self.module = ToyStage(LAYERS, **variant)
        self.reference = copy.deepcopy(self.module)
        proxies = {name: ppb.Proxy((self.module.hidden,), torch.float32) for name in ("hidden_states", "residual")}
        self.stage = ppb.Stage(proxies, MAX_TOKENS, device="cpu")
        options = {"compiler": "eager", **NAMED_OPS, "graphs": "emulate", "stage": self.stage}
        compiled = torch.compile(self.module, backend="pp_piecewise", options=options)
        inputs = self.inputs(MAX_TOKENS, in_place=False)
        for tensor in inputs.values():
            if tensor is not None:
                torch._dynamo.mark_dynamic(tensor, 0)
        for _ in range(2):
            compiled(**inputs)
        program = ppb.programs()[0]
        assert isinstance(program, Program)
        self.program = program

    def inputs(self, tokens: int, in_place: bool) -> dict[str, Tensor | None]:
        made = self.module.make_inputs(tokens, seed=tokens)
        if in_place:
            for name, view in self.stage.views(tokens).items():
                made[name] = view.copy_(made[name])
        return made

    def arguments(self, inputs: dict[str, Tensor | None]) -> list[Any]:
        scope = {"L": {"self": self.module, **inputs}}
        tokens = inputs["positions"].shape[0]
        return [
            tokens if graph_input.expression is not None else eval(graph_input.source, scope)
            for graph_input in self.program.inputs
        ]

    def observed(self, inputs: dict[str, Tensor | None]) -> tuple[Observer, tuple[Any, ...], dict[str, int]]:
        """One observed call: what was seen, the results, and what the program counted."""
        observer = Observer(self.stage)
        for bucket, _ in self.program.graphs.buckets:
            for flat in bucket.programs.values():
                observer.watch(flat)
        arguments = self.arguments(inputs)
        before = self.program.stats.as_dict()
        with observer:
            results = self.program(*arguments)
        after = self.program.stats.as_dict()
        return observer, results, {name: after[name] - before[name] for name in COUNTED}


COUNTED = (
    "calls",
    "replays",
    "eager_steps",
    "graph_misses",
    "padded_tokens",
    "input_copies",
    "border_copies",
    "output_copies",
    "stage_input_copies",
    "stage_inputs_in_place",
)
VARIANTS: dict[str, dict[str, Any]] = {
    "output-argument": {},
    "returned-attention": {"attention_output_argument": False},
    "inplace-norm": {"inplace_norm": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_repeated_call_makes_no_tensor_but_the_callers_and_counts_its_copies(variant: str) -> None:
    compiled = Compiled(**VARIANTS[variant])
    for tokens, in_place in itertools.product([MAX_TOKENS, 13], [True, False]):
        check_repeated_call(compiled, variant, tokens, in_place)


def check_repeated_call(compiled: Compiled, variant: str, tokens: int, in_place: bool) -> None:
    for _ in range(2):  # captured at the latest, replayed
        compiled.program(*compiled.arguments(compiled.inputs(tokens, in_place)))
    inputs = compiled.inputs(tokens, in_place)
    expected = compiled.reference(**copy.deepcopy(inputs))
    observer, results, counted = compiled.observed(inputs)

    returned = [*results, *(value for value in inputs.values() if value is not None)]
    for wanted in expected:  # what eager returns as its argument, Dynamo takes from there
        assert any(torch.allclose(value, wanted, atol=1e-5) for value in returned if value.shape == wanted.shape)
    assert {id(tensor) for tensor in observer.created} <= {id(result) for result in results}
    copied = observer.copied
    assert counted == {
        "calls": 1,
        "replays": LAYERS + 1,
        "eager_steps": LAYERS,
        "graph_misses": 0,
        "padded_tokens": MAX_TOKENS - tokens,
        "input_copies": copied["elsewhere"],
        "border_copies": 0,
        "output_copies": len(observer.created),
        "stage_input_copies": copied["landing"] + copied["back"],
        "stage_inputs_in_place": 2 if in_place else 0,
    }
    assert copied["landing"] == (0 if in_place else 2)
    assert copied["elsewhere"] == 1 + (LAYERS if variant == "returned-attention" else 0)  # positions; attention's
    if variant == "inplace-norm":
        assert (copied["back"] > 0) == (not in_place)

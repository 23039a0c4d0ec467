"""What is wrong about a type rather than a value: each public argument says what it got and what it expects."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import pp_piecewise_backend as ppb
from pp_piecewise_backend import errors
from pp_piecewise_backend.pipeline.transports.local import LocalHub

PROXIES = {"h": ppb.Proxy((), torch.float32)}


class Module(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x + 1}


def make(**changes: Any) -> ppb.StageRunner:
    usual: dict[str, Any] = {
        "module": Module(),
        "make_inputs": lambda num_tokens, tag: {"x": torch.ones(num_tokens)},
        "max_tokens": 4,
        "transport": LocalHub(1).transport(0),
        "options": {"compiler": "eager", "graphs": "off"},
    }
    return ppb.StageRunner(**{**usual, **changes})


WRONG: Mapping[str, list[Any]] = {
    "module": [lambda x: x, None, Module],
    "make_inputs": [None, {"x": torch.ones(2)}],
    "max_tokens": [None, 4.0, "4", True, 0],
    "inputs": [["h"], {"h": torch.float32}, {1: PROXIES["h"]}, 0],
    "outputs": ["h", {"h": (4,)}],
    "feedback": [{"tokens": torch.int64}, "tokens"],
    "feedback_rows": [None, 1, "rows"],
    "finish": [5, "sample"],
    "transport": [5, None, ["p2p"]],
    "receive": [None, ["early"], True],
    "max_in_flight": ["2", 2.0, True, 0],
    "timeout_s": ["60", None, True, float("nan")],
    "step_timeout_s": ["1", True, -1],
    "setup_timeout_s": ["60", None, True],
    "options": [0, "", ["compiler"], "graphs=off"],
}
WITH_RANKS = {"group", "mesh"}
"""Asked only where there are process groups."""


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_an_argument_of_a_wrong_type(name: str, value: Any) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        make(**{name: value})
    told = str(caught.value)
    assert name in told and ("expected" in told or "must be" in told), told
    assert (repr(value) in told or "of type" in told) and len(told) < 400, told


def test_every_argument_has_its_wrong_types() -> None:
    assert WRONG.keys() | WITH_RANKS == inspect.signature(ppb.StageRunner).parameters.keys()


@pytest.mark.parametrize(
    "call",
    [
        lambda: ppb.MicroBatch("3"),
        lambda: ppb.MicroBatch(None),
        lambda: ppb.MicroBatch(3, "tag"),
        lambda: ppb.MicroBatch(3, bytearray(b"tag")),
        lambda: ppb.MicroBatch(3, b"", [torch.ones(3)]),
        lambda: ppb.MicroBatch(3, b"", torch.ones(3)),
        lambda: ppb.MicroBatch(3, feedback=None),
        lambda: ppb.Proxy("ab", torch.float32),
        lambda: ppb.Proxy((4.0,), torch.float32),
        lambda: ppb.Proxy(None, torch.float32),
        lambda: ppb.Proxy((4,), "float32"),
        lambda: ppb.Proxy((4,), torch.float32, layout=1),
        lambda: ppb.Proxy((4,), torch.float32, layout=["replicated"]),
        lambda: ppb.Stage(None, 4),
        lambda: ppb.Stage(["h"], 4),
        lambda: ppb.Stage(PROXIES, "4"),
        lambda: ppb.Stage(PROXIES, 4, device="gpu"),
        lambda: ppb.Stage(PROXIES, 4, device=1.5),
        lambda: make().run(5),
        lambda: make().run(ppb.MicroBatch(3)),
        lambda: list(make().run([3])),
        lambda: list(make().run([(3, b"")])),
        lambda: make().trace(5),
        lambda: make().trace(None),
        lambda: list(make(make_inputs=lambda n, tag: torch.ones(n)).run([ppb.MicroBatch(2)])),
        lambda: make(make_inputs=lambda n, tag: None).warmup(),
    ],
)
@pytest.mark.usefixtures("fresh_backend")
def test_a_call_with_a_wrong_type(call: Callable[[], Any]) -> None:
    with pytest.raises(errors.ConfigError, match=r" (got|gave) ") as caught:
        call()
    assert "expected" in str(caught.value)


@pytest.mark.parametrize("num_tokens", ["3", 3.5, None])
def test_views_of_a_number_that_is_none(num_tokens: Any) -> None:
    with pytest.raises(ValueError, match="expected 1 to 4 rows"):
        ppb.Stage(PROXIES, 4, "cpu").views(num_tokens)


SENTENCES = {
    name: function
    for name, function in vars(errors).items()
    if inspect.isfunction(function) and "error" in inspect.signature(function).parameters and name != "cause"
}


@pytest.mark.parametrize("name", SENTENCES)
@pytest.mark.parametrize("error", [TimeoutError(), ConnectionError(" ")], ids=["no text", "blank"])
def test_a_message_names_its_cause_though_that_says_nothing(name: str, error: Exception, tmp_path: Path) -> None:
    others = {
        parameter: {"int": 1, "float": 1.0}.get(str(kind.annotation), "some text")
        for parameter, kind in inspect.signature(SENTENCES[name]).parameters.items()
        if parameter != "error" and kind.default is inspect.Parameter.empty
    }
    assert type(error).__name__ in SENTENCES[name](**others, error=error)

"""Programs serve where Dynamo compiles ahead of time, as engines do that drop guards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pp_piecewise_backend as ppb
from models.attention_layers import HIDDEN, Layers

pytestmark = pytest.mark.usefixtures("no_gradients", "fresh_backend")

OPTIONS = {"compiler": "eager", "graphs": "emulate", "capture_sizes": "4,8", "max_tokens": 8}


class Embedded(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, HIDDEN)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(self.embedding(ids.long()).view_as(ids[:, None].expand(-1, HIDDEN)))


def compiled_ahead(function: Any, *args: Tensor, **options: Any) -> Any:
    with torch._dynamo.config.patch(enable_aot_compile=True):
        compiled = torch.compile(function, fullgraph=True, backend="pp_piecewise", options=OPTIONS | options)
        return compiled.aot_compile((args, {}))  # type: ignore[attr-defined]


def sample(num_tokens: int) -> Tensor:
    x = torch.randn(num_tokens, HIDDEN)
    torch._dynamo.mark_dynamic(x, 0)
    return x


@pytest.mark.compat
def test_a_program_compiled_ahead_of_time_replays_and_has_the_name_of_its_module() -> None:
    model = Layers()
    ahead = compiled_ahead(model.forward, sample(8))
    (program,) = ppb.programs()
    assert program.name == "Layers#0"
    for num_tokens in (8, 8, 3, 4, 4):
        x = sample(num_tokens)
        assert torch.equal(ahead(model, x), model(x))
    assert program.stats.replays == 3 * len([p for p in program.pieces if p.kind == "compute"])


def test_compiling_ahead_of_time_in_inference_mode_proves_what_it_does_without() -> None:
    """``long``, ``view_as`` and their like are no ops of their own but in tensors made under inference mode."""

    def ids(num_tokens: int) -> Tensor:
        x = torch.arange(num_tokens, dtype=torch.int32) % 8
        torch._dynamo.mark_dynamic(x, 0)
        return x

    model = Embedded()
    with torch.inference_mode():
        ahead = compiled_ahead(model.forward, ids(8))
        for num_tokens in (8, 8, 3, 3):
            assert torch.equal(ahead(model, ids(num_tokens)), model(ids(num_tokens)))
    (program,) = ppb.programs()
    assert [piece.padding for piece in program.pieces if piece.kind == "compute"] == ["safe"] * 3
    assert program.stats.miss_reasons == {"first-call": 6}  # of the first calls of 8 and 3 tokens


def test_positional_arguments_have_their_names() -> None:
    def outer(*args: Tensor) -> Tensor:
        return model(*args)

    model = Layers()
    ahead = compiled_ahead(outer, sample(8))
    (program,) = ppb.programs()
    assert [i.label for i in program.inputs if i.kind == "stage-input"] == ["hidden_states"]
    assert torch.equal(ahead(x := sample(5)), model(x))


def test_a_graph_that_is_not_split_is_served_ahead_of_time_too() -> None:
    def doubled(x: Tensor) -> Tensor:
        return 2 * x

    weight = torch.ones(8, requires_grad=True)

    def scaled(x: Tensor) -> Tensor:
        return x * weight

    with torch.enable_grad(), pytest.warns(ppb.errors.PPPiecewiseWarning, match="gradient"):
        ahead = compiled_ahead(scaled, sample(8))
        assert torch.equal(ahead(x := sample(8)), x * weight)
    assert not hasattr(ppb.programs()[0], "split")


def test_saving_a_program_is_refused_with_what_happens_instead(tmp_path: Path) -> None:
    ahead = compiled_ahead(Layers().forward, sample(8))
    with pytest.raises(ppb.errors.PPPiecewiseError, match=r"Layers#0 .* not saved, so the next start traces"):
        ahead.save_compiled_function(str(tmp_path / "model"))

"""What an input is does not follow from where it comes from: sizes, members and numbers that vary, and what is said."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pp_piecewise_backend as ppb
from captured import HIDDEN, Pair, Wrong, net, rows
from pp_piecewise_backend.compilation import partition

pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")

TABLE = torch.randn(64, HIDDEN, generator=torch.Generator().manual_seed(7)) / 4


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True)[0]


def ids(num_tokens: int) -> Tensor:
    return torch.arange(num_tokens) * 5 % 64


# ------------------------------------------------------------- several sizes that count tokens


def embed(input_ids: Tensor, positions: Tensor, rotary: Tensor, sizes_only: Tensor) -> tuple[Tensor, ...]:
    x = attend(TABLE[input_ids] @ TABLE.t()[:, :HIDDEN])
    return x.sigmoid(), TABLE[positions] @ TABLE.t(), rotary.sum(0) * 2, torch.arange(sizes_only.shape[0])


def call_embed(pair: Pair, num_tokens: int, num_positions: int | None = None, num_rotary: int | None = None) -> None:
    rotary = ids(3 * (num_rotary or num_tokens)).view(3, -1)
    pair(ids(num_tokens), ids(num_positions or num_tokens), rotary, ids(num_tokens))


@pytest.mark.compat
def test_arguments_that_are_marked_each_on_its_own() -> None:
    pair = Pair(embed, "cpu", dims=(0, 0, 1, 0))
    for num_tokens in (7, 6, 8, 5, 7):
        call_embed(pair, num_tokens)
    (program,) = ppb.programs()
    assert {i.expression for i in program.inputs if i.spec is None} == {program.table.token_count}
    dims = {i.label: i.token_dim for i in program.inputs if i.kind == "per-token"}
    assert dims == {"input_ids": 0, "positions": 0, "rotary": 1}
    assert set(pair.padding.values()) == {"safe"}
    assert ppb.stats().miss_reasons == {"first-call": 2} and ppb.stats().replays == 2 * 4
    # Equal by chance, after all: another graph in which they stay apart.
    for num_positions, num_rotary in [(6, 5), (3, 2)]:
        call_embed(pair, 7, num_positions, num_rotary)
    call_embed(pair, 6)
    assert len(ppb.programs()) == 2


def test_unbacked_arguments_with_the_names_of_per_token_ones() -> None:
    """Dynamo knows no value of theirs, so nothing guards that they agree: each call checks it."""

    def forward(input_ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.ops.kindtest.attention(TABLE[input_ids] @ TABLE[:HIDDEN], TABLE)
        return x + 1, TABLE[positions] @ TABLE[:HIDDEN]

    pair = Pair(forward, "cpu", mark=False, split_ops="+kindtest::*")
    for num_tokens, num_positions in [(7, 7), (6, 6), (8, 8), (5, 4), (3, 1), (5, 5)]:
        given = ids(num_tokens), ids(num_positions)
        for tensor in given:
            torch._dynamo.decorators.mark_unbacked(tensor, 0)
        pair(*given)
    assert len(ppb.programs()) == 1 and set(pair.padding.values()) == {"safe"}
    assert ppb.stats().miss_reasons == {"first-call": 2, "rows-disagree": 2 * 2}
    assert "input_ids, positions have different numbers of rows" in ppb.explain()


def positions_of(buffer: Tensor, num_tokens: int) -> Tensor:
    """The first tokens of positions ``[3, most]``, as engines hold them for images: a slice that is not contiguous."""
    buffer.copy_(torch.randint(64, buffer.shape, generator=torch.Generator().manual_seed(num_tokens)))
    return buffer[:, :num_tokens]


def rotate(input_ids: Tensor, positions: Tensor) -> Tensor:
    return attend(TABLE[input_ids] @ TABLE.t()[:, :HIDDEN]) @ TABLE[:HIDDEN] + TABLE[positions].sum(0)


@pytest.mark.compat
def test_positions_cut_from_a_buffer_whose_stride_is_dynamic() -> None:
    pair = Pair(rotate, "cpu", dims=(0, 1))
    buffer, other = torch.zeros(3, 33, dtype=torch.int64), torch.zeros(3, 65, dtype=torch.int64)
    for num_tokens in (7, 6, 8, 5, 7):
        pair(ids(num_tokens), positions_of(buffer, num_tokens))
    (program,) = ppb.programs()
    found = [(i.label, i.token_dim) for i in program.inputs if i.kind == "per-token"]
    assert found == [("input_ids", 0), ("positions", 1)]
    assert ppb.stats().miss_reasons == {"first-call": 2} and ppb.stats().replays == 2 * 4
    # Where strides do vary, the second graph is for all of them.
    for num_tokens in (5, 6, 5):
        for held in (other, torch.zeros(3, 40 + num_tokens, dtype=torch.int64)):
            pair(ids(num_tokens), positions_of(held, num_tokens))
    assert len(ppb.programs()) == 2


def unguarded(function: Callable[..., Any], *marked: tuple[Tensor, int]) -> Callable[..., Any]:
    """Compiled once, for all calls to come: as vLLM does, which drops all guards."""
    options: dict[str, Any] = {"compiler": "inductor", "graphs": "emulate"}
    options["guard_filter_fn"] = lambda entries: [False] * len(entries)
    compiled = torch.compile(function, backend="pp_piecewise", options=options)
    for tensor, dim in marked:
        torch._dynamo.mark_dynamic(tensor, dim)
    compiled(*(tensor for tensor, _ in marked))
    return compiled


def test_sizes_and_strides_are_checked_where_guards_are_dropped() -> None:
    buffer, other = torch.zeros(3, 33, dtype=torch.int64), torch.zeros(3, 65, dtype=torch.int64)
    compiled = unguarded(rotate, (ids(7), 0), (positions_of(buffer, 7), 1))
    for held, num_tokens in ((buffer, 7), (other, 7), (buffer, 6), (other, 9)):
        given = ids(num_tokens), positions_of(held, num_tokens)
        torch.testing.assert_close(compiled(*given), rotate(*given))
    assert len(ppb.programs()) == 1
    assert ppb.stats().miss_reasons["rows-disagree"] == 2 * 2
    assert "is 65, and 33 in the call that was traced" in " ".join(ppb.explain().split())

    with ppb.expect(miss_reasons={"rows-disagree": 2}), pytest.raises((RuntimeError, IndexError)):
        compiled(ids(7), positions_of(buffer, 5))  # eager's own error


def test_a_size_that_no_compute_piece_takes_is_left_alone() -> None:
    def forward(x: Tensor, lengths: Tensor) -> Tensor:
        return torch.ops.kindtest.attention((x + 1) @ TABLE.t()[:, :HIDDEN], lengths) @ TABLE[:HIDDEN]

    pair = Pair(forward, "cpu", split_ops="+kindtest::*")
    for num_tokens, num_lengths in [(7, 7), (6, 2), (8, 3), (5, 5)]:
        pair(rows(num_tokens, "cpu"), ids(num_lengths) + 1)
    assert len(ppb.programs()) == 1 and ppb.stats().replays == 2 * 3


@torch.library.custom_op("kindtest::attention", mutates_args=())
def attention(x: Tensor, lengths: Tensor) -> Tensor:
    return x.cumsum(0) / lengths.sum()


@attention.register_fake
def _(x: Tensor, lengths: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize("bounds", [(8, 16), (None, 8)])
def test_bounds_that_the_user_gave_are_kept(bounds: tuple[int | None, int | None]) -> None:
    """Where two differ, Dynamo would refuse a guard that makes them one."""

    def forward(x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return attend(x @ TABLE[:HIDDEN]) + 1, TABLE[positions] @ TABLE.t()

    pair = Pair(forward, "cpu", mark=False)
    for num_tokens in (7, 6, 8, 5, 7):
        given = rows(num_tokens, "cpu"), ids(num_tokens)
        for tensor, largest in zip(given, bounds, strict=True):
            torch._dynamo.mark_dynamic(tensor, 0, **({} if largest is None else {"min": 2, "max": largest}))
        pair(*given)
    assert set(ppb.stats().miss_reasons) == {"other-dynamic-dimension" if all(bounds) else "first-call"}


def test_what_lies_in_another_object_may_have_the_token_count_by_chance() -> None:
    def forward(x: Tensor, cache: list[Tensor]) -> Tensor:
        return attend(x @ TABLE[:HIDDEN]) @ TABLE[:HIDDEN] + (cache[0] @ TABLE[:HIDDEN]).sum(0)

    compiled = torch.compile(forward, backend="pp_piecewise", options={"graphs": "emulate", "compiler": "eager"})
    for num_tokens, length in [(7, 7), (6, 8), (6, 6), (5, 9)]:
        x, cache = rows(num_tokens, "cpu"), [rows(length, "cpu", seed=1)]
        for tensor in (x, cache[0]):
            torch._dynamo.mark_dynamic(tensor, 0)
        torch.testing.assert_close(compiled(x, cache), forward(x, cache), rtol=1e-5, atol=1e-5)
    assert len(ppb.programs()) == 1


# ------------------------------------------------------------------------- members of modules


def scaled(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = attend((x @ self.w) * self.context.scale[:, None]) @ self.w
    return x, self.shift[..., None] * self.w[0]


@pytest.mark.parametrize("marks", [False, True])
def test_tensors_that_are_set_on_a_module_before_each_call(marks: bool) -> None:
    """A prefix of one buffer, in an object of the module's, and one with the token count last."""
    members = {"context": SimpleNamespace(scale=None), "shift": None}
    pair, buffer = Pair(net(scaled, "cpu", **members), "cpu", mark=marks), torch.rand(64)
    for num_tokens in (7, 6, 8, 5, 7, 3, 8):
        for module in (pair.function, pair.twin):
            module.context.scale = buffer[:num_tokens]
            module.shift = torch.full((2, num_tokens), 0.5)
            if marks:
                torch._dynamo.mark_dynamic(module.context.scale, 0)
                torch._dynamo.mark_dynamic(module.shift, 1)
        pair(rows(num_tokens, "cpu"))
    found = {i.label: (i.kind, i.reason, i.token_dim) for i in pair.program.inputs if i.label in ("scale", "shift")}
    assert found == {
        "scale": ("per-token", "dimension 0 is the token count", 0),
        "shift": ("per-token", "dimension 1 is the token count", 1),
    }
    assert set(ppb.stats().miss_reasons) == {"first-call"}
    assert set(pair.padding.values()) == {"safe"}


def test_members_of_the_size_of_a_static_graph_stay_where_they_are() -> None:
    pair = Pair(
        net(lambda self, x: attend(x @ self.w) * self.scale[:, None], "cpu", scale=torch.rand(7)), "cpu", mark=False
    )
    for _ in range(3):
        pair(rows(7, "cpu"))
    assert {i.label: i.kind for i in pair.program.inputs} == {"x": "per-token", "w": "parameter", "scale": "parameter"}


# --------------------------------------------------------------------------- no tokens at all


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(20, HIDDEN), (20,)),
        (nn.Conv1d(3, 4, 5, stride=5), (2, 3, 20)),
        (nn.Conv3d(1, 2, (5, 4, 1)), (1, 1, 20, 20, 3)),
    ],
)
def test_a_size_above_max_tokens_that_counts_no_tokens(layer: nn.Module, shape: tuple[int, ...]) -> None:
    pair = Pair(nn.Sequential(layer, nn.ReLU()).eval(), "cpu", mark=False)
    for _ in range(3):
        pair(torch.randn(shape))
    assert ppb.stats().miss_reasons == {"first-call": 1} and ppb.stats().replays == 2
    assert "which may count something else" in pair.program.table.token_reason


# ------------------------------------------------------------------------- memory around an input


def around(x: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Reads more of what it is given a slice of: three rows from the first one on, and what lies before a token."""
    x = attend(torch.tanh(x @ TABLE[:HIDDEN])) + keys.as_strided((3, HIDDEN), (HIDDEN, 1), 0).mean(0)
    return x @ TABLE[:HIDDEN], torch.as_strided(keys, (1, HIDDEN), (HIDDEN, 1), HIDDEN) @ TABLE[:HIDDEN]


@pytest.mark.parametrize("mode", ["auto", "piecewise"])
def test_an_op_that_reaches_around_an_input_runs_between_the_graphs(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured pieces read a copy of a small tensor, of which nothing lies around it."""

    def play() -> Pair:
        pair = Pair(around, "cpu", mode=mode, mark=False)
        make = lambda n: ((rows(n, "cpu", seed=n), rows(5, "cpu", seed=n)[2:4]), {})  # noqa: E731
        ppb.warmup(pair.compiled, make, progress=False)
        for seed in range(4):
            pair(rows(4, "cpu", seed=seed), rows(5, "cpu", seed=seed)[2:4])
        return pair

    pair = play()
    assert ppb.stats().replays and not ppb.stats().graph_misses
    assert "as_strided may reach memory around an input" in " ".join(ppb.explain().split())
    assert pair.program.full is None or not pair.program.full.buckets
    monkeypatch.setattr(partition, "_REACH_BEYOND", frozenset())
    with pytest.raises(Wrong):
        play()


# ------------------------------------------------------------------------------- what is said


def obstacles(pair: Pair) -> dict[str, str]:
    """Of the pieces that are never captured: code -> sentence."""
    return {reason.code: reason.sentence for reason in pair.program.graphs.plan.obstacles.values()}


def test_a_float_that_varies_is_named() -> None:
    """As the bound of a clamp and as a factor; the piece that takes none is captured."""

    def forward(x: Tensor, ceiling: float, factors: dict[str, float]) -> Tensor:
        return attend(x @ TABLE[:HIDDEN]).clamp(max=ceiling).add(x, alpha=factors["gain"]) @ TABLE[:HIDDEN]

    pair = Pair(forward, "cpu")
    for num_tokens, number in [(7, 0.5), (6, 0.7), (8, 0.7), (5, 0.9), (7, 0.9)]:
        pair(rows(num_tokens, "cpu"), number, {"gain": number / 3})
    assert "capture-failed" not in ppb.stats().miss_reasons and ppb.stats().replays > 0
    sentence = obstacles(pair)["float-varies"]
    assert "ceiling, gain varies" in sentence or "gain, ceiling varies" in sentence
    assert "pass it as a tensor" in sentence and sentence.split(":")[0] in " ".join(ppb.explain().split())


@pytest.mark.parametrize(
    ("dim", "second", "said"),
    [
        (0, lambda n: torch.ones(n % 3 + 2, HIDDEN), "dimension 0 of scale varies, next to the token count"),
        (1, lambda n: torch.ones(HIDDEN, n % 3 + 2), "dimension 1 of scale varies, next to the token count"),
    ],
)
def test_what_varies_next_to_the_token_count_is_named(dim: int, second: Any, said: str) -> None:
    def forward(x: Tensor, options: dict[str, Tensor]) -> Tensor:
        return attend(x @ TABLE[:HIDDEN]) @ TABLE[:HIDDEN] + options["scale"].sum()

    pair = Pair(forward, "cpu", dims=(0, None))
    for num_tokens in (7, 6, 8, 5, 7):
        scale = second(num_tokens)
        torch._dynamo.mark_dynamic(scale, dim)
        pair(rows(num_tokens, "cpu"), {"scale": scale})
    sentence = obstacles(pair)["other-dynamic-dimension"]
    assert said in sentence and "torch._dynamo.mark_static" in sentence

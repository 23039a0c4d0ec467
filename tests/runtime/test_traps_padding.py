"""Traps of padding: what padded rows, or the padded number of rows, could do to the real ones.

Each trap is a body that must hold, on the emulated device here and on CUDA where there is one, and must fail once the
rules that defend it are switched off: the table of both is the proof that every rule is needed.
"""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch import Tensor
from torch.nn import functional as F

import pp_piecewise_backend as ppb
from captured import DEVICES, HIDDEN, SIZES, Pair, Trap, Traps, misses_between, net, rows
from pp_piecewise_backend.compilation.inductor import CompiledPiece
from pp_piecewise_backend.debug.describe import describe_graphs
from pp_piecewise_backend.runtime.capture_plan import GraphPlan

pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")


@torch.library.custom_op("traps::attention", mutates_args=())
def attention(x: Tensor) -> Tensor:
    """Mixes rows: each one sees all rows before it, and the mean of all."""
    return torch.tanh(x.cumsum(0) + x.mean(0))


@attention.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("traps::attention_into", mutates_args=("out",))
def attention_into(x: Tensor, out: Tensor) -> None:
    out.copy_(torch.tanh(x.cumsum(0) + x.mean(0)))


@attention_into.register_fake
def _(x: Tensor, out: Tensor) -> None:
    return None


@torch.library.custom_op("traps::attention_of_length", mutates_args=())
def attention_of_length(x: Tensor, num_tokens: int, last: int) -> Tensor:
    """As engines call it: with integers that the host computed from the number of tokens."""
    return torch.tanh(x.cumsum(0) / num_tokens + x[last])


@attention_of_length.register_fake
def _(x: Tensor, num_tokens: int, last: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("traps::kernel", mutates_args=())
def kernel(x: Tensor) -> Tensor:
    """A kernel that trusts the strides with which it was compiled: it reads memory, not indices."""
    shape, stride = x.shape, torch.empty(x.shape, device="meta").stride()
    return torch.tanh(x.as_strided(shape, stride)).contiguous()


@kernel.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("traps_opaque::sum_of_rows", mutates_args=())
def sum_of_rows(x: Tensor) -> Tensor:
    """As ``x.sum(0, keepdim=True).expand_as(x)``, but no graph shows it."""
    return x.sum(0, keepdim=True).repeat(x.shape[0], 1)


@sum_of_rows.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


TRAPS = Traps()
trap = TRAPS.trap


# ------------------------------------------------------------------------------ rows that mix


@trap("R3", "mixing")
def last_row_gather(device: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.ops.traps.attention(x @ self.w)
        return (x @ self.w)[-1] @ self.w

    Pair(net(forward, device), device).run_sizes(lambda n: (rows(n, device),), unsafe={2: "tokens mix in getitem"})


@trap("R3", "R4", "mixing")
def last_row_by_number(device: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.ops.traps.attention(x @ self.w)
        return (x @ self.w)[x.shape[0] - 1] @ self.w

    Pair(net(forward, device), device).run_sizes(lambda n: (rows(n, device),), unsafe={2: "R4"})


@trap("R3", "mixing")
def mean_over_tokens(device: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.ops.traps.attention(x @ self.w) @ self.w
        return (x - x.mean(0)) @ self.w

    Pair(net(forward, device), device).run_sizes(lambda n: (rows(n, device),), unsafe={2: "tokens mix in mean"})


@trap("R3", "mixing")
def sort_over_tokens(device: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.ops.traps.attention(x @ self.w) @ self.w
        return x.sort(dim=0).values @ self.w

    Pair(net(forward, device), device).run_sizes(lambda n: (rows(n, device),), unsafe={2: "sort"})


@trap("R3", "mixing")
def routing_with_capacity(device: str) -> None:
    """Each expert takes the two tokens that like it best."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.ops.traps.attention(x @ self.w)
        scores = x @ self.w
        taken = scores.softmax(-1).topk(2, dim=0)
        kept = torch.zeros_like(scores).scatter(0, taken.indices, taken.values)
        return (kept @ self.w) + x

    Pair(net(forward, device), device).run_sizes(lambda n: (rows(n, device),), unsafe={2: "topk"})


@trap("mixing")
def selection_that_the_test_cannot_see(device: str) -> None:
    """No token of the tested batches is flagged, so poison finds nothing; later ones are."""

    def forward(self: Any, x: Tensor, ids: Tensor) -> Tensor:
        x = torch.ops.traps.attention(x @ self.w) @ self.w
        x = x + ids[:, None]
        flagged = (ids == 99).float().topk(2, dim=0).values.sum()
        return x @ self.w * (1 + flagged)

    pair = Pair(net(forward, device), device)
    ids = torch.zeros(5, dtype=torch.int64, device=device)
    ids[0] = 99
    pair.run_sizes(
        lambda n: (rows(n, device), torch.arange(n, device=device)),
        unsafe={2: "topk"},
        then=[(5, (rows(5, device), ids))],
    )


@trap("R3")
def one_padded_nan_times_zero(device: str) -> None:
    """Finite padded rows are harmless here; a row of NaN from an earlier call is not."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.ops.traps.kernel(x @ self.w) @ self.w
        return x + torch.ops.traps_opaque.sum_of_rows(x * 0)

    pair = Pair(net(forward, device), device, row_wise_ops="traps_opaque::*")
    poisoned = rows(8, device)
    poisoned[7] = float("nan")
    pair.run_sizes(lambda n: (rows(n, device),), unsafe={2: "R3"}, then=[(8, (poisoned,)), (5, (rows(5, device),))])


@trap("R3")
def gate_that_is_zero_in_the_first_layer_only(device: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        for gate in self.gates:
            x = torch.ops.traps.attention(x @ self.w)
            x = x @ self.w
            x = torch.where(gate > 0, x + gate * torch.ops.traps_opaque.sum_of_rows(x), x)
        return x @ self.w

    gates = torch.nn.ParameterList(torch.nn.Parameter(torch.tensor([g]), requires_grad=False) for g in (0.0, 0.0, 1.0))
    pair = Pair(net(forward, device, gates=gates), device, row_wise_ops="traps_opaque::*")
    pair.run_sizes(lambda n: (rows(n, device),), unsafe={6: "R3"})
    assert pair.program.pieces[2].key == pair.program.pieces[4].key


@trap("R3", "M1", "R2", "mixing")
def batch_statistics_in_training_mode(device: str) -> None:
    """Running statistics outlive the call, and neither schema nor version tells that they are written."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.ops.traps.attention(x @ self.w) @ self.w
        return F.batch_norm(x, self.mean, self.var, training=True) @ self.w

    model = net(forward, device)
    model.register_buffer("mean", torch.zeros(HIDDEN, device=device))
    model.register_buffer("var", torch.ones(HIDDEN, device=device))
    pair = Pair(model, device)
    pair.run_sizes(lambda n: (rows(n, device),))
    eager = [piece.reason for piece in pair.program.pieces if piece.kind == "eager"]
    assert any("batch_norm writes graph input mean" in reason for reason in eager), eager


@trap("mixing")
def rows_of_integers_that_are_all_alike_when_tested(device: str) -> None:
    """As in a warm-up with zeros: padded rows are then rows like all others, and poison finds nothing."""

    def forward(self: Any, ids: Tensor) -> Tensor:
        embedded = self.table[ids]
        x = (embedded - embedded.mean(0)) @ self.w
        return torch.ops.traps.attention(x) @ self.w

    table = torch.nn.Parameter(rows(16, device), requires_grad=False)
    pair = Pair(net(forward, device, table=table), device)
    pair.run_sizes(
        lambda n: (torch.zeros(n, dtype=torch.int64, device=device),),
        unsafe={0: "tokens mix in mean"},
        then=[(6, (torch.arange(6, device=device),))],
    )


@trap("R3", "mixing")
def batch_statistics_without_running_ones(device: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.ops.traps.attention(x @ self.w) @ self.w
        return F.batch_norm(x, None, None, training=True) @ self.w

    Pair(net(forward, device), device).run_sizes(lambda n: (rows(n, device),), unsafe={2: "tokens mix in batch_norm"})


# ------------------------------------------------------------------- the number of tokens as a value


@trap("R3", "R4")
def division_by_the_token_count(device: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.ops.traps.attention(x @ self.w) @ self.w
        return x / x.shape[0]

    Pair(net(forward, device), device).run_sizes(lambda n: (rows(n, device),), unsafe={2: "R4"})


@trap("R4")
def token_count_that_the_test_cannot_see(device: str) -> None:
    """4 and 8 leave the same remainder, and these are the sizes that are tested."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.ops.traps.attention(x @ self.w) @ self.w
        return x * (1 + x.shape[0] % 4)

    Pair(net(forward, device), device).run_sizes(lambda n: (rows(n, device),), unsafe={2: "R4"})


@trap("R3", "R4")
def mask_built_from_the_token_count(device: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.ops.traps.attention(x @ self.w) @ self.w
        n = x.shape[0]
        mask = torch.arange(n, device=x.device) < n - 2
        return torch.where(mask[:, None], x, -x) @ self.w

    Pair(net(forward, device), device).run_sizes(lambda n: (rows(n, device),), unsafe={2: "R4"})


@trap("rows")
def integers_of_the_token_count_in_attention_arguments(device: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = x @ self.w
        x = torch.ops.traps.attention_of_length(x, x.shape[0], x.shape[0] - 1)
        x = x @ self.w
        return torch.ops.traps.attention_of_length(x, x.size(0) * 2, x.shape[0] // 2) @ self.w

    Pair(net(forward, device), device).run_sizes(lambda n: (rows(n, device),))


@torch.library.custom_op("traps_few::few", mutates_args=())
def few(x: Tensor) -> Tensor:
    """A kernel that takes another way for few rows, which mixes rows."""
    return x + x.sum(0) if x.shape[0] <= 4 else x.clone()


@few.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_later_bucket_shows_holds_for_those_before_it(device: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.ops.traps_few.few(torch.ops.traps.attention(x @ self.w)) @ self.w

    pair = Pair(net(forward, device), device, capture_sizes="4,16", max_tokens=16, row_wise_ops="traps_few::few")
    with ppb.expect(miss_reasons={"first-call": 2}):
        for num_tokens in (15, 15, 15):
            pair(rows(num_tokens, device))
    with ppb.expect(miss_reasons={"first-call": 2, "padding-unsafe": 3}):
        for num_tokens in (3, 3, 3, 15):  # the last one replayed padded before
            pair(rows(num_tokens, device))
    assert "R3" in pair.padding[2]


@pytest.mark.parametrize("device", DEVICES)
def test_indices_made_from_floats_meet_no_poison(device: str) -> None:
    """NaN and huge values are indices out of range; on a GPU one of them ends all work of the process."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.ops.traps.attention(x @ self.w) @ self.w
        return self.table[(x[:, 0].sigmoid() * 15).long()] + x

    table = torch.nn.Parameter(rows(16, device), requires_grad=False)
    pair = Pair(net(forward, device, table=table), device)
    pair.run_sizes(lambda n: (rows(n, device),), unsafe={2: "getitem index by them"})


@torch.library.custom_op("traps_opaque::finite", mutates_args=())
def finite(x: Tensor) -> Tensor:
    if not torch.isfinite(x).all():
        raise ValueError("got a row that is not finite")
    return x.clone()


@finite.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize("graphs", ["emulate", "off"])
def test_a_kernel_that_takes_no_poison_is_not_padded(graphs: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.ops.traps.attention(x @ self.w) @ self.w
        return torch.ops.traps_opaque.finite(x) @ self.w

    pair = Pair(net(forward, "cpu"), "cpu", graphs=graphs, row_wise_ops="traps_opaque::*")
    for num_tokens in SIZES:
        pair(rows(num_tokens, "cpu"))
    if graphs == "emulate":
        assert "R3: it fails with nan in the padded rows (ValueError: got a row" in pair.padding[2]


# ----------------------------------------------------------------------------------- geometry


@trap("R1", "R3", "mixing")
def four_rows_per_token(device: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.ops.traps.attention(x @ self.w) @ self.w
        wide = torch.cat([x, -x, 2 * x, x + 1])
        return torch.ops.traps.attention(wide)[: x.shape[0]] @ self.w

    Pair(net(forward, device), device).run_sizes(lambda n: (rows(n, device),), unsafe={2: "R1", 4: "R1"})


@trap("R1", "R3", "mixing")
def flattened_heads_and_tokens(device: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.ops.traps.attention(x @ self.w) @ self.w
        heads = x.view(-1, 2, HIDDEN // 2).transpose(0, 1).reshape(-1, HIDDEN // 2)
        heads = torch.ops.traps.attention(heads)
        return heads.view(2, -1, HIDDEN // 2).transpose(0, 1).reshape(-1, HIDDEN) @ self.w

    Pair(net(forward, device), device).run_sizes(lambda n: (rows(n, device),), unsafe={2: "R1", 4: "R1"})


@trap("R5")
def three_by_tokens(device: str) -> None:
    """Positions of multimodal models, and a result of that layout: the tokens are not outermost in memory."""

    def forward(self: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = torch.outer(self.w[0, :3], (x @ self.w)[:, 0]) * positions
        seen = torch.ops.traps.kernel(angles)
        x = torch.ops.traps.attention(x @ self.w)
        return x @ self.w + seen.sum(0)[:, None], angles + 1

    def make(n: int) -> tuple[Tensor, Tensor]:
        return rows(n, device), torch.arange(3 * n, device=device).view(3, n)

    pair = Pair(net(forward, device), device, dims=(0, 1))
    pair.run_sizes(make)
    assert ppb.stats().border_copies > 0


@trap("R5")
def heads_before_tokens(device: str) -> None:
    """``[1, heads, tokens, d]``, contiguous so."""

    def forward(self: Any, x: Tensor) -> Tensor:
        q = (x @ self.w).view(1, -1, 2, HIDDEN // 2).transpose(1, 2).contiguous()
        seen = torch.ops.traps.kernel(q)
        return seen.transpose(1, 2).reshape(-1, HIDDEN) @ self.w

    pair = Pair(net(forward, device), device)
    pair.run_sizes(lambda n: (rows(n, device),))
    assert ppb.stats().border_copies > 0


# --------------------------------------------------------------------------------- sizes and compiled code


@trap("R6")
def guard_that_the_bucket_breaks(device: str) -> None:
    """Compiling added a condition on the token count: it holds for the real rows, not for the bucket."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.ops.traps.attention(x @ self.w) @ self.w

    pair = Pair(net(forward, device), device)
    pair(rows(7, device))
    (first, *_) = (i for i in pair.program.layout.instructions if i.piece.kind == "compute")
    compiled, symbol = first.call, pair.program.graphs.plan.token_symbol

    def right_up_to_seven(*arguments: Any) -> Any:
        outputs = compiled(*arguments)
        return [output * 0 for output in outputs] if outputs[0].shape[0] > 7 else outputs

    at = [k for k, spec in enumerate(first.piece.input_specs) if type(spec).__name__ == "SymbolSpec"]
    first.call = right_up_to_seven
    first.compiled = CompiledPiece((), right_up_to_seven, (sympy.Le(sympy.Symbol("s0"), 7),), 0.0)
    first.symbol_positions = tuple(at)
    assert symbol is not None and at
    for num_tokens in (6, 8, 5, 7):
        pair(rows(num_tokens, device))
    assert ppb.stats().miss_reasons == {"first-call": 2, "guard": 4}
    assert ppb.stats().replays == 4
    (reason,) = describe_graphs(pair.program).buckets[0].not_captured.values()
    assert "does not hold" in reason
    assert pair.program.plain_runs == {0: "the compiled code does not hold for sizes [8]"}


@trap("rows")
def token_counts_around_every_bucket(device: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.ops.traps.attention(x @ self.w) @ self.w

    pair = Pair(net(forward, device), device)
    counts = [2, 3, 5, 8, 1, 9]  # one in each bucket, then one above all
    for _ in range(2):
        for num_tokens in counts:
            pair(rows(num_tokens, device))
    before = ppb.stats()
    around = sorted({n for bucket in (1, 2, 4, 8) for n in (bucket - 1, bucket, bucket + 1)} - {0})
    for num_tokens in (*around, *reversed(around)):
        pair(rows(num_tokens, device))
    assert around == [1, 2, 3, 4, 5, 7, 8, 9]
    assert misses_between(before, ppb.stats()) == {"over-max": 2 * 2}
    assert ppb.stats().replays - before.replays == 2 * 2 * (len(around) - 1)
    assert ppb.stats().captures == before.captures
    assert ppb.stats().padded_tokens - before.padded_tokens == 2 * (1 + 3 + 1)  # 3 in 4; 5 and 7 in 8


def squeeze_all_into_the_largest_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphPlan, "bucket", lambda plan, num_tokens: plan.ladder.bucket(min(num_tokens, 8)))


@trap(breaks=squeeze_all_into_the_largest_bucket)
def more_tokens_than_the_largest_bucket(device: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.ops.traps.attention(x @ self.w) @ self.w

    pair = Pair(net(forward, device), device)
    for num_tokens in (8, 8, 9, 12, 7):
        pair(rows(num_tokens, device))
    assert ppb.stats().miss_reasons == {"first-call": 2, "over-max": 2 * 2}


@trap("R2", "mixing")
def marks_that_the_test_cannot_see(device: str) -> None:
    """Captured whole, it writes as many marks as there are rows; while it was tested, all were set already."""

    def forward(self: Any, x: Tensor, marks: Tensor) -> Tensor:
        marks.narrow(0, 0, x.shape[0]).fill_(1.0)
        return torch.tanh(x @ self.w) @ self.w

    marks = torch.ones(16, HIDDEN, device=device)
    pair = Pair(net(forward, device), device, dims=(0, None), mode="full")
    for num_tokens in (8, 8, 7):
        pair(rows(num_tokens, device), marks)
    marks.zero_()
    pair(rows(5, device), marks)
    assert "R2" in pair.padding[0]


@trap("rows")
def nan_in_the_padded_rows(device: str) -> None:
    """Whatever lies behind the real rows of all static memory."""

    def forward(self: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.ops.traps.attention(x @ self.w) @ self.w
        return x

    pair = Pair(net(forward, device), device)
    pair.run_sizes(lambda n: (rows(n, device),))
    (bucket, _), *_ = pair.program.graphs.buckets
    for num_tokens in (5, 6, 7):
        for static in bucket.static.values():
            static.tensor.fill_(float("nan"))
        pair(rows(num_tokens, device))


# ----------------------------------------------------------------------- memory without contents


@trap("uninitialised", counters_only=True)
def uninitialised_attention_output(device: str) -> None:
    """Attention fills a buffer that the graph made: static memory, so nothing is copied to the next piece."""

    def forward(self: Any, x: Tensor) -> Tensor:
        q = x @ self.w
        out = torch.empty_like(q)
        torch.ops.traps.attention_into(q, out)
        return out @ self.w

    # One copy for each of three replays behind the capture, of the argument; none of what attention gave.
    Pair(net(forward, device), device).run_sizes(lambda n: (rows(n, device),), input_copies=3)


@trap("tail", ends_cuda=True)
def indices_in_the_padded_rows(device: str) -> None:
    """What an earlier call left there may index nothing; a row of the same batch always does."""

    def forward(self: Any, x: Tensor, ids: Tensor, first: Tensor) -> Tensor:
        x = torch.ops.traps.kernel(x @ self.w)
        return self.table[first + ids] + x @ self.w

    def make(n: int) -> tuple[Tensor, Tensor, Tensor]:
        first = 0 if n == 8 else 40
        ids = torch.arange(64 - n - first, 64 - first, device=device)
        return rows(n, device), ids, torch.tensor(first, device=device)

    pair = Pair(net(forward, device, table=torch.randn(64, HIDDEN, device=device)), device, dims=(0, 0, None))
    pair.run_sizes(make)


@trap("random")
def dropout(device: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.ops.traps.attention(x @ self.w)
        return F.dropout(x @ self.w, 0.5, training=True) @ self.w

    pair = Pair(net(forward, device), device)
    before = ppb.stats()
    for n in (7, 6, 8, 5):
        pair(rows(n, device))
    assert ppb.stats().replays - before.replays == 3
    assert ppb.stats().miss_reasons == {"first-call": 1, "random": 4}
    assert "draws random numbers" in pair.padding[2]


# ----------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("trap", TRAPS, ids=str)
def test_trap(trap: Trap, device: str) -> None:
    trap.body(device)


@pytest.mark.parametrize("trap", TRAPS.closing())
def test_trap_closes_without_its_rules(trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    # Emulated only: on a GPU, what a stale address gives is undefined and may end the process.
    trap.must_close("cpu", monkeypatch)

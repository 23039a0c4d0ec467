"""Which ops the graph is cut at: every spelling of attention, the user's own names, and the reports on misses."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, fx, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import pp_piecewise_backend as ppb
from against_eager import check, compute_ops, eager_ops, steps, tokens
from pp_piecewise_backend.compilation.attention import SplitOpMatcher, looks_like_attention
from pp_piecewise_backend.config import SplitOps

WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
WIDE = torch.randn(32, 32, generator=torch.Generator().manual_seed(2))


pytestmark = pytest.mark.usefixtures("no_gradients")


def heads(x: Tensor, width: int = 4) -> Tensor:
    return x.view(1, -1, 2, width).transpose(1, 2)


# ------------------------------------------------------------------------------------ PyTorch's attention


def as_function(q: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, q, q)


def as_builtin(q: Tensor) -> Tensor:
    return torch._C._nn.scaled_dot_product_attention(q, q, q, is_causal=True)


def as_packet(q: Tensor) -> Tensor:
    return torch.ops.aten.scaled_dot_product_attention(q, q, q)


def as_overload(q: Tensor) -> Tensor:
    return torch.ops.aten.scaled_dot_product_attention.default(q, q, q)


def as_cpu_kernel(q: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0]


def as_math(q: Tensor) -> Tensor:
    return torch._scaled_dot_product_attention_math(q, q, q)[0]


def with_mask_and_groups(q: Tensor) -> Tensor:
    size = q.shape[2]
    mask = torch.ones(size, size, dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, q[:, :1], q[:, :1], attn_mask=mask, enable_gqa=True)


SPELLINGS = [as_function, as_builtin, as_packet, as_overload, as_cpu_kernel, as_math, with_mask_and_groups]


@pytest.mark.compat
@pytest.mark.parametrize("attention", SPELLINGS, ids=lambda f: f.__name__)
def test_every_spelling_of_sdpa(attention: Any) -> None:
    def layer(x: Tensor) -> Tensor:
        return attention(heads(x @ WEIGHT)).transpose(1, 2).reshape(-1, 8) @ WEIGHT

    program = check(layer, *tokens(5, 9, 1))
    assert steps(program) == "cec"
    (name,) = eager_ops(program)
    assert "scaled_dot_product" in name
    assert f"split op {name}" in program.pieces[1].reason


class SelfAttention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.output = nn.Linear(8, 8)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.output(x)[None]
        attended, weights = self.attention(x, x, x, need_weights=self.need_weights)
        return self.output(attended[0]), weights


@pytest.mark.parametrize("need_weights", [False, True], ids=["output-only", "with-weights"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_multihead_attention_module(need_weights: bool, training: bool) -> None:
    """In eval mode eager takes a fused kernel that Dynamo does not, so the last bit may differ."""
    program = check(SelfAttention(need_weights).train(training), *tokens(5, 9), tolerance=1e-6, exact_strides=False)
    assert any("multi_head_attention" in name for name in eager_ops(program))


class EncoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[None])[0]


@pytest.mark.parametrize("training", [False, True], ids=["fast-path", "train"])
def test_encoder_layer(training: bool) -> None:
    """The fast path is one op with the attention inside."""
    program = check(EncoderLayer().train(training), *tokens(5, 9), tolerance=1e-6, exact_strides=False)
    assert any(
        name in ("_transformer_encoder_layer_fwd", "multi_head_attention_forward") for name in eager_ops(program)
    )


# ----------------------------------------------------------------------------- attention with sinks


def sinks_as_in_gpt_oss(q: Tensor) -> Tensor:
    scores = torch.matmul(q, q.transpose(2, 3)) * 0.5
    scores = scores + torch.full((q.shape[2], q.shape[2]), -1e9).triu(1)
    sinks = SINKS.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    scores = torch.cat([scores, sinks], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return torch.matmul(F.softmax(scores, dim=-1, dtype=scores.dtype)[..., :-1].to(q.dtype), q)


def sinks_in_front(q: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, q)
    scores = torch.cat([SINKS.view(1, 2, 1, 1).expand(*scores.shape[:3], 1), scores], -1).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", scores.narrow(-1, 1, scores.shape[-1] - 1), q)


SINKS = torch.tensor([0.5, -1.0])


@pytest.mark.parametrize("attention", [sinks_as_in_gpt_oss, sinks_in_front])
def test_attention_with_sinks_is_one_step(attention: Any) -> None:
    def layer(x: Tensor) -> Tensor:
        return attention(heads(x @ WEIGHT)).transpose(1, 2).reshape(-1, 8) @ WEIGHT

    program = check(layer, *tokens(5, 9), tolerance=1e-6)
    assert steps(program) == "cec"
    assert "softmax" not in compute_ops(program) and {"cat", "softmax"} <= set(eager_ops(program))


def test_gpt_oss() -> None:
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"), 32)
    counts = dict(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    config = transformers.GptOssConfig(**sizes, **counts, head_dim=8, pad_token_id=0, attn_implementation="eager")
    model = transformers.GptOssModel(config).eval()
    program = check(lambda ids: model(ids[None], use_cache=False)[0], (torch.arange(3, 9),))
    ops = program.pieces[1].ops  # in some versions of PyTorch, the experts' product is an eager step too
    assert steps(program).startswith("cec") and ops.count("matmul") == 2 and {"cat", "softmax"} <= set(ops)
    assert "softmax" in compute_ops(program)  # the router's


# ---------------------------------------------------------------------------------------- FlexAttention


def flex_plain(q: Tensor, bias: Tensor) -> Tensor:
    return flex_attention(q, q, q)


def flex_score_mod(q: Tensor, bias: Tensor) -> Tensor:
    return flex_attention(q, q, q, score_mod=lambda score, b, h, i, j: score + (i - j))


def flex_captured_tensor(q: Tensor, bias: Tensor) -> Tensor:
    doubled = bias * 2
    return flex_attention(q, q, q, score_mod=lambda score, b, h, i, j: score + doubled[h])


def flex_captured_and_written(q: Tensor, bias: Tensor) -> Tensor:
    bias.add_(1)
    first = flex_attention(q, q, q, score_mod=lambda score, b, h, i, j: score + bias[h])
    bias.mul_(2)
    return first + flex_attention(q, q, q, score_mod=lambda score, b, h, i, j: score + bias[h])


def flex_mask_made_inside(q: Tensor, bias: Tensor) -> Tensor:
    size = q.shape[2]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, size, size, device="cpu")
    return flex_attention(q, q, q, block_mask=mask)


FLEX = [flex_plain, flex_score_mod, flex_captured_tensor, flex_captured_and_written, flex_mask_made_inside]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("attention", FLEX, ids=lambda f: f.__name__)
def test_flex_attention(attention: Any) -> None:
    def layer(x: Tensor, bias: Tensor) -> Tensor:
        return attention(heads(x @ WIDE, 16), bias).transpose(1, 2).reshape(-1, 32) @ WIDE

    calls = [(torch.randn(size, 32), torch.randn(2)) for size in (128, 256)]
    program = check(layer, *calls, tolerance=1e-5)
    assert "flex_attention" in eager_ops(program)
    assert "flex_attention" not in compute_ops(program)
    assert compute_ops(program)[0] == "matmul"
    assert compute_ops(program)[-1] == "matmul"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_with_a_mask_from_outside() -> None:
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 128, 128, device="cpu")

    def layer(x: Tensor) -> Tensor:
        return flex_attention(heads(x @ WIDE, 16), *[heads(x @ WIDE, 16)] * 2, block_mask=mask)

    program = check(layer, *tokens(128, width=32), tolerance=1e-5, mark=False)
    assert "flex_attention" in eager_ops(program)


# ----------------------------------------------------------------------------------- stand-ins by name

_LIBRARIES: list[torch.library.Library] = []
TWO_RESULTS = "(Tensor q) -> (Tensor, Tensor)"
ONE_RESULT = "(Tensor q) -> Tensor"
WITH_OUTPUT = "(Tensor q, Tensor(a!) out, str layer) -> ()"
STAND_INS = {
    "flash_attn::_flash_attn_forward": TWO_RESULTS,
    "flash_attn::_flash_attn_varlen_forward": TWO_RESULTS,
    "flash_attn_3::fwd": ONE_RESULT,
    "xformers::efficient_attention_forward_cutlass": ONE_RESULT,
    "xformers_flash::flash_fwd": ONE_RESULT,
    "flashinfer::single_prefill_with_kv_cache": ONE_RESULT,
    "flashinfer::batch_decode_with_paged_kv_cache_run": ONE_RESULT,
    "flashinfer::batch_mla_run": ONE_RESULT,
    "vllm::unified_attention": ONE_RESULT,
    "vllm::unified_attention_with_output": WITH_OUTPUT,
    "vllm::unified_mla_attention": ONE_RESULT,
    "vllm::unified_mla_attention_with_output": WITH_OUTPUT,
    "sglang::unified_attention_with_output": WITH_OUTPUT,
}


def _define(name: str, schema: str) -> None:
    """Register a stand-in for an op of a library that is not installed; in a process that has it, this fails."""
    namespace, op = name.split("::")
    library = torch.library.Library(namespace, "FRAGMENT")
    _LIBRARIES.append(library)
    library.define(op + schema)

    def two_results(q: Tensor) -> tuple[Tensor, Tensor]:
        return q.softmax(-1), q.sum(-1)

    def one_result(q: Tensor) -> Tensor:
        return q.softmax(-1)

    def with_output(q: Tensor, out: Tensor, layer: str) -> None:
        out.copy_(q.softmax(-1))

    function = {TWO_RESULTS: two_results, ONE_RESULT: one_result, WITH_OUTPUT: with_output}[schema]
    library.impl(op, function, "CPU")
    torch.library.register_fake(name, function, lib=library)


@pytest.fixture(scope="module", autouse=True)
def _stand_ins() -> None:
    for name, schema in STAND_INS.items():
        _define(name, schema)


@pytest.mark.parametrize("as_default", [False, True], ids=["packet", "overload"])
@pytest.mark.parametrize("name", STAND_INS)
def test_ops_of_attention_libraries(name: str, as_default: bool) -> None:
    namespace, op_name = name.split("::")
    op = getattr(getattr(torch.ops, namespace), op_name)
    op = op.default if as_default else op
    schema = STAND_INS[name]

    def layer(x: Tensor) -> Tensor:
        y = x @ WEIGHT
        if schema == WITH_OUTPUT:
            out = torch.empty_like(y)
            op(y, out, "layer.0")
        else:
            out = op(y) if schema == ONE_RESULT else op(y)[0]
        return out @ WEIGHT

    program = check(layer, *tokens(5, 9))
    assert steps(program) == "cec"
    assert name in eager_ops(program)
    assert f"split op {name}" in program.pieces[1].reason
    assert ppb.stats().unmatched_split_ops == 0


def test_an_output_buffer_is_born_in_the_step_that_fills_it() -> None:
    op = torch.ops.vllm.unified_attention_with_output

    def layer(x: Tensor) -> Tensor:
        y = x @ WEIGHT
        out = torch.empty_like(y).view(-1, 2, 4)
        op(y, out.view(-1, 8), "layer.0")
        return out.view(-1, 8) @ WEIGHT

    program = check(layer, *tokens(5, 9, 1))
    assert steps(program) == "cec"
    assert "empty_like" in eager_ops(program)


def test_ordinary_ops_of_the_same_libraries_are_not_split() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    names = []
    for name in ("vllm::rms_norm", "flashinfer::rmsnorm", "xformers::rope"):
        _define(name, ONE_RESULT)
        namespace, op = name.split("::")
        names.append(graph.call_function(getattr(getattr(torch.ops, namespace), op).default, (x,)))
    matcher = SplitOpMatcher.from_config(SplitOps())
    assert [matcher.match(node) for node in names] == [None] * 3
    assert not any(looks_like_attention(node) for node in names)


@pytest.mark.parametrize("name", ["_varlen_attn", "_varlen_attn_out"])
def test_variable_length_attention(name: str) -> None:
    """It has no CPU kernel, so only the name can be looked at."""
    pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no torch.nn.attention.varlen")
    op = getattr(torch.ops.torch_attn, name, None)
    if op is None:
        pytest.skip(f"this torch has no torch_attn::{name}")
    graph = fx.Graph()
    matcher = SplitOpMatcher.from_config(SplitOps())
    for target in (op, op.default):
        assert matcher.match(graph.call_function(target)) is not None


# ----------------------------------------------------------------------------------- the user's own names


@torch.library.custom_op("test_split_ops::attend", mutates_args=())
def attend(q: Tensor, scale: float = 2.0) -> Tensor:
    return q * scale


@attend.register_fake
def _(q: Tensor, scale: float = 2.0) -> Tensor:
    return torch.empty_like(q)


@torch.compiler.allow_in_graph
def running_product(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).cumsum(0)


def layer_with_definition(x: Tensor) -> Tensor:
    return attend(x @ WEIGHT, scale=3.0) @ WEIGHT


def layer_with_packet(x: Tensor) -> Tensor:
    return torch.ops.test_split_ops.attend(x @ WEIGHT) @ WEIGHT


def layer_with_method(x: Tensor) -> Tensor:
    return (x @ WEIGHT).softmax(-1) @ WEIGHT


def layer_with_function(x: Tensor) -> Tensor:
    return F.softmax(x @ WEIGHT, -1) @ WEIGHT


def layer_with_python_function(x: Tensor) -> Tensor:
    return running_product(x @ WEIGHT, x) @ WEIGHT


@pytest.mark.parametrize(
    ("layer", "split_ops"),
    [
        (layer_with_definition, "test_split_ops::attend"),
        (layer_with_definition, "attend"),
        (layer_with_definition, "test_split_ops::*"),
        (layer_with_definition, "torch.ops.test_split_ops.attend"),
        (layer_with_packet, "test_split_ops.attend"),
        (layer_with_packet, "+relu*,attend"),
        (layer_with_method, "Tensor.softmax"),
        (layer_with_method, "+softmax"),
        (layer_with_function, "torch.nn.functional.softmax"),
        (layer_with_function, "soft[lm]ax"),
        (layer_with_python_function, "+running_product"),
        (layer_with_python_function, "*.running_product"),
    ],
)
@pytest.mark.filterwarnings("ignore::pp_piecewise_backend.errors.PPPiecewiseWarning")
def test_names_and_globs(layer: Any, split_ops: str) -> None:
    assert steps(check(layer, *tokens(5, 9), split_ops=split_ops)) == "cec"


def layer_with_both(x: Tensor) -> Tensor:
    return as_function(heads((x @ WEIGHT).softmax(-1) @ WEIGHT)).transpose(1, 2).reshape(-1, 8) @ WEIGHT


@pytest.mark.parametrize(("split_ops", "expected"), [("softmax", "cec"), ("+softmax", "cecec"), (None, "cec")])
def test_names_replace_or_extend_the_built_in_list(split_ops: str | None, expected: str) -> None:
    program = check(layer_with_both, *tokens(5), split_ops=split_ops)
    assert steps(program) == expected
    assert ("softmax" in eager_ops(program)) == (split_ops is not None)
    assert ("scaled_dot_product_attention" in compute_ops(program)) == (split_ops == "softmax")


def test_an_unmatched_name_is_reported_with_what_looks_like_attention() -> None:
    with pytest.warns(ppb.errors.PPPiecewiseWarning, match=r"'no::such_op'.*test_split_ops::attention_like") as caught:
        _define("test_split_ops::attention_like", ONE_RESULT)
        op = torch.ops.test_split_ops.attention_like
        check(lambda x: op((x @ WEIGHT).softmax(-1)), *tokens(5), split_ops="no::such_op,softmax")
    assert len(caught) == 1
    assert ppb.stats().unmatched_split_ops == 1


def test_an_unmatched_name_is_an_error_under_strict() -> None:
    compiled = torch.compile(
        layer_with_method, backend="pp_piecewise", options={"strict": True, "split_ops": "+no::such_op"}
    )
    with pytest.raises(Exception, match="no::such_op") as caught:
        compiled(torch.randn(5, 8))
    assert isinstance(caught.value.__cause__ or getattr(caught.value, "inner_exception", caught.value), Exception)
    assert "UnmatchedName" in repr(getattr(caught.value, "inner_exception", caught.value))


def test_a_matched_name_is_not_reported() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ppb.errors.PPPiecewiseWarning)
        check(layer_with_method, *tokens(5), split_ops="+softmax")


@pytest.mark.parametrize("split_ops", [SplitOps(), SplitOps(("a", "b")), SplitOps(("a",), extends_builtin=False)])
def test_required_names_are_the_users_own(split_ops: SplitOps) -> None:
    assert SplitOpMatcher.from_config(split_ops).required == split_ops.patterns

"""Small functions of rows of tokens, in which rows mix or stay apart: over 200 ops and chains of views.

Each is ``f(x, y, i, t, d)``: ``x`` and ``y`` are floats with a token dimension ``t`` and a feature dimension ``d`` of
``FEATURES``, ``i`` is one integer below ``FEATURES`` for each token. ``n`` rows in give what eager gives; which of
them mix is not said here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

FEATURES = 8
WEIGHT = torch.randn(FEATURES, FEATURES, generator=torch.Generator().manual_seed(1))
KERNEL = WEIGHT[:, :, None].repeat(1, 1, 3)
TABLE = torch.randn(64, FEATURES, generator=torch.Generator().manual_seed(2))
VECTOR = torch.rand(FEATURES, generator=torch.Generator().manual_seed(3)) + 0.5

Function = Callable[[Tensor, Tensor, Tensor, int, int], Any]

PROGRAMS: dict[str, Function] = {}


def _methods(names: str, make: Callable[[str], Function]) -> None:
    PROGRAMS.update({name: make(name) for name in names.split()})


def _unary(name: str) -> Function:
    return lambda x, y, i, t, d: getattr(x.abs() + 0.1, name)()


def _binary(name: str) -> Function:
    return lambda x, y, i, t, d: getattr(torch, name)(x.abs() + 0.5, y.abs() + 0.5)


def _activation(name: str) -> Function:
    return lambda x, y, i, t, d: getattr(F, name)(x)


def _integers(name: str) -> Function:
    return lambda x, y, i, t, d: getattr(torch, name)(i, i.flip(0) * 0 + 3) * 1.0


def _reductions(name: str) -> None:
    PROGRAMS[f"{name} of features"] = lambda x, y, i, t, d: _values(getattr(torch, name)(x, d))
    PROGRAMS[f"{name} of tokens"] = lambda x, y, i, t, d: _values(getattr(torch, name)(x, t))
    PROGRAMS[f"{name} of features, kept"] = lambda x, y, i, t, d: x + _values(getattr(torch, name)(x, d, keepdim=True))
    PROGRAMS[f"{name} of tokens, kept"] = lambda x, y, i, t, d: x + _values(getattr(torch, name)(x, t, keepdim=True))


def _values(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _scans(name: str) -> None:
    PROGRAMS[f"{name} over features"] = lambda x, y, i, t, d: _values(getattr(torch, name)(x, d))
    PROGRAMS[f"{name} over tokens"] = lambda x, y, i, t, d: _values(getattr(torch, name)(x, t))


_methods(
    "abs acos asinh atan ceil cos cosh deg2rad digamma erf erfc exp exp2 expm1 floor frac lgamma log log10", _unary
)
_methods("log1p log2 logit neg rad2deg reciprocal round rsqrt sigmoid sign sin sinc sinh sqrt square tan tanh", _unary)
_methods("trunc isfinite isnan sgn positive signbit nan_to_num i0 erfinv", _unary)
_methods("add sub mul div atan2 copysign fmax fmin fmod hypot logaddexp maximum minimum pow remainder xlogy", _binary)
_methods("eq ge gt le lt ne nextafter floor_divide true_divide heaviside float_power", _binary)
_methods(
    "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 selu silu",
    _activation,
)
_methods("softplus softshrink softsign tanhshrink", _activation)
_methods("bitwise_and bitwise_or bitwise_xor gcd lcm bitwise_left_shift", _integers)
for _name in "sum mean amax amin prod var std logsumexp median argmax argmin any all mode count_nonzero".split():  # noqa: SIM905
    if _name == "count_nonzero":
        PROGRAMS["count_nonzero of features"] = lambda x, y, i, t, d: torch.count_nonzero(x, d)
        PROGRAMS["count_nonzero of tokens"] = lambda x, y, i, t, d: torch.count_nonzero(x, t)
    else:
        _reductions(_name)
for _name in "cumsum cumprod cummax cummin logcumsumexp softmax log_softmax sort argsort".split():  # noqa: SIM905
    _scans(_name)

PROGRAMS |= {
    # everything at once
    "mean of all": lambda x, y, i, t, d: x - x.mean(),
    "norm of all": lambda x, y, i, t, d: x / x.norm(),
    "max of all": lambda x, y, i, t, d: x / (x.max() + 9),
    "norm of tokens": lambda x, y, i, t, d: F.normalize(x, dim=t),
    "norm of features": lambda x, y, i, t, d: F.normalize(x, dim=d),
    # integers and indices
    "mean of integers": lambda x, y, i, t, d: i - i.float().mean(),
    "table": lambda x, y, i, t, d: TABLE[i],
    "embedding": lambda x, y, i, t, d: F.embedding(i, TABLE),
    "table by index_select": lambda x, y, i, t, d: TABLE.index_select(0, i),
    "table by gather": lambda x, y, i, t, d: TABLE.gather(0, i[:, None].expand(-1, FEATURES)),
    "one_hot": lambda x, y, i, t, d: F.one_hot(i, FEATURES),
    "rows by their integers": lambda x, y, i, t, d: x.index_select(t, i % 2),
    "rows by integers, indexed": lambda x, y, i, t, d: x.movedim(t, 0)[i % 2],
    "rows by gather": lambda x, y, i, t, d: x.movedim(t, 0).flatten(1).gather(0, (i % 2)[:, None]),
    "columns by integers": lambda x, y, i, t, d: x.movedim(d, 0).index_select(0, torch.tensor([3, 1])),
    "each token its column": lambda x, y, i, t, d: x.movedim(t, 0).flatten(1).gather(1, i[:, None]),
    "scatter along tokens": lambda x, y, i, t, d: torch.zeros(8, FEATURES).index_add(0, i % 2, _rows(x, t)),
    "scatter along features": lambda x, y, i, t, d: torch.zeros(i.shape[0], FEATURES).scatter(1, i[:, None], 1.0),
    "scatter_add along features": lambda x, y, i, t, d: torch.ones(i.shape[0], FEATURES).scatter_add(
        1, i[:, None], i[:, None].float()
    ),
    "index_put of tokens": lambda x, y, i, t, d: torch.zeros(FEATURES, FEATURES).index_put((i,), TABLE[i]),
    "columns added up": lambda x, y, i, t, d: x.movedim(d, 0).index_add(0, torch.tensor([3, 1]), y.movedim(d, 0)[:2]),
    "columns copied": lambda x, y, i, t, d: x.movedim(d, 0).index_copy(0, torch.tensor([3, 1]), y.movedim(d, 0)[:2]),
    "columns filled": lambda x, y, i, t, d: x.index_fill(d, torch.tensor([3, 1]), 0.5),
    "columns at places of the tokens": lambda x, y, i, t, d: torch.zeros(FEATURES, 8).index_copy(0, i, TABLE[i]).sum(),
    "histogram": lambda x, y, i, t, d: x + torch.zeros(FEATURES).index_add(0, i, i.float()).sum(),
    "sorted integers": lambda x, y, i, t, d: i.sort().values,
    "integers twice, in pairs": lambda x, y, i, t, d: TABLE[i.repeat(2).view(-1, 2)[:, 1]],
    "integers repeated in place": lambda x, y, i, t, d: i[:, None].expand(-1, 2).reshape(-1).view(-1, 2)[:, 1],
    "bucketize": lambda x, y, i, t, d: torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0])),
    "searchsorted": lambda x, y, i, t, d: torch.searchsorted(torch.tensor([-1.0, 0.0, 1.0]), x.contiguous()),
    "isin": lambda x, y, i, t, d: torch.isin(i, torch.tensor([1, 3])),
    "isin the tokens": lambda x, y, i, t, d: torch.isin(torch.arange(8), i) * 1,
    "topk of features": lambda x, y, i, t, d: x.topk(2, d).values,
    "topk of tokens": lambda x, y, i, t, d: x.topk(2, t).values,
    "kthvalue of features": lambda x, y, i, t, d: x.kthvalue(2, d).values,
    "kthvalue of tokens": lambda x, y, i, t, d: x.kthvalue(2, t).values,
    "tokens in order": lambda x, y, i, t, d: x.index_select(t, i.argsort()),
    # places
    "first token": lambda x, y, i, t, d: x + x.select(t, 0).unsqueeze(t),
    "last token": lambda x, y, i, t, d: x + x.select(t, -1).unsqueeze(t),
    "first two tokens": lambda x, y, i, t, d: x.narrow(t, 0, 2),
    "all but the first token": lambda x, y, i, t, d: x.narrow(t, 1, x.shape[t] - 1).sum(),
    "last but one": lambda x, y, i, t, d: x + x.select(t, x.shape[t] - 2).unsqueeze(t),
    "first feature": lambda x, y, i, t, d: x.select(d, 0),
    "last feature": lambda x, y, i, t, d: x.select(d, -1),
    "flip of tokens": lambda x, y, i, t, d: x.flip(t),
    "flip of features": lambda x, y, i, t, d: x.flip(d),
    "roll of tokens": lambda x, y, i, t, d: x.roll(1, t),
    "roll of features": lambda x, y, i, t, d: x.roll(1, d),
    "roll of all": lambda x, y, i, t, d: x.roll(1),
    "difference of tokens": lambda x, y, i, t, d: x.diff(dim=t).sum(),
    "difference of features": lambda x, y, i, t, d: x.diff(dim=d),
    "every second token": lambda x, y, i, t, d: x.movedim(t, 0)[::2].sum(),
    "every second feature": lambda x, y, i, t, d: x.movedim(d, 0)[::2],
    "halves of features": lambda x, y, i, t, d: torch.cat(x.chunk(2, d)[::-1], d),
    "halves of tokens": lambda x, y, i, t, d: x.chunk(2, t)[0].sum(),
    "split of features": lambda x, y, i, t, d: x.split([2, FEATURES - 2], d)[1],
    "unbind of features": lambda x, y, i, t, d: x.unbind(d)[1],
    "glu": lambda x, y, i, t, d: F.glu(x, d),
    "tril": lambda x, y, i, t, d: x.tril(),
    "triu": lambda x, y, i, t, d: x.triu(),
    "diagonal": lambda x, y, i, t, d: x.diagonal(0, t, d).sum(),
    "diagonal of features": lambda x, y, i, t, d: (
        (x.movedim(t, 0).flatten(1)[:, :, None] * VECTOR).diagonal(0, 1, 2)
    ),
    "pad of features": lambda x, y, i, t, d: F.pad(x.movedim(d, -1), (1, 2)),
    "pad of tokens": lambda x, y, i, t, d: F.pad(x.movedim(t, -1), (1, 0))[..., : x.shape[t]],
    # views
    "heads": lambda x, y, i, t, d: x.movedim(t, 0).flatten(1).view(-1, 2, FEATURES // 2).transpose(0, 1),
    "two rows per token": lambda x, y, i, t, d: (x.movedim(t, 0).reshape(-1, FEATURES // 2) * 2).view(-1, FEATURES),
    "columns as rows": lambda x, y, i, t, d: x.movedim(t, -1).reshape(-1, FEATURES),
    "rows twice, in pairs": lambda x, y, i, t, d: torch.cat([x, x], t).movedim(t, 0).reshape(-1, 2, FEATURES)[:, 1],
    "tiles in pairs": lambda x, y, i, t, d: x.movedim(t, 0).flatten(1).tile(2, 1).reshape(-1, 2, FEATURES)[:, 0],
    "stacked in pairs": lambda x, y, i, t, d: torch.stack([x, y], t + 1).select(t + 1, 1),
    "stacked before, in pairs": lambda x, y, i, t, d: (
        torch.stack([x.movedim(t, 0), y.movedim(t, 0)]).reshape(-1, 2, FEATURES)[:, 0]
    ),
    "joined features": lambda x, y, i, t, d: torch.cat([x, y], d),
    "joined tokens": lambda x, y, i, t, d: torch.cat([x, y], t).narrow(t, 0, x.shape[t]),
    "repeat of features": lambda x, y, i, t, d: x.repeat_interleave(2, d),
    "repeat of tokens": lambda x, y, i, t, d: x.repeat_interleave(2, t).narrow(t, 0, x.shape[t]),
    "permuted": lambda x, y, i, t, d: x.movedim(t, -1),
    "windows of features": lambda x, y, i, t, d: x.unfold(d, 2, 2).sum(-1),
    "windows of tokens": lambda x, y, i, t, d: x.unfold(t, 2, 1).sum(),
    "outer": lambda x, y, i, t, d: x.select(d, 0).unsqueeze(-1) * VECTOR,
    "pairs of tokens": lambda x, y, i, t, d: (i[:, None] - i[None, :]).select(1, 0),
    "mask of pairs": lambda x, y, i, t, d: (torch.arange(i.shape[0])[:, None] >= torch.arange(i.shape[0])) * 1,
    "positions": lambda x, y, i, t, d: i + torch.arange(i.shape[0]),
    "positions from behind": lambda x, y, i, t, d: i + torch.arange(i.shape[0]).flip(0),
    "rows of a table": lambda x, y, i, t, d: TABLE[: i.shape[0]] * i[:, None],
    "written among others": lambda x, y, i, t, d: x + _among_others(i).sum(),
    "written columns": lambda x, y, i, t, d: _with_first_column(x.movedim(t, 0).flatten(1), i),
    "new rows": lambda x, y, i, t, d: i[:, None] + i.new_zeros(i.shape[0], 2),
    "full of the count": lambda x, y, i, t, d: x + torch.full((1,), x.shape[t]),
    "divided by the count": lambda x, y, i, t, d: x / x.shape[t],
    "rounded mean": lambda x, y, i, t, d: x.sum(t, keepdim=True) / x.shape[t] + x * 0,
    "mask from the count": lambda x, y, i, t, d: (torch.arange(i.shape[0]) < i.shape[0] - 1) * i,
    # products
    "linear": lambda x, y, i, t, d: F.linear(x.movedim(t, 0).flatten(1), WEIGHT),
    "matmul": lambda x, y, i, t, d: x.movedim(t, 0).flatten(1) @ WEIGHT,
    "vector": lambda x, y, i, t, d: x.movedim(t, 0).flatten(1) @ VECTOR,
    "addmm": lambda x, y, i, t, d: torch.addmm(VECTOR, x.movedim(t, 0).flatten(1), WEIGHT),
    "tokens by tokens": lambda x, y, i, t, d: (_rows(x, t) @ _rows(y, t).t()).select(1, 0),
    "tokens by tokens by features": lambda x, y, i, t, d: (_rows(x, t) @ _rows(y, t).t()) @ _rows(x, t),
    "covariance": lambda x, y, i, t, d: x.sum() + _rows(x, t).t() @ _rows(y, t),
    "bmm of tokens": lambda x, y, i, t, d: torch.bmm(_rows(x, t)[:, None], _rows(y, t)[:, :, None]),
    "einsum": lambda x, y, i, t, d: torch.einsum("nd,de->ne", _rows(x, t), WEIGHT),
    "einsum of rows": lambda x, y, i, t, d: torch.einsum("nd,nd->n", _rows(x, t), _rows(y, t)),
    "einsum over tokens": lambda x, y, i, t, d: torch.einsum("nd,ne->de", _rows(x, t), _rows(y, t)),
    "cdist": lambda x, y, i, t, d: torch.cdist(_rows(x, t), _rows(y, t)).select(1, 0),
    # norms, convolutions, pools
    "layer_norm": lambda x, y, i, t, d: F.layer_norm(_rows(x, t), (FEATURES,), VECTOR),
    "rms_norm": lambda x, y, i, t, d: F.rms_norm(_rows(x, t), (FEATURES,), VECTOR),
    "layer_norm of tokens": lambda x, y, i, t, d: F.layer_norm(_rows(x, t).t(), (x.shape[t],)),
    "group_norm": lambda x, y, i, t, d: F.group_norm(_rows(x, t), 2),
    "batch_norm": lambda x, y, i, t, d: F.batch_norm(_rows(x, t), VECTOR, VECTOR),
    "batch_norm in training": lambda x, y, i, t, d: F.batch_norm(_rows(x, t), None, None, training=True),
    "instance_norm over tokens": lambda x, y, i, t, d: F.instance_norm(_rows(x, t).t()[None]),
    "convolution over features": lambda x, y, i, t, d: F.conv1d(_rows(x, t)[:, None], WEIGHT[:2, None, :3], padding=1),
    "convolution over tokens": lambda x, y, i, t, d: F.conv1d(_rows(x, t).t()[None], KERNEL, padding=1),
    "unbatched convolution": lambda x, y, i, t, d: F.conv1d(_rows(x, t).t(), KERNEL, padding=1),
    "pool over features": lambda x, y, i, t, d: F.avg_pool1d(_rows(x, t)[:, None], 2),
    "pool over tokens": lambda x, y, i, t, d: F.avg_pool1d(_rows(x, t).t()[None], 3, 1, 1),
    "adaptive pool over tokens": lambda x, y, i, t, d: x + F.adaptive_avg_pool1d(_rows(x, t).t()[None], 1).sum(),
    "renorm of tokens": lambda x, y, i, t, d: torch.renorm(_rows(x, t), 2, 0, 1.0),
    "renorm of features": lambda x, y, i, t, d: torch.renorm(_rows(x, t), 2, 1, 1.0),
    "fft of features": lambda x, y, i, t, d: torch.fft.rfft(x, dim=d).abs(),
    "fft of tokens": lambda x, y, i, t, d: torch.fft.fft(x, dim=t).real,
    "fft of both": lambda x, y, i, t, d: torch.fft.fft2(_rows(x, t)).real,
    "complex pairs": lambda x, y, i, t, d: torch.view_as_real(
        torch.view_as_complex(_rows(x, t).view(-1, FEATURES // 2, 2)) * 1j
    ),
    # attention
    "causal attention": lambda x, y, i, t, d: _attend(x, y, t, is_causal=True),
    "attention": lambda x, y, i, t, d: _attend(x, y, t),
    "attention in each token": lambda x, y, i, t, d: F.scaled_dot_product_attention(
        *[_rows(z, t).view(-1, 2, FEATURES // 2) for z in (x, y, x)]
    ),
    # chains
    "gate": lambda x, y, i, t, d: F.silu(x.narrow(d, 0, 4)) * x.narrow(d, 4, 4),
    "rotary": lambda x, y, i, t, d: _rotary(_rows(x, t), i),
    "experts": lambda x, y, i, t, d: _experts(_rows(x, t)),
    "experts with a capacity": lambda x, y, i, t, d: _rows(x, t) * _rows(x, t).softmax(-1).topk(2, 0).values.sum(),
    "centred, scaled": lambda x, y, i, t, d: (x - x.mean(d, keepdim=True)) / (x.var(d, keepdim=True) + 1).sqrt(),
    "clamped where positive": lambda x, y, i, t, d: torch.where(x > 0, x.clamp(max=1), y),
    "masked_fill": lambda x, y, i, t, d: x.masked_fill(y > 0, 0.0),
    "lerp": lambda x, y, i, t, d: torch.lerp(x, y, 0.3),
    "addcmul": lambda x, y, i, t, d: torch.addcmul(x, y, y),
    "casts": lambda x, y, i, t, d: x.to(torch.float64).half().float(),
    "in place": lambda x, y, i, t, d: x.clone().mul_(2).add_(y).relu_(),
    "masked_fill in place": lambda x, y, i, t, d: x.clone().masked_fill_(y > 0, 0.0).gt_(y).abs_(),
    "unique": lambda x, y, i, t, d: x + (i == i[0]).sum(),
}  # fmt: skip


def _rows(x: Tensor, t: int) -> Tensor:
    """``[n, FEATURES]``."""
    return x.movedim(t, 0).flatten(1)


def _attend(x: Tensor, y: Tensor, t: int, **options: Any) -> Tensor:
    q, k = _rows(x, t)[None], _rows(y, t)[None]
    return F.scaled_dot_product_attention(q, k, k, **options)[0]


def _among_others(i: Tensor) -> Tensor:
    table = torch.zeros(64)
    table[: i.shape[0]] = i.float()
    return table


def _with_first_column(x: Tensor, i: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = i.float()
    return x


def _rotary(x: Tensor, positions: Tensor) -> Tensor:
    cos, sin = TABLE[positions].cos()[:, :4], TABLE[positions].sin()[:, :4]
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _experts(x: Tensor) -> Tensor:
    weights, chosen = x.softmax(-1).topk(2, -1)
    return sum((x @ WEIGHT * e) * (weights * (chosen == e)).sum(-1, keepdim=True) for e in range(4))  # type: ignore[return-value]


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], int, int]] = {
    "[n, d]": (lambda x: x, 0, 1),
    "[d, n]": (lambda x: x.t(), 1, 0),
    "[1, n, d]": (lambda x: x[None], 1, 2),
}
"""Name -> how ``[n, FEATURES]`` is laid out, its token dimension and its feature dimension."""

"""What a link carries, and the plan that all ranks of a pipeline must share before any data moves.

Each rank brings the ``StagePlan`` that it was set up with. ``agree`` compares those of all ranks, in the same way on
each of them, so that all raise the same ``PlanMismatch`` or all hold the same ``Plan``.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import torch

from .. import errors


class ProxyLike(Protocol):
    """What a ``Proxy`` says of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def layout(self) -> str: ...


@dataclass(frozen=True)
class Field:
    """One tensor of a link, without its token dimension."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str = "replicated"

    @property
    def bytes_per_token(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def describe(self) -> list[Any]:
        return [self.name, list(self.shape), str(self.dtype), self.layout]


@dataclass(frozen=True)
class Schema:
    """The tensors of one link, in the order in which they travel."""

    fields: tuple[Field, ...]

    @classmethod
    def of(cls, proxies: Mapping[str, ProxyLike]) -> Schema:
        return cls(tuple(Field(name, tuple(p.shape), p.dtype, p.layout) for name, p in proxies.items()))

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(field.name for field in self.fields)

    @cached_property
    def bytes_per_token(self) -> int:
        return sum(field.bytes_per_token for field in self.fields)

    def in_order(self, tensors: Mapping[str, torch.Tensor], num_tokens: int) -> list[torch.Tensor]:
        """The tensors as they travel; gloo would let a wrong size or dtype through as garbage.

        Raises:
            ValueError: a name is missing or unknown, or a tensor is not contiguous ``[num_tokens, *shape]``.
        """
        if tensors.keys() != set(self.names):
            raise ValueError(errors.link_names_differ(list(tensors), self.names))
        ordered = [tensors[name] for name in self.names]
        for field, tensor in zip(self.fields, ordered, strict=True):
            fits = tensor.shape == (num_tokens, *field.shape) and tensor.dtype == field.dtype
            if not fits or not tensor.is_contiguous():
                got = f"{tensor.dtype}{list(tensor.shape)} with strides {list(tensor.stride())}"
                expected = f"contiguous {field.dtype}{[num_tokens, *field.shape]}"
                raise ValueError(errors.link_tensor_differs(field.name, got, expected))
        return ordered

    def describe(self) -> list[list[Any]]:
        return [field.describe() for field in self.fields]


@dataclass(frozen=True)
class StagePlan:
    """What one rank was set up with."""

    package_version: str
    stage_count: int
    buckets_tokens: tuple[int, ...]
    """Ascending; the last one is ``max_tokens``."""
    max_tokens: int
    partition: str = ""
    """Which layers went to which stage, in any text that all ranks spell alike."""
    inputs: Schema | None = None
    """None on the first stage."""
    outputs: Schema | None = None
    """None on the last stage."""
    feedback: Schema | None = None
    """From the last stage to the first; other stages need not know."""
    torch_version: str = torch.__version__

    def __post_init__(self) -> None:
        buckets = self.buckets_tokens
        ascending = all(a < b for a, b in pairwise((0, *buckets)))
        if not buckets or not ascending or buckets[-1] != self.max_tokens:
            raise ValueError(errors.bad_plan_buckets(buckets, self.max_tokens))

    def to_text(self) -> str:
        """JSON, so that ranks of other versions can still say what differs."""
        links = {name: schema and schema.describe() for name, schema in self._schemas().items()}
        shared = {key: value for key, value in asdict(self).items() if key not in links}
        return json.dumps({**shared, **links}, sort_keys=True)

    def _schemas(self) -> dict[str, Schema | None]:
        return {"inputs": self.inputs, "outputs": self.outputs, "feedback": self.feedback}


@dataclass(frozen=True)
class Plan:
    """What all ranks agreed on."""

    buckets_tokens: tuple[int, ...]
    max_tokens: int
    stage_count: int
    has_feedback: bool
    fingerprint: int
    """64 bits that are equal for equal plans, on any machine; every header carries them."""

    def bucket_tokens(self, num_tokens: int) -> int:
        """The bucket in which a call of 1 to ``max_tokens`` tokens runs."""
        return self.buckets_tokens[bisect_left(self.buckets_tokens, num_tokens)]


def agree(texts: Sequence[str]) -> Plan:
    """The plan of a pipeline whose ranks, in stage order, brought these ``StagePlan.to_text()``.

    Raises:
        PlanMismatch: with every difference and the ranks that have it; the same on each rank.
    """
    plans = [json.loads(text) for text in texts]
    differences = [*_shared_differences(plans), *_link_differences(plans)]
    if differences:
        raise errors.PlanMismatch(errors.plans_differ(differences))
    return Plan(
        buckets_tokens=tuple(plans[0]["buckets_tokens"]),
        max_tokens=plans[0]["max_tokens"],
        stage_count=len(plans),
        has_feedback=len(plans) > 1 and plans[0]["feedback"] is not None,
        fingerprint=int.from_bytes(hashlib.sha256("\n".join(texts).encode()).digest()[:8], "little"),
    )


_LINKS = ("inputs", "outputs", "feedback")


def _shared_differences(plans: Sequence[Mapping[str, Any]]) -> list[str]:
    differences = []
    for key in sorted({key for plan in plans for key in plan} - {*_LINKS}):
        ranks_with: dict[str, list[int]] = {}
        for rank, plan in enumerate(plans):
            ranks_with.setdefault(json.dumps(plan[key]) if key in plan else "not known", []).append(rank)
        if len(ranks_with) > 1:
            differences.append(errors.plan_entry_differs(key, ranks_with))
        elif key == "stage_count" and plans[0][key] != len(plans):
            differences.append(errors.wrong_stage_count(plans[0][key], len(plans)))
    return differences


def _link_differences(plans: Sequence[Mapping[str, Any]]) -> list[str]:
    last = len(plans) - 1
    ends = [((rank, "outputs"), (rank + 1, "inputs")) for rank in range(last)]
    ends.append(((last, "feedback"), (0, "feedback")))
    differences = []
    for (source, sent), (target, taken) in ends:
        sends, takes = plans[source].get(sent), plans[target].get(taken)
        if sends != takes or (sends is None and sent == "outputs"):
            differences.append(errors.link_differs(source, sent, sends, target, taken, takes))
    for rank, key in ((0, "inputs"), (last, "outputs")):
        if plans[rank].get(key) is not None:
            differences.append(errors.link_leads_nowhere(rank, key))
    return differences

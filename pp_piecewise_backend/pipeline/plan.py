"""What a link carries, and the plan that all ranks of a pipeline must share before any data moves.

Each rank brings the ``StagePlan`` that it was set up with. ``agree`` compares those of all ranks, in the same way on
each of them, so that all raise the same ``PlanMismatch`` or all hold the same ``Plan``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import errors
from ..runtime.cudagraphs.ladder import Ladder
from ..runtime.stage import Proxy


@dataclass(frozen=True)
class Schema:
    """The proxies of one link by name, in the order in which they travel."""

    proxies: Mapping[str, Proxy]

    def bytes_per_token(self, tensor_parallel_size: int = 1) -> int:
        """What one of the links between two stages carries."""
        return sum(
            proxy.bytes_per_token // (tensor_parallel_size if proxy.layout == "scattered" else 1)
            for proxy in self.proxies.values()
        )

    def in_order(self, tensors: Mapping[str, torch.Tensor], num_tokens: int) -> list[torch.Tensor]:
        """The tensors as they travel; gloo would let a wrong size or dtype through as garbage.

        Raises:
            ValueError: a name is missing or unknown, or a tensor is not contiguous ``[num_tokens, *shape]``.
        """
        if tensors.keys() != self.proxies.keys():
            raise ValueError(errors.link_names_differ(list(tensors), list(self.proxies)))
        ordered = [tensors[name] for name in self.proxies]
        for (name, proxy), tensor in zip(self.proxies.items(), ordered, strict=True):
            fits = tensor.shape == (num_tokens, *proxy.shape) and tensor.dtype == proxy.dtype
            if not fits or not tensor.is_contiguous():
                got = f"{tensor.dtype}{list(tensor.shape)} with strides {list(tensor.stride())}"
                expected = f"contiguous {proxy.dtype}{[num_tokens, *proxy.shape]}"
                raise ValueError(errors.link_tensor_differs(name, got, expected))
        return ordered

    def describe(self) -> list[list[Any]]:
        return [[name, list(p.shape), str(p.dtype), p.layout] for name, p in self.proxies.items()]


@dataclass(frozen=True)
class StagePlan:
    """What one rank was set up with."""

    package_version: str
    stage_count: int
    ladder: Ladder
    inputs: Schema | None = None
    """None on the first stage."""
    outputs: Schema | None = None
    """None on the last stage."""
    feedback: Schema | None = None
    """From the last stage to the first; other stages need not know."""
    torch_version: str = torch.__version__
    transport: str = ""
    """Its name."""

    def to_text(self, rank: int, tensor_parallel_rank: int = 0, tensor_parallel_size: int = 1) -> str:
        """JSON, so that ranks of other versions can still say what differs.

        Args:
            rank: how messages name the rank that has this plan.
            tensor_parallel_rank: its place among the ranks of its stage.
            tensor_parallel_size: how many these are.
        """
        schemas = {key: getattr(self, key) for key in _LINKS}
        entries = {
            "package_version": self.package_version,
            "torch_version": self.torch_version,
            "stage_count": self.stage_count,
            "buckets_tokens": self.ladder.sizes_tokens,
            "max_tokens": self.ladder.max_tokens,
            "transport": self.transport,
            "rank": rank,
            "tensor_parallel_rank": tensor_parallel_rank,
            "tensor_parallel_size": tensor_parallel_size,
            **{key: schema and schema.describe() for key, schema in schemas.items()},
        }
        return json.dumps(entries, sort_keys=True)


@dataclass(frozen=True)
class Plan:
    """What all ranks agreed on."""

    ladder: Ladder
    stage_count: int
    has_feedback: bool
    fingerprint: int
    """64 bits that are equal for equal plans, on any machine; every header carries them."""
    sent_names: Mapping[int, Sequence[str]] = field(default_factory=dict, compare=False)
    """Every rank of all pipelines -> the names of what it sends: proxies, or feedback from the last stage."""


_LINKS = ("inputs", "outputs", "feedback")
_PLACE = ("rank", "tensor_parallel_rank")
"""What differs from rank to rank in equal plans."""

PlanDict = Mapping[str, Any]


def agree(pipelines: Sequence[Sequence[str]]) -> Plan:
    """The plan of pipelines side by side, whose ranks, in stage order, brought these ``StagePlan.to_text()``.

    More than one pipeline: one for each tensor-parallel rank, in their order.

    Raises:
        PlanMismatch: with every difference and the ranks that have it; the same on each rank.
    """
    plans = [[json.loads(text) for text in pipeline] for pipeline in pipelines]
    differences = [*_shared_differences(plans), *_place_differences(plans)]
    for pipeline in plans:
        differences += _link_differences(pipeline)
        differences += _sibling_differences(plans[0], pipeline)
    differences += _share_differences(plans[0])
    if differences:
        raise errors.PlanMismatch(errors.plans_differ(differences))
    first = plans[0]
    common = json.dumps([{key: value for key, value in plan.items() if key not in _PLACE} for plan in first])
    return Plan(
        ladder=Ladder(tuple(first[0]["buckets_tokens"])),
        stage_count=len(first),
        has_feedback=len(first) > 1 and first[0]["feedback"] is not None,
        fingerprint=int.from_bytes(hashlib.sha256(common.encode()).digest()[:8], "little"),
        sent_names={
            plan["rank"]: [name for name, *_ in plan["outputs"] or (plan is pipeline[-1] and plan["feedback"]) or ()]
            for pipeline in plans
            for plan in pipeline
        },
    )


def _shared_differences(pipelines: Sequence[Sequence[PlanDict]]) -> Iterator[str]:
    plans = sorted((plan for pipeline in pipelines for plan in pipeline), key=lambda plan: plan["rank"])
    counts = {"stage_count": len(pipelines[0]), "tensor_parallel_size": len(pipelines)}
    for key in sorted({key for plan in plans for key in plan} - {*_LINKS, *_PLACE}):
        ranks_with: dict[str, list[int]] = {}
        for plan in plans:
            ranks_with.setdefault(json.dumps(plan[key]) if key in plan else "not known", []).append(plan["rank"])
        if len(ranks_with) > 1:
            yield errors.plan_entry_differs(key, ranks_with)
        elif key in counts and plans[0][key] != counts[key]:
            yield errors.wrong_count(key, plans[0][key], counts[key])


def _place_differences(pipelines: Sequence[Sequence[PlanDict]]) -> list[str]:
    return [
        errors.wrong_sibling(plan["rank"], plan.get("tensor_parallel_rank"), expected, pipeline[0]["rank"])
        for expected, pipeline in enumerate(pipelines)
        for plan in pipeline
        if len(pipelines) > 1 and plan.get("tensor_parallel_rank") != expected
    ]


def _link_differences(plans: Sequence[PlanDict]) -> Iterator[str]:
    first, last = plans[0], plans[-1]
    hops = [(source, "outputs", target, "inputs") for source, target in itertools.pairwise(plans)]
    for source, sent, target, taken in [*hops, (last, "feedback", first, "feedback")]:
        sends, takes = source.get(sent), target.get(taken)
        if sends != takes or (sends is None and sent == "outputs"):
            yield errors.link_differs(source["rank"], sent, sends, target["rank"], taken, takes)
    for plan, key in ((first, "inputs"), (last, "outputs")):
        if plan.get(key) is not None:
            yield errors.link_leads_nowhere(plan["rank"], key)


def _sibling_differences(pipeline: Sequence[PlanDict], other: Sequence[PlanDict]) -> list[str]:
    return [
        errors.link_differs(own["rank"], key, own.get(key), sibling["rank"], key, sibling.get(key))
        for own, sibling in zip(pipeline, other, strict=False)
        for key in _LINKS
        if own.get(key) != sibling.get(key)
    ]


def _share_differences(plans: Sequence[PlanDict]) -> Iterator[str]:
    for plan in plans:
        size = plan.get("tensor_parallel_size", 1)
        for key in _LINKS:
            for name, shape, _, layout in plan.get(key) or ():
                if layout == "scattered" and math.prod(shape) % size:
                    yield errors.not_divisible(plan["rank"], key, name, math.prod(shape), size)

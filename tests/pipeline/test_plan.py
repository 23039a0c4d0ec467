"""Plans that all ranks share, and those that differ."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from handoff_ranks import FEEDBACK, PROXIES, plan_of
from pp_piecewise_backend.errors import PlanMismatch
from pp_piecewise_backend.pipeline.plan import Plan, Schema, StagePlan, agree
from pp_piecewise_backend.runtime.stage import Proxy


def agreed(*plans: StagePlan) -> Plan:
    return agree([[plan.to_text(rank) for rank, plan in enumerate(plans)]])


def test_equal_plans_agree_and_have_a_stable_fingerprint() -> None:
    plan = agreed(plan_of(0, 2), plan_of(1, 2))
    assert plan == agreed(plan_of(0, 2), plan_of(1, 2))
    assert plan.has_feedback and plan.stage_count == 2
    assert [plan.ladder.bucket(n) for n in (1, 3, 9)] == [1, 4, 16]
    assert plan.fingerprint != agreed(*(plan_of(i, 2, package_version="0.2") for i in (0, 1))).fingerprint


def test_bytes_per_token() -> None:
    assert (PROXIES.bytes_per_token(), FEEDBACK.bytes_per_token()) == (8 * 4 + 6 * 2, 8)


def test_every_difference_is_named() -> None:
    with pytest.raises(PlanMismatch) as caught:
        agreed(plan_of(0, 3), plan_of(1, 3, package_version="0.2", inputs=FEEDBACK), plan_of(2, 3, feedback=None))
    for part in ('"0.1" on ranks 0, 2', '"0.2" on rank 1', "inputs of rank 1", "feedback of rank 2"):
        assert part in str(caught.value)


def test_a_link_to_nowhere_and_a_wrong_count_are_differences() -> None:
    with pytest.raises(PlanMismatch, match="rank 0 has inputs"):
        agreed(plan_of(0, 2, inputs=PROXIES), plan_of(1, 2))
    with pytest.raises(PlanMismatch, match="stage_count is 3 on all ranks, but 2 ranks came"):
        agreed(plan_of(0, 2, stage_count=3), plan_of(1, 2, stage_count=3))


def grid(*pipelines: list[StagePlan], **places: int) -> Plan:
    """Rank t of stage k is rank ``2 * k + t`` of all."""
    return agree(
        [
            [plan.to_text(2 * stage + t, t, places.get("size", 2)) for stage, plan in enumerate(plans)]
            for t, plans in enumerate(pipelines)
        ]
    )


def test_pipelines_side_by_side_share_one_fingerprint() -> None:
    plans = [plan_of(0, 2), plan_of(1, 2)]
    assert grid(plans, plans) == grid(plans, plans)
    assert grid(plans, plans).fingerprint != agreed(*plans).fingerprint


def test_differences_between_pipelines_are_named_with_their_ranks() -> None:
    plans = [plan_of(0, 2), plan_of(1, 2)]
    with pytest.raises(PlanMismatch, match=r'"0\.1" on ranks 0, 1, 2, "0\.2" on rank 3'):
        grid(plans, [plans[0], replace(plans[1], package_version="0.2")])
    other = [replace(plans[0], outputs=FEEDBACK), replace(plans[1], inputs=FEEDBACK)]
    with pytest.raises(PlanMismatch, match=r"outputs of rank 0 are .*, but outputs of rank 1 are .*inputs of rank 2"):
        grid(plans, other)


def test_tensor_parallel_sizes_and_places_must_fit() -> None:
    plans = [plan_of(0, 2), plan_of(1, 2)]
    with pytest.raises(PlanMismatch, match="tensor_parallel_size is 3 on all ranks, but 2 ranks came"):
        grid(plans, plans, size=3)
    with pytest.raises(PlanMismatch, match="tensor_parallel_size is 2 on rank 0, 1 on rank 1"):
        agree([[plans[0].to_text(0, 0, 2), plans[1].to_text(1)]])
    first, second = plans
    crossed = [[first.to_text(0, 0, 2), second.to_text(3, 1, 2)], [first.to_text(1, 1, 2), second.to_text(2, 0, 2)]]
    with pytest.raises(PlanMismatch, match=r"rank 3 is number 1 of its tensor-parallel group, but .* rank 0 .* 0"):
        agree(crossed)


def test_what_cannot_be_shared_equally_is_a_difference() -> None:
    schema = Schema({"x": Proxy((3, 5), torch.float32, "scattered")})
    odd = [plan_of(0, 2, outputs=schema), plan_of(1, 2, inputs=schema)]
    with pytest.raises(
        PlanMismatch, match=r"outputs of rank 0 have 'x' scattered with 15 elements per token, which 2 "
    ):
        grid(odd, odd)
    agreed(*odd)  # one rank takes all


def test_a_tensor_that_is_not_in_the_plan_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'tokens' as contiguous torch\.int64"):
        FEEDBACK.in_order({"tokens": torch.zeros(2)}, 2)

"""Plans that all ranks share, and those that differ."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from handoff_ranks import FEEDBACK, PROXIES, plan_of
from pp_piecewise_backend.errors import PlanMismatch
from pp_piecewise_backend.handoff.schema import Plan, StagePlan, agree


def agreed(*plans: StagePlan) -> Plan:
    return agree([plan.to_text() for plan in plans])


def test_equal_plans_agree_and_have_a_stable_fingerprint() -> None:
    plan = agreed(plan_of(0, 2), plan_of(1, 2))
    assert plan == agreed(plan_of(0, 2), plan_of(1, 2))
    assert plan.has_feedback and plan.stage_count == 2
    assert [plan.bucket_tokens(n) for n in (1, 3, 9)] == [1, 4, 16]
    assert plan.fingerprint != agreed(*(plan_of(i, 2, partition="1+3") for i in (0, 1))).fingerprint


def test_bytes_per_token() -> None:
    assert (PROXIES.bytes_per_token, FEEDBACK.bytes_per_token) == (8 * 4 + 6 * 2, 8)


def test_every_difference_is_named() -> None:
    with pytest.raises(PlanMismatch) as caught:
        agreed(plan_of(0, 3), plan_of(1, 3, partition="3+1", inputs=FEEDBACK), plan_of(2, 3, feedback=None))
    for part in ('"2+2" on ranks 0, 2', '"3+1" on rank 1', "inputs of rank 1", "feedback of rank 2"):
        assert part in str(caught.value)


def test_a_link_to_nowhere_and_a_wrong_count_are_differences() -> None:
    with pytest.raises(PlanMismatch, match="rank 0 has inputs"):
        agreed(plan_of(0, 2, inputs=PROXIES), plan_of(1, 2))
    with pytest.raises(PlanMismatch, match="stage_count is 3 on all ranks, but 2 ranks came"):
        agreed(plan_of(0, 2, stage_count=3), plan_of(1, 2, stage_count=3))


def test_buckets_end_with_max_tokens() -> None:
    with pytest.raises(ValueError, match="end with max_tokens"):
        replace(plan_of(0, 2), buckets_tokens=(1, 8))


def test_a_tensor_that_is_not_in_the_plan_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'tokens' as contiguous torch\.int64"):
        FEEDBACK.in_order({"tokens": torch.zeros(2)}, 2)

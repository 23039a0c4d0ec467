"""What a pipeline should reach: its events, one after the other, without any of our code.

Of each micro-batch on each stage these moments are followed: the forward begins, the results are complete, the receive
of the next micro-batch is posted, the results leave, they arrive. Results leave when they are offered and the receive
is posted, and arrive after the delay of the link; nobody but the receiver waits for that (see `delayed_link.py`). There
is one landing slot per stage, and one place for results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Style = Literal["early", "end", "engine"]


def completion_seconds(
    stage_seconds: Sequence[Sequence[float]],
    link_seconds: Sequence[float],
    max_in_flight: int,
    style: Style,
    host_seconds: float = 0.0,
) -> list[float]:
    """When the last stage ends each micro-batch, if the pipeline starts empty at 0.

    Args:
        stage_seconds: stage -> micro-batch -> what its forward takes.
        link_seconds: micro-batch -> how long it takes from when it leaves a stage until it arrives at the next.
        max_in_flight: micro-batch i starts once micro-batch ``i - max_in_flight`` has ended on the last stage.
        style: what a stage does with the landing slot and the place of its results. ``early``: the receive is posted
            when the forward has begun, and results are complete no sooner than the previous ones have left. ``end``:
            the receive is posted when the results are complete. ``engine``: so it is, and the forward begins no sooner
            than the previous results have left.
        host_seconds: what each forward takes longer, for what the host does around it.
    """
    stage_count, count = len(stage_seconds), len(link_seconds)
    free_at = [0.0] * stage_count
    """stage -> when it can begin with its next micro-batch"""
    posted_at = [0.0] * stage_count
    left_at = [0.0] * stage_count
    ended: list[float] = []
    offered_at = 0.0
    for micro_batch in range(count):
        arrived_at = ended[micro_batch - max_in_flight] if micro_batch >= max_in_flight else 0.0
        for stage in range(stage_count):
            if stage > 0:
                left_at[stage - 1] = max(offered_at, posted_at[stage])
                arrived_at = left_at[stage - 1] + link_seconds[micro_batch]
            begin = max(arrived_at, free_at[stage])
            if style == "engine":
                begin = max(begin, left_at[stage])
            offered_at = max(begin + stage_seconds[stage][micro_batch] + host_seconds, left_at[stage])
            free_at[stage] = offered_at
            posted_at[stage] = begin if style == "early" else offered_at
        ended.append(offered_at)
    return ended


def relative_throughput(ended_seconds: Sequence[float], skipped: int, stage_seconds: float) -> float:
    """Micro-batches per time of one stage, between the ends of micro-batch ``skipped`` and the last one; at best 1."""
    measured = len(ended_seconds) - 1 - skipped
    return measured * stage_seconds / (ended_seconds[-1] - ended_seconds[skipped])

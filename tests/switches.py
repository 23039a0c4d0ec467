"""How each rule that keeps results right is switched off: by patching away the function or table entry that applies it.

What a rule is worth is shown by its absence: without it, a test that holds must fail.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

from pp_piecewise_backend.compilation import padding_rules, partition, split
from pp_piecewise_backend.runtime import bucket, capture_plan, dispatch, instructions, replay
from pp_piecewise_backend.runtime.cudagraphs import memory


def _no_addresses(self: Any, args: Any) -> dispatch.Addresses:
    return dispatch.Addresses((), (0,) * len(self.plan.address_positions))


# Rule -> (owner, name, what stands there instead). Rules of the table in ``padding_rules.py`` also leave the table.
_PATCHES: dict[str, list[tuple[Any, str, Any]]] = {
    "M1": [(partition._Cutter, "_cut_at_visible_writes", lambda self, steps: False)],
    "M2": [(split._Splitter, "is_remade", lambda self, value: False)],
    "R1": [],
    "R2": [
        (capture_plan, "outliving_writes", lambda traits, stage_inputs: []),
        (bucket, "undo_writes", lambda before: False),
    ],
    "R3": [(bucket.BucketCapture, "_examine", lambda self, step, instruction, inputs: None)],
    "R4": [(padding_rules, "uses_token_count", lambda call: False)],
    "R5": [(module, "real_rows", lambda static, num_tokens: static.rows(num_tokens)) for module in (bucket, replay)],
    "R6": [(instructions.Instruction, "holds", lambda self, arguments: True)],
    "R7": [(dispatch.Graphs, "addresses", _no_addresses)],
    "aliases": [
        (dispatch.Graphs, "_meets_written_memory", lambda self, args: False),
        (capture_plan, "writes_what_two_inputs_hold", lambda step, inputs: False),
        (capture_plan, "inputs_in_memory_of", lambda storages, inputs: []),
    ],
    "landing": [(capture_plan.GraphPlan, "overwrites_an_argument", lambda self, args, foreign: False)],
    "rows": [(module, "real_rows", lambda static, num_tokens: static.tensor) for module in (bucket, replay)],
    "mixing": [
        (padding_rules, "rule_for", lambda call: lambda call: True),
        (padding_rules, "has_odd_sizes", lambda call: False),
        (padding_rules, "writes_rows_into_other_memory", lambda call: False),
        (padding_rules, "matching_pattern", lambda node, patterns: "*"),
    ],
    "float indices": [(padding_rules, "indices_of", lambda call: [])],
    "random": [(split, "RANDOM", None)],
    "tail": [(memory.StaticTensor, "tails", lambda self, num_tokens: [])],
    "uninitialised": [(dispatch, "hoist_buffers", lambda plan: {})],
}

RULES = frozenset(_PATCHES)
"""M1 to R7 as the notes in the package number them."""


def switch_off(rules: Collection[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package run without these rules for the rest of the test."""
    in_table = tuple((name, check) for name, check in padding_rules.PADDING_RULES if name not in rules)
    monkeypatch.setattr(padding_rules, "PADDING_RULES", in_table)
    for rule in rules:
        for owner, name, value in _PATCHES[rule]:
            monkeypatch.setattr(owner, name, value)


def let_results_share_memory_with_earlier_steps(monkeypatch: pytest.MonkeyPatch, in_pools: bool = True) -> None:
    """Blocks of static memory, and pools; see Note [one pass per bucket]."""
    original = capture_plan.GraphPlan.__init__

    def without(self: capture_plan.GraphPlan, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.result_storages = frozenset()

    monkeypatch.setattr(capture_plan.GraphPlan, "__init__", without)
    if in_pools:
        monkeypatch.setattr(bucket.BucketCapture, "_pool_after", lambda self, *_: self._pool(bucket.GRAPH_POOL))

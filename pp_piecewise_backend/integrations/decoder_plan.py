"""Where a decoder may be cut."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderPlan:
    """Where a decoder may be cut, as its ``pp_plan`` says: names of children of its base model, in order."""

    before_layers: tuple[str, ...]
    layers: str
    after_layers: tuple[str, ...]
    layer_count: int

    def absent(self, index: int, count: int) -> tuple[str, ...]:
        """Children that stage ``index`` of ``count`` does without."""
        return (() if index == 0 else self.before_layers) + (() if index == count - 1 else self.after_layers)

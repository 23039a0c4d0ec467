"""One program for every number of tokens, for tests that are not about the programs that Dynamo makes.

Plain ``torch.compile`` makes three: for the first size, for all from 2 up, and for 1. To trace and to capture them is
most of what a small test costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch

import pp_piecewise_backend as ppb

Inputs = TypeVar("Inputs", bound=Mapping[str, Any])


def for_every_size(inputs: Inputs) -> Inputs:
    """The inputs, whose first dimension may now have any size but 0; they must be those of the first call."""
    for tensor in inputs.values():
        if isinstance(tensor, torch.Tensor) and tensor.dim() > 0:
            torch._dynamo.decorators.mark_unbacked(tensor, 0)
    return inputs

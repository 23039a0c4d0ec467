"""One program for every number of tokens, for tests that are not about the programs that Dynamo makes.

Plain ``torch.compile`` makes three: for the first size, for all from 2 up, and for 1. To trace and to capture them is
most of what a small test of a stage costs. Tests ask for the fixture ``one_program``, ranks in processes call ``on()``;
inputs that go through ``for_every_size``, and proxies in landing memory, then have any number of rows but 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

import pp_piecewise_backend as ppb

Inputs = TypeVar("Inputs", bound=Mapping[str, Any])

_is_on = False


def for_every_size(inputs: Inputs) -> Inputs:
    """The same inputs, which must have passed through here before the first call."""
    if _is_on:
        for tensor in inputs.values():
            if isinstance(tensor, Tensor) and tensor.dim() > 0:
                torch._dynamo.decorators.mark_unbacked(tensor, 0)
    return inputs


def on(setattr: Callable[[object, str, Any], None] = setattr) -> None:
    """Switch it on, by ``setattr``, which a test undoes."""
    views = ppb.Stage.views
    setattr(ppb.Stage, "views", lambda stage, num_tokens: for_every_size(views(stage, num_tokens)))
    setattr(_this_module(), "_is_on", True)


def _this_module() -> object:
    import one_program

    return one_program

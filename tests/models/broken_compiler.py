"""Importing this breaks Inductor on purpose: what it compiles of ``mish`` is 5 percent too large. Eager is right."""

from __future__ import annotations

import torch
from torch._inductor.decomposition import decompositions


def too_large(x: torch.Tensor) -> torch.Tensor:
    return 1.05 * x * torch.tanh(torch.nn.functional.softplus(x))


decompositions[torch.ops.aten.mish.default] = too_large

"""Which of the processes that work together this one is."""

from __future__ import annotations

import torch.distributed as dist

from ..config import rank_in_environment


def own_rank() -> int:
    """Its rank in ``torch.distributed`` or, before that is initialised, the launcher's; 0 where there is none.

    Engines start their workers without a launcher's variables.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return rank_in_environment()

"""Ranks that hold one stage together: each sends its share of a scattered tensor, and they gather in landing memory.

Rank t of a stage sends to rank t of the next one. A ``replicated`` tensor travels whole on each of these links. Of a
``scattered`` one, whose copies are equal on all ranks of a stage too, each link carries one share: the t-th of equal
parts of the flat ``[num_tokens, *shape]``. It lands in its place, from where the ranks gather the rest over links that
are faster than those between stages, without further memory and without a copy.
"""

from __future__ import annotations

from typing import Any

import torch

from .torch_distributed import P2P, Use, break_group, gather


class TensorParallel:
    """One rank's place among the ranks of its stage.

    Args:
        group: process group of the ranks of this stage, those of equal number in all stages forming one pipeline; with
            gloo where the tensors of the links lie on the CPU, else with NCCL. It stays the caller's, who may use it
            too: waiting for a scattered tensor is a collective, to be called in the same order on all ranks of the
            stage. Once the pipeline is broken, so is the group, since nothing else ends a collective that waits for a
            stopped rank.
        setup_seconds: how long ranks wait for one another at set-up.
    """

    def __init__(self, group: Any, setup_seconds: float = 1800.0) -> None:
        self.group = group
        self.transport = P2P("cpu", group, setup_seconds)
        """Between the ranks of the stage, for their plans and their failures."""
        self.rank = self.transport.stage
        self.size = self.transport.stage_count
        self._use = Use()

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of a contiguous tensor, flat and in the memory of the tensor."""
        length = tensor.numel() // self.size
        return tensor.view(-1).narrow(0, self.rank * length, length)

    def gather(self, tensor: torch.Tensor) -> None:
        """Fill a contiguous tensor with the shares of all ranks, of which this rank's is there.

        Raises:
            ConnectionError, TimeoutError: a rank of the stage was lost.
        """
        whole = tensor.view(-1).view(torch.uint8)  # for the dtypes that a backend has no name for
        gather(whole, self.share(whole), self.group, self._use)

    def break_off(self) -> None:
        """End all collectives of the group, and what waits for plans and decisions, from any thread."""
        self._use.end()
        break_group(self.group)
        self.transport.break_off()

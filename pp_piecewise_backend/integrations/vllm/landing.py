"""Proxies inside vLLM: received into the landing memory of a stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.parallel_state import TensorMetadata
from vllm.sequence import IntermediateTensors

from ...pipeline.transports.torch_distributed import gather
from ...runtime.stage import Proxy, Stage


class Landing:
    """The landing memory of one worker.

    Args:
        made: what the model makes as its buffers for proxies, for any number of tokens; nothing on the first stage.
        max_tokens: of one call.
        device: where the proxies lie.
        ranks: the ``GroupCoordinator`` of the ranks that hold the stage together.
    """

    def __init__(self, made: Mapping[str, torch.Tensor], max_tokens: int, device: torch.device, ranks: Any) -> None:
        proxies = {name: Proxy(tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in made.items()}
        self.stage = Stage(proxies, max_tokens, device)
        if ranks.world_size > 1:  # see Note [ranks decide alike]
            self.stage.exchange = partial(_said_by_all, ranks)
        self.in_place = 0
        """Tensors that were received where captured pieces read them."""
        self.elsewhere = 0
        """Other tensors received, which vLLM then copies."""

    def buffers(self) -> IntermediateTensors:
        """For the runner, in place of its own: copying a proxy that landed onto itself costs nothing."""
        return IntermediateTensors(self.stage.views(self.stage.max_tokens))

    def receive_from(self, pipeline: Any) -> None:
        """Have the worker's process group of the pipeline, a ``GroupCoordinator``, receive proxies here."""
        pipeline.irecv_tensor_dict = MethodType(self._receive, pipeline)

    def _receive(
        self,
        pipeline: Any,
        src: int | None = None,
        all_gather_group: Any = None,
        all_gather_tensors: dict[str, bool] | None = None,
    ) -> tuple[dict[str, Any], list[Any], list[Callable[[], None]]]:
        """``GroupCoordinator.irecv_tensor_dict`` with the same messages in the same order."""
        src = (pipeline.rank_in_group - 1) % pipeline.world_size if src is None else src
        received: dict[str, Any] = {}
        pending: list[Any] = []
        afterwards: list[Callable[[], None]] = []
        for name, value in pipeline.recv_object(src=src):
            if not isinstance(value, TensorMetadata):
                received[name] = value
                continue
            whole = received[name] = self._place(name, value)
            if whole.numel() == 0:
                continue
            part = whole
            if pipeline._should_use_all_gather(name, whole.numel(), all_gather_group, all_gather_tensors):
                ranks = all_gather_group
                part = whole.view(ranks.world_size, -1)[ranks.rank_in_group]
                afterwards.append(partial(_gather, whole, part, ranks))
            group = pipeline.cpu_group if part.is_cpu else pipeline.device_group
            pending.append(dist.irecv(part, src=pipeline.ranks[src], group=group))
        return received, pending, afterwards

    def _place(self, name: str, described: Any) -> torch.Tensor:
        """Memory for a tensor that is about to be received: landing memory, if it is one of the proxies."""
        rows = described.size[0] if described.size else 0
        if name in self.stage.inputs and 0 < rows <= self.stage.max_tokens:
            view = self.stage.views(rows)[name]
            if view.shape == described.size and view.dtype == described.dtype:
                self.in_place += 1
                return view
        self.elsewhere += math.prod(described.size) > 0
        return torch.empty(described.size, dtype=described.dtype, device=described.device)


def _said_by_all(ranks: Any, own: str) -> list[str]:
    said = [""] * ranks.world_size
    dist.all_gather_object(said, own, group=ranks.cpu_group)
    return said


def _gather(whole: torch.Tensor, part: torch.Tensor, ranks: Any) -> None:
    """Fill ``whole`` with the parts of all ranks of the stage, of which this rank's lies in it."""
    gather(whole.view(-1), part, ranks.device_group)

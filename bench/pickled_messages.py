"""What goes ahead of the tensors between the stages of today's engines."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class PickledMessages:
    """Metadata as engines send it: pickled objects, each as a message with its size and one with its bytes.

    With several lanes, `lane_count` ranks hold a stage together, and each sends to the one of its lane.
    """

    def __init__(self, stage: int, stage_count: int, object_count: int, *, lane: int = 0, lane_count: int = 1) -> None:
        self._stage = stage
        rank = stage * lane_count + lane
        self._before, self._behind = rank - lane_count, rank + lane_count
        self._object_count = object_count
        self._groups = [
            [dist.new_group([own, own + lane_count], backend="gloo") for own in range(hop, hop + lane_count)][lane]
            for hop in range(0, (stage_count - 1) * lane_count, lane_count)
        ]

    def tell(self, num_tokens: int, tag: bytes, tensors: Mapping[str, Tensor]) -> None:
        metadata = [(name, (str(t.device), t.dtype, tuple(t.shape))) for name, t in tensors.items()]
        requests = {"num_tokens": num_tokens, "tag": tag}
        objects: list[Any] = [metadata, requests] if self._object_count == 2 else [(requests, metadata)]
        group = self._groups[self._stage]
        for each in objects:
            message = torch.frombuffer(bytearray(pickle.dumps(each)), dtype=torch.uint8)
            dist.send(torch.tensor([message.numel()]), self._behind, group=group)
            dist.send(message, self._behind, group=group)

    def hear(self) -> tuple[int, bytes, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
        group = self._groups[self._stage - 1]
        objects = []
        for _ in range(self._object_count):
            size = torch.empty(1, dtype=torch.int64)
            dist.recv(size, self._before, group=group)
            message = torch.empty(int(size), dtype=torch.uint8)
            dist.recv(message, self._before, group=group)
            objects.append(pickle.loads(message.numpy().tobytes()))
        metadata, requests = objects if self._object_count == 2 else reversed(objects[0])
        return requests["num_tokens"], requests["tag"], {name: (dtype, shape) for name, (_, dtype, shape) in metadata}

    def close(self) -> None:
        for group in self._groups:
            if dist.get_rank(group) >= 0:
                dist.destroy_process_group(group)

"""What goes ahead of the tensors between the stages of today's engines."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class PickledMessages:
    """Metadata as engines send it: pickled objects, each as a message with its size and one with its bytes."""

    def __init__(self, stage: int, stage_count: int, object_count: int) -> None:
        self._before, self._behind = stage - 1, stage + 1
        self._object_count = object_count
        self._groups = [dist.new_group([hop, hop + 1], backend="gloo") for hop in range(stage_count - 1)]

    def tell(self, num_tokens: int, tag: bytes, tensors: Mapping[str, Tensor]) -> None:
        metadata = [(name, (str(t.device), t.dtype, tuple(t.shape))) for name, t in tensors.items()]
        requests = {"num_tokens": num_tokens, "tag": tag}
        objects: list[Any] = [metadata, requests] if self._object_count == 2 else [(requests, metadata)]
        group = self._groups[self._behind - 1]
        for each in objects:
            message = torch.frombuffer(bytearray(pickle.dumps(each)), dtype=torch.uint8)
            dist.send(torch.tensor([message.numel()]), self._behind, group=group)
            dist.send(message, self._behind, group=group)

    def hear(self) -> tuple[int, bytes, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
        group = self._groups[self._before]
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

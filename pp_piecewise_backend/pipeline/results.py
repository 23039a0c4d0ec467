"""What of a module's output leaves its stage, chosen by name and checked; and what the last stage answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from .. import errors
from ..runtime.stage import Proxy, Stage
from ..utils.addresses import Span, overlap, span
from ..utils.counters import Stats
from .header import Answer, Header
from .link import Sender
from .transports.base import Pending

Finish = Callable[[Any, bytes], Mapping[str, torch.Tensor]]


WAITED_SECONDS = 50e-6
"""What a wait for a send takes on the host if it has left already stays below this."""


class Sent(NamedTuple):
    """Results on their way to the next stage."""

    transfer: Pending
    sequence: int
    """Of their micro-batch."""
    begin_ns: int
    """Of ``time.time_ns()``."""


def chosen(output: Any, names: tuple[str, ...], whose: str, stats: Stats) -> dict[str, torch.Tensor]:
    """The tensors of these names, contiguous and none of them one of the output's; a copy that takes is counted.

    Args:
        whose: what returned the output, for errors: such as "the module of stage 0".

    Raises:
        ValueError: the output is no dict with these names.
    """
    if not isinstance(output, Mapping) or not set(names) <= output.keys():
        got = f"a dict with {list(output)}" if isinstance(output, Mapping) else type(output).__name__
        raise ValueError(errors.stage_returned(whose, got, names))
    tensors = {name: output[name] for name in names}
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_contiguous():
            tensors[name] = tensor.view(tensor.shape)
        elif isinstance(tensor, torch.Tensor):
            tensors[name] = tensor.contiguous()
            stats.add("proxy_copies")
    return tensors


def lies_in(places: Iterable[Span], output: Any) -> bool:
    """Whether a tensor of a module's output, if that is a dict, lies in one of these places in memory."""
    tensors = output.values() if isinstance(output, Mapping) else ()
    spans = [span(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor)]
    return any(overlap(*both) for both in itertools.product(spans, places))


class Answers:
    """What the last stage sends to the first one for each micro-batch.

    Args:
        link: to the first stage.
        proxies: the tensors of feedback; none, where only notices are sent.
        stage: whose rows and device feedback must fit.
        number: of the stage, for errors.
        finish: ``(output of the module, tag)`` -> feedback; None: feedback is among the module's output.
        rows_are_tokens: whether feedback has as many rows as its micro-batch has tokens, so that it can be announced
            before the forward.
        stats: counts ``proxy_copies``.
    """

    def __init__(
        self,
        link: Sender,
        proxies: Mapping[str, Proxy],
        stage: Stage,
        number: int,
        finish: Finish | None,
        rows_are_tokens: bool,
        stats: Stats,
    ) -> None:
        self._link = link
        self._proxies = dict(proxies)
        self._names = tuple(proxies)
        self._stage = stage
        self._finish = finish
        self._whose = f"the module of stage {number}" if finish is None else f"finish on stage {number}"
        self._rows_are_tokens = rows_are_tokens
        self._stats = stats
        self._announced: Header | None = None
        """Of the feedback that is to be sent next, if the first stage knows of it already."""
        self.sent: Pending | None = None
        """The last feedback, while it may be on its way."""

    def announce(self, num_tokens: int, tag: bytes) -> None:
        """Let the first stage's host go on before this one has enqueued the forward, where that is possible.

        Raises:
            PeerLost: the pipeline broke.
        """
        if self._rows_are_tokens:
            self._announced = self._link.announce(num_tokens, tag)

    def send(self, answer: Answer, tag: bytes, output: Any) -> None:
        """Answer to a micro-batch whose forward gave ``output``; not called where nothing is to be answered.

        Raises:
            ValueError: feedback is not what was declared, or has other rows than were announced.
            PeerLost: the pipeline broke.
            Whatever ``finish`` raises.
        """
        if answer is Answer.NOTICE:
            self._link.notice(tag)
            return
        tensors = self._feedback(output, tag)
        self.wait()
        rows = tensors[self._names[0]].shape[0]
        header, self._announced = self._announced, None
        if header is None:
            header = self._link.announce(rows, tag)
        elif rows != header.num_tokens:
            raise ValueError(errors.feedback_has_other_rows(self._whose, rows, header.num_tokens))
        self.sent = self._link.send(header, tensors)

    @property
    def are_finished_here(self) -> bool:
        """Whether code of the user makes feedback, and may read on the host what it makes it of."""
        return self._finish is not None

    def wait(self) -> None:
        """Return when the last feedback has left."""
        sent, self.sent = self.sent, None
        if sent is not None:
            sent.wait()

    def _feedback(self, output: Any, tag: bytes) -> Mapping[str, torch.Tensor]:
        if self._finish is not None:
            output = self._finish(output, tag)
            if isinstance(output, Mapping) and (others := output.keys() - self._proxies.keys()):
                raise ValueError(errors.finish_returned_others(self._whose, sorted(map(str, others)), self._names))
        tensors = chosen(output, self._names, self._whose, self._stats)
        rows = self._rows(tensors[self._names[0]])
        for name, proxy in self._proxies.items():
            tensor: Any = tensors[name]
            if rows is None or not self._fits(tensor, rows, proxy):
                is_tensor = isinstance(tensor, torch.Tensor)
                got = f"{tensor.dtype}{list(tensor.shape)} on {tensor.device}" if is_tensor else type(tensor).__name__
                shape = ", ".join([str(rows or "rows"), *map(str, proxy.shape)])
                expected = f"{proxy.dtype}[{shape}] on {self._stage.device}"
                raise ValueError(errors.feedback_differs(self._whose, name, got, expected, self._stage.max_tokens))
        return tensors

    def _rows(self, tensor: Any) -> int | None:
        """As many as a micro-batch may have, else None."""
        rows = tensor.shape[0] if isinstance(tensor, torch.Tensor) and tensor.ndim else 0
        return rows if 0 < rows <= self._stage.max_tokens else None

    def _fits(self, tensor: Any, rows: int, proxy: Proxy) -> bool:
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != self._stage.device.type:
            return False
        return tensor.dtype == proxy.dtype and tensor.shape == (rows, *proxy.shape)

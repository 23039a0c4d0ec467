"""``transport="auto"``: link by link, the way that works, and where two do, the faster one.

Note [when NCCL pays]
A trial measures how long one transfer takes while nothing else runs. What it does not see speaks for shared memory: a
transfer over NCCL is two kernels, each of which takes multiprocessors from the forward while it waits for the other,
and costs both hosts a few hundred microseconds more in each step [two H200]. So NCCL has to be faster by more than what
trials of the same link differ by.

Note [one decision for both ends]
Whether a way works, and how fast it is, each end finds for itself, and two ends may find different things. So what
they find is exchanged, the sending end decides, and its decision travels to all ranks of the pipeline: no end acts on
what it found alone. A trial of shared memory has a link of its own, since it leaves memory behind that nobody needs.
Groups of ``torch.distributed`` are too slow to make twice, and are those of the link if it is chosen.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ... import errors
from .base import MESSAGE_BYTES, LinkChoice, Wire
from .one_machine import KindOfSharing, OneMachine, OneMachineWire
from .torch_distributed import P2P, P2PWire

_LOG = logging.getLogger(__name__)

_REPEATS = 10
_PAYS = 0.7
"""At most that part of the time of shared memory, in the mean of the sizes; see Note [when NCCL pays]."""
_LONGEST_TRIAL_SECONDS = 60.0
_PATTERN = 171
_ARRIVED, _DIFFERS = (bytes([code]) + bytes(MESSAGE_BYTES - 1) for code in (1, 2))


class Auto:
    """One rank's way to the others of its pipeline, see Note [one decision for both ends].

    Args:
        p2p: how ranks meet, and the way to other machines.
        kind: how memory is shared on one machine.
    """

    name = "auto"

    def __init__(self, p2p: P2P, kind: KindOfSharing) -> None:
        self.stage = p2p.stage
        self.stage_count = p2p.stage_count
        self.ranks: Sequence[int] = p2p.ranks
        self.exchange = p2p.exchange
        self.choices: list[LinkChoice] = []
        """Of all links of the pipeline so far."""
        self._p2p = p2p
        self._kind = kind
        self._one_machine = OneMachine(p2p, kind)

    def wire(
        self, source: int, target: int, name: str, sizes_bytes: Sequence[int] = ()
    ) -> OneMachineWire | P2PWire | None:
        is_end = self.stage in (source, target)
        link = name, self.ranks[source], self.ranks[target]
        if not self._one_machine.can_share(source, target):
            self.choices.append(LinkChoice(*link, transport=self._p2p.name))
            return self._p2p.wire(source, target, name)
        is_timed = self._one_machine.has_rival(source, target)
        sizes_bytes = [max(1, num_bytes) for num_bytes in sizes_bytes or (1,)]
        found = {self._kind.name: self._try_sharing(source, target, sizes_bytes, is_timed)}
        failed_somewhere = any(self.exchange(found[self._kind.name][0]))
        p2p_wire: P2PWire | None = None
        if is_timed or failed_somewhere:
            p2p_wire, found[self._p2p.name] = self._try_p2p(source, target, name, sizes_bytes, is_timed)
        texts = self.exchange(json.dumps(found))
        choice = _decide(link, sizes_bytes, json.loads(texts[source]), json.loads(texts[target]))
        # The decision of the sending end, whatever this rank would find.
        choice = LinkChoice(**json.loads(self.exchange(json.dumps(asdict(choice)))[source]))
        self.choices.append(choice)
        if is_end:
            _log(choice)
        if not choice.transport:
            raise errors.PeerLost(errors.no_transport_works(str(choice)))
        if choice.transport == self._p2p.name:
            return p2p_wire
        if p2p_wire is not None:
            self._p2p.discard(p2p_wire)
        return self._one_machine.wire(source, target, name)

    def _try_sharing(
        self, source: int, target: int, sizes_bytes: Sequence[int], is_timed: bool
    ) -> tuple[str, list[float]]:
        """Why this end cannot share memory, or nothing; and how long transfers took, at the sending end."""
        wire: OneMachineWire | None = None
        with self._one_machine.meeting(source, target) as connect:
            if connect is None:
                return "", []
            try:
                wire = connect(self._longest_seconds)
                return "", self._trial(wire, source, sizes_bytes, is_timed)
            except Exception as error:
                return _cause(error), []
            finally:
                if wire is not None:
                    wire.break_data()  # a stream may wait for what never comes
                    wire.close()

    def _try_p2p(
        self, source: int, target: int, name: str, sizes_bytes: Sequence[int], is_timed: bool
    ) -> tuple[P2PWire | None, tuple[str, list[float]]]:
        """The wire, and the same over ``torch.distributed``."""
        wire: P2PWire | None = None
        try:
            wire = self._p2p.wire(source, target, name)
            return wire, ("", [] if wire is None else self._trial(wire, source, sizes_bytes, is_timed))
        except Exception as error:
            if wire is not None:  # the other end must not wait for this one
                wire.break_data()
                wire.break_control()
            return wire, (_cause(error), [])

    def _trial(self, wire: Wire, source: int, sizes_bytes: Sequence[int], is_timed: bool) -> list[float]:
        sizes_bytes = sizes_bytes if is_timed else sizes_bytes[:1]
        probe = _Probe(wire, max(sizes_bytes), self._p2p.device, self._longest_seconds)
        repeats = _REPEATS if is_timed else 0
        with _on_a_stream_of_its_own(self._p2p.device):
            if self.stage == source:
                return probe.sends(sizes_bytes, repeats)
            probe.receives(sizes_bytes, repeats)
            return []

    @property
    def _longest_seconds(self) -> float:
        return min(self._p2p.setup_seconds, _LONGEST_TRIAL_SECONDS)

    def break_off(self) -> None:
        self._p2p.break_off()

    def close(self) -> None:
        self._p2p.close()


@contextlib.contextmanager
def _on_a_stream_of_its_own(device: torch.device) -> Iterator[None]:
    """What a trial that fails leaves on it holds up nobody."""
    stream = contextlib.nullcontext() if device.type == "cpu" else torch.Stream(device)
    with torch.inference_mode(False), torch.no_grad(), stream:
        yield


class _Probe:
    """One end of a link on trial; both ends are given the same sizes and repeats.

    Raises:
        ConnectionError, TimeoutError: what was sent did not arrive.
        Whatever the device raises.
    """

    def __init__(self, wire: Wire, most_bytes: int, device: torch.device, longest_seconds: float) -> None:
        self._wire = wire
        self._most_bytes = most_bytes
        self._device = device
        self._longest_seconds = longest_seconds

    def sends(self, sizes_bytes: Sequence[int], repeats: int) -> list[float]:
        """Microseconds for each size from here until it can be used there; nothing without repeats."""
        wire = self._wire
        sent = torch.full((self._most_bytes,), _PATTERN, dtype=torch.uint8, device=self._device)
        for num_bytes in sizes_bytes:
            wire.send([sent[:num_bytes]]).wait()
            self._synchronize()
            wire.tell(_ARRIVED)  # the other end waits for nothing that was not sent
            if wire.hear(self._longest_seconds) != _ARRIVED:
                raise ConnectionError(errors.LANDED_DIFFERS)
        if not repeats:
            return []
        answers_us = []
        for _ in range(repeats):
            begin_ns = time.perf_counter_ns()
            wire.tell(_ARRIVED)
            wire.hear(self._longest_seconds)
            answers_us.append((time.perf_counter_ns() - begin_ns) / 1e3)
        wire.hear(self._longest_seconds)  # it has named the first place
        return [self._time_us(sent[:num_bytes], repeats) - min(answers_us) / 2 for num_bytes in sizes_bytes]

    def _time_us(self, tensor: torch.Tensor, repeats: int) -> float:
        taken_us = []
        for _ in range(repeats):
            begin_ns = time.perf_counter_ns()
            self._wire.send([tensor]).wait()
            self._wire.hear(self._longest_seconds)
            taken_us.append((time.perf_counter_ns() - begin_ns) / 1e3)
        return min(taken_us)

    def receives(self, sizes_bytes: Sequence[int], repeats: int) -> None:
        """The other end of ``sends``."""
        wire = self._wire
        memory = wire.landing_memory(self._most_bytes)
        if memory is None:
            memory = torch.zeros(self._most_bytes, dtype=torch.uint8, device=self._device)
            self._synchronize()
        for num_bytes in sizes_bytes:
            landed = wire.receive([memory[:num_bytes]])
            wire.hear(self._longest_seconds)
            landed.wait()
            self._synchronize()
            is_right = bool(memory[:num_bytes].eq(_PATTERN).all())
            wire.tell(_ARRIVED if is_right else _DIFFERS)
        if not repeats:
            return
        for _ in range(repeats):
            wire.hear(self._longest_seconds)
            wire.tell(_ARRIVED)
        # As while micro-batches run, a place is named before what lands there is sent.
        places = [memory[:num_bytes] for num_bytes in sizes_bytes for _ in range(repeats)]
        landed = wire.receive([places[0]])
        wire.tell(_ARRIVED)
        for place in [*places[1:], None]:
            landed.wait()
            self._synchronize()
            if place is not None:
                landed = wire.receive([place])
            wire.tell(_ARRIVED)

    def _synchronize(self) -> None:
        """Return once the current stream has run, not later than it may take: the other end may be gone."""
        if self._device.type == "cpu":
            return
        run = torch.accelerator.current_stream(self._device).record_event()
        deadline = time.monotonic() + self._longest_seconds
        while not run.query():
            if time.monotonic() > deadline:
                raise TimeoutError(errors.trial_takes_too_long(self._longest_seconds))
            time.sleep(0)


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".: ")


def _decide(link: tuple[str, int, int], sizes_bytes: Sequence[int], at_source: Any, at_target: Any) -> LinkChoice:
    """What the sending end makes of what both ends found; see ``Auto._try_sharing`` for its form."""
    ends = (link[1], at_source), (link[2], at_target)
    failed = {
        way: ", ".join(f"on rank {rank}: {found[way][0]}" for rank, found in ends if found[way][0]) for way in at_source
    }
    times_us = {way: [round(us, 1) for us in found[1]] for way, found in at_source.items() if found[1]}
    works = [way for way, cause in failed.items() if not cause]

    def slowness(way: str) -> float:
        """Of all sizes alike: how much longer one way takes than another, not how many microseconds."""
        handicap = 1 / _PAYS if way == P2P.name else 1.0
        return math.prod(handicap * max(us, 0.1) for us in times_us.get(way, ()))

    return LinkChoice(
        *link,
        transport=min(works, key=slowness) if works else "",
        sizes_bytes=[*sizes_bytes] if times_us else [],
        times_us=times_us,
        failed={way: cause for way, cause in failed.items() if cause},
    )


def _log(choice: LinkChoice) -> None:
    if choice.failed:
        _LOG.warning("%s", choice)
    elif choice.times_us:
        _LOG.info("%s", choice)

"""Where the time of a pipeline goes: each rank measures itself, and all learn of all when their runs end.

Note [times of all ranks]
A rank that has ended its run says its times to its neighbours, in one message per rank, and passes on what it hears. So
a report needs no collective, nobody waits for it while micro-batches fly, and a rank that is late or lost is missing in
it. Messages of a link keep their order: when a rank has closed, it knows the times of all that closed in order.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch

from .positions import DeviceWork, Place, Step
from .transports.base import LinkChoice

WaitKind = Literal["receive", "send", "feedback"]

TIMED_STEPS = 8
"""On a GPU, one forward in so many is timed by events."""
_POLL_SECONDS = 0.05
_LAYOUT = struct.Struct("<6f")


@dataclass(frozen=True)
class RankTimes:
    """Where the time of one rank went, per micro-batch on average, in microseconds, from its first to its last step.

    On the CPU, forward, the three waits and host add up to ``step_us``. On a GPU ``forward_us`` is measured on the
    device, on some of the micro-batches, and the host works meanwhile: there ``host_us`` has its launches, too.
    """

    rank: int
    micro_batches: int
    step_us: float = 0.0
    """From one micro-batch to the next."""
    forward_us: float = 0.0
    """In the compiled module."""
    receive_us: float = 0.0
    """The host waits for headers and proxies of the previous stage."""
    send_us: float = 0.0
    """It waits until results have left, whose memory is to be written."""
    feedback_us: float = 0.0
    """On the first stage: it waits for feedback, or for room in flight."""
    host_us: float = 0.0
    """All else: the caller's code, ``make_inputs``, ``finish``, and the runner itself."""

    @property
    def busy_us(self) -> float:
        """What this rank needs for a micro-batch, whichever of device and host is longer where both work at once."""
        return max(self.step_us - self.receive_us - self.send_us - self.feedback_us, self.forward_us)

    @property
    def bubble_percent(self) -> float:
        """The share of its step in which it waits for other ranks."""
        return max(0.0, 100 * (1 - self.busy_us / self.step_us)) if self.step_us else 0.0

    def to_bytes(self) -> bytes:
        """24 bytes, without rank and micro-batches."""
        return _LAYOUT.pack(
            self.step_us, self.forward_us, self.receive_us, self.send_us, self.feedback_us, self.host_us
        )

    @classmethod
    def from_bytes(cls, rank: int, micro_batches: int, packed: bytes) -> RankTimes:
        return cls(rank, micro_batches, *_LAYOUT.unpack(packed.ljust(_LAYOUT.size, b"\0")))


@dataclass(frozen=True)
class PipelineReport:
    """Why a pipeline is as fast as it is; as text, a table of its ranks and the verdict."""

    ranks: tuple[RankTimes, ...]
    """In stage order, those that are known."""
    missing: tuple[int, ...] = ()
    """Ranks that were not heard of."""
    links: tuple[LinkChoice, ...] = ()
    """Which transport each link has, where there was a choice."""

    @property
    def bubble_percent(self) -> float:
        """The mean of those of the ranks."""
        return sum(times.bubble_percent for times in self.ranks) / len(self.ranks) if self.ranks else 0.0

    @property
    def slowest(self) -> RankTimes | None:
        """The rank that needs most for a micro-batch; None if no rank ran any."""
        return max((times for times in self.ranks if times.micro_batches), key=lambda t: t.busy_us, default=None)

    @property
    def verdict(self) -> str:
        """Such as "bubble 23 %, rank 1 is the slowest, 60 % of its step is host"."""
        slowest = self.slowest
        if slowest is None or not slowest.step_us:
            return "no micro-batch was run"
        parts = {
            "forward": slowest.forward_us,
            "host": slowest.host_us,
            "waiting to receive": slowest.receive_us,
            "waiting for its send": slowest.send_us,
            "waiting for feedback": slowest.feedback_us,
        }
        what = max(parts, key=parts.__getitem__)
        share = 100 * parts[what] / slowest.step_us
        bubble = f"bubble {self.bubble_percent:.0f} %"
        sentence = f"{bubble}, rank {slowest.rank} is the slowest, {share:.0f} % of its step is {what}"
        return sentence + (f"; not heard of: rank {', '.join(map(str, self.missing))}" if self.missing else "")

    def __str__(self) -> str:
        names = ("rank", "steps", "step us", "forward", "receive", "send", "feedback", "host", "bubble %")
        lines = ["  ".join(name.rjust(max(len(name), 8)) for name in names)]
        for t in self.ranks:
            parts = t.step_us, t.forward_us, t.receive_us, t.send_us, t.feedback_us, t.host_us, t.bubble_percent
            cells = [str(t.rank), str(t.micro_batches), *(f"{part:.0f}" for part in parts)]
            lines.append("  ".join(cell.rjust(max(len(name), 8)) for cell, name in zip(cells, names, strict=True)))
        chosen = [str(link) for link in self.links if link.times_us or link.failed]
        return "\n".join([*lines, *chosen, self.verdict])


_WAITS = {"receive": Step.TENSORS, "send": Step.LEAVING, "feedback": Step.FEEDBACK}
"""Where a rank is that waits within its step."""
_OWN_CODE = {Step.INPUTS: "make_inputs", Step.FORWARD: "forward", Step.FINISH: "finish", Step.SENDING: "results"}


class LateStep(NamedTuple):
    """A step that takes too long, and goes on."""

    micro_batch: int
    part: str
    """What of the step is under way."""
    thread: int
    """Which runs it."""


class StepClock:
    """Adds up where the host's time of one rank goes, in the thread that runs its micro-batches.

    What is noted counts once the step that follows it has ended, so that neither the time in which the pipeline fills
    nor what happens after the last micro-batch is in it.

    Args:
        device: of the stage.
        watches_device: whether ``late_step`` is to find work of the device, too, which costs two events in each step.
    """

    def __init__(self, device: torch.device, watches_device: bool = False) -> None:
        self._device = device
        self._is_async = device.type != "cpu"
        self._work = DeviceWork(lambda: torch.Event(device)) if watches_device and self._is_async else None
        self._in_forward = False
        self._steps = 0
        self._begin_ns = self._end_ns = 0
        self._taken_ns = {"receive": 0, "send": 0, "feedback": 0, "forward": 0}
        self._counted_ns = dict(self._taken_ns)
        """What was taken when the last step ended."""
        self._waited_ns = self._waited_before_ns = self._forward_begin_ns = 0
        """Waits of all kinds, and those before the forward."""
        self._step_ns = self._waited_before_step_ns = 0
        """When the step under way began, 0 without one; and what was waited before it."""
        self._wait_ns = 0
        """When the wait under way began; 0 without one."""
        self._wait_kind: WaitKind = "receive"
        self._coming: int | None = None
        """The micro-batch whose header has come, while its tensors are waited for."""
        self.micro_batch: int | None = None
        """Whose step runs or ran last."""
        self._place = Place(Step.SETTING_UP, None, time.perf_counter_ns())
        """Where this rank is, or was when it began to wait."""
        self._thread: int | None = None
        self._events: tuple[torch.Event, torch.Event] | None = None
        self._stream: torch.Stream | None = None
        """Of the forward that is timed by events, if it is."""
        self._is_timing = False
        """Whether events were recorded and not read yet."""
        self._device_us, self._device_steps = 0.0, 0

    def begins(self, step: Step) -> None:
        """This rank is there from now on, also outside of micro-batches."""
        self._place = Place(step, self.micro_batch, time.perf_counter_ns())

    def place(self) -> Place:
        """Where this rank is now; for any thread."""
        wait_ns, kind, coming, place = self._wait_ns, self._wait_kind, self._coming, self._place
        if not wait_ns:
            return place
        if kind != "receive" or self._step_ns:
            return Place(_WAITS[kind], self.micro_batch, wait_ns)
        if coming is not None:
            return Place(Step.TENSORS, coming, wait_ns)
        return Place(Step.HEADER, 0 if self.micro_batch is None else self.micro_batch + 1, wait_ns)

    def wait_begins(self, kind: WaitKind) -> int:
        """This thread waits for another rank from now on: ``time.perf_counter_ns()``, for ``waited``."""
        now_ns = time.perf_counter_ns()
        if self._thread is None or threading.get_ident() == self._thread:
            self._wait_kind, self._wait_ns = kind, now_ns
            if self._in_forward and self._work is not None:
                self._work.ends()
        return now_ns

    def header_came(self, micro_batch: int) -> None:
        """Within a wait for the next micro-batch: its tensors are waited for from now on."""
        self._coming = micro_batch

    def waited(self, kind: WaitKind, begin_ns: int) -> None:
        """This thread waited for another rank, since ``time.perf_counter_ns()`` was ``begin_ns``."""
        if self._thread is None:
            self._wait_ns = 0
        elif threading.get_ident() == self._thread:
            taken_ns = time.perf_counter_ns() - begin_ns
            self._taken_ns[kind] += taken_ns
            self._waited_ns += taken_ns
            self._wait_ns = 0
            self._device_begins()

    def step_begins(self, micro_batch: int) -> None:
        begin_ns = time.perf_counter_ns()
        if self._thread is None:
            self._thread = threading.get_ident()
            self._begin_ns = begin_ns
        self.micro_batch, self._coming, self._wait_ns = micro_batch, None, 0
        self._place, self._waited_before_step_ns = Place(Step.INPUTS, micro_batch, begin_ns), self._waited_ns
        self._step_ns = begin_ns

    def step_ends(self) -> None:
        self._step_ns = 0
        self._end_ns = time.perf_counter_ns()
        self._place = Place(Step.CALLER, self.micro_batch, self._end_ns)
        self._steps += 1
        self._counted_ns = self._taken_ns.copy()

    def late_step(self, longest_seconds: float) -> LateStep | None:
        """The step under way, if it has taken longer by now, waits for other ranks not counted; for any thread.

        Or an earlier one, whose forward the device does not end.
        """
        if self._work is not None and (late := self._work.late(longest_seconds)) is not None:
            assert self._thread is not None
            return LateStep(late, "GPU forward", self._thread)
        step_ns, wait_ns, waited_ns = self._step_ns, self._wait_ns, self._waited_ns - self._waited_before_step_ns
        until_ns = wait_ns or time.perf_counter_ns()
        if not step_ns or until_ns - step_ns - waited_ns <= 1e9 * longest_seconds or step_ns != self._step_ns:
            return None
        assert self.micro_batch is not None and self._thread is not None
        return LateStep(self.micro_batch, _OWN_CODE.get(self._place.step, "results"), self._thread)

    def forward_begins(self) -> None:
        if self._is_async and self._steps % TIMED_STEPS == 0 and self._are_events_free():
            assert self._events is not None
            self._stream = torch.accelerator.current_stream(self._device)
            self._events[0].record(self._stream)
        self._waited_before_ns, self._forward_begin_ns = self._waited_ns, time.perf_counter_ns()
        self._place = Place(Step.FORWARD, self.micro_batch, self._forward_begin_ns)
        self._in_forward = True
        self._device_begins()

    def _device_begins(self) -> None:
        if self._in_forward and self._work is not None and self.micro_batch is not None:
            self._work.begins(self.micro_batch)

    def forward_ends(self) -> None:
        """The forward took what has passed, but for the waits in it."""
        if self._work is not None:
            self._work.ends()
        self._in_forward = False
        now_ns = time.perf_counter_ns()
        self._place = Place(Step.SENDING, self.micro_batch, now_ns)
        waits_ns = self._waited_ns - self._waited_before_ns
        self._taken_ns["forward"] += now_ns - self._forward_begin_ns - waits_ns
        if self._stream is not None and self._events is not None:
            self._events[1].record(self._stream)
            self._stream, self._is_timing = None, True

    def _are_events_free(self) -> bool:
        if self._events is None:
            make = [torch.Event(self._device, enable_timing=True) for _ in range(2)]
            self._events = make[0], make[1]
        begin, end = self._events
        if self._is_timing and end.query():
            self._device_us += 1e3 * begin.elapsed_time(end)
            self._device_steps += 1
            self._is_timing = False
        return not self._is_timing

    def times(self, rank: int) -> RankTimes:
        """Of the steps so far."""
        if not self._steps:
            return RankTimes(rank, 0)
        step_us = (self._end_ns - self._begin_ns) / 1e3 / self._steps
        waits = {kind: taken_ns / 1e3 / self._steps for kind, taken_ns in self._counted_ns.items()}
        forward_us = waits.pop("forward")
        host_us = step_us - sum(waits.values())
        if not self._is_async:
            host_us -= forward_us
        else:
            self._are_events_free()
            forward_us = self._device_us / self._device_steps if self._device_steps else 0.0
        return RankTimes(
            rank,
            self._steps,
            step_us=step_us,
            forward_us=forward_us,
            receive_us=waits["receive"],
            send_us=waits["send"],
            feedback_us=waits["feedback"],
            host_us=max(0.0, host_us),
        )


class TellsTimes(Protocol):
    """One end of a link between stages."""

    def tell_times(self, stage: int, times: RankTimes) -> None:
        """Say to the neighbour what is known of a stage, if it still listens."""


class TimesOfRanks:
    """What this rank knows of the times of all, see Note [times of all ranks]."""

    def __init__(self, ranks: Sequence[int], own_stage: int) -> None:
        self._ranks = list(ranks)
        self._own_stage = own_stage
        self._known: dict[int, RankTimes] = {}
        self._ends: list[TellsTimes] = []
        self._changed = threading.Condition()

    def add(self, end: TellsTimes) -> None:
        with self._changed:
            self._ends.append(end)
            known = dict(self._known)
        for stage, times in known.items():
            end.tell_times(stage, times)

    def publish(self, own: RankTimes) -> None:
        """This rank's run has ended; a second call does nothing."""
        if self._own_stage not in self._known:
            # as it travels, so that all ranks have equal reports
            self._note(self._own_stage, RankTimes.from_bytes(own.rank, own.micro_batches, own.to_bytes()), None)

    def hear(self, stage: int, micro_batches: int, packed: bytes, end: TellsTimes) -> None:
        """``end`` was notified of a stage."""
        if 0 <= stage < len(self._ranks):
            self._note(stage, RankTimes.from_bytes(self._ranks[stage], micro_batches, packed), end)

    def _note(self, stage: int, times: RankTimes, heard_from: TellsTimes | None) -> None:
        with self._changed:
            self._known[stage] = times
            self._changed.notify_all()
            ends = list(self._ends)
        for end in ends:
            if end is not heard_from:
                end.tell_times(stage, times)

    def report(
        self,
        own: RankTimes,
        longest_seconds: float,
        is_over: Callable[[], bool],
        links: Sequence[LinkChoice] = (),
    ) -> PipelineReport:
        """Of all ranks, once this one's run has ended; of this one alone before.

        Args:
            own: this rank's times so far.
            longest_seconds: how long to wait for the others, whose runs may end later.
            is_over: whether nothing more can be heard.
            links: how they came to their transport.
        """
        deadline = time.monotonic() + longest_seconds
        with self._changed:
            while self._own_stage in self._known and len(self._known) < len(self._ranks):
                if is_over() or time.monotonic() > deadline:
                    break
                self._changed.wait(_POLL_SECONDS)
            known = dict(self._known) if self._own_stage in self._known else {self._own_stage: own}
        missing = [rank for stage, rank in enumerate(self._ranks) if stage not in known]
        return PipelineReport(tuple(times for _, times in sorted(known.items())), tuple(missing), tuple(links))

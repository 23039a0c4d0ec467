"""Stages of a pipeline that hand over micro-batches, in threads or in processes, and what their tests ask of them.

A scenario is a function of one stage. ``run`` plays it on every stage over one transport and gives what each returned
or raised.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import math
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pp_piecewise_backend.pipeline.connect import Links, make_links
from pp_piecewise_backend.pipeline.header import Header, Kind
from pp_piecewise_backend.pipeline.link import Receiver, Sender
from pp_piecewise_backend.pipeline.plan import Schema, StagePlan
from pp_piecewise_backend.pipeline.transports.base import MESSAGE_BYTES, Patience, Transport
from pp_piecewise_backend.pipeline.transports.local import LocalHub
from pp_piecewise_backend.pipeline.transports.tensor_parallel import TensorParallel
from pp_piecewise_backend.runtime.cudagraphs.ladder import Ladder
from pp_piecewise_backend.runtime.stage import Proxy
from pp_piecewise_backend.utils.counters import Stats
from rank_processes import LONGEST_SECONDS, SETUP_SECONDS, Ended, run_ranks, waited_seconds

MAX_TOKENS = 16
PROXIES = Schema({"hidden_states": Proxy((8,), torch.float32), "residual": Proxy((2, 3), torch.bfloat16)})
FEEDBACK = Schema({"tokens": Proxy((), torch.int64)})
SILENCE_SECONDS = 2.0
MARGIN_SECONDS = 2.0
"""On top of what ranks measurably waited for a processor."""
ON_GPUS = ("cuda_ipc", "nccl", "auto on GPUs")
"""Transports under which each rank has its tensors on a GPU, which several may share under the first."""


@dataclass
class Stage:
    """What a scenario gets."""

    number: int
    count: int
    rank: int
    connect: Callable[..., Links]
    """Takes changes to the plan of this stage as keywords."""
    transport: Transport
    patience: Patience
    stats: Stats
    is_process: bool
    arguments: Mapping[str, Any]

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def is_last(self) -> bool:
        return self.number == self.count - 1


@dataclass
class Outcome:
    """How one stage ended."""

    value: Any = None
    error: str | None = None
    """Name of the exception's class."""
    message: str = ""
    raised_at: float = 0.0
    """When the stage had the error, or its value, in seconds since the epoch."""
    ended_at: float = 0.0
    """When its process had ended, likewise; that of a thread ends at once."""
    exit_code: int = 0
    waited_seconds: float = 0.0
    """How long it waited for a processor after the fault; of threads, all of them together, from their start."""
    log: str = field(default="", repr=False)


def plan_of(stage: int, count: int, **changes: Any) -> StagePlan:
    plan = StagePlan(
        package_version="0.1",
        stage_count=count,
        ladder=Ladder((1, 2, 4, 8, MAX_TOKENS)),
        inputs=PROXIES if stage > 0 else None,
        outputs=PROXIES if stage < count - 1 else None,
        feedback=FEEDBACK if count > 1 else None,
    )
    return replace(plan, **changes)


def with_layout(schema: Schema, layout: str) -> Schema:
    return Schema({name: replace(proxy, layout=layout) for name, proxy in schema.proxies.items()})


def memory(schema: Schema) -> dict[str, torch.Tensor]:
    return {name: torch.zeros((MAX_TOKENS, *p.shape), dtype=p.dtype) for name, p in schema.proxies.items()}


def landing_memory(receiver: Receiver | None) -> dict[str, torch.Tensor]:
    """Where the tensors of a link may land; none without a link."""
    if receiver is None:
        return {}
    whole = memory(receiver.schema)
    for name, block in receiver.landing_memory(MAX_TOKENS).items():
        assert block.data_ptr() % 256 == 0 and block.storage_offset() == 0 and not block.any()
        whole[name] = block[: whole[name].nbytes].view(whole[name].dtype).view(whole[name].shape)
    return whole


def rows(tensors: Mapping[str, torch.Tensor], num_tokens: int) -> dict[str, torch.Tensor]:
    return {name: tensor[:num_tokens] for name, tensor in tensors.items()}


def values(sequence: int, num_tokens: int) -> dict[str, torch.Tensor]:
    """What stage 0 sends as micro-batch ``sequence``; exact in every dtype."""
    base = torch.arange(num_tokens * 8).view(num_tokens, 8) % 50 + sequence % 7
    return {
        "hidden_states": base.float(),
        "residual": (base[:, :6].reshape(num_tokens, 2, 3) % 16).bfloat16(),
    }


# ------------------------------------------------------------------------------------ scenarios


def steady(stage: Stage) -> dict[str, Any]:
    """Random numbers of tokens through the pipeline, each stage adding 1, with feedback to the first one."""
    proxies = with_layout(PROXIES, stage.arguments.get("layout", "replicated"))
    links = stage.connect(inputs=None if stage.is_first else proxies, outputs=None if stage.is_last else proxies)
    count, delay_seconds = stage.arguments.get("microbatches", 30), stage.arguments.get("delay_seconds", 0.0)
    chosen = random.Random(1).choices(range(1, MAX_TOKENS + 1), k=count)
    own_random = random.Random(stage.rank)
    landing, outgoing = landing_memory(links.incoming), memory(PROXIES)
    tokens = landing_memory(links.feedback_in) if stage.is_first else memory(FEEDBACK)
    observer = Observer(landing, tokens)
    sending = None
    seen, told = [], []
    # Threads would take one another's patches for the originals, and leave some behind.
    with observer if stage.is_process else contextlib.nullcontext():
        for sequence in range(count):
            if stage.is_first:
                num_tokens, tag = chosen[sequence], f"id {sequence}".encode()
                arrived = values(sequence, num_tokens)
            else:
                header = links.incoming.next_header()
                num_tokens, tag = header.num_tokens, header.tag
                views = rows(landing, num_tokens)
                links.incoming.receive(header, views).wait()
                arrived = {name: view.clone() for name, view in views.items()}
                expected = values(sequence, num_tokens)
                assert all(torch.equal(arrived[name], expected[name] + stage.number) for name in expected), sequence
                assert header.bucket_tokens == next(b for b in (1, 2, 4, 8, 16) if b >= num_tokens)
            seen.append((num_tokens, tag.decode()))
            time.sleep(own_random.random() * delay_seconds)
            if sending is not None:
                sending.wait()
            if links.outgoing is not None:
                announced = links.outgoing.announce(num_tokens, tag)
                for name, view in rows(outgoing, num_tokens).items():
                    view.copy_(arrived[name] + 1)
                sending = links.outgoing.send(announced, rows(outgoing, num_tokens))
            elif links.feedback_out is not None:
                announced = links.feedback_out.announce(num_tokens, tag)
                tokens["tokens"][:num_tokens] = torch.arange(num_tokens) + sequence
                sending = links.feedback_out.send(announced, rows(tokens, num_tokens))
            if stage.is_first and sequence >= 2:
                told.append(_feedback(links.feedback_in, tokens))
        if stage.is_first:
            links.outgoing.say_stop()
            while len(told) < count:
                told.append(_feedback(links.feedback_in, tokens))
            assert told == [(f"id {i}", [i + row for row in range(num_tokens)]) for i, num_tokens in enumerate(chosen)]
        else:
            assert links.incoming.next_header() is None
            assert links.incoming.next_header() is None
        if sending is not None:
            sending.wait()
    links.close()
    return {"seen": seen, "stats": stage.stats.as_dict(), "observed": observer.counts}


def _feedback(receiver: Receiver, tokens: Mapping[str, torch.Tensor]) -> tuple[str, list[int]]:
    header = receiver.next_header()
    receiver.receive(header, rows(tokens, header.num_tokens)).wait()
    return header.tag.decode(), tokens["tokens"][: header.num_tokens].tolist()


class Observer:
    """Sees what torch.distributed, pickle and memmove are asked for, without our counters.

    Quiet under transports between threads.
    """

    def __init__(self, *landing: Mapping[str, torch.Tensor]) -> None:
        self._ranges = [
            (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for group in landing for tensor in group.values()
        ]
        self.counts = {
            "receives": 0,
            "outside": 0,
            "header_receives": 0,
            "gathers": 0,
            "gathers_elsewhere": 0,
            "writes": 0,
            "writes_elsewhere": 0,
            "pickles": 0,
            "object_calls": 0,
        }
        self.receive_addresses: set[int] = set()
        self.sent_storages: set[int] = set()
        self._undo: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Observer:
        import pickle

        import torch.distributed as dist
        from torch.distributed import distributed_c10d

        self._replace(dist, "irecv", self._seeing_receives(dist.irecv))
        for name in {"all_gather_single", "all_gather_into_tensor"} & {*vars(dist)}:
            self._replace(dist, name, self._seeing_gathers(getattr(dist, name)))
        self._replace(dist, "isend", self._seeing_sends(dist.isend))
        self._replace(ctypes, "memmove", self._seeing_writes(ctypes.memmove))
        for module in (dist, distributed_c10d):
            for name in [name for name in vars(module) if "object" in name and callable(getattr(module, name))]:
                self._replace(module, name, self._counting("object_calls", getattr(module, name)))
        for name in ("dumps", "loads", "dump", "load", "Pickler", "Unpickler"):
            self._replace(pickle, name, self._counting("pickles", getattr(pickle, name)))
        for name in ("_pickler", "_unpickler"):
            self._replace(distributed_c10d, name, self._counting("pickles", getattr(distributed_c10d, name)))
        return self

    def __exit__(self, *error: object) -> None:
        for owner, name, original in reversed(self._undo):
            setattr(owner, name, original)

    def _replace(self, owner: Any, name: str, function: Any) -> None:
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, function)

    def _counting(self, key: str, original: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counts[key] += 1
            return original(*args, **kwargs)

        return counted

    def _is_outside(self, tensor: torch.Tensor) -> bool:
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return not any(low <= start and end <= high for low, high in self._ranges)

    def _seeing_gathers(self, original: Any) -> Any:
        def seen(output: torch.Tensor, own: torch.Tensor, group: Any) -> Any:
            self.counts["gathers"] += 1
            in_place = own.data_ptr() == output.data_ptr() + group.rank() * own.nbytes
            self.counts["gathers_elsewhere"] += self._is_outside(output) or not in_place
            return original(output, own, group=group)

        return seen

    def _seeing_receives(self, original: Any) -> Any:
        def seen(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if tensor.dtype == torch.uint8 and tensor.numel() == MESSAGE_BYTES:
                self.counts["header_receives"] += 1
            else:
                self.counts["receives"] += 1
                self.counts["outside"] += self._is_outside(tensor)
                self.receive_addresses.add(tensor.data_ptr())
            return original(tensor, *args, **kwargs)

        return seen

    def _seeing_writes(self, original: Any) -> Any:
        def seen(target: int, source: int, num_bytes: int) -> Any:
            self.counts["writes"] += 1
            shared = any(low <= target and target + num_bytes <= high for low, high in shared_landing_memory())
            self.counts["writes_elsewhere"] += not shared
            self.sent_storages.add(source)
            return original(target, source, num_bytes)

        return seen

    def _seeing_sends(self, original: Any) -> Any:
        def seen(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if tensor.dtype != torch.uint8:
                self.sent_storages.add(tensor.untyped_storage().data_ptr())
            return original(tensor, *args, **kwargs)

        return seen


def shared_landing_memory() -> list[tuple[int, int]]:
    """Where landing memory that several processes map lies in this one, as the kernel says."""
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:pp_piecewise landing" in line]
    return [(int(low, 16), int(high, 16)) for low, high in (line.split(None, 1)[0].split("-") for line in maps)]


def slow_first_stage(stage: Stage) -> int:
    """Pauses of three times the silence that is allowed: before a header, and between a header and its data."""
    links = stage.connect()
    for sequence in range(2):
        if stage.is_first:
            time.sleep(3 * stage.patience.silence_seconds * (sequence == 0))
            header = links.outgoing.announce(3)
            time.sleep(3 * stage.patience.silence_seconds * (sequence == 1))
            links.outgoing.send(header, values(sequence, 3)).wait()
        else:
            _pass_on(links, sequence)
    links.close()
    return 2


def slow_last_stage(stage: Stage) -> int:
    """The last stage takes its time to receive what was sent."""
    links = stage.connect()
    if stage.is_last:
        time.sleep(3 * stage.patience.silence_seconds)
    for sequence in range(2):
        if stage.is_first:
            links.outgoing.send(links.outgoing.announce(3), values(sequence, 3)).wait()
        else:
            _pass_on(links, sequence)
    links.close()
    return 2


def holds_up_its_threads(stage: Stage) -> int:
    """The last stage keeps the interpreter to itself, as a long call of a compiler may, and has said so or not."""
    links = stage.connect(feedback=None)
    says_so = stage.arguments["says_so"]
    if stage.is_last:
        with links.busy() if says_so else contextlib.nullcontext():
            ctypes.PyDLL(None).sleep(3 * math.ceil(stage.patience.silence_seconds))
        _pass_on(links, 0)
    else:
        links.outgoing.send(links.outgoing.announce(3), values(0, 3)).wait()
    links.close()
    return 1


def _pass_on(links: Links, sequence: int) -> None:
    header = links.incoming.next_header()
    landing = rows(landing_memory(links.incoming), header.num_tokens)
    links.incoming.receive(header, landing).wait()
    assert torch.equal(landing["hidden_states"], values(sequence, 3)["hidden_states"])
    if links.outgoing is not None:
        links.outgoing.send(links.outgoing.announce(header.num_tokens, header.tag), landing).wait()


def timed(stage: Stage) -> dict[str, Any]:
    """When tensors are sent, when memory for them is named, and when they have arrived, by the monotonic clock.

    Memory for the first is named early, for the second late; the last two are under way at once.
    """
    links = stage.connect(feedback=None)
    pauses_seconds = (0.0, 0.1, 0.0, 0.0)
    times: dict[str, Any] = {"sent_at": [], "named_at": [], "arrived_at": []}
    transfers = []
    for sequence, pause_seconds in enumerate(pauses_seconds):
        if stage.is_first:
            time.sleep(0.05)
            header = links.outgoing.announce(3)
            times["sent_at"].append(time.monotonic())
            transfers.append(links.outgoing.send(header, values(sequence, 3)))
        else:
            header, views = links.incoming.next_header(), rows(landing_memory(links.incoming), 3)
            time.sleep(pause_seconds)
            times["named_at"].append(time.monotonic())
            transfers.append(links.incoming.receive(header, views))
    for transfer in transfers:
        transfer.wait()
        times["arrived_at"].append(time.monotonic())
    links.close()
    return times


def early_end(stage: Stage) -> int:
    """The last stage asks for an end after three micro-batches; what was announced is drained on the way."""
    links = stage.connect(feedback=None)
    landing = landing_memory(links.incoming)
    passed = 0
    while True:
        if stage.is_first:
            if links.outgoing.stop_requested:
                break
            time.sleep(0.01)
            num_tokens = passed % MAX_TOKENS + 1
            links.outgoing.send(links.outgoing.announce(num_tokens), values(passed, num_tokens)).wait()
        else:
            header = links.incoming.next_header()
            if header is None:
                break
            views = rows(landing, header.num_tokens)
            links.incoming.receive(header, views).wait()
            if links.outgoing is not None:
                links.outgoing.send(links.outgoing.announce(header.num_tokens), views).wait()
                if links.outgoing.stop_requested:
                    links.incoming.say_stop()
            elif passed == 2:
                links.incoming.say_stop()
        passed += 1
    links.close()
    return passed


def headers_ahead(stage: Stage) -> list[int]:
    """Headers arrive although no data was sent, and data lands in their order."""
    links = stage.connect(feedback=None)
    if stage.is_first:
        headers = [links.outgoing.announce(n) for n in (3, 1, 5)]
        assert links.outgoing._heard_stop.wait(LONGEST_SECONDS)
        for header in headers:
            links.outgoing.send(header, values(header.sequence, header.num_tokens)).wait()
        counts = [header.num_tokens for header in headers]
    else:
        headers = [links.incoming.next_header() for _ in range(3)]
        landing = [rows(landing_memory(links.incoming), header.num_tokens) for header in headers]
        transfers = [
            links.incoming.receive(h, views, slot) for slot, (h, views) in enumerate(zip(headers, landing, strict=True))
        ]
        links.incoming.say_stop()
        for header, views, transfer in zip(headers, landing, transfers, strict=True):
            transfer.wait()
            expected = values(header.sequence, header.num_tokens)
            assert all(torch.equal(views[name], expected[name]) for name in expected)
        counts = [header.num_tokens for header in headers]
    links.close()
    return counts


def further_exchanges(stage: Stage) -> list[list[str]]:
    """Every exchange after the first is a round of its own, whoever comes to it early."""
    links = stage.connect(feedback=None)
    told = []
    for number in range(3):
        time.sleep(0.05 * (stage.number == number))
        told.append(stage.transport.exchange(f"{number} of {stage.number}"))
    links.close()
    return told


def exchange_with_a_dead_rank(stage: Stage) -> None:
    stage.transport.exchange("all are here")
    if stage.is_last:
        _now("fault")
        os._exit(3)
    stage.transport.exchange("not all")


def misuse(stage: Stage) -> list[str]:
    """What the caller gets wrong is said before it goes on the wire; the pipeline lives on."""
    links = stage.connect(feedback=None)
    said = []

    def refused(call: Callable[[], Any]) -> None:
        try:
            call()
        except ValueError as error:
            said.append(str(error))
        else:
            raise AssertionError("was not refused")

    if stage.is_first:
        refused(lambda: links.outgoing.announce(MAX_TOKENS + 1))
        refused(lambda: links.outgoing.announce(0))
        refused(lambda: links.outgoing.announce(1, b"x" * 25))
        first, second = links.outgoing.announce(3), links.outgoing.announce(4)
        right = values(0, 3)
        refused(lambda: links.outgoing.send(second, values(1, 4)))
        refused(lambda: links.outgoing.send(first, values(0, 4)))
        refused(lambda: links.outgoing.send(first, {"hidden_states": right["hidden_states"]}))
        refused(lambda: links.outgoing.send(first, {**right, "residual": right["residual"].half()}))
        refused(lambda: links.outgoing.send(first, {**right, "hidden_states": torch.zeros(8, 3).t()}))
        links.outgoing.send(first, right).wait()
        links.outgoing.send(second, values(1, 4)).wait()
    else:
        first, second = links.incoming.next_header(), links.incoming.next_header()
        landing = landing_memory(links.incoming)
        refused(lambda: links.incoming.receive(second, rows(landing, 4)))
        refused(lambda: links.incoming.receive(first, rows(landing, 4)))
        links.incoming.receive(first, rows(landing, 3)).wait()
        links.incoming.receive(second, rows(landing, 4)).wait()
    links.close()
    return said


def other_plans(stage: Stage) -> None:
    """Two stages were set up otherwise than the rest."""
    moved: list[str] = []
    wire = stage.transport.wire
    stage.transport.wire = lambda *args: (moved.append("data"), wire(*args))[1]  # type: ignore[method-assign]
    changes: dict[str, Any] = {}
    if stage.number == 1:
        changes["torch_version"] = "1.0"
        changes["inputs"] = Schema({**PROXIES.proxies, "residual": Proxy((2, 3), torch.float16)})
    if stage.is_last:
        changes["ladder"] = Ladder((1, MAX_TOKENS))
    try:
        stage.connect(**changes)
    finally:
        assert not moved


def other_siblings(stage: Stage) -> None:
    """Of 2 x 2 ranks some were set up otherwise than the rest."""
    match stage.arguments["differs"]:
        case "buckets of rank 3":
            stage.connect(**({"ladder": Ladder((1, MAX_TOKENS))} if stage.rank == 3 else {}))
        case "no groups on stage 1":
            stage.connect(**({"tensor_parallel": None} if stage.number == 1 else {}))


def fault(stage: Stage) -> None:
    """Micro-batches without end; one stage breaks in the way that ``kind`` names, and tells when."""
    changes: dict[str, Any] = {"feedback": None} if stage.arguments.get("no_feedback") else {}
    if stage.arguments.get("layout") == "scattered":
        scattered = with_layout(PROXIES, "scattered")
        changes.update({"outputs": scattered} if stage.is_first else {"inputs": scattered})
    links = stage.connect(**changes)
    kind, victim = stage.arguments["kind"], stage.arguments["victim"]
    landing = landing_memory(links.incoming)
    tokens = landing_memory(links.feedback_in) if links.feedback_in is not None else memory(FEEDBACK)
    telling = None
    with closing(links, closes=stage.is_process):
        for sequence in range(10**6):
            if stage.rank == victim and sequence == 5:
                _break_now(kind, stage, links)
            if stage.is_first:
                views, header = values(sequence, 5), None
            else:
                header = links.incoming.next_header()
                views = rows(landing, header.num_tokens)
                links.incoming.receive(header, views).wait()
            if links.outgoing is not None:
                if stage.rank == victim and kind in _LIES and sequence == 4:
                    _lie(links.outgoing, _LIES[kind])
                links.outgoing.send(links.outgoing.announce(5), views).wait()
            elif links.feedback_out is not None:
                if telling is not None:  # the first stage reads only after its second micro-batch
                    telling.wait()
                telling = links.feedback_out.send(links.feedback_out.announce(1), rows(tokens, 1))
            if links.feedback_in is not None and sequence >= 1:
                _feedback(links.feedback_in, tokens)
            time.sleep(0.005)


@contextlib.contextmanager
def closing(links: Links, closes: bool = True) -> Iterator[None]:
    """Closes the links when the body ends. What that takes is not counted before what the body raises, see ``play``."""
    try:
        yield
    except BaseException as error:
        error.raised_at = time.time()  # type: ignore[attr-defined]
        if isinstance(error, ArithmeticError):  # of the stage's own code
            links.fail(type(error).__name__)
        raise
    finally:
        if closes:
            links.close()


_LIES: dict[str, Callable[[Header], Header]] = {
    "wrong n": lambda header: replace(header, num_tokens=MAX_TOKENS + 1),
    "wrong bucket": lambda header: replace(header, bucket_tokens=16),
    "wrong plan": lambda header: replace(header, fingerprint=header.fingerprint ^ 1),
    "wrong order": lambda header: replace(header, sequence=header.sequence + 1),
    "wrong rank": lambda header: replace(header, rank=header.rank + 7),
}


def _lie(sender: Sender, change: Callable[[Header], Header]) -> None:
    plan = sender._settings.plan
    true = Header(Kind.DATA, plan.fingerprint, sender._told_data, sender.own_rank, 5, plan.ladder.bucket(5) or 0)
    _now("fault")
    with sender._telling:
        sender._wire.tell(change(true).pack())


def _break_now(kind: str, stage: Stage, links: Links) -> None:
    if kind in _LIES:
        return
    _now("fault")
    if kind == "exit":
        os._exit(3)
    if kind in ("SIGKILL", "SIGSTOP"):
        os.kill(os.getpid(), getattr(signal, kind))
    if kind == "hang up":
        for end in links._ends:
            end._wire.close()
    if kind == "raise":
        raise ArithmeticError("the step failed")


_faults: list[float] = []


def _now(what: str) -> None:
    _faults.append(time.time())
    print(f"{what} at {time.time()}", flush=True)


def sends_while_idle_receiver_dies(stage: Stage) -> None:
    """The first stage is in its own code when the last one dies, and learns of it at its next call."""
    links = stage.connect(feedback=None)
    if stage.is_last:
        _now("fault")
        os._exit(3)
    with closing(links):
        while True:
            time.sleep(0.01)
            if links._fault.loss is not None:
                links.outgoing.announce(1)


SCENARIOS = {
    function.__name__: function
    for function in (
        steady, timed, slow_first_stage, slow_last_stage, holds_up_its_threads, early_end, headers_ahead,
        further_exchanges, exchange_with_a_dead_rank, misuse,
        other_plans, other_siblings, fault,
        sends_while_idle_receiver_dies,
    )
}  # fmt: skip


# -------------------------------------------------------------------------------------- running


def run(
    transport: str,
    scenario: Callable[[Stage], Any],
    stages: int,
    folder: Path,
    silence_seconds: float = 30.0,
    **arguments: Any,
) -> list[Outcome]:
    """Play ``scenario`` on every stage; fails when one of them hangs."""
    if transport in ("nccl", "auto on GPUs") and torch.cuda.device_count() < stages:
        pytest.skip(f"NCCL needs a GPU for each of {stages} ranks, and there are {torch.cuda.device_count()}")
    if transport == "local":
        return _run_threads(scenario.__name__, stages, folder, silence_seconds, arguments)
    return _run_processes(transport, scenario.__name__, stages, folder, silence_seconds, arguments)


def play(
    name: str,
    transport: Transport,
    silence_seconds: float,
    is_process: bool = True,
    tensor_parallel: TensorParallel | None = None,
    delayed: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Outcome:
    """The scenario on this stage, over ``transport`` or over the delayed one of the benchmarks around it."""
    if delayed is not None:
        transport = delayed_link().DelayedTransport(transport, **delayed)
    patience = Patience(silence_seconds, setup_seconds=SETUP_SECONDS)
    stats = Stats()

    number, count = transport.stage, transport.stage_count

    def connect_stage(tensor_parallel: TensorParallel | None = tensor_parallel, **changes: Any) -> Links:
        return make_links(transport, plan_of(number, count, **changes), patience, stats, tensor_parallel)

    rank = transport.ranks[number]
    stage = Stage(number, count, rank, connect_stage, transport, patience, stats, is_process, arguments)
    try:
        scenario = SCENARIOS.get(name) or getattr(importlib.import_module("stream_scenarios"), name)
        return Outcome(value=scenario(stage), raised_at=time.time())
    except BaseException as error:
        traceback.print_exc()
        raised_at = getattr(error, "raised_at", time.time())
        return Outcome(error=type(error).__name__, message=str(error), raised_at=raised_at, exit_code=1)


def delayed_link() -> Any:
    sys.path.append(str(Path(__file__).parent.parent / "bench"))
    try:
        return importlib.import_module("delayed_link")
    finally:
        sys.path.pop()


def _run_threads(name: str, stages: int, folder: Path, silence_seconds: float, arguments: Any) -> list[Outcome]:
    hub = LocalHub(stages, setup_seconds=SETUP_SECONDS)
    outcomes: dict[int, Outcome] = {}
    waited_before = waited_seconds()

    def one_stage(number: int) -> None:
        outcomes[number] = play(name, hub.transport(number), silence_seconds, False, **arguments)

    threads = [threading.Thread(target=one_stage, args=(number,), daemon=True) for number in range(stages)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + LONGEST_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert len(outcomes) == stages, f"only stages {sorted(outcomes)} ended"
    waited = max(0.0, waited_seconds() - waited_before)
    return [replace(outcomes[number], waited_seconds=waited) for number in range(stages)]


def _run_processes(
    transport: str, name: str, stages: int, folder: Path, silence_seconds: float, arguments: Any
) -> list[Outcome]:
    job = {"scenario": name, "transport": transport, "silence_seconds": silence_seconds, "arguments": arguments}
    stopped = [arguments["victim"]] if arguments.get("kind") == "SIGSTOP" else []
    ended = run_ranks("handoff_ranks:one_rank", stages, folder, job, left_alone=stopped)
    return [_read_outcome(folder / f"rank_{rank}.json", end) for rank, end in enumerate(ended)]


def _read_outcome(report: Path, end: Ended) -> Outcome:
    outcome = Outcome(**json.loads(report.read_text())) if report.exists() else Outcome()
    return replace(outcome, exit_code=end.exit_code, ended_at=end.at, waited_seconds=end.waited_seconds, log=end.log)


def fault_time(outcomes: list[Outcome]) -> float:
    """When the fault happened, in seconds since the epoch."""
    printed = [line for outcome in outcomes for line in outcome.log.splitlines() if line.startswith("fault at ")]
    return float(printed[0].split()[-1]) if printed else _faults[-1]


def all_well(outcomes: list[Outcome]) -> list[Outcome]:
    for number, outcome in enumerate(outcomes):
        assert outcome.error is None and outcome.exit_code == 0, f"stage {number}: {outcome}\n{outcome.log}"
    return outcomes


def survivors_lose_their_peer(outcomes: list[Outcome], victim: int, silence_seconds: float) -> list[Outcome]:
    """Those, who all raised ``PeerLost`` in time after the fault, and then ended by themselves."""
    begin = fault_time(outcomes)
    survivors = [outcome for number, outcome in enumerate(outcomes) if number != victim]
    waited = sum(outcome.waited_seconds for outcome in survivors)
    for outcome in survivors:
        assert outcome.error == "PeerLost" and outcome.exit_code == 1, f"{outcome}\n{outcome.log}"
        assert outcome.raised_at - begin < silence_seconds + MARGIN_SECONDS + waited, outcome
    slowest = max(outcome.raised_at - begin for outcome in survivors)
    print(f"slowest rank raised {slowest:.2f} s after the fault, at {silence_seconds} s of silence")
    return survivors


def _wake_gpus() -> None:
    """Load all kernels of the scenarios: the first use of each holds up the threads of a rank."""
    for index in range(torch.cuda.device_count()):
        torch.zeros(1, device=f"cuda:{index}")
    for _ in range(2):
        copies = {name: tensor.clone() + 1 for name, tensor in values(1, 3).items()}
        for name, tensor in memory(PROXIES).items():
            tensor[:3].copy_(copies[name])
            assert not torch.equal(tensor, tensor + 1)
            tensor.any().item()
        (torch.arange(3) + 1).tolist()
    torch.cuda.synchronize()


def one_rank(rank: int, count: int, folder: Path, job: Mapping[str, Any]) -> int:
    """What each process runs."""
    import torch.distributed as dist

    from emulated_streams import EmulatedMemory, OnTrial, fails
    from like_nccl import GlooGroup, P2PLikeNccl
    from pp_piecewise_backend.pipeline.transports import torch_distributed
    from pp_piecewise_backend.pipeline.transports.choosing import Auto
    from pp_piecewise_backend.pipeline.transports.cuda_ipc import DeviceMemory
    from pp_piecewise_backend.pipeline.transports.one_machine import KindOfSharing, OneMachine
    from pp_piecewise_backend.pipeline.transports.shared_memory import HostMemory
    from pp_piecewise_backend.pipeline.transports.torch_distributed import P2P, P2PWire

    def of_several(groups: list[list[int]]) -> Any:
        """Every rank makes all groups, and takes the one that it is in."""
        made = [dist.new_group(ranks) for ranks in groups]
        return next(group for group, ranks in zip(made, groups, strict=True) if rank in ranks)

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    size = job["arguments"].get("tensor_parallel_size", 1)
    pipeline = of_several([[*range(t, count, size)] for t in range(size)])
    tensor_parallel = None
    if size > 1:
        stages = of_several([[*range(first, first + size)] for first in range(0, count, size)])
        tensor_parallel = TensorParallel(stages, SETUP_SECONDS)
    asked = job["transport"]
    device = torch.device("cpu")
    if asked in ON_GPUS:
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.set_default_device(device)
        _wake_gpus()
    p2p = P2P(device, pipeline, setup_seconds=SETUP_SECONDS)
    if asked == "like nccl":
        GlooGroup.releases = not job["arguments"].get("never_ends", False)
        torch_distributed._CLOSING_SECONDS = job["arguments"].get("closing_seconds", torch_distributed._CLOSING_SECONDS)
        p2p = P2PLikeNccl(device, pipeline, setup_seconds=SETUP_SECONDS)
    transport: Transport = p2p
    kinds: dict[str, Callable[[], KindOfSharing]] = {
        "shared_memory": HostMemory,
        "emulated": EmulatedMemory,
        "cuda_ipc": lambda: DeviceMemory(device),
    }
    if asked in kinds:
        transport = OneMachine(p2p, kinds[asked]())
    elif asked == "auto on GPUs":
        transport = Auto(p2p, DeviceMemory(device))
    elif asked == "auto":
        own = job["arguments"]["sharing"].get(str(rank), {})
        transport = Auto(p2p, OnTrial(**{**job["arguments"]["sharing"].get("all", {}), **own}))
        make = p2p.wire
        if rank in job["arguments"].get("p2p_fails", ()):
            P2PWire.warm_up = lambda *_: fails("p2p")  # type: ignore[method-assign]

        def wire(*link: Any) -> Any:
            made = make(*link)
            if made is not None:
                send, seconds = made.send, job["arguments"].get("p2p_seconds", 0.0)
                made.send = lambda tensors: (time.sleep(seconds), send(tensors))[1]
            return made

        p2p.wire = wire  # type: ignore[method-assign]
    outcome = play(
        job["scenario"], transport, job["silence_seconds"], tensor_parallel=tensor_parallel, **job["arguments"]
    )
    (folder / f"rank_{rank}.json").write_text(json.dumps(asdict(outcome)))
    if outcome.error is None:
        dist.destroy_process_group()
    return outcome.exit_code

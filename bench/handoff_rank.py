"""One rank of `handoff.py`: a small stage, and the ways of handing micro-batches over that are compared.

Each method is an endless iterator that runs one micro-batch per item, so that blocks of all methods can take turns.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import pickle
import random
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from common import TEST_MODELS
from delayed_link import DelayedTransport
from pickled_messages import PickledMessages
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import pp_piecewise_backend as ppb
from pp_piecewise_backend.pipeline.transports.base import MESSAGE_BYTES
from pp_piecewise_backend.pipeline.transports.one_machine import OneMachine
from pp_piecewise_backend.pipeline.transports.shared_memory import HostMemory
from pp_piecewise_backend.pipeline.transports.torch_distributed import P2P
from pp_piecewise_backend.runtime.program import Program
from pp_piecewise_backend.utils.dynamo_entrance import Entrance

TOKENS, HIDDEN = 8, 64
PROXIES = {name: ppb.Proxy((HIDDEN,), torch.float32) for name in ("hidden_states", "residual")}
OPTIONS = {"compiler": "eager", "capture_sizes": str(TOKENS), "split_ops": "+handoff_bench::attention"}
JITTER = 0.1
SETUP_SECONDS = 120.0


# ----------------------------------------------------------------------------------------- the stage


class Work:
    """What the stage of this process is to do in its next call."""

    seconds = 0.0
    took_seconds: ClassVar[list[float]] = []
    """What each sleep really took."""


def _attention(x: Tensor) -> Tensor:
    """Sleeps in place of the work of a stage, so that several stages fit on few cores."""
    if Work.seconds > 0:
        begin = time.perf_counter()
        time.sleep(Work.seconds)
        Work.took_seconds.append(time.perf_counter() - begin)
    return x.clone()


# Without `custom_op`, whose Python kernels for autograd would count as time of the host.
_LIBRARY = torch.library.Library("handoff_bench", "DEF")
_LIBRARY.define("attention(Tensor x) -> Tensor")
for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("attention", _attention, _key)


@torch.library.register_fake("handoff_bench::attention", lib=_LIBRARY)
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class SmallStage(nn.Module):
    """A piece that reads the proxies, one attention, and a piece that writes the results: `[tokens, HIDDEN]` each."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(2))
        self.requires_grad_(False)

    def forward(
        self, own: Tensor, hidden_states: Tensor | None = None, residual: Tensor | None = None
    ) -> dict[str, Tensor]:
        x = self.before(own if hidden_states is None or residual is None else hidden_states + residual)
        y = self.behind(torch.ops.handoff_bench.attention(x))
        return {"hidden_states": y, "residual": y + 1}


@functools.cache  # asked before the clock starts
def stage_seconds(stage: int, position: int, mean_seconds: float) -> float:
    """What the stage takes for the micro-batch at this position of a series."""
    factor = random.Random(f"stage {stage}, micro-batch {position}").gauss(1.0, JITTER)
    return mean_seconds * max(0.0, factor)


_TAG = struct.Struct("<ddI")


def tag_of(mean_seconds: float, link_seconds: float, position: int) -> bytes:
    """Tells every stage how long it and its links take for a micro-batch."""
    return _TAG.pack(mean_seconds, link_seconds, position)


# ------------------------------------------------------------------------------------------ methods


class Pipeline:
    """This process's place in the pipeline, and what all methods share."""

    def __init__(self, stage: int, stage_count: int, device: torch.device) -> None:
        self.stage, self.stage_count = stage, stage_count
        self.is_first, self.is_last = stage == 0, stage == stage_count - 1
        self.device = device
        self.delayed: list[DelayedTransport] = []
        self.trace_path: str | None = None
        """Where our methods write what happened when, if anywhere."""
        self.own = torch.ones(TOKENS, HIDDEN, device=device)
        self.graphs = "emulate" if device.type == "cpu" else "cuda"

    def module(self) -> nn.Module:
        torch.manual_seed(self.stage)
        return SmallStage().to(self.device)

    def make_inputs(self, num_tokens: int, tag: bytes) -> dict[str, Tensor]:
        mean_seconds, link_seconds, position = _TAG.unpack(tag) if tag else (0.0, 0.0, 0)
        for transport in self.delayed:
            transport.seconds = link_seconds
        Work.seconds = mean_seconds and stage_seconds(self.stage, position, mean_seconds)
        return {"own": self.own[:num_tokens]}

    def transport(self, delayed: bool, shares_memory: bool = False) -> Any:
        transport: Any = P2P(self.device, setup_seconds=SETUP_SECONDS)
        if shares_memory:
            transport = OneMachine(transport, HostMemory())
        if delayed:
            transport = DelayedTransport(transport, 0.0)
            self.delayed = [transport]
        return transport


class Method:
    """One way of handing over, ready to run micro-batches."""

    def __init__(self, name: str, steps: Iterator[Any], close: Callable[[], None]) -> None:
        self.name = name
        self.steps = steps
        self.close = close
        self.landing_ranges: list[tuple[int, int]] = []
        self.runner: ppb.StageRunner | None = None

    def lands_in(self, views: Mapping[str, Tensor]) -> None:
        self.landing_ranges = [(view.data_ptr(), view.data_ptr() + view.nbytes) for view in views.values()]


class EndReleasingRunner(ppb.StageRunner):
    """Releases the landing memory when the forward has ended, as without early release."""

    def landing_was_read(self) -> None:
        pass


def ours(pipeline: Pipeline, name: str, tags: Iterator[bytes], max_in_flight: int | None, delayed: bool) -> Method:
    runner_class = EndReleasingRunner if name == "ours_end" else ppb.StageRunner
    runner = runner_class(
        pipeline.module(),
        make_inputs=pipeline.make_inputs,
        max_tokens=TOKENS,
        inputs=None if pipeline.is_first else PROXIES,
        outputs=None if pipeline.is_last else PROXIES,
        transport=pipeline.transport(delayed, shares_memory=pipeline.device.type == "cpu" and "p2p" not in name),
        receive="step" if name.startswith("ours_step") else "early",
        max_in_flight=max_in_flight,
        setup_timeout_s=SETUP_SECONDS,
        options={**OPTIONS, "graphs": pipeline.graphs},
    )
    runner.warmup(progress=False)
    if pipeline.trace_path is not None:
        runner.trace(pipeline.trace_path)
    steps = runner.run((ppb.MicroBatch(TOKENS, tag) for tag in tags) if pipeline.is_first else None)

    def close() -> None:
        steps.close()  # type: ignore[attr-defined]
        runner.close()

    method = Method(name, steps, close)
    method.runner = runner
    method.lands_in(runner._stage.views(TOKENS))
    return method


class HeaderMessages:
    """Metadata in a message of fixed size, which the next stage waits for."""

    _LAYOUT = struct.Struct(f"<II{MESSAGE_BYTES - 8}s")

    def __init__(self, incoming: Any, outgoing: Any) -> None:
        self._incoming, self._outgoing = incoming, outgoing

    def tell(self, num_tokens: int, tag: bytes, tensors: Mapping[str, Tensor]) -> None:
        self._outgoing.tell(self._LAYOUT.pack(num_tokens, len(tag), tag))

    def hear(self) -> tuple[int, bytes, dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
        num_tokens, tag_bytes, tag = self._LAYOUT.unpack(self._incoming.hear(SETUP_SECONDS))
        known = {name: (proxy.dtype, (num_tokens, *proxy.shape)) for name, proxy in PROXIES.items()}
        return num_tokens, tag[:tag_bytes], known

    def close(self) -> None:
        pass


class Ends:
    """The last stage tells the first one of each micro-batch that has ended, without waiting for it to listen."""

    def __init__(self, last: int, limit: int) -> None:
        self._group = dist.new_group([0, last], backend="gloo")
        self._last = last
        self._limit = limit
        self._started = self._heard = 0
        self._told: list[tuple[Any, Tensor]] = []

    def wait_for_room(self) -> None:
        self._hear(self._started + 1 - self._limit)
        self._started += 1

    def hear_all(self) -> None:
        self._hear(self._started)

    def tell(self) -> None:
        message = torch.zeros(1, dtype=torch.uint8)
        self._told.append((dist.isend(message, 0, group=self._group), message))

    def flush(self) -> None:
        for work, _ in self._told:
            work.wait()

    def _hear(self, count: int) -> None:
        while self._heard < count:
            dist.irecv(torch.empty(1, dtype=torch.uint8), self._last, group=self._group).wait()
            self._heard += 1


def copying_in(
    pipeline: Pipeline, name: str, tags: Iterator[bytes], max_in_flight: int | None, delayed: bool
) -> Method:
    """Metadata, tensors into fresh memory, copies into the memory that graphs read; all at the start of a step.

    Tensors leave without blocking; only before the next forward, which overwrites them, their stage waits.
    """
    transport = pipeline.transport(delayed)
    transport.exchange(name)
    stage, last = pipeline.stage, pipeline.stage_count - 1
    wires = {hop: transport.wire(hop, hop + 1, "proxies") for hop in range(last)}
    incoming, outgoing = wires.get(stage - 1), wires.get(stage)
    ends = Ends(last, max_in_flight) if max_in_flight is not None else None
    messages: Any
    if name == "copy_in":
        messages = HeaderMessages(incoming, outgoing)
    else:
        messages = PickledMessages(stage, pipeline.stage_count, 1 if name == "engine_one_object" else 2)
    own_stage = ppb.Stage({} if pipeline.is_first else PROXIES, TOKENS, pipeline.device)
    compiled = compiled_stage(pipeline, own_stage)
    sent: list[Any] = []

    def wait_for_send() -> None:
        while sent:
            sent.pop().wait()

    def steps() -> Iterator[None]:
        while True:
            views: dict[str, Tensor] = {}
            if incoming is None:
                num_tokens, tag = TOKENS, next(tags)
                if ends is not None:
                    ends.wait_for_room()
            else:
                num_tokens, tag, metadata = messages.hear()
                fresh = {
                    name: torch.empty(shape, dtype=dtype, device=pipeline.device)
                    for name, (dtype, shape) in metadata.items()
                }
                incoming.receive(list(fresh.values())).wait()
                views = own_stage.views(num_tokens)
                for name, view in views.items():
                    view.copy_(fresh[name])
            arguments = {**pipeline.make_inputs(num_tokens, tag), **views}
            wait_for_send()
            with torch.no_grad():
                results = compiled(**arguments)
            if outgoing is not None:
                messages.tell(num_tokens, tag, results)
                sent.append(outgoing.send([results[name] for name in PROXIES]))
            elif ends is not None:
                ends.tell()
            yield

    def close() -> None:
        wait_for_send()
        if ends is not None and pipeline.is_first:
            ends.hear_all()
        elif ends is not None and pipeline.is_last:
            ends.flush()
        for wire in (incoming, outgoing):
            if wire is not None:
                wire.close()
        dist.barrier()
        messages.close()
        transport.close()

    method = Method(name, steps(), close)
    if own_stage.inputs:
        method.lands_in(own_stage.views(TOKENS))
    return method


def compiled_stage(pipeline: Pipeline, stage: ppb.Stage) -> Any:
    options = {**OPTIONS, "graphs": pipeline.graphs, "stage": stage, "static_outputs": not pipeline.is_last}
    compiled = torch.compile(own_code(pipeline.module()), backend="pp_piecewise", options=options, fullgraph=True)
    with torch.no_grad():
        ppb.warmup(
            compiled, lambda n: ((), {**pipeline.make_inputs(n, b""), **stage.views(n)}), sizes=[TOKENS], progress=False
        )
    return compiled


def own_code(module: nn.Module) -> nn.Module:
    """The module with a `forward` of its own: Dynamo keeps programs, and their limit, by code object."""
    forward = type(module).forward
    fresh = type(forward)(forward.__code__.replace(), forward.__globals__, forward.__name__, forward.__defaults__)
    module.__class__ = type(type(module).__name__, (type(module),), {"forward": fresh})
    return module


def without_handoff(
    pipeline: Pipeline, name: str, tags: Iterator[bytes], max_in_flight: int | None, delayed: bool
) -> Method:
    """The stage alone, on proxies that lie in its memory."""
    stage = ppb.Stage({} if pipeline.is_first else PROXIES, TOKENS, pipeline.device)
    compiled = compiled_stage(pipeline, stage)

    def steps() -> Iterator[None]:
        tag = tag_of(0.0, 0.0, 0)
        while True:
            with torch.no_grad():
                compiled(**pipeline.make_inputs(TOKENS, tag), **stage.views(TOKENS))
            yield

    return Method(name, steps(), lambda: None)


MAKERS = {
    "alone": without_handoff,
    "engine": copying_in,
    "engine_one_object": copying_in,
    "copy_in": copying_in,
    "ours_step": ours,
    "ours_end": ours,
    "ours_early": ours,
    "ours_step_p2p": ours,
    "ours_early_p2p": ours,
}


# ----------------------------------------------------------------------------------------- observing


class Observer(TorchDispatchMode):
    """Counts what a method asks of torch and pickle, without our counters."""

    def __init__(self, landing_ranges: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.counts = {
            "pickles": 0,
            "object_calls": 0,
            "blocking_messages": 0,
            "receives_into_landing": 0,
            "receives_elsewhere": 0,
            "copies_into_landing": 0,
            "writes_into_another_process": 0,
        }
        self._landing = landing_ranges
        self._undo: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Observer:
        from torch.distributed import distributed_c10d

        for name in ("dumps", "loads", "dump", "load"):
            self._count_calls(pickle, name, "pickles")
        for name in ("_pickler", "_unpickler"):
            self._count_calls(distributed_c10d, name, "pickles")
        for module in (dist, distributed_c10d):
            for name in [name for name in vars(module) if "object" in name and callable(getattr(module, name))]:
                self._count_calls(module, name, "object_calls")
        for name in ("send", "recv"):
            self._count_calls(dist, name, "blocking_messages")
        self._see(dist, "irecv", self._see_receive)
        self._see(ctypes, "memmove", self._see_write)
        self._look_behind_the_entrance()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for owner, name, original in reversed(self._undo):
            setattr(owner, name, original)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.counts["copies_into_landing"] += self._is_landing(args[0])
        return func(*args, **(kwargs or {}))

    def _is_landing(self, tensor: Tensor) -> bool:
        return any(low <= tensor.data_ptr() < high for low, high in self._landing)

    def _count_calls(self, owner: Any, name: str, key: str) -> None:
        self._see(owner, name, lambda *args: self.counts.update({key: self.counts[key] + 1}))

    def _look_behind_the_entrance(self) -> None:
        """The runner enters its stage as without an observer, whose mode is for the program that is called then."""
        enter, call = Entrance.__call__, Program.__call__
        entered: list[bool] = []

        def seen_enter(entrance: Entrance, arguments: Mapping[str, Any]) -> Any:
            with _disable_current_modes(), torch.compiler.set_stance("default"):
                entered.append(True)
                try:
                    return enter(entrance, arguments)
                finally:
                    entered.pop()

        def seen_call(program: Program, *args: Any) -> Any:
            if not entered:
                return call(program, *args)
            super(Observer, self).__enter__()
            try:
                return call(program, *args)
            finally:
                super(Observer, self).__exit__(None, None, None)

        self._undo += [(Entrance, "__call__", enter), (Program, "__call__", call)]
        Entrance.__call__ = seen_enter  # type: ignore[method-assign]
        Program.__call__ = seen_call  # type: ignore[method-assign]

    def _see_receive(self, tensor: Tensor, *args: Any) -> None:
        if tensor.dtype != torch.uint8:  # those are headers
            self.counts["receives_into_landing" if self._is_landing(tensor) else "receives_elsewhere"] += 1

    def _see_write(self, address: int, *args: Any) -> None:
        self.counts["writes_into_another_process"] += any(low <= address < high for low, high in shared_ranges())

    def _see(self, owner: Any, name: str, note: Callable[..., None]) -> None:
        original = getattr(owner, name)

        def seen(*args: Any, **kwargs: Any) -> Any:
            note(*args)
            return original(*args, **kwargs)

        self._undo.append((owner, name, original))
        setattr(owner, name, seen)


def shared_ranges() -> list[tuple[int, int]]:
    """Where landing memory that several processes map lies in this one, as the kernel says."""
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "landing memory" in line]
    return [(int(low, 16), int(high, 16)) for low, high in (line.split(None, 1)[0].split("-") for line in maps)]


# ------------------------------------------------------------------------------------------ measuring

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time, "main_thread": time.thread_time}


def host_costs(pipeline: Pipeline, request: Mapping[str, Any]) -> dict[str, Any]:
    """Microseconds per micro-batch by method and clock, one value per round; and what the observer counted.

    `saturated`: as many micro-batches in flight as the stages hold. `single`: one in flight.
    """
    found: dict[str, Any] = {}
    for situation, max_in_flight in (("saturated", None), ("single", 1)):
        methods = [
            MAKERS[name](pipeline, name, iter(lambda: tag_of(0.0, 0.0, 0), None), max_in_flight, False)
            for name in request["methods"]
            if situation == "saturated" or name != "alone"
        ]
        samples: dict[str, dict[str, list[float]]] = {m.name: {clock: [] for clock in CLOCKS} for m in methods}
        observed = {}
        for method in methods:
            run_block(method, request["block"])
            observer = Observer(method.landing_ranges)
            # Dynamo would take the mode for another kind of call; the program that it has is the right one.
            with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True), observer:
                dist.barrier()  # before anybody announces something that is received early
                run_block(method, request["block"])
            observed[method.name] = {key: count / request["block"] for key, count in observer.counts.items()}
        drop_work(attention_too=True)
        for _ in range(request["rounds"]):
            for method in methods:
                dist.barrier()
                run_block(method, 3)
                started = {clock: read() for clock, read in CLOCKS.items()}
                run_block(method, request["block"])
                for clock, read in CLOCKS.items():
                    samples[method.name][clock].append((read() - started[clock]) / request["block"] * 1e6)
        found[situation] = {"microseconds": samples, "observed": observed}
        for method in methods:
            method.close()
    return found


def drop_work(attention_too: bool) -> None:
    """Replays do nothing from now on, and attention, if asked, gives what it gave first: the host's part is left."""
    sys.path.insert(0, str(TEST_MODELS))
    from models.replaced_work import replace_work

    for program in ppb.programs():
        for bucket, _ in program.graphs.buckets:
            for flat in bucket.programs.values():
                replace_work(flat, lambda replay: nothing, remembering if attention_too else None)


def nothing() -> None:
    pass


def remembering(body: Callable[..., Any]) -> Callable[..., Any]:
    kept: list[Any] = []

    def call(*args: Any) -> Any:
        if not kept:
            kept.append(body(*args))
        return kept[0]

    return call


def run_block(method: Method, count: int) -> None:
    for _ in range(count):
        next(method.steps)


def throughput(pipeline: Pipeline, request: Mapping[str, Any]) -> dict[str, Any]:
    """When this stage ended each micro-batch of the series of all cells, in seconds."""
    series = [
        tag_of(mean_seconds, link_seconds, position)
        for mean_seconds, link_seconds in request["cells"]
        for position in range(request["micro_batches"])
    ]
    pipeline.trace_path = request.get("trace_path")
    slept = [
        stage_seconds(pipeline.stage, position, mean_seconds)
        for mean_seconds, _ in request["cells"]
        for position in range(request["micro_batches"])
    ]
    first = [tag_of(0.0, 0.0, 0)] * 3
    method = MAKERS[request["method"]](
        pipeline, request["method"], iter(first + series), request["max_in_flight"], True
    )
    run_block(method, len(first))
    if pipeline.trace_path is None:
        drop_work(attention_too=False)
    dist.barrier()
    Work.took_seconds.clear()
    ended = []
    for _ in series:
        next(method.steps)
        ended.append(time.perf_counter())
    method.close()
    shown = ("early_releases", "send_waits", "proxy_copies", "recv_allocations", "blocking_metadata")
    stats = None if method.runner is None else {name: getattr(method.runner.stats, name) for name in shown}
    took = list(Work.took_seconds)
    assert len(took) == len(slept)
    return {"ended_seconds": ended, "stage_seconds": slept, "took_seconds": took, "stats": stats}


TASKS = {"host_costs": host_costs, "throughput": throughput}


def sleep_precisely() -> None:
    """On Linux, sleeps are else up to 50 us too long."""
    set_timer_slack = 29
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_timer_slack, 1)


def main(request_text: str, folder: Path) -> None:
    request = json.loads(request_text)
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    sleep_precisely()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if request["device"] == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=SETUP_SECONDS),
    )
    pipeline = Pipeline(rank, count, device)
    answers = [TASKS[task["task"]](pipeline, task) for task in request["tasks"]]
    (folder / f"answer_{rank}.json").write_text(json.dumps(answers))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""Ranks of a pipeline of engine-style stages that ``StageRunner`` drives over gloo, and what their tests ask of them.

A scenario is a function of one rank. Run by ``rank_processes``, each rank leaves what its scenario returned in a file;
an exception ends it with exit code 1 and its traceback in the log.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import one_program
import pp_piecewise_backend as ppb
from handoff_ranks import Observer, shared_landing_memory
from models.pipeline_stage import SPLIT_OPS, EngineStage, ForwardContext, set_forward_context
from one_program import for_every_size
from pp_piecewise_backend.pipeline import runner
from pp_piecewise_backend.runtime.cudagraphs import emulated
from pp_piecewise_backend.runtime.program import Program
from pp_piecewise_backend.utils.dynamo_entrance import Entrance
from rank_processes import SETUP_SECONDS, Ended, run_ranks

MAX_TOKENS = 8
REQUESTS, MAX_POSITIONS, HIDDEN, VOCABULARY = 8, 32, 16, 32
PROXIES = {name: ppb.Proxy((HIDDEN,), torch.float32) for name in ("hidden_states", "residual")}
FEEDBACK = {"next_tokens": ppb.Proxy((), torch.int64)}
OPTIONS = {"compiler": "eager", "graphs": "emulate", "split_ops": SPLIT_OPS, "capture_sizes": "2,4"}
FAULTY_STEP = 3
TIMEOUT_SECONDS = 2.0
"""For ranks that die or stop."""


@dataclass
class Rank:
    """What a scenario gets."""

    number: int
    count: int
    folder: Path
    timeout_seconds: float
    arguments: Mapping[str, Any]
    failing_step: int | None = None
    """When attention is to raise."""

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def is_last(self) -> bool:
        return self.number == self.count - 1

    def runner(self, module: nn.Module | None = None, **changes: Any) -> ppb.StageRunner:
        ends: dict[str, Any] = {
            "make_inputs": self.make_inputs,
            "max_tokens": MAX_TOKENS,
            "inputs": None if self.is_first else PROXIES,
            "outputs": None if self.is_last else PROXIES,
            "feedback": FEEDBACK if self.is_first or self.is_last else None,
            "options": OPTIONS,
            "transport": self.arguments.get("transport", "auto"),
            "timeout_s": self.timeout_seconds,
            "setup_timeout_s": SETUP_SECONDS,
        }
        if module is None:
            module = EngineStage(self.number, self.count, num_layers=self.arguments.get("num_layers", 1))
        return ppb.StageRunner(module, **{**ends, **changes})

    def make_inputs(self, num_tokens: int, tag: bytes) -> dict[str, Tensor | None]:
        return own_inputs(self.is_first, num_tokens, tag, self.failing_step)

    @property
    def is_victim(self) -> bool:
        return self.number == self.arguments["victim"]


def own_inputs(
    is_first: bool, num_tokens: int, tag: bytes, failing_step: int | None = None
) -> dict[str, Tensor | None]:
    """Token ids and positions of a micro-batch, which depend on its tag alone; sets the forward context."""
    if not tag:  # at warm-up
        set_forward_context(None)
        positions = torch.zeros(num_tokens, dtype=torch.int64)
        return for_every_size({"input_ids": torch.zeros_like(positions) if is_first else None, "positions": positions})
    step = int(tag)
    generator = torch.Generator().manual_seed(step)
    start = int(torch.randint(MAX_POSITIONS - num_tokens, (), generator=generator))
    positions = torch.arange(start, start + num_tokens)
    set_forward_context(ForwardContext(torch.full_like(positions, step % REQUESTS), positions, step == failing_step))
    ids = torch.randint(VOCABULARY, (num_tokens,), generator=generator) if is_first else None
    return for_every_size({"input_ids": ids, "positions": positions})


def sizes(count: int) -> list[int]:
    return random.Random(7).choices(range(1, MAX_TOKENS + 1), k=count)


OwnInputs = Callable[[int], Mapping[str, Any]]


def in_one_process(count: int, num_layers: int) -> Callable[[OwnInputs], Mapping[str, Tensor]]:
    """The same stages through the same buckets, one after the other; asks for the own inputs of each by its index."""
    stages, compiled = [], []
    for index in range(count):
        stages.append(ppb.Stage({} if index == 0 else PROXIES, MAX_TOKENS, device="cpu"))
        module = EngineStage(index, count, prefix=f"of {count}: ", num_layers=num_layers)
        options = {**OPTIONS, "stage": stages[-1], "max_tokens": MAX_TOKENS}
        compiled.append(torch.compile(module, backend="pp_piecewise", options=options))

        def warm_up_inputs(num_tokens: int, index: int = index) -> tuple[tuple[()], dict[str, Any]]:
            return (), {**own_inputs(index == 0, num_tokens, b""), **stages[index].views(num_tokens)}

        ppb.warmup(compiled[-1], warm_up_inputs)

    def run(own: OwnInputs) -> Mapping[str, Tensor]:
        handed: Mapping[str, Tensor] = {}
        for index, (stage, forward) in enumerate(zip(stages, compiled, strict=True)):
            inputs = own(index)  # sets the forward context
            views = stage.views(inputs["positions"].shape[0])
            for name, tensor in handed.items():
                views[name].copy_(tensor)
            handed = forward(**inputs, **(views if handed else {}))
        return handed

    return run


# ------------------------------------------------------------------------------------ scenarios


def steady(rank: Rank) -> dict[str, Any]:
    """Micro-batches of random sizes with feedback, watched by those who do not use our counters."""
    looking = LooksAway()
    emulated.EmulatedGraph._replay_part = looking.away(emulated.EmulatedGraph._replay_part)
    chosen = sizes(rank.arguments["microbatches"])
    told: list[list[Any]] = []
    logits: list[Tensor] = []
    with rank.runner(max_in_flight=rank.count if rank.is_first or rank.is_last else None) as stage:

        def microbatches() -> Iterator[ppb.MicroBatch]:
            for step, num_tokens in enumerate(chosen):
                if step >= rank.count:
                    tell()
                yield ppb.MicroBatch(num_tokens, tag=str(step).encode())
            while len(told) < len(chosen):
                tell()

        def tell() -> None:
            tag, tensors = stage.feedback()
            told.append([tag.decode(), tensors["next_tokens"].tolist()])

        stage.warmup()
        before = ppb.stats()
        # Dynamo leaves compiled code alone under a dispatch mode, so only its entry is passed without.
        watched = Watched(Observer(stage._stage.views(MAX_TOKENS)), Copies(stage._stage, looking))
        Entrance.__call__ = without_modes(Entrance.__call__)
        Program.__call__ = within(watched.copies, Program.__call__)
        with watched.pickles, watched.copies:
            for output in stage.run(microbatches() if rank.is_first else None):
                if rank.is_last:
                    logits.append(output["logits"])
        after = ppb.stats()
        seen = watched.seen(sends_proxies=not rank.is_last)  # closing releases landing memory
    torch.save(logits, rank.folder / f"logits_{rank.number}.pt")
    counted = {name: after[name] - before[name] for name in after if name not in ("miss_reasons", "capture_seconds")}
    return {"counted": counted, "told": told, **seen}


def without_modes(call: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any) -> Any:
        with _disable_current_modes():
            return call(*args)

    return called


def within(mode: TorchDispatchMode, call: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any) -> Any:
        with mode:
            return call(*args)

    return called


class LooksAway:
    """Whether this thread is inside a replay."""

    inside = False

    def away(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def looked_away(*args: Any) -> Any:
            outer, self.inside = self.inside, True
            try:
                return call(*args)
            finally:
                self.inside = outer

        return looked_away


class Copies(TorchDispatchMode):
    """Every copy outside of replays, by the addresses of the storages that it reads and writes."""

    NAMES = ("copy_", "_foreach_copy_", "clone", "contiguous", "_to_copy", "index_copy_", "cat")

    def __init__(self, stage: ppb.Stage, looking: LooksAway) -> None:
        super().__init__()
        self._looking = looking
        self.landing = {stage.landing(name).data_ptr(): stage.inputs[name].bytes_per_token for name in stage.inputs}
        self.ops = 0
        self.tails = 0
        """Padded rows of landing memory, filled from its own first row."""
        self.copies: list[tuple[str, frozenset[int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._looking.inside:
            return result
        self.ops += 1
        name = func.overloadpacket.__name__
        if name in self.NAMES:
            targets, sources = (args[0], args[1]) if name.endswith("copy_") else (result, args[0])
            listed = [[value] if isinstance(value, Tensor) else value for value in (targets, sources)]
            for target, source in zip(*listed, strict=name != "cat"):
                self._note(name, target, source)
        return result

    def _note(self, name: str, target: Tensor, source: Tensor) -> None:
        where, whence = (value.untyped_storage().data_ptr() for value in (target, source))
        behind_first_row = target.data_ptr() >= where + self.landing.get(where, 0)
        if where == whence and where in self.landing and behind_first_row and source.data_ptr() == whence:
            self.tails += 1
        else:
            self.copies.append((name, frozenset((where, whence))))


@dataclass
class Watched:
    pickles: Observer
    copies: Copies

    def seen(self, sends_proxies: bool) -> dict[str, Any]:
        # What the last rank sends belongs to the caller, and its memory serves other tensors later.
        sent = self.pickles.sent_storages if sends_proxies else set()
        around = [name for name, storages in self.copies.copies if storages & {*sent, *self.copies.landing}]
        return {
            "observed": self.pickles.counts,
            "receive_addresses": sorted(self.pickles.receive_addresses),
            "landing_addresses": sorted(self.copies.landing),
            "is_landing_shared": [
                any(low <= address < high for low, high in shared_landing_memory()) for address in self.copies.landing
            ],
            "sent_storages": len(sent),
            "copies_of_proxies": around,
            "other_copies": len(self.copies.copies) - len(around),
            "ops": self.copies.ops,
        }


def endless() -> Iterator[ppb.MicroBatch]:
    for step in range(10**6):
        time.sleep(0.002)
        yield ppb.MicroBatch(step % MAX_TOKENS + 1, tag=str(step).encode())


_RAISED = "raised at "


@contextlib.contextmanager
def noting_when_it_raises() -> Iterator[None]:
    """In the log: what it takes to close, or the process to end, is not part of it."""
    try:
        yield
    except BaseException:
        print(f"{_RAISED}{time.time()}", flush=True)
        raise


def fault(rank: Rank) -> None:
    """Micro-batches without end, until the victim breaks in the way that ``kind`` names, and tells when."""
    kind = rank.arguments["kind"]
    changes: dict[str, Any] = {}
    if rank.is_victim and kind in ("wrong dtype", "wrong rows"):
        changes["module"] = Wrong(EngineStage(rank.number, rank.count, num_layers=1), kind)
    if rank.is_victim and kind == "raise":
        rank.failing_step = FAULTY_STEP

    def make_inputs(num_tokens: int, tag: bytes) -> dict[str, Tensor | None]:
        if rank.is_victim and tag == (b"0" if kind.startswith("wrong") else str(FAULTY_STEP).encode()):
            print(f"fault at {time.time()}", flush=True)
            _break_now(kind)
        return rank.make_inputs(num_tokens, tag)

    with rank.runner(make_inputs=make_inputs, feedback=None, **changes) as stage, noting_when_it_raises():
        for _ in stage.run(endless() if rank.is_first else None):
            pass


class Wrong(nn.Module):
    """Returns proxies that are not what the plan says."""

    def __init__(self, module: nn.Module, kind: str) -> None:
        super().__init__()
        self.module = module
        self.changes_dtype = kind == "wrong dtype"

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        outputs = self.module(**inputs)
        wrong = outputs["residual"].double() if self.changes_dtype else outputs["residual"].repeat(2, 1)
        return {**outputs, "residual": wrong}


HANGING_STEP = 3


def hangs(rank: Rank) -> None:
    """The victim hangs in its own code; what the others raise, and where they find all ranks, is in their files."""
    kind, alone = rank.arguments["kind"], dist.new_group()

    def make_inputs(num_tokens: int, tag: bytes) -> dict[str, Tensor | None]:
        inputs = rank.make_inputs(num_tokens, tag)
        if rank.is_victim and tag == str(HANGING_STEP).encode():
            if kind == "a lock":
                a_lock_that_nobody_releases()
            assert inputs["positions"] is not None
            set_forward_context(HangsInAttention(inputs["positions"], kind, alone))  # type: ignore[arg-type]
        return inputs

    def unhurried() -> Iterator[ppb.MicroBatch]:
        for batch in endless():
            time.sleep(0.1)
            yield batch

    step_timeout_s = rank.arguments["step_timeout_s"] if rank.is_victim else None
    made = rank.runner(make_inputs=make_inputs, feedback=None, step_timeout_s=step_timeout_s)
    with made as stage, noting_when_it_raises():
        try:
            for _ in stage.run(unhurried() if rank.is_first else None):
                pass
        except ppb.errors.PeerLost as error:
            (rank.folder / f"positions_{rank.number}.json").write_text(json.dumps(error.positions))
            raise


@dataclass
class HangsInAttention:
    """In place of the ``ForwardContext``: who reads it hangs."""

    positions: Tensor
    kind: str
    group: Any

    @property
    def failing(self) -> bool:
        print(f"fault at {time.time()}", flush=True)
        if self.kind == "a collective":
            a_collective_to_which_nobody_comes(self.group)
        else:
            a_kernel_that_never_ends(self.kind == "a kernel that holds the interpreter")
        return False


def a_lock_that_nobody_releases() -> None:
    print(f"fault at {time.time()}", flush=True)
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def a_collective_to_which_nobody_comes(group: Any) -> None:
    dist.all_reduce(torch.zeros(1), group=group)


def a_kernel_that_never_ends(holds_the_interpreter: bool) -> None:
    library = ctypes.PyDLL if holds_the_interpreter else ctypes.CDLL
    library(None).sleep(600)


def _break_now(kind: str) -> None:
    if kind == "exit":
        os._exit(3)
    if kind == "SystemExit":
        sys.exit(3)
    if kind.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, kind))


def other_plan(rank: Rank) -> None:
    """The victim was set up differently."""
    kind = rank.arguments["kind"]
    changes: dict[str, Any] = {}
    if rank.is_victim and kind == "ladder":
        changes["options"] = {**OPTIONS, "capture_sizes": "4"}
    elif rank.is_victim and kind == "max_tokens":
        changes["max_tokens"] = 2 * MAX_TOKENS
    elif rank.is_victim and kind == "proxies":
        changes["inputs"] = {
            "hidden_states": PROXIES["hidden_states"],
            "residual": ppb.Proxy((HIDDEN,), torch.bfloat16),
        }
    elif rank.is_victim and kind == "transport":
        changes["transport"] = "p2p"
    elif rank.is_victim and kind == "version":
        runner.versions = lambda: {"pp_piecewise_backend": "of another day"}
    rank.runner(**changes)


def stops_before_its_trace(rank: Rank) -> None:
    """The last rank is the victim: all have stopped in order when it is to bring its trace to the others."""

    def stops(text: str) -> list[str]:
        print(f"fault at {time.time()}", flush=True)
        _break_now("SIGSTOP")
        return []

    made = rank.runner(feedback=None)
    made.trace(str(rank.folder / "trace.json"))
    if rank.is_victim:
        made._exchange = stops
    batches = (ppb.MicroBatch(1, tag=str(step).encode()) for step in range(3))
    for _ in made.run(batches if rank.is_first else None):
        pass
    with noting_when_it_raises():
        made.close()


def paused(rank: Rank) -> int:
    """The first stage has nothing to do for three times the allowed silence."""

    def microbatches() -> Iterator[ppb.MicroBatch]:
        for step in range(2):
            time.sleep(3 * rank.timeout_seconds * step)
            yield ppb.MicroBatch(3, tag=str(step).encode())

    with rank.runner() as stage:
        return sum(1 for _ in stage.run(microbatches() if rank.is_first else None))


def leaves(rank: Rank) -> int:
    """The victim goes after three micro-batches of an endless run: by ``break``, by ``close``, before it has begun."""
    how, passed = rank.arguments["how"], 0
    with rank.runner(feedback=None) as stage:
        if rank.is_victim and how == "close before run":
            stage.close()
            return 0
        steps = stage.run(endless() if rank.is_first else None)
        for _ in steps:
            passed += 1
            if rank.is_victim and passed == 3:
                if how == "close":
                    stage.close()
                break
        if how == "break":
            del steps
    return passed


class Adds(nn.Module):
    """One proxy; each stage adds one."""

    def forward(self, x: Tensor, h: Tensor | None = None) -> dict[str, Tensor]:
        return {"h": (x if h is None else h) + 1}


def warms_up_between(rank: Rank) -> dict[str, Any]:
    """Each rank warms up now and then, at micro-batches of its own, while others run theirs."""
    count, warmups, results = 24, 0, []
    proxies = {"h": ppb.Proxy((), torch.float32)}

    def microbatches() -> Iterator[ppb.MicroBatch]:
        for step in range(count):
            time.sleep(0.002)  # so that some land while others warm up
            yield ppb.MicroBatch(1 + step % 8, inputs={"x": torch.full((1 + step % 8,), float(step))})

    with rank.runner(
        Adds(),
        make_inputs=lambda num_tokens, tag: {"x": torch.zeros(num_tokens)},
        inputs=None if rank.is_first else proxies,
        outputs=None if rank.is_last else proxies,
        feedback=None,
        options={"compiler": "eager", "graphs": "emulate", "capture_sizes": "2,4"},
    ) as stage:
        for step, output in enumerate(stage.run(microbatches() if rank.is_first else None)):
            if rank.is_last:
                results.append(output["h"].tolist())
            if step % 7 == 3 + rank.number:
                stage.warmup()
                warmups += 1
    wrong = [step for step, got in enumerate(results) if got != [float(step + rank.count)] * (1 + step % 8)]
    return {"wrong": wrong, "results": len(results), "microbatches": count, "warmups": warmups}


def opens_and_closes(rank: Rank) -> dict[str, Any]:
    """Runner after runner in one process; what is open and alive after each of them, whose errors are kept."""
    proxies = {"h": ppb.Proxy((), torch.float32)}
    kept: list[BaseException] = []

    def make_inputs(num_tokens: int, tag: bytes) -> dict[str, Tensor]:
        if tag == b"1" and rank.is_last and rank.arguments["how"] == "lost":
            raise ArithmeticError("the traceback has the proxies of this micro-batch")
        return {"x": torch.zeros(num_tokens)}

    def once() -> weakref.ref[ppb.StageRunner]:
        runner = rank.runner(
            Adds(),
            make_inputs=make_inputs,
            inputs=None if rank.is_first else proxies,
            outputs=None if rank.is_last else proxies,
            feedback=None,
            options={"compiler": "eager", "graphs": "emulate", "capture_sizes": "4"},
        )
        batches = [ppb.MicroBatch(3, str(number).encode()) for number in range(3)]
        try:
            with runner:
                for _ in runner.run(batches if rank.is_first else None):
                    pass
        except (ArithmeticError, ppb.errors.PeerLost) as error:
            kept.append(error)
        return weakref.ref(runner)

    runners, descriptors, threads = [], [], []
    for _ in range(4):
        runners.append(once())
        gc.collect()
        dist.barrier()
        descriptors.append(len(os.listdir("/proc/self/fd")))
        threads.append(len(os.listdir("/proc/self/task")))
    if rank.arguments["how"] == "lost":
        assert len(kept) == 4, kept
        kept.clear()
    gc.collect()
    alive = sum(runner() is not None for runner in runners)
    return {"descriptors": descriptors, "threads": threads, "runners": alive}


def groups_on_one_port(rank: Rank) -> int:
    """Process groups with a runner each, one after the other on one port, as docs/pipeline.md says."""
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(rank.arguments["port"]))
    os.environ.update(RANK=str(rank.number), WORLD_SIZE=str(rank.count))
    store, number, count = next(iter(dist.rendezvous("env://")))
    proxies = {"h": ppb.Proxy((), torch.float32)}
    passed = 0
    for again in range(4):
        dist.init_process_group("gloo", store=dist.PrefixStore(f"group_{again}", store), rank=number, world_size=count)
        with rank.runner(
            Adds(),
            make_inputs=lambda num_tokens, tag: {"x": torch.zeros(num_tokens)},
            inputs=None if rank.is_first else proxies,
            outputs=None if rank.is_last else proxies,
            feedback=None,
            options={"compiler": "eager", "graphs": "off"},
        ) as stage:
            passed += sum(1 for _ in stage.run([ppb.MicroBatch(3)] if rank.is_first else None))
        dist.barrier()
        if again < 3:  # the last one is destroyed by who calls this
            dist.destroy_process_group()
    return passed


def autoregressive(rank: Rank) -> dict[str, Any]:
    """As many groups of requests as may be in flight; the next tokens of each come from the last stage."""
    groups, steps, started = rank.arguments["groups"], rank.arguments["steps"], 0
    tokens = {group: [[group]] for group in range(groups)}

    def make_inputs(num_tokens: int, tag: bytes) -> dict[str, Tensor | None]:
        return group_inputs(rank.is_first, tag, None) if tag else rank.make_inputs(num_tokens, tag)

    with rank.runner(make_inputs=make_inputs, max_in_flight=groups if rank.is_first or rank.is_last else None) as stage:

        def microbatches() -> Iterator[ppb.MicroBatch]:
            for group in range(groups):
                yield group_microbatch(group, 0, torch.tensor(tokens[group][-1]))
            for _ in range(groups * steps):
                tag, tensors = stage.feedback()
                group, position = map(int, tag.split())
                tokens[group].append(tensors["next_tokens"].tolist())
                if position + 1 < steps:
                    yield group_microbatch(group, position + 1, tensors["next_tokens"].clone())

        stage.warmup()
        before = ppb.stats()
        for _ in stage.run(microbatches() if rank.is_first else None):
            started += 1
        after = ppb.stats()
    names = ("recv_allocations", "proxy_copies", "graph_misses")
    return {"started": started, "tokens": tokens, "counted": {name: after[name] - before[name] for name in names}}


def group_microbatch(group: int, position: int, input_ids: Tensor) -> ppb.MicroBatch:
    tag = f"{group} {position}".encode()
    return ppb.MicroBatch(input_ids.shape[0], tag=tag, inputs=group_inputs(True, tag, input_ids))


def group_inputs(is_first: bool, tag: bytes, input_ids: Tensor | None) -> dict[str, Tensor | None]:
    """One token of the request ``group`` at a position; both are in the tag. Sets the forward context."""
    group, position = map(int, tag.split())
    positions = torch.tensor([position])
    set_forward_context(ForwardContext(torch.full_like(positions, group), positions))
    return {"input_ids": input_ids if is_first else None, "positions": positions}


SLEEP_SECONDS = 0.005


@torch.library.custom_op("runner_ranks::sleep", mutates_args=())
def sleep(x: Tensor) -> Tensor:
    """Takes its time between the captured pieces."""
    time.sleep(SLEEP_SECONDS)
    return x.clone()


@sleep.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Slowed(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {name: sleep(result) for name, result in self.module(**inputs).items()}


def slowed(rank: Rank) -> Any:
    """One rank sleeps in each step, in its forward or before it; what the report of this rank says."""
    is_slow, where = rank.number == rank.arguments["slow"], rank.arguments["where"]
    module: nn.Module = EngineStage(rank.number, rank.count, num_layers=1)
    if is_slow and where == "forward":
        module = Slowed(module)

    def make_inputs(num_tokens: int, tag: bytes) -> dict[str, Tensor | None]:
        if is_slow and where == "host" and tag:
            time.sleep(SLEEP_SECONDS)
        return rank.make_inputs(num_tokens, tag)

    in_flight = 2 * rank.count
    with rank.runner(module, make_inputs=make_inputs, max_in_flight=in_flight) as runner:

        def microbatches() -> Iterator[ppb.MicroBatch]:
            for number in range(rank.arguments["microbatches"]):
                if number >= in_flight:
                    runner.feedback()
                yield ppb.MicroBatch(4, str(number).encode())

        runner.trace(str(rank.folder / "trace.json"))
        runner.warmup()
        dist.barrier()  # else who runs first waits within its steps for those that still compile
        for _ in runner.run(microbatches() if rank.is_first else None):
            pass
        report = runner.report()
    assert report.slowest is not None
    return {
        "slowest": report.slowest.rank,
        "verdict": report.verdict,
        "bubbles": {times.rank: times.bubble_percent for times in report.ranks},
        "parts_us": {times.rank: {"forward": times.forward_us, "host": times.host_us} for times in report.ranks},
    }


SCENARIOS = {
    function.__name__: function
    for function in (
        steady,
        fault,
        hangs,
        other_plan,
        stops_before_its_trace,
        paused,
        leaves,
        warms_up_between,
        opens_and_closes,
        groups_on_one_port,
        autoregressive,
        slowed,
    )
}


# -------------------------------------------------------------------------------------- running


@dataclass
class Outcome(Ended):
    """How one rank ended, and what its scenario returned."""

    value: Any = field(default=None)

    @property
    def error(self) -> str:
        """The last line of the traceback; empty without one."""
        lines = self.log.strip().splitlines()
        return lines[-1] if "Traceback (most recent call last)" in self.log else ""

    @property
    def raised_at(self) -> float:
        """When ``run`` raised, see ``noting_when_it_raises``; else when the rank had ended."""
        return next((float(line.split()[-1]) for line in self.log.splitlines() if line.startswith(_RAISED)), self.at)


def run(
    scenario: Callable[[Rank], Any],
    count: int,
    folder: Path,
    timeout_seconds: float = 20.0,
    left_alone: Sequence[int] = (),
    **arguments: Any,
) -> list[Outcome]:
    """Play ``scenario`` on ``count`` ranks; fails when one of them hangs."""
    job = {"scenario": scenario.__name__, "timeout_seconds": timeout_seconds, "arguments": arguments}
    outcomes = []
    for number, ended in enumerate(run_ranks("runner_ranks:one_rank", count, folder, job, left_alone)):
        report = folder / f"rank_{number}.json"
        value = json.loads(report.read_text()) if report.exists() else None
        outcomes.append(Outcome(**vars(ended), value=value))
    return outcomes


def all_well(outcomes: list[Outcome]) -> list[Outcome]:
    for number, outcome in enumerate(outcomes):
        assert outcome.exit_code == 0, f"rank {number}\n{outcome.log}"
    return outcomes


def one_rank(number: int, count: int, folder: Path, job: Mapping[str, Any]) -> int:
    """What each process runs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=number, world_size=count)
    rank = Rank(number, count, folder, job["timeout_seconds"], job["arguments"])
    if rank.arguments.get("in_one_program", True):
        one_program.on()
    value = SCENARIOS[job["scenario"]](rank)
    (folder / f"rank_{number}.json").write_text(json.dumps(value))
    dist.destroy_process_group()
    return 0

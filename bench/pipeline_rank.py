"""One rank of `gpu_pipeline.py`.

The first rank decides what comes next and says it to the others (an order); all carry it out and report to the first
one, which appends what was found to FOLDER/found.jsonl, line by line.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from common import spread
from decoder import ALONE, MODELS, DecoderStage, Shares
from pipeline_hops import kernels_of
from pipeline_methods import Method, Setting, Skipped, Wires, make_method, most_in_flight
from slot_attention import MAX_SEQUENCES, StepTensors, rows_with_choice
from step_schedule import Call, Schedule, usual_kind
from torch.distributed.device_mesh import init_device_mesh

import pp_piecewise_backend as ppb
from pp_piecewise_backend.config import Mode

WARM_MICRO_BATCHES = 8
PROFILED_MICRO_BATCHES = 8
TRACED_MICRO_BATCHES = 14
CHECKED_STEPS = 6
LARGEST_REGRET = 1e-3
"""By how many standard deviations of a row's logits the chosen token's may lie below the largest one, in float32."""
SETUP_SECONDS = 600.0
Record = list[tuple[Call, torch.Tensor, torch.Tensor]]
"""Calls, the tokens that went in and those that were chosen."""


class Rank:
    """What this process holds."""

    def __init__(self, request: Mapping[str, Any], folder: Path) -> None:
        self.request, self.folder = request, folder
        self.rank, self.count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.lanes: int = request["tp"]
        self.stage_number, self.lane = divmod(self.rank, self.lanes)
        is_cuda, self.one_gpu = request["device"] == "cuda", request["one_gpu"]
        self.device = torch.device("cuda", 0 if self.one_gpu else self.rank) if is_cuda else torch.device("cpu")
        if is_cuda:
            torch.cuda.set_device(self.device)
        torch.set_num_threads(4 if is_cuda else 1)
        self.data_backend = "nccl" if is_cuda and not self.one_gpu else "gloo"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self.data_backend == "nccl" else "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=self.rank,
            world_size=self.count,
            timeout=timedelta(seconds=SETUP_SECONDS),
        )
        self.control = dist.new_group(backend="gloo")
        self.mesh: Any = None
        self.shares = ALONE
        if self.lanes > 1:
            shape = (self.count // self.lanes, self.lanes)
            self.mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("pp", "tp"))
            self.shares = Shares(self.lane, self.lanes, self.mesh.get_group("tp"))
        self.dtype = getattr(torch, request["dtype"])
        self.deadline = time.perf_counter() + request["seconds_left"]
        self.schedule = Schedule(max(request["tokens"]), request["context_tokens"], max(request["in_flight"]))
        self.setting: Setting | None = None
        self.reference: DecoderStage | None = None
        self.precise: DecoderStage | None = None
        self.methods: dict[str, Method] = {}
        self.wires: Wires | None = None

    @property
    def leads(self) -> bool:
        """Whether this rank starts micro-batches: it has the first stage, or a share of it."""
        return self.stage_number == 0

    # ------------------------------------------------------------------------------------- orders

    def say(self, name: str, **order: Any) -> list[dict[str, Any]]:
        """On the first rank: have all ranks carry the order out; their reports, with an "error" in some perhaps."""
        dist.broadcast_object_list([(name, order)], src=0, group=self.control)
        return self._carry_out(name, order)

    def follow(self) -> None:
        while True:
            heard: list[Any] = [None]
            dist.broadcast_object_list(heard, src=0, group=self.control)
            name, order = heard[0]
            if name == "end":
                return
            self._carry_out(name, order)

    def _carry_out(self, name: str, order: Mapping[str, Any]) -> list[dict[str, Any]]:
        try:
            report = getattr(self, f"do_{name}")(**order) or {}
        except Skipped as skipped:
            report = {"error": str(skipped), "skipped": True}
        except Exception as error:
            traceback.print_exc()
            report = {"error": f"{type(error).__name__}: {str(error)[:1500]}"}
        reports: list[Any] = [None] * self.count
        dist.all_gather_object(reports, report, group=self.control)
        return reports

    def do_model(self, model: str) -> dict[str, Any]:
        self.do_forget()
        began = time.perf_counter()
        stages = self.count // self.lanes
        stage = self._stage(model, self.stage_number, stages, self.shares)
        self.setting = Setting(
            self.stage_number, stages, self.lane, self.lanes, self.mesh, self.device, self.data_backend, model, stage,
            self.schedule, self.request["tokens"], self.request["compiler"],
        )  # fmt: skip
        self.synchronize()
        return {"seconds": time.perf_counter() - began, "layers": len(stage.layers)}

    def _stage(self, model: str, number: int, count: int, shares: Shares) -> DecoderStage:
        step = StepTensors(self.schedule.max_tokens, self.device)
        return DecoderStage(MODELS[model], number, count, self.schedule.slots, step, dtype=self.dtype, shares=shares)

    def do_forget(self) -> None:
        """Everything of the model before."""
        for name in list(self.methods):
            self.do_close(name)
        self.setting = self.reference = self.precise = None
        torch._dynamo.reset()
        ppb.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def do_prepare(self, variant: str) -> dict[str, Any]:
        assert self.setting is not None
        began = time.perf_counter()
        with torch.no_grad():
            self.methods[variant] = make_method(variant, self.setting, self._wires, get_args(Mode))
        self.synchronize()
        return {"seconds": time.perf_counter() - began, "device_bytes": self._device_bytes()}

    def _wires(self) -> Wires:
        assert self.setting is not None
        if self.wires is None:
            self.wires = Wires(self.setting)
        return self.wires

    def do_close(self, variant: str) -> None:
        method = self.methods.pop(variant, None)
        if method is not None:
            method.close()

    def do_block(
        self,
        variant: str,
        tokens: int,
        in_flight: int,
        count: int,
        kinds: Sequence[str],
        warm: int = WARM_MICRO_BATCHES,
    ) -> dict[str, Any]:
        """`count` micro-batches in the steady state, after `warm` others and before those that empty the pipeline."""
        method = self.methods[variant]
        marks = Marks(self.device, method.waited_us)
        before = method.counters()
        method.begin(tokens)
        total = warm + count + in_flight
        if self.leads:
            self._lead(method, tokens, in_flight, total, kinds, marks, (warm, warm + count))
        else:
            for number in range(total):
                if number in (warm, warm + count):
                    marks.set()
                method.follow()
        self.synchronize()
        after = method.counters()
        return {
            **marks.per_micro_batch(count),
            "counters": {name: (after[name] - before.get(name, 0)) / total for name in after if name in COUNTERS},
        }

    def _lead(
        self,
        method: Method,
        tokens: int,
        in_flight: int,
        total: int,
        kinds: Sequence[str],
        marks: Marks,
        marked: Sequence[int],
        record: Record | None = None,
    ) -> None:
        """Each micro-batch starts when the one that has its sequences has ended, with the tokens that it chose."""
        generator = torch.Generator(self.device).manual_seed(tokens)
        assert self.setting is not None
        vocabulary = MODELS[self.setting.model].vocabulary
        prompt = torch.randint(vocabulary, (tokens,), generator=generator, device=self.device)
        started: list[tuple[Call, torch.Tensor]] = []

        def finish(number: int) -> torch.Tensor:
            chosen = method.finish()
            if number + 1 in marked:
                marks.set()
            if record is not None:
                record.append((*started[number], chosen.clone()))
            return chosen

        for number in range(total):
            group, step = number % in_flight, number // in_flight
            call = Call(tokens, kinds[step % len(kinds)], group, step)
            ids = prompt
            if number >= in_flight:
                chosen = finish(number - in_flight)
                ids = chosen if tokens <= MAX_SEQUENCES else prompt
            if record is not None:
                started.append((call, ids.clone()))
            method.start(call, ids)
        for number in range(total - in_flight, total):
            finish(number)

    def do_profile(self, variant: str, tokens: int, in_flight: int) -> dict[str, Any]:
        """How long this rank's device works for a micro-batch, waiting in NCCL's kernels left out."""
        from torch.autograd import DeviceType

        if self.device.type != "cuda":
            return {}
        total = PROFILED_MICRO_BATCHES + in_flight
        profiler = self._profiled(variant, tokens, in_flight, total, with_host=bool(self.request["trace_folder"]))
        if self.request["trace_folder"]:
            folder = Path(self.request["trace_folder"])
            folder.mkdir(parents=True, exist_ok=True)
            assert self.setting is not None
            name = f"{self.setting.model}_{variant}_{tokens}_{in_flight}_rank{self.rank}.json.gz"
            profiler.export_chrome_trace(str(folder / name))
        work = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
        spans = [(e.time_range.start, e.time_range.end) for e in work if "nccl" not in e.name and "ppb." not in e.name]
        return {"busy_us": covered(spans) / total, "kernels": len(spans) / total}

    def do_trace(self, variant: str, tokens: int, in_flight: int) -> dict[str, Any]:
        """What ran on this rank's device while so many micro-batches were in flight."""
        if self.device.type != "cuda":
            return {"events": []}
        path = self.folder / f"trace_{self.rank}.json"
        self._profiled(variant, tokens, in_flight, TRACED_MICRO_BATCHES).export_chrome_trace(str(path))
        return {"events": kernels_of(json.loads(path.read_text()), self.rank)}

    def _profiled(self, variant: str, tokens: int, in_flight: int, total: int, with_host: bool = False) -> Any:
        """PyTorch's profiler, after so many micro-batches on the device and, if asked for, on the host."""
        from torch.profiler import ProfilerActivity, profile

        method = self.methods[variant]
        method.begin(tokens)
        self.synchronize()
        with profile(activities=[ProfilerActivity.CUDA, *[ProfilerActivity.CPU] * with_host]) as profiler:
            if self.leads:
                self._lead(method, tokens, in_flight, total, [usual_kind(tokens)], Marks(self.device), ())
            else:
                for _ in range(total):
                    method.follow()
            self.synchronize()
        return profiler

    def do_check(self, variant: str, tokens: int, in_flight: int) -> dict[str, Any]:
        """Tokens next to those of the whole model in one process."""
        assert self.setting is not None
        method = self.methods[variant]
        self.setting.stage.reset_cache()
        method.begin(tokens)
        kinds = ["jumps", "mixed"] if tokens <= MAX_SEQUENCES else ["prompts"]
        total = CHECKED_STEPS * in_flight
        before = method.counters()
        record: Record = []
        if self.leads:
            self._lead(method, tokens, in_flight, total, kinds, Marks(self.device), (), record)
        else:
            for _ in range(total):
                method.follow()
        self.synchronize()
        after = method.counters()
        counted = {name: (after[name] - before.get(name, 0)) / total for name in after if name in COUNTERS}
        return {"counters": counted, **(self._compared(record) if self.rank == 0 else {})}

    def _compared(self, record: Record) -> dict[str, Any]:
        if self.reference is None:
            assert self.setting is not None
            self.reference = self._stage(self.setting.model, 0, 1, ALONE)
            if self.dtype != torch.float32:
                self.precise = self.reference.in_float32()
        return compared(self.reference, self.schedule, record, self.precise)

    # ------------------------------------------------------------------------------------- helpers

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _device_bytes(self) -> int:
        return torch.cuda.memory_reserved() if self.device.type == "cuda" else 0

    def do_describe(self) -> dict[str, Any]:
        if self.device.type != "cuda":
            return {"device": "cpu"}
        index = self.device.index
        others = [i for i in range(torch.cuda.device_count()) if i != index]
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        )
        return {
            "device": torch.cuda.get_device_name(),
            "gpu": index,
            "peers": [i for i in others if torch.cuda.can_device_access_peer(index, i)],
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "driver": found.stdout.split()[:1],
        }


COUNTERS = (
    "replays", "eager_steps", "graph_misses", "input_copies", "output_copies", "stage_input_copies",
    "stage_inputs_in_place", "early_releases", "send_waits", "proxy_copies", "recv_allocations", "recompiles",
    "captures", "direct_entries",
)  # fmt: skip


class Marks:
    """Two moments: on the device's stream, and of the host's clocks."""

    def __init__(self, device: torch.device, waited_us: Callable[[], float | None] = lambda: None) -> None:
        self._is_cuda = device.type == "cuda"
        self._waited_us = waited_us
        self._moments: list[tuple[Any, float, float, float, float | None]] = []

    def set(self) -> None:
        event = None
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        clocks = time.perf_counter(), time.thread_time(), time.process_time()
        self._moments.append((event, *clocks, self._waited_us()))

    def per_micro_batch(self, count: int) -> dict[str, float]:
        """Milliseconds on the device, on the host where there is none; microseconds that its threads ran."""
        begin, end = self._moments
        host_ms = (end[1] - begin[1]) * 1e3
        device_ms = begin[0].elapsed_time(end[0]) if self._is_cuda else host_ms
        found = {
            "ms": device_ms / count,
            "host_ms": host_ms / count,
            "main_thread_us": (end[2] - begin[2]) * 1e6 / count,
            "process_us": (end[3] - begin[3]) * 1e6 / count,
        }
        if begin[4] is not None and end[4] is not None:
            found["host_work_us"] = (host_ms * 1e3 - (end[4] - begin[4])) / count
        return found


def compared(
    reference: DecoderStage, schedule: Schedule, record: Record, precise: DecoderStage | None = None
) -> dict[str, Any]:
    """How far the chosen tokens are from those of the whole model, which is fed what the pipeline was fed.

    `precise` is the same in float32, for other dtypes. If a logit of the reference is up to e from that, so may be one
    of a right variant, which adds up in another order: the logits of both differ by up to 2 e, and what one chooses may
    lie up to 4 e below the largest of the other.
    """
    reference.reset_cache()
    if precise is not None:
        precise.take_cache(reference)
    regrets, error = [], 0.0
    with torch.inference_mode():
        for call, ids, chosen in record:
            batch = schedule.batch(call)
            rows = torch.from_numpy(rows_with_choice(batch)).to(ids.device)
            logits = reference.logits(reference.step.fill(batch), ids, rows).float()
            got = logits.gather(1, chosen[: len(rows), None])[:, 0]
            deviations = logits.std(1)
            regrets.append((logits.amax(1) - got) / deviations)
            if precise is not None:
                exact = precise.logits(precise.step.fill(batch), ids, rows)
                error = max(error, ((logits - exact).abs().amax(1) / deviations).max().item())
    regret = torch.cat(regrets)
    largest, allowed = regret.max().item(), LARGEST_REGRET if precise is None else 4 * error
    return {
        "choices": len(regret),
        "different": int((regret > 0).sum()),
        "largest_regret": largest,
        "allowed_regret": allowed,
        "ok": largest <= allowed,  # NaN is not
    }


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """How much of the time line the spans cover together."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


# ------------------------------------------------------------------------------ on the first rank


class Plan:
    """What is done in which order, until the time is used up."""

    def __init__(self, rank: Rank) -> None:
        self.rank, self.request = rank, rank.request
        self._file = (rank.folder / "found.jsonl").open("a")

    def note(self, what: str, **found: Any) -> None:
        self._file.write(json.dumps({"what": what, **found}) + "\n")
        self._file.flush()

    @property
    def is_over(self) -> bool:
        return time.perf_counter() > self.rank.deadline

    def run(self) -> None:
        self.note("ranks", ranks=self.rank.say("describe"))
        for model in self.request["models"]:
            if self.is_over:
                break
            self._run_model(model)
        if self.is_over:
            self.note("over", sentence="the budget was used up; what is missing was not measured")
        if error := first_error(self.rank.say("forget")):
            self.note("variant", model="all", variant="all", status="failed", reason=f"at the end, {error}")

    def _run_model(self, model: str) -> None:
        reports = self.rank.say("model", model=model)
        if error := first_error(reports):
            self.note("variant", model=model, variant="all", status="failed", reason=error)
            return
        ready = []
        for variant in self.request["variants"]:
            if self.is_over:
                break
            reports = self.rank.say("prepare", variant=variant)
            if self._works(model, variant, reports):
                ready.append(variant)
        if self.request["check"]:
            for tokens in self.request["tokens"]:
                for variant in list(ready):
                    if variant != "transformers" and not self.is_over:
                        self._check(model, variant, tokens, ready)
        if self.request["rounds"]:
            for tokens in self.request["tokens"]:
                busy: dict[str, list[dict[str, Any]]] = {}
                for in_flight in sorted(self.request["in_flight"], reverse=True):
                    self._cell(model, tokens, in_flight, ready, busy)
        for variant in ready:
            if variant in self.request["trace_variants"] and not self.is_over:
                tokens, in_flight = self.request["trace_tokens"], self.request["trace_in_flight"]
                reports = self.rank.say("trace", variant=variant, tokens=tokens, in_flight=in_flight)
                events = [event for report in reports for event in report.get("events", [])]
                self.note("trace", model=model, variant=variant, error=first_error(reports), events=events)
        for variant in ready:
            self.rank.say("close", variant=variant)

    def _works(self, model: str, variant: str, reports: Sequence[Mapping[str, Any]]) -> bool:
        error = first_error(reports)
        if error is None:
            self.note("variant", model=model, variant=variant, status="ok", ranks=reports)
            return True
        is_skipped = all(report.get("skipped") for report in reports if "error" in report)
        self.note("variant", model=model, variant=variant, status="skipped" if is_skipped else "failed", reason=error)
        self.rank.say("close", variant=variant)
        return False

    def _check(self, model: str, variant: str, tokens: int, ready: list[str]) -> None:
        in_flight = min(2, self.rank.schedule.in_flight)
        reports = self.rank.say("check", variant=variant, tokens=tokens, in_flight=in_flight)
        if error := first_error(reports):
            self._drop(model, variant, error, ready)
            return
        counters = [report["counters"] for report in reports]
        self.note("check", model=model, variant=variant, tokens=tokens, **{**reports[0], "counters": counters})

    def _drop(self, model: str, variant: str, error: str, ready: list[str]) -> None:
        ready.remove(variant)
        self.note("variant", model=model, variant=variant, status="failed", reason=error)
        self.rank.say("close", variant=variant)

    def _cell(self, model: str, tokens: int, in_flight: int, ready: list[str], busy: dict[str, Any]) -> None:
        """All variants in turn, some rounds, each begun by the next of them, on a device that is warm by then."""
        names = [name for name in ready if (most_in_flight(name) or in_flight) >= in_flight]
        able = list(names)
        rounds: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in names}

        def block(variant: str, **order: Any) -> list[dict[str, Any]] | None:
            """The reports; None if the variant was dropped, now or before, or the time is used up."""
            if variant not in able or self.is_over:
                return None
            order |= {"tokens": tokens, "in_flight": in_flight, "kinds": [usual_kind(tokens)]}
            reports = self.rank.say("block", variant=variant, **order)
            if error := first_error(reports):
                able.remove(variant)
                self._drop(model, variant, error, ready)
                return None
            return reports

        fitting: dict[str, int] = {}  # micro-batches into the time of a block
        for variant in names:
            if reports := block(variant, count=2 * in_flight, warm=in_flight):
                fitting[variant] = int(1e3 * self.request["block_seconds"] / max(reports[0]["host_ms"], 1e-3))
        counts = {name: max(self.request["least_count"], min(self.request["count"], fitting[name])) for name in fitting}
        if able and able[0] in fitting and (warming := fitting[able[0]] - 2 * in_flight) > 0:
            block(able[0], count=warming, warm=in_flight)
        for number in range(self.request["rounds"]):
            for variant in rotated(list(counts), number):
                if reports := block(variant, count=counts[variant]):
                    rounds[variant].append(reports)
        for variant in list(able):
            if not rounds[variant]:
                continue
            if variant not in busy and not self.is_over and self.request["profile"]:
                profiled = self.rank.say("profile", variant=variant, tokens=tokens, in_flight=in_flight)
                busy[variant] = [] if first_error(profiled) else profiled
            self.note(
                "cell",
                model=model,
                tokens=tokens,
                in_flight=in_flight,
                variant=variant,
                count=counts[variant],
                **figures(tokens, rounds[variant], busy.get(variant, [])),
            )


def rotated(names: Sequence[str], by: int) -> list[str]:
    """The same in a ring, begun so many places further on."""
    return [names[(at + by) % len(names)] for at in range(len(names))]


def figures(
    tokens: int, rounds: Sequence[Sequence[Mapping[str, Any]]], busy: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Of one cell, from the reports of each round by rank."""
    ms = spread([reports[0]["ms"] for reports in rounds])
    found: dict[str, Any] = {
        "ms": ms,
        "host_ms": spread([reports[0]["host_ms"] for reports in rounds]),
        "tokens_per_second": tokens / ms["median"] * 1e3,
    }
    found["ranks"] = [
        {
            "main_thread_us": statistics.median(reports[rank]["main_thread_us"] for reports in rounds),
            "process_us": statistics.median(reports[rank]["process_us"] for reports in rounds),
            "counters": rounds[-1][rank]["counters"],
            **{
                name: statistics.median(reports[rank][name] for reports in rounds)
                for name in ("host_work_us",)
                if name in rounds[0][rank]
            },
        }
        for rank in range(len(rounds[0]))
    ]
    for rank, report in zip(found["ranks"], busy, strict=False):
        if "busy_us" in report:
            rank["device_busy_us"], rank["kernels"] = report["busy_us"], report["kernels"]
            rank["bubble"] = max(0.0, 1 - report["busy_us"] / 1e3 / ms["median"])
    return found


def first_error(reports: Sequence[Mapping[str, Any]]) -> str | None:
    return next((f"rank {rank}: {report['error']}" for rank, report in enumerate(reports) if "error" in report), None)


def main(request_text: str, folder: Path) -> None:
    torch._dynamo.config.recompile_limit = 64  # a program for each size of reduce-overhead
    rank = Rank(json.loads(request_text), folder)
    if rank.rank == 0:
        Plan(rank).run()
        dist.broadcast_object_list([("end", {})], src=0, group=rank.control)
    else:
        rank.follow()
    (folder / f"answer_{rank.rank}.json").write_text("null")
    dist.barrier(group=rank.control)
    sys.stdout.flush()
    os._exit(0)  # NCCL's threads may hold up the interpreter's end


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

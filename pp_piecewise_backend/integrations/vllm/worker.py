"""What a worker of vLLM does besides: proxies land in captured memory, graphs are captured at start-up, a report."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.logger import init_logger
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized, lock_workspace

from ...backend import explain, programs, warmup
from ...debug.describe import describe_graphs
from ...debug.text import grouped, ranges
from ...utils.counters import stats
from . import set_worker_options
from .landing import Landing
from .settings import capture_options

_PACKAGE = __name__.partition(".")[0]
_LOG = init_logger(f"vllm.{__name__}")

if TYPE_CHECKING:

    class Worker:
        """What is used here of ``vllm.v1.worker.gpu_worker.Worker``, which those of other devices derive from."""

        model_runner: Any
        vllm_config: Any
        cache_config: Any
        use_v2_model_runner: bool
        rank: int
        device: torch.device

        def init_device(self) -> None: ...
        def load_model(self, *args: Any, **kwargs: Any) -> None: ...
        def determine_available_memory(self) -> int: ...
        def compile_or_warm_up_model(self) -> Any: ...

else:
    Worker = object


class PiecewiseWorker(Worker):
    """Comes before a worker class of vLLM among the bases of ours."""

    landing: Landing
    """Where proxies arrive, on stages that receive any."""
    _when_warm: Mapping[str, Any] | None = None
    """Counters after warm-up."""
    _captured_with: tuple[int, ...] = ()
    """Addresses of vLLM's workspaces when the graphs were captured."""

    def init_device(self) -> None:
        super().init_device()
        _log_into_vllm()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        runner, pipeline = self.model_runner, get_pp_group()
        # On the CPU, both ends: proxies travel by gloo, since the other way receives into memory made in C++.
        pipeline.use_cpu_custom_send_recv = False
        made: Mapping[str, torch.Tensor] = {}
        if not pipeline.is_first_rank:
            make, dtype = runner.get_model().make_empty_intermediate_tensors, self.vllm_config.model_config.dtype
            made = make(batch_size=1, dtype=dtype, device=self.device).tensors
        self.landing = Landing(made, runner.max_num_tokens, self.device, get_tp_group())
        if made:
            self.landing.receive_from(pipeline)
            runner.intermediate_tensors = self.landing.buffers()
        options = {"static_outputs": True, "capture": "warmup", "max_tokens": self.landing.stage.max_tokens}
        inductor = self.vllm_config.compilation_config.inductor_compile_config
        set_worker_options(inductor, stage=self.landing.stage, **options, **capture_options(get_tp_group()))

    def determine_available_memory(self) -> int:
        """What vLLM finds after compiling, less what the graphs take that are captured now."""
        available = super().determine_available_memory()
        free_before, held_before = self._free_bytes(), _held_bytes()
        self._capture()
        taken = max(free_before - self._free_bytes(), _held_bytes() - held_before)
        if self.cache_config.kv_cache_memory_bytes:  # said by the user
            return available
        _LOG.info("Graphs of %s take %.2f GiB, which the KV cache does not get.", _PACKAGE, taken / 2**30)
        return max(0, available - taken)

    def compile_or_warm_up_model(self) -> Any:
        """vLLM's own, which may run what needs larger workspaces; graphs must not read those that it freed."""
        times = super().compile_or_warm_up_model()
        if self._captured_with != _workspaces():
            _LOG.info("Workspaces have grown since graphs were captured; they are captured again.")
            for program in programs():
                program.release()
            self._capture()
        if self._captured_with:
            lock_workspace()  # as vLLM does after captures of its own: to grow one is an error from now on
        self._when_warm = stats()
        self.landing.in_place = self.landing.elsewhere = 0
        return times

    def _capture(self) -> None:
        """Capture all buckets, in runs of vLLM's own in which attention does nothing."""
        compiled = [program for program in programs() if program.graphs is not None]
        if compiled:
            how = {"is_profile": True, **({"skip_attn": True} if self.use_v2_model_runner else {})}
            warmup(lambda num_tokens: self.model_runner._dummy_run(num_tokens, **how), _only_tokens, progress=False)
        for line in _what_is_captured():
            _LOG.info("%s", line)
        self._captured_with = _workspaces()

    def _free_bytes(self) -> int:
        if self.device.type == "cpu":
            return 0
        torch.accelerator.synchronize()
        torch.accelerator.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def pp_piecewise_report(self) -> dict[str, Any]:
        """What this worker replays, receives and copies, as plain data, for ``LLM.collective_rpc``.

        All is counted since the end of the start-up.
        """
        now, before = stats(), self._when_warm or {}
        return {
            "rank": self.rank,
            "pipeline_rank": get_pp_group().rank_in_group,
            "tensor_rank": get_tp_group().rank_in_group,
            "explain": explain(),
            "since_warm_up": {name: _difference(value, before.get(name)) for name, value in now.items()},
            "received_in_place": self.landing.in_place,
            "received_elsewhere": self.landing.elsewhere,
        }


def _only_tokens(num_tokens: int) -> tuple[tuple[int], dict[str, Any]]:
    return (num_tokens,), {}


def _workspaces() -> tuple[int, ...]:
    """Where the scratch memory of experts and attention lies, which ops find for themselves; nowhere on the CPU."""
    if not is_workspace_manager_initialized():
        return ()
    tensors = current_workspace_manager()._current_workspaces
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def _held_bytes() -> int:
    now = stats()
    return now.graph_bytes + now.static_bytes


def _difference(now: Any, before: Any) -> Any:
    if isinstance(now, Mapping):
        changed = {key: value - (before or {}).get(key, 0) for key, value in now.items()}
        return {key: value for key, value in changed.items() if value}
    return now - (before or 0)


def _what_is_captured() -> list[str]:
    """One line per program, and one for each reason why pieces of it are not captured or not padded."""
    lines = []
    for program in programs():
        graphs = describe_graphs(program)
        compute = {piece.index: piece.padding for piece in program.pieces if piece.kind == "compute"}
        if graphs.mode in ("off", "none"):
            lines.append(f"{program.name}: no graphs: {graphs.reason or getattr(program, 'reason', '')}")
            continue
        never = {entry.piece: entry.sentence for entry in graphs.never_captured}
        captured = f"{len(compute) - len(never)} of {len(compute)} pieces captured"
        lines.append(f"{program.name}: {captured} in {len(graphs.buckets)} buckets ({graphs.ladder} tokens)")
        unpadded = {at: padding for at, padding in compute.items() if at not in never and padding != "safe"}
        for what, reasons in (("not captured", never), ("not padded", unpadded)):
            for sentence, pieces in grouped(reasons, reasons.__getitem__).items():
                lines.append(f"{program.name}: piece[{ranges(pieces)}] {what}: {sentence}")
    return lines


def _log_into_vllm() -> None:
    """Have what the package logs appear in vLLM's log, unless somebody has set up its logger."""
    own, theirs = logging.getLogger(_PACKAGE), logging.getLogger("vllm")
    if not own.handlers and own.level == logging.NOTSET:
        own.handlers, own.propagate = list(theirs.handlers), False
        own.setLevel(theirs.level)

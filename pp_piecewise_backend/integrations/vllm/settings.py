"""What ``-cc.backend=pp_piecewise`` means for the rest of vLLM's config."""

from __future__ import annotations

import logging
import warnings
from dataclasses import asdict
from typing import Any

from ... import errors
from ...config import Config
from . import BACKEND, TESTED_VERSIONS

_LOG = logging.getLogger(__name__)


def configure(vllm_config: Any) -> None:
    """Fill in the config of an engine whose compile backend is ours, before vLLM derives anything from it.

    Raises:
        ConfigError: the config asks for something that does not work with this backend.
    """
    import vllm
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.platforms import current_platform

    compilation, parallel = vllm_config.compilation_config, vllm_config.parallel_config
    if compilation.mode == CompilationMode.NONE:  # --enforce-eager
        return
    if vllm.__version__.split("+")[0] not in TESTED_VERSIONS:
        warnings.warn(_untested_version(vllm.__version__), errors.PPPiecewiseWarning, stacklevel=2)
    if (refused := _refused(vllm_config)) is not None:
        raise errors.ConfigError(refused)
    if current_platform.is_cuda_alike() and Config().compiler == "inductor":
        _choose_kernels_as_for_inductor(vllm_config, current_platform)
    compilation.backend, compilation.mode = BACKEND, CompilationMode.DYNAMO_TRACE_ONCE
    if compilation.cudagraph_mode in (None, CUDAGraphMode.FULL_AND_PIECEWISE):
        compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    elif compilation.cudagraph_mode == CUDAGraphMode.PIECEWISE:  # the pieces are the backend's
        compilation.cudagraph_mode = CUDAGraphMode.NONE
    if parallel.worker_cls != "auto":
        _LOG.warning(
            "worker_cls is %r, not vLLM's own: proxies are copied, and graphs are captured while serving. Leave "
            "worker_cls out to have them received in place.",
            parallel.worker_cls,
        )
    elif current_platform.is_cpu():
        parallel.worker_cls = f"{__package__}.cpu_worker.PiecewiseCPUWorker"
    elif current_platform.is_cuda_alike():
        parallel.worker_cls = f"{__package__}.gpu_worker.PiecewiseGPUWorker"


def _choose_kernels_as_for_inductor(vllm_config: Any, platform: Any) -> None:
    """Leave to Inductor the activations and norms that vLLM leaves to its own, where the user said nothing.

    vLLM decides by the backend's name, after this, and takes its own kernels for every one but "inductor".
    """
    from vllm.config import CompilationMode

    compilation = vllm_config.compilation_config
    compilation.backend, compilation.mode = "inductor", CompilationMode.VLLM_COMPILE  # what the platform goes by
    if "all" not in compilation.custom_ops and "none" not in compilation.custom_ops:
        compilation.custom_ops.append("none")
    priority = vllm_config.kernel_config.ir_op_priority
    for op, providers in asdict(platform.get_default_ir_op_priority(vllm_config)).items():
        if not getattr(priority, op):
            setattr(priority, op, providers)


def capture_options(ranks: Any) -> dict[str, Any]:
    """Options for what the ranks of a stage do together, by the communicators of their ``GroupCoordinator``.

    vLLM's own all-reduce looks up addresses that it registers only after captures of its own. A graph of ours would
    read what is not there yet, so such sums run between the pieces; in vLLM's full graphs for decode they are captured.
    """
    own = getattr(ranks.device_communicator, "ca_comm", None)
    is_used = ranks.world_size > 1 and own is not None and not own.disabled
    return {"split_ops": "+vllm::all_reduce"} if is_used else {}


def _refused(vllm_config: Any) -> str | None:
    """What the config asks for that does not work with this backend, and what to do."""
    asked = {
        "LoRA": ("--enable-lora", vllm_config.lora_config is not None),
        "speculative decoding": ("--speculative-config", vllm_config.speculative_config is not None),
        "dual batch overlap": ("--enable-dbo", vllm_config.parallel_config.enable_dbo),
    }
    for what, (flag, is_asked) in asked.items():
        if is_asked:
            return (
                f"{what} was asked for with the compile backend pp_piecewise, in which it was not tested. Leave out "
                f"{flag}, or leave out -cc.backend to run it on vLLM's own."
            )
    return None


def _untested_version(version: str) -> str:
    tested = ", ".join(TESTED_VERSIONS)
    return f"pp_piecewise is made for vLLM {tested}, not for {version}: it may fail to start or copy proxies."

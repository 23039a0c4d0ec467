"""What vLLM's own classes make of configs on a GPU platform that is not here: ``vllm_configs.py GIVEN``, as JSON.

``GIVEN`` has the keywords of ``CompilationConfig`` and of ``IrOpPriorityConfig`` of each config. Printed for each: its
list of custom ops, and the first choice for each op that vLLM has several kernels for.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any


def main(given: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    # Kernels for GPUs, which the builds for the CPU have not, and configs do not need.
    sys.modules.setdefault("vllm._C_stable_libtorch", ModuleType("vllm._C_stable_libtorch"))
    from vllm import platforms
    from vllm.platforms.cpu import CpuPlatform
    from vllm.platforms.cuda import CudaPlatformBase

    class Platform(CpuPlatform):
        """A GPU where it is asked which kernels to take."""

        get_default_ir_op_priority = CudaPlatformBase.get_default_ir_op_priority

        def is_cpu(self) -> bool:
            return False

        def is_cuda_alike(self) -> bool:
            return True

    platforms.current_platform = Platform()  # before the modules that import it by name
    from vllm.config import CompilationConfig, KernelConfig, VllmConfig
    from vllm.config.kernel import IrOpPriorityConfig

    from pp_piecewise_backend.integrations.vllm import register

    register()
    found = []
    for compilation, priority in given:
        kernels = KernelConfig(ir_op_priority=IrOpPriorityConfig(**priority))
        made = VllmConfig(compilation_config=CompilationConfig(**compilation), kernel_config=kernels)
        first = {op: providers[0] for op, providers in vars(made.kernel_config.ir_op_priority).items()}
        found.append((made.compilation_config.custom_ops, first))
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

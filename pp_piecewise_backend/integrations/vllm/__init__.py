"""Inside vLLM: ``vllm serve MODEL --pipeline-parallel-size 2 -cc.backend=pp_piecewise``; docs/engines.md says more.

vLLM finds ``register`` through the entry point group ``vllm.general_plugins`` and calls it in each of its processes.

Note [what is changed in vLLM]
Nothing, unless ``compilation_config.backend`` names this package. Then vLLM is given a backend and a worker class, both
by name in its config, and on GPUs, where the user said nothing, the choice of kernels that it makes for its own
Inductor. Where it has no hook, a method of one object is wrapped, never one of a class:
``apply_config_platform_defaults`` of the platform, which fills in the config and passes every other one on; and, on
pipeline stages that receive, ``irecv_tensor_dict`` of the pipeline's process group, which receives the same messages
into landing memory (``landing.py``). The runner's own buffers for proxies are replaced by views of landing memory, and
on the CPU proxies travel by gloo.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

from ... import errors
from ...config import Config

NAME = "pp_piecewise"
BACKEND = f"{__name__}.backend"
"""What vLLM looks up by name, so that this process' options reach the backend."""
TESTED_VERSIONS = ("0.26.0", "0.32.0")
"""Releases of vLLM that this is written for."""

_worker_options: dict[str, Any] = {}
"""Options that the worker of this process knows."""
_inductor_settings: dict[str, Any] = {}
"""Those of vLLM's config."""


def register() -> None:
    """Have vLLM know the backend by its name. Called by vLLM, more than once in some processes."""
    from vllm.platforms import current_platform

    given = current_platform.apply_config_platform_defaults
    if hasattr(given, "__wrapped__"):
        return

    @wraps(given)
    def apply_config_platform_defaults(vllm_config: Any) -> None:
        given(vllm_config)
        if vllm_config.compilation_config.backend in (NAME, BACKEND):
            from .settings import configure

            configure(vllm_config)

    current_platform.apply_config_platform_defaults = apply_config_platform_defaults


def backend(graph_module: Any, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
    """The backend ``pp_piecewise`` with the options of this process' worker."""
    import torch._inductor.config as inductor_config

    from ...backend import backend as pp_piecewise

    # Full graphs for decode are vLLM's own, see docs/engines.md.
    own = {} if Config().sources["mode"] == "environment" else {"mode": "piecewise"}
    with inductor_config.patch(_inductor_settings):
        return pp_piecewise(graph_module, example_inputs, options=own | _worker_options, **kwargs)


def set_worker_options(inductor: Mapping[str, Any] | None = None, **options: Any) -> None:
    """Options for what is compiled from now on; where the environment sets one of them, that counts.

    Args:
        inductor: settings of Inductor, as ``compilation_config.inductor_compile_config`` has them.
    """
    config = Config()
    if config.sources["max_tokens"] == "environment":
        raise errors.ConfigError(
            f"PP_PIECEWISE_MAX_TOKENS is set to {config.max_tokens}, but inside vLLM the largest call is vLLM's: unset "
            f"it and use --max-num-batched-tokens."
        )
    _inductor_settings.clear()
    _inductor_settings.update(inductor or {})
    _worker_options.clear()
    _worker_options.update(
        {name: value for name, value in options.items() if config.sources.get(name) != "environment"}
    )

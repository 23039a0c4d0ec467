"""``torch.compile(stage, backend="pp_piecewise")``: a compile backend for pipeline stages.

Importing this package is cheap: what needs the compiler's machinery is loaded at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import errors
from .config import Config
from .utils.counters import expect, stats

if TYPE_CHECKING:
    from .backend import explain, programs, reset, seal, unseal, warmup
    from .pipeline.header import MicroBatch
    from .pipeline.runner import StageRunner
    from .runtime.stage import Proxy, Stage

__version__ = "0.1.0"

__all__ = [
    "Config",
    "MicroBatch",
    "Proxy",
    "Stage",
    "StageRunner",
    "errors",
    "expect",
    "explain",
    "programs",
    "reset",
    "seal",
    "stats",
    "unseal",
    "warmup",
]

_LOADED_AT_FIRST_USE = {
    **dict.fromkeys(("explain", "programs", "reset", "seal", "unseal", "warmup"), ".backend"),
    **dict.fromkeys(("Proxy", "Stage"), ".runtime.stage"),
    "MicroBatch": ".pipeline.header",
    "StageRunner": ".pipeline.runner",
}


def __getattr__(name: str) -> Any:
    if name not in _LOADED_AT_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_LOADED_AT_FIRST_USE[name], __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

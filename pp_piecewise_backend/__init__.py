"""``torch.compile(stage, backend="pp_piecewise")``: a compile backend for pipeline stages.

Importing this package is cheap: what needs the compiler's machinery is loaded at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import errors
from .config import Config
from .stats import expect, stats

if TYPE_CHECKING:
    from .backend import explain, programs, reset

__version__ = "0.1.0"

__all__ = ["Config", "errors", "expect", "explain", "programs", "reset", "stats"]

_LOADED_AT_FIRST_USE = {"explain": ".backend", "programs": ".backend", "reset": ".backend"}


def __getattr__(name: str) -> Any:
    if name not in _LOADED_AT_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LOADED_AT_FIRST_USE[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

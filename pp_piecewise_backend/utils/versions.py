"""Versions of what a result depends on."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

_PACKAGES = ("pp_piecewise_backend", "torch", "triton", "depyf", "transformers")


def versions() -> dict[str, str]:
    """Package, or part of the system -> version, for those that are there."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {**found, "torch": torch.__version__}

"""What an installed package promises: what importing it does not do, its names, and what is in the wheel."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import pp_piecewise_backend as ppb
from checkout import CHECKOUT, PACKAGE

PUBLIC_NAMES = [
    "Config", "MicroBatch", "Proxy", "Stage", "StageRunner", "errors", "expect", "explain", "programs", "reset", "seal",
    "stats", "unseal", "warmup",
]  # fmt: skip


def run_python(code: str, **environment: str) -> str:
    """Run code in a fresh process, away from the checkout; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=CHECKOUT.parent,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --------------------------------------------------------------------------------------- surface


def test_public_names_are_frozen() -> None:
    assert sorted(ppb.__all__) == sorted(PUBLIC_NAMES)
    assert set(PUBLIC_NAMES) <= set(dir(ppb))


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_names_are_there_and_looked_for_once(name: str) -> None:
    assert getattr(ppb, name) is vars(ppb)[name] is not None


def test_unknown_names_raise() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = ppb.Nothing


@pytest.mark.compat
def test_the_entry_point_is_registered() -> None:
    import torch._dynamo

    entries = importlib.metadata.entry_points(group="torch_dynamo_backends", name="pp_piecewise")
    assert {entry.value for entry in entries} == {"pp_piecewise_backend.backend:backend"}
    assert "pp_piecewise" in torch._dynamo.list_backends()


# --------------------------------------------------------------------------------------- imports

IMPORTS = """
import importlib, json, pkgutil, sys

def loaded():
    new, seen[:] = [name for name in sys.modules if name not in seen], list(sys.modules)
    return {"loaded": new, "cuda": torch.cuda.is_initialized()}

seen, found = [], {}
import torch
found["torch"] = loaded()
import pp_piecewise_backend as ppb
found["the package"] = loaded()
import pp_piecewise_backend.backend
found["the backend"] = loaded()
for module in pkgutil.iter_modules(ppb.__path__):
    if module.name != "__main__":
        importlib.import_module("pp_piecewise_backend." + module.name)
found["hidden"] = [name for name in ppb.__all__ if name != "errors" and not callable(getattr(ppb, name))]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    """One fresh process, in which more and more is imported: what each step loads on top of those before it."""
    return dict(json.loads(run_python(IMPORTS)))


@pytest.mark.compat
def test_importing_torch_does_not_import_the_package(imported: dict[str, Any]) -> None:
    loaded = imported["torch"]["loaded"]
    assert "torch" in loaded
    assert not [name for name in loaded if name.startswith("pp_piecewise_backend")]


@pytest.mark.compat
def test_importing_the_package_loads_nothing_heavy(imported: dict[str, Any]) -> None:
    loaded = imported["the package"]["loaded"]
    assert "pp_piecewise_backend.config" in loaded and not imported["the package"]["cuda"]
    heavy = ("depyf", "transformers", "torch", "triton", "matplotlib", "tqdm")
    assert not [name for name in loaded if name.partition(".")[0] in heavy]


def test_loading_the_backend_adds_neither_depyf_nor_transformers_nor_cuda(imported: dict[str, Any]) -> None:
    loaded = [name for step in ("torch", "the package", "the backend") for name in imported[step]["loaded"]]
    assert "pp_piecewise_backend.backend" in loaded and not imported["the backend"]["cuda"]
    assert not [name for name in loaded if name.partition(".")[0] in ("depyf", "transformers", "matplotlib")]


def test_functions_are_not_hidden_by_modules_of_the_same_name(imported: dict[str, Any]) -> None:
    assert imported["hidden"] == []


def test_importing_the_package_reads_no_settings() -> None:
    assert run_python("import pp_piecewise_backend; print('fine')", PP_PIECEWISE_NONSENSE="1").strip() == "fine"


# ----------------------------------------------------------------------------------------- wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(CHECKOUT)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.slow  # .ci/run builds the wheel and uses it
def test_the_wheel_holds_all_files_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if name.startswith("pp_piecewise_backend/")}
    on_disk = {path.relative_to(CHECKOUT).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    assert inside == {name for name in on_disk if "__pycache__" not in name}
    assert "pp_piecewise_backend/py.typed" in inside
    assert any(name.startswith("pp_piecewise_backend/demo/") and name.endswith(".safetensors") for name in inside)


@pytest.mark.slow  # .ci/run builds the wheel and uses it
def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 6 * 2**20


@pytest.mark.slow  # .ci/run builds the wheel and uses it
def test_an_installed_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import torch, pp_piecewise_backend as ppb\n"
        "options = {'compiler': 'eager'}\n"
        "double_sine = torch.compile(lambda x: 2 * x.sin(), backend='pp_piecewise', options=options)\n"
        "x = torch.arange(6.0)\n"
        "with torch.no_grad(), ppb.expect(programs=1):\n"
        "    assert torch.equal(double_sine(x), 2 * x.sin())\n"
        "print(ppb.__file__)\n"
    )
    printed = run_python(code, PYTHONPATH=str(tmp_path))
    assert printed.strip() == str(tmp_path / "pp_piecewise_backend" / "__init__.py")

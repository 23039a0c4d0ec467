"""The rules of who may import what, read from the sources; the modules themselves are not imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "pp_piecewise_backend"
ROOT = Path(__file__).parent.parent / PACKAGE

# A module may import only modules named before it, types included. A folder stands together.
ORDER = (
    "pipeline_sentences",
    "errors",
    "config",
    "utils.ranks",
    "utils.reasons",
    "utils.counters",
    "utils.torch_compat",
    "utils.dynamo_sources",
    "utils.dynamo_places",
    "utils.dynamo_guards",
    "utils.dynamo_frames",
    "utils.dynamo_entrance",
    "utils.versions",
    "utils.addresses",
    # FX graph -> GraphInput -> Piece -> CompiledPiece
    "compilation.specs",
    "compilation.fx_utils",
    "compilation.regions",
    "compilation.analysis",
    "compilation.sources",
    "compilation.placeholders",
    "compilation.attention",
    "compilation.partition",
    "compilation.row_rules",
    "compilation.padding_rules",
    "compilation.cache_key",
    "compilation.split",
    "compilation.inductor",
    # CompiledPiece -> CapturedPiece -> Program -> StageRunner
    "runtime.cudagraphs.ladder",
    "runtime.cudagraphs.memory",
    "runtime.cudagraphs.device",
    "runtime.cudagraphs.cuda",
    "runtime.cudagraphs.emulated",
    "runtime.cudagraphs.foreign",
    "runtime.tracing",
    "runtime.hooks",
    "runtime.stage",
    "runtime.ownership",
    "runtime.instructions",
    "runtime.apart",
    "runtime.padding_test",
    "runtime.capture_plan",
    "runtime.warmup",
    "runtime.bucket",
    "runtime.replay",
    "runtime.dispatch",
    "runtime.program",
    "debug.summary",
    "debug.text",
    "debug.explain",
    "debug.piece_harness",
    "debug.piece_script",
    "debug.describe",
    "debug.report",
    "debug.dynamo_frame",
    "debug.dump",
    "debug.inspect_dump",
    "backend",
    "pipeline.transports.base",
    "pipeline.transports.ending",
    "pipeline.transports.torch_distributed",
    "pipeline.transports.tensor_parallel",
    "pipeline.transports.sockets",
    "pipeline.transports.one_machine",
    "pipeline.transports.choosing",
    "pipeline.transports.shared_memory",
    "pipeline.transports.stream_sharing",
    "pipeline.transports.cuda_ipc",
    "pipeline.transports.local",
    "pipeline.plan",
    "pipeline.header",
    "pipeline.positions",
    "pipeline.fault",
    "pipeline.report",
    "pipeline.link",
    "pipeline.inbox",
    "pipeline.connect",
    "pipeline.results",
    "pipeline.watchdog",
    "pipeline.checks",
    "pipeline.runner",
)

COMPILATION = {module for module in ORDER if module.startswith("compilation.")}
RUNTIME = {module for module in ORDER if module.startswith("runtime.")}
DEBUG = {module for module in ORDER if module.startswith("debug.")}
PIPELINE = {module for module in ORDER if module.startswith("pipeline.")}
TRANSPORTS = {module for module in PIPELINE if module.startswith("pipeline.transports.")}

# What of a program's runtime the rooms of the pipeline know: leaves, of torch and integers.
KNOWN_TO_PIPELINE = {"runtime.stage", "runtime.cudagraphs.ladder", "runtime.tracing", "runtime.hooks"}

# Beyond the order: what a module must not know although it comes earlier.
MUST_NOT_KNOW = {
    "utils.counters": {"config"},
    **dict.fromkeys(
        PIPELINE - {"pipeline.runner"}, COMPILATION | RUNTIME - KNOWN_TO_PIPELINE | DEBUG | {"backend", "config"}
    ),
    "pipeline.runner": COMPILATION,
    **dict.fromkeys(TRANSPORTS, COMPILATION | RUNTIME | DEBUG | {"backend", "config"}),
}

# Outside the library core: these may import the public package and what they like besides.
OUTSIDE_THE_CORE = {"__init__", "__main__", "demo", "integrations"}


@dataclass(frozen=True)
class Door:
    """A risky dependency, and the only modules through which the core may reach it."""

    names: tuple[str, ...]
    modules: tuple[str, ...]


DOORS = (
    Door(("os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv"), ("config",)),
    Door(("torch._inductor",), ("compilation.inductor",)),
    Door(
        ("torch.cuda.CUDAGraph", "torch.cuda.graph", "torch.cuda.graphs", "torch.cuda.graph_pool_handle"),
        ("runtime.cudagraphs.cuda",),
    ),
    Door(("torch.distributed",), ("pipeline.transports.torch_distributed", "utils.ranks")),
    Door(("depyf",), ("debug.dynamo_frame",)),
)
PRIVATE_TORCH_DOORS = ("utils.torch_compat", "utils.dynamo_places", "utils.dynamo_guards", "utils.dynamo_frames")
SCRIPT = "debug.piece_harness"
"""Never imported: it is written into files that run with torch only, so it cannot use a door."""
# Underscored by their authors, yet documented or used everywhere as public.
NOT_PRIVATE = {"torch._check", "torch._foreach_copy_"}


# ---------------------------------------------------------------------------- reading one module


def dotted_names(tree: ast.AST) -> Iterator[str]:
    """Every dotted name that the code imports, or reaches through a name that it imported."""
    imported: dict[str, str] = {}
    for node in _running_code(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
                local = alias.asname or alias.name.partition(".")[0]
                imported[local] = alias.name if alias.asname else local
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Call) and _last_name(node.func) in ("import_module", "__import__"):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))
    for node in _running_code(tree):
        if isinstance(node, ast.Attribute) and (chain := _chain(node)) and chain[0] in imported:
            yield ".".join([imported[chain[0]], *chain[1:]])


def own_imports(module: str, tree: ast.AST) -> Iterator[str]:
    """The modules of this package that the code of ``module`` imports, by their dotted names without the package's.

    Args:
        module: the importing module; ``folder.__init__`` for the module of a folder.
    """
    folder = module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            assert node.level <= len(folder) + 1, f"{module} imports from above the package"
            base = [*folder[: len(folder) + 1 - node.level], *(node.module or "").split(".")]
            yield from _modules_of(".".join(filter(None, base)), [alias.name for alias in node.names])
        elif isinstance(node, ast.ImportFrom) and node.module and _under(node.module, PACKAGE):
            yield from _modules_of(node.module[len(PACKAGE) + 1 :], [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if _under(alias.name, PACKAGE):
                    yield from _modules_of(alias.name[len(PACKAGE) + 1 :], [])


def _modules_of(base: str, names: list[str]) -> Iterator[str]:
    """What ``from base import names`` imports: modules where these names are modules, else ``base`` itself."""
    inside = [module for name in names if (module := module_named(f"{base}.{name}".lstrip(".")))]
    yield from inside
    if len(inside) < len(names) or not names:
        yield module_named(base) or base


def module_named(name: str) -> str | None:
    """``name`` if it is a module, ``name.__init__`` if it is a folder of modules."""
    for module in (name, f"{name}.__init__".lstrip(".")):
        if (ROOT / module.replace(".", "/")).with_suffix(".py").exists():
            return module
    return None


def _running_code(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes, but for what stands under ``if TYPE_CHECKING:`` and never runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and _last_name(node.test) == "TYPE_CHECKING":
            for branch in node.orelse:
                yield branch
                yield from _running_code(branch)
            continue
        yield node
        yield from _running_code(node)


def _chain(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Attribute) and (rest := _chain(node.value)):
        return [*rest, node.attr]
    return [node.id] if isinstance(node, ast.Name) else []


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _is_private_torch(name: str) -> bool:
    parts = name.split(".")
    private = any(part.startswith("_") and not part.startswith("__") for part in parts[1:])
    return parts[0] == "torch" and private and not any(_under(name, public) for public in NOT_PRIVATE)


def violations_of_doors(module: str, tree: ast.AST) -> list[str]:
    found = []
    for name in sorted(set(dotted_names(tree))):
        door = next((door for door in DOORS for prefix in door.names if _under(name, prefix)), None)
        if door is not None:
            if module not in door.modules:
                found.append(f"{module} reaches {name}: only {' and '.join(door.modules)} may")
        elif _is_private_torch(name) and module not in (*PRIVATE_TORCH_DOORS, SCRIPT):
            found.append(f"{module} reaches {name}: private torch API belongs into {PRIVATE_TORCH_DOORS[0]}")
    return found


def violations_of_order(module: str, tree: ast.AST) -> list[str]:
    allowed = set(ORDER[: ORDER.index(module)]) - MUST_NOT_KNOW.get(module, set())
    imported = {name for name in own_imports(module, tree) if name != module}
    return [f"{module} imports {name}" for name in sorted(imported - allowed)]


# ------------------------------------------------------------------------------------- the rules


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def core_sources() -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOT.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if module.partition(".")[0] not in OUTSIDE_THE_CORE and not (path.stem == "__init__" and is_bare(path)):
            yield module, path


def is_bare(path: Path) -> bool:
    """Whether a module has nothing but its docstring."""
    return all(isinstance(node, ast.Expr) for node in parse(path).body)


CORE = [pytest.param(module, path, id=path.relative_to(ROOT).as_posix()) for module, path in core_sources()]


def test_every_module_of_the_core_has_its_place_in_the_order() -> None:
    assert {module for module, _ in core_sources()} == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


def test_a_folder_stands_together_in_the_order() -> None:
    folders = [module.rpartition(".")[0] for module in ORDER]
    runs = [folder for index, folder in enumerate(folders) if index == 0 or folder != folders[index - 1]]
    inner = [folder for folder in runs if folder]
    assert len(inner) == len(set(inner)), runs


@pytest.mark.parametrize(("module", "path"), CORE)
def test_risky_dependencies_are_reached_through_their_door_only(module: str, path: Path) -> None:
    assert violations_of_doors(module, parse(path)) == []


@pytest.mark.parametrize(("module", "path"), CORE)
def test_a_module_imports_only_what_comes_before_it(module: str, path: Path) -> None:
    assert violations_of_order(module, parse(path)) == []


def test_the_package_itself_loads_only_leaves() -> None:
    leaves = {"errors", "config", "utils.counters"}
    imported_at_once = {
        name
        for node in parse(ROOT / "__init__.py").body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in own_imports("__init__", ast.Module([node], []))
    }
    assert imported_at_once <= leaves


# ----------------------------------------------------------------- the rules are able to say no


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch._inductor", "torch._inductor"),
        ("import torch\ndef f():\n    return torch._inductor.config", "torch._inductor.config"),
        ("from torch import _inductor", "torch._inductor"),
        ("import torch._inductor.config as settings\nsettings.debug", "torch._inductor.config.debug"),
        ("import os\nos.environ['X']", "os.environ"),
        ("from os import getenv", "os.getenv"),
        ("def f():\n    import torch.distributed as dist", "torch.distributed"),
        ("import torch\ntorch.cuda.graph(None)", "torch.cuda.graph"),
        ("import importlib\nimportlib.import_module('depyf')", "depyf"),
        ("import depyf", "depyf"),
        ("from torch.utils import _pytree", "torch.utils._pytree"),
        ("import torch as t\nt._C._jit_set_x()", "torch._C._jit_set_x"),
    ],
)
def test_what_a_door_refuses(source: str, name: str) -> None:
    found = violations_of_doors("compilation.split", ast.parse(source))
    assert any(f"reaches {name}" in line for line in found), found


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.cuda.is_available()\ntorch._foreach_copy_([], [])\ntorch.__version__",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch._inductor",
        "import os\nos.fspath('x')",
    ],
)
def test_what_a_door_lets_through(source: str) -> None:
    assert violations_of_doors("compilation.split", ast.parse(source)) == []


@pytest.mark.parametrize(
    "source",
    [
        "from ..runtime.program import Program",
        "from ..runtime import program",
        "from .inductor import x",
        f"import {PACKAGE}.runtime.program",
        f"from {PACKAGE}.runtime.program import Program",
        "from ..demo import questions",
        f"import {PACKAGE}",
    ],
)
def test_what_the_order_refuses(source: str) -> None:
    assert violations_of_order("compilation.split", ast.parse(source)) != []


def test_what_the_order_lets_through() -> None:
    source = "from .. import errors\nfrom ..config import Config\nfrom .specs import x"
    assert violations_of_order("compilation.split", ast.parse(source)) == []


@pytest.mark.parametrize("module", ORDER[:-1])
def test_an_arrow_turned_round_is_refused(module: str) -> None:
    """Each module with an import of the next one in the order, under ``TYPE_CHECKING`` and in a function."""
    later = ORDER[ORDER.index(module) + 1].removesuffix(".__init__")
    ups = "." * len(module.split("."))
    for source in (
        f"from {ups}{later} import something",
        f"if TYPE_CHECKING:\n    from {ups}{later} import something",
        f"def f():\n    from {PACKAGE}.{later} import something",
    ):
        assert violations_of_order(module, ast.parse(source)) != [], source


def test_relative_imports_are_resolved_by_level() -> None:
    def imported(module: str, source: str) -> set[str]:
        return set(own_imports(module, ast.parse(source)))

    assert imported("pipeline.inbox", "from .header import Header") == {"pipeline.header"}
    assert imported("pipeline.inbox", "from . import header") == {"pipeline.header"}
    assert imported("pipeline.inbox", "from .. import errors, pipeline") == {"errors", "pipeline.__init__"}
    assert imported("pipeline.inbox", "from ..pipeline import Link") == {"pipeline.__init__"}
    assert imported("pipeline.__init__", "from .header import Header") == {"pipeline.header"}
    assert imported("pipeline.transports.local", "from ...config import Config") == {"config"}
    assert imported("backend", "from .pipeline.header import Header") == {"pipeline.header"}

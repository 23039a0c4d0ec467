"""Every Python block of README and of docs/ runs, and what README says that it prints is what it prints.

The blocks of one page run one after the other in one namespace, as a reader pastes them. A block that begins with
``# not run by the tests: <why>`` is left out, and one whose first line names ``torchrun --nproc-per-node N`` runs on N
ranks. Pieces are not compiled by Inductor here: a page of them takes a minute.
"""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from checkout import CHECKOUT
from pp_piecewise_backend import errors
from rank_processes import run_ranks

PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
README = PAGES[0].read_text()
NOT_RUN = "# not run by the tests: "
ENVIRONMENT = {"PP_PIECEWISE_COMPILER": "eager"}


def blocks(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def ranks_of(block: str) -> int | None:
    found = re.search(r"torchrun --nproc-per-node (\d+)", block.partition("\n")[0])
    return None if found is None else int(found[1])


def in_one_process(page: Path) -> list[str]:
    return [block for block in blocks(page) if not block.startswith(NOT_RUN) and ranks_of(block) is None]


ON_RANKS = [pytest.param(block, id=page.stem) for page in PAGES for block in blocks(page) if ranks_of(block)]


def test_few_blocks_are_left_out_and_all_say_why() -> None:
    left_out = [block.partition("\n")[0] for page in PAGES for block in blocks(page) if block.startswith(NOT_RUN)]
    assert len(left_out) <= 3 and all(len(line) > len(NOT_RUN) for line in left_out)
    assert NOT_RUN not in README
    assert len(in_one_process(PAGES[0])) >= 3 and len(ON_RANKS) >= 2


OF_A_REAL_MODEL = "walk"
"""A page that ``test_walk.py`` runs."""


@pytest.mark.usefixtures("fresh_backend")
@pytest.mark.parametrize(
    "page", [p for p in PAGES if in_one_process(p) and p.stem != OF_A_REAL_MODEL], ids=lambda page: page.stem
)
def test_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", errors.PPPiecewiseWarning)
        for block in in_one_process(page):
            exec(compile(block, page.name, "exec"), namespace)
    if page.name == "README.md":
        check_printed(capsys.readouterr().out)


def check_printed(printed: str) -> None:
    """The lines that README shows are among those printed, but for seconds and what the compiler changes."""
    shown = blocks(PAGES[0], "text")[0].splitlines()
    assert len(shown) > 5

    def bare(line: str) -> str:
        return re.sub(r"key \w+", "key", re.sub(r"[\d.]+ s\b", "s", line)).strip()

    lines = {bare(line) for line in printed.splitlines()}
    assert [line for line in shown if line.strip() != "..." and bare(line) not in lines] == []


@pytest.mark.process
@pytest.mark.parametrize("block", ON_RANKS)
def test_blocks_run_on_ranks(block: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(block)
    count = ranks_of(block)
    assert count is not None
    ended = run_ranks("doc_ranks:one_rank", count, tmp_path, {"program": str(program), "environment": ENVIRONMENT})
    assert [rank.exit_code for rank in ended] == [0] * count, "\n".join(rank.log for rank in ended)


@pytest.mark.slow  # mypy reads all of torch
def test_blocks_pass_strict_type_checks(tmp_path: Path) -> None:
    programs = []
    for page in PAGES:
        if alone := in_one_process(page):
            programs.append(tmp_path / f"{page.stem.replace('-', '_').lower()}_page.py")
            programs[-1].write_text("\n".join(alone))
        for number, block in enumerate(block for block in blocks(page) if ranks_of(block)):
            programs.append(tmp_path / f"{page.stem.replace('-', '_').lower()}_ranks_{number}.py")
            programs[-1].write_text(block)
    settings = tmp_path / "mypy.ini"
    settings.write_text(
        "[mypy]\nstrict = true\nallow_redefinition = true\n"
        "[mypy-torch.*,pp_piecewise_backend.*]\nfollow_imports = silent\n"
        "[mypy-transformers.*]\nfollow_imports = skip\nignore_missing_imports = true\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", str(settings), *map(str, programs)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr

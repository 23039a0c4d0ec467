"""The documents say what is there: options, files, notes, reasons, links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from checkout import CHECKOUT, PACKAGE
from pp_piecewise_backend.__main__ import main
from pp_piecewise_backend.utils.reasons import SENTENCES

DOCS = CHECKOUT / "docs"
PAGES = [CHECKOUT / "README.md", *sorted(DOCS.glob("*.md"))]
OUTSIDE_THE_CORE = ("demo",)


def test_options_are_those_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """To bring it up to date, paste what ``python -m pp_piecewise_backend env --markdown`` prints."""
    assert main(["env", "--markdown"]) == 0
    assert capsys.readouterr().out in (DOCS / "options.md").read_text()


def test_architecture_names_every_file() -> None:
    text = (DOCS / "architecture.md").read_text()
    rooms = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py" and path.relative_to(PACKAGE).parts[0] not in OUTSIDE_THE_CORE
    }
    folder = ""
    named = set()
    for line in text.partition("## The rooms")[2].partition("## Doors")[0].splitlines():
        if heading := re.match(r"(?:### )?`([\w/]+/)`", line):
            folder = heading[1]
        elif line.startswith("### "):
            folder = ""
        if line.startswith("| `"):
            named |= {folder + name for name in re.findall(r"`([\w/]+\.py)`", line.split("|")[1])}
    assert named - {"__init__.py"} == rooms


def test_architecture_names_every_note() -> None:
    table = (DOCS / "architecture.md").read_text().partition("## Notes")[2]
    named = set(re.findall(r"^\| ([^|`]+) \| `([\w/.]+)` \|$", table, flags=re.MULTILINE))
    written = {
        (note, path.relative_to(PACKAGE).as_posix())
        for path in PACKAGE.rglob("*.py")
        for note in re.findall(r'^(?:\s*|.*""")Note \[([^\]]+)\]', path.read_text(), flags=re.MULTILINE)
    }
    assert named == written


def test_files_that_the_walk_names_are_there() -> None:
    walk = (DOCS / "architecture.md").read_text().partition("## The walk")[2].partition("## The rooms")[0]
    files = re.findall(r"`([\w/]+\.py)`", walk)
    assert len(files) >= 6 and [name for name in files if not (PACKAGE / name).is_file()] == []


def test_debugging_explains_every_reason() -> None:
    assert set(re.findall(r"^\| `([\w-]+)` \|", (DOCS / "debugging.md").read_text(), flags=re.MULTILINE)) == set(
        SENTENCES
    )


def test_readme_is_short() -> None:
    assert len((CHECKOUT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose)
    assert [target for target in targets if "://" not in target and not (page.parent / target).exists()] == []

"""Docstrings, comments, messages and documents are in the words of the field."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

from checkout import CHECKOUT, PACKAGE

REFUSED = {
    r"\btokens? (?:that )?meets?\b|\btokens? met\b": "an op mixes tokens",
    r"\banew\b": "recomputed, recaptured, again",
    r"\bg[ia]ves? back\b": "returns, releases, restores",
    r"\btold\b(?! apart)": "notified, reported, sent",
    r"\bnews\b": "notice",
    r"\banyhow\b": "in any case",
    r"\bbehind (?:the (?:last|first|token)|its (?:end|tokens|arguments)|each step|itself|them\b)": "after",
}
SOURCES = sorted(PACKAGE.rglob("*.py"))
PAGES = [CHECKOUT / "README.md", CHECKOUT / "CHANGELOG.md", *sorted((CHECKOUT / "docs").glob("*.md"))]


def prose(path: Path) -> str:
    """The text of a document, or the comments and strings of a source: names of variables are nobody's prose."""
    text = path.read_text()
    if path.suffix != ".py":
        return text
    spoken = {"COMMENT", "STRING", "FSTRING_MIDDLE"}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join(token.string for token in tokens if tokenize.tok_name[token.type] in spoken)


def found_in(text: str) -> dict[str, str]:
    """What is refused -> what to say instead."""
    one_line = re.sub(r"\s+(?:# )?", " ", text)
    return {found[0]: cure for word, cure in REFUSED.items() for found in re.finditer(word, one_line, re.IGNORECASE)}


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=lambda path: path.relative_to(CHECKOUT).as_posix())
def test_words(path: Path) -> None:
    assert found_in(prose(path)) == {}


def test_words_are_found_across_lines() -> None:
    assert found_in("views are made\n    # anew") == {"anew": "recomputed, recaptured, again"}
    assert found_in("colours that are told apart, released after the last step") == {}

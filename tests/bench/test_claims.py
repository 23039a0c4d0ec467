"""README and docs/benchmarks.md say what the files in bench/results say."""

from __future__ import annotations

import re
import sys

import pytest

from checkout import BENCH

sys.path.insert(0, str(BENCH))
import claims

PAGES = (claims.README, claims.BENCHMARKS)


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: re.sub(r"\W+", "-", f"{claim.page}-{claim.name}"))
def test_a_page_says_what_its_file_says(claim: claims.Table | claims.Sentence) -> None:
    """``python bench/claims.py`` says what to bring up to date."""
    assert claims.differences(claim) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_table_of_figures_comes_from_a_file(page: str) -> None:
    found = claims.corners(claims.page(page))
    known = [
        claim.corner.partition(" |")[0] for claim in claims.CLAIMS if claim.page == page and hasattr(claim, "corner")
    ]
    assert sorted(found) == sorted(known) and found


@pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: re.sub(r"\W+", "-", f"{claim.page}-{claim.name}"))
def test_another_figure_is_noticed(claim: claims.Table | claims.Sentence) -> None:
    """Each of them, one at a time, with its last digit changed."""
    text, data = claims.page(claim.page), claims.result(claim.result)
    if isinstance(claim, claims.Table):
        begin = text.index(f"| {claim.corner} |")
        begin = text.index("\n", text.index("\n", begin) + 1)
        end = text.index("\n\n", begin)
        figures = list(re.finditer(r"(?<=\| )[\d.]+(?= \|)", text[begin:end]))
        assert len(figures) == len(claim.rows) * len(claim.columns)
    else:
        text = " ".join(text.split())
        right = claim.template.format(*claim.values(data))
        begin = text.index(right)
        figures = list(re.finditer(r"\d+(?:\.\d+)?", text[begin : begin + len(right)]))
    for figure in figures:
        at = begin + figure.end() - 1
        other = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
        assert len(list(claim.differences(other, data))) == 1, figure[0]


def test_the_command_prints_file_command_and_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert claims.main() == 0
    printed = capsys.readouterr().out
    data = claims.result("gpu_latency")
    assert printed.startswith(
        "README.md, table 'two GPUs': as in the file\n  bench/results/gpu_pipeline_7b_in_parts.json"
    )
    assert (
        "docs/benchmarks.md, table 'ms per call': as in the file\n"
        f"  bench/results/gpu_latency.json, of {data['finished'][:10]}\n"
        f"  {data['command']}\n"
        f"  {data['environment']['device']}, CUDA "
    ) in printed
    assert all(claims.result(claim.result)["command"] in printed for claim in claims.CLAIMS)


def test_the_command_fails_where_a_page_differs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = claims.page(claims.README).replace("| **pp_piecewise** | ", "| **pp_piecewise** | 1")
    monkeypatch.setattr(claims, "page", lambda name: other)
    monkeypatch.setattr(claims, "CLAIMS", claims.CLAIMS[:1])
    assert claims.main() == 1
    assert re.search(r"  row 'pp_piecewise', column \(1, 1\): 1([\d.]+), and \1 in the file", capsys.readouterr().out)

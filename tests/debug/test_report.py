"""The page: what is on it, that nothing on it comes from elsewhere, and how it behaves in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import pp_piecewise_backend as ppb
from checkout import PACKAGE
from dumping import program_folders, run_small, run_toy_stage, summary_of
from pp_piecewise_backend.debug.report import report_page
from pp_piecewise_backend.debug.summary import BucketEntry, Graphs, MissEntry, Summary

pytestmark = pytest.mark.usefixtures("fresh_backend", "no_gradients")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TIMES = "\N{MULTIPLICATION SIGN}"
VOID = {"meta", "link", "br", "hr", "img", "input"}


class _Page(HTMLParser):
    """Checks that every tag is closed, and collects tags and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.tags if name in (attributes.get("class") or "").split()]


def dumped_stage(folder: Path, num_layers: int) -> Path:
    run_toy_stage(folder, num_layers, sizes=(5,))
    return program_folders(folder)[0]


def example(tmp_path: Path, **changes: Any) -> tuple[Summary, str]:
    run_small(tmp_path)
    summary = summary_of(program_folders(tmp_path)[0]).model_copy(update=changes)
    return summary, report_page(summary, {})


# ------------------------------------------------------------------------------ what is on it


@pytest.mark.compat
@pytest.mark.parametrize("num_layers", [2, 12])
def test_a_stage_of_any_depth(num_layers: int, tmp_path: Path) -> None:
    folder = dumped_stage(tmp_path, num_layers)
    text = (folder / "report.html").read_text()
    page = _Page(text)
    assert len(text) < 150_000
    assert f"{num_layers + 1} compute pieces 3 distinct {num_layers} eager steps" in page.text
    for proxy in ("hidden_states", "residual"):
        assert re.search(rf"proxies in .*?{proxy} float32\[5, 64\].*? attention", page.text)
    assert "results out" in page.text and "split at toy::attention*" in page.text
    assert page.text.index("Why did this call not replay?") < page.text.index("The stage")
    folds = page.with_class("repeat")
    assert len(folds) == (num_layers > 2)
    if folds:
        assert f"{num_layers - 1} {TIMES} 1 to {2 * num_layers - 2} attention eager piece 2" in page.text
    assert f"self.layers.{{0..{num_layers - 1}}}.mlp.down.weight {num_layers} float32[64, 128]" in page.text
    assert "class Piece(torch.nn.Module)" in page.text and "def differences(" not in page.text
    assert "argparse" not in page.text  # the graph, not what is the same in every script
    for mark in ("release: after this step", "send: this step writes results"):
        assert text.count(f'title="{mark}') == 1


def test_eighty_layers_are_no_longer_than_a_few(tmp_path: Path) -> None:
    summary = summary_of(dumped_stage(tmp_path, 4))
    first, block, last = summary.pieces[:1], summary.pieces[1:3], summary.pieces[-2:]
    pieces = [*first, *block * 79, *last]
    deep = summary.model_copy(
        update={"pieces": [p.model_copy(update={"index": index}) for index, p in enumerate(pieces)]}
    )
    page = _Page(report_page(deep, {}))
    assert f"79 {TIMES} 1 to 158 attention eager piece 2" in page.text
    (fold,) = page.with_class("repeat")
    assert "open" not in fold
    assert len(page.with_class("step")) == 4  # the same as for four layers


def test_captured_missed_and_broken_are_told_apart(tmp_path: Path) -> None:
    graphs = Graphs(
        mode="emulate",
        buckets=[BucketEntry(tokens=8, bytes=5 * 2**20, seconds=0.25, pieces=2)],
        misses=[MissEntry(reason="address", sentence="input weight moved", pieces=1, tokens=8, call=7)],
        addresses=[{"input": "weight", "pointer": 4096}],
    )
    summary, text = example(tmp_path, graphs=graphs)
    page = _Page(text)
    assert "address input weight moved 1 8 7" in page.text and "8 2 5.0 MiB 0.250" in page.text
    assert '1 address that the graphs rely on {"input": "weight", "pointer": 4096}' in page.text
    assert len(page.with_class("captured")) == 3  # two pieces and the legend
    pieces = [p.model_copy(update={"failure": "no C++ compiler"}) if p.index == 2 else p for p in summary.pieces]
    page = _Page(report_page(summary.model_copy(update={"pieces": pieces}), {}))
    assert "piece 2 ran as plain FX: no C++ compiler" in page.text
    assert len(page.with_class("broken")) == 2 and len(page.with_class("captured")) == 2


def test_widths_follow_the_time_where_there_is_one(tmp_path: Path) -> None:
    summary, text = example(tmp_path)
    assert not any("style" in box for box in _Page(text).with_class("box"))
    times = {0: 1e-3, 1: 2e-4, 2: 2e-3}
    pieces = [p.model_copy(update={"step_seconds": times[p.index]}) for p in summary.pieces]
    page = _Page(report_page(summary.model_copy(update={"pieces": pieces}), {}))
    widths = [int(re.findall(r"\d+", box["style"] or "")[0]) for box in page.with_class("compute") if "style" in box]
    assert len(widths) == 2 and widths[1] == 280 and 150 < widths[0] < 220
    assert "1000 us" in page.text and "200 us" in page.text


def test_a_graph_that_is_not_split(tmp_path: Path) -> None:
    with torch.enable_grad(), pytest.warns(ppb.errors.PPPiecewiseWarning):
        run_small(tmp_path)
    page = _Page((program_folders(tmp_path)[0] / "report.html").read_text())
    assert "This graph is not split: to serve, call the model under torch.inference_mode()" in page.text
    assert "The stage" not in page.text


@pytest.mark.compat
def palettes() -> dict[str, dict[str, str]]:
    """Variables of the light and of the dark page -> colours; what the dark one does not set, it has from the other."""
    css = (PACKAGE / "debug" / "report.css").read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6})", part)) for part in css.split("* {")[0].split("@media", 1)
    )
    assert dark.keys() <= light.keys()
    return {"light": light, "dark": {**light, **dark}}


def contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it, 1 to 21; 4.5 is the least for text."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        channels = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("name", ["light", "dark"])
def test_text_can_be_read_on_light_and_dark_pages(name: str) -> None:
    colours = palettes()[name]
    assert contrast(colours["paper"], "#ffffff" if name == "light" else "#000000") < 2
    for background in ("paper", "card", "fold", "calm", "good", "bad", "eager", *(f"c{index}" for index in range(6))):
        assert contrast(colours["ink"], colours[background]) >= 7, background
        assert contrast(colours["soft"], colours[background]) >= 3.5, background
    for pair in (("on-dark", "dark"), ("soft-on-dark", "dark"), ("on-code", "code"), ("soft", "card")):
        assert contrast(*(colours[each] for each in pair)) >= 4.5, pair


def test_every_colour_is_one_of_a_palette() -> None:
    rules = (PACKAGE / "debug" / "report.css").read_text().partition("* {")[2]
    assert len(rules) > 1000 and re.findall(r"#[0-9a-f]{3,8}\b|\brgb|: (?:white|black)", rules) == []


def test_seconds_are_rounded(tmp_path: Path) -> None:
    folder = dumped_stage(tmp_path, 2)
    summary = summary_of(folder)
    summary.counters["compile_seconds"] = 1.0435897639999894
    page = report_page(summary, {})
    assert "<td>1.044</td>" in page and "1.0435" not in page


def test_names_are_text_and_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    summary, _ = example(tmp_path)
    pieces = [p.model_copy(update={"reason": evil, "ops": [evil]}) for p in summary.pieces]
    inputs = [i.model_copy(update={"source": evil, "reason": '"' + evil}) for i in summary.inputs]
    changes = {"name": evil, "token_reason": evil, "pieces": pieces, "inputs": inputs, "not_split": evil}
    text = report_page(summary.model_copy(update=changes), {pieces[0].file: evil})
    page = _Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1 and "alert(1)" in page.text
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,"))
    assert not re.search(r"https?:|@import|url\(", text)


# ------------------------------------------------------------------------------- in a browser


def in_chromium(page: Path, tmp_path: Path) -> tuple[str, str]:
    """The document as it is after its scripts ran, and what the browser logged."""
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium, which is not installed")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1280,1000",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def in_console(log: str) -> list[str]:
    return [line for line in log.splitlines() if "CONSOLE" in line]


PLAY = """
<script>
const seen = { errors: [], wide: document.documentElement.scrollWidth > 1280 };
window.addEventListener("error", (event) => seen.errors.push(event.message));
window.addEventListener("load", () => {
  const fold = document.querySelector("details.repeat"), button = document.getElementById("unfold");
  const visible = () => [...document.querySelectorAll(".box")].filter((box) => box.checkVisibility()).length;
  seen.folded = visible();
  fold.querySelector("summary").click();
  seen.unfolded = visible();
  fold.querySelector("summary").click();
  seen.folded_again = visible();
  button.click();
  setTimeout(() => {
    seen.all_open = fold.open, seen.label = button.textContent;
    const steps = [...document.querySelectorAll("details.step")];
    const shut = () => steps.filter((step) => !step.open).length;
    document.querySelector("a.box.compute").click();
    seen.step_open = steps[0].open;
    show(steps[1].id), seen.link_opens = steps[1].open;
    const before = shut();
    dispatchEvent(new Event("beforeprint")), seen.printed_shut = shut();
    dispatchEvent(new Event("afterprint")), seen.shut_again = before > 0 && shut() === before;
    const result = document.createElement("output");
    result.id = "seen";
    result.textContent = JSON.stringify(seen);
    document.body.append(result);
  }, 100);
});
</script>
"""


@pytest.mark.slow
def test_it_renders_folds_and_unfolds_in_chromium(tmp_path: Path) -> None:
    folder = dumped_stage(tmp_path, 6)
    _, log = in_chromium(folder / "report.html", tmp_path)
    assert in_console(log) == []
    played = folder / "played.html"
    played.write_text((folder / "report.html").read_text().replace("</body>", PLAY + "</body>"))
    document, log = in_chromium(played, tmp_path)
    assert in_console(log) == []
    found = re.search(r'<output id="seen">(.*?)</output>', document)
    assert found is not None
    seen = json.loads(found.group(1))
    # 13 steps: piece 0, five times attention and a piece, attention, the last piece
    assert seen == {
        "errors": [], "wide": False, "folded": 5, "unfolded": 13, "folded_again": 5, "all_open": True,
        "label": "fold all", "step_open": True, "link_opens": True, "printed_shut": 0, "shut_again": True,
    }  # fmt: skip


@pytest.mark.slow
def test_the_browser_would_have_shown_an_error(tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text("<!DOCTYPE html><script>null.nothing()</script>")
    _, log = in_chromium(broken, tmp_path)
    assert in_console(log)

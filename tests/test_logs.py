"""What is logged at INFO: one line per program and one per warm-up, also with ``TORCH_LOGS``."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch

import pp_piecewise_backend as ppb
from forked import run_program
from models.attention_layers import HIDDEN, Layers

PROGRAM = r"Layers#0: 3 compute pieces \(3 distinct\), 3 compiled in \d+\.\d\d s, 0 reused; "


def run(graphs: str) -> None:
    options = {"compiler": "eager", "graphs": graphs, "max_tokens": 4}
    hidden_states = torch.ones(3, HIDDEN)
    torch._dynamo.mark_dynamic(hidden_states, 0)
    with torch.no_grad():
        torch.compile(Layers(), backend="pp_piecewise", options=options)(hidden_states=hidden_states)


@pytest.mark.usefixtures("fresh_backend")
@pytest.mark.parametrize(
    ("graphs", "end"),
    [("emulate", "graphs for buckets of 1, 2, 4 tokens"), ("off", "no graphs: graphs='off'")],
)
def test_one_line_per_program(graphs: str, end: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pp_piecewise_backend"):
        run(graphs)
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("pp_piecewise_backend")]
    assert re.fullmatch(PROGRAM + re.escape(end), line)
    (program,) = ppb.programs()
    assert program.name == "Layers#0"


@pytest.mark.compat
def test_torch_logs_shows_it_once(tmp_path: Path) -> None:
    """torch takes the name of a package for a logger: nothing has to be registered."""
    (tmp_path / "program.py").write_text("import test_logs\n\ntest_logs.run(graphs='off')\n")
    done = run_program(tmp_path / "program.py", environment={"TORCH_LOGS": "+pp_piecewise_backend"})
    lines = [line for line in done.log.splitlines() if "pp_piecewise_backend" in line]
    assert done.exit_code == 0 and len(lines) == 1 and re.search(PROGRAM, lines[0]), done.log

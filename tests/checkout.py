"""Where things lie in this checkout."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent
CHECKOUT = TESTS.parent
PACKAGE = CHECKOUT / "pp_piecewise_backend"
BENCH = CHECKOUT / "bench"

"""The command line: ``python -m pp_piecewise_backend COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .demo import command as demo


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pp_piecewise_backend",
        description="A torch.compile backend for pipeline stages: tools around it.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    demo_parser = commands.add_parser(
        "demo",
        help="run a small decoder as a pipeline of processes and compare it with eager",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_arguments(demo_parser)
    demo_parser.set_defaults(run=demo.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Raises `SystemExit` (code 2) for unreadable arguments."""
    options = build_parser().parse_args(arguments)
    return int(options.run(options))


if __name__ == "__main__":
    sys.exit(main())

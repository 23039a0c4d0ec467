"""The command line: ``python -m pp_piecewise_backend COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import errors
from .config import Config
from .debug import inspect_dump
from .demo import command as demo


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pp_piecewise_backend",
        description="A torch.compile backend for pipeline stages: tools around it.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, tool, text in (
        ("demo", demo, "run a small decoder as a pipeline of processes and compare it with eager"),
        ("inspect", inspect_dump, "show a dump, or what differs between two"),
    ):
        tool_parser = commands.add_parser(name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        tool.add_arguments(tool_parser)
        tool_parser.set_defaults(run=tool.run)
    env_parser = commands.add_parser("env", help="every option: environment variable, value in effect, source")
    env_parser.add_argument("--markdown", action="store_true", help="as a table with the defaults and what they mean")
    env_parser.set_defaults(run=show_options)
    return parser


def show_options(options: argparse.Namespace) -> int:
    """Print every option as the environment sets it now; 2 if the environment has an error."""
    try:
        table = Config.resolve().table()
    except errors.ConfigError as error:
        print(f"env: {error}", file=sys.stderr)
        return 2
    if options.markdown:
        print("| option | environment | default | meaning |\n|---|---|---|---|")
        for name, environment_name, _, _, default, meaning in table:
            print(f"| `{name}` | `{environment_name}` | `{default}` | {meaning} |")
        return 0
    rows = [("option", "environment", "value", "source"), *(row[:4] for row in table)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Raises `SystemExit` (code 2) for unreadable arguments."""
    options = build_parser().parse_args(arguments)
    return int(options.run(options))


if __name__ == "__main__":
    sys.exit(main())

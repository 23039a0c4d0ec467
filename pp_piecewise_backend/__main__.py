"""The command line: ``python -m pp_piecewise_backend COMMAND``."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

CONSOLE_SCRIPT = "pp-piecewise"
MOST_COLUMNS = 120
ENV_DESCRIPTION = """\
Prints every option of the backend: its environment variable, the value that it has in this environment, and where that
comes from, and what it means. options= of torch.compile beats the environment."""


def build_parser() -> argparse.ArgumentParser:
    # Here, and not above, so that Ctrl-C in them is caught, too.
    from .debug import inspect_dump
    from .demo import command as demo
    from .integrations.check import command as check
    from .integrations.generation import command as generation

    called = Path(sys.argv[0]).name
    parser = argparse.ArgumentParser(
        prog=called if called == CONSOLE_SCRIPT else "python -m pp_piecewise_backend",
        description="A torch.compile backend for pipeline stages: tools around it.",
    )
    parser.add_argument("--version", action="store_true", help="print the versions of the package and of torch")
    parser.set_defaults(run=lambda options: show_versions() if options.version else parser.print_help())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, tool, text in (
        ("demo", demo, "run a small decoder as a pipeline of processes and compare it with eager"),
        ("generate", generation, "answer prompts with a local decoder, run as a pipeline of processes"),
        ("check", check, "compare pipelines of a decoder with eager at every bucket edge"),
        ("inspect", inspect_dump, "show a dump, or what differs between two"),
    ):
        tool_parser = commands.add_parser(name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        tool.add_arguments(tool_parser)
        tool_parser.set_defaults(run=tool.run)
    text = "every option: environment variable, value in effect, source"
    env_parser = commands.add_parser("env", help=text, description=ENV_DESCRIPTION)
    env_parser.add_argument("--markdown", action="store_true", help="as a table with the defaults and what they mean")
    env_parser.set_defaults(run=show_options)
    return parser


def show_versions() -> None:
    for package in ("pp_piecewise_backend", "torch"):
        try:
            print(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            print(package, "not installed")


def show_options(options: argparse.Namespace) -> int:
    """Print every option as the environment sets it now; 2 if the environment has an error."""
    from . import errors
    from .config import Config

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
    # Values can be long, so they come last.
    rows = [("option", "environment", "source", "value")]
    rows += [(row.name, row.environment_name, row.source, row.value) for row in table]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    columns = min(MOST_COLUMNS, shutil.get_terminal_size((MOST_COLUMNS, 0)).columns)
    for row, meaning in zip(rows, ["", *(row.help for row in table)], strict=True):
        *cells, value = (text.ljust(width) for text, width in zip(row, widths, strict=True))
        line, indent, value = "  ".join(cells), " " * 4, value.rstrip()
        # A value stays whole, to be copied.
        print(f"{line}  {value}" if len(f"{line}  {value}") <= columns else f"{line.rstrip()}\n{indent}{value}")
        for line in textwrap.wrap(meaning, columns, initial_indent=indent, subsequent_indent=indent):
            print(line)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code, which is that of shells when Ctrl-C or a closed pipe ends it.

    Raises `SystemExit` (code 2) for unreadable arguments.
    """
    name = "pp_piecewise_backend"
    try:
        options = build_parser().parse_args(arguments)
        name = options.command or name
        exit_code = int(options.run(options) or 0)
        print(end="", flush=True)  # also where there is no output, as after >&-
        return exit_code
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        print(f"{name}: stopped, since what reads its output has ended", file=sys.stderr)
        with contextlib.suppress(OSError, ValueError):  # what is still to be written would fail at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `fastseg predict`, `convert`, `export`, `info`, `demo`, `tune` and `bench`.

Exit status: 0 where all went well, 1 where some or all of the work failed, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import fastseg

from . import bench, convert, demo, export, info, predict, tune
from .options import CommandError

INTERRUPTED = 130  # as shells report a process ended by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="fastseg", description="SegFormer semantic segmentation, fast."
    )
    parser.add_argument("--version", action="version", version=f"fastseg {fastseg.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (predict, convert, export, info, demo, tune, bench):
        command.add_parser(commands)
    argv = list(sys.argv[1:] if argv is None else argv)
    # argparse would take the options of the benchmarks for its own.
    passed_on = argv[1:] if argv[:1] == [bench.NAME] else []
    try:
        arguments = parser.parse_args(argv[:1] if passed_on else argv)
    except SystemExit as stop:  # argparse has said why
        return stop.code if isinstance(stop.code, int) else 2
    if arguments.command == bench.NAME:
        arguments.arguments = passed_on
    try:
        status: int = arguments.run(arguments)
    except CommandError as error:
        print(f"fastseg {arguments.command}: error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print(f"fastseg {arguments.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return status

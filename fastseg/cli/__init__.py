"""The command line: `fastseg predict`, `evaluate`, `convert`, `export`, `info`, `demo` and others.

Exit status: 0 where all went well, 1 where some or all of the work failed, 2 for wrong usage, 141
where all went well but whoever read the output left early (`fastseg info | head -1`).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

import fastseg

from . import bench, convert, demo, evaluate, export, info, predict, tune
from .options import CommandError
from .streams import INTERRUPTED, run_lasting


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` and return the exit status.

    Where `argv` is None it is the process's own; Ctrl-C then ends the process by its signal, which
    ends a loop in a shell too.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    status = run_lasting(lambda: _run(arguments))
    if status == INTERRUPTED and argv is None and os.name == "posix":
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return status


def _run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fastseg", description="SegFormer semantic segmentation, fast."
    )
    parser.add_argument("--version", action="version", version=f"fastseg {fastseg.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (predict, evaluate, convert, export, info, demo, tune, bench):
        command.add_parser(commands)
    # argparse would take the options of the benchmarks for its own.
    passed_on = argv[1:] if argv[:1] == [bench.NAME] else []
    arguments = parser.parse_args(argv[:1] if passed_on else argv)
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

"""`fastseg bench`: the benchmarks of the repository, which are no part of an installation."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fastseg

from .options import CommandError

NAME = "bench"


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        NAME,
        help="time SegFormer here, by fastseg and others",
        description="Runs the benchmarks of the repository; needs a checkout of it.",
        add_help=False,  # they have their own
    )
    parser.set_defaults(run=run)  # it gets what the benchmarks are to parse as `arguments`


def run(arguments: argparse.Namespace) -> int:
    root = Path(fastseg.__file__).parent.parent
    if not (root / "bench" / "__main__.py").is_file():
        raise CommandError(
            f"there is no folder bench/ beside {root / 'fastseg'}: the benchmarks come with the "
            "repository; clone it and `pip install -e '.[bench]'`",
            status=2,
        )
    # A process of its own, so that nothing in the package imports the benchmarks. Not `-m bench`:
    # that would take a folder of this name in the working directory.
    start = f"import runpy, sys; sys.path[:1] = [{str(root)!r}]; sys.argv[0] = 'bench'; "
    start += "from fastseg.cli.streams import run_lasting; "
    start += "bench = lambda: runpy.run_module('bench', run_name='__main__', alter_sys=False); "
    start += "sys.exit(run_lasting(bench))"
    known = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(part for part in (str(root), known) if part)
    process = subprocess.Popen(
        [sys.executable, "-c", start, *arguments.arguments],
        env={**os.environ, "PYTHONPATH": path},
    )
    while True:
        try:
            code = process.wait()
        except KeyboardInterrupt:  # they got it too, and end in their own way
            continue
        return code if code >= 0 else 128 - code  # by a signal

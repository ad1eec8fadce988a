"""`python -m bench gpu --out DIR`: stages, each in a process of its own and within its time.

Everything is written under DIR as it comes; with --resume a call goes on where the one before
stopped. It needs torch, triton and what `fastseg` imports, no network, and no installed fastseg:
`python /path/to/bench/gpu` works from anywhere. See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a folder, which is on the path instead of the checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bench.gpu import run
from bench.gpu.stages import RECORDS, STAGES, Options, Stage
from bench.machine import commit


def main(argv: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    """Run the command line; the status is 1 where a stage failed, 130 where it was stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu",
        description="Parity, times of kernels and models, tuner, kernel tests and sanitizer, on a "
        "machine with a GPU. Results are written under DIR; a summary comes last.",
    )
    names = [stage.name for stage in stages]
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="DIR", help="where results are written")
    what.add_argument("--list", action="store_true", help="print the stages in their order")
    minutes = "of this call; what runs then is stopped (default: 10)"
    add("--minutes", type=float, default=10.0, metavar="M", help=minutes)
    add("--stages", default=",".join(names), metavar="A,B", help="only these")
    add("--resume", action="store_true", help="go on where the call before with this DIR ended")
    again = "from the start, though they are done; rows already written are kept"
    add("--again", default="", metavar="A,B", help=again)
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    add("--quick", action="store_true", help="the smallest work of every stage")
    add("--commit", metavar="ID", help="for the rows, where git does not tell")
    given = parser.parse_args(argv)
    if given.list:
        for stage in stages:
            print(f"{stage.name:<14}{stage.purpose}")
        return 0
    if not given.minutes >= 0.1:  # nor what is no number
        parser.error(f"argument --minutes: expected a number from 0.1, got {given.minutes}")
    if not (given.resume or given.again) and (given.out / RECORDS).exists():
        parser.error(f"argument --out: {given.out} has results; --resume goes on with them")
    chosen, restarted = ([*filter(None, one.split(","))] for one in (given.stages, given.again))
    if wrong := {*chosen, *restarted} - {*names}:
        parser.error(f"arguments --stages, --again: expected some of {names}, got {wrong}")
    known = (given.device, given.quick, given.commit or commit())
    return run.run(Options(given.out.resolve(), given.minutes, *known), stages, chosen, restarted)


if __name__ == "__main__":
    sys.exit(main())

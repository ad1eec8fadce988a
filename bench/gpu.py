"""`python -m bench.gpu --out DIR`: all that is to be known of a machine with a GPU, in one command.

Stages run one after another, each in a process of its own and within a share of `--minutes`:
`--list` tells them. Everything is written under DIR as it comes. A second call with the same DIR
goes on where the first stopped. It needs torch, triton and what `fastseg` imports, no network, and
no installed fastseg: `python /path/to/bench/gpu.py` works from anywhere. See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: its folder is on the path instead of the checkout
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from bench import gpu_run
from bench.gpu_stages import STAGES, Options, Stage

DEFAULT_MINUTES = 10.0
LEAST_MINUTES = 0.1


def main(argv: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    """Run the command line; the status is 1 where a stage failed, 130 where it was stopped."""
    given = _parser(stages).parse_args(argv)
    if given.list:
        for stage in stages:
            print(f"{stage.name:<14}{stage.purpose}")
        return 0
    known = [stage.name for stage in stages]
    return gpu_run.run(
        Options(
            out=given.out.resolve(),
            minutes=given.minutes,
            device=given.device,
            quick=given.quick,
            commit=given.commit or gpu_run.commit(),
        ),
        stages,
        chosen=given.stages or known,
        again=given.again or [],
    )


def _parser(stages: Sequence[Stage]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description="Set-up check, kernel tests, timings, tuner, sanitizer and plots on a machine "
        "with a GPU. Results are written under DIR; a further call with the same DIR goes on.",
    )
    add = parser.add_argument
    names = _names([stage.name for stage in stages])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="DIR", help="where results are written")
    what.add_argument("--list", action="store_true", help="print the stages in their order")
    add(
        "--minutes",
        type=_minutes,
        default=DEFAULT_MINUTES,
        metavar="M",
        help=f"of this call; what runs then is stopped (default: {DEFAULT_MINUTES:g})",
    )
    add("--stages", type=names, metavar="A,B", help="only these, in the order of --list")
    add(
        "--again",
        type=names,
        metavar="A,B",
        help="from the start, though they are done; rows already written are kept",
    )
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the script itself")
    add("--quick", action="store_true", help="the smallest work of every stage")
    add("--commit", metavar="ID", help="for the rows, where git does not tell")
    return parser


def _names(known: Sequence[str]):
    def names(text: str) -> list[str]:
        found = [name.strip().lower() for name in text.split(",")]
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"expected some of {known}, got {name!r}")
        return found

    return names


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not minutes >= LEAST_MINUTES:
        raise argparse.ArgumentTypeError(f"expected a number from {LEAST_MINUTES}, got {text!r}")
    return minutes


if __name__ == "__main__":
    sys.exit(main())

"""The options of `python -m bench.hosts`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .arguments import QUICK_REPEATS, REPEATS, VARIANTS, positive, size, some_of
from .host_models import HOSTS
from .host_rows import MODES
from .machine import ROOT

RESULTS = ROOT / "bench" / "results" / "hosts.jsonl"
SIZE = (512, 512)


@dataclass(frozen=True)
class Options:
    """What to measure, or, with `table` or `readme`, which rows to show."""

    hosts: Sequence[str]
    variants: Sequence[str]
    modes: Sequence[str]
    size: tuple[int, int]
    threads: int
    repeats: int
    output: Path | None  # None: add no rows
    table: Path | None
    readme: Path | None
    process: str | None  # the host that this process measures itself
    arguments: Sequence[str]  # as they were given
    command: str


def parse(argv: Sequence[str]) -> Options:
    """Options from command line arguments; ends the program where they are wrong."""
    given = _parser().parse_args(argv)
    arguments = _without_process(argv)
    return Options(
        hosts=given.hosts or tuple(HOSTS),
        variants=given.variants or (VARIANTS[:1] if given.quick else VARIANTS),
        modes=MODES if given.mode is None else (given.mode,),
        size=given.size,
        threads=given.threads,
        repeats=given.repeats or (QUICK_REPEATS if given.quick else REPEATS),
        output=given.output or (None if given.quick else RESULTS),
        table=given.table,
        readme=given.readme,
        process=given.process,
        arguments=arguments,
        command=shlex.join(["python", "-m", "bench.hosts", *arguments]),
    )


def _without_process(argv: Sequence[str]) -> list[str]:
    """What the user gave: `--process HOST`, which comes last, is added by the program."""
    found = list(argv)
    return found[: found.index("--process")] if "--process" in found else found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m bench.hosts",
        description="Times models of other libraries before and after fastseg.accelerate on this "
        "machine's CPU. A result that is not right gets no figure, and the status is 1.",
    )
    add = parser.add_argument
    add(
        "--hosts",
        type=some_of(HOSTS),
        metavar="A,B",
        help=f"some of {', '.join(HOSTS)} (default: all)",
    )
    add(
        "--variants",
        type=some_of(VARIANTS),
        metavar="B0,B2",
        help="variants to time (default: all)",
    )
    add("--mode", choices=MODES, help="one of the two (default: both)")
    add(
        "--size",
        type=size,
        default=SIZE,
        metavar="512 or 1024x2048",
        help="of the image, multiples of 4, of 32 for smp (default: 512)",
    )
    add("--threads", type=positive, default=2, metavar="N", help="of torch (default: 2)")
    add("--repeats", type=positive, metavar="N", help=f"rounds (default: {REPEATS})")
    add(
        "--quick",
        action="store_true",
        help=f"B0 alone, {QUICK_REPEATS} rounds; adds no rows unless --output is given",
    )
    add("--output", type=Path, metavar="FILE", help="add rows here (default: bench/results)")
    add("--process", choices=tuple(HOSTS), help=argparse.SUPPRESS)
    show = parser.add_mutually_exclusive_group()
    show.add_argument(
        "--table",
        type=Path,
        nargs="?",
        const=RESULTS,
        metavar="FILE",
        help="measure nothing; print the table of the newest rows in FILE",
    )
    show.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help="measure nothing; put the table of the newest rows into FILE, between its markers",
    )
    return parser

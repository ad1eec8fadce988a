"""The options of `python -m bench.models`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .machine import ROOT

RESULTS = ROOT / "bench" / "results" / "cpu.jsonl"
VARIANTS = ("b0", "b1", "b2", "b3", "b4", "b5")
KINDS = ("models", "labels", "memory")
QUICK_REPEATS = 3


@dataclass(frozen=True)
class Options:
    """What to measure, or, with `table` or `readme`, which rows to show."""

    models: Sequence[str]
    size: tuple[int, int] | None
    threads: int
    repeats: int
    only: str | None
    output: Path | None  # None: add no rows
    table: Path | None
    readme: Path | None
    command: str


def parse(argv: Sequence[str]) -> Options:
    """Options from command line arguments; ends the program where they are wrong."""
    given = _parser().parse_args(argv)
    repeats = given.repeats or (QUICK_REPEATS if given.quick else 11)
    return Options(
        models=given.models or (VARIANTS[:1] if given.quick else VARIANTS),
        size=None if given.size is None else tuple(given.size),
        threads=given.threads,
        repeats=repeats,
        only=given.only,
        output=given.output or (None if given.quick else RESULTS),
        table=given.table,
        readme=given.readme,
        command=shlex.join(["python", "-m", "bench.models", *argv]),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.models",
        description="Times fastseg against transformers on this machine's CPU, and takes the peak "
        "of their memory. A result that is not right gets no figure, and the status is 1.",
    )
    add = parser.add_argument
    add("--models", type=variants, metavar="B0,B2", help="variants to time (default: all)")
    add(
        "--size",
        type=side,
        nargs=2,
        metavar=("H", "W"),
        help="of the image, multiples of 4 (default: 512 512, and 1024 2048 for memory)",
    )
    add("--threads", type=positive, default=2, metavar="N", help="of torch (default: 2)")
    add("--repeats", type=positive, metavar="N", help="rounds (default: 11)")
    add("--only", choices=KINDS, help="one part of the whole")
    add(
        "--quick",
        action="store_true",
        help=f"B0 alone, {QUICK_REPEATS} rounds; adds no rows unless --output is given",
    )
    add("--output", type=Path, metavar="FILE", help="add rows here (default: bench/results)")
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


def variants(text: str) -> tuple[str, ...]:
    found = tuple(text.lower().split(","))
    for variant in found:
        if variant not in VARIANTS:
            raise argparse.ArgumentTypeError(f"expected some of {VARIANTS}, got {variant!r}")
    return found


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer from 1, got {text!r}")
    return int(text)


def side(text: str) -> int:
    if not text.isdecimal() or int(text) < 64 or int(text) % 4:
        raise argparse.ArgumentTypeError(f"expected a multiple of 4 from 64, got {text!r}")
    return int(text)

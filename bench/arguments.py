"""Types of command line arguments that the benchmarks share."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import Any

VARIANTS = ("b0", "b1", "b2", "b3", "b4", "b5")
# B3 to B5 make the calls of B2, only more of them; B1 is as wide, and shallow.
TELLING = ("b0", "b2")
QUICK_REPEATS = 3
REPEATS = 11
GPU_REPEATS = 51  # of a millisecond each


def list_of(parse_one: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Of values between commas."""
    return lambda text: list(dict.fromkeys(map(parse_one, text.split(","))))


def some_of(choices: Iterable[str]) -> Callable[[str], list[str]]:
    """Of names between commas, in upper or lower case, spaces as hyphens."""
    by_name = {choice.lower().replace(" ", "-"): choice for choice in choices}

    def one(text: str) -> str:
        name = text.strip().lower().replace(" ", "-")
        if name not in by_name:
            raise argparse.ArgumentTypeError(f"expected some of {tuple(by_name)}, got {text!r}")
        return by_name[name]

    return list_of(one)


def command_of(program: str, argv: Sequence[str]) -> str:
    """The command as rows have it: without what changes only how far a run gets."""
    kept = [word for word in argv if word != "--resume" and not word.startswith("--minutes=")]
    if "--minutes" in kept:
        at = kept.index("--minutes")
        del kept[at : at + 2]
    return shlex.join(["python", "-m", program, *kept])


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer from 1, got {text!r}")
    return int(text)


def size(text: str) -> tuple[int, int]:
    """A side, or height x width."""
    sides = [int(side) if side.isdecimal() else 0 for side in text.split("x")]
    if len(sides) > 2 or any(side < 64 or side % 4 for side in sides):
        raise argparse.ArgumentTypeError(f"expected multiples of 4 from 64, got {text!r}")
    return sides[0], sides[-1]

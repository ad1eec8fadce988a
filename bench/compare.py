"""`python -m bench --compare BASE`: is the code here slower than commit BASE, on this machine?

BASE and the other side, the working tree or `--to REV`, run in processes that stay up and take
turns. A second process of BASE takes its turn too: what it and the first differ by is noise, and
the verdict on a case counts only what is beyond (bench/compare_band.py). Before that both sides
must compute the same. A case that is slower is measured once more by new processes, and stays
slower only if they agree.

The status is 1 where a case is slower, its results differ, or only the base can run it; 2 where
there is no comparison.
"""

from __future__ import annotations

import argparse
import itertools
import math
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from .arguments import TELLING, VARIANTS, positive, some_of
from .compare_band import CONFIDENCE, Finding, judge, parity_error
from .compare_sides import CaseError, Checkout, CompareError, Side, checkouts
from .machine import ROOT, cpu_name

_FORWARD_SIZE = (512, 512)
_TINY_SIZE = (64, 64)
_IMAGE_SIZE = (480, 640)
_WIDE_BAND = 0.1
_TURN_MS = 50  # short calls are repeated to fill it
_MOST_CALLS = 100
# Each position, and each neighbour, as often for every side.
_ORDERS = tuple(itertools.permutations(range(3)))
_FEWEST_ROUNDS = len(_ORDERS)
_BASE, _AGAIN, _NEW = "base", "base again", "new"


class CompareCase(NamedTuple):
    """What both sides are asked to time."""

    kind: str  # "forward", "labels" or "segment"
    variant: str
    size: tuple[int, int]

    def __str__(self) -> str:
        what = "labels, 150 classes" if self.kind == "labels" else f"{self.kind} {self.variant}"
        return f"{what}, {self.size[0]}x{self.size[1]}"


class Line(NamedTuple):
    """A line of the table: a finding, or why there is none."""

    case: CompareCase
    finding: Finding | None
    verdict: str
    failed: bool


def main(argv: Sequence[str] | None = None, repository: Path = ROOT) -> int:
    """Run the command line; the status is as the module says."""
    options = _parser().parse_args(argv)
    try:
        with _ended_by_sigterm(), checkouts(repository, options.compare, options.to) as sides:
            return run(options, *sides)
    except CompareError as error:
        print(f"bench --compare: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace, base: Checkout, new: Checkout) -> int:
    """Measure all cases and print the table."""
    lines: list[Line] = []
    comparison = _Comparison(options, base, new)
    with comparison.running():
        for name, answer in comparison.answers.items():
            title = (new if name == _NEW else base).title
            print(f"{name}: {title}\n    torch {answer['torch']}, {answer['fastseg']}")
        cases = list(_cases(options.variants))
        lines += [comparison.line(case) for case in tqdm(cases, "cases", leave=False, disable=None)]
    for index, line in enumerate(lines):
        if line.verdict == "slower":
            with comparison.running():
                again = comparison.line(line.case)
            lines[index] = again._replace(verdict=f"{again.verdict} (slower at first)")
            if again.verdict == "slower":
                lines[index] = again._replace(verdict="slower, twice")
    print(_table(lines))
    print(_explanation(options, lines))
    if all(line.finding is None and not line.failed for line in lines):
        raise CompareError("no case could be compared")
    return int(any(line.failed for line in lines))


def _cases(names: Iterable[str]) -> Iterator[CompareCase]:
    """Forwards, one so small that dispatch is most of it, and the way to a label map."""
    names = list(names)
    for name in names:
        yield CompareCase("forward", name, _FORWARD_SIZE)
    yield CompareCase("forward", names[0], _TINY_SIZE)
    yield CompareCase("labels", names[0], _FORWARD_SIZE)
    yield CompareCase("segment", names[0], _IMAGE_SIZE)


class _Comparison:
    """The three processes, and what they are asked."""

    def __init__(self, options: argparse.Namespace, base: Checkout, new: Checkout) -> None:
        self._options = options
        self._checkouts = {_BASE: base, _AGAIN: base, _NEW: new}
        self._sides: dict[str, Side] = {}
        self.answers: Mapping[str, Mapping[str, Any]] = {}  # of the processes, when they started

    @contextmanager
    def running(self) -> Iterator[None]:
        """Start the processes, and end them."""
        with ExitStack() as stack:
            for name, checkout in self._checkouts.items():
                self._sides[name] = Side(name, checkout)
                stack.callback(self._sides[name].close)
            try:
                self.answers = {
                    name: side.ask(
                        "start",
                        threads=self._options.threads,
                        device=self._options.device,
                        folder=str(side.checkout.folder),
                    )
                    for name, side in self._sides.items()
                }
            except CaseError as error:
                raise CompareError(str(error)) from error
            yield

    def line(self, case: CompareCase) -> Line:
        """Build, check and time `case`."""
        took: dict[str, float] = {}
        for name, side in self._sides.items():
            try:
                took[name] = side.ask("build", **case._asdict(), output=str(side.output))["ms"]
            except CaseError as error:
                # What the base cannot do yet is no regression.
                return Line(case, None, f"no figure, {error}", failed=name == _NEW)
        base, new = (np.load(self._sides[name].output) for name in (_BASE, _NEW))
        difference, bound, measure = parity_error(base, new)
        if not difference <= bound:
            why = f"no verdict, {measure} {difference:.3g}, at most {bound:.3g}"
            return Line(case, None, why, failed=True)
        calls = min(math.ceil(_TURN_MS / max(took[_BASE], 1e-3)), _MOST_CALLS)
        rounds = self._rounds(case, calls)
        finding = judge(rounds[_BASE], rounds[_AGAIN], rounds[_NEW], self._options.threshold)
        return Line(case, finding, finding.verdict, failed=finding.verdict == "slower")

    def _rounds(self, case: CompareCase, calls: int) -> dict[str, list[float]]:
        """Milliseconds of a call: in each round every process has a turn, the others wait."""
        names = tuple(self._sides)
        found: dict[str, list[float]] = {name: [] for name in names}
        for number in tqdm(range(self._options.rounds), str(case), leave=False, disable=None):
            for position in _ORDERS[number % len(_ORDERS)]:
                name = names[position]
                found[name].append(self._sides[name].ask("time", calls=calls)["ms"])
        return found


def _table(lines: Sequence[Line]) -> str:
    cells = [["case", "base ms", "new ms", "ratio", "band", "verdict"]]
    for case, found, verdict, _ in lines:
        figures = [""] * 4
        if found is not None:
            times = [
                f"{time:.3g}" if time < 100 else f"{time:.0f}"
                for time in (found.base_ms, found.new_ms)
            ]
            figures = [*times, f"{found.ratio:.3f}", f"±{100 * found.band:.1f} %"]
        cells.append([str(case), *figures, verdict])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if 0 < index < 5 else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def _explanation(options: argparse.Namespace, lines: Sequence[Line]) -> str:
    where = cpu_name() if options.device == "cpu" else options.device
    text = (
        f"Ratio: median over {options.rounds} rounds of base / new, below 1 is slower. Band: how "
        f"far from 1 the base comes against itself ({100 * CONFIDENCE:.0f} % of resampled rounds "
        f"of base / base again), at least {100 * options.threshold:g} %.\n"
        f"{where}; threads: {options.threads}; float32, batch 1."
    )
    blind = [str(line.case) for line in lines if line.finding and line.finding.band > _WIDE_BAND]
    if blind:
        text += (
            f"\nToo noisy here to see a change of {100 * _WIDE_BAND:.0f} %: {'; '.join(blind)}. "
            "Use a quiet machine, or more rounds."
        )
    return text


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack as Ctrl-C does: temporary folders are removed."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Compares the speed of two commits on this machine. The status is 1 where the "
        "new side is slower beyond the noise of the machine.",
    )
    add = parser.add_argument
    add("--compare", required=True, metavar="BASE", help="the commit to compare with")
    add("--to", metavar="REV", help="the new side (default: the working tree as it is)")
    add(
        "--variants",
        type=some_of(VARIANTS),
        default=list(TELLING),
        metavar="B0,B2",
        help=f"default: {','.join(TELLING)}",
    )
    add("--rounds", type=_rounds, default=24, metavar="N", help="default: 24")
    add(
        "--threshold",
        type=_percent,
        default=0.03,
        metavar="PERCENT",
        help="what counts as slower where the machine is quiet (default: 3)",
    )
    add("--threads", type=positive, default=2, metavar="N", help="of torch (default: 2)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    return parser


def _rounds(text: str) -> int:
    if not text.isdecimal() or int(text) < _FEWEST_ROUNDS:
        raise argparse.ArgumentTypeError(f"expected an integer from {_FEWEST_ROUNDS}, got {text!r}")
    return int(text)


def _percent(text: str) -> float:
    try:
        share = float(text) / 100
    except ValueError:
        share = math.nan
    if not 0 < share < math.inf:
        raise argparse.ArgumentTypeError(f"expected a percentage, got {text!r}")
    return share


if __name__ == "__main__":
    sys.exit(main())

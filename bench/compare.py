"""`python -m bench --compare BASE`: is the code here slower than commit BASE, on this machine?

BASE and the other side, the working tree or `--to REV`, take turns: base, new, base, each turn a
process of its own. What the two turns of the base in a round differ by is noise, and a verdict
counts only what is beyond. Both sides must compute the same.

The status is 1 where a case is slower, its results differ, or only the base can run it; 2 where
there is no comparison.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from .machine import ROOT, cpu_name
from .options import integer, some_of
from .report.tables import markdown_table
from .setting import VARIANTS


class CompareError(Exception):
    """Why there is no comparison."""


@dataclass(frozen=True)
class Finding:
    """What is known of a case."""

    case: str
    verdict: str  # "slower", "same", "faster", or why there is none
    failed: bool  # whether the status is 1
    base_ms: float = math.nan
    new_ms: float = math.nan
    ratio: float = math.nan  # median over rounds of base / new: below 1 is slower
    band: float = math.nan  # as a share: within 1 / (1 + band) to 1 + band a ratio is noise


def main(argv: Sequence[str], repository: Path = ROOT) -> int:
    """Run the command line; the status is as the module says."""
    options = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # removes what is temporary
    try:
        with checkouts(repository, options.compare, options.to) as folders:
            found = measure(options, *folders)
    except CompareError as error:
        print(f"bench --compare: {error}", file=sys.stderr)
        return 2
    print(_table(found))
    print(_explanation(options, found))
    return int(any(one.failed for one in found))


def measure(options: argparse.Namespace, base: Path, new: Path) -> list[Finding]:
    """The findings of all cases."""
    rounds = []
    for _ in tqdm(range(options.rounds), "rounds", leave=False, disable=None):
        rounds.append([_turn(options, side) for side in (base, new, base)])
    found = []
    for case in rounds[0][0]:
        times: Any = [[turn[case] for turn in turns] for turns in rounds]
        errors = [(n, ms) for turns in times for n, ms in enumerate(turns) if isinstance(ms, str)]
        if errors:  # what the base cannot do yet is no regression
            turn, why = min(errors)
            side = (base, new, base)[turn].name
            found.append(Finding(case, f"no figure, {side}: {why}", failed=turn == 1))
            continue
        results = [np.load(_scratch(folder) / f"{case}.npy") for folder in (base, new)]
        difference, bound, measure = parity_error(*results)
        if difference <= bound:
            found.append(judge(case, times, options.threshold / 100))
        else:
            why = f"no verdict, {measure} {difference:.3g}, at most {bound:.3g}"
            found.append(Finding(case, why, failed=True))
    if all(math.isnan(one.ratio) and not one.failed for one in found):
        raise CompareError("no case could be compared: " + "; ".join(one.verdict for one in found))
    return found


def _scratch(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-results")


def _turn(options: argparse.Namespace, folder: Path) -> dict[str, float | str]:
    """Milliseconds by case, or why there are none, from a process with the code in `folder`."""
    _scratch(folder).mkdir(exist_ok=True)
    given = (folder, _scratch(folder), options.threads, options.device, *options.variants)
    side = str(ROOT / "bench" / "compare_side.py")
    command = [sys.executable, side, *map(str, given)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise CompareError(f"{folder.name}: its process ended with {done.returncode}, see above")
    return json.loads(done.stdout)


# The verdict


def noise_band(first: Sequence[float], second: Sequence[float]) -> float:
    """How far from 1 equal code comes, as a share, from two turns of it in each round.

    The rounds of first / second are drawn again with replacement, many times; the band is the 99 %
    quantile of |log(median)|.
    """
    logs = np.log(np.divide(first, second))
    draws = np.random.default_rng(0).choice(logs, size=(2000, len(logs)))
    return math.expm1(np.quantile(np.abs(np.median(draws, axis=1)), 0.99))


def judge(case: str, times: Sequence[Sequence[float]], threshold: float) -> Finding:
    """Compare milliseconds of each round: of the base, of the other side, of the base again.

    `threshold` is the narrowest band, as a share.
    """
    first, new, second = np.transpose(times)
    ratio, band = float(np.median(np.sqrt(first * second) / new)), noise_band(first, second)
    band = max(threshold, band)
    slower = ratio < 1 / (1 + band)
    verdict = "slower" if slower else "faster" if ratio > 1 + band else "same"
    medians = float(np.median([*first, *second])), float(np.median(new))
    return Finding(case, verdict, slower, *medians, ratio, band)


def parity_error(base: np.ndarray, new: np.ndarray) -> tuple[float, float, str]:
    """How far `new` is from `base`, how far it may be, and what that measures.

    Label maps may differ where two classes are nearly equal, which summation order decides.
    """
    integers = np.issubdtype(base.dtype, np.integer)
    measure = "share of pixels that differ" if integers else "relative RMS difference"
    bound = 1e-4 if integers else 1e-5
    if base.shape != new.shape or base.dtype != new.dtype:
        return math.inf, bound, f"{measure} ({base.dtype}{base.shape}, {new.dtype}{new.shape})"
    if integers:
        return float((base != new).mean()), bound, measure
    wide = base.astype(np.float64)
    return math.sqrt(np.square(new - wide).mean() / np.square(wide).mean()), bound, measure


# The commits


@contextlib.contextmanager
def checkouts(repository: Path, base: str, new: str | None) -> Iterator[tuple[Path, Path]]:
    """Folders with `fastseg` of commit `base` and of `new`, or, where None, the working tree.

    Those of commits are removed in the end. Raises a CompareError for an unknown commit, and where
    there is no fastseg/ and kernels/.
    """
    with tempfile.TemporaryDirectory(prefix="fastseg-compare-") as name:
        folders = [Path(name) / "base", Path(name) / "new"]
        try:
            for index, revision in enumerate((base, new)):
                folder, title = folders[index], "the working tree; leave it alone meanwhile"
                if revision is None:
                    folder.symlink_to(repository)
                else:
                    commit = _git(repository, "rev-parse", "--verify", f"{revision}^{{commit}}")
                    _git(repository, "worktree", "add", "--quiet", "--detach", str(folder), commit)
                    title = _git(repository, "show", "--no-patch", "--format=%h %s", commit)
                print(f"{folder.name}: {title}")
                kernels = folder / "fastseg" / "kernels"
                if revision is not None and kernels.parent.is_dir() and not kernels.is_dir():
                    kernels.unlink(missing_ok=True)  # a link that became a text file
                    kernels.symlink_to("../kernels")
                if not kernels.is_dir():
                    raise CompareError(f"{folder.name}: expected folders fastseg/ and kernels/")
            yield folders[0], folders[1]
        finally:
            for folder in folders:
                if folder.is_dir() and not folder.is_symlink():
                    _git(repository, "worktree", "remove", "--force", str(folder))


def _git(repository: Path, *arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompareError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


# What is printed


def _table(found: Sequence[Finding]) -> str:
    table = pd.DataFrame(found)
    for name in ("base_ms", "new_ms", "ratio"):
        table[name] = table[name].map("{:.4g}".format)
    table["band"] = table["band"].map("±{:.1%}".format)
    columns = ["case", "base_ms", "new_ms", "ratio", "band", "verdict"]
    return markdown_table(table[columns].replace(["nan", "±nan%"], "-"))


def _explanation(options: argparse.Namespace, found: Sequence[Finding]) -> str:
    text = f"Ratio: median over {options.rounds} rounds of base / new, below 1 is slower. Band: "
    text += f"how far from 1 the base comes against itself, at least {options.threshold} %.\n"
    text += f"{cpu_name()}; {options.device}; threads: {options.threads}; float32, batch 1."
    if blind := "; ".join(one.case for one in found if one.band > 0.1):
        text += f"\nToo noisy here to see a change of 10 %: {blind}. "
        text += "Use a quiet machine, or more rounds."
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add = parser.add_argument
    add("--compare", required=True, metavar="BASE", help="the commit to compare with")
    add("--to", metavar="REV", help="the new side (default: the working tree as it is)")
    add("--variants", type=some_of(VARIANTS), default="b0,b2", help="default: b0,b2")
    add("--rounds", type=integer(4), default=8, metavar="N", help="default: 8")
    quiet = "what counts as slower where the machine is quiet (default: 3)"
    add("--threshold", type=integer(), default=3, metavar="PERCENT", help=quiet)
    add("--threads", type=integer(), default=2, metavar="N", help="of torch (default: 2)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    return parser

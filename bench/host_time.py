"""`python -m bench host-time`: what a call costs on the host before a GPU has anything to do.

At batch 1 that decides how fast a GPU is. Nothing runs on one: kernels are not launched, see
host_time_side.py. Microseconds of a forward without a graph, up to the driver; of a replay of a
graph, with the look at the weights; and of what a graph of torch.compile runs to keep its weights
fresh. With `--base REV` that commit is measured in turn, in processes of its own.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import rows, timing
from .compare import checkouts
from .machine import ROOT, commit, machine
from .options import integer, some_of
from .report.tables import host_time
from .rows import Row
from .setting import VARIANTS

OUTPUT = ROOT / "bench" / "results" / "host_time.jsonl"


def main(argv: Sequence[str]) -> int:
    """Run the command line."""
    options = _parser().parse_args(argv)
    with checkouts(ROOT, options.base or "HEAD", None) as (base, new):
        sides = {"fastseg": new, **({options.base: base} if options.base else {})}
        samples: dict[str, list[Any]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name, folder in sides.items():
                samples[name].append(_turn(folder, options.variants))
    found = [row for one in options.variants for row in _rows(options, argv, samples, one)]
    rows.append_rows(options.output, found)
    print(host_time(found))
    return 0


def _turn(folder: Path, variants: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    side = str(ROOT / "bench" / "host_time_side.py")
    command = [sys.executable, side, str(folder), *variants]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def _rows(
    options: argparse.Namespace, argv: Sequence[str], samples: dict[str, Any], variant: str
) -> list[Row]:
    """A row a part and side; a figure is the quickest of ten calls."""
    device = torch.device("cpu")
    baseline = options.base or "fastseg"
    now = commit()
    common: dict[str, Any] = {**machine(device), "threads": 1, "kind": "host time", "unit": "us"}
    common |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "case": variant}
    common |= {"size": (512, 512), "batch": 1, "dtype": "bfloat16", "baseline": baseline}
    common |= {"method": "quickest of 10 calls, nothing launched", "provider_version": ""}
    common |= {"parity": "nothing is computed", "parity_error": 0.0, "parity_gate": 0.0}
    common |= {"command": shlex.join(["python", "-m", "bench", "host-time", *argv])}
    found = []
    for part in rows.HOST_TIME_PARTS:
        taken = {
            name: [value for turn in turns for value in turn[variant][part]]
            for name, turns in samples.items()
        }
        for name, values in taken.items():
            median = float(np.median(taken[baseline]) / np.median(values))
            own: dict[str, Any] = {"provider": name, "part": part, "ratio": median}
            own |= {"repeats": len(values), "commit": now if name == "fastseg" else options.base}
            own |= timing.quantiles(values)
            found.append(Row(**common, **own))
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench host-time", description=__doc__)
    add = parser.add_argument
    add("--variants", type=some_of(VARIANTS), default="b0,b2,b5", help="default: b0,b2,b5")
    add("--base", metavar="REV", help="a commit to measure in turn")
    add("--rounds", type=integer(), default=3, metavar="N", help="default: 3")
    add("--output", type=Path, default=OUTPUT, help="rows are added to this file")
    return parser

"""`python -m bench.plots`: pictures of the newest rows, as SVG.

    python -m bench.plots                                  # the committed rows, into docs/plots
    python -m bench.plots --rows DIR/gpu.jsonl --out DIR/plots --png

Latency, the waterfall, share of the roofline, memory, throughput over the batch: one picture for
each device, dtype, size and batch. What the rows do not have is skipped, with the reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..table import default_files, read_files
from .pictures import all_pictures

OUT = Path(__file__).parents[2] / "docs" / "plots"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.plots", description="Pictures of the newest rows, as SVG."
    )
    add = parser.add_argument
    add("--rows", type=Path, nargs="+", metavar="FILE", help="default: bench/results/[cg]pu.jsonl")
    add("--out", type=Path, default=OUT, metavar="DIR", help="default: docs/plots")
    add("--png", action="store_true", help="a PNG beside each SVG")
    given = parser.parse_args(argv)
    try:
        from .files import save
    except ImportError as error:
        print(f"no pictures: {error}; pip install matplotlib", file=sys.stderr)
        return 1
    try:
        rows = read_files(given.rows or default_files())
    except (OSError, ValueError) as error:
        parser.error(f"--rows: expected files of `python -m bench`, got {error}")
    pictures, skipped = all_pictures(rows)
    for picture in pictures:
        for path in save(picture, given.out, given.png):
            print(path)
    for one in skipped:
        print(f"{one.name}: skipped, {one.reason}")
    names = {picture.name for picture in pictures}
    for path in sorted(given.out.glob("*.svg")):
        if path.stem not in names:
            print(f"{path}: old, these rows do not give it")
    return 0


if __name__ == "__main__":
    sys.exit(main())

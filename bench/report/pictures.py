"""`python -m bench plots`: pictures of the newest rows, as SVG.

    python -m bench plots                                  # the committed rows, into docs/plots
    python -m bench plots --rows DIR/gpu.jsonl --out DIR/plots

Latency, share of the roofline and memory, a bar a provider, and images a second over the batch: a
picture for each device, dtype, size and batch whose rows have it.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..rows import Row
from . import frames
from .frames import frame_of, number

OUT = Path(__file__).parents[2] / "docs" / "plots"
GPU_MEMORY_SIZE = (1024, 2048)  # of a GPU, memory is a field in the rows of forwards of all sizes


@dataclass(frozen=True)
class Picture:
    """One file: `panels` by title, a line a bar or point, with name, value, low, high and more."""

    kind: str  # how it is drawn: "bars" or "lines"
    name: str  # of the file, without its ending
    title: str
    axis: str  # what the values are, with the unit
    machine: str
    panels: Mapping[str, pd.DataFrame]
    note: str
    limit: float  # the least end of a value axis that all panels share; 0 where each has its own

    def data(self) -> dict[str, Any]:
        """All that is in the picture, as JSON has it, figures rounded to four decimals."""
        text_of = functools.partial(pd.DataFrame.to_json, orient="records", double_precision=4)
        panels = {title: json.loads(text_of(panel)) for title, panel in self.panels.items()}
        return {**vars(self), "panels": panels}


def all_pictures(rows: Sequence[Row]) -> list[Picture]:
    """What the newest of `rows` give."""
    forwards, peaks = frame_of(rows, "forward"), frame_of(rows, "memory")
    if forwards.empty:
        forwards = forwards.assign(lower=[], peak_mb=[])
    on_gpu = forwards[forwards["peak_mb"].notna() & (forwards["size"] == GPU_MEMORY_SIZE)]
    on_gpu = on_gpu.assign(p20=float("nan"), p50=on_gpu["peak_mb"], p80=float("nan"))
    # A provider of lower precision has another floor.
    known = forwards[forwards["floor_ms"].notna() & ~forwards["lower"].astype(bool)]
    shares = {name: 100 * known["floor_ms"] / known[part] for name, part in _MORE.items()}
    rounds = "Medians of rounds in turn; whiskers from p20 to p80; each panel has its own scale."
    floor = "Floor: least work of the folded model at what the device was measured to do; whiskers "
    floor += "from p20 to p80."
    above = "Above that before the forward, with weights and image loaded; each in processes of "
    above += "its own; whiskers from p20 to p80."
    counted = "As PyTorch's allocator counts it during a call, weights included. Memory of CUDA "
    counted += "graphs is counted at their capture and not shown."
    memory = "Peak memory of a SegFormer forward", "MB, less is better"
    time = "Time of a SegFormer forward", "Median ms, less is better"
    share = "Share of the roofline", "Least possible time over the median, %, more is better"
    return [
        *_bars("latency", forwards, *time, rounds),
        *_bars("roofline", known.assign(**shares), *share, floor, limit=100.0),
        *_bars("memory", peaks, *memory, above),
        *_bars("memory", on_gpu, *memory, counted),
        *_throughput(forwards),
    ]


_MORE = {"p50": "p50", "p20": "p80", "p80": "p20"}  # of values of which more is better


def _bars(
    plot: str, frame: pd.DataFrame, title: str, axis: str, note: str, limit: float = 0.0
) -> Iterator[Picture]:
    for _, group in frame.groupby([*frames.MACHINE, "setting"], sort=False):
        text = group["p50"].map("{:.0f}%".format if limit else number)
        named = f"{title}, {group['setting'].iloc[0]}"
        batch = f"batch{group['batch'].iloc[0]}"
        yield _picture("bars", [plot, batch], named, axis, note, group.assign(text=text), limit)


def _throughput(forwards: pd.DataFrame) -> Iterator[Picture]:
    """Of variants that were measured with several batches."""
    rates = {name: 1000 * forwards["batch"] / forwards[part] for name, part in _MORE.items()}
    frame = forwards.assign(**rates, at=forwards["batch"])
    for _, group in frame.groupby([*frames.MACHINE, "size", "dtype", "cache"], sort=False):
        several = group.groupby("case")["batch"].transform("nunique") > 1
        if several.any():
            points = group[several]
            setting = re.sub(r" batch \d+,", "", points["setting"].iloc[0])
            title = f"Images a second over the batch, {setting}"
            axis = "Images a second (up) over the batch (right), more is better"
            note = "Batch over the median time; whiskers from p20 to p80."
            yield _picture("lines", ["throughput"], title, axis, note, points, 0.0)


def _picture(
    kind: str, name: list[str], title: str, axis: str, note: str, frame: pd.DataFrame, limit: float
) -> Picture:
    """A panel a variant of a frame whose rows are of one setting."""
    first, lower = frame.iloc[0], frames.lower_precision(frame)
    on_cpu = first["device"] == first["cpu"]
    device = "cpu" if on_cpu else re.sub(r"\W+", "-", first["device"].lower()).strip("-")
    size = "x".join(map(str, first["size"]))
    parts = [name[0], device, first["dtype"], size, *name[1:]]
    if first["cache"] != "warm":
        parts.append(first["cache"])
    note += f" * lower precision than asked for: {lower}." if lower else ""
    names = frame["provider"].where(~frame["lower"].astype(bool), frame["provider"] + " *")
    frame = frame.assign(name=names, value=frame["p50"], low=frame["p20"], high=frame["p80"])
    columns = ["name", "value", "low", "high", "text" if kind == "bars" else "at"]
    panels = {one.upper(): group[columns] for one, group in frame.groupby("case", sort=False)}
    versions, machine = frames.versions_of(frame), frames.machine_of(frame)
    note = f"{note} {versions}."
    return Picture(kind, "-".join(parts), title, axis, machine, panels, note, limit)


def main(argv: Sequence[str]) -> int:
    """Run the command line."""
    from .documents import rows_of
    from .draw import save

    parser = argparse.ArgumentParser("python -m bench plots", description="Newest rows, as SVG.")
    add = parser.add_argument
    add("--rows", type=Path, nargs="+", metavar="FILE", help="default: all of bench/results")
    add("--out", type=Path, default=OUT, metavar="DIR", help="default: docs/plots")
    given = parser.parse_args(argv)
    made = [save(one, given.out) for one in all_pictures(rows_of(parser, given.rows))]
    for path in made:
        print(path)
    for path in sorted(set(given.out.glob("*.svg")) - set(made)):
        print(f"{path}: old, these rows do not give it")
    return 0

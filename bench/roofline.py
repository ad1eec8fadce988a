"""How near a forward comes to its floor, and what each step on the way to a label map is worth.

`forward_floor` and `labels_floor` are the least times that rows carry. The command prints what rows
say: each forward with its share of the floor, and per variant the waterfall from transformers'
model, eager, to fastseg's fused label map.

    python -m bench.roofline [FILE]    # of rows; bench/results/cpu.jsonl where none is named
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from . import shown
from .context import DTYPES
from .floors import Ceilings, Work, known_ceilings
from .forward_counts import forward_work
from .op_cases import CLASSES
from .rows import Row, newest, read_rows

ROWS = Path(__file__).parent / "results" / "cpu.jsonl"
LABEL_BYTES = 8  # of a class number in a label map, int64

FUSED = "fused label map"
THEIRS = ("transformers eager", "transformers compiled")
OURS = ("fastseg eager", "fastseg Triton", "fastseg CUDA graph")
STEPS = (*THEIRS, *OURS, FUSED)  # of a waterfall


class Step(NamedTuple):
    """A bar of a waterfall: medians of a forward, and of the way from its logits to label maps."""

    name: str  # one of STEPS
    forward_ms: float
    post_ms: float

    @property
    def ms(self) -> float:
        return self.forward_ms + self.post_ms


class RooflineGroup(NamedTuple):
    """What rows have to share to be compared."""

    device: str
    threads: int
    cache: str
    dtype: str
    size: tuple[int, int]
    batch: int


# Floors


def forward_floor(
    variant: str,
    size: tuple[int, int],
    batch: int,
    dtype: str,
    ceilings: Ceilings,
    classes: int = CLASSES,
) -> tuple[Work, float]:
    """The least work of a forward, pixels to logits, and its least time in ms.

    Each op takes at least the larger of the times of its bytes and its FLOPs; these are summed.

    Args:
        variant: "b0" to "b5".
        size: (H, W) of the images.
        dtype: "float32", "bfloat16" or "float16".
        ceilings: of the device, for that dtype.
    """
    least = forward_work(variant, size, batch, DTYPES[dtype], classes)
    return least.sum, sum(ceilings.floor_microseconds(one) for one in least.ops) / 1e3


def labels_floor(classes: int, size: tuple[int, int], ceilings: Ceilings) -> tuple[Work, float]:
    """The least work and time in ms from float32 logits to a label map of `size` (H, W).

    The logits are a quarter as high and wide. Comparing classes is no FLOP here.
    """
    height, width = size
    logits = 4 * classes * (height // 4) * (width // 4)
    work = Work(logits + LABEL_BYTES * height * width, 0)
    return work, ceilings.floor_microseconds(work) / 1e3


def share(row: Row) -> float | None:
    """The floor of a row over its median; None where the row has no floor."""
    return None if row["floor_ms"] is None else row["floor_ms"] / row["p50"]


# Waterfalls


def waterfall(
    rows: Iterable[Row],
    variant: str,
    size: Sequence[int],
    batch: int,
    dtype: str,
    device: str,
    *,
    threads: int | None = None,
    cache: str = "warm",
) -> list[Step]:
    """The steps from transformers' eager model to fastseg's fused label map, in the order of STEPS.

    All figures are parts of the newest run of kind "end to end". fastseg's forwards come with
    transformers' way to a label map, so that each step changes one thing; the last step has the
    forward of the one before it, and fastseg's own way. A step without rows is left out; `missing`
    names it.

    Args:
        device, threads, cache: as rows have them; threads of None are those of the newest label
            maps.
    """
    found = [
        group
        for group in newest(rows)
        if _variant_of(group[0]) == (variant, tuple(size), batch, dtype)
        and (group[0]["device"], group[0]["cache"]) == (device, cache)
        and threads in (None, group[0]["threads"])
    ]
    ends = [group for group in found if group[0]["kind"] == "end to end"]
    if not ends:
        return []
    end = max(ends, key=lambda group: str(group[0]["date"]))
    posts, forwards = (
        {row["provider"]: row["p50"] for row in end if row["part"] == part}
        for part in ("post", "forward")
    )
    steps = [
        Step(name, forwards[name], posts[name])
        for name in THEIRS
        if name in forwards and name in posts
    ]
    ours = [name for name in OURS if name in forwards]
    if THEIRS[0] in posts:
        steps += [Step(name, forwards[name], posts[THEIRS[0]]) for name in ours]
    steps += [Step(FUSED, forwards[name], posts[name]) for name in ours[-1:] if name in posts]
    return steps


def missing(steps: Iterable[Step]) -> list[str]:
    """The names in STEPS that are not among `steps`."""
    present = {step.name for step in steps}
    return [name for name in STEPS if name not in present]


def _variant_of(row: Row) -> tuple[str, tuple[int, ...], int, str]:
    return row["case"], tuple(row["size"]), row["batch"], row["dtype"]


# The command


def markdown(rows: Sequence[Row]) -> str:
    """Shares of the floors and waterfalls of the newest rows, a section for each setting."""
    cases: dict[RooflineGroup, dict[str, list[Row]]] = {}
    for group in newest(rows):
        if group[0]["kind"] in ("forward", "end to end"):
            by_kind = cases.setdefault(_case_of(group[0]), {})
            by_kind.setdefault(group[0]["kind"], []).extend(group)
    sections = [
        f"## {_title(case)}\n\n" + "\n\n".join(_section(case, by_kind))
        for case, by_kind in cases.items()
    ]
    return "\n\n".join(sections) or "No rows of forwards."


def _section(case: RooflineGroup, by_kind: dict[str, list[Row]]) -> list[str]:
    forwards, ends = (by_kind.get(kind, []) for kind in ("forward", "end to end"))
    parts = [_shares(case, forwards)] if forwards else []
    for variant in sorted({row["case"] for row in ends}):
        steps = waterfall(
            ends,
            *(variant, case.size, case.batch, case.dtype, case.device),
            threads=case.threads,
            cache=case.cache,
        )
        parts.append(_waterfall_table(variant, steps))
    return parts


def _shares(case: RooflineGroup, rows: list[Row]) -> str:
    measured = [row for row in rows if share(row) is not None]
    by_variant: dict[str, shown.Case] = {}
    for row in sorted(measured, key=lambda row: str(row["case"])):
        by_variant.setdefault(row["case"], {})[row["provider"]] = row
    lower = shown.lower_precision(by_variant.values())
    lines = []
    if measured:
        lines = [_ceilings_line(case, measured), ""]
        lines.append("| variant | provider | p50, ms | floor, ms | share |")
        lines.append("|---|---|---:|---:|---:|")
    for variant, found in by_variant.items():
        for provider, row in found.items():
            floor, part = f"{row['floor_ms']:.3g}", f"{100 * row['floor_ms'] / row['p50']:.0f}%"
            if provider in lower:
                floor = part = "-"
            lines.append(
                f"| {variant.upper()} | {provider} | {row['p50']:.3g} | {floor} | {part} |"
            )
    if lower:
        lines += [
            "",
            f"Computed in a lower precision, which has another floor: {', '.join(lower)}.",
        ]
    if len(measured) < len(rows):
        lines += [""] * bool(lines)
        lines.append(
            f"{len(rows) - len(measured)} rows without a floor: no ceilings were measured."
        )
    return "\n".join(lines)


def _ceilings_line(case: RooflineGroup, rows: list[Row]) -> str:
    """What the floors are made of. Runs differ a little in what they measure as ceilings."""
    least = []
    for name in sorted({row["case"] for row in rows}):
        row = next(row for row in rows if row["case"] == name)
        work = forward_work(name, case.size, case.batch, DTYPES[case.dtype])
        least.append(
            f"{name.upper()} {row['flops'] / 1e9:.4g} GFLOP, {row['bytes'] / 1e6:.4g} MB through "
            f"its ops, {work.network_bytes / 1e6:.4g} MB of pixels, weights and logits"
        )
    line = (
        f"Least work: {'; '.join(least)}. Measured ceilings: "
        f"{_range(rows, 'bytes_per_second', 1e9)} GB/s, "
        f"{_range(rows, 'flops_per_second', 1e9)} GFLOP/s."
    )
    known = known_ceilings(case.device)
    return line if known is None else f"{line} To compare: {known.source}."


def _range(rows: list[Row], name: str, unit: float) -> str:
    values = sorted({f"{row[name] / unit:.4g}" for row in rows}, key=float)
    return " to ".join(dict.fromkeys((values[0], values[-1])))


def _waterfall_table(variant: str, steps: list[Step]) -> str:
    lines = [f"Waterfall of {variant.upper()}, to the label map:", ""]
    if steps:
        lines.append("| step | forward, ms | to labels, ms | sum, ms | gain so far |")
        lines.append("|---|---:|---:|---:|---:|")
    for step in steps:
        gain = f"{steps[0].ms / step.ms:.2f}x" if steps[0].name == STEPS[0] else ""
        lines.append(
            f"| {step.name} | {step.forward_ms:.3g} | {step.post_ms:.3g} | {step.ms:.3g} | {gain} |"
        )
    if absent := missing(steps):
        lines += [""] * bool(steps)
        lines.append(f"No rows of: {', '.join(absent)}.")
    return "\n".join(lines)


def _case_of(row: Row) -> RooflineGroup:
    _, size, batch, dtype = _variant_of(row)
    height, width = size
    return RooflineGroup(row["device"], row["threads"], row["cache"], dtype, (height, width), batch)


def _title(case: RooflineGroup) -> str:
    return (
        f"{case.device}, threads {case.threads}, {case.cache}, {case.dtype}, "
        f"{case.size[0]}x{case.size[1]}, batch {case.batch}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the sections of a file of rows."""
    parser = argparse.ArgumentParser(prog="python -m bench.roofline")
    parser.add_argument("file", type=Path, nargs="?", default=ROWS, metavar="FILE")
    path = parser.parse_args(argv).file
    try:
        rows = read_rows(path)
    except (OSError, ValueError) as error:
        parser.error(f"FILE: expected rows of `python -m bench`, got {error}")
    print(markdown(rows))


if __name__ == "__main__":
    main()

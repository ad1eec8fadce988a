"""Share of the roofline: how near the least possible time of a forward each provider comes."""

from __future__ import annotations

from collections.abc import Sequence

from .. import shown
from ..rows import Row
from .model import (
    Bar,
    Found,
    Panel,
    Picture,
    Skipped,
    file_name,
)


def pictures(rows: Sequence[Row]) -> Found:
    """One for each device, dtype, size and batch whose rows have a floor."""
    found: list[Picture | Skipped] = []
    for setting, cases in shown.newest_cases(rows, "forward").items():
        # A provider of lower precision has another floor.
        with_floor = {variant: _with_floor(case) for variant, case in cases.items()}
        panels = tuple(
            Panel(variant.upper(), tuple(_bars(case)))
            for variant, case in with_floor.items()
            if case
        )
        first = next(iter(next(iter(cases.values())).values()))
        name = file_name("roofline", setting, first)
        if not panels:
            found.append(Skipped(name, "its rows have no floor"))
            continue
        of_setting = [row for case in with_floor.values() for row in case.values()]
        found.append(
            Picture(
                kind="bars",
                name=name,
                title=f"Share of the roofline, {setting}",
                axis="Least possible time over the median, %, more is better",
                panels=panels,
                machine=shown.machine_of(of_setting),
                notes=(_text(of_setting), shown.versions_of(of_setting)),
                limit=100.0,
            )
        )
    return found or [Skipped("roofline", "there are no rows of forwards")]


def _with_floor(case: shown.Case) -> shown.Case:
    lower = shown.lower_precision([case])
    return {n: r for n, r in case.items() if r["floor_ms"] is not None and n not in lower}


def _bars(case: shown.Case) -> list[Bar]:
    found = []
    for name in shown.providers([case]):
        row = case[name]
        share, low, high = (100 * row["floor_ms"] / row[part] for part in ("p50", "p80", "p20"))
        found.append(Bar(name, (share,), low, high, f"{share:.0f}%"))
    return found


def _text(rows: Sequence[Row]) -> str:
    flops = [row["flops_per_second"] for row in rows]
    rates = [row["bytes_per_second"] for row in rows]
    return (
        "Floor: least work of the folded model at what the device was measured to do: "
        f"{_range(flops, 1e12, 'TFLOP/s')}, {_range(rates, 1e9, 'GB/s')}; whiskers from p20 to p80."
    )


def _range(values: Sequence[float], unit: float, name: str) -> str:
    """The values of several runs, as in "0.21 to 0.23 TFLOP/s"."""
    ends = dict.fromkeys(f"{value / unit:.3g}" for value in (min(values), max(values)))
    return f"{' to '.join(ends)} {name}"

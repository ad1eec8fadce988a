"""Latency of a forward: a panel a variant, a bar a provider."""

from __future__ import annotations

from collections.abc import Sequence

from .. import shown
from ..rows import Row
from ..table_cells import number
from .model import (
    Bar,
    Found,
    Panel,
    Picture,
    Skipped,
    file_name,
    lower_precision_note,
    marked,
)


def pictures(rows: Sequence[Row]) -> Found:
    """One for each device, dtype, size and batch."""
    found: list[Picture | Skipped] = []
    for setting, cases in shown.newest_cases(rows, "forward").items():
        all_cases = list(cases.values())
        of_setting = [row for case in all_cases for row in case.values()]
        first = of_setting[0]
        panels = tuple(
            Panel(variant.upper(), tuple(_bars(case, all_cases))) for variant, case in cases.items()
        )
        how = (
            "Medians of {} rounds in turn; whiskers from p20 to p80; each panel has its own scale."
        )
        text = how.format(shown.all_of(of_setting, "repeats")) + lower_precision_note(all_cases)
        found.append(
            Picture(
                kind="bars",
                name=file_name("latency", setting, first),
                title=f"Time of a SegFormer forward, {setting}",
                axis="Median ms, less is better",
                panels=panels,
                machine=shown.machine_of(of_setting),
                notes=(text, shown.versions_of(of_setting)),
            )
        )
    return found or [Skipped("latency", "there are no rows of forwards")]


def _bars(case: shown.Case, cases: Sequence[shown.Case]) -> list[Bar]:
    return [
        Bar(marked(name, cases), (row["p50"],), row["p20"], row["p80"], number(row["p50"]))
        for name, row in ((n, case[n]) for n in shown.providers([case]))
    ]

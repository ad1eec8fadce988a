"""Images a second over the batch: a panel a variant, a line a provider."""

from __future__ import annotations

from collections.abc import Sequence

from .. import shown
from ..rows import Row
from ..shown import Case, RowGroup
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
    """One for each device, dtype and size that was measured with several batches."""
    groups: dict[RowGroup, dict[str, list[Case]]] = {}
    for setting, cases in shown.newest_cases(rows, "forward").items():
        for variant, case in cases.items():
            group = groups.setdefault(setting._replace(batch=1), {})
            group.setdefault(variant, []).append(case)
    found: list[Picture | Skipped] = []
    for setting, variants in groups.items():
        several = {variant: cases for variant, cases in variants.items() if len(cases) > 1}
        all_cases = [case for cases in (several or variants).values() for case in cases]
        of_setting = [row for case in all_cases for row in case.values()]
        name = file_name("throughput", setting, of_setting[0], batch=False)
        if not several:
            batches = shown.all_of(of_setting, "batch")
            found.append(Skipped(name, f"no variant has several batches, only {batches}"))
            continue
        panels = tuple(Panel(v.upper(), tuple(_points(cases))) for v, cases in several.items())
        text = "Batch over the median time; whiskers from p20 to p80."
        found.append(
            Picture(
                kind="lines",
                name=name,
                title=f"Images a second over the batch, {str(setting).replace(' batch 1,', '')}",
                axis="Images a second (up) over the batch (right), more is better",
                panels=panels,
                machine=shown.machine_of(of_setting),
                notes=(text + lower_precision_note(all_cases), shown.versions_of(of_setting)),
            )
        )
    return found or [Skipped("throughput", "there are no rows of forwards")]


def _points(cases: Sequence[Case]) -> list[Bar]:
    found = []
    for name in shown.providers(cases):
        for row in (case[name] for case in cases if name in case):
            p50, low, high = (1000 * row["batch"] / row[field] for field in ("p50", "p80", "p20"))
            found.append(Bar(marked(name, cases), (p50,), low, high, at=float(row["batch"])))
    return found

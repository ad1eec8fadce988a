"""The markdown tables of the rows of `bench.grid`: forwards, the way from images, labels, memory.

Each function gives the tables of all settings in its rows, with one caption behind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from . import shown
from .rows import PARTS, WHOLE, Row
from .shown import BASELINE, Case, RowGroup
from .table_cells import MISSING, commands_of, head, line, median, times

NO_ROWS = "Not measured yet: there are no such rows."

Cases = Mapping[str, Case]
Settings = Mapping[RowGroup, Cases]


def forward(rows: Sequence[Row]) -> str:
    """One table a setting: a line a provider, a column a variant, medians in ms."""
    settings = shown.newest_cases(rows, "forward")
    text = "Medians in ms from `pixel_values` to logits; the last column tells "
    text += f"how many times as fast as {BASELINE}, with the geometric mean over the variants. "
    return _tables(settings, _by_provider, text + _METHOD)


def end_to_end(rows: Sequence[Row], short: bool = False) -> str:
    """A line for each variant and provider: its steps, the whole, and the speed-up.

    Args:
        short: only the baseline and the fastest provider of fastseg.
    """
    parts = {part: shown.newest_cases(rows, "end to end", part) for part in PARTS}

    def table(setting: RowGroup, cases: Cases) -> list[str]:
        found = head("", "", "pre", "forward", "post", "whole", "", left=2)
        for variant, case in cases.items():
            best = shown.best_of_ours(case)
            wanted = (
                [n for n in (BASELINE, best) if n in case] if short else shown.providers([case])
            )
            for name in wanted:
                steps = [parts[part][setting][variant].get(name) for part in (*PARTS[1:], WHOLE)]
                medians = map(median, steps)
                found.append(
                    line(_variant(variant), name, *medians, times(shown.speed_up(case, name)))
                )
        if (mean := shown.mean([_best_speed_up(case) for case in cases.values()])) is not None:
            found.append(_mean_line("best of fastseg", mean, 7, at=1))
        return found

    text = "Medians in ms from an 8-bit image to its label map of the same size: image processor, "
    text += f"model, upsampling and argmax; behind, how many times as fast as {BASELINE}. "
    return _tables(parts[WHOLE], table, text + _METHOD)


def labels(rows: Sequence[Row]) -> str:
    """A line for each kind of logits, a column a provider, and what fastseg gains over each."""

    def table(setting: RowGroup, cases: Cases) -> list[str]:
        names = shown.providers(cases.values())
        found = head("logits", *names)
        for title, case in cases.items():
            found.append(line(title, *(_against(case.get(name), case) for name in names)))
        return found

    text = "Medians in ms from logits at a quarter of the size to the label map, and how many "
    text += "times as fast fastseg is. "
    return _tables(shown.newest_cases(rows, "labels"), table, text + _METHOD)


def _against(row: Row | None, case: Case) -> str:
    ours = case.get(shown.OURS)
    if row is None or ours is None or row is ours:
        return median(row)
    return f"{median(row)} ({times(row['p50'] / ours['p50'])})"


def memory(rows: Sequence[Row]) -> str:
    """A line a provider, a column a variant, peaks in MB."""
    text = "Peak memory of a forward in MB (10^6 bytes) above that before it, with weights and "
    text += "image loaded; each provider in processes of its own. "
    return _tables(shown.newest_cases(rows, "memory"), _by_provider, text)


_METHOD = "Parity was checked first, and providers of a case ran in turn in one process. "


def _by_provider(setting: RowGroup, cases: Cases) -> list[str]:
    """A line a provider, a column a variant, and the mean over the variants of the ratio."""
    several = len(cases) > 1
    title = "times as fast"
    if any(row["unit"] == "MB" for case in cases.values() for row in case.values()):
        title = "times less"
    means = [f"{title}, mean"] if several else [title]
    found = head("", *map(_variant, cases), *means)
    lower = shown.lower_precision(cases.values())
    for name in shown.providers(cases.values()):
        ratios = [shown.speed_up(case, name) for case in cases.values()]
        overall = shown.mean(ratios) if several else ratios[0]
        marked = f"{name} \\*" if name in lower else name
        medians = (median(case.get(name)) for case in cases.values())
        found.append(line(marked, *medians, times(overall)))
    ours = [name for name in shown.providers(cases.values()) if name.startswith(shown.OURS)]
    if len(ours) > 1:
        best = [_best_speed_up(case) for case in cases.values()]
        ratios = [*best, shown.mean(best)] if several else best
        cells = [f"**{times(ratio)}**" if ratio else MISSING for ratio in ratios]
        found.append(line("**best of fastseg**, times as fast", *cells, *[""][several:]))
    return found


def _best_speed_up(case: Case) -> float | None:
    best = shown.best_of_ours(case)
    return None if best is None else shown.speed_up(case, best)


def _mean_line(name: str, mean: float, columns: int, at: int) -> str:
    cells = [""] * columns
    cells[at], cells[-1] = f"{name}, geometric mean", f"**{times(mean)}**"
    return line(*cells)


def _variant(case: str) -> str:
    return case.upper()


def _tables(settings: Settings, table: Callable[[RowGroup, Cases], list[str]], text: str) -> str:
    """A title and a table for each setting; behind those of a machine what they have in common."""
    if not settings:
        return NO_ROWS
    machines: dict[tuple[str, int], list[RowGroup]] = {}
    for setting in settings:
        machines.setdefault((setting.device, setting.threads), []).append(setting)
    found: list[str] = []
    for of_machine in machines.values():
        rows: list[Row] = []
        for setting in of_machine:
            cases = settings[setting]
            rows += [row for case in cases.values() for row in case.values()]
            found += [f"{setting}:", "\n".join(table(setting, cases))]
        found.append(text + _caption(rows, [c for s in of_machine for c in settings[s].values()]))
    return "\n\n".join(found)


def _caption(rows: Sequence[Row], cases: Sequence[Case]) -> str:
    lower = [f"{name} (error {e:.2g})" for name, e in shown.lower_precision(cases).items()]
    star = "\\* computes in a lower precision, and is not taken as best: "
    note = f"{star}{', '.join(lower)}. " if lower else ""
    return f"{note}{shown.machine_of(rows)}; {shown.versions_of(rows)}; {commands_of(rows)}."

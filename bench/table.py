"""The markdown table of the newest rows, and putting it into a file between two markers."""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from .rows import Row, newest

NAME = "cpu"  # of the markers around the table
SUBJECT = "fastseg"

Pair = tuple[Row, Row]  # of another provider, and of fastseg in the same run

_TITLES = {
    "forward": "forward, {}",
    "labels": "upsample + argmax, {}",
    "memory": "peak memory of a forward, {}",
}
# Rows that differ in these are not to be read side by side: they get a table each.
_SETTING = ("cpu", "threads", "dtype", "batch")


def markdown(rows: Sequence[Row]) -> str:
    """Tables of the newest rows, one for each setting, each with a line on how it was measured."""
    settings: dict[tuple[object, ...], list[list[Row]]] = {}
    for group in newest(rows):
        setting = tuple(group[0][name] for name in _SETTING)
        settings.setdefault(setting, []).append(group)
    return "\n\n".join(_table(groups) for groups in settings.values())


def markers(name: str) -> tuple[str, str]:
    """The lines between which the table `name` stands in a file."""
    return f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"


def rewrite(path: Path, table: str, name: str = NAME) -> None:
    """Put `table` between the markers of `name` in `path`.

    Raises:
        ValueError: `path` does not have both markers once, in order.
    """
    begin, end = markers(name)
    text = path.read_text(encoding="utf-8")
    before, _ = split(text, path, name)
    after = text[text.index(end) :]
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(f"{before}{begin}\n{table}\n{after}", encoding="utf-8")
    os.replace(temporary, path)


def split(text: str, path: Path, name: str = NAME) -> tuple[str, str]:
    """What stands before the markers in `text`, and what between them."""
    begin, end = markers(name)
    counts = text.count(begin), text.count(end)
    if counts != (1, 1) or text.index(begin) > text.index(end):
        raise ValueError(f"{path}: expected {begin} and {end} once each, in order, got {counts}")
    before, rest = text.split(begin)
    return before, rest.split(end)[0].strip("\n")


def _table(groups: list[list[Row]]) -> str:
    lines = ["| measured | against | | fastseg | ratio |", "|---|---|---:|---:|---:|"]
    pairs = [
        (row, subject)
        for group in groups
        for subject in group
        if subject["provider"] == SUBJECT
        for row in group
        if row is not subject
    ]
    for kind, found in itertools.groupby(
        sorted(pairs, key=_position), lambda pair: pair[0]["kind"]
    ):
        of_kind = list(found)
        lines += [
            line(_title(row), row["provider"], figures(row), figures(subject), _ratio(row, subject))
            for row, subject in of_kind
        ]
        if kind == "forward":
            lines += _mean_lines(of_kind)
    rows = [row for group in groups for row in group]
    return "\n".join(lines) + "\n\n" + _caption(rows)


def _position(pair: Pair) -> tuple[int, str]:
    """Kinds in their order, variants by number; other cases stay as they came."""
    kind = pair[0]["kind"]
    return list(_TITLES).index(kind), pair[0]["case"] if kind == "forward" else ""


def _mean_lines(pairs: list[Pair]) -> list[str]:
    """The geometric mean over the variants, for each provider and size that has several."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for row, subject in pairs:
        ratios.setdefault((row["provider"], size_of(row)), []).append(row["p50"] / subject["p50"])
    return [
        line(
            f"forward, geometric mean of these {len(found)}, {size}",
            provider,
            "",
            "",
            f"**{statistics.geometric_mean(found):.2f}x**",
        )
        for (provider, size), found in ratios.items()
        if len(found) > 1
    ]


def _ratio(row: Row, subject: Row) -> str:
    return f"{row['p50'] / subject['p50']:.2f}x"


def line(*cells: str) -> str:
    """A row of a markdown table."""
    return "| " + " | ".join(cells) + " |"


def _title(row: Row) -> str:
    case = row["case"].upper() if row["kind"] in ("forward", "memory") else row["case"]
    return f"{_TITLES[row['kind']].format(case)}, {size_of(row)}"


def size_of(row: Row) -> str:
    """As in "512x512"."""
    return "x".join(map(str, row["size"]))


def figures(row: Row) -> str:
    """Median, unit, and the range from p20 to p80 at the precision of the median."""
    digits = 1 if row["p50"] < 100 else 0
    p20, p50, p80 = (f"{row[name]:.{digits}f}" for name in ("p20", "p50", "p80"))
    return f"{p50} {row['unit']} ({p20} to {p80})"


def _caption(rows: list[Row]) -> str:
    return (
        "Medians (p20 to p80). Times of interleaved runs in one process; memory above that before "
        "the forward, in a process of its own; parity checked first. "
        + setting_of(rows, f"transformers {_all_of(rows, 'transformers')} eager, ")
    )


def setting_of(rows: Sequence[Row], libraries: str = "") -> str:
    """Machine, settings, versions, dates and commands of `rows`, as a sentence.

    Args:
        libraries: goes in between torch's version and fastseg's, with a comma behind.
    """
    first = rows[0]
    dates = sorted({row["date"][:10] for row in rows})
    return (
        f"{first['cpu']}; {_threads(first)}, {first['dtype']}, batch {first['batch']}; "
        f"Python {_all_of(rows, 'python')}, torch {_all_of(rows, 'torch')}, "
        f"{libraries}fastseg {_all_of(rows, 'fastseg')} at "
        f"{_all_of(rows, 'commit')}; {' and '.join(dict.fromkeys((dates[0], dates[-1])))}; by "
        + ", ".join(f"`{command}`" for command in dict.fromkeys(row["command"] for row in rows))
        + "."
    )


def _all_of(rows: Sequence[Row], name: str) -> str:
    return ", ".join(dict.fromkeys(str(row[name]) for row in rows))


def _threads(row: Row) -> str:
    return "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"

"""The markdown table of the newest rows, and putting it into a file between two markers."""

from __future__ import annotations

import itertools
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from .rows import Row, newest

BEGIN, END = "<!-- bench:cpu -->", "<!-- /bench:cpu -->"
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


def rewrite(path: Path, table: str) -> None:
    """Put `table` between the markers in `path`.

    Raises:
        ValueError: `path` does not have both markers once, in order.
    """
    text = path.read_text(encoding="utf-8")
    before, _ = split(text, path)
    after = text[text.index(END) :]
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(f"{before}{BEGIN}\n{table}\n{after}", encoding="utf-8")
    os.replace(temporary, path)


def split(text: str, path: Path) -> tuple[str, str]:
    """What stands before the markers in `text`, and what between them."""
    counts = text.count(BEGIN), text.count(END)
    if counts != (1, 1) or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path}: expected {BEGIN} and {END} once each, in order, got {counts}")
    before, rest = text.split(BEGIN)
    return before, rest.split(END)[0].strip("\n")


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
            _line(
                _title(row), row["provider"], _figures(row), _figures(subject), _ratio(row, subject)
            )
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
        ratios.setdefault((row["provider"], _size(row)), []).append(row["p50"] / subject["p50"])
    return [
        _line(
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


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _title(row: Row) -> str:
    case = row["case"].upper() if row["kind"] in ("forward", "memory") else row["case"]
    return f"{_TITLES[row['kind']].format(case)}, {_size(row)}"


def _size(row: Row) -> str:
    return "x".join(map(str, row["size"]))


def _figures(row: Row) -> str:
    """Median, unit, and the range from p20 to p80 at the precision of the median."""
    digits = 1 if row["p50"] < 100 else 0
    p20, p50, p80 = (f"{row[name]:.{digits}f}" for name in ("p20", "p50", "p80"))
    return f"{p50} {row['unit']} ({p20} to {p80})"


def _caption(rows: list[Row]) -> str:
    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(str(row[name]) for row in rows))

    first = rows[0]
    dates = sorted({row["date"][:10] for row in rows})
    return (
        "Medians (p20 to p80). Times of interleaved runs in one process; memory above that before "
        "the forward, in a process of its own; parity checked first. "
        f"{first['cpu']}; {_threads(first)}, {first['dtype']}, batch {first['batch']}; "
        f"Python {all_of('python')}, torch {all_of('torch')}, "
        f"transformers {all_of('transformers')} eager, fastseg {all_of('fastseg')} at "
        f"{all_of('commit')}; {' and '.join(dict.fromkeys((dates[0], dates[-1])))}; by "
        + ", ".join(f"`{command}`" for command in dict.fromkeys(row["command"] for row in rows))
        + "."
    )


def _threads(row: Row) -> str:
    return "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"

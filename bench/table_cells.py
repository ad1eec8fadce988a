"""What cells and captions of the tables are made of."""

from __future__ import annotations

from collections.abc import Sequence

from .rows import Row
from .shown import all_of

MISSING = "-"


def line(*cells: str) -> str:
    """A row of a markdown table."""
    return "| " + " | ".join(cells) + " |"


def head(*cells: str, left: int = 1) -> list[str]:
    """The first two lines of a table: titles, and the sides, `left` columns on the left."""
    return [line(*cells), "|" + "|".join(["---"] * left + ["---:"] * (len(cells) - left)) + "|"]


def size_of(row: Row) -> str:
    """As in "512x512"."""
    return "x".join(map(str, row["size"]))


def number(value: float) -> str:
    """Three digits, or all of the whole part."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f}"


def median(row: Row | None) -> str:
    """Of a row that may be missing."""
    return MISSING if row is None else number(row["p50"])


def times(ratio: float | None) -> str:
    """As in "4.19x"."""
    return MISSING if ratio is None else f"{ratio:.2f}x"


def figures(row: Row) -> str:
    """Median, unit, and the range from p20 to p80 at the precision of the median."""
    digits = 1 if row["p50"] < 100 else 0
    p20, p50, p80 = (f"{row[name]:.{digits}f}" for name in ("p20", "p50", "p80"))
    return f"{p50} {row['unit']} ({p20} to {p80})"


def commands_of(rows: Sequence[Row]) -> str:
    """As in "by `python -m bench`"."""
    return "by " + ", ".join(
        f"`{command}`" for command in dict.fromkeys(r["command"] for r in rows)
    )


def setting_of(rows: Sequence[Row]) -> str:
    """Machine, settings, versions, dates and commands of `rows`, as a sentence."""
    first = rows[0]
    dates = sorted({row["date"][:10] for row in rows})
    threads = "1 thread" if first["threads"] == 1 else f"{first['threads']} threads"
    return (
        f"{first['cpu']}; {threads}, {first['dtype']}, batch {first['batch']}; "
        f"Python {all_of(rows, 'python')}, torch {all_of(rows, 'torch')}, "
        f"fastseg {all_of(rows, 'fastseg')} at {all_of(rows, 'commit')}; "
        f"{' and '.join(dict.fromkeys((dates[0], dates[-1])))}; {commands_of(rows)}."
    )

"""`python -m bench tables`: the tables of the committed rows, printed or put into files.

    python -m bench tables                                       # print them all
    python -m bench tables --rewrite docs/benchmarks.md          # or any other page with tables

A table stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`; TABLES has the names.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ..options import RESULTS
from ..rows import Row, read_rows
from . import tables
from .engines import engines
from .numerics import numerics
from .threads import by_threads

# What the README shows.
_SETTING = ((512, 512), 1)
_VARIANTS = ("b0", "b2")

Table = Callable[[Sequence[Row]], str]


def _pictures(rows: Sequence[Row]) -> str:
    """Links to the pictures of `rows`, relative to docs/."""
    from .pictures import all_pictures

    lines = [f"![{one.title}](plots/{one.name}.svg)" for one in all_pictures(rows)]
    return "\n\n".join(lines) or tables.NO_ROWS


def _on(cpu: bool, table: Table) -> Table:
    return lambda rows: table([row for row in rows if row.on_cpu == cpu])


def _short(row: Row) -> bool:
    is_shown = row.case in _VARIANTS and (row.size, row.batch) == _SETTING
    return is_shown and row.threads != 1  # which "cpu-threads" has


# By the name in the markers: from rows to what stands between them.
TABLES: dict[str, Table] = {
    "cpu": _on(True, lambda rows: tables.by_dtype(list(filter(_short, rows)))),
    "cpu-threads": by_threads,
    "forward": _on(True, tables.forward),
    "end-to-end": _on(True, tables.end_to_end),
    "labels": _on(True, tables.labels),
    "memory": _on(True, tables.memory),
    "hosts": tables.hosts,
    "seggpt": tables.seggpt,
    "training": _on(True, tables.training),
    "predict": tables.predict,
    "engines": engines,
    "host-time": tables.host_time,
    "numerics": numerics,
    "plots": _on(True, _pictures),
    "gpu": _on(False, tables.forward),
    "gpu-end-to-end": _on(False, tables.end_to_end),
    "gpu-labels": _on(False, tables.labels),
    "gpu-training": _on(False, tables.training),
    "gpu-plots": _on(False, _pictures),
}


def main(argv: Sequence[str]) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser("python -m bench tables", description="Of the newest rows.")
    add = parser.add_argument
    add("--rows", type=Path, nargs="+", metavar="FILE", help="default: all of bench/results")
    add("--rewrite", type=Path, nargs="+", metavar="FILE", help="renew the tables in these")
    given = parser.parse_args(argv)
    rows = rows_of(parser, given.rows)
    for path in given.rewrite or ():
        text = renewed(path.read_text(encoding="utf-8"), path, rows)
        path.write_text(text, encoding="utf-8")
        print(f"{path}: rewritten")
    if not given.rewrite:
        print(tables.markdown(rows))
    return 0


def rows_of(parser: argparse.ArgumentParser, paths: Sequence[Path] | None) -> list[Row]:
    """The rows of files, by default of the committed ones; ends the program where they are none."""
    try:
        chosen = paths or sorted(RESULTS.glob("*.jsonl"))
        return [row for path in chosen for row in read_rows(path)]
    except (OSError, ValueError) as error:
        parser.error(f"--rows: expected files of rows, got {error}")


def renewed(text: str, path: Path, rows: Sequence[Row]) -> str:
    """`text` of the file `path` with all of its tables made anew.

    Raises a ValueError where it has none, one of an unknown name, or one without both markers.
    """
    names = re.findall(r"<!-- bench:(\S+) -->", text)
    if not names or not set(names) <= set(TABLES):
        expected = f"<!-- bench:NAME --> of {tuple(TABLES)}"
        raise ValueError(f"{path}: expected markers as {expected}, got {names}")
    for name in names:
        text = _replaced(text, TABLES[name](rows), path, name)
    return text


def rewrite(path: Path, table: str, name: str) -> None:
    """Put `table` between the markers of `name` in `path`."""
    text = _replaced(path.read_text(encoding="utf-8"), table, path, name)
    path.write_text(text, encoding="utf-8")


def _replaced(text: str, table: str, path: Path, name: str) -> str:
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    counts = text.count(begin), text.count(end)
    if counts != (1, 1) or text.index(begin) > text.index(end):
        raise ValueError(f"{path}: expected {begin} and {end} once each, in order, got {counts}")
    return f"{text[: text.index(begin)]}{begin}\n{table}\n{text[text.index(end) :]}"

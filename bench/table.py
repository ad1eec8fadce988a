"""`python -m bench.table`: the tables of the committed rows, printed or put into files.

    python -m bench.table                                      # print them all
    python -m bench.table --rewrite README.md docs/benchmarks.md
    python -m bench.table --check README.md docs/benchmarks.md # status 1 where a file differs

A table stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`; TABLES has the names.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from . import grid_table, host_rows, host_table
from .rows import Row, read_rows
from .shown import on_cpu

RESULTS = Path(__file__).parent / "results"
PICTURES = "plots"  # beside the file that shows them
SHORT_SIZE = [512, 512]  # of what the README shows

Table = Callable[[Sequence[Row]], str]


def _pictures(rows: Sequence[Row]) -> str:
    """Links to the pictures of `rows`, relative to docs/."""
    from .plots.pictures import all_pictures  # imports the roofline, and torch with it

    found, _ = all_pictures(rows)
    lines = [f"![{picture.title}]({PICTURES}/{picture.name}.svg)" for picture in found]
    return "\n\n".join(lines) or grid_table.NO_ROWS


def _cpu(table: Table, rows: Sequence[Row]) -> str:
    return table([row for row in rows if on_cpu(row)])


def _gpu(table: Table, rows: Sequence[Row]) -> str:
    return table([row for row in rows if not on_cpu(row)])


def _short(table: Table, rows: Sequence[Row]) -> str:
    """Of the rows of a CPU, one setting alone."""
    setting = (SHORT_SIZE, 1, "float32")
    kept = [row for row in rows if (row["size"], row["batch"], row["dtype"]) == setting]
    return _cpu(table, kept)


# By the name in the markers: from the rows of the grid to what stands between them.
TABLES: dict[str, Table] = {
    "cpu": partial(_short, grid_table.forward),
    "cpu-end-to-end": partial(_short, partial(grid_table.end_to_end, short=True)),
    "forward": partial(_cpu, grid_table.forward),
    "end-to-end": partial(_cpu, grid_table.end_to_end),
    "labels": partial(_cpu, grid_table.labels),
    "memory": partial(_cpu, grid_table.memory),
    "plots": partial(_cpu, _pictures),
    "gpu": partial(_gpu, grid_table.forward),
    "gpu-end-to-end": partial(_gpu, grid_table.end_to_end),
    "gpu-labels": partial(_gpu, grid_table.labels),
    "gpu-plots": partial(_gpu, _pictures),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the status is 1 where --check finds a file that differs."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.table", description="Tables of the newest rows in bench/results."
    )
    add = parser.add_argument
    add("--rows", type=Path, nargs="+", metavar="FILE", help="default: bench/results/[cg]pu.jsonl")
    add("--hosts", type=Path, default=RESULTS / "hosts.jsonl", metavar="FILE")
    does = parser.add_mutually_exclusive_group()
    does.add_argument("--rewrite", type=Path, nargs="+", metavar="FILE", help="renew its tables")
    does.add_argument("--check", type=Path, nargs="+", metavar="FILE", help="1 where they differ")
    given = parser.parse_args(argv)
    try:
        rows = read_files(given.rows or default_files())
        hosts = host_rows.read_rows(given.hosts) if given.hosts.exists() else []
    except (OSError, ValueError) as error:
        parser.error(f"--rows, --hosts: expected files of rows, got {error}")
    if not given.rewrite and not given.check:
        print(markdown(rows) + "\n\n" + host_table.markdown(hosts))
        return 0
    differing = []
    for path in given.rewrite or given.check:
        text = path.read_text(encoding="utf-8")
        new = renewed(text, path, rows, hosts)
        if new != text:
            differing.append(path)
            if given.rewrite:
                _write(path, new)
                print(f"{path}: rewritten")
            else:
                print(f"{path}: differs; python -m bench.table --rewrite {path}", file=sys.stderr)
    return 1 if given.check and differing else 0


def default_files() -> list[Path]:
    """The committed rows of the grid, of a CPU and of GPUs, as far as there are any."""
    return [path for path in (RESULTS / "cpu.jsonl", RESULTS / "gpu.jsonl") if path.exists()]


def read_files(paths: Sequence[Path]) -> list[Row]:
    """The rows of all `paths`, one file after another."""
    return [row for path in paths for row in read_rows(path)]


def markdown(rows: Sequence[Row]) -> str:
    """The tables of all kinds that `rows` have."""
    tables = (
        grid_table.forward,
        grid_table.end_to_end,
        grid_table.labels,
        grid_table.memory,
    )
    found = [table(rows) for table in tables]
    return "\n\n".join(text for text in found if text != grid_table.NO_ROWS)


def markers(name: str) -> tuple[str, str]:
    """The lines between which the table `name` stands in a file."""
    return f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"


def renewed(text: str, path: Path, rows: Sequence[Row], hosts: Sequence[Row]) -> str:
    """`text` of the file `path` with all of its tables made anew.

    Raises:
        ValueError: it has no table, one of an unknown name, or one without both of its markers.
    """
    names = re.findall(r"<!-- bench:(\S+) -->", text)
    known = (*TABLES, host_table.NAME)
    if not names or not set(names) <= set(known):
        example, _ = markers("NAME")
        raise ValueError(f"{path}: expected markers as {example} of {known}, got {names}")
    for name in names:
        table = host_table.markdown(hosts) if name == host_table.NAME else TABLES[name](rows)
        text = _replaced(text, table, path, name)
    return text


def rewrite(path: Path, table: str, name: str) -> None:
    """Put `table` between the markers of `name` in `path`.

    Raises:
        ValueError: `path` does not have both markers once, in order.
    """
    _write(path, _replaced(path.read_text(encoding="utf-8"), table, path, name))


def split(text: str, path: Path, name: str) -> tuple[str, str]:
    """What stands before the markers in `text`, and what between them."""
    begin, end = markers(name)
    counts = text.count(begin), text.count(end)
    if counts != (1, 1) or text.index(begin) > text.index(end):
        raise ValueError(f"{path}: expected {begin} and {end} once each, in order, got {counts}")
    before, rest = text.split(begin)
    return before, rest.split(end)[0].strip("\n")


def _replaced(text: str, table: str, path: Path, name: str) -> str:
    begin, end = markers(name)
    before, _ = split(text, path, name)
    return f"{before}{begin}\n{table}\n{text[text.index(end) :]}"


def _write(path: Path, text: str) -> None:
    """In one step: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())

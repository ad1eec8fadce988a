"""Results as rows: JSON lines that are only ever added to, each checked against one schema.

Rows of schema 1, which knew one CPU and two providers, are read as what they mean in schema 2.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Field = type | tuple[type, ...]

SCHEMA_VERSION = 2
KINDS = ("forward", "end to end", "labels", "memory")
WHOLE = "whole"
PARTS = (WHOLE, "pre", "forward", "post")  # of "end to end"; the other kinds are whole
METHODS = ("calls", "CUDA events")
CACHES = ("warm", "cold")

# Rows that agree in these are measurements of the same thing, of which the newest counts.
CASE_FIELDS = ("kind", "case", "size", "batch", "dtype", "device", "threads", "cache")

_MAYBE_FLOAT = (float, type(None))
_MAYBE_INT = (int, type(None))

FIELDS: dict[str, Field] = {
    "schema": int,
    "date": str,  # UTC, ISO 8601; the same in all rows of one case of one run
    "kind": str,  # one of KINDS
    "part": str,  # one of PARTS
    "case": str,  # "b0" to "b5"; of "labels", the name of the logits
    "size": list,  # height, width of the image or of the label map
    "batch": int,
    "dtype": str,
    "device": str,
    "driver": str,  # "" on a CPU
    "cpu": str,
    "threads": int,  # of torch and of other runtimes, on the CPU
    "provider": str,
    "provider_version": str,  # of the library that computes
    "baseline": str,  # the provider that `ratio` compares with
    "method": str,  # how it was timed: one of METHODS
    "cache": str,  # whether a GPU's L2 cache was left as it was: one of CACHES
    "unit": str,  # ms or MB
    "p20": float,
    "p50": float,
    "p80": float,
    "repeats": int,
    "ratio": float,  # median of the baseline over this one's: above 1 is better than it
    "paired_ratio": float,  # median of the ratios of single rounds
    "setup_s": _MAYBE_FLOAT,  # from weights on disk to the first result: loading, compiling
    "peak_mb": _MAYBE_FLOAT,  # of GPU memory during a call, weights included; None where unknown
    "flops": _MAYBE_INT,  # the least work of such a case; None where nobody has counted it
    "bytes": _MAYBE_INT,
    "flops_per_second": _MAYBE_FLOAT,  # what the device was measured to do in this run
    "bytes_per_second": _MAYBE_FLOAT,
    "floor_ms": _MAYBE_FLOAT,  # the least time, by these
    "parity": str,  # what parity_error is
    "parity_error": float,
    "parity_gate": float,
    "python": str,
    "torch": str,
    "triton": str,  # "" where it is not installed
    "transformers": str,
    "fastseg": str,
    "commit": str,
    "command": str,
}

# The fields that may be None, all of them None.
NOT_TAKEN: Row = {name: None for name, kind in FIELDS.items() if kind in (_MAYBE_FLOAT, _MAYBE_INT)}
# What schema 1 had not, and what it meant.
_NEW_IN_2: Row = {
    **NOT_TAKEN,
    "part": WHOLE,
    "driver": "",
    "method": "calls",
    "cache": "warm",
    "triton": "",
}


def upgrade(row: Any) -> Any:
    """`row` in schema 2; what is not a row of schema 1 is left alone."""
    if not isinstance(row, dict) or row.get("schema") != 1:
        return row
    new = {**row, **_NEW_IN_2, "schema": SCHEMA_VERSION, "device": row.get("cpu")}
    if row.get("kind") in ("forward", "memory") and row.get("provider") == "fastseg":
        new["provider"] = "fastseg eager"
    theirs = str(row.get("provider")).startswith("transformers")
    new["provider_version"] = row.get("transformers" if theirs else "fastseg")
    if row.get("kind") == "labels" and row.get("provider") != "fastseg":
        new["provider_version"] = row.get("torch")
    return new


def check_row(row: Any) -> None:
    """Raise a ValueError that lists all that is wrong with `row`."""
    wrong = wrong_fields(row, FIELDS) or _wrong_values(row)
    if wrong:
        raise ValueError("row: " + "; ".join(wrong))


def wrong_fields(row: Any, fields: Mapping[str, Field]) -> list[str]:
    """What is wrong with the names and types in `row`."""
    if not isinstance(row, dict):
        return [f"expected an object, got {row!r}"]
    wrong = [f"{name} is missing" for name in fields if name not in row]
    wrong += [f"{name} is not a field" for name in row if name not in fields]
    for name, kind in fields.items():
        # bool is an int to isinstance.
        if name in row and (not isinstance(row[name], kind) or isinstance(row[name], bool)):
            wrong.append(f"{name}: expected {kind}, got {row[name]!r}")
    return wrong


def wrong_measurement(row: Row, schema: int) -> list[str]:
    """What is wrong with the values of the fields that rows of any schema have."""
    wrong = []
    if row["schema"] != schema:
        wrong.append(f"schema: expected {schema}, got {row['schema']}")
    if not 0 < row["p20"] <= row["p50"] <= row["p80"]:
        wrong.append(
            f"expected 0 < p20 <= p50 <= p80, got {row['p20']}, {row['p50']}, {row['p80']}"
        )
    if not row["parity_error"] <= row["parity_gate"]:
        wrong.append(f"parity_error {row['parity_error']} is above its gate {row['parity_gate']}")
    if len(row["size"]) != 2 or not all(isinstance(side, int) for side in row["size"]):
        wrong.append(f"size: expected two integers, got {row['size']}")
    if row["provider"] == row["baseline"] and row["ratio"] != 1:
        wrong.append(f"ratio: expected 1 for the baseline itself, got {row['ratio']}")
    try:
        if datetime.fromisoformat(row["date"]).utcoffset() is None:
            raise ValueError("no time zone")
    except ValueError as error:
        wrong.append(f"date: expected ISO 8601 with a time zone, got {row['date']!r} ({error})")
    return wrong


def _wrong_values(row: Row) -> list[str]:
    wrong = wrong_measurement(row, SCHEMA_VERSION)
    parts = PARTS if row["kind"] == "end to end" else (WHOLE,)
    for name, expected in (
        ("kind", KINDS),
        ("part", parts),
        ("unit", ("MB",) if row["kind"] == "memory" else ("ms",)),
        ("method", METHODS),
        ("cache", CACHES),
    ):
        if row[name] not in expected:
            wrong.append(f"{name}: expected one of {expected}, got {row[name]!r}")
    floor = [row[name] for name in ("flops", "bytes", "flops_per_second", "bytes_per_second")]
    if (row["floor_ms"] is None) != (None in floor):
        wrong.append("floor_ms: expected work and ceilings beside it, and none without it")
    return wrong


def append_rows(
    path: Path,
    rows: Iterable[Row],
    check: Callable[[Any], None] = check_row,
    fields: Iterable[str] = tuple(FIELDS),
) -> None:
    """Add rows at the end of `path`, made with its folder where absent.

    Args:
        check: raises a ValueError for a row that does not fit its schema.
        fields: of the schema, in the order in which they are written.
    """
    rows, fields = list(rows), tuple(fields)
    for row in rows:
        check(row)
    text = "".join(json.dumps({name: row[name] for name in fields}) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                raise ValueError(f"{path}: its last line is cut off; mend it before adding rows")
        file.write(text.encode())


def read_rows(path: Path, check: Callable[[Any], None] = check_row) -> list[Row]:
    """All rows of `path`, oldest first, in the newest schema.

    Raises:
        ValueError: a line is not a valid row; its number is named.
        OSError: the file cannot be read.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            if check is check_row:
                row = upgrade(row)
            check(row)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        rows.append(row)
    return rows


def newest(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of the newest run of each case, all providers together, in order of first sight."""
    latest: dict[str, list[Row]] = {}
    for row in rows:
        group = latest.setdefault(case_key(row), [])
        if group and group[0]["date"] != row["date"]:
            group.clear()
        group.append(row)
    return list(latest.values())


def case_key(row: Row) -> str:
    """What rows of the same case have in common."""
    return json.dumps([row[name] for name in CASE_FIELDS])

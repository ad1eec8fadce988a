"""Rows of `bench.hosts`: JSON lines that are only ever added to, by a schema of their own."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import rows
from .rows import Row

SCHEMA_VERSION = 1
MODES = ("eager", "compiled")
# The first is the baseline. "own" is fastseg's own model with the host's weights; "check" is what a
# forward of the accelerated one does to know that its folded weights are fresh, and nothing else
# (its parity is that of the whole forward).
PROVIDERS = ("host", "accelerated", "own", "check")

# Rows that agree in these are measurements of the same thing, of which the newest counts.
CASE_FIELDS = ("host", "mode", "variant", "size", "batch", "dtype", "threads", "cpu")

FIELDS: dict[str, type | tuple[type, ...]] = {
    "schema": int,
    "date": str,  # UTC, ISO 8601; the same in all rows of one case of one run
    "host": str,
    "host_version": str,  # of its library; "" where its code is in this repository
    "mode": str,  # one of MODES
    "variant": str,  # "b0" to "b5"
    "size": list,  # height, width of the image
    "batch": int,
    "dtype": str,
    "threads": int,
    "provider": str,  # one of PROVIDERS
    "baseline": str,  # the provider that `ratio` compares with
    "unit": str,  # ms
    "p20": float,
    "p50": float,
    "p80": float,
    "repeats": int,
    "ratio": float,  # median of the baseline over this one's: above 1 is better than it
    "paired_ratio": float,  # median of the ratios of single rounds
    "parity": str,  # what parity_error is
    "parity_error": float,
    "parity_gate": float,
    "cpu": str,
    "python": str,
    "torch": str,
    "fastseg": str,
    "commit": str,
    "command": str,
}


def check_row(row: Any) -> None:
    """Raise a ValueError that lists all that is wrong with `row`."""
    wrong = rows.wrong_fields(row, FIELDS) or _wrong_values(row)
    if wrong:
        raise ValueError("row: " + "; ".join(wrong))


def _wrong_values(row: Row) -> list[str]:
    wrong = rows.wrong_measurement(row, SCHEMA_VERSION)
    for name, expected in (("provider", PROVIDERS), ("mode", MODES), ("unit", ("ms",))):
        if row[name] not in expected:
            wrong.append(f"{name}: expected one of {expected}, got {row[name]!r}")
    return wrong


def append_rows(path: Path, added: Iterable[Row]) -> None:
    """Add checked rows at the end of `path`, made with its folder where absent."""
    rows.append_rows(path, added, check_row, FIELDS)


def read_rows(path: Path) -> list[Row]:
    """All rows of `path`, oldest first.

    Raises:
        ValueError: a line is not a valid row; its number is named.
        OSError: the file cannot be read.
    """
    return rows.read_rows(path, check_row)


def newest(found: Iterable[Row]) -> list[dict[str, Row]]:
    """By provider, the rows of the newest run of each case, in order of first sight."""
    latest: dict[str, dict[str, Row]] = {}
    for row in found:
        group = latest.setdefault(json.dumps([row[name] for name in CASE_FIELDS]), {})
        if group and next(iter(group.values()))["date"] != row["date"]:
            group.clear()
        group[row["provider"]] = row
    return list(latest.values())

"""Rows of `bench.ops`: JSON lines that are only ever added to, by a schema of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import rows
from .rows import Row

SCHEMA_VERSION = 1
PROVIDERS = ("eager", "compiled", "kernels")  # the first is the baseline
CACHES = ("warm", "cold")

FIELDS: dict[str, type | tuple[type, ...]] = {
    "schema": int,
    "date": str,  # UTC, ISO 8601; the same in all rows of one call of one run
    "op": str,
    "variant": str,  # "b0" to "b5"
    "stage": str,  # "1" to "4" of the encoder, "head" or "labels"
    "size": list,  # height, width of the image
    "batch": int,
    "dtype": str,
    "shape": list,  # of the result
    "count": int,  # how often a forward makes this call
    "provider": str,  # one of PROVIDERS
    "baseline": str,  # the provider that `ratio` compares with
    "cache": str,  # whether the inputs lie in it: "warm" or "cold"
    "method": str,  # how it was timed
    "unit": str,  # us
    "p20": float,  # of one call
    "p50": float,
    "p80": float,
    "repeats": int,
    "calls": int,  # in one repeat
    "ratio": float,  # median of the baseline over this one's: above 1 is better than it
    "paired_ratio": float,  # median of the ratios of single rounds
    "parity": str,  # what parity_error is
    "parity_error": float,
    "parity_gate": float,
    "bytes": int,  # the least that a call moves
    "flops": int,  # of a call
    "bytes_per_second": float,  # what the device can do
    "flops_per_second": float,
    "ceilings": str,  # where the two are known from
    "floor_us": float,  # the larger of bytes and FLOPs over what the device can do
    "share": float,  # floor_us / p50; inputs in a cache may bring it above 1
    "device": str,
    "driver": str,  # "" on a CPU, as `cuda`
    "cuda": str,
    "cpu": str,
    "threads": int,  # of torch on the CPU
    "python": str,
    "torch": str,
    "triton": str,  # "" where it is not installed
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
    for name, expected in (("provider", PROVIDERS), ("cache", CACHES), ("unit", ("us",))):
        if row[name] not in expected:
            wrong.append(f"{name}: expected one of {expected}, got {row[name]!r}")
    for name in ("batch", "count", "repeats", "calls", "bytes"):
        if row[name] < 1:
            wrong.append(f"{name}: expected at least 1, got {row[name]}")
    floor = max(row["bytes"] / row["bytes_per_second"], row["flops"] / row["flops_per_second"])
    if not _close(row["floor_us"], 1e6 * floor):
        wrong.append(f"floor_us: expected {1e6 * floor} by the ceilings, got {row['floor_us']}")
    if not _close(row["share"], row["floor_us"] / row["p50"]):
        wrong.append(f"share: expected floor_us / p50, got {row['share']}")
    return wrong


def _close(value: float, expected: float) -> bool:
    return abs(value - expected) <= 1e-6 * expected


def calls_by_case(found: Iterable[Row]) -> Counter[tuple[Any, ...]]:
    """How many different calls of (variant, size, batch, dtype, op, stage) rows have."""
    calls = {
        (
            *(row["variant"], tuple(row["size"]), row["batch"], row["dtype"]),
            *(row["op"], row["stage"]),
            *(row["bytes"], row["flops"]),
        )
        for row in found
    }
    return Counter(call[:-2] for call in calls)


def append_rows(path: Path, added: list[Row]) -> None:
    """Add checked rows at the end of `path`, made with its folder where absent."""
    rows.append_rows(path, added, check_row, FIELDS)


def read_rows(path: Path) -> list[Row]:
    """All rows of `path`, oldest first.

    Raises:
        ValueError: a line is not a valid row; its number is named.
        OSError: the file cannot be read.
    """
    return rows.read_rows(path, check_row)

"""bench.rows: the schema, and files of rows that are only added to."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bench import rows
from tests.bench.row_cases import ROW

RESULTS = Path(__file__).parents[2] / "bench" / "results"

FAST = {**ROW, "provider": "fastseg eager", "p20": 49.0, "p50": 50.0, "p80": 52.0, "ratio": 4.0}

# As the first release of the benchmarks wrote them.
OLD = {
    "schema": 1,
    "date": "2026-01-02T03:04:05+00:00",
    "kind": "forward",
    "case": "b0",
    "size": [512, 512],
    "batch": 1,
    "dtype": "float32",
    "threads": 2,
    "provider": "fastseg",
    "baseline": "transformers eager",
    "unit": "ms",
    "p20": 49.0,
    "p50": 50.0,
    "p80": 52.0,
    "repeats": 11,
    "ratio": 4.0,
    "paired_ratio": 4.1,
    "parity": "relative RMS error",
    "parity_error": 3e-7,
    "parity_gate": 2e-6,
    "cpu": "A CPU",
    "python": "3.11.0",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "fastseg": "0.1.0",
    "commit": "abc1234",
    "command": "python -m bench.models",
}


def test_rows_are_only_added(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    rows.append_rows(path, [ROW, FAST])
    before = path.read_bytes()
    rows.append_rows(path, [dict(reversed(FAST.items()))])
    assert path.read_bytes().startswith(before)
    assert rows.read_rows(path) == [ROW, FAST, FAST]
    assert list(json.loads(path.read_text().splitlines()[2])) == list(rows.FIELDS)

    with pytest.raises(ValueError, match="p50"):
        rows.append_rows(path, [ROW, {**ROW, "p50": 1.0}])
    assert len(rows.read_rows(path)) == 3
    path.write_bytes(before[:-1])
    with pytest.raises(ValueError, match="cut off"):
        rows.append_rows(path, [ROW])
    assert path.read_bytes() == before[:-1]


FLOOR = {"flops": 10**9, "bytes": 10**6, "flops_per_second": 1e11, "bytes_per_second": 1e10}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parity_error": 1e-3}, "above its gate"),
        ({"parity_error": math.nan}, "above its gate"),
        ({"p80": 1.0}, "p20 <= p50 <= p80"),
        ({"p20": 0.0}, "0 < p20"),
        ({"threads": True, "cpu": None}, "cpu: .*; threads: "),
        ({"extra": 1}, "extra is not a field"),
        ({"kind": "backward"}, "kind"),
        ({"part": "pre"}, "part: expected one of .'whole',., got 'pre'"),
        ({"unit": "s"}, "unit"),
        ({"unit": "MB"}, "unit"),
        ({"method": "a guess"}, "method"),
        ({"cache": "lukewarm"}, "cache"),
        ({"size": [512]}, "size"),
        ({"ratio": 2.0}, "baseline itself"),
        ({"date": "2026-01-02T03:04:05"}, "time zone"),
        ({"date": "yesterday"}, "ISO 8601"),
        ({"schema": 3}, "schema"),
        ({"flops": 1.5}, "flops"),
        ({"floor_ms": 1.0}, "floor_ms: expected work and ceilings"),
        (FLOOR, "floor_ms: expected work and ceilings"),
    ],
)
def test_row_that_does_not_fit_the_schema(change, message):
    rows.check_row(ROW)
    rows.check_row({**ROW, **FLOOR, "floor_ms": 10.0})
    with pytest.raises(ValueError, match=message):
        rows.check_row({**ROW, **change})


def test_missing_fields_and_bad_lines_are_named(tmp_path):
    with pytest.raises(ValueError, match="torch is missing"):
        rows.check_row({name: value for name, value in ROW.items() if name != "torch"})
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n{\n")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: "):
        rows.read_rows(path)


def test_rows_of_schema_1_are_read_as_what_they_mean(tmp_path):
    labels = {**OLD, "kind": "labels", "case": "random logits", "baseline": "interpolate + argmax"}
    plain = {**labels, "provider": "interpolate + argmax", "ratio": 1.0}
    theirs = {**OLD, "provider": "transformers eager", "ratio": 1.0}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (theirs, OLD, labels, plain)))
    found = rows.read_rows(path)
    assert [(row["provider"], row["provider_version"]) for row in found] == [
        ("transformers eager", "5.23.0"),
        ("fastseg eager", "0.1.0"),
        ("fastseg", "0.1.0"),
        ("interpolate + argmax", "2.13.0"),
    ]
    for old, new in zip((theirs, OLD, labels, plain), found, strict=True):
        assert (new["device"], new["schema"], new["part"]) == ("A CPU", 2, "whole")
        assert all(new[name] == old[name] for name in ("p50", "ratio", "command", "parity_error"))
    path.write_text(json.dumps({name: OLD[name] for name in OLD if name != "cpu"}))
    with pytest.raises(ValueError, match="line 1: row: cpu is missing"):
        rows.read_rows(path)


def test_newest_run_of_each_case_counts():
    later = "2026-01-03T00:00:00+00:00"
    small = {**ROW, "size": [64, 64]}
    new = {**ROW, "date": later, "p50": 205.0}
    assert rows.newest([ROW, FAST, small, new]) == [[new], [small]]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("[cg]pu.jsonl")), ids=lambda path: path.stem)
def test_committed_rows_fit_the_schema(path):
    assert rows.read_rows(path)

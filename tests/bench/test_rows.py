"""bench.rows: the schema, files of rows that are only added to, and what older rows mean."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest

from bench.options import RESULTS
from bench.rows import SCHEMA, append_rows, newest, read_rows
from tests.bench.cases import FLOOR, ROW, row

BASE, FAST = row(), row(50.0, "fastseg eager", ratio=4.0)


def read(path, *objects):
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    return read_rows(path)


def test_rows_are_only_added(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    append_rows(path, [BASE, FAST])
    before = path.read_bytes()
    append_rows(path, [FAST])
    assert path.read_bytes().startswith(before)
    assert read_rows(path) == [BASE, FAST, FAST]
    path.write_bytes(before[:-1])
    with pytest.raises(ValueError, match="cut off"):
        append_rows(path, [BASE])
    assert path.read_bytes() == before[:-1]


def test_wrong_values_are_named():
    replace(BASE, **FLOOR, floor_ms=10.0)
    for message, change in {
        "parity_error: expected .*, got 0.001": {"parity_error": 1e-3},
        "parity_error: expected .*, got nan": {"parity_error": math.nan},
        "p50 <= p80": {"p80": 1.0},
        "0 < p20": {"p20": 0.0},
        "cpu: .*; threads: ": {"threads": True, "cpu": None},
        "kind: expected": {"kind": "backward"},
        "unit: expected": {"unit": "MB"},
        "cache: expected": {"cache": "lukewarm"},
        "size: expected": {"size": (512,)},
        "ratio: expected": {"ratio": 2.0},
        "time zone": {"date": "2026-01-02T03:04:05"},
        "ISO 8601": {"date": "yesterday"},
        "schema: expected": {"schema": SCHEMA + 1},
        "flops: expected": {"flops": 1.5},
        "floor_ms: expected work and ceilings": {"floor_ms": 1.0},
        "floor_ms: expected .*, got None": FLOOR,
    }.items():
        with pytest.raises(ValueError, match=message):
            replace(BASE, **change)


def test_wrong_fields_and_lines_are_named(tmp_path):
    good, path = asdict(BASE), tmp_path / "rows.jsonl"
    for message, bad in {
        "argument 'extra'": {**good, "extra": 1},
        "argument: 'torch'": {name: value for name, value in good.items() if name != "torch"},
        "p50: expected": {**good, "p50": "200"},
        "size": {**good, "size": 512},
        "schema": {**good, "schema": SCHEMA + 1},
        "expected an object": [1],
    }.items():
        with pytest.raises(ValueError, match=rf"rows.jsonl, line 2: .*{message}"):
            read(path, good, bad)
    path.write_text(json.dumps(good) + '\n{"schema": 3, "da')
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: "):
        read_rows(path)


def test_newest_run_of_each_case_counts():
    small = replace(BASE, size=(64, 64))
    new = replace(BASE, date="2026-01-03T00:00:00+00:00", p50=205.0)
    assert newest([BASE, FAST, small, new]) == [[new], [small]]
    # The parts of a way from an image are one case; ops are each their own.
    parts = [row(kind="end to end", part=part) for part in ("whole", "pre")]
    ops = [row(kind="op", part=part) for part in ("mix_ffn 1", "mix_ffn 2")]
    assert newest([*parts, *ops]) == [parts, [ops[0]], [ops[1]]]


def without(values, *names):
    return {name: value for name, value in values.items() if name not in names}


def test_old_rows_of_the_grid_are_read_as_what_they_mean(tmp_path):
    old = {**without(ROW, "device", "provider_version"), "schema": 1, "provider": "fastseg"}
    labels = {**old, "kind": "labels", "case": "random", "baseline": "interpolate + argmax"}
    plain = {**labels, "provider": "interpolate + argmax"}
    given = [{**old, "provider": "transformers eager"}, old, labels, plain]
    found = read(tmp_path / "rows.jsonl", *given)
    versions = {"transformers eager": "5.23.0", "fastseg eager": "0.1.0", "fastseg": "0.1.0"}
    versions |= {"interpolate + argmax": "2.13.0"}
    assert {one.provider: one.provider_version for one in found} == versions
    for before, new in zip(given, found, strict=True):
        assert (new.device, new.schema, new.part) == (ROW["cpu"], SCHEMA, "whole")
        for name in ("p50", "ratio", "command", "parity_error", "date", "repeats", "kind"):
            assert getattr(new, name) == before[name]
    with pytest.raises(ValueError, match="line 1: KeyError: 'cpu'"):
        read(tmp_path / "rows.jsonl", without(old, "cpu"))
    second = {**without(asdict(FAST), "host", "mode", "count"), "schema": 2}
    assert read(tmp_path / "rows.jsonl", second) == [FAST]


def test_old_rows_of_hosts_and_numerics_are_read_as_what_they_mean(tmp_path):
    old = {**without(ROW, "device", "provider_version", "kind", "case"), "schema": 1}
    host = {"host": "smp", "host_version": "0.6.0", "mode": "compiled", "variant": "b2"}
    host |= {"provider": "accelerated", "baseline": "host", "ratio": 4.0}
    (new,) = read(tmp_path / "hosts.jsonl", {**old, **host})
    assert (new.kind, new.case, new.host, new.mode) == ("host", "b2", "smp", "compiled")
    assert (new.provider_version, new.device, new.unit) == ("0.6.0", ROW["cpu"], "ms")
    assert (new.p50, new.ratio) == (200.0, 4.0)

    left_out = ("batch", "threads", "baseline", "unit", "p20", "p50", "p80", "repeats", "ratio")
    old = without(old, *left_out, "parity", "parity_error", "parity_gate")
    figures = {"error": 3e-7, "differing": 0.0, "shortfall": 1e-8}
    old |= {"device": ROW["cpu"], "images": 4, "provider": "fastseg eager", **figures}
    found = read(tmp_path / "numerics.jsonl", old)
    assert {one.part: one.p50 for one in found} == figures
    for one in found:
        assert (one.kind, one.unit, one.repeats) == ("numerics", "share", 4)
        assert (one.provider, one.provider_version) == ("fastseg eager", "0.1.0")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.stem)
def test_committed_rows_are_readable(path):
    assert read_rows(path)

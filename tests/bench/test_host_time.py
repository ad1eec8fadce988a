"""`python -m bench host-time`: what calls cost before a GPU has anything to do."""

from __future__ import annotations

import pytest

from bench import host_time, rows
from bench.report import tables
from fastseg.kernels.core import optional_triton

# In a process of its own each side has Triton's JIT, and no interpreter.
pytestmark = pytest.mark.skipif(not optional_triton.HAS_TRITON, reason="needs triton")


@pytest.mark.slow
def test_a_run(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    options = ["--variants", "b0", "--rounds", "1", "--base", "HEAD", "--output", str(path)]
    assert host_time.main(options) == 0
    found = rows.read_rows(path)
    assert [(row.part, row.provider) for row in found] == [
        (part, provider) for part in rows.HOST_TIME_PARTS for provider in ("fastseg", "HEAD")
    ]
    assert all(row.unit == "us" and row.p20 > 1 for row in found)
    assert {row.commit == "HEAD" for row in found if row.provider == "HEAD"} == {True}
    assert tables.host_time(found) in capsys.readouterr().out
    for part in rows.HOST_TIME_PARTS:  # HEAD's are about the same: nothing is left out
        ours, base = (row.p20 for row in found if row.part == part)
        assert 0.1 < ours / base < 10

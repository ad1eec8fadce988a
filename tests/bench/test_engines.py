"""`python -m bench engines`: rows of a run of two photographs; its table; processes watched."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import engines
from bench.options import ACTOR, DRIVER, ENGINE, LOOP, RAY_ACTORS
from bench.processes import used_by
from bench.report import tables
from bench.report.engines import engines as table
from bench.rows import UNITS, read_rows

from .cases import row

_CHILD = "x = bytearray(120 * 10**6); y = sum(range(3 * 10**7))"
_PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {_CHILD!r}], start_new_session=True)
child.wait()
time.sleep(0.3)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="read from Linux's /proc")
def test_processes(tmp_path):
    """Of those that a command begins, too, in sessions of their own."""
    command = [sys.executable, "-c", _PARENT]

    def kind(line: str) -> str:
        return "parent" if "Popen" in line else "child"

    used = used_by(command, kind, dict(os.environ), tmp_path)
    assert 0.1 < used.processor["child"] < used.seconds
    assert used.processor["parent"] < used.processor["child"]
    assert 120 < used.peak["child"] < 180
    assert used.peaks == pytest.approx(used.peak)  # one of each
    with pytest.raises(RuntimeError, match="no such thing"):
        used_by([sys.executable, "-c", "exit('no such thing')"], kind, dict(os.environ), tmp_path)


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("ray::MapWorker(MapBatches(Segmenter)).submit", ACTOR),
        ("ray::IDLE", ENGINE),
        ("/x/raylet/raylet --raylet_socket_name=/x/socket", ENGINE),
        ("python -m fastseg predict photos --engine ray", DRIVER),
        ("python -c import fastseg segmenter = fastseg.Segmenter( model)", DRIVER),
    ],
)
def test_kinds(command, kind):
    assert engines._kind(command) == kind


def test_table():
    assert table([]) == tables.NO_ROWS
    first, second = RAY_ACTORS
    what = {"baseline": LOOP, "case": "labels alone"}
    rows = []
    for kind, values in {
        "engine": {LOOP: 400.0, first: 410.0, second: 210.0},
        "engine processor": {LOOP: 390.0, first: 396.0, second: 398.0},
        "engine start": {LOOP: 2.5, first: 9.0, second: 9.5},
        "engine memory": {f"{LOOP}: {DRIVER}": 700.0, f"{first}: {ACTOR}": 800.0},
        "engine bytes": {
            **{"a row": 70.0, "a row with labels as zlib": 13_000.0},
            **{"a row with labels as rle": 11_000.0},
        },
        "engine driver": {"1,000 found and named": 72.0, "receipts of 1,000 read": 18.0},
        "engine driver memory": {
            **{"a picture of a round": 250.0, "a picture that is done": 160.0},
            **{"a picture in the object store": 90.0},
        },
    }.items():
        baseline = {**what, "kind": kind, "unit": UNITS[kind], "baseline": next(iter(values))}
        rows += [row(**baseline, provider=name, p50=value) for name, value in values.items()]
    text = table(rows)
    assert f"| {LOOP} " in text
    assert "Ray's own work is 6.0 ms of a processor a picture" in text
    assert ": 167 core hours" in text  # 6 ms x 10^8 / 3.6 x 10^6
    assert "takes the driver 2.0 h" in text  # 72 us x 10^8
    assert "1.2 minutes before each" in text
    assert "The driver holds 0.2 GB for a round" in text
    assert "up to 16 GB, after reading receipts for 0.5 h" in text
    assert "Receipts are 7 GB in 390,625 files" in text
    assert "1.3 TB (zlib) or 1.1 TB (rle)" in text
    assert "90 MB for a round" in text
    assert text in tables.markdown(rows)


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("ray") is None, reason="Ray is not installed: `make test-all` does it"
)
def test_a_run(tmp_path, monkeypatch, capsys):
    file = tmp_path / "rows.jsonl"
    options = ["--pictures", "6", "--few", "1", "--repeats", "1", "--files", "300"]
    real = engines.used_by

    def used(command, *arguments):
        """The real processes; but of few photographs, their time would be lost in the noise."""
        found = real(command, *arguments)
        many = any("6" in Path(word).name for word in command if os.path.isdir(word))
        found.seconds, found.processor = 10.0 + many, {"driver": 5.0 + many}
        return found

    monkeypatch.setattr(engines, "used_by", used)
    assert engines.main([*options, "--output", str(file)]) == 0
    rows = read_rows(file)
    assert {one.kind for one in rows} == {kind for kind in UNITS if kind.startswith("engine")}
    by = {(one.kind, one.provider): one.p50 for one in rows}
    assert all(by["engine", name] == pytest.approx(200) for name in engines.PROVIDERS)
    for name in RAY_ACTORS:
        assert 100 < by["engine memory", f"{name}: {ACTOR}"] < 4000
    sizes = [value for (kind, _), value in by.items() if kind == "engine bytes"]
    assert sizes[0] < min(sizes[1:])
    assert "Ray's own work is" in capsys.readouterr().out

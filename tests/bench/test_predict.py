"""`python -m bench predict`: rows of two commits and the pipeline on two photographs; its table."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

import pytest

from bench import predict
from bench.report import tables
from bench.rows import read_rows

from .cases import row


def test_photos(tmp_path):
    from PIL import Image

    paths = predict.draw_photos(tmp_path, 5)
    sizes = []
    for path in paths:
        with Image.open(path) as image:
            sizes.append(image.size)
    assert all(abs(width * height / 2.4e6 - 1) < 0.01 for width, height in sizes)
    assert len({path.read_bytes() for path in paths}) == 5


def test_processor_seconds(tmp_path):
    code = "import os; x = sum(range(10**7)); assert os.environ['OMP_NUM_THREADS'] == '1'"
    seconds, wall = predict.processor_seconds(["python3", "-c", code], tmp_path)
    assert 0.01 < seconds < 1.1 * wall + 0.1
    with pytest.raises(RuntimeError, match="no such thing"):
        predict.processor_seconds(["python3", "-c", "exit('no such thing')"], tmp_path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="read from Linux's /proc")
def test_peak(tmp_path):
    (tmp_path / "grows.py").write_text("import sys; x = bytearray(int(sys.argv[1]) * 10**6)")
    small, large = (
        predict.peak_megabytes(["python3", "-m", "grows", str(size)], tmp_path, tmp_path)
        for size in (1, 101)
    )
    assert 95 < large - small < 110
    assert small < 100  # of Python alone, whatever this process holds


def test_table():
    assert tables.predict([]) == tables.NO_ROWS
    old, new = "fastseg predict at 8e0a0bc", predict.OURS
    common = {"kind": "predict", "baseline": old, "case": "labels alone"}
    rows = [row(**common, provider=old, p50=400.0), row(**common, provider=new, p50=100.0)]
    memory = {**common, "kind": "predict memory", "unit": "MB", "case": "peak"}
    rows.append(row(**memory, provider=f"{new}, 20 photographs", p50=700.0))
    rows.append(row(**{**common, "kind": "search", "case": "1,000 files"}, provider=new, p50=2.5))
    evaluated = {**common, "kind": "evaluate", "case": "counting", "baseline": "fastseg.evaluate"}
    rows.append(row(**evaluated, provider="fastseg.evaluate", p50=200.0))
    rows.append(row(**evaluated, provider="counting", p50=1.0))
    text = tables.predict(rows)
    assert "| labels alone |" in text
    assert "100 (25%)" in text
    assert "20 photographs 700 MB" in text
    assert "first of 1,000 files in folders is known it takes 2.50 ms" in text
    assert "Counting takes 1.00 of the 200 ms of a photograph" in text


@pytest.mark.slow
def test_against_a_commit(tmp_path, monkeypatch):
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        pytest.skip("there is no git history here")

    def processor_seconds(command, code, measure=predict.processor_seconds):
        """The real process; but of two photographs, its time would be lost in the start's noise."""
        _, wall = measure(command, code)
        return 3 + 0.1 * sum(argument.endswith(".jpg") for argument in command), wall

    monkeypatch.setattr(predict, "processor_seconds", processor_seconds)
    monkeypatch.setattr(predict, "_MEMORY", (2, 3))
    file = tmp_path / "rows.jsonl"
    options = ["--against", head.stdout.strip(), "--pictures", "2", "--repeats", "1"]
    options += ["--files", "20"]
    assert predict.main([*options, "--output", str(file)]) == 0
    rows = read_rows(file)
    assert [(one.kind, one.case) for one in rows] == [
        *(("predict", case) for case in predict.CASES for _ in range(3)),
        ("search", "20 files"),
        *[("evaluate", "counting")] * 2,
        *[("predict memory", "peak")] * 2,
    ]
    assert all(one.parity_error == 0 for one in rows)
    whole, counting = (one.p50 for one in rows if one.kind == "evaluate")
    assert 0 < counting < whole
    assert [one.p50 for one in rows if one.kind == "predict"] == pytest.approx([100] * 6)


def test_too_few_photographs(tmp_path, monkeypatch, capsys):
    @contextlib.contextmanager
    def checkouts(*_):
        yield tmp_path, None

    monkeypatch.setattr(predict, "checkouts", checkouts)
    monkeypatch.setattr(predict, "processor_seconds", lambda command, code: (3.0, 3.0))
    assert predict.main(["--against", "HEAD", "--pictures", "2"]) == 2
    assert "--pictures: expected enough" in capsys.readouterr().err

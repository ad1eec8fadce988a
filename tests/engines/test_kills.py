"""Processes that are killed in the middle, and a disk that is full: no picture is lost or twice."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.engines.conftest import BROKEN, ROOT, actors, is_whole, label_files, needs_ray

pytestmark = [
    pytest.mark.slow,
    needs_ray,
    pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes in Linux's /proc"),
]
# A picture takes so long that a kill meets the middle of a run.
_SLOW = """
import time
import fastseg.inference.segmenter as segmenter
real = segmenter.pack
def pack(*arguments):
    time.sleep(0.1)
    return real(*arguments)
segmenter.pack = pack
"""
# The system's own error of a full disk, for label maps below the folder 1.
_FULL = """
import fastseg.images.storage as storage
real = storage.write_whole
def write_whole(path, write):
    if path.parent.name == "1":
        with open("/dev/full", "wb", buffering=0) as file:
            write(file)
    real(path, write)
storage.write_whole = write_whole
"""


@pytest.fixture(autouse=True)
def folder_of_ray(monkeypatch, environment):
    """Sockets lie in it, whose paths are short."""
    folder = tempfile.mkdtemp(prefix="ray")
    monkeypatch.setitem(environment, "RAY_FOLDER", folder)
    yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def changed(tmp_path, environment) -> Callable[[str], dict[str, str]]:
    """An environment in which `code` changes fastseg, in the actors too."""

    def change(code: str) -> dict[str, str]:
        folder = tmp_path / "changed"
        folder.mkdir()
        # Only where fastseg is imported anyway: Ray's own processes would take seconds to begin.
        (folder / "sitecustomize.py").write_text(
            "import sys, threading, time\n"
            "def wait():\n"
            "    while not hasattr(sys.modules.get('fastseg'), 'warmup'):\n"
            "        time.sleep(0.02)\n"
            f"    exec({code!r}, {{}})\n"
            "threading.Thread(target=wait, daemon=True).start()\n"
        )
        packages = f"{folder}{os.pathsep}{environment['PYTHONPATH']}"
        return {**environment, "PYTHONPATH": packages}

    return change


def begin(
    environment: dict[str, str], pictures: Path, out: Path, model: Path, *options: str
) -> subprocess.Popen:
    """The command in a process of its own, with a cluster of its own."""
    code = (
        "import os, sys, ray\n"
        "for left in (2, 1, 0):\n"
        "    try:\n"
        "        ray.init(address='local', num_cpus=3, include_dashboard=False,\n"
        "            object_store_memory=100_000_000, _node_ip_address='127.0.0.1',\n"
        "            _temp_dir=os.environ['RAY_FOLDER'],\n"
        "            logging_level='ERROR', log_to_driver=False)\n"
        "        break\n"
        "    except Exception:\n"
        "        ray.shutdown()\n"
        "        if not left: raise\n"
        "from fastseg.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "ray.shutdown()\n"
        "sys.exit(status)\n"
    )
    where = ["--model", str(model), "--output", str(out), "--device", "cpu"]
    command = ["predict", str(pictures), *where, "--engine", "ray", "--num-actors", "2", *options]
    return subprocess.Popen(
        [sys.executable, "-c", code, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    end = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < end, "not in three minutes"
        if process is not None and process.poll() is not None:
            raise AssertionError(f"it has ended: {process.stderr.read()[-2000:]}")
        time.sleep(0.05)


def rows_of(out: Path) -> list[dict]:
    return pq.read_table(out / "receipts").to_pylist()


def check(pictures: Path, out: Path) -> None:
    """Every picture has one row, those that are broken with an error, the others with a file."""
    rows = rows_of(out)
    expected = Counter(str(path) for path in pictures.rglob("*") if path.is_file())
    assert Counter(row["path"] for row in rows) == expected
    for row in rows:
        assert (row["error"] is not None) == (Path(row["path"]).name in BROKEN), row
        assert (row["file"] is None) == (row["error"] is not None)
    files = label_files(out)
    assert set(files) == {row["file"] for row in rows if row["file"]}
    assert all(is_whole(out / name) for name in files)


def test_an_actor_is_killed(changed, model_folder, pictures, tmp_path):
    slow = changed(_SLOW)
    out = tmp_path / "out"
    process = begin(slow, pictures, out, model_folder)
    try:
        wait_until(lambda: len(label_files(out)) >= 8 and len(actors()) == 2, process)
        before = actors()
        os.kill(before[0], signal.SIGKILL)
        assert len(label_files(out)) < 37  # it was in the middle
        # Another takes its place.
        wait_until(lambda: len(set(actors()) - set(before)) == 1, process)
        printed, said = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 1, said
    assert "37 of 40 images segmented" in printed
    check(pictures, out)
    # A second run does only what is missing: what is broken.
    stamps = {name: (out / name).stat().st_mtime_ns for name in label_files(out)}
    (out / "0" / "00_labels.png").unlink()  # and does not look at files
    process = begin(slow, pictures, out, model_folder, "--resume")
    printed, said = process.communicate(timeout=240)
    assert "0 of 3 images segmented" in printed, said
    for name in label_files(out):
        assert (out / name).stat().st_mtime_ns == stamps[name]


def test_the_driver_is_killed(changed, model_folder, pictures, tmp_path):
    slow = changed(_SLOW)
    out = tmp_path / "out"
    process = begin(slow, pictures, out, model_folder)
    try:
        wait_until(lambda: (out / "receipts").exists() and len(rows_of(out)) >= 8, process)
    finally:
        process.kill()
    process.wait()
    wait_until(lambda: not actors())  # they end with it
    done = [row["path"] for row in rows_of(out) if row["error"] is None]
    assert 0 < len(done) < 37
    stamps = {
        row["file"]: (out / row["file"]).stat().st_mtime_ns for row in rows_of(out) if row["file"]
    }
    process = begin(slow, pictures, out, model_folder, "--resume")
    printed, said = process.communicate(timeout=240)
    assert process.returncode == 1, said
    assert f"{37 - len(done)} of {40 - len(done)} images segmented" in printed
    check(pictures, out)
    for name, stamp in stamps.items():
        assert (out / name).stat().st_mtime_ns == stamp


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk(changed, environment, model_folder, pictures, tmp_path):
    """Rows with an error, and once there is room the next run does these alone."""
    out = tmp_path / "out"
    process = begin(changed(_FULL), pictures, out, model_folder)
    printed, said = process.communicate(timeout=240)
    assert "19 of 40 images segmented" in printed, said
    assert said.count(f"cannot write to {out}/1: No space left on device") == 18
    assert len([row for row in rows_of(out) if row["error"]]) == 18 + 3
    process = begin(environment, pictures, out, model_folder, "--resume")
    printed, said = process.communicate(timeout=240)
    assert "18 of 21 images segmented" in printed, said
    check(pictures, out)

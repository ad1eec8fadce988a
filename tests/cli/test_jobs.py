"""Parts of a run: --shard and --limit, --resume after a kill, and the manifest of what was done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastseg
from tests.cli.cli_cases import photo, tree

ROOT = Path(fastseg.__file__).parents[1]


@pytest.fixture
def many(tmp_path) -> Path:
    """Seven pictures in two folders, and a broken one."""
    for number in range(7):
        name = tmp_path / "in" / f"{number % 2}" / f"{number}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        photo(("coffee", "astronaut")[number % 2], (60 + number, 48)).save(name)
    (tmp_path / "in" / "1" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return tmp_path / "in"


def rows_of(manifest: Path) -> list[dict]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in tree(folder)}


def test_shards_together_are_one_run(predict, many, tmp_path, capsys):
    whole = tmp_path / "whole.jsonl"
    assert predict(many, "--manifest", whole, output=tmp_path / "whole") == 1
    manifest = tmp_path / "shards.jsonl"
    for shard in ("1/3", "2/3", "3/3"):
        predict(many, "--shard", shard, "--manifest", manifest, output=tmp_path / "shards")
    assert contents(tmp_path / "shards") == contents(tmp_path / "whole")

    def facts(row: dict) -> dict:
        return {key: value for key, value in row.items() if key not in ("ms", "output")}

    expected, found = ({row["image"]: facts(row) for row in rows_of(p)} for p in (whole, manifest))
    assert len(rows_of(manifest)) == len(expected) == 8
    assert found == expected
    assert [row["image"] for row in expected.values() if row["error"]] == [
        str(many / "1" / "broken.png")
    ]


def test_limit(predict, many, tmp_path, capsys):
    assert predict(many, "--limit", 3, "--no-overlay") == 0
    assert tree(tmp_path / "out") == {f"0/{number}_labels.png" for number in (0, 2, 4)}


def test_resume(predict, many, tmp_path, capsys):
    """What lacks a result is done, and with a manifest what lacks a row without an error."""
    predict(many, "--limit", 4, "--no-overlay")
    (tmp_path / "out" / "0" / "2_labels.png").unlink()
    before = {name: os.stat(tmp_path / "out" / name).st_mtime_ns for name in tree(tmp_path / "out")}
    capsys.readouterr()
    assert predict(many, "--resume", "--no-overlay") == 1
    printed = capsys.readouterr()
    assert "3 images left out, as their results are there" in printed.err
    assert "4 of 5 images segmented" in printed.out
    assert len(tree(tmp_path / "out")) == 7
    for name, at in before.items():
        assert os.stat(tmp_path / "out" / name).st_mtime_ns == at

    manifest = tmp_path / "rows.jsonl"
    assert predict(many, "--resume", "--manifest", manifest, "--no-overlay") == 1
    assert len(rows_of(manifest)) == 8  # no row told of them
    photo("coffee").save(many / "1" / "broken.png")
    assert predict(many, "--resume", "--manifest", manifest, "--no-overlay") == 0
    assert [row["error"] for row in rows_of(manifest)[8:]] == [None]
    capsys.readouterr()
    assert predict(many, "--resume", "--manifest", manifest, "--no-overlay") == 0
    assert len(rows_of(manifest)) == 9


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_resume_after_a_kill(model_folder, predict, many, tmp_path, capsys):
    for number in range(200):
        os.link(many / "0" / "0.png", many / f"{number}.png")
    manifest = tmp_path / "rows.jsonl"
    where = ["--model", model_folder, "--output", tmp_path / "out", "--device", "cpu"]
    command = [sys.executable, "-m", "fastseg", "predict", many, *where, "--manifest", manifest]
    process = subprocess.Popen(map(str, command), cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (manifest.exists() and manifest.read_text().count("\n")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(rows_of(manifest))
    assert 0 < done < 208
    with manifest.open("ab") as file:
        file.write(b'{"image": "cut o')  # as by a full disk

    assert predict(many, "--resume", "--manifest", manifest) == 1
    assert predict(many, output=tmp_path / "whole") == 1
    # What was half written is the temporary file of an atomic write, and no result.
    found = contents(tmp_path / "out")
    assert {name: found[name] for name in found if name.endswith((".png", ".jpg"))} == contents(
        tmp_path / "whole"
    )
    assert len(rows_of(manifest)) == 208
    assert len({row["image"] for row in rows_of(manifest)}) == 208


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_under_the_manifest(predict, many, tmp_path, capsys):
    assert predict(many / "0", "--manifest", "/dev/full", "--no-overlay") == 1
    assert "--manifest /dev/full: No space left on device" in capsys.readouterr().err
    assert len(tree(tmp_path / "out")) == 4  # the results are there


@pytest.mark.parametrize("text", ["something else\n", '{"image": 1}\n', "[]\n"])
def test_a_manifest_that_is_something_else(predict, many, tmp_path, capsys, text):
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text(text)
    assert predict(many, "--manifest", manifest) == 1
    assert "expected rows of earlier runs, found in line 1" in capsys.readouterr().err
    assert manifest.read_text() == text
    assert not tree(tmp_path / "out")


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/2", "1/2/3", "-1/2"])
def test_wrong_shards(predict, many, capsys, text):
    assert predict(many, f"--shard={text}") == 2
    assert "expected I/N" in capsys.readouterr().err

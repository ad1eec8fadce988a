"""The driver of `--engine`, with a cluster of this process: rounds, shards, resume, URLs."""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fastseg.cli import engine_predict, evaluate_parts, main
from fastseg.cli.engine import MAX_BLOCK, Cluster
from fastseg.cli.engine_search import UrlFiles
from tests.cli.cli_cases import photo, tree


class Here(Cluster):
    """A cluster without machines, whose calls come back the last first."""

    def map(self, worker, options, blocks):
        made = worker(**options)
        yield from [made(block) for block in blocks][::-1]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    @contextlib.contextmanager
    def connected(arguments):
        yield Here(2, 1, 0.0)

    monkeypatch.setattr(engine_predict, "connected", connected)
    monkeypatch.setattr(evaluate_parts, "connected", connected)


@pytest.fixture
def many(tmp_path) -> Path:
    """Nine pictures in two folders, two of them with one name, and a broken one."""
    for number in range(8):
        path = tmp_path / "in" / f"{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(("coffee", "astronaut")[number % 2], (60 + number, 48)).save(path)
    photo("rocket").save(tmp_path / "in" / "0" / "2.jpg")
    (tmp_path / "in" / "1" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return tmp_path / "in"


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in tree(folder) if name.endswith(".png")}


def paths_in(folder: Path) -> Counter[str]:
    return Counter(pq.read_table(folder / "receipts")["path"].to_pylist())


def test_results_are_those_without(predict, many, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine_predict, "_ROUND", 4)  # and so three of them
    assert predict(many, "--no-overlay", output=tmp_path / "plain") == 1
    expected = capsys.readouterr()
    assert predict(many, "--engine", "ray") == 1
    printed = capsys.readouterr()
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    assert len(contents(tmp_path / "out")) == 9
    for text in ("9 of 10 images segmented, in ",):
        assert text in printed.out
        assert text in expected.out
    line = f"{many / '1' / 'broken.png'}: no image that Pillow knows"
    assert line in printed.err
    assert line in expected.err
    assert paths_in(tmp_path / "out") == Counter(str(p) for p in many.rglob("*.*"))


def test_shards_and_limit(predict, many, tmp_path, capsys):
    assert predict(many, "--no-overlay", output=tmp_path / "plain") == 1
    for shard in ("1/3", "2/3"):
        predict(many, "--engine", "ray", "--shard", shard, "--resume")
    predict(many, "--engine", "ray", "--shard", "3/3", "--resume", "--limit", 1)
    assert len(paths_in(tmp_path / "out")) == 8
    predict(many, "--engine", "ray", "--shard", "3/3", "--resume")
    assert paths_in(tmp_path / "out") == Counter(str(p) for p in many.rglob("*.*"))
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def test_resume(predict, many, tmp_path, capsys):
    assert predict(many, "--engine", "ray") == 1
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*_labels.png")}
    capsys.readouterr()
    assert predict(many, "--engine", "ray") == 2
    assert "pass --resume to go on with it" in capsys.readouterr().err
    photo("coffee").save(many / "1" / "broken.png")
    assert predict(many, "--engine", "ray", "--resume") == 0
    printed = capsys.readouterr()
    assert "1 of 1 images segmented" in printed.out
    assert "9 images left out, as receipts tell that they are done" in printed.err
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    rows = pq.read_table(tmp_path / "out" / "receipts").to_pylist()
    assert len(rows) == 10
    assert all(row["error"] is None for row in rows)
    assert predict(many, "--engine", "ray", "--resume") == 0
    assert "0 of 0 images segmented" in capsys.readouterr().out


@pytest.mark.parametrize("scheme", ["file://", "fsspec+file://"])
def test_urls(predict, many, tmp_path, capsys, scheme):
    photo("coffee").save(many / "1" / "again.jpg")
    for url in (f"{scheme}{many}", f"{scheme}{many}/"):
        out = tmp_path / f"far{url.endswith('/')}"
        assert predict(url, "--engine", "ray", output=f"{scheme}{out}") == 1
        assert "10 of 11 images segmented" in capsys.readouterr().out
        assert {"0/2.png_labels.png", "0/2.jpg_labels.png", "1/again_labels.png"} <= tree(out)
    one = f"{scheme}{many}/0/4.png"
    assert predict(one, one, f"{scheme}{many}/none", "--engine", "ray") == 1
    printed = capsys.readouterr()
    assert "1 of 1 images segmented" in printed.out
    assert f"{many}/none: no images there" in printed.err
    assert tree(tmp_path / "out") >= {"4_labels.png"}
    # The output lies in what is searched, and is left out.
    assert predict(f"{scheme}{many}", "--engine", "ray", output=f"{scheme}{many}/out") == 1
    assert predict(f"{scheme}{many}", "--engine", "ray", "--resume", output=f"{scheme}{many}/out")
    assert "0 of 1 images segmented" in capsys.readouterr().out


def test_pictures_of_the_same_name_behind_urls(predict, many, tmp_path):
    for name in ("0", "1"):
        photo("coffee").save(many / name / "same.png")
    urls = [f"file://{many}/{name}" for name in ("0", "1")]
    predict(*urls, "--engine", "ray")
    files = pq.read_table(tmp_path / "out" / "receipts")["file"].to_pylist()
    written = [file for file in files if file]
    assert len(set(written)) == len(written) == 11
    assert set(contents(tmp_path / "out")) == set(written)
    assert {"0/same_labels.png", "1/same_labels.png"} <= set(written)
    # One place below two hosts.
    found = UrlFiles([urls[0], f"fsspec+{urls[0]}"], "nowhere")
    names = [found.name_of(place) for place, _ in found]
    assert len(set(names)) == len(names) == 12


@pytest.mark.skipif(os.name != "posix", reason="names are Unicode there")
def test_a_name_that_is_no_utf_8(predict, many, capsys):
    os.rename(many / "0" / "0.png", os.path.join(os.fsencode(many), b"caf\xe9.png"))
    assert predict(many, "--engine", "ray") == 1
    printed = capsys.readouterr()
    assert "8 of 10 images segmented" in printed.out
    assert "its name is no UTF-8" in printed.err


def test_what_is_wrong_is_told_before(predict, many, tmp_path, capsys):
    assert predict(many, "--engine", "ray", "--slide", 8, 8) == 2
    assert "--model" in capsys.readouterr().err
    assert predict(many, "--engine", "ray", "--slide", 8, 9) == 2
    assert "expected STRIDE to be at most CROP" in capsys.readouterr().err
    assert predict(many, "--engine", "ray", output="nonsense://x") == 1
    assert "--engine ray: " in capsys.readouterr().err
    assert not (tmp_path / "out" / "receipts").exists()


def test_evaluation(model_folder, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for index in range(7):
        photo("coffee").save(tmp_path / "data" / "images" / f"{index}.png")
        mask = Image.fromarray(rng.integers(0, 6, (48, 60), dtype=np.uint8))
        mask.save(tmp_path / "data" / "masks" / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    found = []
    for name, options in (("plain", []), ("ray", ["--engine", "ray"])):
        where = ["--model", str(model_folder), "--output", name, "--device", "cpu", "--boundary"]
        assert main(["evaluate", "data", *where, *options]) == 0
        found.append(json.loads((tmp_path / name / "metrics.json").read_text()))
    for name in ("seconds", "worst", "remarks"):
        found[0].pop(name, None), found[1].pop(name, None)
    assert found[0] == found[1]


def test_blocks():
    assert Cluster(2, 1, 0.0).block(40) == 3
    assert Cluster(2, 1, 0.0).block(40, least=8) == 8
    assert Cluster(100, 1, 1.0).block(10**6) == MAX_BLOCK
    assert Cluster(4, 1, 0.0).block(1) == 1
    assert str(Cluster(1, 2, 0.0)) == "1 actor of 2 CPUs"
    assert str(Cluster(3, 1, 0.5)) == "3 actors of 0.5 GPU"

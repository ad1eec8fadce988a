"""`fastseg evaluate --shard` and `--merge`: the figures of one run, exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastseg.cli import main
from tests.cli.cli_cases import photo, segmented, tree

COUNT = 5
EXACT = (
    *("confusion_matrix", "mean_iou", "pixel_accuracy", "mean_accuracy", "classes", "pictures"),
    *("pixels", "ignored_pixels", "frequency_weighted_iou", "absent_classes", "settings", "model"),
    *("mean_boundary_f1", "data"),
)


@pytest.fixture(scope="module")
def data(model_folder, tmp_path_factory) -> Path:
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    for index in range(COUNT):
        image = photo(("coffee", "astronaut", "rocket")[index % 3], (60 + index, 48))
        image.save(root / "images" / f"{index}.png")
        labels = segmented(model_folder, image).astype(np.uint8)
        wrong = rng.random(labels.shape) < 0.2
        labels[wrong] = rng.integers(0, 6, wrong.sum())
        labels[: index + 1] = 255
        Image.fromarray(labels).save(root / "masks" / f"{index}.png")
    return root


@pytest.fixture
def evaluate(model_folder, data):
    def run(out: Path, *arguments) -> int:
        where = ["--model", str(model_folder), "--output", str(out), "--device", "cpu"]
        return main(["evaluate", str(data), *where, *map(str, arguments)])

    return run


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def figures(folder: Path) -> dict:
    found = metrics_of(folder)
    return {name: found[name] for name in EXACT if name in found}


@pytest.mark.parametrize("shards", [1, 3, 7])  # of 7 shards two hold nothing
def test_shards_add_up(evaluate, tmp_path, shards, capsys):
    assert evaluate(tmp_path / "whole", "--boundary") == 0
    expected = capsys.readouterr().out
    out = tmp_path / "shards"
    for index in range(1, shards + 1):
        assert evaluate(out, "--boundary", "--shard", f"{index}/{shards}", "--worst", 1) == 0
        told = capsys.readouterr().out
        assert (
            f"of shard {index}/{shards}; when all are done: fastseg evaluate --merge {out}" in told
        )
    assert main(["evaluate", "--merge", str(out)]) == 0
    assert figures(out) == figures(tmp_path / "whole")
    assert set(EXACT) <= metrics_of(out).keys()
    assert (out / "confusion.png").read_bytes() != b""
    # The table, too, is that of one run.
    table = [line for line in expected.splitlines() if "%" in line and " a second" not in line]
    told = capsys.readouterr().out
    assert len(table) > 5
    assert all(line in told for line in table)
    assert "worst-01.png" in tree(out / f"shard-1-of-{shards}")


def test_limit_is_of_the_whole(evaluate, tmp_path):
    assert evaluate(tmp_path / "whole", "--limit", 3) == 0
    for index in (1, 2):
        assert evaluate(tmp_path / "out", "--limit", 3, "--shard", f"{index}/2") == 0
    assert main(["evaluate", "--merge", str(tmp_path / "out")]) == 0
    assert figures(tmp_path / "out") == figures(tmp_path / "whole")
    assert metrics_of(tmp_path / "out")["pictures"] == 3


def test_what_does_not_add_up(evaluate, tmp_path, capsys):
    out = tmp_path / "out"
    merge = ["evaluate", "--merge", str(out)]
    assert main(merge) == 1
    assert "expected folders shard-I-of-N with metrics.json, got none" in capsys.readouterr().err
    for index in (1, 3):
        evaluate(out, "--shard", f"{index}/4")
    capsys.readouterr()
    assert main(merge) == 1
    assert "2 of 4 shards have not come to their end: 2, 4" in capsys.readouterr().err
    evaluate(out, "--shard", "2/4", "--slide", 32, 24)
    evaluate(out, "--shard", "4/4")
    capsys.readouterr()
    assert main(merge) == 1
    said = capsys.readouterr().err
    assert "shard-2-of-4" in said
    assert "settings: expected those of all" in said
    evaluate(out, "--shard", "2/4")
    evaluate(out, "--shard", "1/2")
    capsys.readouterr()
    assert main(merge) == 1
    assert "expected shards of one run, got some of" in capsys.readouterr().err
    shutil.rmtree(out / "shard-1-of-2")
    assert main(merge) == 0
    (out / "shard-3-of-4" / "metrics.json").write_text("{cut o")
    assert main(merge) == 1
    assert "shard-3-of-4" in capsys.readouterr().err


def test_wrong_usage(evaluate, tmp_path, data, capsys):
    out = tmp_path / "out"
    assert evaluate(out, "--shard", "1/2", "--against", "plain") == 2
    assert "--against: not with --shard" in capsys.readouterr().err
    assert main(["evaluate"]) == 2
    assert "DATA: expected it, or --merge DIR" in capsys.readouterr().err
    assert main(["evaluate", str(data), "--merge", str(out)]) == 2
    capsys.readouterr()
    assert evaluate(out, "--num-actors", 2) == 2
    assert "--num-actors: only with --engine ray" in capsys.readouterr().err
    for option in (("--worst", 3), ("--against", "plain"), ("--shard", "1/2")):
        assert evaluate(out, "--engine", "ray", *option) == 2
        assert f"{option[0]}: not with --engine ray" in capsys.readouterr().err

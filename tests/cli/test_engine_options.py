"""`fastseg predict` with and without an engine: options that do not go together are named."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest

REFUSED = (
    *(["--runtime", "onnxruntime"], ["--all-pages"], ["--json"], ["--map", "labelIds"]),
    *(["--classes", "1"], ["--palette", "voc"], ["--scores"], ["--alpha", "0.5"]),
    *(["--cutout", "1"], ["--polygons"], ["--coco", "x.json"], ["--manifest", "x.jsonl"]),
    *(["--max-pixels", "9"], ["--overlay", "png"]),
)


@pytest.mark.parametrize("options", REFUSED, ids=lambda options: options[0])
def test_not_with_an_engine(predict, photos, capsys, options):
    assert predict(photos, "--engine", "ray", *options) == 2
    assert f"{options[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        *(["--address", "auto"], ["--num-actors", "2"], ["--gpus-per-actor", "0.5"]),
        *(["--cpus-per-actor", "2"], ["--labels", "zlib"], ["--labels", "rle"]),
    ],
    ids=lambda options: "".join(options),
)
def test_only_with_an_engine(predict, photos, capsys, options):
    assert predict(photos, *options) == 2
    said = capsys.readouterr().err
    assert options[0] in said
    assert "only with --engine ray" in said


def test_urls(predict, photos, capsys):
    assert predict(photos, output="s3://bucket/out") == 2
    assert "a URL only with --engine ray" in capsys.readouterr().err
    for path in ("https://example.org/a.jpg", "-"):
        assert predict(path, "--engine", "ray") == 2
        assert f"{path}: with --engine ray pictures are files" in capsys.readouterr().err
    assert predict("s3://bucket/in", photos, "--engine", "ray") == 2
    assert "alone, or files alone" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["-1", "x", "inf"])
def test_wrong_shares(predict, photos, capsys, text):
    assert predict(photos, "--engine", "ray", f"--gpus-per-actor={text}") == 2
    assert "expected a number from 0" in capsys.readouterr().err


def test_no_ray(predict, photos, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert predict(photos, "--engine", "ray") == 2
    assert 'pip install "fastseg-segformer[ray]"' in capsys.readouterr().err


def test_no_images(predict, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert predict(tmp_path / "empty", "--engine", "ray") == 1
    assert "no images to segment" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_room():
    from argparse import Namespace

    import torch

    from fastseg.cli.engine import _sized

    def sized(whole, free=None, **options):
        given = {"cpus_per_actor": 1, "gpus_per_actor": None, "num_actors": None}
        given["device"] = torch.device("cpu")
        found = _sized(Namespace(**{**given, **options}), whole, whole if free is None else free)
        return found.actors, found.gpus, found.device

    assert sized({"CPU": 8.0}) == (8, 0.0, "cpu")
    assert sized({"CPU": 8.0, "GPU": 2.0}) == (2, 1.0, "cuda")
    assert sized({"CPU": 8.0, "GPU": 2.0}, gpus_per_actor=0.5) == (4, 0.5, "cuda")
    assert sized({"CPU": 8.0, "GPU": 2.0}, gpus_per_actor=0.0, cpus_per_actor=4) == (2, 0, "cpu")
    assert sized({"CPU": 8.0}, {"CPU": 1.0}, num_actors=3) == (3, 0.0, "cpu")

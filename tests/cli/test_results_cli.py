"""`predict --coco`, `--polygons`, `--cutout` and `--tta`: what they write, and errors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO

import fastseg
from tests.cli.cli_cases import read_labels, tree


def test_coco(predict, photos, tmp_path, capsys):
    """Read by pycocotools; a broken picture is not in it."""
    (photos / "broken.png").write_bytes(b"none")
    file = tmp_path / "all" / "coco.json"
    assert predict(photos, "--no-overlay", "--coco", file) == 1
    data = COCO(str(file))
    names = sorted(one["file_name"] for one in data.imgs.values())
    assert names == [str(photos / "below" / "astronaut.png"), str(photos / "coffee.jpg")]
    assert [one["name"] for one in data.cats.values()] == [f"LABEL_{n}" for n in range(6)]
    for key, picture in data.imgs.items():
        stem = picture["file_name"].removeprefix(f"{photos}/").rpartition(".")[0]
        labels = read_labels(tmp_path / "out" / f"{stem}_labels.png")
        assert labels.shape == (picture["height"], picture["width"])
        found = data.loadAnns(data.getAnnIds(imgIds=[key]))
        assert {one["category_id"] for one in found} == set(np.unique(labels).tolist())
        for one in found:
            mask = coco_masks.decode(one["segmentation"])
            assert np.array_equal(mask, labels == one["category_id"])
            assert one["area"] == mask.sum()
    assert len(data.anns) == len({*data.anns})
    assert not [one for one in tree(tmp_path / "all") if "tmp" in one]


def test_coco_has_the_chosen_classes(predict, photos, tmp_path):
    file = tmp_path / "coco.json"
    predict(photos / "coffee.jpg", "--no-overlay", "--coco", file, "--threshold", "0.9")
    rows = json.loads(file.read_text())["annotations"]
    labels = read_labels(tmp_path / "out" / "coffee_labels.png")
    assert 255 in labels
    assert {one["category_id"] for one in rows} == {*np.unique(labels).tolist()} - {255}


def test_polygons_and_cutout(predict, photos, tmp_path):
    options = ("--no-overlay", "--polygons", "--cutout", "LABEL_1,3")
    assert predict(photos / "coffee.jpg", *options) == 0
    assert tree(tmp_path / "out") == {
        f"coffee_{one}" for one in ("labels.png", "cutout.png", "polygons.geojson")
    }
    labels = read_labels(tmp_path / "out" / "coffee_labels.png")
    found = json.loads((tmp_path / "out" / "coffee_polygons.geojson").read_text())
    pixels = np.zeros(6)
    for one in found["features"]:
        pixels[one["properties"]["class"]] += one["properties"]["pixels"]
    assert pixels.tolist() == np.bincount(labels.ravel(), minlength=6).tolist()
    with Image.open(tmp_path / "out" / "coffee_cutout.png") as cut:
        assert cut.mode == "RGBA"
        kept = np.asarray(cut)[..., 3] > 0
    assert kept.sum() == np.isin(labels, (1, 3)).sum()
    assert predict(photos / "coffee.jpg", *options) == 0  # they are its own, and replaced
    assert len(tree(tmp_path / "out")) == 3


def test_tta(predict, photos, tmp_path, model_folder):
    assert predict(photos / "coffee.jpg", "--no-overlay", "--tta", "flip,0.75") == 0
    model = fastseg.from_pretrained(model_folder)
    with Image.open(photos / "coffee.jpg") as image:
        (expected,) = fastseg.segment(model, image, tta=["flip", 0.75])
    labels = read_labels(tmp_path / "out" / "coffee_labels.png")
    assert torch.equal(torch.from_numpy(labels.astype(np.int64)), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--coco", "there"), "--coco .*there: is a folder"),
        (("--coco", "x.json", "--resume"), "--coco: expected no --resume"),
        (("--cutout", "LABEL_9"), "--cutout: the model has no class 'LABEL_9'"),
        (("--tta", "flop"), "expected flip and scales above 0"),
    ],
)
def test_errors(predict, photos, tmp_path, capsys, options, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    try:
        status = predict(photos / "coffee.jpg", *options)
    except SystemExit as error:
        status = error.code
    assert status in (1, 2)
    import re

    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out" / "coffee_labels.png").exists()


def test_polygons_without_the_extra(predict, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastseg.cli.predict.find_spec", lambda name: None)
    assert predict(photos, "--polygons") == 2
    assert "fastseg-segformer[geo]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

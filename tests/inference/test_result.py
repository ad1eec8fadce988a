"""`Result`: run lengths against pycocotools, polygons against pixels, pictures, names, errors."""

from __future__ import annotations

import io
import json
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco_masks

import fastseg
from fastseg import Result
from fastseg.cli.options import EMBEDDED_MODEL
from fastseg.demo.scenes import CLASSES, draw_scene
from fastseg.images.palettes import palette

NAMES = {0: "sky", 1: "tree", 2: "car", 3: "road"}
SMALL = arrays(
    np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12)), elements=st.integers(0, 3)
)


def result_of(numbers, image=None, **fields):
    image = np.zeros((*numbers.shape, 3), np.uint8) if image is None else image
    fields = {"names": NAMES, "palette": palette(4), **fields}
    return Result(torch.from_numpy(np.ascontiguousarray(numbers)), image, **fields)


def squares():
    """Classes 0 to 2: a ring of 1 around a hole of 0, two squares of 2 that touch at a corner."""
    numbers = np.zeros((20, 30), np.int64)
    numbers[2:12, 3:13] = 1
    numbers[5:8, 6:9] = 0
    numbers[14:16, 20:22] = numbers[16:18, 22:24] = 2
    return numbers


@pytest.fixture(scope="module")
def scene():
    return draw_scene(3, (120, 160))


@given(SMALL)
@settings(max_examples=200, deadline=None)
def test_run_lengths_are_those_of_pycocotools(numbers):
    result = result_of(numbers)
    found = result.rle()
    assert list(found) == np.unique(numbers).tolist()
    for annotation, (number, runs) in zip(result.coco(7, 5), found.items(), strict=True):
        mask = np.asfortranarray(numbers == number)
        expected = coco_masks.encode(mask.astype(np.uint8))
        assert runs == {"size": expected["size"], "counts": expected["counts"].decode()}
        assert annotation["segmentation"] == runs
        assert annotation["area"] == coco_masks.area(expected)
        assert annotation["bbox"] == coco_masks.toBbox(expected).tolist()
        assert (annotation["image_id"], annotation["category_id"]) == (7, number)
    assert [one["id"] for one in result.coco(7, 5)] == list(range(5, 5 + len(found)))


def test_run_lengths_of_a_scene(scene):
    """Long runs, whose counts take several letters, and 16-bit numbers."""
    large = np.kron(scene.labels, np.ones((9, 7), np.int64))
    for numbers in (large, scene.labels.astype(np.int64) * 1000):
        result = result_of(numbers, names={}, palette=palette(20))
        for number, runs in result.rle().items():
            expected = coco_masks.encode(np.asfortranarray(numbers == number).astype(np.uint8))
            assert runs["counts"] == expected["counts"].decode()
        json.dumps(result.coco())


def test_polygons_have_the_pixels_of_their_classes(scene):
    result = result_of(squares())
    found = result.polygons()
    assert sorted(number for number, _ in found) == [0, 0, 1, 2, 2]
    areas = {}
    for number, polygon in found:
        areas[number] = areas.get(number, 0) + polygon.area
    assert areas == {one.id: one.pixels for one in result.shares()}
    (ring,) = [polygon for number, polygon in found if number == 1]
    assert ring.bounds == (3, 2, 13, 12)
    assert [hole for hole in ring.interiors]
    # Regions under 5 pixels go to their neighbours; outlines of fewer points.
    assert {number for number, _ in result.polygons(smallest=5)} == {0, 1}
    real = result_of(scene.labels, names=dict(enumerate(CLASSES)), palette=palette(len(CLASSES)))
    points = [
        sum(len(one.exterior.coords) for _, one in real.polygons(simplify))
        for simplify in (0.0, 2.0)
    ]
    assert points[1] < points[0] / 2


def test_geojson():
    found = result_of(squares()).to_geojson((2.0, 0.0, 100.0, 0.0, -2.0, 50.0))
    assert json.loads(json.dumps(found))["type"] == "FeatureCollection"
    (tree,) = [one for one in found["features"] if one["properties"]["class"] == 1]
    assert tree["properties"] == {"class": 1, "name": "tree", "pixels": 91.0}
    outer, hole = (np.array(ring) for ring in tree["geometry"]["coordinates"])
    assert (outer.min(0).tolist(), outer.max(0).tolist()) == ([106, 26], [126, 46])
    for ring, sign in ((outer, 1), (hole, -1)):  # RFC 7946, 3.1.6
        x, y = ring[:-1].T
        assert np.sign(x @ np.roll(y, -1) - y @ np.roll(x, -1)) == sign


def test_masks_and_cut_outs(scene):
    numbers = squares()
    picture = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    result = result_of(numbers, picture)
    assert np.array_equal(result.mask("tree"), numbers == 1)
    assert np.array_equal(result.mask(["car", 1]), numbers > 0)
    cut = result.cutout("tree")
    assert (cut.mode, cut.size) == ("RGBA", (10, 10))
    pixels = np.asarray(cut)
    assert np.array_equal(pixels[..., 3] == 255, numbers[2:12, 3:13] == 1)
    assert np.array_equal(pixels[..., :3], picture[2:12, 3:13])
    assert result.cutout("tree", crop=False).size == (30, 20)
    assert result.cutout("road").size == (30, 20)  # nothing of it is there
    with pytest.raises(ValueError, match=r"such as tree.*, got 'tee'"):
        result.mask("tee")
    with pytest.raises(ValueError, match="a class from 0 to 3, got 4"):
        result.mask([0, 4])


def test_pictures(tmp_path, scene):
    names, colours = dict(enumerate(CLASSES)), palette(len(CLASSES))
    result = result_of(scene.labels, Image.fromarray(scene.image), names=names, palette=colours)
    path = result.save(tmp_path / "overlay.png")
    shown = np.asarray(Image.open(path))
    assert np.array_equal(shown, np.asarray(result.overlay()))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(result._repr_png_()))), shown)
    assert np.array_equal(np.asarray(result.label_image()), scene.labels)
    unit = result_of(scene.labels, scene.image / 255.0, names=names, palette=colours)
    assert np.array_equal(np.asarray(unit.overlay()), shown)
    grey = result_of(scene.labels, scene.image[..., :1], names=names, palette=colours)
    assert grey.overlay(legend=False).size == (160, 120)
    bands = result_of(scene.labels, np.zeros((120, 160, 7)), names=names, palette=colours)
    with pytest.raises(ValueError, match=r"1, 3 or 4 channels .* got \(120, 160, 7\)"):
        bands.overlay()
    assert bands.rle()


def test_to_supervision(monkeypatch):
    """With the fields that supervision 0.26 asks for; the package brings 400 MB."""
    stub = types.SimpleNamespace(Detections=lambda **fields: types.SimpleNamespace(**fields))
    monkeypatch.setitem(sys.modules, "supervision", stub)
    numbers = squares()
    found = result_of(numbers).to_supervision()
    assert found.xyxy.tolist() == [[0, 0, 30, 20], [3, 2, 13, 12], [20, 14, 24, 18]]
    assert np.array_equal(found.mask, [numbers == one for one in range(3)])
    assert found.class_id.tolist() == [0, 1, 2]
    assert found.data["class_name"].tolist() == ["sky", "tree", "car"]


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio.features", None)
    with pytest.raises(ImportError, match=r"fastseg-segformer\[geo\]"):
        result_of(squares()).polygons()


def test_of_segment(tmp_path, scene):
    """Of the embedded model: names, colours, the picture, scores, its path."""
    model = fastseg.from_pretrained(EMBEDDED_MODEL)
    processor = fastseg.SegformerImageProcessor.from_pretrained(EMBEDDED_MODEL)
    path = tmp_path / "scene.png"
    Image.fromarray(scene.image).save(path)
    images = [Image.open(path), scene.image.transpose(2, 0, 1).copy()]
    plain, scores = fastseg.segment(model, images, processor=processor, return_scores=True)
    found = fastseg.segment(model, images, processor=processor, return_scores=True, results=True)
    for one, labels, score in zip(found, plain, scores, strict=True):
        assert torch.equal(one.labels, labels)
        assert torch.equal(one.scores, score)
        assert one.overlay(legend=False).size == (160, 120)
        assert one.shares()[0].name in CLASSES
    assert [one.path for one in found] == [str(path), None]
    assert "image" not in repr(found[0])
    assert fastseg.segment(model, images[1], processor=processor, results=True)[0].scores is None

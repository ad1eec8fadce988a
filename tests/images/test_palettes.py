"""Palettes: those of known data sets, of a configuration, and distant colours."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
from skimage.color import deltaE_ciede2000, rgb2lab

from fastseg.images.palettes import (
    DATASETS,
    cityscapes_label_ids,
    config_palette,
    dataset,
    find_dataset,
    palette,
)

CITYSCAPES = ["road", "sidewalk", "building", "wall", "fence", "pole", "traffic light"]
CITYSCAPES += ["traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car", "truck"]
CITYSCAPES += ["bus", "train", "motorcycle", "bicycle"]

PUBLISHED = {
    "ade20k": "a3b06c095047e4531fae37b95b1592990881ffc18e05efc61a75dee5159774ba",
    "cityscapes": "28d2e680a3771aeabef70b7d68507cbf542180ec7439de08a5e1491a99ef117d",
    "voc": "bac11fe88ebb78e998974f30cc0e9e3dbbef58683772e77d278ebe214ec01454",
}


@pytest.mark.parametrize("num_labels", [1, 2, 19, 150, 256, 1000])
def test_palette_colours_are_distinct(num_labels):
    colours = palette(num_labels)
    assert colours.shape == (num_labels, 3)
    assert colours.dtype == np.uint8
    assert len(np.unique(colours, axis=0)) == num_labels


def test_palette_is_a_prefix_of_larger_ones_and_repeats_beyond_its_end():
    many = palette(5000)
    assert len(many) == 5000
    for num_labels in (1, 12, 13, 1000):
        np.testing.assert_array_equal(palette(num_labels), many[:num_labels])


def test_first_colours_are_well_apart():
    lab = rgb2lab(palette(40))
    distance = deltaE_ciede2000(lab[:, None], lab[None])
    np.fill_diagonal(distance, np.inf)
    assert distance.min() > 8  # about 1 is just visible


@pytest.mark.parametrize(
    ("name", "classes", "colours"),
    [
        ("ade20k", 150, 149),  # road and skyscraper share theirs
        ("cityscapes", 19, 19),
        ("voc", 21, 21),
    ],
)
def test_data_sets_are_those_of_their_published_code(name, classes, colours):
    """By a hash of lines "name red green blue", taken from mmsegmentation's class_names.py."""
    data = dataset(name)
    assert len(set(data.names)) == len(data.names) == len(data.colours) == classes
    assert len(np.unique(data.colours, axis=0)) == colours
    lines = [
        " ".join([label, *map(str, colour)])
        for label, colour in zip(data.names, data.colours.tolist(), strict=True)
    ]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == PUBLISHED[name]


def test_colours_of_voc_are_those_of_its_formula():
    """Its development kit takes the bits of a class number, three by three, for high bits."""
    for number, colour in enumerate(dataset("voc").colours.tolist()):
        expected = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                expected[channel] |= (number >> (3 * bit + channel) & 1) << (7 - bit)
        assert colour == expected


def test_ids_of_cityscapes():
    """Those that are no train ids: void, parking, rail track, guard rail, bridge and others."""
    void = {*range(7), 9, 10, 14, 15, 16, 18, 29, 30}
    assert cityscapes_label_ids() == [number for number in range(34) if number not in void]


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("change", ["", "title", "hyphens", "synonyms", "reversed"])
def test_colours_follow_the_names(name, change):
    data = dataset(name)
    words = {
        "title": str.title,
        "hyphens": lambda word: word.replace(" ", "-"),
        "synonyms": lambda word: f"{word} , or other words",
    }.get(change, str)
    names = {number: words(label) for number, label in enumerate(data.names)}
    expected = data.colours
    if change == "reversed":
        names = dict(enumerate(reversed(data.names)))
        expected = expected[::-1]
    assert find_dataset(names) == name
    np.testing.assert_array_equal(palette(len(names), names), expected)


@pytest.mark.parametrize("change", ["another", "twice", "one less", "one more"])
def test_other_names_have_other_colours(change):
    names = dict(enumerate(CITYSCAPES))
    names |= {"another": {3: "hedge"}, "twice": {3: "road"}, "one more": {19: "hedge"}}.get(
        change, {}
    )
    if change == "one less":
        del names[18]
    assert find_dataset(names) is None
    np.testing.assert_array_equal(palette(len(names), names), palette(len(names)))


def test_some_colours_as_published():
    colours = palette(19, dict(enumerate(CITYSCAPES)))
    for index, colour in ((0, (128, 64, 128)), (8, (107, 142, 35)), (18, (119, 11, 32))):
        assert tuple(colours[index]) == colour  # road, vegetation, bicycle


def test_an_unknown_data_set():
    with pytest.raises(ValueError, match="expected one of ade20k, cityscapes, voc, got 'coco'"):
        dataset("coco")


def test_palette_of_no_classes():
    with pytest.raises(ValueError, match="num_labels"):
        palette(0)


def test_config_palette():
    config = SimpleNamespace(num_labels=2, id2label={0: "a", 1: "b"})
    np.testing.assert_array_equal(config_palette(config), palette(2))
    config.palette = [[1, 2, 3], [4, 5, 6]]
    np.testing.assert_array_equal(config_palette(config), [(1, 2, 3), (4, 5, 6)])


@pytest.mark.parametrize(
    "own", [[[1, 2, 3]], [[1, 2], [3, 4]], [[1, 2, 256], [0, 0, 0]], [[0.5, 0, 0], [0, 0, 0]]]
)
def test_config_palette_of_another_form(own):
    config = SimpleNamespace(num_labels=2, id2label={0: "a", 1: "b"}, palette=own)
    with pytest.raises(ValueError, match=r"config\.palette"):
        config_palette(config)

"""Label images, and overlays with their legend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fastseg.images.overlay import class_shares, format_share, label_image, overlay
from fastseg.images.palettes import palette


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def stripes(height: int, width: int, classes: int) -> np.ndarray:
    """Vertical stripes of the classes 0, 1, ..., left to right."""
    return np.tile(np.arange(width) * classes // width, (height, 1))


@pytest.mark.parametrize("make", [np.asarray, torch.tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("num_labels", [3, 256])
def test_label_image_is_indexed(tmp_path, make, num_labels):
    labels = [[0, 1, 2], [num_labels - 1, 0, 255]]
    label_image(make(labels), palette(num_labels)).save(tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as read:
        assert read.mode == "P"
        np.testing.assert_array_equal(np.asarray(read), labels)
        rgb = np.asarray(read.convert("RGB"))
    np.testing.assert_array_equal(rgb[0], palette(num_labels)[:3])
    if num_labels == 3:  # 255, an ignored label, has no colour
        assert tuple(rgb[1, 2]) == (0, 0, 0)


def test_label_image_of_more_than_256_classes_has_16_bits(tmp_path):
    labels = np.array([[0, 256], [299, 65535]])
    label_image(labels, palette(300)).save(tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as read:
        assert read.mode == "I;16"
        np.testing.assert_array_equal(np.asarray(read), labels)


@pytest.mark.parametrize(("num_labels", "mode"), [(3, "L"), (256, "L"), (300, "I;16")])
def test_grey_label_images_have_the_class_numbers(tmp_path, num_labels, mode):
    labels = np.array([[0, 1, 2], [num_labels - 1, 0, 255]])
    label_image(labels, palette(num_labels), grey=True).save(tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as read:
        assert read.mode == mode
        np.testing.assert_array_equal(np.asarray(read), labels)


@pytest.mark.parametrize(
    ("labels", "error"),
    [
        (np.zeros((2, 2)), TypeError),
        (np.zeros((1, 2, 2), int), ValueError),
        (np.zeros((0, 2), int), ValueError),
        (np.array([[-1]]), ValueError),
        (np.array([[256]]), ValueError),
    ],
)
def test_label_image_of_wrong_labels(labels, error):
    with pytest.raises(error, match="labels: expected"):
        label_image(labels, palette(3))


def test_overlay_blends_the_colours_and_draws_borders():
    image, labels = noise(20, 30), stripes(20, 30, 2)
    colours = np.array([(255, 0, 0), (0, 0, 255)], dtype=np.uint8)
    result = np.asarray(overlay(image, labels, colours, {}, alpha=0.4, legend=False)).astype(float)
    expected = 0.6 * image + 0.4 * colours[labels]
    inside = np.ones(labels.shape, dtype=bool)
    inside[:, 15] = False  # the border between the stripes
    assert np.abs(result - expected)[inside].max() <= 1
    assert (result[:, 15] > expected[:, 15]).mean() > 0.95  # lighter
    untouched = overlay(image, labels, colours, {}, alpha=0.0, legend=False)
    np.testing.assert_array_equal(np.asarray(untouched), image)


def drawn(image: np.ndarray, labels: np.ndarray, colours: np.ndarray, alpha: float) -> np.ndarray:
    """Every pixel of an overlay without a legend, by PIL's rules for bytes."""
    known = labels < len(colours)
    tint = colours[np.where(known, labels, 0)]
    image, alpha = image.astype(np.float32), np.float32(alpha)
    blended = (image + alpha * (tint.astype(np.float32) - image)).astype(np.uint8)
    blended[~known] = image[~known]
    edges = np.zeros(labels.shape, dtype=bool)
    for axis in (0, 1):
        differs = np.diff(labels.astype(np.int64), axis=axis) != 0
        edges |= np.pad(differs, [(1 - axis, 0), (axis, 0)])
    for _ in range(round(min(labels.shape) / 1200)):
        for axis in (0, 1):
            kept = np.delete(edges, -1, axis=axis)
            edges = edges | np.pad(kept, [(1 - axis, 0), (axis, 0)])
    if alpha > 0:  # white, with an opacity of 178 of 255
        light = 255 * 178 + blended[edges].astype(int) * 77 + 128
        blended[edges] = (light + (light >> 8)) >> 8
    return blended


@pytest.mark.parametrize("num_labels", [1, 19, 150, 256, 300])
@pytest.mark.parametrize("beyond", [None, 255, 65535])
@pytest.mark.parametrize("size", [(1, 1), (1, 70), (53, 40)])
def test_every_pixel_of_an_overlay_and_every_share(num_labels, beyond, size):
    rng = np.random.default_rng(num_labels)
    labels = np.kron(rng.integers(0, num_labels, (11, 12)), np.ones((5, 6), dtype=np.int64))
    labels = labels[: size[0], : size[1]]
    if beyond is not None:
        labels[::7, ::3] = beyond
    image, colours = noise(*labels.shape), palette(num_labels)
    expected = {alpha: drawn(image, labels, colours, alpha) for alpha in (0.0, 0.55, 1.0)}
    pixels = dict(
        zip(*(one.tolist() for one in np.unique(labels, return_counts=True)), strict=True)
    )
    for dtype in (np.int64, np.int32, np.uint16, np.uint8):
        if labels.max() > np.iinfo(dtype).max:
            continue
        given = labels.astype(dtype)
        for alpha, result in expected.items():
            shown = overlay(image, given, colours, {}, alpha=alpha, legend=False)
            np.testing.assert_array_equal(np.asarray(shown), result)
        assert {item.id: item.pixels for item in class_shares(given, {})} == pixels


@pytest.mark.parametrize("side", [599, 700, 1900])
def test_borders_are_thicker_in_large_pictures(side):
    image, labels = noise(side, side), stripes(side, side, 5).astype(np.uint8)
    labels[side // 2 :] = labels[side // 2 :, ::-1]
    shown = overlay(image, labels, palette(5), {}, legend=False)
    np.testing.assert_array_equal(np.asarray(shown), drawn(image, labels, palette(5), 0.55))


def test_a_label_image_is_a_copy():
    labels = np.zeros((4, 5), dtype=np.uint8)
    images = [label_image(labels, palette(3), grey) for grey in (False, True)]
    labels[:] = 2
    assert [image.getextrema() for image in images] == [(0, 0), (0, 0)]


def test_overlay_leaves_labels_beyond_the_palette_untinted():
    image = noise(8, 8)
    result = overlay(image, np.full((8, 8), 255), palette(2), {}, legend=False)
    np.testing.assert_array_equal(np.asarray(result), image)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_overlay_takes_any_mode_and_arrays(mode):
    picture = Image.fromarray(noise(16, 16)).convert(mode)
    labels = stripes(16, 16, 3)
    result = overlay(picture, labels, palette(3), {}, legend=False)
    plain = overlay(picture.convert("RGB"), labels, palette(3), {}, legend=False)
    np.testing.assert_array_equal(np.asarray(result), np.asarray(plain))
    if mode != "P":
        result = overlay(np.asarray(picture), labels, palette(3), {}, legend=False)
        np.testing.assert_array_equal(np.asarray(result), np.asarray(plain))


@pytest.mark.parametrize("size", [(8, 8), (64, 48), (512, 512), (300, 900), (1500, 1000), (9, 400)])
@pytest.mark.parametrize("classes", [1, 7, 100])
def test_legend_leaves_the_picture_whole(size, classes):
    height, width = size
    image, labels = noise(height, width), stripes(height, width, min(classes, width))
    names = {index: f"class {index}" for index in range(classes)}
    plain = overlay(image, labels, palette(classes), names, legend=False)
    result = overlay(image, labels, palette(classes), names)
    np.testing.assert_array_equal(np.asarray(result)[:height, :width], np.asarray(plain))
    beside = width <= 1.45 * height
    assert result.width > width if beside else result.height > height
    paper = np.asarray(result)[:, width:] if beside else np.asarray(result)[height:]
    assert (paper < 100).all(axis=-1).any()  # dark type on light paper
    assert (paper == palette(classes)[0]).all(axis=-1).any()  # a swatch


def test_legend_is_sorted_by_share_and_sums_up_what_does_not_fit():
    labels = np.zeros((40, 40), dtype=int)
    labels[:30] = 1
    colours = np.array([(255, 0, 0), (0, 0, 255)], dtype=np.uint8)
    result = np.asarray(overlay(noise(40, 40), labels, colours, {0: "few", 1: "many"}))
    blue, red = (
        np.nonzero((result[:, 40:] == colour).all(axis=-1))[0].min() for colour in colours[[1, 0]]
    )
    assert blue < red
    # Twelve rows and no more, though there are a hundred classes.
    few = overlay(noise(40, 40), stripes(40, 40, 12), palette(12), {})
    many = overlay(noise(40, 40), stripes(40, 40, 40), palette(100), {})
    assert many.height == few.height


def test_long_names_are_cut():
    labels = np.zeros((600, 600), dtype=int)
    image = noise(600, 600)
    names = ("wall", "television receiver, television, television set, tv, tv set, idiot box")
    short, long = (overlay(image, labels, palette(1), {0: name}) for name in names)
    assert short.width < long.width < 2 * short.width


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_overlay_of_wrong_alpha(alpha):
    with pytest.raises(ValueError, match="alpha: expected"):
        overlay(noise(4, 4), np.zeros((4, 4), int), palette(2), {}, alpha=alpha)


def test_overlay_of_another_size():
    with pytest.raises(ValueError, match="labels: expected"):
        overlay(noise(4, 6), np.zeros((6, 4), int), palette(2), {})


def test_class_shares():
    labels = np.array([[3, 3, 3, 1], [0, 0, 0, 9]])
    shares = class_shares(labels, {0: "zero", 1: "one", 2: "two", 3: "three"})
    assert [(item.id, item.name, item.pixels, item.share) for item in shares] == [
        (0, "zero", 3, 0.375),
        (3, "three", 3, 0.375),
        (1, "one", 1, 0.125),
        (9, "9", 1, 0.125),
    ]


@pytest.mark.parametrize(
    ("share", "text"), [(0.4123, "41.2%"), (1.0, "100.0%"), (0.0001, "<0.1%"), (0.0, "0.0%")]
)
def test_format_share(share, text):
    assert format_share(share) == text

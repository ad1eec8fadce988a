"""What a label map can be: depths, bands, palettes, ignored labels; each reduced and not."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from fastseg.images.processor import SegformerImageProcessor
from tests.images.image_cases import both, noise

LABELS = noise((30, 40)) % 20
LABELS[:3] = 255
IMAGE = noise((30, 40, 3), 1)


def palette_image(mode: str) -> Image.Image:
    image = Image.frombytes("P", (40, 30), LABELS.tobytes())
    image.putpalette(noise((768,)).tobytes())  # any colours
    return image if mode == "P" else Image.merge("PA", (image, Image.new("L", (40, 30), 9)))


def with_bands(count: int) -> np.ndarray:
    bands = np.repeat(LABELS[..., None], count, axis=2)
    if count in (2, 4):
        bands[..., -1] = 255
    return bands


KINDS = {
    "P": lambda: palette_image("P"),
    "I;16": lambda: Image.fromarray(LABELS.astype(np.uint16)),
    "I;16B": lambda: Image.frombytes("I;16B", (40, 30), LABELS.astype(">u2").tobytes()),
    "I": lambda: Image.fromarray(LABELS.astype(np.int32)),
    "F": lambda: Image.fromarray(LABELS.astype(np.float32)),
    "LA": lambda: Image.fromarray(with_bands(2)),
    "RGB": lambda: Image.fromarray(with_bands(3)),
    "RGBA": lambda: Image.fromarray(with_bands(4)),
    "uint16": lambda: LABELS.astype(np.uint16),
    "int64": lambda: torch.from_numpy(LABELS.astype(np.int64)),
    "float64": lambda: LABELS.astype(np.float64),
    "(1, H, W)": lambda: LABELS[None],
    "(1, 1, H, W)": lambda: torch.from_numpy(LABELS)[None, None],
    "(H, W, 1)": lambda: with_bands(1),
    "(H, W, 3)": lambda: with_bands(3),
    "(1, H, W, 4)": lambda: with_bands(4)[None],
    "list": lambda: [with_bands(3)],
}


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("size", [None, 17])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind, size, reduce):
    """As transformers takes the same labels as bytes (H, W)."""
    options = {"do_reduce_labels": reduce, "size": size, "do_resize": size is not None}
    options = {name: value for name, value in options.items() if value is not None}
    _, theirs = both(IMAGE, LABELS.copy(), init=options)
    ours = SegformerImageProcessor(**options)(IMAGE, KINDS[kind](), return_tensors="pt")
    assert ours.labels.dtype == torch.int64
    assert torch.equal(ours.labels, theirs["labels"])


@pytest.mark.parametrize("mode", ["1", "bool"])
def test_masks_of_bits(mode):
    mask = LABELS > 9
    given = Image.fromarray(mask) if mode == "1" else mask
    labels = SegformerImageProcessor(do_resize=False)(IMAGE, given).labels[0]
    np.testing.assert_array_equal(labels, mask.astype(int))


@pytest.mark.parametrize(
    "label_map",
    [
        noise((30, 40, 3)),  # colours
        Image.fromarray(noise((30, 40, 3))),
        Image.fromarray(noise((30, 40, 4))),
        np.dstack([with_bands(3), LABELS]),  # an alpha that says something
        Image.fromarray(np.dstack([LABELS, LABELS])),
        palette_image("P").convert("RGB"),
    ],
)
def test_colours_are_no_labels(label_map):
    with pytest.raises(ValueError, match=r"maps\[0\]: .*bands that differ.*class number"):
        SegformerImageProcessor()(IMAGE, label_map)


@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize("ignored", [-1, -100, 255])
@pytest.mark.parametrize("reduce", [False, True])
def test_ignored_labels(ignored, reduce, resize):
    """They stay as they are; those that are reduced have 255 for whatever is left out."""
    labels = LABELS.astype(np.int64)
    labels[LABELS == 255] = ignored
    processor = SegformerImageProcessor(do_reduce_labels=reduce, size=(30, 40), do_resize=resize)
    found = processor(IMAGE, labels).labels[0]
    expected = labels.copy()
    if reduce:
        expected = labels - 1
        expected[(labels == 0) | (labels == ignored)] = 255
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize(
    ("values", "told"),
    [((0, 255), True), ((0, 1), False), ((0, 1, 255), False), ((255,), False), ((0,), False)],
)
def test_masks_of_0_and_255_are_told(values, told, reduce):
    labels = np.resize(np.array(values, np.uint8), (30, 40))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SegformerImageProcessor(do_reduce_labels=reduce)(IMAGE, labels)
    assert len(caught) == told
    if told:
        assert "segmentation_maps[0]: holds 0 and 255 alone" in str(caught[0].message)
        assert "labels of 0 and 1" in str(caught[0].message)

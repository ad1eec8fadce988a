"""The image processor against transformers' PIL one: photographs, odd shapes, label maps."""

from __future__ import annotations

import contextlib
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.segformer.image_processing_pil_segformer import (
    SegformerImageProcessorPil,
)

from fastseg.images.processor import SegformerImageProcessor
from tests.images.image_cases import PHOTOGRAPHS, SHAPES, assert_same, both, noise, photograph


@pytest.mark.parametrize("name", [n for n in PHOTOGRAPHS if n != "camera"])
@pytest.mark.parametrize("kind", ["pil", "last", "first", "torch"])
def test_photographs(name, kind):
    array = photograph(name)
    image = {
        "pil": lambda: Image.fromarray(array),
        "last": lambda: array,
        "first": lambda: array.transpose(2, 0, 1),
        "torch": lambda: torch.from_numpy(array.transpose(2, 0, 1).copy()),
    }[kind]()
    ours, theirs = both(image)
    assert ours.pixel_values.shape == (1, 3, 512, 512)
    assert_same(ours, theirs)


SIZES = [
    None,
    64,
    [33, 97],
    {"height": 5, "width": 300},
    {"shortest_edge": 48},
    {"shortest_edge": 48, "longest_edge": 100},
    {"max_height": 90, "max_width": 40},
]
# transformers comes to a height of 0 for these and fails: see test_size_by_hand.
VANISHING = [((9, 2000), size) for size in SIZES[-2:]]
CASES = [(shape, size) for shape in SHAPES for size in SIZES if (shape, size) not in VANISHING]


@pytest.mark.parametrize(("shape", "size"), CASES)
def test_sizes(shape, size):
    image = Image.fromarray(noise((*shape, 3)))
    assert_same(*both(image, size=size) if size else both(image))


@pytest.mark.parametrize(
    ("size", "shape", "expected"),
    [
        ({"shortest_edge": 10}, (40, 60), (10, 15)),
        ({"shortest_edge": 10, "longest_edge": 12}, (40, 60), (8, 12)),
        ({"max_height": 100, "max_width": 30}, (40, 60), (20, 30)),
        (7, (40, 60), (7, 7)),
        # Never less than one pixel.
        ({"shortest_edge": 48, "longest_edge": 100}, (9, 2000), (1, 100)),
        ({"max_height": 90, "max_width": 40}, (2000, 9), (90, 1)),
    ],
)
def test_size_by_hand(size, shape, expected):
    values = SegformerImageProcessor(size=size)(noise((*shape, 3))).pixel_values[0]
    assert values.shape == (3, *expected)


OPTIONS = [
    {"do_resize": False},
    {"do_rescale": False},
    {"do_normalize": False},
    {"do_rescale": False, "do_normalize": False},
    {"do_resize": False, "do_rescale": False, "do_normalize": False},
    {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 0.9, 1.1], "image_std": (0.5, 0.7, 3.0)},
    {"image_mean": 0.5, "image_std": 0.25},
    {"size": 40, "resample": 0},
    {"size": {"height": 700, "width": 301}, "resample": 3},
    {"size": 300, "resample": Image.Resampling.LANCZOS},
    {"do_convert_rgb": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options):
    array = photograph("chelsea")
    for image in (Image.fromarray(array), array):
        assert_same(*both(image, init=options))
        assert_same(*both(image, **options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int32])
def test_other_dtypes(options, dtype):
    """Floats in [0, 1], and whole numbers to 255, in every type."""
    values = noise((31, 22, 3))
    if np.issubdtype(dtype, np.floating):
        rescales = options.get("do_rescale", True)
        warns = pytest.warns(UserWarning, match="pass do_rescale=False")
        with warns if rescales else contextlib.nullcontext():
            assert_same(*both((values / 255.0).astype(dtype), **options))
    assert_same(*both(values.astype(dtype), **options))


def test_batches():
    arrays = [photograph(name) for name in PHOTOGRAPHS[:3]]
    images = [Image.fromarray(array) for array in arrays]
    reference = SegformerImageProcessorPil()(images, return_tensors="pt")
    processor = SegformerImageProcessor()
    mixed = [images[0], arrays[1].transpose(2, 0, 1), torch.from_numpy(arrays[2])]
    for batch in (images, tuple(images), [images[:1], images[1:]], mixed):
        assert_same(processor(batch, return_tensors="pt"), reference)
    for name in ("np", None):
        ours, theirs = both(images, return_tensors=name)
        assert isinstance(ours.pixel_values, np.ndarray if name else list)
        assert_same(ours, theirs)
    batch = noise((4, 3, 20, 30))
    for four_d in (batch, torch.from_numpy(batch), batch.transpose(0, 2, 3, 1), [batch, batch]):
        assert_same(*both(four_d, size=16))


def test_lists_may_differ_in_size():
    images = [noise((20, 30, 3)), noise((31, 12, 3), 1)]
    options = {"do_resize": False, "return_tensors": None}
    ours, theirs = both(images, **options)
    assert [v.shape for v in ours.pixel_values] == [(3, 20, 30), (3, 31, 12)]
    for a, b in zip(ours.pixel_values, theirs["pixel_values"], strict=True):
        np.testing.assert_array_equal(a, b)
    for name in ("pt", "np"):
        with pytest.raises(ValueError, match=r"images: expected equal sizes.*\(3, 31, 12\)"):
            SegformerImageProcessor()(images, do_resize=False, return_tensors=name)


def test_channel_order():
    array = noise((30, 20, 3))
    processor = SegformerImageProcessor(size=17)
    first = processor(array, return_tensors="np").pixel_values
    last = processor(array, return_tensors="np", data_format="channels_last").pixel_values
    np.testing.assert_array_equal(last, first.transpose(0, 2, 3, 1))
    # Three rows of pixels: only the caller knows which end the channels are at.
    strip = noise((3, 20, 3))
    with pytest.raises(ValueError, match="input_data_format"):
        processor(strip)
    for order in ("channels_first", "channels_last"):
        assert_same(*both(strip, input_data_format=order, size=17))


def test_inputs_stay_as_they_were():
    array, labels = noise((40, 30, 3)), noise((40, 30))
    copies = array.copy(), labels.copy()
    array.flags.writeable = labels.flags.writeable = False
    processor = SegformerImageProcessor(do_reduce_labels=True, size=20)
    processor(array, labels, return_tensors="pt")
    np.testing.assert_array_equal(array, copies[0])
    np.testing.assert_array_equal(labels, copies[1])


# -- label maps


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("size", [None, 64, {"shortest_edge": 32}])
def test_label_maps(shape, reduce, size):
    image, labels = noise((*shape, 3)), noise(shape, 1)
    labels.flat[:2] = [0, 255][: labels.size]
    call = {"size": size} if size else {"do_resize": False}
    init = {"do_reduce_labels": reduce}
    ours, theirs = both(Image.fromarray(image), labels.copy(), init=init, **call)
    assert ours.labels.dtype == torch.int64
    assert_same(ours, theirs)


def test_label_map_inputs():
    images = [noise((30, 40, 3), i) for i in range(2)]
    maps = np.stack([noise((30, 40), i) for i in range(2, 4)])
    palette = [Image.frombytes("P", (40, 30), m.tobytes()) for m in maps]
    for image in palette:
        image.putpalette(noise((768,)).tobytes())
    expected = SegformerImageProcessorPil(size=13)(images, list(maps), return_tensors="pt")
    processor = SegformerImageProcessor(size=13)
    for given in (
        maps,
        list(maps),
        list(maps[:, None]),
        torch.from_numpy(maps).long(),
        maps.astype(np.float32),
        [maps[0], Image.fromarray(maps[1])],
        palette,
    ):
        assert_same(processor(images, given, return_tensors="pt"), expected)
    plain = processor(images, maps)
    assert isinstance(plain.labels, list)
    assert plain.labels[0].shape == (13, 13)


def test_wide_labels():
    """Labels past 255 and below 0, which transformers cannot resize."""
    small = noise((30, 40))
    wide = small.astype(np.int64) * 300 - 100
    processor = SegformerImageProcessor(size=17)
    expected = processor(noise((30, 40, 3)), small).labels[0] * 300 - 100
    np.testing.assert_array_equal(processor(noise((30, 40, 3)), wide).labels[0], expected)


def test_reduce_labels_by_hand():
    labels = np.array([[0, 1, 2, 254, 255, 300]])
    processor = SegformerImageProcessor(do_reduce_labels=True, do_resize=False)
    reduced = processor(noise((1, 6, 3)), labels, input_data_format="channels_last").labels[0]
    np.testing.assert_array_equal(reduced, [[255, 0, 1, 253, 255, 299]])


def test_batch_feature():
    features = SegformerImageProcessor(size=8)(noise((9, 9, 3)), noise((9, 9)), return_tensors="pt")
    assert features["pixel_values"] is features.pixel_values
    assert list(dict(**features)) == ["pixel_values", "labels"]
    with pytest.raises(AttributeError, match="no entry 'logits'"):
        _ = features.logits
    loaded = pickle.loads(pickle.dumps(features))
    assert torch.equal(loaded.pixel_values, features.pixel_values)
    values = features.pixel_values
    assert features.to(torch.bfloat16) is features
    assert torch.equal(features.pixel_values, values.bfloat16())
    assert features.labels.dtype == torch.int64
    features["labels"] = torch.arange(255, 300)  # beyond what bfloat16 can hold
    features.to("cpu", torch.bfloat16)
    assert torch.equal(features.labels, torch.arange(255, 300))
    features.to("meta", torch.float16)
    assert features.pixel_values.device.type == features.labels.device.type == "meta"
    assert features.pixel_values.dtype == torch.float16
    assert features.labels.dtype == torch.int64
    with pytest.raises(TypeError, match="pixel_values: expected a tensor"):
        SegformerImageProcessor()(noise((9, 9, 3))).to("cpu")

"""Images that transformers does not take, and those that nobody can."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.segformer.image_processing_pil_segformer import (
    SegformerImageProcessorPil,
)

from fastseg.images.processor import SegformerImageProcessor
from tests.images.image_cases import assert_same, both, noise, photograph


def rgb_reference(image: Image.Image) -> np.ndarray:
    return SegformerImageProcessorPil(size=30)(image.convert("RGB"))["pixel_values"][0]


@pytest.mark.parametrize(
    "mode", [*"L1P", "RGBA", "LA", "PA", "CMYK", "YCbCr", "RGBX", "LAB", "HSV"]
)
def test_pil_modes(mode):
    source = Image.fromarray(photograph("chelsea")).resize((40, 50))
    image = source.convert("RGBA" if mode == "RGBA" else "LA" if mode in ("LA", "PA") else mode)
    image = image.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(noise((50, 40))))
    ours = SegformerImageProcessor(size=30)(image).pixel_values[0]
    np.testing.assert_array_equal(ours, rgb_reference(image))


def test_pil_palette_with_transparency():
    image = Image.fromarray(photograph("chelsea")).resize((40, 50)).convert("P")
    opaque = rgb_reference(image)
    for transparency in (3, bytes(range(256))):
        image.info["transparency"] = transparency
        ours = SegformerImageProcessor(size=30)(image).pixel_values[0]
        np.testing.assert_array_equal(ours, opaque)


def test_sixteen_bits_are_scaled():
    grey = noise((50, 40)).astype(int)
    shift = np.random.default_rng(1).integers(-128, 129, grey.shape)
    image = Image.fromarray((grey * 257 + shift).clip(0, 65535).astype(np.uint16))
    assert image.mode.startswith("I;16")
    ours = SegformerImageProcessor(size=30)(image).pixel_values[0]
    np.testing.assert_array_equal(ours, rgb_reference(Image.fromarray(grey.astype(np.uint8))))


def test_torch_types():
    array = noise((20, 30, 3))
    expected = SegformerImageProcessor(size=16)(array).pixel_values[0]
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        tensor = torch.from_numpy(array).to(dtype)
        tensor.requires_grad_(dtype == torch.float32)
        ours = SegformerImageProcessor(size=16)(tensor).pixel_values[0]
        np.testing.assert_array_equal(ours, expected)


def test_grey_and_alpha_arrays():
    grey = photograph("camera")
    expected = rgb_reference(Image.fromarray(grey))
    processor = SegformerImageProcessor(size=30)
    for image in (grey, grey[..., None], grey[None], torch.from_numpy(grey), Image.fromarray(grey)):
        np.testing.assert_array_equal(processor(image).pixel_values[0], expected)
    np.testing.assert_array_equal(
        processor([grey, grey], return_tensors="np").pixel_values, np.stack([expected] * 2)
    )
    rgba = np.dstack([photograph("chelsea"), noise((300, 451))])
    expected = rgb_reference(Image.fromarray(rgba))
    for image in (rgba, rgba.transpose(2, 0, 1), Image.fromarray(rgba)):
        np.testing.assert_array_equal(processor(image).pixel_values[0], expected)


def test_convert_rgb_lays_alpha_over_white():
    rgba = Image.fromarray(np.dstack([noise((40, 30, 3)), noise((40, 30), 1)]))
    palette = Image.fromarray(noise((40, 30))).convert("P")
    palette.info["transparency"] = 7
    array = np.asarray(rgba)
    scaled = array / 255.0
    for image in (rgba, rgba.convert("LA"), palette, array, array.transpose(2, 0, 1)):
        assert_same(*both(image, do_convert_rgb=True, size=20))
    assert_same(*both(scaled, do_convert_rgb=True, do_rescale=False, size=20))
    with pytest.raises(ValueError, match=r"images\[0\]: expected 3 channels.*got 4"):
        SegformerImageProcessor(do_convert_rgb=False)(rgba)


@pytest.mark.parametrize("bands", [2, 5, 6, 10])
def test_bands_are_found_by_image_mean(bands):
    options = {"image_mean": [0.4] * bands, "image_std": [0.2] * bands, "do_resize": False}
    array = noise((30, 40, bands))
    for image in (array, array.transpose(2, 0, 1), torch.from_numpy(array), array[None]):
        ours = SegformerImageProcessor(**options)(image).pixel_values[0]
        expected = (array.astype(np.float64).transpose(2, 0, 1) / 255 - 0.4) / 0.2
        np.testing.assert_allclose(ours, expected, atol=1e-6)
    processor = SegformerImageProcessor(**options)
    with pytest.raises(ValueError, match=f"expected {bands} channels in.*neither.*30, 40, 3"):
        processor(noise((30, 40, 3)))
    with pytest.raises(ValueError, match=f"expected {bands} channels in.*both ends"):
        processor(noise((bands, 40, bands)))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_more_than_four_bands_are_resized_one_by_one(dtype):
    options = {"image_mean": [0.4] * 6, "image_std": [0.2] * 6, "size": (17, 23)}
    array = noise((30, 40, 6))
    ours = SegformerImageProcessor(**options)(array.astype(dtype)).pixel_values[0]
    for band in range(6):
        grey = Image.fromarray(array[..., band]).resize((23, 17), Image.Resampling.BILINEAR)
        expected = (np.asarray(grey, np.float64) / 255 - 0.4) / 0.2
        np.testing.assert_allclose(ours[band], expected, atol=1e-6)


def test_other_channel_counts():
    """Models of other than three channels: kept where image_mean is of that length."""
    one = {"image_mean": [0.4], "image_std": [0.2], "size": 20}
    assert_same(*both(noise((30, 40, 1)), **one))
    assert_same(*both(Image.fromarray(noise((30, 40))), **one))
    four = {"image_mean": [0.4] * 4, "image_std": [0.2] * 4, "size": 20}
    assert_same(*both(noise((30, 40, 4)), **four))
    five = {"image_mean": [0.4] * 5, "image_std": [0.2] * 5}
    order = {"input_data_format": "channels_last", "do_resize": False}
    assert_same(*both(noise((30, 40, 5)), **five, **order))
    for image in (noise((30, 40, 4)), noise((30, 40, 1)), Image.fromarray(noise((30, 40, 2)))):
        assert_same(*both(image, do_normalize=False, size=20))


# -- errors


@pytest.mark.parametrize(
    ("images", "error", "match"),
    [
        ("photo.jpg", TypeError, "images: expected a PIL image.*got str; open it by PIL"),
        (None, TypeError, "images.*NoneType"),
        ([noise((4, 5, 3)), 3], TypeError, "images.*got int"),
        (noise((5, 6, 3)).astype(complex), TypeError, r"images\[0\].*complex128"),
        ([], ValueError, "images: expected at least one"),
        (noise((0, 3, 8, 8)), ValueError, "images: expected at least one"),
        (noise((8, 0, 3)), ValueError, r"images\[0\]: expected at least one pixel, got 8 x 0"),
        (noise((5,)), ValueError, r"images: expected 2 to 4 dimensions.*\(5,\)"),
        (noise((1, 1, 3, 8, 8)), ValueError, "images: expected 2 to 4 dimensions"),
        (noise((7, 8, 9)), ValueError, r"images\[0\].*neither end.*\(7, 8, 9\)"),
        (noise((3, 8, 3)), ValueError, r"both ends.*\(3, 8, 3\); pass input_data_format"),
        (np.full((8, 8, 3), np.nan), ValueError, r"images\[0\]: expected finite pixels"),
        (np.full((8, 8, 3), 1.5), ValueError, r"whole numbers in \[0, 255\].*\[1.5, 1.5\]"),
        (np.full((8, 8, 3), -1), ValueError, r"whole numbers in \[0, 255\].*\[-1, -1\]"),
        (np.full((8, 8, 3), 256), ValueError, r"whole numbers in \[0, 255\].*\[256, 256\]"),
    ],
)
def test_wrong_images(images, error, match):
    with pytest.raises(error, match=match):
        SegformerImageProcessor()(images)


@pytest.mark.parametrize(
    ("maps", "error", "match"),
    [
        ([noise((8, 9))] * 2, ValueError, "segmentation_maps: expected one for each of 1.*got 2"),
        ("map.png", TypeError, "segmentation_maps.*str"),
        ([], ValueError, "segmentation_maps: expected at least one"),
        (Image.fromarray(noise((8, 9, 3))), ValueError, r"maps\[0\].*\(8, 9, 3\).*colours"),
        (np.full((8, 9), 0.5), ValueError, r"segmentation_maps\[0\]: expected whole numbers"),
        (np.full((8, 9), 2**40), ValueError, r"segmentation_maps\[0\].*32 bits"),
        (noise((9,)), ValueError, r"segmentation_maps: expected 2 to 4 dimensions"),
    ],
)
def test_wrong_maps(maps, error, match):
    with pytest.raises(error, match=match):
        SegformerImageProcessor()(noise((8, 9, 3)), maps)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"size": {"longest_edge": 9}}, ValueError, "size: expected.*shortest_edge.*longest_edge"),
        ({"size": {"height": 9}}, ValueError, "size: expected"),
        ({"size": 0}, ValueError, "size: expected a positive int for height, got 0"),
        ({"size": (3, 4, 5)}, ValueError, "size"),
        ({"size": "512"}, ValueError, "size"),
        ({"resample": "bilinear"}, TypeError, "resample"),
        ({"resample": 17}, ValueError, r"resample: expected one of 0 \(NEAREST\).*got 17"),
        ({"rescale_factor": "1/255"}, TypeError, "rescale_factor"),
        ({"rescale_factor": float("nan")}, ValueError, "rescale_factor"),
        ({"image_mean": "imagenet"}, TypeError, "image_mean"),
        ({"image_mean": [0.5]}, ValueError, "image_mean and image_std"),
        ({"image_std": [0.1, 0.0, 0.1]}, ValueError, "image_std.*zero"),
        ({"do_resize": "yes"}, TypeError, "do_resize: expected a bool"),
        ({"do_convert_rgb": 1}, TypeError, "do_convert_rgb"),
        ({"do_resise": True}, TypeError, "do_resise"),
    ],
)
def test_wrong_options(options, error, match):
    with pytest.raises(error, match=match):
        SegformerImageProcessor(**options)
    with pytest.raises(error, match=match):
        SegformerImageProcessor()(noise((8, 9, 3)), **options)


def test_wrong_formats():
    processor = SegformerImageProcessor()
    for name in ("return_tensors", "data_format", "input_data_format"):
        with pytest.raises(ValueError, match=f"{name}: expected one of None.*got 'tf'"):
            processor(noise((8, 9, 3)), **{name: "tf"})
    processor.size = None
    with pytest.raises(ValueError, match=r"size: expected.*got None"):
        processor(noise((8, 9, 3)))

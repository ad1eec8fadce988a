"""Pictures of every PIL mode and depth: the same 8 bits for library, command line and overlays."""

from __future__ import annotations

import re
import struct
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from fastseg.cli.images import open_image
from fastseg.images.modes import to_8_bits, to_rgb
from fastseg.images.overlay import overlay
from fastseg.images.palettes import palette
from fastseg.images.processor import SegformerImageProcessor
from tests.images.image_cases import noise
from tests.images.test_image_inputs import rgb_reference

# What a mode may hold, what part of it is white, and whether that calls for a remark.
RANGES = [
    ("I;16", 65535, 65535, None),
    ("I;16L", 65535, 65535, None),
    ("I;16B", 65535, 65535, None),
    ("I", 65535, 65535, None),
    ("I", 255, 255, None),
    ("I", 1, 255, None),
    ("F", 255, 255, None),
    ("F", 1, 1, None),
    ("I;16", 255, 255, "at most 255: taken for 8 bits"),
    ("I;16B", 255, 255, "at most 255: taken for 8 bits"),
    ("I;16", 4095, 65535, "at most 4095, where 65535 is white.*by 16 first"),
    ("I;16B", 1023, 65535, "at most 1023, where 65535 is white.*by 16 first"),
    ("I", 4095, 65535, "at most 4095, where 65535 is white.*by 16 first"),
    ("I;16", 4096, 65535, None),
    ("I;16", 0, 65535, None),
]


def wide_picture(mode: str, high: int) -> tuple[Image.Image, np.ndarray]:
    """A picture whose values go from 0 to `high`, and these."""
    values = np.linspace(0, high, 30 * 40).reshape(30, 40)
    values = values.astype(np.float32) if mode == "F" else np.round(values).astype(np.int32)
    if mode in ("I", "F"):
        return Image.fromarray(values), values
    order = ">u2" if mode == "I;16B" else "<u2"
    return Image.frombytes(mode, (40, 30), values.astype(order).tobytes()), values


@pytest.mark.parametrize(("mode", "high", "white", "remark"), RANGES)
def test_grey_of_more_than_8_bits(mode, high, white, remark):
    image, values = wide_picture(mode, high)
    grey = Image.fromarray(np.floor(values.astype(np.float64) / white * 255 + 0.5).astype(np.uint8))
    told = []
    converted = to_8_bits(image, "camera", told.append)
    assert converted.mode == "L"
    np.testing.assert_array_equal(converted, grey)
    assert len(told) == (remark is not None)
    # The image processor, whole and unresized, and overlays.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = SegformerImageProcessor(size=30)(image).pixel_values[0]
        unresized = SegformerImageProcessor(do_resize=False)(image).pixel_values[0]
        drawn = overlay(image, np.zeros((30, 40), int), palette(1), {}, alpha=0, legend=False)
    np.testing.assert_array_equal(seen, rgb_reference(grey))
    np.testing.assert_array_equal(
        unresized, SegformerImageProcessor(do_resize=False)(grey.convert("RGB")).pixel_values[0]
    )
    np.testing.assert_array_equal(drawn, grey.convert("RGB"))
    messages = [str(warning.message) for warning in caught]
    if remark is None:
        assert not messages
    else:
        for message in (*told, *messages):
            assert_matches(remark, message)
        assert len(messages) == 3
        assert told[0].startswith("camera: ")
        assert messages[0].startswith("images[0]: ")


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), text


AS_FILES = [("tif", *one) for one in RANGES] + [("png", *one) for one in RANGES if one[0] == "I;16"]


@pytest.mark.parametrize(("ending", "mode", "high", "white", "remark"), AS_FILES)
def test_the_command_line_shows_the_same(tmp_path, capsys, ending, mode, high, white, remark):
    image, values = wide_picture(mode, high)
    path = tmp_path / f"camera.{ending}"
    image.save(path)
    shown = open_image(path)
    said = capsys.readouterr().err
    grey = np.floor(values.astype(np.float64) / white * 255 + 0.5)
    np.testing.assert_array_equal(shown, grey.astype(np.uint8))
    assert shown.mode == "L"
    if remark is None:
        assert not said
    else:
        assert_matches(f"^{path}: 16-bit pixels of {remark}", said)


@pytest.mark.parametrize("ending", ["tif", "png"])
@pytest.mark.parametrize(("high", "told"), [(4095, True), (1000, True), (4096, False)])
def test_colour_of_12_bits(tmp_path, capsys, ending, high, told):
    """PIL itself keeps but the upper 8 of 16 bits."""
    path = tmp_path / f"camera.{ending}"
    pixels = np.linspace(0, high, 20 * 30 * 3).reshape(20, 30, 3).astype(np.uint16)
    if ending == "tif":
        tifffile.imwrite(path, pixels, photometric="rgb")
    else:
        path.write_bytes(png_of_16_bits(pixels))
    shown = open_image(path)
    np.testing.assert_array_equal(shown, pixels >> 8)
    assert ("16-bit pixels of at most" in capsys.readouterr().err) == told
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SegformerImageProcessor()(Image.open(path))
    assert len(caught) == told


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """A PNG of 16-bit RGB, by the format's specification: PIL writes none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_16_bits_a_pixel_are_no_16_bits_a_colour(tmp_path, capsys):
    """BMP of 5, 6 and 5 bits, all dark."""
    header = b"BM" + np.array([54 + 8, 0, 54, 40, 2, 2], "<u4").tobytes()
    header += np.array([1, 16], "<u2").tobytes() + np.array([0, 8, 0, 0, 0, 0], "<u4").tobytes()
    (tmp_path / "dark.bmp").write_bytes(header + np.full(4, 1, "<u2").tobytes())
    assert np.asarray(open_image(tmp_path / "dark.bmp")).max() == 8
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("mode", "values", "match"),
    [
        ("I", -1, r"expected whole numbers in \[0, 255\] or \[0, 65535\], got .* \[-1, 0\]"),
        ("I", 65536, r"got values in \[0, 65536\]"),
        ("F", -0.5, r"expected floats in \[0, 1\] or \[0, 255\], got values in \[-0.5, 0\]"),
        ("F", 255.5, r"got values in \[0, 255.5\]"),
        ("F", float("nan"), "expected floats.* got values in .*nan"),
    ],
)
def test_ranges_that_nobody_knows(tmp_path, mode, values, match):
    array = np.zeros((8, 9), np.float32 if mode == "F" else np.int32)
    array[3, 4] = values
    image = Image.fromarray(array)
    with pytest.raises(ValueError, match=rf"images\[0\]: .*{match}"):
        SegformerImageProcessor()(image)
    image.save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=f"^{match}" if match.startswith("exp") else match):
        open_image(tmp_path / "x.tif")


def test_floats_that_are_not_rescaled_stay_floats():
    values = np.random.default_rng(0).random((8, 9), dtype=np.float32)
    processor = SegformerImageProcessor(do_resize=False, do_rescale=False, do_normalize=False)
    np.testing.assert_array_equal(processor(Image.fromarray(values)).pixel_values[0][0], values)


# -- 8-bit modes


def with_alpha(mode: str) -> Image.Image:
    image = Image.fromarray(noise((8, 9, 3))).convert(mode.upper())
    image.putalpha(Image.fromarray(noise((8, 9), 1)))
    return image


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_premultiplied_alpha(mode):
    image = with_alpha(mode)
    back = image.convert(mode).convert(mode.upper())
    np.testing.assert_array_equal(to_rgb(image.convert(mode)), back.convert("RGB"))


@pytest.mark.parametrize("mode", ["LAB", "HSV", "YCbCr", "CMYK"])
@pytest.mark.parametrize("over_white", [False, True])
def test_other_colour_spaces(mode, over_white):
    colours = Image.fromarray(noise((30, 40, 3)) // 2 + 64)
    image = colours.convert(mode)
    back = np.asarray(to_rgb(image, over_white), int)
    assert np.abs(back - np.asarray(colours)).mean() < 12  # steps of that space in 8 bits


@pytest.mark.parametrize("mode", ["1", "P", "PA", "L", "LA", "La"])
def test_grey_for_models_of_one_channel(mode):
    grey = Image.fromarray(noise((8, 9)))
    if mode == "1":
        image = grey = grey.convert("1")
    elif mode in ("P", "PA"):
        # A palette in reverse: its indices are not the greys.
        image = Image.fromarray(255 - np.asarray(grey)).convert("P")
        image.putpalette(np.repeat(np.arange(256)[::-1], 3).astype(np.uint8).tobytes())
        image = image.convert(mode)
    else:
        image = grey.convert(mode.upper()).convert(mode)
    options = {"do_resize": False, "image_mean": [0.4], "image_std": [0.2]}
    values = SegformerImageProcessor(**options)(image).pixel_values[0]
    expected = (np.asarray(grey.convert("L"), np.float64)[None] / 255 - 0.4) / 0.2
    np.testing.assert_allclose(values, expected, atol=1e-6)


def test_bools_are_black_and_white():
    mask = noise((8, 9)) > 100
    ours = SegformerImageProcessor(size=30)(mask).pixel_values[0]
    np.testing.assert_array_equal(ours, rgb_reference(Image.fromarray(mask).convert("L")))


# -- orientation


@pytest.mark.parametrize(("tag", "turn"), [(3, 2), (6, 1), (8, 3)])
@pytest.mark.parametrize("kind", ["RGB", "L", "I;16"])
@pytest.mark.parametrize("ending", ["tif", "png"])
def test_upright(tmp_path, tag, turn, kind, ending):
    expected = noise((20, 30, 3) if kind == "RGB" else (20, 30))
    stored = np.ascontiguousarray(np.rot90(expected, turn))
    stored = stored.astype(np.uint16) * 257 if kind == "I;16" else stored
    exif = Image.Exif()
    exif[0x112] = tag
    path = tmp_path / f"turned.{ending}"
    Image.fromarray(stored).save(path, exif=exif)
    np.testing.assert_array_equal(open_image(path), expected)


# -- arrays


@pytest.mark.parametrize(
    ("values", "options", "match"),
    [
        (np.full((8, 9, 3), 4000, np.uint16), {}, r"\[4000, 4000\].*rescale_factor.*for their"),
        (np.full((8, 9, 3), 4000.0), {}, "scale them to"),
        (np.linspace(-2, 2.6, 216).reshape(8, 9, 3), {}, "normalized already.*do_normalize=False"),
        (np.full((8, 9, 3), 4000, np.uint16), {"rescale_factor": 1 / 10000}, None),
        (np.full((8, 9, 3), 4000, np.uint16), {"do_rescale": False}, None),
        (np.linspace(-2, 2.6, 216).reshape(8, 9, 3), {"do_rescale": False}, None),
        (np.full((8, 9, 3), 255, np.int64), {"rescale_factor": 1 / 127.5}, None),
        (np.full((8, 9, 3), 254.5), {}, None),
    ],
)
def test_unresized_arrays_of_another_range_are_told(values, options, match):
    """Results are transformers'; yet a model sees white, or nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SegformerImageProcessor(do_resize=False)(values, **options)
    assert len(caught) == (match is not None)
    if match is not None:
        assert_matches(match, str(caught[0].message))


def test_resizing_16_bit_arrays_says_how():
    with pytest.raises(ValueError, match=r"\[0, 255\].*of 16 bits divide by 257, of 12 bits by 16"):
        SegformerImageProcessor()(np.full((8, 9, 3), 4000, np.uint16))

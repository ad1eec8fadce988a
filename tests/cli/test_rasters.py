"""TIFFs of many bands and of floats, written by tifffile, for models of as many channels."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import fastseg
from fastseg.cli import main
from fastseg.cli.images import page_numbers, read_pages
from fastseg.images.rasters import visible
from tests.cli.cli_cases import photo, read_labels, segmented, tree

BANDS = 6
HEIGHT, WIDTH = 48, 60


PLANES = (284, "H", 1, 2, True)


def bands(count: int = BANDS) -> np.ndarray:
    """uint8 (H, W, count): the colours of two photographs."""
    both = [np.asarray(photo(name)) for name in ("coffee", "astronaut")]
    return np.concatenate(both, axis=2)[..., :count]


@pytest.fixture(scope="module")
def six(tmp_path_factory) -> Path:
    """A model of six channels."""
    folder = tmp_path_factory.mktemp("models") / "six"
    torch.manual_seed(5)
    config = fastseg.SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 16, 16],
        num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=16,
        num_labels=5,
        num_channels=BANDS,
    )
    model = fastseg.SegformerForSemanticSegmentation(config).eval()
    mean, std = [0.4, 0.5, 0.6, 0.3, 0.5, 0.2], [0.2, 0.3, 0.2, 0.25, 0.3, 0.2]
    processor = fastseg.SegformerImageProcessor(size=64, image_mean=mean, image_std=std)
    with torch.no_grad():  # no class ahead of the others on average
        logits = model(processor(bands(), return_tensors="pt").pixel_values).logits
        model.decode_head.classifier.bias -= logits.mean(dim=(0, 2, 3))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def predict_six(six, tmp_path):
    def run(*arguments) -> int:
        where = ["--model", str(six), "--output", str(tmp_path / "out"), "--device", "cpu"]
        return main(["predict", *map(str, arguments), *where])

    return run


CONTENTS = {
    "bytes": bands(),
    "16 bits": bands().astype(np.uint16) * 257,
    "floats": (bands() / 255).astype(np.float32),
    "doubles": bands().astype(np.float64),
}
LAYOUTS = {
    "interleaved": {"planarconfig": "contig", "photometric": "minisblack"},
    "planes": {"planarconfig": "separate", "photometric": "minisblack"},
    # Pillow would read the first three bands of it.
    "red, green, blue and more": {"planarconfig": "contig", "photometric": "rgb"},
    "tiles": {"planarconfig": "contig", "photometric": "minisblack", "tile": (16, 16)},
    "compressed": {"photometric": "minisblack", "planarconfig": "contig", "compression": "zlib"},
    "big": {"planarconfig": "contig", "photometric": "minisblack", "bigtiff": True},
}


def write(path: Path, values: np.ndarray, layout: str = "interleaved", **options) -> Path:
    if layout == "planes":
        values = np.moveaxis(values, -1, 0)
    tifffile.imwrite(path, values, **LAYOUTS[layout], **options)
    return path


@pytest.mark.every(5)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("content", CONTENTS)
def test_many_bands(predict_six, six, tmp_path, content, layout, capsys):
    write(tmp_path / "scene.tif", CONTENTS[content], layout)
    assert predict_six(tmp_path / "scene.tif", "--json", "--alpha", 0, "--overlay", "png") == 0
    assert "bands" not in capsys.readouterr().err
    labels = read_labels(tmp_path / "out" / "scene_labels.png")
    expected = segmented(six, bands(), input_data_format="channels_last")
    np.testing.assert_array_equal(labels, expected)
    assert len(np.unique(labels)) > 1
    with Image.open(tmp_path / "out" / "scene_overlay.png") as shown:
        visible = np.asarray(shown)[:HEIGHT, :WIDTH]
    np.testing.assert_array_equal(visible, bands()[..., :3])
    described = json.loads((tmp_path / "out" / "scene.json").read_text())
    assert (described["width"], described["height"]) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("kind", [np.float32, np.uint16])
def test_colour_that_pillow_does_not_read(predict, tmp_path, model_folder, kind):
    """Floats of three bands for a model of three channels, and 16 bits in planes."""
    values = bands(3)
    values = values.astype(kind) / 255 if kind == np.float32 else values.astype(kind) * 257
    layout = {"photometric": "rgb"}
    if kind == np.uint16:
        values, layout = np.moveaxis(values, -1, 0), {**layout, "planarconfig": "separate"}
    tifffile.imwrite(tmp_path / "a.tif", values, **layout)
    assert predict(tmp_path / "a.tif", "--alpha", 0) == 0
    picture = Image.fromarray(np.ascontiguousarray(bands(3)))
    labels = read_labels(tmp_path / "out" / "a_labels.png")
    np.testing.assert_array_equal(labels, segmented(model_folder, picture))


def test_a_grey_picture_in_planes_is_a_grey_picture(predict, tmp_path, model_folder):
    grey = bands(1)[..., 0]
    tifffile.imwrite(tmp_path / "a.tif", grey.astype(np.uint16) * 257, extratags=[PLANES])
    assert predict(tmp_path / "a.tif", "--no-overlay") == 0
    labels = read_labels(tmp_path / "out" / "a_labels.png")
    picture = Image.fromarray(np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(labels, segmented(model_folder, picture))


def test_values_stay_where_the_processor_does_not_rescale(tmp_path, six, predict_six):
    """Reflectances, such as those of satellites, whose mean the processor takes off."""
    values = bands().astype(np.float32) * 12 - 300
    processor = fastseg.SegformerImageProcessor(
        do_resize=False,
        do_rescale=False,
        image_mean=(values.mean((0, 1))).tolist(),
        image_std=(values.std((0, 1))).tolist(),
    )
    saved = six / "preprocessor_config.json"
    before = saved.read_text()
    try:
        processor.save_pretrained(six)
        write(tmp_path / "scene.tif", values)
        tifffile.imwrite(tmp_path / "nan.tif", values * np.nan, **LAYOUTS["interleaved"])
        assert predict_six(tmp_path / "scene.tif") == 0
        expected = segmented(six, values, input_data_format="channels_last")
        assert predict_six(tmp_path / "nan.tif") == 1
    finally:
        saved.write_text(before)
    labels = read_labels(tmp_path / "out" / "scene_labels.png")
    np.testing.assert_array_equal(labels, expected)
    assert len(np.unique(labels)) > 1


def test_grey_floats_stay_where_the_processor_does_not_rescale(tmp_path):
    """Pillow reads these, as mode F."""
    values = np.linspace(-3, 900, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)
    Image.fromarray(values).save(tmp_path / "a.tif")
    (kept,) = read_pages(tmp_path / "a.tif", channels=1, raw=True)
    np.testing.assert_array_equal(np.asarray(kept.image), values)
    (page,) = read_pages(tmp_path / "a.tif", channels=1)
    assert "expected floats in [0, 1] or [0, 255], got values in [-3, 900]" in page.reason
    shown = np.asarray(visible(kept.image))
    np.testing.assert_allclose(shown, np.linspace(0, 255, values.size).reshape(shown.shape), atol=1)


def test_pages_of_many_bands(predict_six, six, tmp_path, capsys):
    path = tmp_path / "stack.tif"
    with tifffile.TiffWriter(path) as file:
        for kind, page in ((0, bands()), (1, bands()[::2, ::2]), (0, bands()[::-1])):
            file.write(page, **LAYOUTS["interleaved"], subfiletype=kind)
    assert page_numbers(path, BANDS) == [1, 3]  # a smaller version is no page
    assert predict_six(path, "--no-overlay") == 0
    assert "pages or frames after the first left out: 1" in capsys.readouterr().err
    assert predict_six(path, "--no-overlay", "--all-pages") == 0
    last = read_labels(tmp_path / "out" / "stack-page0003_labels.png")
    expected = segmented(six, bands()[::-1].copy(), input_data_format="channels_last")
    np.testing.assert_array_equal(last, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rasters_are_turned_as_pillow_turns_pictures(tmp_path, orientation):
    tag = [(274, "H", 1, orientation, True)]
    write(tmp_path / "six.tif", bands(), extratags=tag)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(np.ascontiguousarray(bands(3))).save(tmp_path / "three.png", exif=exif)
    (six,) = read_pages(tmp_path / "six.tif", channels=BANDS)
    (three,) = read_pages(tmp_path / "three.png", channels=3)
    np.testing.assert_array_equal(six.image[..., :3], np.asarray(three.image))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (bands()[..., :5], "a TIFF of 5 bands, where the model takes 6"),
        (bands() * np.float32(np.nan), "expected floats in [0, 1] or [0, 255], got values in [nan"),
        (bands() * np.float32(90), "expected floats in [0, 1] or [0, 255], got values in [0, "),
        (bands() * np.int32(999), "expected whole numbers in [0, 255] or [0, 65535], got"),
    ],
)
def test_what_does_not_fit(predict_six, tmp_path, content, reason, capsys):
    write(tmp_path / "a.tif", content)
    assert predict_six(tmp_path / "a.tif") == 1
    assert f"{tmp_path / 'a.tif'}: {reason}" in capsys.readouterr().err


def test_a_broken_file(predict_six, tmp_path, capsys):
    path = write(tmp_path / "a.tif", bands())
    path.write_bytes(path.read_bytes()[:5000])
    (tmp_path / "b.tif").write_bytes(b"II*\0" + bytes(100))
    write(tmp_path / "c.tif", bands())
    assert predict_six(path, tmp_path / "b.tif", tmp_path / "c.tif", "--all-pages") == 1
    printed = capsys.readouterr()
    assert "1 of 3 images segmented" in printed.out
    for name in "ab":
        assert any(f"{name}.tif: " in line for line in printed.err.splitlines())


def test_12_bits_in_16_are_told(predict_six, tmp_path, capsys):
    write(tmp_path / "a.tif", bands().astype(np.uint16) * 16)
    assert predict_six(tmp_path / "a.tif", "--no-overlay") == 0
    assert f"{tmp_path / 'a.tif'}: 16-bit pixels of at most 40" in capsys.readouterr().err


def test_many_bands_for_a_model_of_three(predict, tmp_path, capsys):
    write(tmp_path / "six.tif", bands())
    write(tmp_path / "rgb.tif", bands(), "red, green, blue and more")
    assert predict(tmp_path / "six.tif", tmp_path / "rgb.tif", "--no-overlay") == 1
    said = capsys.readouterr().err
    assert "six.tif: a TIFF of 6 bands, where the model takes 3" in said
    assert "rgb.tif: 6 bands, of which the first three are taken as red, green and blue" in said
    assert tree(tmp_path / "out") == {"rgb_labels.png"}


def test_other_formats_for_a_model_of_six(predict_six, photos, capsys):
    assert predict_six(photos / "coffee.jpg") == 1
    assert "expected 6 channels" in capsys.readouterr().err


@pytest.mark.parametrize("channels", [3, 6])
def test_without_tifffile_the_extra_is_named(tmp_path, monkeypatch, channels):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    write(tmp_path / "a.tif", bands())
    (page,) = read_pages(tmp_path / "a.tif", channels=channels)
    assert page.image is None
    assert 'tifffile reads many bands and floats: pip install "fastseg-segformer[tiff]"' in (
        page.reason
    )
    photo("coffee").save(tmp_path / "b.tif")  # which Pillow reads
    assert next(read_pages(tmp_path / "b.tif", channels=3)).image is not None


def test_a_raster_above_the_limit_of_pixels(predict_six, tmp_path, monkeypatch, capsys):
    write(tmp_path / "a.tif", bands())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 2 - 1)
    assert predict_six(tmp_path / "a.tif") == 1
    option = f"--max-pixels {HEIGHT * WIDTH}"
    assert f"`fastseg predict {option}` reads it" in capsys.readouterr().err
    assert predict_six(tmp_path / "a.tif", *option.split()) == 0

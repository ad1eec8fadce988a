"""Pictures of several pages or frames: the first with a note, or all of them."""

from __future__ import annotations

import json
import struct
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence, TiffImagePlugin

from fastseg.cli.images import PagesInTurn, page_numbers, read_pages
from fastseg.inference.pipeline import Pipeline
from tests.cli.cli_cases import photo, read_labels, segmented, tree

NAMES = ["coffee", "astronaut", "chelsea"]
SAVING = {
    "tif": {},
    "gif": {"duration": 100},
    "png": {"duration": 100},
    "webp": {"duration": 100, "lossless": True},
}


def save_pages(path: Path, pages: list[Image.Image], **options) -> Path:
    pages[0].save(path, save_all=True, append_images=pages[1:], **options)
    return path


@pytest.mark.parametrize("suffix", SAVING)
def test_every_page(predict, tmp_path, model_folder, suffix, capsys):
    pages = [photo(name) for name in NAMES]
    path = save_pages(tmp_path / f"clip.{suffix}", pages, **SAVING[suffix])
    with Image.open(path) as file:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(file)]
    if suffix != "gif":  # which has 256 colours
        for page, frame in zip(pages, frames, strict=True):
            np.testing.assert_array_equal(np.asarray(page), np.asarray(frame))
    photo("rocket").save(tmp_path / "one.png")
    given = (path, tmp_path / "one.png", "--json", "--no-overlay")
    stems = [f"clip-page000{number}" for number in (1, 2, 3)]
    for batch_size in (1, 2):
        assert predict(*given, "--all-pages", "--batch-size", batch_size) == 0
        printed = capsys.readouterr()
        assert "4 of 4 images segmented" in printed.out
        assert "left out" not in printed.err
        assert tree(tmp_path / "out") == {
            f"{stem}{ending}" for stem in [*stems, "one"] for ending in ("_labels.png", ".json")
        }
        for number, (stem, frame) in enumerate(zip(stems, frames, strict=True), 1):
            labels = read_labels(tmp_path / "out" / f"{stem}_labels.png")
            assert (labels == segmented(model_folder, frame)).mean() > 0.99  # batches decide ties
            content = json.loads((tmp_path / "out" / f"{stem}.json").read_text())
            assert (content["page"], content["image"]) == (number, str(path))
    # Without the option the first, under the file's own name.
    assert predict(*given) == 0
    said = capsys.readouterr().err
    assert f"pages or frames after the first left out: 2, of {path}; --all-pages" in said
    np.testing.assert_array_equal(
        read_labels(tmp_path / "out" / "clip_labels.png"), segmented(model_folder, frames[0])
    )


def test_what_is_left_out_is_one_line_for_all_files(predict, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for count in (1, 2, 3, 4):
        save_pages(folder / f"{count}.tif", [photo("coffee")] * count)
    assert predict(folder) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(lines) == 1
    assert f"left out: 6, of {folder / '2.tif'} and 2 more; --all-pages segments them" in lines[0]


def test_pages_keep_their_own_orientation_and_size(tmp_path):
    """A TIFF has them for each page."""
    path = tmp_path / "scan.tif"
    pages = [photo("coffee"), photo("astronaut", (30, 50)), photo("chelsea", (64, 20))]
    turned = {1: 1, 2: 6, 3: 3}
    with TiffImagePlugin.AppendingTiffWriter(str(path), True) as file:
        for page, orientation in zip(pages, turned.values(), strict=True):
            page.save(file, format="TIFF", tiffinfo={274: orientation})
            file.newFrame()
    upright = [pages[0], pages[1].transpose(Image.Transpose.ROTATE_270)]
    upright.append(pages[2].transpose(Image.Transpose.ROTATE_180))
    assert page_numbers(path) == [1, 2, 3]
    for number in ([1, 2, 3], [2, 3], [3]):
        for page, index in zip(read_pages(path, number), number, strict=True):
            np.testing.assert_array_equal(np.asarray(page.image), np.asarray(upright[index - 1]))


def test_names_of_pages_sort(predict, tmp_path):
    save_pages(tmp_path / "scan.tif", [photo("coffee", (9, 8))] * 11)
    assert predict(tmp_path / "scan.tif", "--all-pages", "--no-overlay") == 0
    numbers = [name.split("page")[1].split("_")[0] for name in sorted(tree(tmp_path / "out"))]
    assert [int(number) for number in numbers] == list(range(1, 12))


@pytest.mark.parametrize(
    ("kind", "pages"), [(0, [1, 2]), (1, [1]), (2, [1, 2]), (4, [1]), (5, [1])]
)
def test_smaller_versions_and_masks_are_no_pages(tmp_path, kind, pages):
    """Kinds of TIFF's NewSubfileType: a cloud-optimised GeoTIFF holds the picture many times."""
    path = tmp_path / "pyramid.tif"
    with TiffImagePlugin.AppendingTiffWriter(str(path), True) as file:
        photo("coffee").save(file, format="TIFF")
        file.newFrame()
        photo("coffee", (30, 24)).save(file, format="TIFF", tiffinfo={254: kind})
        file.newFrame()
    assert page_numbers(path) == pages
    (first,) = read_pages(path)
    assert first.left_out == len(pages) - 1


@pytest.mark.parametrize(("kind", "pages"), [(0x000000, [1]), (0x010002, [1]), (0x020002, [1, 2])])
def test_what_a_phone_puts_behind_its_photograph_is_no_page(tmp_path, kind, pages):
    """In the format MPO: a map of gains, a thumbnail; the pictures of two lenses are pages."""
    path = save_pages(tmp_path / "photo.jpg", [photo("coffee"), photo("rocket")], format="MPO")
    content = path.read_bytes()
    with Image.open(path) as file:
        second = file.mpinfo[0xB002][1]
    entry = struct.pack("<LLL", 0, second["Size"], second["DataOffset"])
    assert content.count(entry) == 1
    path.write_bytes(content.replace(entry, struct.pack("<L", kind) + entry[4:]))
    assert page_numbers(path) == pages
    (first,) = read_pages(path)
    assert first.left_out == len(pages) - 1


def test_layers_are_no_pages(monkeypatch, tmp_path):
    """Pillow counts those of a Photoshop file as frames."""
    photo("coffee").save(tmp_path / "a.png")
    file = Image.open(tmp_path / "a.png")
    file.format, file.n_frames = "PSD", 3
    monkeypatch.setattr(Image, "open", lambda path: file)
    assert page_numbers(tmp_path / "a.png") == [1]


@pytest.mark.parametrize("suffix", ["tif", "gif"])
def test_a_broken_page_is_reported_and_the_others_go_on(predict, tmp_path, suffix, capsys):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (3, 40, 50, 3), dtype=np.uint8)
    path = save_pages(tmp_path / f"cut.{suffix}", [Image.fromarray(page) for page in noise])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    photo("coffee").save(tmp_path / "one.png")
    assert predict(path, tmp_path / "one.png", "--all-pages", "--no-overlay") == 1
    printed = capsys.readouterr()
    assert f"{path}, page 2: " in printed.err
    assert tree(tmp_path / "out") == {"cut-page0001_labels.png", "one_labels.png"}
    # The first alone can be read; that there are others is told.
    assert predict(path, "--no-overlay") == 0
    assert f"left out: 1, of {path}; " in capsys.readouterr().err


def test_frames_after_a_broken_one_are_not_made_from_it(tmp_path):
    """Frames of an animation are changes of those before."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (4, 40, 50, 3), dtype=np.uint8)
    path = save_pages(tmp_path / "a.png", [Image.fromarray(page) for page in noise])
    content = bytearray(path.read_bytes())
    third = [i for i in range(len(content)) if content[i : i + 4] == b"fdAT"][1]
    content[third + 100 : third + 1000] = bytes(900)
    path.write_bytes(content)
    pages = list(read_pages(path, page_numbers(path)))
    assert [page.image is None for page in pages] == [False, False, True, True]
    assert all(page.reason for page in pages[2:])


@pytest.mark.parametrize("suffix", SAVING)
def test_one_page_is_alive_at_a_time(tmp_path, suffix):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (20, 40, 50, 3), dtype=np.uint8)
    images = [Image.fromarray(page) for page in noise]
    path = save_pages(tmp_path / f"clip.{suffix}", images, **SAVING[suffix])
    pages = PagesInTurn(path, page_numbers(path))
    expected = list(read_pages(path, page_numbers(path)))
    made: list[weakref.ref] = []
    alive = []

    def read(number, place):
        with pages.page(number, place) as page:
            alive.append(sum(reference() is not None for reference in made))
            made.append(weakref.ref(page.image))
            np.testing.assert_array_equal(page.image, expected[number - 1].image)
            return page.image.size

    def nothing(*given):
        return [None] * len(given[0]) if len(given) == 1 else None

    with Pipeline(read, nothing, nothing, kind=bool, workers=4) as pipeline:
        outcomes = list(pipeline.run(page_numbers(path)))
    assert [outcome.item for outcome in outcomes] == list(range(1, 21))
    assert not [outcome.error for outcome in outcomes if outcome.error]
    assert max(alive) <= 1  # that before, in the hands of PIL

"""examples/pictures.py: what a folder of one's own pictures and masks may hold."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
CLASSES = "sky\nland\nsea\n"


@pytest.fixture(scope="module")
def pictures() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("pictures")


def make_folder(
    root: Path, mask: Image.Image, classes: str = CLASSES, image=None, ending="png", **save
) -> Path:
    """Two pictures of (20, 30) with the same mask."""
    for name in ("images", "masks"):
        (root / name).mkdir()
    (root / "classes.txt").write_text(classes)
    for number in range(2):
        picture = Image.new("RGB", (30, 20), (9, 99, 199)) if image is None else image
        picture.save(root / "images" / f"{number}.{ending}", **save)
        mask.save(root / "masks" / f"{number}.png")
    return root


def labels(*values: int) -> np.ndarray:
    return np.resize(np.array(values, np.uint8), (20, 30))


def colour_mask() -> Image.Image:
    indexed = Image.fromarray(labels(0, 1, 2, 255)).convert("P")
    indexed.putpalette(np.arange(768)[::-1].astype(np.uint8).tobytes())
    return indexed


KINDS = {
    "L": lambda: Image.fromarray(labels(0, 1, 2, 255)),
    "P": colour_mask,
    "I;16": lambda: Image.fromarray(labels(0, 1, 2, 255).astype(np.uint16)),
    "LA": lambda: Image.fromarray(labels(0, 1, 2, 255)).convert("LA"),
    "RGB": lambda: Image.fromarray(labels(0, 1, 2, 255)).convert("RGB"),
    "RGBA": lambda: Image.fromarray(labels(0, 1, 2, 255)).convert("RGBA"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_masks(pictures: ModuleType, tmp_path: Path, kind: str, capsys) -> None:
    folder = pictures.Folder(make_folder(tmp_path, KINDS[kind]()), seed=0)
    image, found = folder.train(0)
    np.testing.assert_array_equal(found, labels(0, 1, 2, 255))
    assert (image == (9, 99, 199)).all()
    assert found.dtype == image.dtype == np.uint8
    assert not capsys.readouterr().out


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_binary_masks(pictures: ModuleType, tmp_path: Path, mode: str, capsys) -> None:
    mask = Image.fromarray(labels(0, 255)).convert(mode)
    folder = pictures.Folder(make_folder(tmp_path, mask, "ground\nroof\n"), seed=0)
    np.testing.assert_array_equal(folder.train(0)[1], labels(0, 1))
    np.testing.assert_array_equal(next(folder.held_out())[1], labels(0, 1))
    assert ("255 is taken for roof" in capsys.readouterr().out) == (mode != "1")


def test_255_is_left_out_where_there_is_a_1(pictures: ModuleType, tmp_path: Path) -> None:
    root = make_folder(tmp_path, Image.fromarray(labels(0, 255)), "ground\nroof\n")
    Image.fromarray(labels(0, 1)).save(root / "masks" / "1.png")
    np.testing.assert_array_equal(next(pictures.Folder(root, 0).held_out())[1], labels(0, 255))


def test_a_class_in_no_mask_is_told(pictures: ModuleType, tmp_path: Path, capsys) -> None:
    pictures.Folder(make_folder(tmp_path, Image.fromarray(labels(0, 255))), seed=0)
    assert "no mask has land, sea" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mask", "classes", "match"),
    [
        (labels(0, 3), CLASSES, r"0\.png: expected the numbers of 3 classes, 0 to 2.*got \[3\]"),
        (labels(0, 127, 255), "a\nb\n", r"0 to 1, or 255 .*got \[127\].*class numbers"),
        (labels(0, 1).astype(np.uint16) * 256, CLASSES, r"got \[256\]"),
        (np.dstack([labels(0, 1), labels(1, 2), labels(2, 0)]), CLASSES, "bands that differ"),
        (labels(0, 1), "one\n", r"classes\.txt: expected 2 to 255 names.*got 1"),
        (labels(0, 1)[:, :20], CLASSES, r"picture, turned.*\(20, 30\), got \(20, 20\)"),
    ],
)
def test_wrong_masks_are_named(
    pictures: ModuleType, tmp_path: Path, mask: np.ndarray, classes: str, match: str
) -> None:
    root = make_folder(tmp_path, Image.fromarray(mask), classes)
    with pytest.raises(ValueError, match=match):
        pictures.Folder(root, seed=0).train(0)


@pytest.mark.parametrize(("tag", "turn"), [(3, 2), (6, 1), (8, 3)])
@pytest.mark.parametrize("kind", ["RGB", "L", "I;16"])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_pictures_are_turned_as_their_exif_says(
    pictures: ModuleType, tmp_path: Path, tag: int, turn: int, kind: str, ending: str
) -> None:
    shown = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    shown = shown if kind == "RGB" else np.repeat(shown[..., :1], 3, axis=2)
    stored = np.ascontiguousarray(np.rot90(shown, turn))
    stored = stored if kind == "RGB" else stored[..., 0]
    stored = stored.astype(np.uint16) * 257 if kind == "I;16" else stored
    exif = Image.Exif()
    exif[0x112] = tag
    mask = Image.fromarray(labels(0, 1, 2))
    root = make_folder(tmp_path, mask, image=Image.fromarray(stored), ending=ending, exif=exif)
    image, found = pictures.Folder(root, seed=0).train(0)
    np.testing.assert_array_equal(image, shown)
    np.testing.assert_array_equal(found, labels(0, 1, 2))


def test_all_that_is_wrong_is_told_before_the_first_step(
    pictures: ModuleType, tmp_path: Path
) -> None:
    """A picture cut off, none, no mask, a mask of another size, unknown numbers."""
    root = make_folder(tmp_path, Image.fromarray(labels(0, 1, 2)))
    for name in ("cut", "none", "small", "mask", "number"):
        Image.new("RGB", (30, 20)).save(root / "images" / f"{name}.png")
        Image.fromarray(labels(0, 1, 2)).save(root / "masks" / f"{name}.png")
    whole = (root / "images" / "cut.png").read_bytes()
    (root / "images" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "images" / "none.png").write_text("a page of an error")
    (root / "masks" / "mask.png").write_text("another")
    Image.fromarray(labels(0, 1, 2)[:9]).save(root / "masks" / "small.png")
    Image.fromarray(labels(0, 9)).save(root / "masks" / "number.png")
    with pytest.raises(ValueError, match="images/cut") as found:
        pictures.Folder(root, seed=0)
    lines = str(found.value).splitlines()
    starts = ["images/cut", "images/none", "masks/mask", "masks/number", "masks/small"]
    for line, start in zip(sorted(lines), starts, strict=True):
        assert line.startswith(f"{root}/{start}.png: "), line


def test_splits_are_kept(pictures: ModuleType, tmp_path: Path) -> None:
    """Where there is a split for validation, nothing of that for training is held out."""
    for split, count in (("train", 3), ("val", 2)):
        for name in ("images", "masks"):
            (tmp_path / name / split).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (30, 20)).save(tmp_path / "images" / split / f"{number}.png")
            Image.fromarray(labels(number)).save(tmp_path / "masks" / split / f"{number}.png")
    (tmp_path / "classes.txt").write_text(CLASSES)
    folder = pictures.Folder(tmp_path, seed=0)
    assert folder.describe() == {"pictures": tmp_path.name, "train": 3, "held_out": 2}
    assert {int(folder.train(index)[1].max()) for index in range(3)} == {0, 1, 2}
    (tmp_path / "images" / "train").rename(tmp_path / "images" / "test")
    with pytest.raises(FileNotFoundError, match="no split 'train'; there are test, val"):
        pictures.Folder(tmp_path, seed=0)


def test_no_class_is_0_in_ade20k(pictures: ModuleType, tmp_path: Path) -> None:
    for name, split in (
        (n, s) for n in ("images", "annotations") for s in ("training", "validation")
    ):
        (tmp_path / name / split).mkdir(parents=True)
    for split, short in (("training", "train"), ("validation", "val")):
        name = f"ADE_{short}_00000001"
        Image.new("RGB", (30, 20)).save(tmp_path / "images" / split / f"{name}.jpg")
        mask = labels(0, 1, 150)
        Image.fromarray(mask).save(tmp_path / "annotations" / split / f"{name}.png")
    folder = pictures.Folder(tmp_path, seed=0)
    assert len(folder.classes) == 150
    np.testing.assert_array_equal(folder.train(0)[1], labels(255, 0, 149))

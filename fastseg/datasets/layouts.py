"""Where the picture files of a data set and their masks lie, by what is there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastseg.images.palettes import dataset

from .masks import LABEL_IDS
from .splits import choose_split, listed

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".jp2"}
MASKS = {".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm"}
CLASSES = "classes.txt"

# Folders of pictures and of their masks.
_FOLDERS = (
    ("images", "masks"),
    ("images", "annotations"),
    ("images", "labels"),
    ("img_dir", "ann_dir"),
)


@dataclass(frozen=True)
class Pairs:
    """Files of pictures and of their masks; the rest as in `LabelledPictures`."""

    kind: str
    paths: Sequence[tuple[Path, Path]]
    classes: Sequence[str] | None = None
    reduce_labels: bool | None = None
    numbers: str | None = None
    remarks: Sequence[str] = ()


def find_pairs(root: Path, split: str | None, split_file: Path | None) -> Pairs:
    """Pairs in a folder: see `open_dataset`."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: expected a folder of pictures and masks")
    if (root / "leftImg8bit").is_dir() and (root / "gtFine").is_dir():
        pairs = _cityscapes(root, split)
    elif (root / "JPEGImages").is_dir() and (root / "SegmentationClass").is_dir():
        pairs = _voc(root, split, split_file)
    else:
        pairs = _plain(root, split, split_file)
    if split_file is not None:
        pairs = replace(pairs, paths=_chosen(root, pairs.paths, split_file))
    if not pairs.paths:
        raise FileNotFoundError(f"{root}: found no pictures in {pairs.kind}")
    absent = [image for image, _ in pairs.paths if not image.is_file()]
    if absent:
        raise FileNotFoundError(f"{root}: {len(absent)} pictures are not there: {listed(absent)}")
    missing = [mask for _, mask in pairs.paths if not mask.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{root}: {len(missing)} of {len(pairs.paths)} masks are not there: {listed(missing)}; "
            "make them, or list the pictures to take in --split-file"
        )
    return pairs


def _cityscapes(root: Path, split: str | None) -> Pairs:
    pictures = root / "leftImg8bit"
    folder = _split_folder(pictures, split)
    ending = "_leftImg8bit.png"
    found = [path for path in _files(folder, {".png"}) if path.name.endswith(ending)]
    stems = [
        root / "gtFine" / path.relative_to(pictures).parent / path.name.removesuffix(ending)
        for path in found
    ]
    # Cityscapes ships its own ids; its scripts make train ids of them.
    numbers, mask = None, "_gtFine_labelTrainIds.png"
    remarks = []
    if not any(stem.with_name(stem.name + mask).is_file() for stem in stems):
        numbers, mask = LABEL_IDS, "_gtFine_labelIds.png"
        remarks = ["no labelTrainIds: labelIds are taken, and made train ids"]
    paths = [
        (path, stem.with_name(stem.name + mask)) for path, stem in zip(found, stems, strict=True)
    ]
    names = dataset("cityscapes").names
    return Pairs("Cityscapes", paths, names, False, numbers, remarks)


def _voc(root: Path, split: str | None, split_file: Path | None) -> Pairs:
    if split_file is None:
        lists = root / "ImageSets" / "Segmentation"
        split_file = lists / f"{split or 'val'}.txt"
        if not split_file.is_file():
            there = sorted(path.stem for path in lists.glob("*.txt"))
            raise FileNotFoundError(f"{split_file}: no such list; there are {listed(there)}")
        names = _lines(split_file)
    else:  # it chooses among all
        names = [path.stem for path in _files(root / "SegmentationClass", MASKS)]
    paths = [
        (root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png")
        for name in names
    ]
    return Pairs("Pascal VOC", paths, dataset("voc").names, False)


def _plain(root: Path, split: str | None, split_file: Path | None) -> Pairs:
    folders = [
        (root / images, root / masks)
        for images, masks in _FOLDERS
        if (root / images).is_dir() and (root / masks).is_dir()
    ]
    if not folders:
        if split_file is not None:  # which may have pairs of any folders
            return Pairs("pairs of a list", [], _classes(root))
        there = sorted(path.name for path in root.iterdir())
        raise FileNotFoundError(
            f"{root}: expected images/ and masks/ (or annotations/, labels/), Cityscapes' "
            "leftImg8bit/ and gtFine/, Pascal VOC's JPEGImages/ and SegmentationClass/, or a data "
            f"set of Hugging Face datasets; found {listed(there)}"
        )
    images, masks = folders[0]
    whole = split_file is not None and split is None
    folder = images if whole else _split_folder(images, split)
    pictures = _files(folder, PICTURES)
    beside = masks / folder.relative_to(images)
    by_name = {_key(path, masks): path for path in _files(beside, MASKS)}
    keys = [_key(path, images) for path in pictures]
    if pictures and not by_name.keys() & set(keys):
        others = _files(beside, PICTURES)
        advice = "rename the masks, or list the pictures with their masks in --split-file"
        if others and not by_name:
            advice = "files of this kind have lost class numbers: make the masks anew, as PNG"
        raise FileNotFoundError(
            f"{root}: names of pictures and of masks do not match: {listed(pictures)}; "
            f"{listed(others) or f'none in {beside}'}; {advice}"
        )
    paths = [
        (path, by_name.get(key, masks / f"{key}.png"))
        for path, key in zip(pictures, keys, strict=True)
    ]
    unused = len(by_name.keys() - set(keys))
    remarks = [f"{unused} masks have no picture and are left out"] if unused and not whole else []
    if masks.name == "annotations" and all(path.name.startswith("ADE_") for path in pictures):
        return Pairs("ADE20K", paths, dataset("ade20k").names, True, remarks=remarks)
    return Pairs(f"{images.name}/ and {masks.name}/", paths, _classes(root), remarks=remarks)


def _split_folder(images: Path, split: str | None) -> Path:
    """The folder of a split below that of pictures, which may have none or others, as of cities."""
    below = {path.name: path for path in images.iterdir() if path.is_dir() and path.name[0] != "."}
    return choose_split(images, below, split, otherwise=images)


def _chosen(
    root: Path, pairs: Sequence[tuple[Path, Path]], split_file: Path
) -> list[tuple[Path, Path]]:
    """The pairs that a list names, in its order."""
    by_name: dict[str, tuple[Path, Path] | None] = {}  # None where several have the name
    for pair in pairs:
        relative = pair[0].relative_to(root)
        # By its name, and by ever more of its folders, with and without suffix.
        for start in range(len(relative.parts)):
            path = Path(*relative.parts[start:])
            for name in (path.as_posix(), path.with_suffix("").as_posix()):
                by_name[name] = None if name in by_name else pair
    found, absent = [], []
    for line in _lines(split_file):
        name = line.lstrip("/")
        columns = name.split("\t") if "\t" in name else name.split()
        pair_of_name = by_name.get(name)
        if pair_of_name is not None:
            found.append(pair_of_name)
        elif len(columns) == 2 and (root / columns[0]).is_file():
            found.append((root / columns[0], root / columns[1].lstrip("/")))
        else:
            absent.append(line)
    if absent:
        raise FileNotFoundError(
            f"{split_file}: {len(absent)} of its lines name no picture in {root}, or several: "
            f"{listed(absent)}"
        )
    return found


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise FileNotFoundError(f"{path}: cannot be read as a list: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _classes(root: Path) -> list[str] | None:
    path = root / CLASSES
    return _lines(path) if path.is_file() else None


def _key(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _files(folder: Path, suffixes: set[str]) -> list[Path]:
    """Files of `suffixes` in a folder and those below, in order; hidden ones are left out."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        found += [
            Path(parent, name)
            for name in names
            if name[0] != "." and Path(name).suffix.lower() in suffixes
        ]
    return sorted(found)

"""Colours of classes: those of known data sets by their names, or a list of distant ones."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DATASETS = ("ade20k", "cityscapes", "voc")

# The first colours are chosen by eye: bright enough over a photograph, far from one another.
_FIRST_COLOURS = (
    (64, 132, 232),
    (240, 130, 40),
    (54, 170, 84),
    (222, 52, 70),
    (150, 92, 208),
    (244, 206, 60),
    (34, 188, 196),
    (236, 112, 184),
    (142, 94, 58),
    (158, 208, 62),
    (46, 70, 150),
    (190, 190, 200),
)


class Dataset(NamedTuple):
    """Names of a data set's classes, in the order of its (train) ids, and uint8 (K, 3) colours."""

    names: tuple[str, ...]
    colours: np.ndarray

    def order(self, names: Mapping[int, str]) -> list[int] | None:
        """Which of the data set's classes each of `names` is; None where they are not just these.

        Case, spaces, hyphens and synonyms after a comma do not count.
        """
        own = {_plain(name): index for index, name in enumerate(self.names)}
        found = [own.get(_plain(str(names.get(index, "")))) for index in range(len(own))]
        known = [index for index in found if index is not None]
        return known if len(names) == len(own) == len(set(known)) else None


@functools.lru_cache
def dataset(name: str) -> Dataset:
    """ADE20K, Cityscapes or Pascal VOC, by one of `DATASETS`.

    Raises:
        ValueError: another name.
    """
    if name not in DATASETS:
        raise ValueError(f"expected one of {', '.join(DATASETS)}, got {name!r}")
    table = _tables()[name]
    return Dataset(tuple(table), np.array(list(table.values()), dtype=np.uint8))


def find_dataset(names: Mapping[int, str]) -> str | None:
    """The data set whose classes `names` are, in whatever order; None where there is none."""
    return next((name for name in DATASETS if dataset(name).order(names) is not None), None)


def cityscapes_label_ids() -> list[int]:
    """Cityscapes' own id of each of its 19 train ids."""
    return list(_tables()["cityscapes labelIds"].values())


def palette(num_labels: int, id2label: Mapping[int, str] | None = None) -> np.ndarray:
    """Colours for `num_labels` classes: uint8 (num_labels, 3), RGB.

    Where `id2label` has the class names of ADE20K, Cityscapes or Pascal VOC, in any order, the
    colours are those of the data set. Others do not depend on `num_labels`: each is as far as
    possible, to the eye, from all before it. All of these are distinct up to some 2,000 classes,
    after which they repeat.

    Raises:
        ValueError: `num_labels` is less than 1.
    """
    if num_labels < 1:
        raise ValueError(f"num_labels: expected 1 or more, got {num_labels}")
    name = find_dataset(id2label or {})
    if name is not None and len(dataset(name).names) == num_labels:
        return dataset(name).colours[dataset(name).order(id2label or {})]
    return np.resize(_distant_colours(), (num_labels, 3))


def config_palette(config: Any) -> np.ndarray:
    """The colours of a model: its configuration's own `palette`, one RGB triple for each class,
    where it has one, else `palette(config.num_labels, config.id2label)`.

    Raises:
        ValueError: the configuration's palette is not of that form.
    """
    own = getattr(config, "palette", None)
    if own is None:
        return palette(config.num_labels, config.id2label)
    return check_palette(own, "config.palette", config.num_labels)


def check_palette(colours: Any, name: str, count: int | None = None) -> np.ndarray:
    """Colours as uint8 (K, 3); ValueError, which names them `name`, for anything else."""
    array = np.asarray(colours)
    if array.ndim != 2 or array.shape[1:] != (3,) or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: expected integers of shape (classes, 3), got {array.dtype} {array.shape}"
        )
    if count is not None and len(array) != count:
        raise ValueError(f"{name}: expected {count} colours, one a class, got {len(array)}")
    if len(array) == 0 or array.min() < 0 or array.max() > 255:
        raise ValueError(f"{name}: expected one colour or more, from 0 to 255")
    return array.astype(np.uint8)


@functools.lru_cache(maxsize=1)
def _tables() -> dict[str, dict[str, Any]]:
    # By name, in the order of class numbers, as the data sets' authors have published them; those
    # of ADE20K with one word a class, as mmseg and the models on the hub have them.
    text = Path(__file__).with_name("palettes.json").read_text(encoding="utf-8")
    tables: dict[str, dict[str, Any]] = json.loads(text)
    return tables


def _plain(name: str) -> str:
    """Letters and digits alone of a class name, without synonyms."""
    return "".join(filter(str.isalnum, name.split(",")[0])).casefold()


@functools.lru_cache(maxsize=1)
def _distant_colours() -> np.ndarray:
    """All colours of a grid, ordered so that each is the farthest from all before it."""
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _oklab(grid)
    lightness, chroma = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2])
    # Near-black, near-white and grey vanish in photographs.
    keep = (lightness > 3500) & (lightness < 9300) & (chroma > 500)
    colours = np.concatenate([np.array(_FIRST_COLOURS, dtype=np.uint8), grid[keep]])
    lab = _oklab(colours)
    order = list(range(len(_FIRST_COLOURS)))
    nearest = np.full(len(colours), np.iinfo(np.int64).max)
    while True:
        for index in order if len(order) == len(_FIRST_COLOURS) else order[-1:]:
            nearest = np.minimum(nearest, ((lab - lab[index]) ** 2).sum(axis=1))
        farthest = int(nearest.argmax())
        if nearest[farthest] == 0 or len(order) == 2048:
            return colours[order]
        order.append(farthest)


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """Oklab coordinates times 10,000 as integers, so that distances compare exactly anywhere."""
    srgb = rgb / 255.0
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    cones = np.cbrt(
        linear
        @ np.array(
            [
                [0.4122214708, 0.2119034982, 0.0883024619],
                [0.5363325363, 0.6806995451, 0.2817188376],
                [0.0514459929, 0.1073969566, 0.6299787005],
            ]
        )
    )
    lab = cones @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )
    return (lab * 10_000).round().astype(np.int64)

"""Pictures for examples/train.py: drawn scenes or a folder, and the augmentation of both.

Your own dataset goes here: a class with the four members of `Pictures`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

import fastseg
from fastseg.datasets.pictures import LabelledPictures, open_dataset
from fastseg.datasets.splits import NoSuchSplit
from fastseg.demo.scenes import CLASSES, draw_scene

IGNORE = 255
# Pictures and masks are read as the image processor takes them, at their own size.
PROCESSOR = fastseg.SegformerImageProcessor(do_resize=False)
# The image processor's own.
MEAN = np.array((0.485, 0.456, 0.406), np.float32)
STD = np.array((0.229, 0.224, 0.225), np.float32)
TRAIN_SEEDS = 1_000_000  # scenes for training start here; those below are held out


class Pictures(Protocol):
    """Where pictures come from."""

    classes: list[str]  # names by number

    def train(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Training picture `index` of an endless stream: uint8 (H, W, 3) and labels (H, W)."""
        ...

    def held_out(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The pictures that are never trained on."""
        ...

    def describe(self) -> dict[str, Any]:
        """What goes into metrics.json about them."""
        ...


class DrawnScenes:
    """Scenes of fastseg.demo.scenes; the held-out ones have seeds from 0, all below TRAIN_SEEDS."""

    def __init__(self, sizes: list[int], eval_size: int, eval_count: int) -> None:
        self.classes = list(CLASSES)
        self.sizes, self.eval_size, self.eval_count = sizes, eval_size, eval_count

    def train(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        side = self.sizes[index % len(self.sizes)]
        scene = draw_scene(TRAIN_SEEDS + index, (side, side))
        return scene.image, scene.labels

    def held_out(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for seed in range(self.eval_count):
            scene = draw_scene(seed, (self.eval_size, self.eval_size))
            yield scene.image, scene.labels

    def describe(self) -> dict[str, Any]:
        return {
            "pictures": "fastseg.demo.scenes.draw_scene",
            "train_seeds_from": TRAIN_SEEDS,
            "train_sizes": self.sizes,
            "held_out_seeds": [0, self.eval_count - 1],
            "held_out_size": self.eval_size,
        }


Pair = tuple[LabelledPictures, int]  # a data set and a place in it


class Folder:
    """A data set in a folder, in one of the layouts of docs/evaluate.md, read by fastseg.datasets.

    Where it has no splits, every tenth picture is held out. Masks hold class numbers, and 255 where
    a pixel is left out. Where there are two classes and all masks hold 0 and 255 alone, 255 is the
    second class.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.seed = root, seed
        held_out = training = open_dataset(root)
        self.test: list[Pair] = [(held_out, place) for place in range(len(held_out))]
        try:
            training = open_dataset(root, "train")
            self.pairs: list[Pair] = [(training, place) for place in range(len(training))]
        except NoSuchSplit as error:
            if error.there:
                raise
            if len(held_out) < 2:
                raise ValueError(f"{root}: expected at least 2 pictures, got 1") from None
            step = min(10, len(held_out))
            self.pairs = [pair for pair in self.test if pair[1] % step]
            self.test = self.test[::step]
        if training.classes is None:
            raise ValueError(f"{root}: expected classes.txt, with the name of a class a line")
        self.classes = list(training.classes)
        if not 1 < len(self.classes) <= IGNORE:
            raise ValueError(
                f"{root}/classes.txt: expected 2 to {IGNORE} names, the background's among them, "
                f"got {len(self.classes)}"
            )
        self.binary = False
        self._check()

    def _check(self) -> None:
        """Read everything once: what is wrong is named now, and not after hours."""
        numbers: set[int] = set()
        wrong: list[str] = []
        with ThreadPoolExecutor() as threads:
            for held, problem in threads.map(self._look, self.test + self.pairs):
                numbers |= held
                wrong += [problem] if problem else []
        if wrong:
            more = [f"and {len(wrong) - 10} more"] if len(wrong) > 10 else []
            raise ValueError("\n".join(wrong[:10] + more))
        self.binary = len(self.classes) == 2 and numbers == {0, IGNORE}
        if self.binary:
            print(f"{self.root}: 0 and 255 alone, so 255 is taken for {self.classes[1]}")
        absent = [name for i, name in enumerate(self.classes) if i not in numbers]
        if absent and not self.binary:
            print(f"{self.root}: no mask has {', '.join(absent)}, which cannot be learned")

    def _look(self, pair: Pair) -> tuple[set[int], str]:
        """The numbers in a mask, and what is wrong with it or its picture."""
        try:
            _, labels = self._read(pair)
        except ValueError as error:
            return set(), str(error)
        held = set(np.unique(labels).tolist())
        unknown = sorted(held - {*range(len(self.classes)), IGNORE})
        if not unknown:
            return held, ""
        data, place = pair
        return held, (
            f"{data.names[place][1]}: expected the numbers of {len(self.classes)} classes, 0 to "
            f"{len(self.classes) - 1}, or {IGNORE} to leave a pixel out, got {unknown[:5]}; put "
            "class numbers in the place of grey values or colours, and count from 0"
        )

    def _read(self, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        """A picture (H, W, 3) and its labels (H, W); a ValueError names what is wrong."""
        data, place = pair
        picture, labels = data[place]
        name, of_mask = data.names[place]
        try:  # as the image processor reads it for `fastseg predict`
            image = PROCESSOR.bytes_and_scale(picture)[0]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from error
        if labels.shape != image.shape[:2]:
            raise ValueError(
                f"{of_mask}: expected the height and width of the picture, turned as its EXIF "
                f"orientation says, {image.shape[:2]}, got {labels.shape}"
            )
        if data.reduce_labels:  # 0 is no class
            labels = np.where(labels == 0, IGNORE, labels.astype(np.int64) - 1)
        if self.binary:
            labels = np.where(labels == IGNORE, 1, labels)
        return image, labels.astype(np.uint8) if labels.max() <= IGNORE else labels

    def train(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, place = divmod(index, len(self.pairs))
        order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation
        return self._read(self.pairs[order(len(self.pairs))[place]])

    def held_out(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return (self._read(pair) for pair in self.test)

    def describe(self) -> dict[str, Any]:
        return {"pictures": self.root.name, "train": len(self.pairs), "held_out": len(self.test)}


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 or float (H, W, 3) on 0..255 -> normalised float32 (3, H, W)."""
    pixels = (image.astype(np.float32) / 255 - MEAN) / STD
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def augment(
    image: np.ndarray, labels: np.ndarray, side: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A square crop at a random scale, mirrored or not, in other light."""
    height, width = labels.shape
    # Enlarged by 0.5 to 1.4 and a little stretched, but never so little that the crop would leave
    # the picture.
    scale, stretch = (math.exp(rng.uniform(*ends)) for ends in ((-0.7, 0.34), (-0.2, 0.2)))
    wide = min(side / (scale * stretch), width)
    tall = min(side * stretch / scale, height)
    x, y = rng.uniform(0, width - wide), rng.uniform(0, height - tall)
    box = (x, y, x + wide, y + tall)
    crop = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR, box=box)
    target = Image.fromarray(labels).resize((side, side), Image.Resampling.NEAREST, box=box)
    pixels, classes = np.asarray(crop, np.float32), np.asarray(target, np.int64)
    if rng.random() < 0.5:
        pixels, classes = pixels[:, ::-1], classes[:, ::-1]
    pixels = pixels * np.float32(rng.uniform(0.8, 1.2))  # brightness
    pixels = (pixels - 128) * np.float32(rng.uniform(0.8, 1.2)) + 128  # contrast
    grey = pixels.mean(2, keepdims=True)
    pixels = grey + (pixels - grey) * np.float32(rng.uniform(0.7, 1.3))  # saturation
    return to_tensor(np.clip(pixels, 0, 255)), torch.from_numpy(classes.copy())


class Crops(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Item i holds `per_picture` crops of training picture i, and depends on (seed, i) alone."""

    def __init__(self, pictures: Pictures, side: int, per_picture: int, seed: int) -> None:
        self.pictures, self.side, self.per_picture, self.seed = pictures, side, per_picture, seed

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = np.random.Generator(np.random.PCG64([self.seed, index]))
        image, labels = self.pictures.train(index)
        crops = [augment(image, labels, self.side, rng) for _ in range(self.per_picture)]
        return torch.stack([c[0] for c in crops]), torch.stack([c[1] for c in crops])

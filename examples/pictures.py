"""Pictures for examples/train.py: drawn scenes or a folder, and the augmentation of both.

Your own dataset goes here: a class with the four members of `Pictures`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from fastseg.demo.scenes import CLASSES, draw_scene

IGNORE = 255
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


class Folder:
    """images/, masks/ and classes.txt in a folder; every tenth picture is held out."""

    def __init__(self, root: Path, seed: int) -> None:
        self.classes = (root / "classes.txt").read_text().split("\n")
        self.classes = [name.strip() for name in self.classes if name.strip()]
        endings = {".jpg", ".jpeg", ".png", ".webp"}
        found = sorted(p for p in (root / "images").iterdir() if p.suffix.lower() in endings)
        pairs = [(path, root / "masks" / f"{path.stem}.png") for path in found]
        missing = [str(mask) for _, mask in pairs if not mask.exists()]
        if missing or len(pairs) < 2:
            raise FileNotFoundError(f"{root}: {len(pairs)} images; masks missing: {missing[:5]}")
        self.root, self.seed = root, seed
        self.test = pairs[:: min(10, len(pairs))]
        self.pairs = [pair for pair in pairs if pair not in self.test]

    @staticmethod
    def _read(pair: tuple[Path, Path]) -> tuple[np.ndarray, np.ndarray]:
        with Image.open(pair[0]) as image, Image.open(pair[1]) as mask:
            # Palette masks hold the class numbers themselves: convert would look up colours.
            if image.size != mask.size:
                raise ValueError(
                    f"{pair[1]}: expected the image's size {image.size}, got {mask.size}"
                )
            return np.asarray(image.convert("RGB")), np.asarray(mask, dtype=np.uint8)

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

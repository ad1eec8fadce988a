"""Drawn scenes with their true labels in a folder: pictures for whoever has none at hand."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from fastseg.datasets.layouts import CLASSES as CLASSES_FILE
from fastseg.demo.scenes import CLASSES, PALETTE, draw_scene
from fastseg.images.overlay import label_image

from .files import Source, is_own, write_png

SIZE = (512, 512)


def write_scenes(folder: Path, seeds: range) -> None:
    """Write images/, masks/ and classes.txt, as `fastseg evaluate` and examples/train.py read them.

    Raises:
        OSError: they cannot be written, or would replace files that are not fastseg's.
        ValueError: a seed is negative.
    """
    names = folder / CLASSES_FILE
    text = "\n".join(CLASSES) + "\n"
    if names.exists() and names.read_text(encoding="utf-8") != text:
        raise FileExistsError(f"{names} lists other classes")
    for seed in seeds:
        scene = draw_scene(seed, SIZE)
        name = f"scene-{seed:04d}.png"
        picture, mask = folder / "images" / name, folder / "masks" / name
        for path, image in (
            (picture, Image.fromarray(scene.image)),
            (mask, label_image(scene.labels, PALETTE)),
        ):
            if path.exists() and not is_own(path):
                raise FileExistsError(f"{path} is not fastseg's")
            write_png(path, image, Source(picture))
    names.write_text(text, encoding="utf-8")

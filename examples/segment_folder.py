"""Segment a folder of pictures with a model of transformers, and count each class's share.

python examples/segment_folder.py photos/ --model DIR_OR_ID

`fastseg predict` is the command for it, with overlays, sliding windows and broken pictures named;
this is the loop, to be changed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

import fastseg
from fastseg.images.overlay import class_shares, label_image
from fastseg.images.palettes import config_palette

ENDINGS = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True, help="a hub id, a folder or a file")
    parser.add_argument("--output", type=Path, default=Path("maps"))
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()

    model = fastseg.from_pretrained(arguments.model)
    colours = config_palette(model.config)
    paths = sorted(p for p in arguments.folder.iterdir() if p.suffix.lower() in ENDINGS)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(paths), arguments.batch_size):
        batch = paths[start : start + arguments.batch_size]
        images = [Image.open(path) for path in batch]
        for path, labels in zip(batch, fastseg.segment(model, images), strict=True):
            label_image(labels, colours).save(arguments.output / f"{path.stem}.png")
            largest = class_shares(labels, model.config.id2label)[0]
            print(f"{path.name}: {largest.name} {largest.share:.0%}")


if __name__ == "__main__":
    main()

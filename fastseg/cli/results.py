"""The files made of one segmented picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fastseg.images.overlay import class_shares, config_palette, label_image, overlay

from .files import JSON, LABELS, OVERLAY, Source, Target, write_json, write_png
from .options import CommandError


@dataclass
class ResultWriter:
    """Writer of the files that `endings` lists; `model` is how JSON files name the model."""

    config: Any
    model: str
    endings: Sequence[str] = (LABELS, OVERLAY)
    alpha: float = 0.55

    def __post_init__(self) -> None:
        try:
            self.colours = config_palette(self.config)
        except ValueError as error:
            raise CommandError(f"--model {self.model}: {error}") from error

    def write(self, target: Target, source: Source, image: Image.Image, labels: np.ndarray) -> None:
        """Write the files of one picture: `labels` (H, W), of the size of `image`, from `source`.

        Raises:
            OSError: a file cannot be written.
        """
        names = self.config.id2label
        if LABELS in self.endings:
            write_png(target.path(LABELS), label_image(labels, self.colours), source)
        if OVERLAY in self.endings:
            picture = overlay(image, labels, self.colours, names, alpha=self.alpha)
            write_png(target.path(OVERLAY), picture, source)
        if JSON in self.endings:
            classes = [
                {"id": item.id, "name": item.name, "pixels": item.pixels, "share": item.share}
                for item in class_shares(labels, names)
            ]
            content = {
                "model": self.model,
                "image": str(source.path),
                "page": source.page,
                "width": image.width,
                "height": image.height,
                "classes": classes,
            }
            write_json(target.path(JSON), content, source)

"""The files made of one segmented picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastseg.images.overlay import class_shares, label_image, overlay
from fastseg.inference.scores import IGNORED

from .classes import Classes
from .files import (
    JSON,
    LABELS,
    OVERLAYS,
    SCORES,
    Source,
    Target,
    write_jpeg,
    write_json,
    write_png,
)
from .rasters import visible

# Forms of label maps: an indexed image with the classes' colours, and a grey one.
PALETTE, GREY = "palette", "grey"

_NOT_CERTAIN = {IGNORED: "not certain"}


@dataclass
class ResultWriter:
    """Writer of the files that `endings` lists; `model` is how JSON files name the model."""

    classes: Classes
    model: str
    endings: Sequence[str] = (LABELS, OVERLAYS["png"])
    alpha: float = 0.55
    form: str = PALETTE

    def write(
        self,
        target: Target,
        source: Source,
        image: Any,
        labels: np.ndarray,
        scores: torch.Tensor | None = None,
    ) -> None:
        """Write the files of one picture: `labels` (H, W), of the size of `image`, from `source`.

        `image` is PIL's, or an array (H, W, bands); `scores` are uint8 (H, W).

        Raises:
            OSError: a file cannot be written.
        """
        shown = self.classes.show(labels)
        numbers, written = self.classes.write(shown), self.classes.written()
        if LABELS in self.endings:
            grey = self.form == GREY
            picture = label_image(numbers, written.colours, grey)
            write_png(target.path(LABELS), picture, source, runs=True)
        for form, ending in OVERLAYS.items():
            if ending in self.endings:
                colours, names = self.classes.colours, {**_NOT_CERTAIN, **self.classes.names}
                picture = overlay(visible(image), shown, colours, names, alpha=self.alpha)
                write = write_jpeg if form == "jpg" else write_png
                write(target.path(ending), picture, source)
        if SCORES in self.endings and scores is not None:
            write_png(target.path(SCORES), Image.fromarray(scores.cpu().numpy()), source)
        if JSON in self.endings:
            classes = [
                {"id": item.id, "name": item.name, "pixels": item.pixels, "share": item.share}
                for item in class_shares(numbers, {**_NOT_CERTAIN, **written.names})
            ]
            height, width = labels.shape
            content = {
                "model": self.model,
                "image": str(source.path),
                "page": source.page,
                "width": width,
                "height": height,
                "classes": classes,
            }
            write_json(target.path(JSON), content, source)

"""The files made of one segmented picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastseg.images.overlay import class_shares, label_image, overlay
from fastseg.images.rasters import visible
from fastseg.inference.result import Result
from fastseg.inference.scores import IGNORED

from .classes import Classes
from .files import (
    CUTOUT,
    JSON,
    LABELS,
    OVERLAYS,
    POLYGONS,
    SCORES,
    Source,
    Target,
    write_jpeg,
    write_json,
    write_png,
)

# Forms of label maps: an indexed image with the classes' colours, and a grey one.
PALETTE, GREY = "palette", "grey"

_NOT_CERTAIN = {IGNORED: "not certain"}


@dataclass
class ResultWriter:
    """Writer of the files that `endings` lists; `model` is how JSON files name the model.

    With `describes` it tells of each picture what JSON files do, whether they are written or not,
    and with `annotates` what COCO's annotations do. Cut-outs are of the classes `cut`.
    """

    classes: Classes
    model: str
    endings: Sequence[str] = (LABELS, OVERLAYS["png"])
    alpha: float = 0.55
    form: str = PALETTE
    describes: bool = False
    annotates: bool = False
    cut: Sequence[int] = ()

    def write(
        self,
        target: Target,
        source: Source,
        image: Any,
        labels: np.ndarray,
        scores: np.ndarray | None = None,
    ) -> dict[str, Any]:
        """Write the files of one picture: `labels` (H, W), of the size of `image`, from `source`.

        `image` is PIL's, or an array (H, W, bands); `scores` are uint8 (H, W).

        Returns:
            width, height and classes, as in JSON files, and annotations: as they are asked for.

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
            write_png(target.path(SCORES), Image.fromarray(scores), source)
        if CUTOUT in self.endings:
            own = self.classes
            result = Result(torch.from_numpy(shown), visible(image), own.names, own.colours)
            write_png(target.path(CUTOUT), result.cutout(self.cut), source)
        result = Result(torch.from_numpy(numbers), image, written.names, written.colours)
        if POLYGONS in self.endings:
            write_json(target.path(POLYGONS), result.to_geojson(), source)
        annotations = {}
        if self.annotates:
            known = [one for one in result.coco() if one["category_id"] in written.names]
            annotations = {"annotations": known}
        height, width = labels.shape
        size = {"width": width, "height": height}
        if JSON not in self.endings and not self.describes:
            return {**size, **annotations} if annotations else {}
        classes = [
            {"id": item.id, "name": item.name, "pixels": item.pixels, "share": item.share}
            for item in class_shares(numbers, {**_NOT_CERTAIN, **written.names})
        ]
        described = {**size, "classes": classes}
        if JSON in self.endings:
            content = {"model": self.model, "image": str(source.path), "page": source.page}
            write_json(target.path(JSON), {**content, **described}, source)
        return {**described, **annotations}

"""Test-time augmentation: views of an image at several scales, mirrored too, taken together.

As mmseg's SegTTAModel does it: the logits of each view are mirrored back and resized to the image's
own size, and the mean of their probabilities, softmax, decides. mmseg resizes logits to the size of
the view first and then to that of the image, here they are resized once, as without augmentation.
Probabilities of all classes exist for a stripe of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fastseg.images.label_maps import logits_of
from fastseg.kernels.blocks.bilinear import (
    Neighbours,
    bilinear_neighbours,
    row_stripes,
    upsample_rows,
)

from .scores import LabelMap, Wanted
from .sliding import SlidingLogits

FLIP = "flip"

# From rows `top` and `bottom` of the image to a view's logits there, (rows, width, classes).
_Rows = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class Views:
    """Which views of an image are taken: at each of `scales`, and with `flip` mirrored as well."""

    scales: tuple[float, ...]
    flip: bool

    @classmethod
    def of(cls, tta: Any) -> Views | None:
        """Check the argument of `segment`: "flip" and scales; None where it is None.

        The image as it is, at scale 1, is always among the views.
        """
        if tta is None:
            return None
        if isinstance(tta, str) or not isinstance(tta, Sequence) or not tta:
            raise ValueError(f"tta: expected a list of 'flip' and scales, got {tta!r}")
        scales = [1.0]
        for item in tta:
            if item == FLIP:
                continue
            number = isinstance(item, int | float) and not isinstance(item, bool)
            if not (number and 0 < item < float("inf")):
                raise ValueError(f"tta: expected 'flip' or scales above 0, got {item!r}")
            scales.append(float(item))
        return cls(tuple(dict.fromkeys(scales)), FLIP in tta)


def augmented_labels(
    model: Any,
    inputs: Sequence[Any],
    flip: bool,
    windows: tuple[tuple[int, int], tuple[int, int]] | None,
    batch_size: int,
    wanted: Wanted,
) -> LabelMap:
    """The label map (H, W) of one image, and its scores.

    Args:
        model: gives logits (B, K, h, w) of any resolution.
        inputs: the image as `Prepared` (steps.py), on the device, at each scale.
        flip: whether it is seen mirrored as well.
        windows: (crop, stride), each (height, width), of sliding windows; None takes views whole.
        batch_size: windows in one forward.
    """
    rows: list[_Rows] = []
    for one in inputs:
        pixels = [one.pixel_values]
        if flip:
            width = one.unpadded[1]  # what is behind is padding
            mirrored = one.pixel_values.clone()
            mirrored[..., :width] = mirrored[..., :width].flip(3)
            pixels.append(mirrored)
        if windows is None:
            logits = logits_of(model(torch.cat(pixels), **one.scale))
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            padded, (height, width) = one.pixel_values.shape[2:], one.unpadded
            if padded != one.unpadded:
                logits = F.interpolate(logits, size=padded, mode="bilinear", align_corners=False)
                logits = logits[:, :, :height, :width]
            grids = logits.permute(0, 2, 3, 1).contiguous()
            rows += [_whole_rows(grid, one.size, index) for index, grid in enumerate(grids)]
        else:

            def forward(batch: torch.Tensor, one: Any = one) -> Any:
                return model(batch, **one.scale)

            slides = [SlidingLogits(forward, image, *windows, batch_size) for image in pixels]
            rows += [_sliding_rows(s, one, index) for index, s in enumerate(slides)]
    return _mean_labels(rows, inputs[0].size, wanted)


def _whole_rows(grid: torch.Tensor, size: tuple[int, int], mirrored: int) -> _Rows:
    """Rows of a view (h, w, K) resized to `size`."""
    grid = grid.flip(1) if mirrored else grid
    grid = grid.clamp(min=torch.finfo(grid.dtype).min / 4)  # -inf would turn to NaN where blended
    places = bilinear_neighbours(size[0], grid.shape[0], grid.device, grid.dtype)
    return lambda top, bottom: upsample_rows(grid[None], places, top, bottom, size[1])[0]


def _sliding_rows(slide: SlidingLogits, one: Any, mirrored: int) -> _Rows:
    """Rows of the mean over windows of a view, resized to the image's size."""
    height, width = one.size
    device = one.pixel_values.device
    places = bilinear_neighbours(height, one.unpadded[0], device, torch.float32)

    def rows(top: int, bottom: int) -> torch.Tensor:
        first, last = int(places.lower[top]), int(places.upper[bottom - 1]) + 1
        grid = slide.rows(first, last)[:, : one.unpadded[1]]
        grid = grid.flip(1) if mirrored else grid
        near = Neighbours(places.lower - first, places.upper - first, places.weight)
        return upsample_rows(grid[None], near, top, bottom, width)[0]

    return rows


def _mean_labels(views: Sequence[_Rows], size: tuple[int, int], wanted: Wanted) -> LabelMap:
    """The class whose mean probability over the views is the highest, and that probability."""
    height, width = size
    found = views[0](0, 1)
    classes, device = found.shape[2], found.device
    wanted.check(classes)
    labels = torch.empty(height, width, dtype=wanted.labels, device=device)
    probability = torch.empty(height, width, dtype=found.dtype, device=device)
    for top, bottom in row_stripes(height, width * classes * 4, device):
        mean = torch.zeros(bottom - top, width, classes, dtype=found.dtype, device=device)
        for rows in views:
            found = rows(top, bottom)
            if not wanted.of_probabilities:
                found = found.softmax(dim=2) if classes > 1 else found.sigmoid()
            mean += found
        mean /= len(views)
        probability[top:bottom], labels[top:bottom] = mean.max(dim=2)
    if classes == 1:  # is it, or is it not
        labels = (probability > 0.5).to(wanted.labels)
    return wanted.finish(labels, probability if wanted.probability else None, classes)

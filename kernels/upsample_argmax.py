"""From logits to a label map of any size, without interpolating classes that cannot win.

`interpolate(logits).argmax(1)` blends every class at every pixel. But where the four logits around
a pixel agree on the highest class, that class is the highest of any convex combination of the four
too: only pixels between corners that disagree, those on a class border, need all classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .backend import select_backend
from .bilinear import Source, bilinear_source, row_stripes, upsample_rows

# The index arithmetic of one border pixel costs as much as blending so many classes (measured on a
# CPU: 0.058, 0.065 and 0.145 us a pixel for 2, 19 and 150 classes, against 0.008, 0.036 and 0.143
# for a pixel of a whole stripe).
_CLASSES_PER_INDEX = 45
# Up to here one piece is the quickest: 1.8 ms for 2 classes at 512x512, against 2.9 in stripes.
_FEW_CLASSES = 5
_PIXELS_PER_CHUNK = 8192


def upsample_argmax(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The class with the highest logit at every pixel of a map of `size`.

    Equal to `interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)` wherever
    the two highest classes differ by more than rounding; among exact ties the lowest class wins.
    Half-precision logits are blended in float32.

    Args:
        logits: (B, K, h, w), floating; quickest in channels-last memory.
        size: (H, W) of the label map.

    Returns:
        (B, H, W), int64.

    Raises:
        TypeError: `logits` is not a floating tensor.
        ValueError: `logits` is not 4-D or has no class, or `size` is not two positive integers.
    """
    height, width = _check(logits, size)
    if not torch.compiler.is_compiling():
        select_backend(logits.device)
    batch, classes, grid_height, grid_width = logits.shape
    if classes == 1:
        return torch.zeros(batch, height, width, dtype=torch.int64, device=logits.device)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    # A class masked by -inf would turn to NaN where it is blended.
    logits = logits.clamp(min=torch.finfo(logits.dtype).min / 4)
    few = classes <= _FEW_CLASSES
    if few or height * width < 4 * grid_height * grid_width:
        # A map hardly larger than the logits, or a few classes: to look for borders first, or to
        # work in stripes, would not pay.
        if few:
            logits = logits.contiguous(memory_format=torch.channels_last)
        resized = F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
        return resized.max(dim=1).indices
    grid = logits.permute(0, 2, 3, 1).contiguous()
    rows = bilinear_source(height, grid.shape[1], grid.device, grid.dtype)
    # How many pixels lie on a border is not known to a graph, nor to a GPU's queue.
    if grid.device.type != "cpu" or torch.compiler.is_compiling():
        return _all_pixels(grid, rows, width)

    labels = grid.max(dim=-1).indices
    mixed = _mixed_cells(labels)
    share = mixed.count_nonzero().item() / max(mixed.numel(), 1)
    if share * (classes + _CLASSES_PER_INDEX) > classes:
        return _all_pixels(grid, rows, width)
    columns = bilinear_source(width, grid.shape[2], grid.device, grid.dtype)
    return _border_pixels(grid, labels, mixed, rows, columns)


def _check(logits: torch.Tensor, size: Sequence[int]) -> tuple[int, int]:
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        got = getattr(logits, "dtype", type(logits).__name__)
        raise TypeError(f"logits: expected a floating-point tensor, got {got}")
    if logits.ndim != 4 or 0 in logits.shape[1:]:
        raise ValueError(
            f"logits: expected shape (batch, classes, height, width), got {tuple(logits.shape)}"
        )
    if not isinstance(size, Sequence) or len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: expected a positive height and width, got {size!r}")
    return int(size[0]), int(size[1])


def _all_pixels(grid: torch.Tensor, rows: Source, width: int) -> torch.Tensor:
    """Blend and compare all classes, a stripe of rows at a time."""
    batch, _, _, classes = grid.shape
    height = rows.lower.shape[0]
    labels = torch.empty(batch, height, width, dtype=torch.int64, device=grid.device)
    row_bytes = batch * width * classes * grid.element_size()
    for top, bottom in row_stripes(height, row_bytes, grid.device):
        # max() is twice as quick as argmax() here; both give the first of equal values.
        stripe = upsample_rows(grid, rows, top, bottom, width)
        labels[:, top:bottom] = stripe.max(dim=-1).indices
    return labels


def _mixed_cells(labels: torch.Tensor) -> torch.Tensor:
    """Whether a label (B, h, w) and its neighbours right, below and diagonal are not all equal."""
    right = torch.cat([labels[:, :, 1:], labels[:, :, -1:]], dim=2)
    below = torch.cat([labels[:, 1:], labels[:, -1:]], dim=1)
    differs_right = labels != right
    differs_right_below = torch.cat([differs_right[:, 1:], differs_right[:, -1:]], dim=1)
    return differs_right | differs_right_below | (labels != below)


def _border_pixels(
    grid: torch.Tensor, labels: torch.Tensor, mixed: torch.Tensor, rows: Source, columns: Source
) -> torch.Tensor:
    """Spread `labels` over their cells, and blend all classes in the mixed cells alone."""
    _, grid_height, grid_width, classes = grid.shape
    logits = grid.view(-1, classes)
    fine = labels[:, rows.lower][:, :, columns.lower]
    image, y, x = mixed[:, rows.lower][:, :, columns.lower].nonzero(as_tuple=True)
    height, width = fine.shape[1:]
    pixels = (image * height + y) * width + x
    for start in range(0, len(pixels), _PIXELS_PER_CHUNK):
        chunk = slice(start, start + _PIXELS_PER_CHUNK)
        row, column, first = y[chunk], x[chunk], image[chunk] * grid_height
        upper_row = (first + rows.lower[row]) * grid_width
        lower_row = (first + rows.upper[row]) * grid_width
        left, right = columns.lower[column], columns.upper[column]
        down, across = rows.weight[row], columns.weight[column]
        corners = torch.stack(
            [upper_row + left, upper_row + right, lower_row + left, lower_row + right], dim=1
        )
        weights = torch.stack(
            [
                (1 - down) * (1 - across),
                (1 - down) * across,
                down * (1 - across),
                down * across,
            ],
            dim=1,
        )
        blended = F.embedding_bag(corners, logits, per_sample_weights=weights, mode="sum")
        fine.view(-1)[pixels[chunk]] = blended.max(dim=-1).indices
    return fine

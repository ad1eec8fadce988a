"""Sliding-window inference in mmseg's manner, without a full-size canvas of all classes.

Windows of `crop` pixels stand `stride` apart, the last of a row or column moved back inside the
image. A window's logits are resized to its own size; a pixel's score is the mean over the windows
that cover it. The mean has the same argmax as the sum, so nothing is divided but for probabilities.
Sums exist for a stripe of rows at a time, and a window's logits for as long as rows of it are
missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch

from fastseg.images.label_maps import logits_of
from fastseg.kernels.blocks.bilinear import bilinear_neighbours, row_stripes, upsample_rows
from fastseg.kernels.labels.scores import highest_probability

from .scores import LabelMap, Wanted


class _WindowRow(NamedTuple):
    top: int
    bottom: int
    logits: torch.Tensor  # (windows, h, w, classes), left to right


def window_pair(name: str, value: Any) -> tuple[int, int]:
    """`value` as (height, width).

    Raises:
        ValueError: neither a positive integer nor two of them.
    """
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or not all(isinstance(side, Integral) and int(side) > 0 for side in pair):
        raise ValueError(f"slide: expected a {name} of one or two positive integers, got {value!r}")
    return int(pair[0]), int(pair[1])


def window_starts(size: int, crop: int, stride: int) -> list[int]:
    """Starts of the windows along an axis of `size` pixels.

    Raises:
        ValueError: `stride` is larger than `crop`: pixels between windows would be left out.
    """
    if stride > crop:
        raise ValueError(
            f"slide: expected a stride of at most the crop, got stride {stride} and crop {crop}"
        )
    crop = min(crop, size)
    count = max(size - crop + stride - 1, 0) // stride + 1
    return [min(index * stride, size - crop) for index in range(count)]


def sliding_labels(
    model: Any,
    pixel_values: torch.Tensor,
    crop: tuple[int, int],
    stride: tuple[int, int],
    batch_size: int,
    wanted: Wanted,
) -> LabelMap:
    """The label map (H, W) of one image, and its scores.

    Args:
        model: gives logits (B, K, h, w) of any resolution.
        pixel_values: (1, C, H, W).
        crop, stride: (height, width).
        batch_size: windows in one forward.
        wanted: whether there are to be scores, and of what dtype, and the threshold of labels.
    """
    height, width = pixel_values.shape[2:]
    tops = window_starts(height, crop[0], stride[0])
    lefts = window_starts(width, crop[1], stride[1])
    crop_height, crop_width = min(crop[0], height), min(crop[1], width)
    device, classes = pixel_values.device, 0
    labels = torch.empty(height, width, dtype=wanted.labels, device=device)
    probability = None
    if wanted.probability:  # first the number of windows over each pixel
        rows = _window_counts(tops, crop_height, height)
        columns = _window_counts(lefts, crop_width, width)
        probability = (rows[:, None] * columns).to(device)
    open_rows: list[_WindowRow] = []
    for index, top in enumerate(tops):
        row = pixel_values[0, :, top : top + crop_height]
        grid = _window_logits(model, row, lefts, crop_width, batch_size)
        classes = grid.shape[3]
        wanted.check(classes)
        open_rows.append(_WindowRow(top, top + crop_height, grid))
        # Rows above the next window row are covered by all windows that they will have.
        finished = tops[index + 1] if index + 1 < len(tops) else height
        _label_rows(labels, probability, top, finished, open_rows, lefts, crop_width, wanted)
        open_rows = [row for row in open_rows if row.bottom > finished]
    return wanted.finish(labels, probability, classes)


class SlidingLogits:
    """The mean logits of windows over one image, a few rows at a time.

    Args: as of `sliding_labels`.
    """

    def __init__(
        self,
        model: Any,
        pixel_values: torch.Tensor,
        crop: tuple[int, int],
        stride: tuple[int, int],
        batch_size: int,
    ) -> None:
        self.height, self.width = pixel_values.shape[2:]
        tops = window_starts(self.height, crop[0], stride[0])
        self._lefts = window_starts(self.width, crop[1], stride[1])
        crop_height, self._crop_width = min(crop[0], self.height), min(crop[1], self.width)
        self._rows = []
        for top in tops:
            row = pixel_values[0, :, top : top + crop_height]
            grid = _window_logits(model, row, self._lefts, self._crop_width, batch_size)
            self._rows.append(_WindowRow(top, top + crop_height, grid))
        device = pixel_values.device
        self._row_counts = _window_counts(tops, crop_height, self.height).to(device)
        self._column_counts = _window_counts(self._lefts, self._crop_width, self.width).to(device)

    def rows(self, top: int, bottom: int) -> torch.Tensor:
        """Rows `top` to `bottom`, (bottom - top, width, classes)."""
        sums = _sum_windows(top, bottom, self._rows, self._lefts, self._crop_width, self.width)
        counts = self._row_counts[top:bottom, None] * self._column_counts
        return sums.div_(counts[:, :, None])


def _window_logits(
    model: Any, row: torch.Tensor, lefts: list[int], crop_width: int, batch_size: int
) -> torch.Tensor:
    """Logits of a row of windows, (windows, h, w, classes), from its pixels (C, H, W)."""
    # (windows, C, crop_height, crop_width)
    windows = torch.stack([row[:, :, left : left + crop_width] for left in lefts])
    logits = [logits_of(model(batch)).float() for batch in windows.split(batch_size)]
    return torch.cat(logits).permute(0, 2, 3, 1).contiguous()


def _window_counts(starts: list[int], crop: int, size: int) -> torch.Tensor:
    """How many windows lie over each pixel of an axis, (size,) float32."""
    counts = torch.zeros(size)
    for start in starts:
        counts[start : start + crop] += 1
    return counts


def _label_rows(
    labels: torch.Tensor,
    probability: torch.Tensor | None,
    first: int,
    last: int,
    window_rows: list[_WindowRow],
    lefts: list[int],
    crop_width: int,
    wanted: Wanted,
) -> None:
    """Sum the windows' logits over rows `first` to `last`, and write the highest class.

    `probability`, which has the number of windows, gets the probability of that class.
    """
    width = labels.shape[1]
    classes = window_rows[0].logits.shape[3]
    for start, stop in row_stripes(last - first, width * classes * 4, labels.device):
        top, bottom = first + start, first + stop
        sums = _sum_windows(top, bottom, window_rows, lefts, crop_width, width)
        # One class: is it, or is it not.
        labels[top:bottom] = sums.max(dim=-1).indices if classes > 1 else sums[..., 0] > 0
        if probability is not None:
            sums /= probability[top:bottom, :, None]
            if classes == 1:
                found = sums[..., 0].sigmoid()
            else:
                found = sums.amax(dim=-1) if wanted.of_probabilities else highest_probability(sums)
            probability[top:bottom] = found


def _sum_windows(
    top: int,
    bottom: int,
    window_rows: list[_WindowRow],
    lefts: list[int],
    crop_width: int,
    width: int,
) -> torch.Tensor:
    """Sum of the windows' logits over rows `top` to `bottom`, (bottom - top, width, classes)."""
    grid = window_rows[0].logits
    sums = torch.zeros(bottom - top, width, grid.shape[3], device=grid.device)
    for row in window_rows:
        begin, end = max(top, row.top), min(bottom, row.bottom)
        if begin >= end:
            continue
        grid = row.logits
        rows = bilinear_neighbours(row.bottom - row.top, grid.shape[1], grid.device, grid.dtype)
        for window, left in zip(grid, lefts, strict=True):
            sums[begin - top : end - top, left : left + crop_width] += upsample_rows(
                window[None], rows, begin - row.top, end - row.top, crop_width
            )[0]
    return sums

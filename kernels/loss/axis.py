"""Where pixels of a resized axis lie on the source axis, in integers."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Axis(NamedTuple):
    """Pixel i lies at (i * divisor + offset) / step of the source axis, at 0 where that is less.

    That is (i + 1/2) * source / size - 1/2, or i * (source - 1) / (size - 1) where corners align.
    """

    step: int
    offset: int
    divisor: int

    @classmethod
    def of(cls, size: int, source: int, align_corners: bool) -> Axis:
        """The axis of `size` pixels resized from `source` positions, as `interpolate` has it."""
        if not align_corners:
            return cls(2 * size, source - size, 2 * source)
        if source == 1:  # all pixels in the one cell, wherever in it
            return cls(size, 0, 1)
        return cls(max(size - 1, 1), 0, source - 1)

    def shares(self, size: int, source: int, like: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """(size, source) share of each position in each pixel, and where each begins."""
        pixel = torch.arange(size)
        place = (pixel * self.divisor + self.offset).clamp_(min=0)
        lower = (place // self.step).clamp_(max=source - 1)
        upper = (lower + 1).clamp_(max=source - 1)
        weight = (place - lower * self.step).double() / self.step
        matrix = torch.zeros(size, source, dtype=torch.float64)
        matrix[pixel, lower] = 1 - weight
        matrix[pixel, upper] += weight
        return matrix.to(like), lower.tolist()

"""How a coarser map is resized to the finest: rows first, or columns first, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastseg.kernels.loss.axis import Axis


class Stage(NamedTuple):
    """How a coarser map (h, w) is resized to (H, W)."""

    down: torch.Tensor  # (H, h) the share of each row in each
    across: torch.Tensor  # (W, w)
    first: list[int]  # the first row that each of the H has a share of

    @classmethod
    def of(cls, size: Sequence[int], grid: Sequence[int], like: torch.Tensor) -> Stage:
        pairs = zip(size, grid, strict=True)
        (down, first), (across, _) = (Axis.of(*pair, False).shares(*pair, like) for pair in pairs)
        return cls(down, across, first)

    def rows(self, stripe: slice) -> slice:
        """The rows of the map that the rows of a stripe lie between."""
        return slice(self.first[stripe.start], self.first[stripe.stop - 1] + 2)

    def mean(self, one: torch.Tensor) -> torch.Tensor:
        """(C,) the mean of a map (B, h, w, C) after resizing."""
        weights = torch.outer(self.down.mean(0), self.across.mean(0)).flatten()
        return weights @ one.flatten(1, 2).mean(0, dtype=weights.dtype)

    def widen(self, grid: torch.Tensor) -> torch.Tensor:
        """(h, w, D) -> (h, W D)."""
        size = len(grid), len(self.across)
        wide = F.interpolate(grid[None].permute(0, 3, 1, 2), size, mode="bilinear")
        return wide[0].permute(1, 2, 0).reshape(len(grid), -1)

    def narrow(self, wide: torch.Tensor) -> torch.Tensor:
        """The adjoint: (h, W D) -> (h w, D)."""
        wide = wide.view(len(wide), len(self.across), -1)
        return (self.across.t() @ wide).flatten(0, 1)

"""The sum of a decode head's coarse maps, each upsampled to the finest, a stripe of rows at a time.

Bilinear upsampling is linear along each axis: with the shares of source rows R_i and of source
columns C_i, two that are not 0 in each row, a map P_i gives R_i P_i C_i^T. So a CPU may multiply:

- "shares", in float32: columns by torch's upsampling, where a stripe has few source rows, then rows
  by a product that adds to the sum.
- "products", in bfloat16: rows first, between their two source rows, which leaves few columns to
  be kept, then all maps' columns by one product. Heads of B0 and B2 took 0.5 and 0.6 of the time
  on one core with AMX, 0.4 and 0.5 on two.

Elsewhere it is "neighbours": both axes as torch resizes them. In a traced graph that is the form
for any size; autocast would round the shares, and TF32 on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from ..blocks.bilinear import (
    bilinear_neighbours,
    row_shares,
    share_rows,
    source_window,
    upsample_rows,
)
from ..blocks.onednn import plain_on_cpu
from ..core.checks import autocasts

# Of "products": columns of a tile. Each reads a share of all source columns of the tile, so that
# operations grow with it, and calls with their number.
_TILE = 256


class UpsampledSum:
    """The sum of maps (B, h_i, w_i, D) resized to `height` x `width`.

    Attributes:
        dtype: of the sum. Except by "products" it is float32 at least: in half precision each of
            its terms would be rounded again, which one convolution over concatenated maps does not.
    """

    def __init__(self, maps: Sequence[torch.Tensor], height: int, width: int) -> None:
        like = maps[0] if maps else torch.empty(0)
        wide = torch.promote_types(like.dtype, torch.float32)
        if like.dtype == torch.bfloat16 and plain_on_cpu(*maps):
            self.form = "products"
        elif like.device.type != "cpu" or torch.compiler.is_compiling() or autocasts(like.device):
            self.form = "neighbours"
        else:
            self.form = "shares"
        self.dtype = like.dtype if self.form == "products" else wide
        self._maps = [one.to(self.dtype) for one in maps]
        self._size = (height, width)
        self._rows = [bilinear_neighbours(height, one.shape[1], one.device, wide) for one in maps]
        if self.form == "shares":
            self._row_shares = [
                row_shares(rows, one.shape[1]) for rows, one in zip(self._rows, maps, strict=True)
            ]
        if self.form == "products":
            sizes = [one.shape[2] for one in maps]
            columns = [bilinear_neighbours(width, size, like.device, wide) for size in sizes]
            self._column_shares = [
                row_shares(places, size).to(self.dtype)
                for places, size in zip(columns, sizes, strict=True)
            ]

    def stripe(self, images: slice | None, top: int, bottom: int) -> torch.Tensor | None:
        """Rows `top` to `bottom` of some images, or all: (B, rows, width, D); None without maps."""
        maps = self._maps if images is None else [one[images] for one in self._maps]
        if not maps:
            return None
        by_form = {
            "products": self._by_products,
            "shares": self._by_shares,
            "neighbours": self._by_neighbours,
        }
        return by_form[self.form](maps, top, bottom)

    def _by_neighbours(self, maps: Sequence[torch.Tensor], top: int, bottom: int) -> torch.Tensor:
        first, *others = (
            upsample_rows(one, rows, top, bottom, self._size[1])
            for one, rows in zip(maps, self._rows, strict=True)
        )
        for other in others:
            first.add_(other)
        return first

    def _by_shares(self, maps: Sequence[torch.Tensor], top: int, bottom: int) -> torch.Tensor:
        width = self._size[1]
        total: torch.Tensor | None = None
        for one, of_rows in zip(maps, self._row_shares, strict=True):
            shares, widened = share_rows(one, of_rows, top, bottom, width)
            shares = shares.expand(len(widened), -1, -1)
            total = torch.bmm(shares, widened) if total is None else total.baddbmm_(shares, widened)
        assert total is not None
        return total.unflatten(2, (width, -1))

    def _by_products(self, maps: Sequence[torch.Tensor], top: int, bottom: int) -> torch.Tensor:
        batch, depth, width = len(maps[0]), maps[0].shape[3], self._size[1]
        result = maps[0].new_empty(batch, bottom - top, width, depth)
        edges = [*range(0, width, _TILE), width]
        for image in range(batch):
            for left, right in itertools.pairwise(edges):
                of_image = [one[image] for one in maps]
                self._tile(of_image, top, bottom, left, right, result[image, :, left:right])
        return result

    def _tile(
        self,
        maps: Sequence[torch.Tensor],
        top: int,
        bottom: int,
        left: int,
        right: int,
        output: torch.Tensor,
    ) -> None:
        """Write (bottom - top, right - left, D) of one image's maps (h_i, w_i, D)."""
        height, width = self._size
        columns = [source_window(left, right, width, one.shape[1]) for one in maps]
        depth, count = maps[0].shape[2], sum(last - first for first, last in columns)
        # Rows at their places, source columns of all maps side by side.
        grid = maps[0].new_empty(bottom - top, count * depth)
        end = 0
        for one, rows, (first, last) in zip(maps, self._rows, columns, strict=True):
            above, below = source_window(top, bottom, height, one.shape[0])
            source = one[above:below, first:last].flatten(1)
            lower, upper = (
                source.index_select(0, places[top:bottom] - above)
                for places in (rows.lower, rows.upper)
            )
            weight = rows.weight[top:bottom, None].to(source.dtype)
            torch.lerp(lower, upper, weight, out=grid[:, end : end + source.shape[1]])
            end += source.shape[1]
        of_columns = torch.cat(
            [
                shares[left:right, first:last]
                for shares, (first, last) in zip(self._column_shares, columns, strict=True)
            ],
            dim=1,
        )
        torch.bmm(
            of_columns.expand(bottom - top, -1, -1),
            grid.view(bottom - top, count, depth),
            out=output,
        )

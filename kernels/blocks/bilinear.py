"""Bilinear upsampling of channels-last grids, a stripe of rows at a time."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..core.checks import is_exporting

# On a CPU a stripe stays in the cache, and small enough for the allocator to keep its pages: larger
# ones are mapped and zeroed anew at every call. Forward of B0 / B2 at 512x512 with stripes of
# 1, 2, 4, 8, 16 and 64 MB: 69 / 283, 63 / 259, 61 / 255, 65 / 252, 78 / 291 and 80 / 353 ms.
STRIPE_BYTES = 4 << 20
GPU_STRIPE_BYTES = 1 << 30


class Neighbours(NamedTuple):
    """Places of a resized axis' positions on the source axis."""

    lower: torch.Tensor  # (size,) int64: the neighbour before
    upper: torch.Tensor  # (size,) int64: the neighbour after
    weight: torch.Tensor  # (size,): of the neighbour after


def row_stripes(
    height: int, row_bytes: int, device: torch.device, least_rows: int = 1
) -> list[tuple[int, int]]:
    """Split `height` rows into equal stripes [top, bottom): of about STRIPE_BYTES on a CPU.

    A GPU wants the whole grid at once, up to a size that 32-bit kernels can still address. In a
    traced graph there is one stripe: their number would be compiled in, for one size of image.
    """
    if torch.compiler.is_compiling():
        return [(0, height)]
    stripe_bytes = STRIPE_BYTES if device.type == "cpu" else GPU_STRIPE_BYTES
    count = max(1, min(height // least_rows, -(-height * row_bytes // stripe_bytes)))
    edges = [height * index // count for index in range(count + 1)]
    return list(itertools.pairwise(edges))


def image_stripes(
    batch: int, height: int, row_bytes: int, device: torch.device, least_rows: int = 1
) -> list[tuple[slice, int, int]]:
    """Split a batch of images into stripes (images, top, bottom) of contiguous memory.

    As `row_stripes`, of which a stripe is some rows of one image, or all rows of several.

    Args:
        row_bytes: of one row of one image.
    """
    rows = row_stripes(height, row_bytes, device, least_rows)
    if len(rows) > 1:
        return [(slice(image, image + 1), *edges) for image in range(batch) for edges in rows]
    images = row_stripes(batch, height * row_bytes, device)
    return [(slice(first, last), 0, height) for first, last in images]


def bilinear_neighbours(
    size: int, source_size: int, device: torch.device, dtype: torch.dtype
) -> Neighbours:
    """Neighbours of `size` positions among `source_size`, as `interpolate(align_corners=False)`.

    The centre of position i lies at (i + 1/2) * source_size / size - 1/2, not before position 0.
    """
    # At least float32, as interpolate computes positions: half precision ends at 2048 pixels.
    position = torch.arange(size, device=device, dtype=torch.promote_types(dtype, torch.float32))
    position = ((position + 0.5) * (source_size / size) - 0.5).clamp_(min=0)
    lower = position.long().clamp_(max=source_size - 1)
    upper = (lower + 1).clamp_(max=source_size - 1)
    return Neighbours(lower, upper, (position - lower).to(dtype))


def upsample_rows(
    grid: torch.Tensor, rows: Neighbours, top: int, bottom: int, width: int
) -> torch.Tensor:
    """Rows `top` to `bottom` of `grid` (B, h, w, C) resized to `width` columns.

    Args:
        rows: source of all output rows.

    Returns:
        (B, bottom - top, width, C).
    """
    if is_exporting():
        # All rows, in the one operator that readers of graphs know.
        resized = F.interpolate(
            grid.permute(0, 3, 1, 2),
            size=(rows.lower.shape[0], width),
            mode="bilinear",
            align_corners=False,
        )
        return resized.permute(0, 2, 3, 1)
    weight = rows.weight[top:bottom, None, None]
    stripe = torch.lerp(grid[:, rows.lower[top:bottom]], grid[:, rows.upper[top:bottom]], weight)
    # The rows are at their places now: what is left is to widen them, in one pass.
    stripe = F.interpolate(
        stripe.permute(0, 3, 1, 2),
        size=(bottom - top, width),
        mode="bilinear",
        align_corners=False,
    )
    return stripe.permute(0, 2, 3, 1)


def row_shares(rows: Neighbours, source_size: int) -> torch.Tensor:
    """The share of each source row in each row, (size, source_size): two that are not 0."""
    shares = rows.weight.new_zeros(len(rows.weight), source_size)
    row = torch.arange(len(rows.weight), device=shares.device)
    shares[row, rows.lower] = 1 - rows.weight
    shares[row, rows.upper] += rows.weight  # the same place where both are the last row
    return shares


def source_window(begin: int, end: int, size: int, source_size: int) -> tuple[int, int]:
    """Source positions [first, last) that positions `begin` to `end` of `size` have shares in."""
    scale = source_size / size
    margin = source_size * 2.0**-22  # more than positions in float32 are off
    first = max(math.floor((begin + 0.5) * scale - 0.5 - margin), 0)
    last = min(math.floor((end - 0.5) * scale - 0.5 + margin) + 2, source_size)
    return first, last


def share_rows(
    grid: torch.Tensor, shares: torch.Tensor, top: int, bottom: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of what `upsample_rows` gives: a matrix product of the two is its stripe.

    The rows of `grid` that a stripe needs are fewer than its own, so to widen them first takes less
    than to widen the stripe; and the product can be added to what is there.

    Args:
        shares: `row_shares` of all output rows.

    Returns:
        shares (bottom - top, n), and the n rows of `grid` that they are of, resized to `width`
        columns, (B, n, width * C).
    """
    first, last = source_window(top, bottom, len(shares), grid.shape[1])
    widened = F.interpolate(
        grid[:, first:last].permute(0, 3, 1, 2),
        size=(last - first, width),
        mode="bilinear",
        align_corners=False,
    )
    return shares[top:bottom, first:last], widened.permute(0, 2, 3, 1).flatten(2)

"""The eager twin of `upsample_cross_entropy`: a tile of pixels at a time.

- Upsampling is separable: u = Y L X^T with two numbers in each row of Y and X. A tile needs a small
  window of L, so both products are small dense ones, and so are their adjoints, dL = Y^T g X.
- Softmax does not see what is taken from all classes of a pixel. So each position's highest logit
  is taken off before upsampling: shares are convex, so nothing exceeds 0, exp cannot overflow, and
  no maximum over the classes of a pixel is looked for. The sum of exponentials may underflow where
  neighbours disagree by a hundred; such a tile is done again with the maximum.
- Label smoothing wants sum_k w_k u_k, which is sum_k w_k L_k upsampled: one channel more. Its
  gradient is w_k times the downsampled mask of pixels that count.
- Class weights and ignored pixels are one factor a pixel, which the division by the sum of
  exponentials takes along.

A tile is (columns, K, rows), as then the classes of a pixel, a row of the window and a column of
the tile are each a dimension of some matrix as they lie in channels-last memory.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..blocks.workers import map_parts, parts_each
from .axis import Axis

TILE_BYTES = 5 << 18  # of the second-level cache of a core
_LARGE_TILE_BYTES = 1 << 28  # elsewhere, where launches should be few
# Up to here all pixels at once are quicker on a CPU. They take 100 bytes a pixel at most, labels 8.
FEW_CLASSES = 8
_SUM = 2  # the reduction, as torch's operators have it
LEAST_SUM = 1e-25  # of exponentials; below it terms that count may have underflowed


class _Piece(NamedTuple):
    """Pixels of an axis, the positions that they lie between, and the share of each in each."""

    pixels: slice
    positions: slice
    shares: torch.Tensor


class _Pixels(NamedTuple):
    """What is known of pixels, (B, H, W) each, before their logits."""

    target: torch.Tensor  # the class; 0 where none counts
    valid: torch.Tensor
    on_sum: torch.Tensor  # what the loss has of logsumexp(u)
    on_label: torch.Tensor  # and of -u_label

    def at(self, where: Any) -> _Pixels:
        """A part of them, with a dimension of one class in second place."""
        return _Pixels(*(one[where].unsqueeze(1) for one in self))


Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def eager(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    wants_gradient: bool,
) -> Result:
    """The sum of the losses, that of the pixels' weights, and the gradient of the former.

    Args:
        logits: (B, K, h, w); one class is two with the logits 0 and u.
        labels: (B, H, W) int64, each a class or `ignore_index`.

    Returns:
        (), () and (B, K, h, w), in the memory format of `logits`, or (0,); in float32, or float64
        as `logits`. Of half precision too: a GradScaler makes the gradient large only later.
    """
    classes = logits.shape[1]
    options = ignore_index, label_smoothing, align_corners, wants_gradient
    if classes == 1:
        both = torch.cat([torch.zeros_like(logits), logits], dim=1)
        total, count, gradient = eager(both, labels, weight, *options)
        return total, count, gradient[:, 1:].contiguous() if wants_gradient else gradient
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weight = None if weight is None else weight.to(logits.dtype)
    if classes <= FEW_CLASSES and logits.device.type == "cpu":
        return _by_whole_maps(logits, labels, weight, *options)
    valid = labels != ignore_index
    target = torch.where(valid, labels, 0)
    _check_targets(labels, target, classes, ignore_index)
    factor = valid.to(logits.dtype)
    if weight is not None:
        factor = factor * weight[target]
    pixels, smooth = _Pixels(target, valid, factor, factor), None
    if label_smoothing:
        smooth = logits.new_ones(classes) if weight is None else weight
        smooth = smooth * (label_smoothing / classes)
        on_label = factor * (1 - label_smoothing)
        pixels = _Pixels(target, valid, on_label + valid.to(factor.dtype) * smooth.sum(), on_label)
    total, gradient = _by_tiles(logits, pixels, smooth, align_corners, wants_gradient)
    return total.to(logits.dtype), factor.sum(), gradient


def _by_whole_maps(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    wants_gradient: bool,
) -> Result:
    """What `eager` returns, by torch's own operators on all resized logits."""
    aten = torch.ops.aten
    resized = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=align_corners)
    log_shares = resized.log_softmax(1)
    of_labels = labels, weight, _SUM, ignore_index
    try:
        total, count = aten.nll_loss2d_forward(log_shares, *of_labels)
    except IndexError:  # of a label that is no class; torch does not say where it is
        target = torch.where(labels != ignore_index, labels, 0)
        _check_targets(labels, target, logits.shape[1], ignore_index)
        raise
    smooth = None
    if label_smoothing:
        smooth = logits.new_ones(logits.shape[1]) if weight is None else weight
        smooth = (label_smoothing / len(smooth)) * smooth.view(-1, 1, 1)
        smooth = smooth * (labels != ignore_index).unsqueeze(1)
        total = (1 - label_smoothing) * total - (smooth * log_shares).sum()
    if not wants_gradient:
        return total, count, logits.new_empty(0)
    change = aten.nll_loss2d_backward(torch.ones_like(total), log_shares, *of_labels, count)
    if smooth is not None:
        change.mul_(1 - label_smoothing).sub_(smooth)
    change = aten._log_softmax_backward_data(change, log_shares, 1, change.dtype)
    size = labels.shape[1:]
    gradient = aten.upsample_bilinear2d_backward(change, size, logits.shape, align_corners)
    return total, count, gradient.contiguous()


def _by_tiles(
    logits: torch.Tensor,
    pixels: _Pixels,
    smooth: torch.Tensor | None,
    align_corners: bool,
    wants_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss in float64, and the gradient.

    Args:
        smooth: (K,) what the loss has of each -u_k for label smoothing.
    """
    grid = _channels_last(logits)
    grid = grid - grid.amax(3, keepdim=True)
    batch, grid_height, grid_width, classes = grid.shape
    height, width = pixels.target.shape[1:]
    down, first_rows = Axis.of(height, grid_height, align_corners).shares(height, grid_height, grid)
    across, first_columns = Axis.of(width, grid_width, align_corners).shares(
        width, grid_width, grid
    )
    side_rows, side_columns = _tile_sides(classes * grid.element_size(), height, width, grid.device)
    rows = _pieces(down, first_rows, side_rows)
    columns = _pieces(across, first_columns, side_columns)
    by_columns = _Pixels(*(one.mT for one in pixels))  # as tiles lie
    each = min(parts_each(batch, grid.device), len(rows))
    edges = [len(rows) * index // each for index in range(each + 1)]
    bands = [rows[first:last] for first, last in itertools.pairwise(edges)]
    parts = list(itertools.product(range(batch), bands))

    gradient = torch.zeros_like(grid) if wants_gradient else None

    def run(part: tuple[int, list[_Piece]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The loss of a band of an image, and its gradient at the positions around it."""
        image, band = part
        buffer = grid.new_empty(side_rows * side_columns * classes)
        total, first, last = grid.new_zeros((), dtype=torch.float64), *_around(band)
        of_band = None
        if gradient is not None:
            of_band = gradient[image, first:last]
            if len(bands) > 1:  # whose positions overlap
                of_band = torch.zeros_like(of_band)
        for row in band:
            within = slice(row.positions.start - first, row.positions.stop - first)
            for column in columns:
                of_tile = by_columns.at((image, column.pixels, row.pixels))
                window = grid[image, row.positions, column.positions]
                loss, change = _tile(window, row, column, of_tile, buffer, wants_gradient)
                total += loss
                if of_band is not None and change is not None:
                    of_band[within, column.positions] += change
        return total, of_band

    total = grid.new_zeros((), dtype=torch.float64)
    for (image, band), (loss, change) in zip(
        parts, map_parts(run, parts, grid.device), strict=True
    ):
        total += loss
        if gradient is not None and change is not None and len(bands) > 1:
            gradient[image, slice(*_around(band))] += change
    if smooth is not None:
        at_positions = down.t() @ pixels.valid.to(grid.dtype) @ across
        total -= (at_positions * (grid @ smooth)).sum(dtype=torch.float64)
        if gradient is not None:
            gradient -= at_positions.unsqueeze(3) * smooth
    if gradient is None:
        return total, grid.new_empty(0)
    if is_channels_last(logits):
        return total, gradient.permute(0, 3, 1, 2)
    return total, _classes_first(gradient)


def is_channels_last(logits: torch.Tensor) -> bool:
    """Return whether they are so on a CPU, where their gradient then is too."""
    if logits.device.type != "cpu" or logits.is_contiguous():
        return False
    return logits.is_contiguous(memory_format=torch.channels_last)


def _around(band: list[_Piece]) -> tuple[int, int]:
    """The first position around its pixels, and one beyond the last."""
    return band[0].positions.start, max(piece.positions.stop for piece in band)


def _tile(
    window: torch.Tensor,
    row: _Piece,
    column: _Piece,
    pixels: _Pixels,
    buffer: torch.Tensor,
    wants_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The loss of a tile's pixels, and its gradient at the positions of `window`.

    Args:
        window: (positions down, positions across, K), logits that are not above 0.
        pixels: (columns, 1, rows) each.
        buffer: for as many numbers as the tile has.
    """
    (columns, _, rows), classes = pixels.target.shape, window.shape[2]
    widened = (window.flatten(1).t() @ row.shares.t()).view(window.shape[1], -1)
    flat = buffer[: columns * classes * rows].view(columns, -1)
    tile = torch.mm(column.shares, widened, out=flat).view(columns, classes, rows)
    at_label = tile.gather(1, pixels.target)
    ones = tile.new_ones(1, 1, classes).expand(columns, -1, -1)
    sums = torch.bmm(ones, tile.exp_())
    shifted = None
    if float(sums.min()) < LEAST_SUM:
        torch.mm(column.shares, widened, out=flat)
        highest = tile.amax(1, keepdim=True)
        at_label = at_label - highest
        sums = torch.bmm(ones, tile.sub_(highest).exp_())
        # With label smoothing the factors differ, by what is not shifted.
        shifted = ((pixels.on_sum - pixels.on_label) * highest).sum(dtype=torch.float64)
    losses = (sums.log() * pixels.on_sum).addcmul_(pixels.on_label, at_label, value=-1)
    loss = losses.sum(dtype=torch.float64)
    if shifted is not None:
        loss += shifted
    if not wants_gradient:
        return loss, None
    tile.mul_(pixels.on_sum / sums).scatter_add_(1, pixels.target, pixels.on_label.neg())
    narrow = (column.shares.t() @ flat).view(-1, rows)
    return loss, (row.shares.t() @ narrow.t()).view(window.shape)


def _check_targets(
    labels: torch.Tensor, target: torch.Tensor, classes: int, ignore_index: int
) -> None:
    """Raise where `target`, labels but for ignored pixels, is no class."""
    if target.numel() == 0:
        return
    least, most = (int(one) for one in target.aminmax())
    if least < 0 or most >= classes:
        wrong = (target < 0) | (target >= classes)
        raise_wrong_label(labels, int(wrong.flatten().byte().argmax()), classes, ignore_index)


def raise_wrong_label(labels: torch.Tensor, index: int, classes: int, ignore_index: int) -> None:
    """Raise a ValueError that names the label at `index` of the flat labels (B, H, W)."""
    _, height, width = labels.shape
    image, rest = divmod(index, height * width)
    row, column = divmod(rest, width)
    known = "0 or 1" if classes == 2 else f"0 to {classes - 1}"
    raise ValueError(
        f"labels: expected {known}, or {ignore_index} to ignore a pixel, got "
        f"{int(labels[image, row, column])} in image {image}, row {row}, column {column}"
    )


def _pieces(shares: torch.Tensor, lower: list[int], length: int) -> list[_Piece]:
    """The axis in pieces of `length` pixels."""
    size, source = shares.shape
    found = []
    for first in range(0, size, length):
        last = min(first + length, size)
        positions = slice(lower[first], min(lower[last - 1] + 2, source))
        pixels = slice(first, last)
        found.append(_Piece(pixels, positions, shares[pixels, positions].contiguous()))
    return found


def _tile_sides(pixel_bytes: int, height: int, width: int, device: torch.device) -> tuple[int, int]:
    """Rows and columns of a tile: in larger ones products with dense shares would take longer."""
    if device.type != "cpu":
        return height, max(_LARGE_TILE_BYTES // (pixel_bytes * height), 1)
    pixels = TILE_BYTES // pixel_bytes
    rows = 32 if pixels < 64 * 64 else 64
    return min(rows, height), min(max(pixels // rows // 16 * 16, 16), 128, width)


def _channels_last(maps: torch.Tensor) -> torch.Tensor:
    """(B, K, h, w) as (B, h, w, K), contiguous."""
    if not maps.is_contiguous():
        return maps.permute(0, 2, 3, 1).contiguous()
    # torch transposes matrices in blocks, and tensors of more dimensions element by element.
    batch, classes, height, width = maps.shape
    made = maps.new_empty(batch, height, width, classes)
    for one, into in zip(maps.flatten(2), made.flatten(1, 2), strict=True):
        into.copy_(one.t())
    return made


def _classes_first(grid: torch.Tensor) -> torch.Tensor:
    """(B, h, w, K) as (B, K, h, w), contiguous."""
    batch, height, width, classes = grid.shape
    made = grid.new_empty(batch, classes, height, width)
    for one, into in zip(grid.flatten(1, 2), made.flatten(2), strict=True):
        into.copy_(one.t())
    return made

"""Label maps on a CPU: all classes' logits are looked at in the cells that have a border alone.

A cell is the square between four positions of the logits. Where these agree on the highest class it
is that of all pixels in the cell. In a mixed cell most classes are out too. Of the classes that are
the highest at a position the best is, at every pixel, at least the lowest logit of each of them,
and at least their mean, which is no less than at the position where it is lowest. A class whose
logits are all below that is blended nowhere.
"""

from __future__ import annotations

import torch

from ..blocks.bilinear import Neighbours
from ..core.launch import ceil_div

_LOGITS_PER_CHUNK = 1 << 19
# Up to which all classes are blended: to look for rivals would not pay.
FEW_CLASSES = 32
# Cells with more rivals are blended by themselves, lest the others have as many.
_FEW_RIVALS = 8


def mixed_cells(labels: torch.Tensor) -> torch.Tensor:
    """Mask of the labels (B, h, w) that differ from a neighbour right, below or diagonal."""
    right = torch.cat([labels[:, :, 1:], labels[:, :, -1:]], dim=2)
    below = torch.cat([labels[:, 1:], labels[:, -1:]], dim=1)
    differs_right = labels != right
    differs_right_below = torch.cat([differs_right[:, 1:], differs_right[:, -1:]], dim=1)
    return differs_right | differs_right_below | (labels != below)


def blend_borders(
    grid: torch.Tensor,
    labels: torch.Tensor,
    mixed: torch.Tensor,
    rows: Neighbours,
    columns: Neighbours,
) -> torch.Tensor:
    """Labels (B, h, w) spread over their cells, but those of pixels in `mixed` cells.

    Args:
        grid: logits (B, h, w, K), contiguous, finite or NaN.
    """
    fine = labels.index_select(2, columns.lower).index_select(1, rows.lower)
    image, y, x = mixed.nonzero(as_tuple=True)
    _, height, width, classes = grid.shape
    logits = grid.view(-1, classes)
    above, left = (image * height + y) * width, x
    below = (image * height + (y + 1).clamp_(max=height - 1)) * width
    right = (x + 1).clamp_(max=width - 1)
    corners = torch.stack([above + left, above + right, below + left, below + right])
    numbers = torch.full_like(mixed, -1, dtype=torch.int64)
    of_run, places = _runs(columns, width)
    groups: list[tuple[torch.Tensor, torch.Tensor | None]]
    if classes <= FEW_CLASSES:
        groups = [(torch.arange(len(image)), None)]
    else:
        chunk = max(1, _LOGITS_PER_CHUNK // classes)
        rivals = torch.cat(
            [_rivals(logits, labels.view(-1), part) for part in corners.split(chunk, dim=1)]
        )
        counts = rivals.sum(1, dtype=torch.int32)  # 0.4 of the time of int64
        few = counts <= _FEW_RIVALS
        groups = [
            (cells, _ranked(rivals.index_select(0, cells), counts.index_select(0, cells)))
            for cells in (kind.nonzero(as_tuple=True)[0] for kind in (few, ~few))
            if len(cells)
        ]
    for cells, ranked in groups:
        values = [_values(logits, corner[cells], ranked) for corner in corners]
        at = (image[cells], y[cells], x[cells])
        numbers[at] = torch.arange(len(values[0]))
        number = numbers.index_select(2, of_run).index_select(1, rows.lower)
        _blend(fine, number, values, ranked, rows, columns, places)
        numbers[at] = -1
    return fine


def _runs(columns: Neighbours, grid_width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of each cell in runs of equal length: a run's cell (runs,), its columns (runs, most).

    A cell of a margin has half as many columns again as others. A shorter run has its first column
    again, which gets the same label twice.
    """
    most = ceil_div(len(columns.lower), grid_width)
    counts = torch.bincount(columns.lower, minlength=grid_width)
    runs = torch.div(counts + most - 1, most, rounding_mode="floor")
    of_run = torch.repeat_interleave(runs)
    before = most * (torch.arange(len(of_run)) - (runs.cumsum(0) - runs)[of_run])
    steps = torch.arange(most)
    steps = steps.where(steps < (counts[of_run] - before)[:, None], 0)
    return of_run, ((counts.cumsum(0) - counts)[of_run] + before)[:, None] + steps


def _rivals(logits: torch.Tensor, labels: torch.Tensor, corners: torch.Tensor) -> torch.Tensor:
    """Mask (cells, K) of the classes that may be the highest somewhere in a cell.

    Args:
        labels: (positions,), the highest class of each place of `logits` (positions, K).
        corners: (4, cells), places.
    """
    winners = labels[corners].long()
    # Of each winner at each corner: (winners, corners, cells).
    of_winners = logits[corners, winners[:, None]]
    bar = torch.maximum(of_winners.amin(1).amax(0), of_winners.mean(0).amin(0))[:, None]
    highest, *others = (logits.index_select(0, corner) for corner in corners)
    for other in others:
        highest = torch.maximum(highest, other)
    # Blending rounds: a class that is as good as equal stays in. So does all that has a NaN.
    return ~(highest < bar - of_winners.abs().amax((0, 1))[:, None] * 2.0**-20)


def _ranked(rivals: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Each cell's rivals in ascending order (cells, most of them); places left over repeat one.

    Args:
        counts: of the rivals of each cell.
    """
    cell, which = rivals.nonzero(as_tuple=True)
    ends = counts.cumsum(0)
    rank = torch.arange(len(cell)) - (ends - counts)[cell]
    ranked = which[ends - 1][:, None].repeat(1, int(counts.max()))
    ranked[cell, rank] = which
    return ranked


def _values(
    logits: torch.Tensor, corner: torch.Tensor, ranked: torch.Tensor | None
) -> torch.Tensor:
    """Logits (cells, rivals) at a place of each cell; of all classes where none are ranked."""
    if ranked is None:
        return logits.index_select(0, corner)
    return logits.view(-1)[corner[:, None] * logits.shape[1] + ranked]


def _blend(
    fine: torch.Tensor,
    number: torch.Tensor,
    values: list[torch.Tensor],
    ranked: torch.Tensor | None,
    rows: Neighbours,
    columns: Neighbours,
    places: torch.Tensor,
) -> None:
    """Write the highest class of each pixel in cells that have a number.

    A row of a cell is blended at its two ends, then between them for a run of columns.

    Args:
        number: of the cell of each row and run, (B, height, runs); -1 for a cell without.
        values: of each cell and rival (cells, rivals), at its four positions.
        ranked: classes of the rivals, (cells, rivals).
        places: columns of each run, (runs, most).
    """
    height, width = len(rows.lower), len(columns.lower)
    image, y, run = (number >= 0).nonzero(as_tuple=True)
    number, flat = number[image, y, run], fine.view(-1)
    chunk = max(1, _LOGITS_PER_CHUNK // (places.shape[1] * values[0].shape[1]))
    for start in range(0, len(run), chunk):
        part = slice(start, start + chunk)
        cell, row, place = number[part], y[part], places[run[part]]
        down, across = rows.weight[row, None], columns.weight[place, None]
        upper_left, upper_right, lower_left, lower_right = (
            one.index_select(0, cell) for one in values
        )
        left = torch.lerp(upper_left, lower_left, down)
        right = torch.lerp(upper_right, lower_right, down)
        label = torch.lerp(left[:, None], right[:, None], across).max(dim=-1).indices
        if ranked is not None:
            label = ranked[cell].gather(1, label)
        pixels = ((image[part] * height + row) * width)[:, None] + place
        flat[pixels] = label.to(fine.dtype)

"""Label maps from logits: bilinear resizing and argmax in one pass, no resized logits in memory.

    label(y, x) = argmax_k  (1 - a) (1 - b) v00 + (1 - a) b v01 + a (1 - b) v10 + a b v11

of the logits v of class k at the four positions around (y, x).

Where the four positions agree on the highest class, so does every convex combination of them: only
pixels on a class border need all classes. The eager twin blends no others, on a CPU; the kernels
can do so too (form "agree").

A kernel's lane owns a cell, the square between four positions, and the pixels in it: as many as the
scale says. Where they are more than `LANE_OUTPUTS`, lanes of several programs share a cell. Maps
smaller than the logits, with cells that hold no pixel, are gathered pixel by pixel.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..blocks.bilinear import Neighbours, bilinear_neighbours, row_stripes, upsample_rows
from ..core.checks import KERNEL_DTYPES
from ..core.configurations import Config, look_up, product
from ..core.launch import ceil_div, launch
from ..core.registry import Op, register
from .borders import FEW_CLASSES, blend_borders, mixed_cells
from .kernels import upsample_argmax_gather_kernel, upsample_argmax_kernel

_MAX_UINT8_CLASSES = 256
_MAX_COLUMNS = 8  # pixels of a cell's row that one lane takes
# From this share of cells on a border on it is as quick to blend all pixels: it was 0.5 to 0.85 for
# 6 to 150 classes at 512x512 and 1162x2065 (one core of an AMD EPYC).
_MOST_MIXED = 0.6
# With more classes few of them are blended in a cell (borders.py): it pays up to here.
_MOST_MIXED_OF_MANY = 0.9
# Up to here one piece is the quickest: 1.8 ms for 2 classes at 512x512, against 2.9 in stripes.
_FEW_CLASSES = 5


def eager(logits: torch.Tensor, height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, K, h, w) -> (B, height, width) of `dtype`, the highest class at every pixel."""
    batch, classes, grid_height, grid_width = logits.shape
    if classes == 1:
        return torch.zeros(batch, height, width, dtype=dtype, device=logits.device)
    is_half = logits.dtype in (torch.float16, torch.bfloat16)
    wide = logits.float() if is_half else logits
    # A class masked by -inf would turn to NaN where it is blended.
    least = torch.finfo(wide.dtype).min / 4
    logits = wide.clamp_(min=least) if is_half else wide.clamp(min=least)
    few = classes <= _FEW_CLASSES
    # A graph that does not take the op whole has one form, for any size.
    if few or torch.compiler.is_compiling() or height * width < 4 * grid_height * grid_width:
        # A map hardly larger than the logits, or a few classes: to look for borders first, or to
        # work in stripes, would not pay.
        if few:
            logits = logits.contiguous(memory_format=torch.channels_last)
        resized = F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
        return resized.max(dim=1).indices.to(dtype)
    grid = logits.permute(0, 2, 3, 1).contiguous()
    rows = bilinear_neighbours(height, grid.shape[1], grid.device, grid.dtype)
    if grid.device.type != "cpu":  # whose queue does not know how many pixels lie on a border
        return _all_pixels(grid, rows, width, dtype)

    labels = grid.max(dim=-1).indices
    mixed = mixed_cells(labels)
    share = mixed.count_nonzero().item() / max(mixed.numel(), 1)
    if share > (_MOST_MIXED if classes <= FEW_CLASSES else _MOST_MIXED_OF_MANY):
        return _all_pixels(grid, rows, width, dtype)
    columns = bilinear_neighbours(width, grid.shape[2], grid.device, grid.dtype)
    return blend_borders(grid, labels.to(dtype), mixed, rows, columns)


def _all_pixels(
    grid: torch.Tensor, rows: Neighbours, width: int, dtype: torch.dtype
) -> torch.Tensor:
    """Blend and compare all classes, a stripe of rows at a time."""
    batch, _, _, classes = grid.shape
    height = rows.lower.shape[0]
    labels = torch.empty(batch, height, width, dtype=dtype, device=grid.device)
    row_bytes = batch * width * classes * grid.element_size()
    for top, bottom in row_stripes(height, row_bytes, grid.device):
        # max() is twice as quick as argmax() here; both give the first of equal values.
        stripe = upsample_rows(grid, rows, top, bottom, width)
        labels[:, top:bottom] = stripe.max(dim=-1).indices
    return labels


def _cells_reason(grid: Sequence[int], size: Sequence[int]) -> str | None:
    """Reason why a resize has to gather; None where lanes can own cells."""
    for source, target in zip(grid, size, strict=True):
        if target < source:
            return "cells without a pixel"
        if target * (2 * source + 3) >= 2**31:
            return "32-bit positions pass their end"
        if target > 65535 * source:
            return "more parts of a cell than a grid's axis has places"
    return "nothing to blend" if tuple(grid) == tuple(size) else None


def fused(logits: torch.Tensor, height: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """The kernels: (B, K, h, w) of any strides -> (B, height, width) of `dtype`."""
    batch, classes, *grid = logits.shape
    output = torch.empty(batch, height, width, dtype=dtype, device=logits.device)
    if batch == 0:
        return output
    arguments = (
        *(logits, output, *logits.stride(), *grid, height, width),
        *(grid[0] / height, grid[1] / width),
    )
    sizes = {"classes": classes, "outputs": output.numel()}
    if _cells_reason(grid, (height, width)) is None:
        _launch_cells(arguments, grid, output, sizes)
    else:
        config = look_up("upsample_argmax_gather", logits.device, logits.dtype, sizes)
        blocks = ceil_div(height * width, config["BLOCK"])
        launch(
            upsample_argmax_gather_kernel,
            (blocks * batch,),
            *(*arguments, blocks),
            CLASSES=classes,
            RESIZE=[height, width] != grid,
            **config,
        )
    return output


def _launch_cells(
    arguments: tuple, grid: Sequence[int], output: torch.Tensor, sizes: dict[str, int]
) -> None:
    """Launch lanes that own cells, or shares of cells of nearly equal size."""
    logits = arguments[0]
    batch, *size = output.shape
    config = look_up("upsample_argmax", logits.device, logits.dtype, sizes)
    lane_outputs = config.pop("LANE_OUTPUTS")
    cell_rows, cell_columns = (ceil_div(*pair) for pair in zip(size, grid, strict=True))
    column_parts = ceil_div(cell_columns, _MAX_COLUMNS)
    columns = ceil_div(cell_columns, column_parts)
    row_parts = ceil_div(cell_rows, max(lane_outputs // columns, 1))
    cells = ceil_div(grid[0] + 1, config["BLOCK_ROWS"]) * config["BLOCK_ROWS"] * (grid[1] + 1)
    blocks = ceil_div(cells, config["BLOCK"])
    launch(
        upsample_argmax_kernel,
        (blocks * batch, row_parts, column_parts),
        *(*arguments, blocks),
        CLASSES=sizes["classes"],
        ROWS=ceil_div(cell_rows, row_parts),
        COLUMNS=columns,
        AGREE=config.pop("form") == "agree",
        PREFETCH=min(config.pop("PREFETCH"), sizes["classes"]),
        **config,
    )


def supports(
    logits: torch.Tensor, height: int = 1, width: int = 1, dtype: torch.dtype = torch.int64
) -> str | None:
    """Reason why the kernels cannot take `logits`; None where they can.

    Gradients and autocast do not matter: labels have no gradient, and blending is in float32.
    """
    if logits.dtype not in KERNEL_DTYPES:
        return f"there are no kernels for {logits.dtype}"
    return None


def _candidates(half: bool, sizes: dict[str, int]) -> list[Config]:
    return product(
        form=("cells", "agree"),
        BLOCK=(64, 128, 256),
        BLOCK_ROWS=(1,),
        LANE_OUTPUTS=(8, 16),
        PREFETCH=(1, 3),
        num_warps=(2, 4),
    )


def _gather_candidates(half: bool, sizes: dict[str, int]) -> list[Config]:
    return product(BLOCK=(64, 128, 256), UNROLL=(1, 4, 8), num_warps=(2, 4))


def example(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Five classes, upsampled by 4."""
    return torch.randn(2, 5, 6, 7, device=device).to(dtype), 24, 28, torch.int64


OP = register(
    Op(
        name="upsample_argmax",
        inputs="Tensor logits, SymInt height, SymInt width, ScalarType dtype",
        eager=eager,
        fused=fused,
        fake=lambda logits, height, width, dtype: torch.empty(
            logits.shape[0], height, width, dtype=dtype, device=logits.device
        ),
        supports=supports,
        example=example,
        candidates={
            "upsample_argmax": _candidates,
            "upsample_argmax_gather": _gather_candidates,
        },
        multiplies=False,
    )
)


def upsample_argmax(
    logits: torch.Tensor, size: Sequence[int], dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """The class with the highest logit at every pixel of a map of `size`.

    Equal to `interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)` wherever
    the two highest classes differ by more than rounding; among exact ties the lowest class wins.
    Half-precision logits are blended in float32. A class masked by -inf wins only where all are;
    where a logit that counts is NaN, so is the blend, and the first such class wins.

    Args:
        logits: (B, K, h, w), floating; quickest in channels-last memory on a CPU, and in
            contiguous memory on a GPU.
        size: (H, W) of the label map.
        dtype: of the label map: torch.int64, or torch.uint8 for at most 256 classes.

    Returns:
        (B, H, W) of `dtype`.

    Raises:
        TypeError: `logits` is not a floating tensor, or `dtype` is another.
        ValueError: `logits` is not 4-D or has no class or no position, or more than 256 classes
            with torch.uint8; or `size` is not two positive integers.
    """
    height, width = check(logits, size, dtype)
    return OP(logits.device, logits, height, width, dtype)


def check(
    logits: torch.Tensor, size: Sequence[int], dtype: torch.dtype = torch.int64
) -> tuple[int, int]:
    """The height and width of `size`; raise where an argument is wrong."""
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        got = getattr(logits, "dtype", type(logits).__name__)
        raise TypeError(f"logits: expected a floating-point tensor, got {got}")
    if logits.ndim != 4 or 0 in logits.shape[1:]:
        raise ValueError(
            f"logits: expected shape (batch, classes, height, width), got {tuple(logits.shape)}"
        )
    if dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"dtype: expected torch.int64 or torch.uint8, got {dtype}")
    if dtype == torch.uint8 and logits.shape[1] > _MAX_UINT8_CLASSES:
        raise ValueError(
            f"dtype: torch.uint8 tells {_MAX_UINT8_CLASSES} classes apart, got {logits.shape[1]}"
        )
    if not isinstance(size, Sequence) or len(size) != 2 or min(size) < 1:
        raise ValueError(f"size: expected a positive height and width, got {size!r}")
    height, width = size
    if isinstance(height, torch.SymInt) or isinstance(width, torch.SymInt):
        return height, width  # of a graph of any size, which an int would bind to one
    return int(height), int(width)

"""An exported file against its model, in the runtime that reads it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from fastseg.kernels import upsample_argmax
from fastseg.kernels.blocks.bilinear import bilinear_neighbours

from .folded import FoldedModel

# Relative RMS, against the model in float64, by the dtype of the graph.
MAX_ERROR = {torch.float32: 2e-6, torch.float16: 5e-3}
# How far, of the logits' RMS, the highest logit may be above that of another label. Runtimes
# compute the positions of pixels in float32, which is worth 3e-5 of a logit's step at pixel 500.
NEAR_TIE = {torch.float32: 3e-4, torch.float16: 5e-2}

Run = Callable[..., Sequence[np.ndarray]]


class ExportError(RuntimeError):
    """The exported graph does not give what the model gives."""


class Checked(NamedTuple):
    """A comparison with the model in float64.

    Args:
        shape: of the inputs.
        error: relative RMS error; of labels the share of pixels that differ, all near-ties.
    """

    shape: tuple[int, int, int, int]
    error: float


def check_shapes(
    folded: FoldedModel,
    batch: int | None,
    height: int | None,
    width: int | None,
    reduced: int = 1,
) -> list[tuple[int, int, int, int]]:
    """Two shapes of inputs that differ in every open axis, one odd-sized; one where none is open.

    Args:
        reduced: tokens that a side of every reduced grid must have.
    """
    smallest = folded.smallest_side(reduced)
    even = -(-2 * smallest // 32) * 32
    choices = ((1, even, even + 32), (2, smallest + 6, 2 * smallest + 1))
    shapes = []
    for choice in choices:
        sizes = [
            chosen if fixed is None else fixed
            for fixed, chosen in zip((batch, height, width), choice, strict=True)
        ]
        shapes.append((sizes[0], folded.num_channels, sizes[1], sizes[2]))
    return list(dict.fromkeys(shapes))


def compare(
    model: nn.Module,
    folded: FoldedModel,
    run: Run,
    shapes: Sequence[tuple[int, int, int, int]],
    labels: bool | tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> list[Checked]:
    """Compare `run`, the exported graph, with `model` on random pixels.

    Args:
        folded: from `model`.
        run: takes the inputs, and gives the outputs, in order.
        dtype: of the graph.

    Raises:
        ExportError: they differ by more than rounding.
    """
    reference = copy.deepcopy(model).cpu().double()
    generator = torch.Generator().manual_seed(0)
    checked = []
    for shape in shapes:
        inputs = [torch.randn(shape, generator=generator) for _ in folded.inputs]
        results = run(*(one.numpy() for one in inputs))
        with torch.no_grad():
            doubles = [one.double() for one in inputs]
            expected = folded.results(reference, doubles, labels is not False)
        if labels is False:
            pairs = zip(results, expected, strict=True)
            error = max(_relative_error(result, wanted) for result, wanted in pairs)
            problem = error > MAX_ERROR[dtype] or not np.isfinite(error)
        else:
            size = shape[2:] if labels is True else labels
            error, problem = _differing(results[0], expected[0], size, NEAR_TIE[dtype])
        if problem:
            kind = "relative RMS error" if labels is False else "share of differing labels"
            raise ExportError(
                f"the exported graph does not give what the model gives: at an input of {shape} "
                f"the {kind} is {error:.3g}"
            )
        checked.append(Checked(shape, error))
    return checked


def _relative_error(result: np.ndarray, expected: torch.Tensor) -> float:
    if result.shape != tuple(expected.shape):
        raise ExportError(
            f"the exported graph gives shape {result.shape}, the model {tuple(expected.shape)}"
        )
    error = np.square(result - expected.numpy()).mean() / expected.square().mean().item()
    return float(error**0.5)


def _differing(
    labels: np.ndarray, logits: torch.Tensor, size: Sequence[int], near: float
) -> tuple[float, bool]:
    """The share of `labels` that are not the model's, and whether any is no near-tie."""
    if logits.shape[1] == 1:  # whether it is positive: as against a class of logit 0
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    if labels.shape != (len(logits), *size):
        raise ExportError(
            f"the exported graph gives shape {labels.shape}, the model {(len(logits), *size)}"
        )
    exported = torch.from_numpy(labels.astype(np.int64))
    if exported.min() < 0 or exported.max() >= logits.shape[1]:
        return 1.0, True
    expected = upsample_argmax(logits, size)
    pixels = (exported != expected).nonzero(as_tuple=True)
    lost = _blend(logits, expected, pixels) - _blend(logits, exported, pixels)
    tie = near * logits.square().mean().sqrt()
    return len(lost) / exported.numel(), bool((lost > tie).any())


def _blend(
    logits: torch.Tensor, labels: torch.Tensor, pixels: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """The resized logits of the classes in `labels` at a few pixels, by image, row and column."""
    (image, y, x), kind = pixels, labels[pixels]
    rows, columns = (
        bilinear_neighbours(labels.shape[axis], logits.shape[axis + 1], logits.device, logits.dtype)
        for axis in (1, 2)
    )
    upper, lower = (
        torch.lerp(
            logits[image, kind, row, columns.lower[x]],
            logits[image, kind, row, columns.upper[x]],
            columns.weight[x],
        )
        for row in (rows.lower[y], rows.upper[y])
    )
    return torch.lerp(upper, lower, rows.weight[y])

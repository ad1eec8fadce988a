"""Logits, labels, and their cross-entropy by torch's own operators, for tests of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


def plain_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = 255,
    weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    align_corners: bool = False,
) -> torch.Tensor:
    """The usual way, as transformers computes it."""
    size = labels.shape[1:]
    pixels = F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
    labels = labels.long()
    if logits.shape[1] == 1:
        valid = ((labels >= 0) & (labels != ignore_index)).to(pixels.dtype)
        losses = F.binary_cross_entropy_with_logits(
            pixels.squeeze(1), labels.to(pixels.dtype), reduction="none"
        )
        return (losses * valid).mean() if reduction == "mean" else (losses * valid).sum()
    return F.cross_entropy(
        pixels,
        labels,
        None if weight is None else weight.to(pixels.dtype),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


def draw(
    classes: int,
    grid: tuple[int, int],
    size: tuple[int, int],
    scale: float = 3.0,
    ignored: float = 0.2,
    batch: int = 2,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits in float64, and labels of which a share is 255."""
    logits = torch.randn(batch, classes, *grid, dtype=torch.float64) * scale
    labels = torch.randint(0, max(classes, 2), (batch, *size))
    labels[torch.rand(labels.shape) < ignored] = 255
    return logits, labels


def loss_and_gradient(
    function: Callable[..., torch.Tensor], logits: torch.Tensor, *arguments: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of three times the loss, which a backward has to take into account."""
    leaf = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.enable_grad():
        loss = 3 * function(leaf, *arguments, **options)
        loss.backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == logits.dtype
    return loss.detach(), leaf.grad


def error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over that of the reference; NaN where the result has one."""
    difference = (result.double() - reference.double()).norm()
    return (difference / reference.double().norm().clamp(min=1e-30)).item()

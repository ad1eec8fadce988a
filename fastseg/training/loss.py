"""The loss that a model's forward computes of its labels, without the resized logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastseg.folding.conditions import is_plain_path, tracing_reason
from fastseg.kernels import select_backend, upsample_cross_entropy
from fastseg.kernels.core.checks import is_exporting


class FastLoss:
    """Mixin of models whose loss is `segmentation_loss`, so that `fastseg.report` finds them."""

    def _loss_line(self) -> str:
        """How the next loss would be computed, for people."""
        module: Any = self
        reason = loss_reason()
        if reason is not None:
            return f"by torch's operators: {reason}"
        try:
            backend, why = select_backend(next(module.parameters()).device)
        except (RuntimeError, ValueError) as error:  # what FASTSEG_BACKEND asks for is not there
            return f"cannot run: {error}"
        if backend == "eager":
            return f"without resized logits, eager: {why}"
        return "without resized logits, Triton kernels, not yet measured on a GPU"


def loss_reason(*inputs: Any) -> str | None:
    """Reason why torch's operators compute a loss of `inputs`; None where they need not."""
    if is_plain_path():
        return "asked for by fastseg.plain_path"
    if reason := tracing_reason(*inputs):
        return reason
    if is_exporting():
        return "it is exported"
    if any(isinstance(one, torch.Tensor) and one.is_floating_point() for one in inputs[1:]):
        return "the labels are floating"
    return None


def segmentation_loss(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int
) -> torch.Tensor:
    """What transformers' SegformerForSemanticSegmentation computes for `labels`.

    Args:
        logits: (B, K, h, w).
        labels: (B, H, W) class numbers.
    """
    if loss_reason(logits, labels) is None:
        return upsample_cross_entropy(logits, labels, ignore_index=ignore_index)
    pixels = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    if logits.shape[1] > 1:
        return F.cross_entropy(pixels, labels, ignore_index=ignore_index)
    valid = ((labels >= 0) & (labels != ignore_index)).float()
    losses = F.binary_cross_entropy_with_logits(pixels.squeeze(1), labels.float(), reduction="none")
    # Over all pixels, ignored ones included, as transformers averages it.
    return (losses * valid).mean()

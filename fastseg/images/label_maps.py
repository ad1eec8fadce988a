"""Label maps at the sizes of the images, from the logits of a segmentation model."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fastseg.kernels import upsample_argmax

from .batch_feature import BatchFeature
from .types import TargetSizes


def post_process_semantic_segmentation(
    outputs: object,
    target_sizes: TargetSizes | None = None,
    return_segmentation_scores: bool = False,
) -> list[torch.Tensor] | list[BatchFeature]:
    """Label maps of a batch: see `SegformerImageProcessor.post_process_semantic_segmentation`."""
    logits = logits_of(outputs).detach()
    sizes = None if target_sizes is None else parse_target_sizes(target_sizes, len(logits))
    if return_segmentation_scores:
        return [_scores(one, sizes[i] if sizes else None) for i, one in enumerate(logits)]
    if sizes is None:
        return list(logits.argmax(dim=1))
    maps = [logits] * len(logits)  # each to be replaced
    for size in dict.fromkeys(sizes):
        # Images that share a size go in one call.
        indices = [i for i, other in enumerate(sizes) if other == size]
        group = logits if len(indices) == len(sizes) else logits[indices]
        for i, label_map in zip(indices, upsample_argmax(group, size), strict=True):
            maps[i] = label_map
    return maps


def logits_of(outputs: Any) -> torch.Tensor:
    """The logits (B, K, h, w) that a model has given, in its output or by themselves.

    Of an output with probabilities these: its network upsamples them in the place of the logits.
    An output has them as an attribute or, as transformers' pipelines hand it over, as an entry.

    Raises:
        TypeError, ValueError: there are none, or they are no maps.
    """
    logits = outputs
    if isinstance(outputs, Mapping):
        logits = outputs.get("probabilities", outputs.get("logits"))
    elif not isinstance(outputs, torch.Tensor):
        logits = getattr(outputs, "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise TypeError(
            "outputs: expected the output of a model, with logits, or a tensor, "
            f"got {type(outputs).__name__}"
        )
    if logits.ndim != 4 or not logits.is_floating_point():
        raise ValueError(
            "outputs: expected floating-point logits (batch, num_labels, height, width), "
            f"got {logits.dtype} of shape {tuple(logits.shape)}"
        )
    return logits


def _scores(logits: torch.Tensor, size: tuple[int, int] | None) -> BatchFeature:
    """The scores of one image, from its logits (num_labels, h, w)."""
    if size is not None:
        logits = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
    return BatchFeature(segmentation=logits.argmax(dim=0), segmentation_scores=logits)


def parse_target_sizes(target_sizes: Any, count: int) -> list[tuple[int, int]]:
    """Sizes (height, width) of `count` images; raise ValueError where they are none."""
    if isinstance(target_sizes, torch.Tensor | np.ndarray):
        target_sizes = target_sizes.tolist()
    if not isinstance(target_sizes, list | tuple) or len(target_sizes) != count:
        raise ValueError(
            f"target_sizes: expected a (height, width) for each of {count} images, "
            f"got {target_sizes!r}"
        )
    sizes = []
    for size in target_sizes:
        try:
            height, width = (operator.index(edge) for edge in size)
        except (TypeError, ValueError):
            height = width = 0
        if height < 1 or width < 1:
            raise ValueError(
                f"target_sizes: expected pairs (height, width) of positive ints, got {size!r}"
            )
        sizes.append((height, width))
    return sizes

"""The all-MLP decode head, with every projection applied at its own stage's resolution.

A 1x1 convolution commutes with bilinear upsampling, so a stage's linear projection, its slice of
the fuse convolution and BatchNorm make one C_i x D matrix (`fastseg.folding`):

    logits = relu(x_1 M_1 + b + sum_i upsample(x_i M_i)) W + c

The usual order upsamples first and runs a 4 D x D convolution over all H/4 x W/4 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .bilinear import bilinear_source, row_stripes, upsample_rows


def decode_head(
    feature_maps: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    bias: torch.Tensor,
    classifier_weight: torch.Tensor,
    classifier_bias: torch.Tensor,
) -> torch.Tensor:
    """Logits from the maps of all stages, finest first.

    Args:
        feature_maps: (B, C_i, H_i, W_i), each the channels-last view of tokens.
        weights: M_i as (D, C_i).
        bias: (D,), BatchNorm inside.
        classifier_weight, classifier_bias: (K, D), (K,).

    Returns:
        (B, K, H_1, W_1), in channels-last memory.
    """
    finest = feature_maps[0].permute(0, 2, 3, 1)
    batch, height, width, _ = finest.shape
    decoder_channels = weights[0].shape[0]
    # The sum of the stages is kept in float32: in half precision each of its terms would be
    # rounded again, which one convolution over concatenated maps does not do.
    sum_dtype = torch.promote_types(finest.dtype, torch.float32)
    row_bytes = batch * width * decoder_channels * sum_dtype.itemsize
    coarse = []
    for feature_map, weight in zip(feature_maps[1:], weights[1:], strict=True):
        projected = F.linear(feature_map.permute(0, 2, 3, 1), weight).to(sum_dtype)
        rows = bilinear_source(height, projected.shape[1], projected.device, projected.dtype)
        coarse.append((projected, rows))

    logits: torch.Tensor | None = None
    for top, bottom in row_stripes(height, row_bytes, finest.device):
        fused = F.linear(finest[:, top:bottom], weights[0], bias).to(sum_dtype)
        for projected, rows in coarse:
            fused += upsample_rows(projected, rows, top, bottom, width)
        fused = fused.relu_().to(finest.dtype)
        stripe = F.linear(fused, classifier_weight, classifier_bias)
        if bottom - top == height:
            logits = stripe
            break
        if logits is None:  # in the dtype of the classifier's output, which autocast may choose
            logits = stripe.new_empty(batch, height, width, stripe.shape[-1])
        logits[:, top:bottom] = stripe
    assert logits is not None
    return logits.permute(0, 3, 1, 2)

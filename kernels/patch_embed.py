"""Overlapping patch embedding: strided convolution, then LayerNorm, straight to tokens.

The convolution runs on channels-last memory, so its output already is the token matrix: between
stages neither a transpose nor a copy is made.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def patch_embed(
    feature_map: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    *,
    stride: int,
    padding: int,
    eps: float,
) -> tuple[torch.Tensor, int, int]:
    """Embed the patches of `feature_map`.

    Args:
        feature_map: (B, C_in, H_in, W_in): pixels, or the channels-last view of a stage's tokens.
        weight: (C, C_in, k, k) of the convolution, best in channels-last memory; bias: (C,).
        norm_weight, norm_bias: (C,) of the LayerNorm over channels.
        stride, padding: of the convolution.
        eps: of the LayerNorm.

    Returns:
        tokens (B, H * W, C), contiguous, and H, W with H = (H_in + 2 * padding - k) // stride + 1.
    """
    # Left to itself, a convolution of contiguous pixels answers in NCHW and costs a transpose.
    feature_map = feature_map.contiguous(memory_format=torch.channels_last)
    embedded = F.conv2d(feature_map, weight, bias, stride=stride, padding=padding)
    batch, channels, height, width = embedded.shape
    tokens = embedded.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
    return F.layer_norm(tokens, (channels,), norm_weight, norm_bias, eps), height, width

"""Arguments of patch_embed, and a configuration of each form."""

from __future__ import annotations

import torch

from fastseg import kernels
from tests.kernels.triton.kernel_cases import randn

FORMS = {
    "whole_row": {
        "form": "whole_row",
        "BLOCK_M": 32,
        "BLOCK_N": 32,
        "BLOCK_K": 32,
        "num_warps": 4,
        "num_stages": 2,
    },
    "split": {
        "form": "split",
        "BLOCK_M": 32,
        "BLOCK_N": 32,
        "BLOCK_K": 32,
        "SPLIT": 2,
        "num_warps": 4,
        "num_stages": 2,
    },
}


def patch_embed(
    feature_map, weight, bias, norm_weight, norm_bias, *, stride, padding, eps, **pixels
):
    """The op, on weights made of the arguments."""
    weights = kernels.PatchEmbedWeights(
        weight, bias, norm_weight, norm_bias, stride=stride, padding=padding, eps=eps
    )
    return kernels.patch_embed(feature_map, weights, **pixels)


def parameters(in_channels, channels, kernel, dtype, device):
    """weight, bias, norm_weight, norm_bias."""
    scale = (in_channels * kernel**2) ** -0.5
    weight = randn(channels, in_channels, kernel, kernel, dtype=dtype, device=device, scale=scale)
    bias, norm_bias = (randn(channels, dtype=dtype, device=device, scale=0.3) for _ in range(2))
    norm_weight = randn(channels, dtype=dtype, device=device, scale=0.2) + 1
    return weight.contiguous(memory_format=torch.channels_last), bias, norm_weight, norm_bias


def tokens_map(batch, channels, height, width, dtype, device):
    tokens = randn(batch, height * width, channels, dtype=dtype, device=device)
    return tokens.view(batch, height, width, channels).permute(0, 3, 1, 2)

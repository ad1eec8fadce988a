"""Algebra that folds of all families share: exact, in float64, and cast last."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float64, on the CPU where its device may have none."""
    device = tensor.device if tensor.device.type in ("cpu", "cuda", "meta") else "cpu"
    return tensor.detach().to(device=device, dtype=torch.float64)


def wide_affine(
    layer: nn.Linear | nn.Conv2d | nn.LayerNorm | nn.BatchNorm2d,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a Linear, Conv2d or LayerNorm in float64; zeros where it has no bias."""
    weight = wide(layer.weight)
    bias = weight.new_zeros(weight.shape[0]) if layer.bias is None else wide(layer.bias)
    return weight, bias


def fold_norm_into_linear(
    norm: nn.LayerNorm, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move LayerNorm's affine part into the linear map after it (A1).

    W (z * gamma + beta) + b = (W diag(gamma)) z + (b + W beta).

    Args:
        weight, bias: (out, C) and (out,), float64.
    """
    gamma, beta = wide_affine(norm)
    return weight * gamma, bias + weight @ beta


def batch_norm_affine(batch_norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Gain and shift of each channel, in eval mode, in float64."""
    assert batch_norm.running_var is not None
    assert batch_norm.running_mean is not None
    gain = torch.rsqrt(wide(batch_norm.running_var) + batch_norm.eps)
    shift = -wide(batch_norm.running_mean) * gain
    if batch_norm.affine:
        gamma, beta = wide_affine(batch_norm)
        gain, shift = gain * gamma, shift * gamma + beta
    return gain, shift


def input_sums(weight: torch.Tensor) -> torch.Tensor:
    """Sums of a narrow weight over its last dimension, its input channels, in float32 at least.

    They are what a row's mean adds to each output: of the weight as it is rounded, so that the mean
    cancels (A2).
    """
    return weight.sum(-1, dtype=torch.promote_types(weight.dtype, torch.float32))


def narrow(tensors: dict[str, torch.Tensor], like: torch.Tensor) -> dict[str, Any]:
    """Cast tensors to the dtype and device of `like`, contiguous."""
    return {
        name: tensor.to(device=like.device, dtype=like.dtype).contiguous()
        for name, tensor in tensors.items()
    }

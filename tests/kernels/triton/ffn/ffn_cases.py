"""Folded weights of mix_ffn."""

from __future__ import annotations

import torch

from fastseg import kernels
from tests.kernels.triton.kernel_cases import randn


def mix_ffn(x, height, width, norm_weight=None, norm_bias=None, norm_eps=1e-5, **arguments):
    """The op, on weights made of `arguments`."""
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias, "norm_eps": norm_eps}
    return kernels.mix_ffn(x, height, width, kernels.MixFfnWeights(**arguments), **norm)


def weights(channels, dtype, device, ratio=4, norm=False, like=randn):
    """Arguments of `mix_ffn` that keep values of order one, taps as kernels like them."""
    hidden = ratio * channels
    taps = like(9, hidden, dtype=dtype, device=device, scale=1 / 3)
    folded = {
        "eps": 1e-5,
        "fc1_weight": like(hidden, channels, dtype=dtype, device=device, scale=channels**-0.5),
        "fc1_bias": like(hidden, dtype=dtype, device=device, scale=0.5),
        "dwconv_weight": taps.t().unflatten(1, (1, 3, 3)),
        "dwconv_bias": like(hidden, dtype=dtype, device=device, scale=0.3),
        "fc2_weight": like(channels, hidden, dtype=dtype, device=device, scale=hidden**-0.5),
        "fc2_bias": like(channels, dtype=dtype, device=device, scale=0.3),
    }
    folded["fc1_weight_sum"] = folded["fc1_weight"].sum(1, dtype=torch.float32)
    if norm:
        folded["norm_weight"] = like(channels, dtype=dtype, device=device, scale=0.2) + 1
        folded["norm_bias"] = like(channels, dtype=dtype, device=device, scale=0.2)
        folded["norm_eps"] = 1e-3
    return folded

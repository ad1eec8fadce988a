"""Arguments of decode_head, and widths of maps."""

from __future__ import annotations

from fastseg import kernels
from tests.kernels.triton.kernel_cases import randn

B0 = (32, 64, 160, 256)
B1 = (64, 128, 320, 512)
NARROW = (32, 32, 32, 32)


def decode_head(maps, weights, bias, classifier=None, classifier_bias=None):
    """The op, on weights made of the arguments."""
    made = kernels.DecodeHeadWeights(tuple(weights), bias, classifier, classifier_bias)
    return kernels.decode_head(maps, made)


def head(batch, sizes, channels, width, classes, dtype, device):
    """Arguments of decode_head."""
    maps = [
        randn(batch, h * w, c, dtype=dtype, device=device).view(batch, h, w, c).permute(0, 3, 1, 2)
        for (h, w), c in zip(sizes, channels, strict=True)
    ]
    weights = [randn(width, c, dtype=dtype, device=device, scale=c**-0.5) for c in channels]
    bias = randn(width, dtype=dtype, device=device, scale=0.3)
    classifier = randn(classes, width, dtype=dtype, device=device, scale=width**-0.5)
    return maps, weights, bias, classifier, randn(classes, dtype=dtype, device=device, scale=0.3)

"""The forwards that stages of `bench gpu` compile, check and take apart."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

import fastseg

from ..setting import DTYPES, Setting, build_model, draw_pixels

_SIZE = (512, 512)
FORWARDS = (
    *(Setting(*one, "bfloat16") for one in product(("b0", "b2", "b5"), [_SIZE], (1, 8))),
    Setting("b0", _SIZE, 1, "float32"),
)
QUICK = (Setting("b0", (64, 64), 1, "float32"),)


def build(setting: Setting, device: torch.device) -> tuple[torch.nn.Module, torch.Tensor]:
    """fastseg's model and pixels for it."""
    dtype = DTYPES[setting.dtype]
    pixels = draw_pixels(setting.size, setting.batch).to(device, dtype)
    return build_model(setting.variant, device, dtype), pixels


def label_map(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The label map (B, H, W) of `pixels` (B, 3, H, W), without a graph but the caller's own."""
    height, width = pixels.shape[2:]
    with fastseg.graphs(False):
        return fastseg.kernels.upsample_argmax(model(pixels).logits, (height, width))

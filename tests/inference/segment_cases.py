"""Pictures, and mmseg's sliding windows done step by step."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import fastseg


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def mmseg_logits(model, pixel_values, crop, stride):
    """The logits of mmseg's EncoderDecoder.slide_inference, with a canvas of all classes."""
    height, width = pixel_values.shape[2:]
    rows = max(height - crop[0] + stride[0] - 1, 0) // stride[0] + 1
    columns = max(width - crop[1] + stride[1] - 1, 0) // stride[1] + 1
    canvas = torch.zeros(1, model.config.num_labels, height, width)
    count = torch.zeros(1, 1, height, width)
    for row in range(rows):
        for column in range(columns):
            bottom = min(row * stride[0] + crop[0], height)
            right = min(column * stride[1] + crop[1], width)
            top, left = max(bottom - crop[0], 0), max(right - crop[1], 0)
            window = pixel_values[:, :, top:bottom, left:right]
            with torch.no_grad(), fastseg.plain_path():
                logits = model(window).logits
            canvas[:, :, top:bottom, left:right] += F.interpolate(
                logits, size=window.shape[2:], mode="bilinear", align_corners=False
            )
            count[:, :, top:bottom, left:right] += 1
    assert (count > 0).all()
    return canvas / count

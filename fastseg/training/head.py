"""The all-MLP decode head with gradients: every projection at its own stage's size.

As it is written the head resizes the projections of all stages to the finest, and a 1x1 convolution
fuses them there:  f = F cat(up(P_i x_i + p_i)).  A 1x1 convolution commutes with resizing, so

    f = sum_i up(W_i x_i) + b,     W_i = F_i P_i,     b = sum_i F_i p_i,

the same function of the same parameters, for gradients of any order too. W_i is a small product
that is made in each step. What comes after, from the normalisation on, runs as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as _module

from fastseg.folding.conditions import has_forward_hooks, is_plain_path, tracing_reason
from fastseg.kernels.core.checks import is_exporting


def head_reason(
    projections: Sequence[nn.Module], around: Sequence[nn.Module], fuse: nn.Module, *inputs: Any
) -> str | None:
    """Reason why a head in training has to run as it is written; None where it need not.

    Args:
        projections: the linear layers of the stages.
        around: the modules that call them.
        fuse: the 1x1 convolution over all of them.
    """
    if is_plain_path():
        return "asked for by fastseg.plain_path"
    if reason := tracing_reason(*inputs):
        return reason
    if is_exporting():
        return "it is exported"
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return "global forward hooks want to see every module"
    kinds = [(one, nn.Linear) for one in projections] + [(fuse, nn.Conv2d)]
    for one, kind in kinds:
        if type(one) is not kind:  # LoRA, quantised layers, parametrizations
            return f"one of its layers is a {type(one).__name__}"
    convolution: Any = fuse
    form = (convolution.kernel_size, convolution.stride, convolution.padding, convolution.groups)
    if form != ((1, 1), (1, 1), (0, 0), 1):
        return "its fuse convolution is not pointwise"
    for one in (*projections, *around, fuse):
        if "forward" in one.__dict__:
            return "one of its layers has a forward of its own"
        if has_forward_hooks(one) or one._backward_hooks or one._backward_pre_hooks:
            return "one of its layers has hooks"
    return None


def fused_map(
    maps: Sequence[torch.Tensor], projections: Sequence[nn.Linear], fuse: nn.Conv2d
) -> torch.Tensor:
    """What the fuse convolution gives of the resized projections of all maps, (B, D, H, W).

    Args:
        maps: (B, C_i, H_i, W_i), finest first; the convolution has the coarsest first.
    """
    weights, bias = _products(projections, fuse)
    size = maps[0].shape[2:]
    # As the encoder's maps are, and what projections of tokens give: dropout draws in this order.
    maps = [one.contiguous(memory_format=torch.channels_last) for one in maps]
    total = F.conv2d(maps[0], weights[0], bias)
    for one, weight in zip(maps[1:], weights[1:], strict=True):
        projected = F.conv2d(one, weight)
        total = total + F.interpolate(projected, size=size, mode="bilinear", align_corners=False)
    return total


def _products(
    projections: Sequence[nn.Linear], fuse: nn.Conv2d
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """W_i (D, C_i, 1, 1) and b (D,), in float32 at least until they are done."""
    # Autocast would round them here, and again where they are used.
    with torch.autocast(fuse.weight.device.type, enabled=False):
        kept = fuse.weight.dtype
        wide = torch.promote_types(kept, torch.float32)
        parts = fuse.weight.flatten(1).to(wide).chunk(len(projections), dim=1)[::-1]
        weights, bias = [], None if fuse.bias is None else fuse.bias.to(wide)
        for part, projection in zip(parts, projections, strict=True):
            weights.append((part @ projection.weight.to(wide)).to(kept)[:, :, None, None])
            if projection.bias is not None:
                moved = part @ projection.bias.to(wide)
                bias = moved if bias is None else bias + moved
        return weights, None if bias is None else bias.to(kept)

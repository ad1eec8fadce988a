"""The all-MLP decode head with gradients: every projection at its own stage's size.

As it is written the head resizes the projections of all stages to the finest, and a 1x1 convolution
fuses them there:  f = F cat(up(P_i x_i + p_i)).  A 1x1 convolution commutes with resizing, so

    f = sum_i up(W_i x_i) + b,     W_i = F_i P_i,     b = sum_i F_i p_i,

the same function of the same parameters. W_i is a small product that is made in each step. What
comes after, from the normalisation on, runs in stripes with it (`stripes.py`) where it is what it
usually is, and by its own modules elsewhere, of which gradients of any order are there too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as _module

from fastseg.folding.conditions import has_forward_hooks, is_plain_path, tracing_reason
from fastseg.folding.sharded import is_gathered
from fastseg.kernels.core.checks import is_exporting

from .masks import is_compared
from .mix_ffn import product_dtype
from .stripes import logits_in_stripes

# Numbers of the fused map from which it runs in stripes: below, modules take a few ms less.
_FEWEST = 1 << 18


class HeadModules(NamedTuple):
    """A head by the roles of its modules."""

    projections: Sequence[Any]  # the linear layers of the stages, finest first
    around: Sequence[nn.Module]  # the modules that call others
    fuse: Any  # the 1x1 convolution over all projections, coarsest first
    norm: Any
    activation: nn.Module
    dropout: nn.Module | None
    classifier: Any


def head_reason(head: HeadModules, *inputs: Any) -> str | None:
    """Reason why a head in training has to run as it is written; None where it need not."""
    if is_plain_path():
        return "asked for by fastseg.plain_path"
    if reason := tracing_reason(*inputs):
        return reason
    if is_exporting():
        return "it is exported"
    if _module._global_forward_hooks or _module._global_forward_pre_hooks:
        return "global forward hooks want to see every module"
    kinds = [(one, nn.Linear) for one in head.projections] + [(head.fuse, nn.Conv2d)]
    for one, kind in kinds:
        if type(one) is not kind:  # LoRA, quantised layers, parametrizations
            return f"one of its layers is a {type(one).__name__}"
        is_plain = type(one.weight) in (nn.Parameter, torch.Tensor)
        if not is_plain and not is_gathered(one, one.weight):  # as a report sees it
            return f"one of its layers has a {type(one.weight).__name__}"
    if not _is_pointwise(head.fuse):
        return "its fuse convolution is not pointwise"
    for one in (*head.projections, *head.around, head.fuse):
        if "forward" in one.__dict__:
            return "one of its layers has a forward of its own"
        if _has_hooks(one):
            return "one of its layers has hooks"
    return None


def stripes_reason(head: HeadModules, *maps: torch.Tensor) -> str | None:
    """Reason why what comes after the fuse convolution runs by its own modules; None where not."""
    known = {
        "normalisation": (head.norm, (nn.BatchNorm2d,)),
        "activation": (head.activation, (nn.ReLU,)),
        "dropout": (head.dropout, (nn.Dropout, nn.Dropout2d, type(None))),
        "classifier": (head.classifier, (nn.Conv2d,)),
    }
    for name, (one, kinds) in known.items():
        if type(one) not in kinds:
            return f"its {name} is a {type(one).__name__}"
        if one is not None and ("forward" in one.__dict__ or _has_hooks(one)):
            return f"its {name} has hooks or a forward of its own"
    if not _is_pointwise(head.classifier):
        return "its classifier is not pointwise"
    if not head.norm.training or not head.norm.affine:
        return "its normalisation is frozen, or has no weight"
    if head.dropout is not None and head.dropout.p == 1:
        return "its dropout leaves nothing"
    if head.classifier.weight.device.type != "cpu":
        return "stripes are for a CPU"
    if len(head.projections) == 1:
        return "it has one stage"
    if maps and maps[0].numel() == maps[0].shape[1]:
        return "a batch of one position has no variance"
    size = maps[0][:, 0].numel() * head.fuse.weight.shape[0] if maps else _FEWEST
    # In half precision the stripes round less.
    is_wide = product_dtype(head.fuse.weight) in (torch.float32, torch.float64)
    if size < _FEWEST and is_wide and not is_compared():
        return "its maps are small"
    return None


def _is_pointwise(convolution: Any) -> bool:
    form = (convolution.kernel_size, convolution.stride, convolution.padding, convolution.groups)
    return form == ((1, 1), (1, 1), (0, 0), 1)


def _has_hooks(one: nn.Module) -> bool:
    return bool(has_forward_hooks(one) or one._backward_hooks or one._backward_pre_hooks)


def head_logits(head: HeadModules, maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """The logits (B, K, H, W) of a head for which `head_reason` is None.

    Args:
        maps: (B, C_i, H_i, W_i), finest first.
    """
    weights, bias = _products(head.projections, head.fuse)
    if stripes_reason(head, *maps) is None:
        return logits_in_stripes(maps, weights, bias, head.norm, head.dropout, head.classifier)
    fused = head.activation(head.norm(_fused_map(maps, weights, bias)))
    return head.classifier(fused if head.dropout is None else head.dropout(fused))


def _fused_map(
    maps: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], bias: torch.Tensor | None
) -> torch.Tensor:
    """What the fuse convolution gives of the resized projections of all maps, (B, D, H, W)."""
    size = maps[0].shape[2:]
    # As the encoder's maps are, and what projections of tokens give: dropout draws in this order.
    maps = [one.contiguous(memory_format=torch.channels_last) for one in maps]
    total = F.conv2d(maps[0], weights[0][:, :, None, None], bias)
    for one, weight in zip(maps[1:], weights[1:], strict=True):
        projected = F.conv2d(one, weight[:, :, None, None])
        total = total + F.interpolate(projected, size=size, mode="bilinear", align_corners=False)
    return total


def _products(
    projections: Sequence[nn.Linear], fuse: nn.Conv2d
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """W_i (D, C_i) and b (D,), in float32 at least until they are done."""
    # Autocast would round them here, and again where they are used.
    with torch.autocast(fuse.weight.device.type, enabled=False):
        kept = fuse.weight.dtype
        wide = torch.promote_types(kept, torch.float32)
        parts = fuse.weight.flatten(1).to(wide).chunk(len(projections), dim=1)[::-1]
        weights, bias = [], None if fuse.bias is None else fuse.bias.to(wide)
        for part, projection in zip(parts, projections, strict=True):
            weights.append((part @ projection.weight.to(wide)).to(kept))
            if projection.bias is not None:
                moved = part @ projection.bias.to(wide)
                bias = moved if bias is None else bias + moved
        return weights, None if bias is None else bias.to(kept)

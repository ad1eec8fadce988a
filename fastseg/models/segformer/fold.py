"""The weights that `fastseg.kernels` takes, from a layer's parameters.

Exact algebra, computed in float64 and cast last. Each function takes plain `torch.nn` modules by
role, so it serves any model that has them. The maths is in the docstrings of the ops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from fastseg.folding.algebra import (
    batch_norm_affine,
    fold_norm_into_linear,
    input_sums,
    narrow,
    wide_affine,
)
from fastseg.kernels import (
    DecodeHeadWeights,
    MixFfnWeights,
    PatchEmbedWeights,
    SrAttentionWeights,
)

from .layers import SameConv2d


def fold_sr_attention(
    norm: nn.LayerNorm,
    query: nn.Linear,
    key: nn.Linear,
    value: nn.Linear,
    output: nn.Linear,
    num_heads: int,
    reduction: nn.Conv2d | None = None,
    reduction_norm: nn.LayerNorm | None = None,
    mixes_channels: bool = False,
) -> SrAttentionWeights:
    """Weights of `kernels.sr_attention`."""
    sr_ratio, sr_eps = 1, 1e-5
    wide: dict[str, torch.Tensor] = {}
    key_value_norm = norm
    if reduction is not None and reduction_norm is not None:
        weight, bias = wide_affine(reduction)
        gamma, beta = wide_affine(norm)
        if mixes_channels:  # which channel a tap sees depends on where its window lies
            wide["norm_weight"], wide["norm_bias"] = gamma, beta
        else:
            bias = bias + torch.einsum("oihw,i->o", weight, beta)
            weight = weight * gamma[:, None, None]
        wide["sr_bias"] = bias
        wide["sr_weight"] = weight.permute(0, 2, 3, 1).flatten(1)
        sr_ratio, sr_eps, key_value_norm = reduction.stride[0], reduction_norm.eps, reduction_norm
    query_weight, query_bias = fold_norm_into_linear(norm, *wide_affine(query))
    key_weight, _ = fold_norm_into_linear(key_value_norm, *wide_affine(key))
    value_weight, value_bias = fold_norm_into_linear(key_value_norm, *wide_affine(value))
    output_weight, output_bias = wide_affine(output)
    wide["output_bias"] = output_bias + output_weight @ value_bias

    scale = (query_weight.shape[0] // num_heads) ** -0.5
    query_weight, query_bias = query_weight * scale, query_bias * scale
    if num_heads == 1:
        absorbed_key = query_weight.T @ key_weight
        absorbed_value = output_weight @ value_weight
        wide["key_value_weight"] = torch.cat([absorbed_key, absorbed_value])
        wide["key_offset_weight"] = key_weight.T @ query_bias
    else:
        wide["query_weight"], wide["query_bias"] = query_weight, query_bias
        wide["key_value_weight"] = torch.cat([key_weight, value_weight])
        wide["output_weight"] = output_weight
    tensors = narrow(wide, like=query.weight)
    if sr_ratio > 1:
        taps = tensors["sr_weight"].unflatten(1, (sr_ratio**2, -1))
        tensors["sr_weight_sum"] = input_sums(taps).t().contiguous()
    if num_heads > 1:
        tensors["query_weight_sum"] = input_sums(tensors["query_weight"])
        if sr_ratio == 1:
            tensors["key_value_weight_sum"] = input_sums(tensors["key_value_weight"])
    return SrAttentionWeights(
        num_heads=num_heads, sr_ratio=sr_ratio, eps=norm.eps, sr_eps=sr_eps, **tensors
    )


def fold_mix_ffn(
    norm: nn.LayerNorm, fc1: nn.Linear, dwconv: nn.Conv2d, fc2: nn.Linear, activation: str = "gelu"
) -> MixFfnWeights:
    """Weights of `kernels.mix_ffn`, without a LayerNorm of the result."""
    fc1_weight, fc1_bias = fold_norm_into_linear(norm, *wide_affine(fc1))
    dwconv_weight, dwconv_bias = wide_affine(dwconv)
    fc2_weight, fc2_bias = wide_affine(fc2)
    wide = {
        "fc1_weight": fc1_weight,
        "fc1_bias": fc1_bias,
        "dwconv_weight": dwconv_weight,
        "dwconv_bias": dwconv_bias,
        "fc2_weight": fc2_weight,
        "fc2_bias": fc2_bias,
    }
    tensors = narrow(wide, like=fc1.weight)
    # The mean cancels against the sums of the weight as it is rounded.
    tensors["fc1_weight_sum"] = input_sums(tensors["fc1_weight"])
    if fc1.weight.device.type != "cpu":
        # Kernels want the channels of a tap side by side. On a CPU conv2d would copy such a weight
        # at each call, 5 to 17 us: up to a tenth of the convolution.
        taps = tensors["dwconv_weight"].flatten(1).t().contiguous()
        tensors["dwconv_weight"] = taps.t().unflatten(1, (1, 3, 3))
    return MixFfnWeights(eps=norm.eps, activation=activation, **tensors)


def fold_patch_embed(proj: nn.Conv2d, norm: nn.LayerNorm) -> PatchEmbedWeights:
    """Weights of `kernels.patch_embed`.

    Nothing is folded: the convolution's weight in channels-last memory, the rest as it is. Where
    padding "same" is odd, it is that of a kernel with a row and a column of zeros more in front,
    which pads evenly: the same sums.
    """
    weight = proj.weight.detach()
    padding = proj.padding[0]
    if isinstance(proj, SameConv2d):
        total = weight.shape[2] - proj.stride[0]
        odd = total % 2
        weight, padding = F.pad(weight, (odd, 0, odd, 0)), (total + odd) // 2
    bias = weight.new_zeros(len(weight)) if proj.bias is None else proj.bias.detach()
    return PatchEmbedWeights(
        weight=weight.contiguous(memory_format=torch.channels_last),
        bias=bias,
        norm_weight=norm.weight.detach(),
        norm_bias=norm.bias.detach(),
        stride=proj.stride[0],
        padding=padding,  # type: ignore[arg-type]
        eps=norm.eps,
    )


def fold_fuse(
    projections: Sequence[nn.Linear],
    fuse: nn.Conv2d,
    batch_norm: nn.BatchNorm2d,
    finest_first: bool = False,
) -> DecodeHeadWeights:
    """Weights of `kernels.decode_head` without a classifier.

    Args:
        projections: one for each stage, finest first.
        fuse: 1x1 convolution of the concatenated projections, COARSEST first in nearly all
            SegFormers.
        finest_first: they are concatenated the other way round.
    """
    fuse_weight, bias = wide_affine(fuse)
    slices = fuse_weight.flatten(1).chunk(len(projections), dim=1)[:: 1 if finest_first else -1]
    weights = []
    for projection, fuse_slice in zip(projections, slices, strict=True):
        weight, projection_bias = wide_affine(projection)
        weights.append(fuse_slice @ weight)
        bias = bias + fuse_slice @ projection_bias
    gain, shift = batch_norm_affine(batch_norm)
    like = projections[0].weight
    cast = tuple((gain[:, None] * weight).to(like.device, like.dtype) for weight in weights)
    return DecodeHeadWeights(cast, **narrow({"bias": bias * gain + shift}, like))


def fold_classifier(classifier: nn.Conv2d) -> dict[str, torch.Tensor]:
    """The classifier's fields of `DecodeHeadWeights`."""
    weight, bias = wide_affine(classifier)
    wide = {"classifier_weight": weight.flatten(1), "classifier_bias": bias}
    return narrow(wide, like=classifier.weight)

"""From a layer's parameters to the folded tensors that `fastseg.kernels` takes.

Exact algebra, computed in float64 and cast last. Each function takes plain `torch.nn` modules by
role, so it serves any model that has them. The maths is in the docstrings of the ops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastseg.folding.algebra import (
    batch_norm_affine,
    fold_norm_into_linear,
    input_sums,
    narrow,
    wide_affine,
)
from fastseg.folding.cache import Packed


def fold_sr_attention(
    norm: nn.LayerNorm,
    query: nn.Linear,
    key: nn.Linear,
    value: nn.Linear,
    output: nn.Linear,
    num_heads: int,
    reduction: nn.Conv2d | None = None,
    reduction_norm: nn.LayerNorm | None = None,
) -> Packed:
    """Keyword arguments of `kernels.sr_attention`, but for the tokens and their grid."""
    packed: Packed = {"num_heads": num_heads, "eps": norm.eps, "sr_ratio": 1}
    key_value_norm = norm
    if reduction is not None and reduction_norm is not None:
        weight, bias = wide_affine(reduction)
        gamma, beta = wide_affine(norm)
        bias = bias + torch.einsum("oihw,i->o", weight, beta)
        weight = (weight * gamma[:, None, None]).permute(0, 2, 3, 1).flatten(1)
        packed.update(
            sr_ratio=reduction.stride[0],
            sr_weight=weight,
            sr_bias=bias,
            sr_eps=reduction_norm.eps,
        )
        key_value_norm = reduction_norm
    query_weight, query_bias = fold_norm_into_linear(norm, *wide_affine(query))
    key_weight, _ = fold_norm_into_linear(key_value_norm, *wide_affine(key))
    value_weight, value_bias = fold_norm_into_linear(key_value_norm, *wide_affine(value))
    output_weight, output_bias = wide_affine(output)
    packed["output_bias"] = output_bias + output_weight @ value_bias

    scale = (query_weight.shape[0] // num_heads) ** -0.5
    query_weight, query_bias = query_weight * scale, query_bias * scale
    if num_heads == 1:
        absorbed_key = query_weight.T @ key_weight
        absorbed_value = output_weight @ value_weight
        packed["key_value_weight"] = torch.cat([absorbed_key, absorbed_value])
        packed["key_offset_weight"] = key_weight.T @ query_bias
    else:
        packed["query_weight"], packed["query_bias"] = query_weight, query_bias
        packed["key_value_weight"] = torch.cat([key_weight, value_weight])
        packed["output_weight"] = output_weight
    packed = narrow(packed, like=query.weight)
    if packed["sr_ratio"] > 1:
        taps = packed["sr_weight"].unflatten(1, (packed["sr_ratio"] ** 2, -1))
        packed["sr_weight_sum"] = input_sums(taps).t().contiguous()
    if num_heads > 1:
        packed["query_weight_sum"] = input_sums(packed["query_weight"])
        if packed["sr_ratio"] == 1:
            packed["key_value_weight_sum"] = input_sums(packed["key_value_weight"])
    return packed


def fold_mix_ffn(norm: nn.LayerNorm, fc1: nn.Linear, dwconv: nn.Conv2d, fc2: nn.Linear) -> Packed:
    """Keyword arguments of `kernels.mix_ffn`, but for the tokens, their grid and the activation."""
    fc1_weight, fc1_bias = fold_norm_into_linear(norm, *wide_affine(fc1))
    dwconv_weight, dwconv_bias = wide_affine(dwconv)
    fc2_weight, fc2_bias = wide_affine(fc2)
    packed = {
        "fc1_weight": fc1_weight,
        "fc1_bias": fc1_bias,
        "dwconv_weight": dwconv_weight,
        "dwconv_bias": dwconv_bias,
        "fc2_weight": fc2_weight,
        "fc2_bias": fc2_bias,
    }
    packed = narrow(packed, like=fc1.weight)
    # The mean cancels against the sums of the weight as it is rounded.
    sum_dtype = torch.promote_types(fc1.weight.dtype, torch.float32)
    packed["fc1_weight_sum"] = packed["fc1_weight"].sum(1, dtype=sum_dtype)
    if fc1.weight.device.type != "cpu":
        # Kernels want the channels of a tap side by side. On a CPU conv2d would copy such a weight
        # at each call, 5 to 17 us: up to a tenth of the convolution.
        taps = packed["dwconv_weight"].flatten(1).t().contiguous()
        packed["dwconv_weight"] = taps.t().unflatten(1, (1, 3, 3))
    return {"eps": norm.eps, **packed}


def fold_patch_embed(proj: nn.Conv2d, norm: nn.LayerNorm) -> Packed:
    """Keyword arguments of `kernels.patch_embed`, but for the map.

    Nothing is folded: the convolution's weight in channels-last memory, the rest as it is.
    """
    weight = proj.weight.detach()
    bias = weight.new_zeros(len(weight)) if proj.bias is None else proj.bias.detach()
    return {
        "weight": weight.contiguous(memory_format=torch.channels_last),
        "bias": bias,
        "norm_weight": norm.weight.detach(),
        "norm_bias": norm.bias.detach(),
        "stride": proj.stride[0],
        "padding": proj.padding[0],
        "eps": norm.eps,
    }


def fold_decode_head(
    projections: Sequence[nn.Linear],
    fuse: nn.Conv2d,
    batch_norm: nn.BatchNorm2d,
    classifier: nn.Conv2d,
) -> Packed:
    """Arguments of `kernels.decode_head`, but for the maps.

    Args:
        projections: one for each stage, finest first.
        fuse: 1x1 convolution of the concatenated projections, COARSEST first, as all SegFormers
            concatenate them.
    """
    return {**fold_fuse(projections, fuse, batch_norm), **fold_classifier(classifier)}


def fold_fuse(
    projections: Sequence[nn.Linear], fuse: nn.Conv2d, batch_norm: nn.BatchNorm2d
) -> Packed:
    """Those of `fold_decode_head` without the classifier."""
    fuse_weight, bias = wide_affine(fuse)
    slices = fuse_weight.flatten(1).chunk(len(projections), dim=1)[::-1]
    weights = []
    for projection, fuse_slice in zip(projections, slices, strict=True):
        weight, projection_bias = wide_affine(projection)
        weights.append(fuse_slice @ weight)
        bias = bias + fuse_slice @ projection_bias
    gain, shift = batch_norm_affine(batch_norm)
    like = projections[0].weight
    folded = [(gain[:, None] * weight).to(like.device, like.dtype) for weight in weights]
    return {**narrow({"bias": bias * gain + shift}, like), "weights": folded}


def fold_classifier(classifier: nn.Conv2d) -> Packed:
    """The classifier's arguments of `kernels.decode_head`."""
    weight, bias = wide_affine(classifier)
    packed = {"classifier_weight": weight.flatten(1), "classifier_bias": bias}
    return narrow(packed, like=classifier.weight)

"""The folded tensors that `fastseg.kernels` takes, from a layer's parameters.

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
from fastseg.folding.fold import Folded


def fold_sr_attention(
    norm: nn.LayerNorm,
    query: nn.Linear,
    key: nn.Linear,
    value: nn.Linear,
    output: nn.Linear,
    num_heads: int,
    reduction: nn.Conv2d | None = None,
    reduction_norm: nn.LayerNorm | None = None,
) -> Folded:
    """Keyword arguments of `kernels.sr_attention`, but for the tokens and their grid."""
    folded: Folded = {"num_heads": num_heads, "eps": norm.eps, "sr_ratio": 1}
    key_value_norm = norm
    if reduction is not None and reduction_norm is not None:
        weight, bias = wide_affine(reduction)
        gamma, beta = wide_affine(norm)
        bias = bias + torch.einsum("oihw,i->o", weight, beta)
        weight = (weight * gamma[:, None, None]).permute(0, 2, 3, 1).flatten(1)
        folded.update(
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
    folded["output_bias"] = output_bias + output_weight @ value_bias

    scale = (query_weight.shape[0] // num_heads) ** -0.5
    query_weight, query_bias = query_weight * scale, query_bias * scale
    if num_heads == 1:
        absorbed_key = query_weight.T @ key_weight
        absorbed_value = output_weight @ value_weight
        folded["key_value_weight"] = torch.cat([absorbed_key, absorbed_value])
        folded["key_offset_weight"] = key_weight.T @ query_bias
    else:
        folded["query_weight"], folded["query_bias"] = query_weight, query_bias
        folded["key_value_weight"] = torch.cat([key_weight, value_weight])
        folded["output_weight"] = output_weight
    folded = narrow(folded, like=query.weight)
    if folded["sr_ratio"] > 1:
        taps = folded["sr_weight"].unflatten(1, (folded["sr_ratio"] ** 2, -1))
        folded["sr_weight_sum"] = input_sums(taps).t().contiguous()
    if num_heads > 1:
        folded["query_weight_sum"] = input_sums(folded["query_weight"])
        if folded["sr_ratio"] == 1:
            folded["key_value_weight_sum"] = input_sums(folded["key_value_weight"])
    return folded


def fold_mix_ffn(norm: nn.LayerNorm, fc1: nn.Linear, dwconv: nn.Conv2d, fc2: nn.Linear) -> Folded:
    """Keyword arguments of `kernels.mix_ffn`, but for the tokens, their grid and the activation."""
    fc1_weight, fc1_bias = fold_norm_into_linear(norm, *wide_affine(fc1))
    dwconv_weight, dwconv_bias = wide_affine(dwconv)
    fc2_weight, fc2_bias = wide_affine(fc2)
    folded = {
        "fc1_weight": fc1_weight,
        "fc1_bias": fc1_bias,
        "dwconv_weight": dwconv_weight,
        "dwconv_bias": dwconv_bias,
        "fc2_weight": fc2_weight,
        "fc2_bias": fc2_bias,
    }
    folded = narrow(folded, like=fc1.weight)
    # The mean cancels against the sums of the weight as it is rounded.
    sum_dtype = torch.promote_types(fc1.weight.dtype, torch.float32)
    folded["fc1_weight_sum"] = folded["fc1_weight"].sum(1, dtype=sum_dtype)
    if fc1.weight.device.type != "cpu":
        # Kernels want the channels of a tap side by side. On a CPU conv2d would copy such a weight
        # at each call, 5 to 17 us: up to a tenth of the convolution.
        taps = folded["dwconv_weight"].flatten(1).t().contiguous()
        folded["dwconv_weight"] = taps.t().unflatten(1, (1, 3, 3))
    return {"eps": norm.eps, **folded}


def fold_patch_embed(proj: nn.Conv2d, norm: nn.LayerNorm) -> Folded:
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
) -> Folded:
    """Arguments of `kernels.decode_head`, but for the maps.

    Args:
        projections: one for each stage, finest first.
        fuse: 1x1 convolution of the concatenated projections, COARSEST first, as all SegFormers
            concatenate them.
    """
    return {**fold_fuse(projections, fuse, batch_norm), **fold_classifier(classifier)}


def fold_fuse(
    projections: Sequence[nn.Linear], fuse: nn.Conv2d, batch_norm: nn.BatchNorm2d
) -> Folded:
    """Arguments of `kernels.decode_head`, but for the maps and the classifier."""
    fuse_weight, bias = wide_affine(fuse)
    slices = fuse_weight.flatten(1).chunk(len(projections), dim=1)[::-1]
    weights = []
    for projection, fuse_slice in zip(projections, slices, strict=True):
        weight, projection_bias = wide_affine(projection)
        weights.append(fuse_slice @ weight)
        bias = bias + fuse_slice @ projection_bias
    gain, shift = batch_norm_affine(batch_norm)
    like = projections[0].weight
    cast = [(gain[:, None] * weight).to(like.device, like.dtype) for weight in weights]
    return {**narrow({"bias": bias * gain + shift}, like), "weights": cast}


def fold_classifier(classifier: nn.Conv2d) -> Folded:
    """The classifier's arguments of `kernels.decode_head`."""
    weight, bias = wide_affine(classifier)
    folded = {"classifier_weight": weight.flatten(1), "classifier_bias": bias}
    return narrow(folded, like=classifier.weight)

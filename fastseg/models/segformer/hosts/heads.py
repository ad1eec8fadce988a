"""Decode heads of other libraries: how each is recognised, and where its parts are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastseg.folding.algebra import batch_norm_affine, narrow, wide_affine
from fastseg.folding.find import Declined, find, find_leaf, find_pointwise
from fastseg.folding.swap import register_host
from fastseg.kernels import DecodeHeadWeights
from fastseg.training.head import HeadModules

from ..encoder_plan import Maps
from ..fold import fold_fuse
from ..head_plan import HeadHost
from .encoders import has


def _batch_norm(head: nn.Module, path: str) -> nn.BatchNorm2d:
    norm = find(head, path)
    if not isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) or norm.running_var is None:
        raise Declined(f"{path} is no BatchNorm with running statistics")
    return norm  # type: ignore[return-value]


def children(head: nn.Module, *without: str) -> list[nn.Module]:
    """The modules in `head` but for those of the names in `without`."""
    return [child for name, child in head.named_children() if name not in without]


# -- transformers ----------------------------------------------------------------------------------


def _transformers_projections(head: Any) -> str:
    return "linear_projections" if hasattr(head, "linear_projections") else "linear_c"


def _is_transformers(module: nn.Module) -> bool:
    return has(module, "linear_fuse", "batch_norm", "classifier", "config") and isinstance(
        find(module, _transformers_projections(module)), nn.ModuleList
    )


def fold_transformers(head: Any) -> DecodeHeadWeights:
    """The neck of a head with transformers' names, old or new."""
    path = _transformers_projections(head)
    projections = [
        find_leaf(head, f"{path}.{i}.proj", nn.Linear) for i in range(len(find(head, path)))
    ]
    fuse = find_pointwise(head, "linear_fuse")
    return fold_fuse(projections, fuse, _batch_norm(head, "batch_norm"))


def transformers_modules(head: Any) -> HeadModules:
    """A head with transformers' names, old or new, by the roles of its modules."""
    mlps = list(find(head, _transformers_projections(head)))
    return HeadModules(
        [mlp.proj for mlp in mlps],
        mlps,
        head.linear_fuse,
        head.batch_norm,
        head.activation,
        head.dropout,
        head.classifier,
    )


def _transformers_logits(head: Any, logits: torch.Tensor, maps: Maps) -> torch.Tensor:
    """Return `logits` in memory where classes are planes.

    transformers' post-processing resizes `logits[i].unsqueeze(0)`. Of channels-last logits that is
    a tensor which `interpolate` takes for a strided one, five times slower: 144 ms and 746 ms for
    150 classes to 512x512, on one core of an AMD EPYC. A forward of B0 gains less.
    """
    return logits.contiguous()


def _transformers_maps(
    head: Any, encoder_hidden_states: Sequence[torch.Tensor], **kwargs: Any
) -> Maps:
    maps = list(encoder_hidden_states)
    last = maps[-1]
    if last.ndim == 3:
        # Tokens, with reshape_last_stage=False. The library takes their grid for a square.
        height, width = (-(-side // 2) for side in maps[-2].shape[2:])
        maps[-1] = last.transpose(1, 2).unflatten(2, (height, width))
    return maps


# -- NVlabs ----------------------------------------------------------------------------------------


def _is_nvlabs(module: nn.Module) -> bool:
    projections = [f"linear_c{stage}.proj" for stage in range(1, 5)]
    return has(module, *projections, "linear_fuse.conv", "linear_fuse.bn", "linear_pred")


def _fold_nvlabs(head: Any) -> DecodeHeadWeights:
    projections = [find_leaf(head, f"linear_c{stage}.proj", nn.Linear) for stage in range(1, 5)]
    fuse = find_pointwise(head, "linear_fuse.conv")
    return fold_fuse(projections, fuse, _batch_norm(head, "linear_fuse.bn"))


def _nvlabs_modules(head: Any) -> HeadModules:
    mlps = [find(head, f"linear_c{stage}") for stage in range(1, 5)]
    unit = head.linear_fuse
    projections = [mlp.proj for mlp in mlps]
    behind = unit.bn, unit.activate, head.dropout, head.linear_pred
    return HeadModules(projections, [unit, *mlps], unit.conv, *behind)


# DAFormer's copy has the projections in a ModuleDict, and concatenates the finest map first.


def _is_daformer(module: nn.Module) -> bool:
    return has(module, "linear_fuse.conv", "linear_fuse.bn", "linear_pred", "in_index") and (
        isinstance(find(module, "linear_c"), nn.ModuleDict)
    )


def _fold_daformer(head: Any) -> DecodeHeadWeights:
    projections = [find_leaf(head, f"linear_c.{index}.proj", nn.Linear) for index in head.in_index]
    fuse = find_pointwise(head, "linear_fuse.conv")
    return fold_fuse(projections, fuse, _batch_norm(head, "linear_fuse.bn"), finest_first=True)


def _mmseg_maps(head: Any, inputs: Any, *args: Any) -> Maps:
    """Select from the encoder's maps as mmseg's base class of heads does."""
    if hasattr(head, "_transform_inputs"):
        return list(head._transform_inputs(inputs))
    return [inputs[index] for index in getattr(head, "in_index", range(len(inputs)))]


# -- open-mmlab's mmseg: a ReLU stands between each projection and its upsampling ------------------


def _is_mmseg(module: nn.Module) -> bool:
    return has(module, "convs.0.conv", "fusion_conv.conv", "fusion_conv.bn", "conv_seg")


def _folded_conv_module(head: Any, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (out, in) and bias of a 1x1 convolution with its BatchNorm, in float64."""
    weight, bias = wide_affine(find_pointwise(head, f"{path}.conv"))
    gain, shift = batch_norm_affine(_batch_norm(head, f"{path}.bn"))
    return gain[:, None] * weight.flatten(1), bias * gain + shift


def _fold_mmseg(head: Any) -> DecodeHeadWeights:
    like = head.fusion_conv.conv.weight
    weight, bias = _folded_conv_module(head, "fusion_conv")
    slices = weight.chunk(len(head.convs), dim=1)  # finest first here
    weights = tuple(one.to(like.device, like.dtype).contiguous() for one in slices)
    return DecodeHeadWeights(weights, **narrow({"bias": bias}, like))


def _mmseg_projections(head: Any) -> list[Any]:
    like = head.fusion_conv.conv.weight
    pairs = (_folded_conv_module(head, f"convs.{index}") for index in range(len(head.convs)))
    return [[tensor.to(like.device, like.dtype) for tensor in pair] for pair in pairs]


# -- segmentation_models_pytorch: the decoder and the classifier are parts of the whole model ------


def _is_smp(module: nn.Module) -> bool:
    return has(
        module,
        "encoder",
        "decoder.mlp_stage.0.linear",
        "decoder.fuse_stage.1",
        "segmentation_head.0",
    )


def _fold_smp(model: Any) -> DecodeHeadWeights:
    count = len(model.decoder.mlp_stage)
    projections = [
        find_leaf(model, f"decoder.mlp_stage.{index}.linear", nn.Linear)
        for index in reversed(range(count))
    ]
    fuse = find_pointwise(model, "decoder.fuse_stage.0")
    return fold_fuse(projections, fuse, _batch_norm(model, "decoder.fuse_stage.1"))


def _smp_modules(model: Any) -> HeadModules:
    decoder, last = model.decoder, model.segmentation_head
    mlps = list(decoder.mlp_stage)[::-1]
    around = [decoder, decoder.fuse_stage, last, *mlps]
    fuse, norm, activation = decoder.fuse_stage
    return HeadModules([mlp.linear for mlp in mlps], around, fuse, norm, activation, None, last[0])


def _smp_maps(model: Any, x: torch.Tensor) -> Maps:
    if not torch.compiler.is_compiling():
        model.check_input_shape(x)
    features = model.encoder(x)
    first = 2 if features[1].shape[1] == 0 else 1
    return list(features[first:])


def _smp_masks(model: Any, logits: torch.Tensor, maps: Maps) -> Any:
    masks = logits
    for layer in list(model.segmentation_head)[1:]:  # a slice would be a new head
        masks = layer(masks)
    if model.classification_head is None:
        return masks
    return masks, model.classification_head(maps[-1])


# Exported are heads whose logits are the model's result. Those of smp are upsampled, and mmseg's
# head has a ReLU before upsampling, which no exporter writes.
HEADS: Sequence[HeadHost] = (
    HeadHost(
        name="transformers",
        roots=lambda head: children(head, "classifier"),
        fold=fold_transformers,
        classifier="classifier",
        maps=_transformers_maps,
        finish=_transformers_logits,
        exports=True,
        modules=transformers_modules,
        matches=_is_transformers,
    ),
    HeadHost(
        name="NVlabs",
        roots=lambda head: children(head, "linear_pred", "conv_seg"),
        fold=_fold_nvlabs,
        classifier="linear_pred",
        maps=_mmseg_maps,
        exports=True,
        modules=_nvlabs_modules,
        matches=_is_nvlabs,
    ),
    HeadHost(
        name="DAFormer",
        roots=lambda head: children(head, "linear_pred", "conv_seg"),
        fold=_fold_daformer,
        classifier="linear_pred",
        maps=lambda head, inputs: [inputs[index] for index in head.in_index],
        exports=True,
        matches=_is_daformer,
    ),
    HeadHost(
        name="mmseg",
        roots=lambda head: children(head, "conv_seg"),
        fold=_fold_mmseg,
        projections=_mmseg_projections,
        classifier="conv_seg",
        maps=_mmseg_maps,
        matches=_is_mmseg,
    ),
    HeadHost(
        name="segmentation_models_pytorch",
        roots=lambda model: [model.decoder],
        fold=_fold_smp,
        classifier="segmentation_head.0",
        maps=_smp_maps,
        called=lambda model: [model.segmentation_head],
        finish=_smp_masks,
        modules=_smp_modules,
        takes_pixels=True,
        matches=_is_smp,
    ),
)
for _host in HEADS:
    register_host(_host)


def find_heads(module: nn.Module) -> list[HeadHost]:
    """The kinds of decode head that `module` may be by its names; none for no known one."""
    return [host for host in HEADS if host.matches(module)]


def resembles_head(module: nn.Module) -> bool:
    """Return whether it has a layer of the name that fuses the maps of all stages."""
    return any(has(module, name) for name in ("linear_fuse", "fuse_stage", "fusion_conv"))

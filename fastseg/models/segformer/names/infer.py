"""A configuration from the tensors alone, for files that come without a config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastseg.checkpoints.report import CheckpointError

from .tree import ENCODER

_EMBEDDING = re.compile(re.escape(ENCODER) + r"patch_embeddings\.(\d+)\.proj\.weight")
_BLOCK = re.compile(re.escape(ENCODER) + r"block\.(\d+)\.(\d+)\..+")

# Of all published SegFormers, by the patch embedding's kernel and by the width of the first stage,
# which is the width of every head.
_STRIDES = {7: 4, 3: 2}
_HEAD_WIDTHS = (32, 64)

Shapes = Mapping[str, Sequence[int]]


def infer_fields(tensors: Mapping[str, torch.Tensor], known: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of SegformerConfig that shapes tell; `known` ones are taken as they are.

    Args:
        tensors: by their names in a model with a head.

    Raises:
        CheckpointError: these are no tensors of a SegFormer, or heads or strides are not known and
            the sizes are not those of the published models.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    embeddings = _embeddings(shapes)
    widths = [shape[0] for shape in embeddings]
    patch_sizes = [shape[2] for shape in embeddings]
    depths = [0] * len(widths)
    for name in shapes:
        if (match := _BLOCK.fullmatch(name)) and int(match[1]) < len(depths):
            depths[int(match[1])] = max(depths[int(match[1])], int(match[2]) + 1)
    fields: dict[str, Any] = {
        "num_channels": embeddings[0][1],
        "num_encoder_blocks": len(widths),
        "hidden_sizes": widths,
        "patch_sizes": patch_sizes,
        "depths": depths,
        "sr_ratios": [_sr_ratio(shapes, stage) for stage in range(len(widths))],
        "mlp_ratios": [_mlp_ratio(shapes, stage, width) for stage, width in enumerate(widths)],
    }
    if "strides" not in known:
        fields["strides"] = _strides(patch_sizes)
    if "num_attention_heads" not in known:
        fields["num_attention_heads"] = _heads(widths)
    projection = shapes.get("decode_head.linear_c.0.proj.weight", ())
    if len(projection) == 2:
        fields["decoder_hidden_size"] = projection[0]
    for name in ("decode_head.classifier.weight", "classifier.weight"):
        if shapes.get(name):
            fields["num_labels"] = shapes[name][0]
    return {**fields, **known}


def _embeddings(shapes: Shapes) -> list[Sequence[int]]:
    """Shapes of the patch embeddings' convolutions, one for each stage."""
    by_stage = {
        int(match[1]): shape
        for name, shape in shapes.items()
        if (match := _EMBEDDING.fullmatch(name))
    }
    if not by_stage or sorted(by_stage) != list(range(len(by_stage))):
        shown = ", ".join(list(shapes)[:5]) or "none"
        raise CheckpointError(
            "expected tensors of a SegFormer, with names of transformers, NVlabs, mmseg, "
            "segmentation_models_pytorch or KerasHub and a patch embedding for each stage; got "
            f"{len(shapes)} names: {shown}{', ...' if len(shapes) > 5 else ''}"
        )
    for stage, shape in by_stage.items():
        if len(shape) != 4 or shape[2] != shape[3]:
            raise CheckpointError(
                f"{ENCODER}patch_embeddings.{stage}.proj.weight: expected a square convolution's "
                f"weight, got shape {shape}"
            )
    return [by_stage[stage] for stage in range(len(by_stage))]


def _sr_ratio(shapes: Shapes, stage: int) -> int:
    shape = shapes.get(f"{ENCODER}block.{stage}.0.attention.self.sr.weight", ())
    return shape[2] if len(shape) == 4 else 1


def _mlp_ratio(shapes: Shapes, stage: int, width: int) -> float:
    shape = shapes.get(f"{ENCODER}block.{stage}.0.mlp.dense1.weight", ())
    ratio = shape[0] / width if shape else 4.0
    return int(ratio) if ratio.is_integer() else ratio


def _strides(patch_sizes: Sequence[int]) -> list[int]:
    if any(size not in _STRIDES for size in patch_sizes):
        raise CheckpointError(
            "strides: cannot be told from the tensors; expected patch sizes of 7 and 3, whose "
            f"strides are 4 and 2, got {list(patch_sizes)}: pass strides="
        )
    return [_STRIDES[size] for size in patch_sizes]


def _heads(widths: Sequence[int]) -> list[int]:
    unit = widths[0]
    if unit not in _HEAD_WIDTHS or any(width % unit for width in widths):
        raise CheckpointError(
            "num_attention_heads: cannot be told from the tensors; expected the widths of a "
            "published model, multiples of 32 or 64 whose quotients are the heads, got "
            f"{list(widths)}: pass num_attention_heads="
        )
    return [width // unit for width in widths]

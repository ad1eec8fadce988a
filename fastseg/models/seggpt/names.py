"""Checkpoints of SegGPTs: transformers' and Painter's names, and what their shapes tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fastseg.checkpoints.report import CheckpointError
from fastseg.checkpoints.translation import CheckpointNames, Table, Translation, translate_name

BASE = "model."

_EMBEDDINGS = BASE + "embeddings."
_PAINTER: Table = {
    "patch_embed.proj.": [_EMBEDDINGS + "patch_embeddings.projection."],
    "pos_embed": [_EMBEDDINGS + "position_embeddings"],
    "mask_token": [_EMBEDDINGS + "mask_token"],
    "segment_token_x": [_EMBEDDINGS + "segment_token_input"],
    "segment_token_y": [_EMBEDDINGS + "segment_token_prompt"],
    "type_token_cls": [_EMBEDDINGS + "type_token_semantic"],
    "type_token_ins": [_EMBEDDINGS + "type_token_instance"],
    "norm.": [BASE + "encoder.layernorm."],
    "decoder_embed.": ["decoder.decoder_embed."],
    "decoder_pred.0.": ["decoder.decoder_pred.conv."],
    "decoder_pred.1.": ["decoder.decoder_pred.layernorm."],
    "decoder_pred.3.": ["decoder.decoder_pred.head."],
}
_PAINTER_LAYER: Table = {
    "norm1.": ["layernorm_before."],
    "norm2.": ["layernorm_after."],
    "attn.": ["attention."],
    "mlp.fc1.": ["mlp.lin1."],
    "mlp.fc2.": ["mlp.lin2."],
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_LAYER = re.compile(re.escape(BASE) + r"encoder\.layers\.(\d+)\..+")


def translate(
    tensors: Mapping[str, torch.Tensor], depths: Sequence[int] | None = None, average: bool = False
) -> Translation:
    """Bring a file's tensors to fastseg's terms: Painter's, or transformers' with or without base.

    What no table knows keeps its name.
    """
    of_painter = "segment_token_x" in tensors
    translation = Translation()
    for name, tensor in tensors.items():
        target = name
        if of_painter:
            target = _from_painter(name)
        elif name.startswith(("embeddings.", "encoder.")):
            target = BASE + name
        translation.add(name, tensor, [target])
    return translation


def _from_painter(name: str) -> str:
    if block := _BLOCK.fullmatch(name):
        inner = translate_name(_PAINTER_LAYER, block[2])
        return f"{BASE}encoder.layers.{block[1]}.{inner[0]}" if inner else name
    outer = translate_name(_PAINTER, name)
    return outer[0] if outer else name


def class_name(names: Iterable[str]) -> str:
    """Name the model class that a file was saved from, by the names that it has in the model."""
    has_decoder = any(name.startswith("decoder.") for name in names)
    return "SegGptForImageSegmentation" if has_decoder else "SegGptModel"


def infer_fields(tensors: Mapping[str, torch.Tensor], known: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of SegGptConfig that shapes tell; `known` ones are taken as they are.

    Args:
        tensors: by their names in a model with a decoder.

    Raises:
        CheckpointError: these are no tensors of a SegGPT, or which layers the decoder takes is not
            known and their number does not divide the depth, as in the published model.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    layer = BASE + "encoder.layers.0."
    try:
        channels, num_channels, patch, _ = shapes[
            _EMBEDDINGS + "patch_embeddings.projection.weight"
        ]
        rows, width = shapes[layer + "attention.rel_pos_h"]
        columns = shapes[layer + "attention.rel_pos_w"][0]
        positions = shapes[_EMBEDDINGS + "position_embeddings"][1]
        mlp_dim = shapes[layer + "mlp.lin1.weight"][0]
    except (KeyError, ValueError, IndexError):
        shown = ", ".join(list(shapes)[:5]) or "none"
        raise CheckpointError(
            "expected tensors of a SegGPT, with names of transformers or Painter; got "
            f"{len(shapes)} names: {shown}{', ...' if len(shapes) > 5 else ''}"
        ) from None
    depth = 1 + max(int(match[1]) for name in shapes if (match := _LAYER.fullmatch(name)))
    fields: dict[str, Any] = {
        "hidden_size": channels,
        "num_channels": num_channels,
        "num_hidden_layers": depth,
        "num_attention_heads": channels // width,
        "patch_size": patch,
        "image_size": [(rows + 1) // 2 * patch, (columns + 1) // 2 * patch],
        "pretrain_image_size": round((positions - 1) ** 0.5) * patch,
        "qkv_bias": layer + "attention.qkv.bias" in shapes,
        "mlp_dim": mlp_dim,
    }
    embed = shapes.get("decoder.decoder_embed.weight")
    if embed is not None:
        fields["decoder_hidden_size"] = embed[0] // patch**2
    if "intermediate_hidden_state_indices" not in known:
        taken = 4 if embed is None else embed[1] // channels
        if depth % taken:
            raise CheckpointError(
                "intermediate_hidden_state_indices: cannot be told from the tensors; expected a "
                f"depth that {taken} divides, as of the published model, got {depth}: pass "
                "intermediate_hidden_state_indices="
            )
        step = depth // taken
        fields["intermediate_hidden_state_indices"] = list(range(step - 1, depth, step))
    return {**fields, **known}


def fit(names: Mapping[str, str], tensors: dict[str, torch.Tensor], config: Any) -> tuple[str, ...]:
    """Resize the tables of relative positions in a file to the grid of `config`, in place.

    As transformers' forward would at each call: linearly; here once, in float64.
    """
    before = []
    for kind, side in zip(("rel_pos_h", "rel_pos_w"), config.grid, strict=True):
        labels = [label for label, name in names.items() if name.rpartition(".")[2] == kind]
        lengths = {len(tensors[label]) for label in labels if tensors[label].ndim == 2}
        length = lengths.pop() if len(lengths) == 1 else 0
        if length % 2 == 0:  # of no grid, or of several: how shapes differ is told where they load
            return ()
        before.append((length + 1) // 2)
        for label in labels if before[-1] != side else ():
            wide = tensors[label].double().T[None]
            resized = F.interpolate(wide, size=2 * side - 1, mode="linear", align_corners=False)
            tensors[label] = resized[0].T.to(tensors[label].dtype)
    if tuple(before) == config.grid:
        return ()
    then, now = (
        " x ".join(str(side * config.patch_size) for side in grid) for grid in (before, config.grid)
    )
    return (
        f"tables of relative positions were resized for images of {now} instead of {then}, "
        "stacked: how good the masks are then is not known",
    )


SEGGPT_NAMES = CheckpointNames(
    base=BASE,
    heads=frozenset(("decoder",)),
    segmentation_head="decoder",
    translate=translate,
    class_name=class_name,
    infer_fields=infer_fields,
    fit=fit,
)

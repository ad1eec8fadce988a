"""Checkpoints of SegFormers: a table of names for each library, brought to fastseg's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fastseg.checkpoints import tensorflow
from fastseg.checkpoints.report import CheckpointError
from fastseg.checkpoints.translation import CheckpointNames, Translation

from ..config import SegformerConfig
from . import keras, pytorch
from .infer import infer_fields
from .layouts import LAYOUTS
from .tree import BASE


def translate(
    tensors: Mapping[str, torch.Tensor],
    depths: Sequence[int] | None = None,
    average: bool = False,
) -> Translation:
    """Bring a file's tensors to fastseg's terms, whichever library's names they have.

    `depths`, the blocks in each stage, is needed by few Keras files only. `average` takes an
    average of the weights, where there is one beside them.
    """
    if tensorflow.is_tensorflow(tensors):
        return tensorflow.translate(tensors)
    if keras.is_keras(tensors):
        return keras.translate(tensors, depths)
    return pytorch.translate(tensors, average)


def class_name(names: Iterable[str]) -> str:
    """Name the model class that a file was saved from, by the names that it has in the model."""
    parts = {name.partition(".")[0] for name in names}
    if "decode_head" in parts:
        return "SegformerForSemanticSegmentation"
    if "classifier" in parts:
        return "SegformerForImageClassification"
    return "SegformerModel"


def _read_smp(config: Mapping[str, Any]) -> dict[str, Any]:
    encoder = str(config["encoder_name"])
    if not encoder.startswith("mit_b"):
        raise CheckpointError(f"expected the encoder mit_b0 to mit_b5, got {encoder!r}")
    return {}  # the tensors tell


SEGFORMER_NAMES = CheckpointNames(
    base=BASE,
    heads=frozenset(("decode_head", "classifier")),
    training_heads=frozenset(("auxiliary_head", "classification_head")),
    segmentation_head="decode_head",
    classifiers=frozenset(("classifier", "decode_head.classifier")),
    translate=translate,
    class_name=class_name,
    infer_fields=infer_fields,
    read_preset=keras.read_preset,
    read_converter=keras.read_converter,
    read_smp=_read_smp,
    read_groups=keras.read_groups,
    other_model_types=SegformerConfig.other_model_types,
    layouts=LAYOUTS,
)

"""`from_pretrained`: a model of whichever class the checkpoint is of."""

from __future__ import annotations

import os
from typing import Any

from fastseg.checkpoints.load import load_pretrained

from .segformer.modeling import (
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    SegformerModel,
)

MODEL_CLASSES = (
    SegformerForSemanticSegmentation,
    SegformerForImageClassification,
    SegformerModel,
)


def from_pretrained(
    path: str | os.PathLike[str], **kwargs: Any
) -> SegformerForSemanticSegmentation | SegformerForImageClassification | SegformerModel:
    """The model in a directory, in a file or under a Hugging Face hub id, in eval mode.

    Its class comes from `architectures` in config.json, else from the names of the tensors.
    Arguments and errors are those of `fastseg.checkpoints.load.load_pretrained`.
    """
    return load_pretrained(path, MODEL_CLASSES, **kwargs)

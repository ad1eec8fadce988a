"""Checkpoints of other libraries: a table of names for each, brought to fastseg's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fastseg.checkpoints import tensorflow
from fastseg.checkpoints.translation import Translation

from . import keras, pytorch


def translate(
    tensors: Mapping[str, torch.Tensor], depths: Sequence[int] | None = None
) -> Translation:
    """A file's tensors in fastseg's terms, whichever library's names they have.

    `depths`, the blocks in each stage, is needed by few Keras files only.
    """
    if tensorflow.is_tensorflow(tensors):
        return tensorflow.translate(tensors)
    if keras.is_keras(tensors):
        return keras.translate(tensors, depths)
    return pytorch.translate(tensors)

"""Reading the HDF5 files of TensorFlow and Keras with h5py alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastseg.models.segformer.names.keras import is_keras

from .report import CheckpointError

# KerasHub's layers; they have no variables, and KerasCV's SegFormer has none of them.
_OF_KERAS_HUB = ("/padding", "/attn/dropout")


def read_h5(path: Path, keras_hub: bool = False) -> dict[str, torch.Tensor]:
    """All arrays of a file by their paths in it.

    Args:
        keras_hub: a configuration beside the file says that KerasHub made it.

    Raises:
        CheckpointError: the file is corrupt, holds something else than numbers, or is of KerasCV.
        ImportError: h5py is not installed.
    """
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ImportError(
            f'{path}: to read it h5py is needed: pip install "fastseg-segformer[h5]"'
        ) from error
    tensors: dict[str, torch.Tensor] = {}
    groups: list[str] = []

    def take(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            if item.external or item.is_virtual:  # its numbers would come from other files
                raise ValueError(f"{name} is stored outside the file")
            tensors[name] = torch.from_numpy(np.asarray(item[()]))
        else:
            groups.append(name)

    try:
        with h5py.File(path) as file:
            file.visititems(take)
    # Also what torch says of strings and other types, and h5py of broken links.
    except (OSError, TypeError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: expected an HDF5 file of numbers, got one that fails: {error}"
        ) from error
    if is_keras(tensors) and not keras_hub and not any(g.endswith(_OF_KERAS_HUB) for g in groups):
        raise CheckpointError(
            f"{path}: expected KerasHub's SegFormer or MiT, got weights of KerasCV, whose "
            "SegFormer is another network (it pads unevenly and mixes tokens with channels before "
            "the spatial reduction), or of an early KerasHub: load the preset's folder, whose "
            "config.json tells which, or save the weights again with a present KerasHub"
        )
    return tensors

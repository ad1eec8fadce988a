"""Reading the HDF5 files of TensorFlow and Keras with h5py alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .report import CheckpointError


def read_h5(path: Path) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Read all arrays of a file by their paths in it, and the paths of its groups.

    Raises:
        CheckpointError: the file is corrupt, or holds something else than numbers.
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
    return tensors, tuple(groups)

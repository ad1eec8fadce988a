"""Reading the HDF5 files of TensorFlow and Keras with h5py alone."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .report import CheckpointError

_ARCHIVED_CONFIG, _ARCHIVED_WEIGHTS = "config.json", "model.weights.h5"


def read_keras(path: Path) -> tuple[dict[str, torch.Tensor], tuple[str, ...], dict[str, Any]]:
    """Read a `.keras` archive: what `read_h5` gives of the weights in it, and its config.json.

    Raises:
        CheckpointError, ImportError: as `read_h5`.
    """
    config, weights = _read_archive(path)
    return (*read_h5(path, io.BytesIO(weights)), config)


def image_converter(path: Path) -> dict[str, Any] | None:
    """The image converter in the config.json of a `.keras` archive, as a preset has it in a file.

    None where there is none.

    Raises:
        CheckpointError: the archive is corrupt.
    """
    found: Any = keras_config(path)
    for name in ("config", "preprocessor", "config", "image_converter"):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else None


def keras_config(path: Path) -> dict[str, Any]:
    """The config.json in a `.keras` archive.

    Raises:
        CheckpointError: the archive is corrupt.
    """
    return _read_archive(path)[0]


def keras_cv_backbone(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The backbone in a config.json of KerasCV, which is of a task or is that; None for others."""
    if not str(config.get("registered_name")).startswith("keras_cv"):
        return None
    backbone = (config.get("config") or {}).get("backbone") or config
    return dict(backbone)


def keras_cv_processor(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options of an image processor for a model of KerasCV, by its config.json; None for others.

    What is inside of such a model: it divides bytes by 255 or takes them as they are.
    """
    if (backbone := keras_cv_backbone(config)) is None:
        return None
    fields = backbone.get("config") or {}
    options = {"do_rescale": bool(fields.get("include_rescaling")), "do_normalize": False}
    return {**options, "size": image_size} if (image_size := keras_cv_size(backbone)) else options


def keras_cv_size(backbone: Mapping[str, Any]) -> list[int] | None:
    """[height, width] of the images that a backbone of KerasCV was built for, if it says so."""
    size = (backbone.get("config") or {}).get("input_shape")
    return [int(side) for side in size[:2]] if size and None not in size else None


def _read_archive(path: Path) -> tuple[dict[str, Any], bytes]:
    """The content of config.json and of the weights' file."""
    try:
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read(_ARCHIVED_CONFIG))
            weights = archive.read(_ARCHIVED_WEIGHTS)
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            f"{path}: expected an archive of Keras with {_ARCHIVED_CONFIG} and "
            f"{_ARCHIVED_WEIGHTS}, got one that is truncated or corrupt: {error}"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object in {_ARCHIVED_CONFIG}, got {type(config).__name__}"
        )
    return config, weights


def read_h5(
    path: Path, content: io.BytesIO | None = None
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Read all arrays of a file by their paths in it, and the paths of its groups.

    Args:
        content: of the file, where `path` is an archive that it lies in.

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
        with h5py.File(content or path) as file:
            file.visititems(take)
    # Also what torch says of strings and other types, and h5py of broken links.
    except (OSError, TypeError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: expected an HDF5 file of numbers, got one that fails: {error}"
        ) from error
    return tensors, tuple(groups)

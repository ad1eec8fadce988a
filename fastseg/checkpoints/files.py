"""Reading the files of a checkpoint: JSON, and weights in one file or in shards.

PyTorch's weights come as tensors in memory-mapped files: nothing is read until it is copied into a
model. What code a pickled file asks for is never run (`pickles.py`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .hdf5 import read_h5, read_keras
from .kinds import HDF5, KERAS, SAFETENSORS, kind_of, text_kind
from .pickles import read_pickled
from .report import CheckpointError
from .tensorflow import is_tensorflow
from .training import DEFAULT_CHOICE, Choice

CONFIG_NAME = "config.json"
PREPROCESSOR_NAME = "preprocessor_config.json"
CONVERTER_NAME = "image_converter.json"  # of KerasHub
WEIGHTS_NAME = "model.safetensors"
WEIGHTS_INDEX_NAME = WEIGHTS_NAME + ".index.json"
PICKLED_NAME = "pytorch_model.bin"
PICKLED_INDEX_NAME = PICKLED_NAME + ".index.json"
TENSORFLOW_NAME = "tf_model.h5"
KERAS_NAME = "model.weights.h5"
KERAS_TASK_NAME = "task.weights.h5"
# Put before the names of that second file of a preset, which repeats names of the first.
TASK_PREFIX = "task/"
# Where weights are looked for, in this order.
WEIGHTS_NAMES = (
    WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    PICKLED_NAME,
    PICKLED_INDEX_NAME,
    TENSORFLOW_NAME,
)

Tensors = dict[str, torch.Tensor]


@dataclass
class Weights:
    """Content of the files of a checkpoint.

    tensors: by name.
    class_names: of the classes, if they are there.
    notes: remarks for the user, such as which of two sets of weights was taken.
    left_out: names of entries that are no tensors.
    averaged: whether these are an average of the model's weights.
    groups: the paths of an HDF5 file's groups; None for files of other kinds.
    keras_config: the config.json in an archive of Keras.
    """

    tensors: Tensors
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    averaged: bool = False
    groups: tuple[str, ...] | None = None
    keras_config: dict[str, Any] | None = None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    content = b""
    try:
        content = path.read_bytes()
        fields = json.loads(content)  # in UTF-8 or UTF-16, with a byte order mark or without
    except (OSError, ValueError) as error:
        if (found := text_kind(content)) is not None:
            raise CheckpointError(f"{path}: expected JSON, got {found[0]}: {found[1]}") from error
        raise CheckpointError(f"{path}: expected JSON, got a file that fails: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(fields).__name__}")
    return fields


def of_variant(name: str, variant: str | None) -> str:
    """The name of a file in another precision: model.fp16.safetensors, as transformers has it."""
    if variant is None:
        return name
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}"


def read_weights(
    resolve: Callable[[str], Path], choice: Choice, variant: str | None = None
) -> tuple[Path, Weights]:
    """Read all tensors of a checkpoint by their names in it; and the file that names them.

    Args:
        resolve: gives the path of a file of the checkpoint by its name, or raises
            FileNotFoundError.
        variant: of the files, such as "fp16"; the index of shards has names of its own.

    Raises:
        CheckpointError: a file is of another kind, truncated, corrupt or unsafe to open, or a
            shard is missing.
        FileNotFoundError: there is no file of weights.
        ImportError: h5py is needed and not installed.
    """
    reasons = []
    for name in WEIGHTS_NAMES:
        try:
            path = resolve(of_variant(name, variant))
        except FileNotFoundError as error:
            reasons.append(str(error))
            continue
        sharded = name in (WEIGHTS_INDEX_NAME, PICKLED_INDEX_NAME)
        return path, Weights(_read_shards(path, resolve)) if sharded else read_file(path, choice)
    whole, pickled, tensorflow = (
        of_variant(name, variant) for name in (WEIGHTS_NAME, PICKLED_NAME, TENSORFLOW_NAME)
    )
    raise FileNotFoundError(
        f"no weights: neither {whole} nor {pickled}, nor an index of shards of either, "
        f"nor {tensorflow}. {reasons[0]}"
    )


def read_preset_weights(resolve: Callable[[str], Path]) -> tuple[Path, Weights]:
    """Read the tensors of a KerasHub preset: a head, if it has one, is in a second file."""
    path = resolve(KERAS_NAME)
    tensors, _ = read_h5(path)
    with contextlib.suppress(FileNotFoundError):
        task, _ = read_h5(resolve(KERAS_TASK_NAME))
        tensors.update({TASK_PREFIX + name: tensor for name, tensor in task.items()})
    return path, Weights(tensors)


def read_file(path: Path, choice: Choice = DEFAULT_CHOICE) -> Weights:
    """Read all tensors of one file, by what it is and not by its name.

    Raises:
        CheckpointError: it is neither safetensors nor HDF5, an archive of Keras or a pickle of
            PyTorch; or truncated, corrupt or unsafe to open.
        ImportError: h5py is needed and not installed.
    """
    kind = kind_of(path)
    if kind == SAFETENSORS:
        return Weights(_read_safetensors(path))
    if kind == HDF5:
        tensors, groups = read_h5(path)
        return Weights(tensors, groups=groups)
    if kind == KERAS:
        tensors, groups, config = read_keras(path)
        return Weights(tensors, groups=groups, keras_config=config)
    return Weights(*read_pickled(path, choice))


def _read_shards(index_path: Path, resolve: Callable[[str], Path]) -> Tensors:
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index_path}: expected a weight_map from tensors to files, got {weight_map!r}"
        )
    tensors: Tensors = {}
    for shard in sorted({str(shard) for shard in weight_map.values()}):
        # An index from elsewhere must not lead out of its directory.
        if Path(shard).name != shard or shard in ("", "..") or "\\" in shard:
            raise CheckpointError(
                f"{index_path}: expected names of files beside it, got the shard {shard!r}"
            )
        try:
            path = resolve(shard)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{index_path}: names the shard {shard}, which is missing. {error}"
            ) from error
        tensors.update(read_file(path).tensors)
    absent = sorted(weight_map.keys() - tensors.keys())
    if absent:
        raise CheckpointError(
            f"{index_path}: these tensors are not in the shards it names: {', '.join(absent)}"
        )
    return tensors


def _read_safetensors(path: Path) -> Tensors:
    try:
        with safe_open(path, framework="pt") as file:
            made_by = (file.metadata() or {}).get("format", "pt")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: expected a safetensors file, got one that is truncated or corrupt: {error}"
        ) from error
    # The axis order of kernels differs, which shapes alone do not always show.
    if made_by != "pt" and not (made_by == "tf" and is_tensorflow(tensors)):
        raise CheckpointError(
            f"{path}: expected tensors saved from PyTorch (metadata format 'pt'), or by "
            f"transformers from TensorFlow ('tf'), got format {made_by!r}, whose names and axis "
            "order differ; save the model again from PyTorch"
        )
    return tensors

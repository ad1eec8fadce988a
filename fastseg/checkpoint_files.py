"""Reading the files of a checkpoint: config.json, and weights in one file or in shards.

Weights come as tensors in memory-mapped files: nothing is read until it is copied into a model.
Pickled files are opened by PyTorch's restricted unpickler, which builds tensors and nothing else.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .checkpoint_report import CheckpointError

CONFIG_NAME = "config.json"
PREPROCESSOR_NAME = "preprocessor_config.json"
WEIGHTS_NAME = "model.safetensors"
WEIGHTS_INDEX_NAME = WEIGHTS_NAME + ".index.json"
PICKLED_NAME = "pytorch_model.bin"
PICKLED_INDEX_NAME = PICKLED_NAME + ".index.json"

Tensors = dict[str, torch.Tensor]

# What PyTorch's restricted unpickler says of a function or class that it does not call, and of
# anything else; the advice around that is left out, since it is to load without the restriction.
_REFUSED = re.compile(r"GLOBAL (\S+)")
_REASON = re.compile(r"WeightsUnpickler error:\s*(.+)")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected JSON, got a file that fails: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(fields).__name__}")
    return fields


def read_config(path: Path, model_type: str) -> dict[str, Any]:
    """The fields of a config.json, whose `model_type` must be the one given, if it has one."""
    fields = read_json(path)
    found = fields.get("model_type", model_type)
    if found != model_type:
        raise CheckpointError(f"{path}: expected model_type {model_type!r}, got {found!r}")
    return fields


def read_weights(resolve: Callable[[str], Path]) -> tuple[Path, Tensors]:
    """All tensors of a checkpoint by their names in it, and the file they were found through.

    Args:
        resolve: gives the path of a file of the checkpoint by its name, or raises
            FileNotFoundError.

    Raises:
        CheckpointError: a file is truncated, corrupt, unsafe to open, or a shard is missing.
        FileNotFoundError: there is no file of weights.
    """
    reasons = []
    for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME, PICKLED_NAME, PICKLED_INDEX_NAME):
        try:
            path = resolve(name)
        except FileNotFoundError as error:
            reasons.append(str(error))
            continue
        sharded = name in (WEIGHTS_INDEX_NAME, PICKLED_INDEX_NAME)
        return path, _read_shards(path, resolve) if sharded else _read_file(path)
    raise FileNotFoundError(
        f"no weights: neither {WEIGHTS_NAME} nor {PICKLED_NAME}, nor an index of shards of either. "
        f"{reasons[0]}"
    )


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
        tensors.update(_read_file(path))
    absent = sorted(weight_map.keys() - tensors.keys())
    if absent:
        raise CheckpointError(
            f"{index_path}: these tensors are not in the shards it names: {', '.join(absent)}"
        )
    return tensors


def _read_file(path: Path) -> Tensors:
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)


def _read_safetensors(path: Path) -> Tensors:
    try:
        with safe_open(path, framework="pt") as file:
            made_by = (file.metadata() or {}).get("format", "pt")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: expected a safetensors file, got one that is truncated or corrupt: {error}"
        ) from error
    if made_by != "pt":
        # TensorFlow's kernels have another axis order, which shapes alone do not always show.
        raise CheckpointError(
            f"{path}: expected tensors saved from PyTorch (metadata format 'pt'), got format "
            f"{made_by!r}, whose names and axis order differ; save the model again from PyTorch"
        )
    return tensors


def _read_pickled(path: Path) -> Tensors:
    try:
        tensors = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    # On corrupt files the unpickler raises almost anything: KeyError, IndexError, EOFError, ...
    except Exception as error:
        text = str(error)
        if isinstance(error, pickle.UnpicklingError) and (refused := _REFUSED.search(text)):
            raise CheckpointError(
                f"{path}: expected tensors only, got a pickle that calls {refused[1]}. Loading it "
                "would run code from the file, so it was not loaded (weights_only=True); where "
                "you trust it, save its state_dict again as safetensors"
            ) from error
        found = _REASON.search(text)
        reason = found[1] if found else text.partition(". ")[0] or type(error).__name__
        raise CheckpointError(
            f"{path}: expected a PyTorch file, got one that is truncated or corrupt: {reason}"
        ) from error
    if not isinstance(tensors, dict):
        raise CheckpointError(
            f"{path}: expected a dictionary of tensors, got {type(tensors).__name__}"
        )
    others = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if others:
        shown = ", ".join(f"{name!r} ({type(tensors[name]).__name__})" for name in others[:10])
        raise CheckpointError(f"{path}: expected a dictionary of tensors, got entries {shown}")
    return tensors

"""Reading a path: the tensors there under fastseg's names, and the configuration, or parts of it.

A path is a directory, a hub id or a single file. Beside the weights there may be a config.json of
transformers, of segmentation_models_pytorch, of KerasHub or of KerasCV; what it leaves open is told
by the tensors. The caller may have the weights or the configuration instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import (
    CONFIG_NAME,
    KERAS_NAME,
    WEIGHTS_NAMES,
    Weights,
    of_variant,
    read_file,
    read_json,
    read_preset_weights,
    read_weights,
)
from .hdf5 import keras_cv_processor
from .pickles import take_weights
from .quantized import dequantized
from .report import CheckpointError
from .training import DEFAULT_CHOICE, Choice
from .translation import CheckpointNames, Translation

_TASK_NAME = "task.json"


@dataclass
class Source:
    """A checkpoint that was read.

    path: the file that the weights were reached through, or what the caller gave them as.
    config_path: the config.json, or the argument, that describes the model; None where the tensors
        do.
    model_type: of the family whose names it has.
    fields: of the configuration.
    left_out: names in the file of what is no tensor.
    notes: remarks for the user.
    preprocessor_path: a file of KerasCV that says how images are prepared.
    """

    path: Path | str
    model_type: str
    config_path: Path | str | None
    fields: dict[str, Any]
    translation: Translation
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    preprocessor_path: Path | None = None

    @property
    def described_by(self) -> str:
        """Subject and verb of where the model's sizes come from, for messages."""
        if self.config_path is None:
            return "their shapes describe"
        return f"{Path(self.config_path).name} describes"


def local_file(path: object) -> Path | None:
    """`path` where it is a single file of weights, rather than a directory or a hub id."""
    file = Path(path) if isinstance(path, str | os.PathLike) else None
    return file if file is not None and file.is_file() else None


def beside(file: Path) -> Callable[[str], Path]:
    """`resolve` for a single file: what stands beside it, where it has the name of a checkpoint's.

    Any other file may stand among files that have nothing to do with it.
    """

    def resolve(name: str) -> Path:
        neighbour = file.parent / name
        if file.name not in (*WEIGHTS_NAMES, KERAS_NAME) or not neighbour.is_file():
            raise FileNotFoundError(f"{file.parent}: expected a file {name}")
        return neighbour

    return resolve


def read_source(
    path: object,
    resolve: Callable[[str], Path],
    families: Mapping[str, CheckpointNames],
    overrides: Mapping[str, Any],
    config: Any = None,
    state_dict: Mapping[str, Any] | None = None,
    variant: str | None = None,
    choice: Choice = DEFAULT_CHOICE,
) -> Source:
    """Read the checkpoint at `path`, a single file, a folder on this disk, or None for others.

    Args:
        resolve: gives the path of a file of the checkpoint by its name, or raises
            FileNotFoundError.
        families: the names that checkpoints may have, by the `model_type` that a config.json of
            transformers has. Without one the first family is taken that knows the tensors.
        overrides: fields of the configuration that the caller knows.
        config: the configuration, instead of that in config.json.
        state_dict: the weights, instead of those in files.
        variant: of the files with weights, such as "fp16".
        choice: what of a file is taken.

    Raises:
        CheckpointError: a file is corrupt, unsafe or of another model, or the tensors leave a
            field open.
        FileNotFoundError: there are no weights, or no config.json where it cannot be left out.
    """
    file = local_file(path)
    config_path: Path | str | None = None
    if config is not None:
        config_path, found = "config", config.to_dict()
    else:
        try:
            config_path = resolve(CONFIG_NAME)
        except FileNotFoundError:
            # From the hub it is always there, unless the download failed.
            if file is None and state_dict is None and not _has_weights(path, variant):
                raise
        found = {} if config_path is None else read_json(Path(config_path))
    library = _library(found)
    if config_path is not None and "model_type" in found:
        families = _of_model_type(found, config_path, families)
    weights_path: Path | str = "state_dict"
    if state_dict is not None:
        weights = Weights(*take_weights(state_dict, weights_path, choice))
    elif library == "Keras":
        if variant:
            raise ValueError(
                f"variant: expected None for a preset of KerasHub or KerasCV, got {variant!r}"
            )
        weights_path, weights = read_preset_weights(resolve)
    elif file is not None:
        weights_path, weights = file, read_file(file, choice)
    else:
        weights_path, weights = read_weights(resolve, choice, variant)
    weights.tensors = dequantized(weights.tensors, weights_path)
    if choice.source is not None and weights.groups is None:
        raise ValueError(
            f"source: expected None for {weights_path}, which tells whose it is, got "
            f"{choice.source!r}"
        )
    is_described = config_path is not None and library == "transformers"
    described_by = config_path if is_described else None
    first_error: CheckpointError | None = None
    for model_type, family in families.items():
        try:
            fields: dict[str, Any] = {}
            if is_described:
                fields = found
            elif config_path is not None and library == "smp":
                fields = _smp_fields(found, config_path, family)
            elif config_path is not None:
                fields = _preset_fields(found, Path(config_path), resolve, family)
            elif weights.keras_config is not None:
                fields = _archived_fields(weights.keras_config, weights_path, family)
            translation, fields = _translated(
                weights_path, weights, family, fields, overrides, is_described, choice
            )
        except CheckpointError as error:
            first_error = first_error or error
            continue
        return Source(
            weights_path,
            model_type,
            described_by,
            {**translation.fields, **fields},
            translation,
            weights.left_out,
            (*weights.notes, *translation.notes),
            _preparing(found, config_path) or _preparing(weights.keras_config, weights_path),
        )
    assert first_error is not None
    raise first_error


def _translated(
    path: Path | str,
    weights: Weights,
    family: CheckpointNames,
    fields: dict[str, Any],
    overrides: Mapping[str, Any],
    is_described: bool,
    choice: Choice,
) -> tuple[Translation, dict[str, Any]]:
    """The tensors in the family's terms, and the fields, as the tensors tell them where none do."""
    try:
        if weights.groups is not None:
            told = family.read_groups(weights.tensors, weights.groups, choice.source, fields)
            fields = {**told, **fields}
        depths = {**fields, **overrides}.get("depths")
        translation = family.translate(weights.tensors, depths, choice.average)
        if choice.average and not (weights.averaged or translation.averaged):
            raise CheckpointError(
                'weights="ema": expected an average of the weights (EMA, SWA, a teacher) under a '
                "name that says so, found none"
            )
        if not is_described:
            fields = _inferred(translation, weights, family, {**fields, **overrides})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return translation, fields


def _library(config: Mapping[str, Any]) -> str:
    """Name the library of a config.json: only transformers' describes a model in our terms."""
    if "model_type" not in config and "registered_name" in config:
        return "Keras"
    if "model_type" not in config and "encoder_name" in config:
        return "smp"
    return "transformers"


def _preparing(config: Mapping[str, Any] | None, path: Path | str | None) -> Path | None:
    """`path` where the config.json there says how KerasCV prepares images."""
    return None if path is None or keras_cv_processor(config or {}) is None else Path(path)


def _has_weights(path: object, variant: str | None) -> bool:
    """Return whether it is a directory of weights without a config.json."""
    directory = Path(path) if isinstance(path, str | os.PathLike) else None
    names = [of_variant(name, variant) for name in WEIGHTS_NAMES]
    return directory is not None and any((directory / name).is_file() for name in names)


def _inferred(
    translation: Translation,
    weights: Weights,
    family: CheckpointNames,
    known: Mapping[str, Any],
) -> dict[str, Any]:
    named = {name: translation.tensors[label] for label, name in translation.names.items()}
    inferred = family.infer_fields(named, known)
    if weights.class_names and len(weights.class_names) == inferred.get("num_labels"):
        inferred["id2label"] = dict(enumerate(weights.class_names))
    return inferred


def _of_model_type(
    config: Mapping[str, Any], path: Path | str, families: Mapping[str, CheckpointNames]
) -> dict[str, CheckpointNames]:
    stated = config["model_type"]
    for model_type, family in families.items():
        if stated in (model_type, *family.other_model_types):
            return {model_type: family}
    expected = " or ".join(map(repr, families))
    raise CheckpointError(f"{path}: expected model_type {expected}, got {stated!r}")


def _smp_fields(
    config: Mapping[str, Any], path: Path | str, family: CheckpointNames
) -> dict[str, Any]:
    try:
        return family.read_smp(config)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _preset_fields(
    config: Mapping[str, Any],
    path: Path,
    resolve: Callable[[str], Path],
    family: CheckpointNames,
) -> dict[str, Any]:
    try:
        task = read_json(resolve(_TASK_NAME))
    except FileNotFoundError:
        task = None
    try:
        return family.read_preset(config, task)
    except CheckpointError as error:
        raise CheckpointError(f"{path.parent / str(error)}") from error


def _archived_fields(
    config: Mapping[str, Any], path: Path | str, family: CheckpointNames
) -> dict[str, Any]:
    """Fields from the config.json in an archive of Keras, which is that of a task or of a backbone.

    In presets these are two files.
    """
    backbone = (config.get("config") or {}).get("backbone")
    try:
        if isinstance(backbone, dict):
            return family.read_preset(backbone, config)
        return family.read_preset(config, None)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {str(error).partition(': ')[2]}") from error

"""Loading a checkpoint into a model: strict and loud, with about one copy of the weights in memory.

The model is made on the meta device, without storage and without drawing random numbers; each
tensor of the (memory-mapped) files is then copied straight into place. Everything is compared
before anything is copied, so an error lists all that does not fit.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .files import PREPROCESSOR_NAME, Tensors
from .hub import resolve_file
from .match import FLOATS, fill, match_tensors
from .report import CheckpointError, CheckpointWarning, LoadReport, Mismatch
from .save import save_pretrained
from .source import Source, beside, local_file, read_source

__all__ = [
    "CheckpointError",
    "CheckpointWarning",
    "LoadReport",
    "Mismatch",
    "load_pretrained",
    "save_pretrained",
]


class _NoRandomNumbers(TorchFunctionMode):
    """Mode that leaves random initialisation out.

    On the meta device it does nothing, but its first call imports 900 modules of PyTorch (1.6 s).
    """

    _RANDOM = frozenset(
        (
            nn.init.kaiming_uniform_,
            nn.init.uniform_,
            nn.init.normal_,
            torch.Tensor.uniform_,
            torch.Tensor.normal_,
        )
    )

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self._RANDOM:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def load_pretrained(
    path: str | os.PathLike[str],
    model_class: type[Any] | Sequence[type[Any]],
    *,
    num_labels: int | None = None,
    id2label: Mapping[Any, str] | None = None,
    ignore_mismatched_sizes: bool = False,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    **config_overrides: Any,
) -> Any:
    """A model in eval mode, from a checkpoint of transformers or of another library.

    Reads model.safetensors and pytorch_model.bin, whole or in shards, tf_model.h5, KerasHub's
    presets, and single files (safetensors, HDF5, PyTorch's pickles, of which no code is run). Whose
    tensors they are is told by their names: those of transformers 4 or 5, in PyTorch or TensorFlow,
    NVlabs, mmseg (the encoder), segmentation_models_pytorch or KerasHub. Where there is no
    config.json of transformers, sizes come from the tensors. A head that the file does not have at
    all is newly initialised; the head of another class in the file is left out. Both are told by a
    CheckpointWarning and in `model.load_report`.

    Args:
        path: a directory, a file or a Hugging Face hub id. Beside a file with the name that it has
            in a checkpoint's directory, such as model.safetensors, config.json counts too.
        model_class: the class to load, or several to choose one from by `model_type` and
            `architectures` in config.json, else by the names in the file.
        num_labels, id2label: other classes than the checkpoint's; a classifier of another size in
            the file, or none in a head that has the rest, is then newly initialised.
        ignore_mismatched_sizes: newly initialise every tensor of another shape in the file.
        dtype: of the model; None or "auto" for the one in config.json, else the file's own.
        device: of the model; None for PyTorch's default device.
        revision, cache_dir, token, local_files_only: see `fastseg.checkpoints.hub.resolve_file`.
        **config_overrides: other fields of the configuration, such as `drop_path_rate=0.2`; or
            what tensors do not tell, such as `num_attention_heads` of unusual widths.

    Raises:
        CheckpointError: a file is missing in the directory, corrupt, unsafe or of another model;
            or tensors are missing, unexpected or of another shape: one error lists them all.
        FileNotFoundError: there is no such directory, and no such hub id or file in it.
        ImportError: huggingface_hub, for a hub id, or h5py, for HDF5, is not installed.
        TypeError, ValueError: an argument is wrong.
    """
    classes = [model_class] if isinstance(model_class, type) else list(model_class)
    families = {one.config_class.model_type: one.checkpoint_names for one in classes}
    # The name of `dtype` in transformers before 4.56.
    torch_dtype = config_overrides.pop("torch_dtype", None)
    dtype = torch_dtype if dtype is None else dtype
    _check_overrides([one.config_class for one in classes], config_overrides)
    file = local_file(path)
    resolve: Callable[[str], Path] = functools.partial(
        resolve_file,
        path,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
    )
    if file is not None:
        resolve = beside(file)
    try:
        source = read_source(path, resolve, families, config_overrides)
    except FileNotFoundError as error:
        if Path(path).exists():
            raise CheckpointError(str(error)) from error
        raise
    family = families[source.model_type]
    classes = [one for one in classes if one.config_class.model_type == source.model_type]
    config_class = classes[0].config_class
    fields, translation = source.fields, source.translation
    tensors, names = translation.tensors, translation.names
    stored_dtype = fields.pop("dtype", None) or fields.get("torch_dtype")
    fields.pop("torch_dtype", None)
    chosen = _choose_class(classes, fields, family.class_name(names.values()))
    target_dtype = _target_dtype(dtype, stored_dtype, tensors, source.config_path or source.path)
    config = _make_config(config_class, source, fields, num_labels, id2label, config_overrides)

    with torch.device("meta"), _NoRandomNumbers():
        model = chosen(config)
    if translation.foreign_head and hasattr(model, family.segmentation_head):
        raise CheckpointError(f"{source.path}: {translation.foreign_head}")
    if not hasattr(model, model.base_model_prefix):
        names = {name: full.removeprefix(family.base) for name, full in names.items()}
    assignment = match_tensors(
        model,
        names,
        tensors,
        family,
        new_classifier=num_labels is not None or id2label is not None,
        new_mismatched=ignore_mismatched_sizes,
    )
    if assignment.errors:
        raise CheckpointError(
            f"{source.path}: the tensors do not fit {chosen.__name__} as {source.described_by} it\n"
            + "\n".join(assignment.errors)
        )
    if device is None:
        device = torch.get_default_device()

    def allocate(tensor: torch.Tensor) -> torch.Tensor:
        tensor_dtype = target_dtype if tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=tensor_dtype, device=device)

    # What to() and to_empty() do one after the other, without an import of sympy by the latter.
    model._apply(allocate)
    fill(model, assignment, tensors)
    model.load_report = assignment.report
    model.name_or_path = os.fspath(path)
    # For `fastseg.segment`. Absolute, for the working directory may change.
    with contextlib.suppress(FileNotFoundError):
        model.preprocessor_file = resolve(PREPROCESSOR_NAME).absolute()
    if assignment.report:
        warnings.warn(
            f"{source.path}, loaded into {chosen.__name__}:\n{assignment.report}",
            CheckpointWarning,
            stacklevel=3,  # the caller of from_pretrained
        )
    return model.eval()


def _check_overrides(config_classes: Sequence[type[Any]], overrides: Mapping[str, Any]) -> None:
    known = {name for one in config_classes for name in inspect.signature(one).parameters}
    unknown = [name for name in overrides if name not in known or name == "kwargs"]
    if unknown:
        names = " or ".join(dict.fromkeys(one.__name__ for one in config_classes))
        raise TypeError(
            f"{unknown[0]}: expected an argument of from_pretrained or a field of {names}, "
            f"got {unknown[0]}={overrides[unknown[0]]!r}"
        )


def _choose_class(
    classes: Sequence[type[Any]], fields: Mapping[str, Any], by_tensors: str
) -> type[Any]:
    by_name = {candidate.__name__: candidate for candidate in classes}
    for architecture in fields.get("architectures") or ():
        if architecture in by_name:
            return by_name[architecture]
    return by_name.get(by_tensors, classes[0])


def _make_config(
    config_class: type[Any],
    source: Source,
    fields: dict[str, Any],
    num_labels: int | None,
    id2label: Mapping[Any, str] | None,
    overrides: Mapping[str, Any],
) -> Any:
    try:
        config = config_class.from_dict(fields)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{source.config_path or source.path}: not a valid configuration: {error}"
        ) from error
    fields = {**fields, **overrides}
    if id2label is not None or (num_labels is not None and num_labels != config.num_labels):
        for name in ("num_labels", "id2label", "label2id"):
            if name not in overrides:
                fields.pop(name, None)
        if num_labels is not None:
            fields["num_labels"] = num_labels
        if id2label is not None:
            fields["id2label"] = id2label
        return config_class(**fields)
    return config_class.from_dict(fields)


def _target_dtype(
    dtype: torch.dtype | str | None, stored: Any, tensors: Tensors, config_path: Path
) -> torch.dtype:
    if dtype is None or dtype == "auto":
        if stored is not None:
            resolved = getattr(torch, str(stored).removeprefix("torch."), None)
            if resolved not in FLOATS:
                raise CheckpointError(f"{config_path}: expected a floating dtype, got {stored!r}")
            return resolved
        # Where a file mixes them, the one that loses nothing.
        floats = [tensor.dtype for tensor in tensors.values() if tensor.dtype in FLOATS]
        return functools.reduce(torch.promote_types, floats) if floats else torch.float32
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in FLOATS:
        expected = ", ".join(str(known) for known in FLOATS)
        raise ValueError(f'dtype: expected "auto" or one of {expected}, got {dtype!r}')
    return resolved

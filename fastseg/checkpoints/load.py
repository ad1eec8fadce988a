"""Loading a checkpoint into a model: strict and loud, with about one copy of the weights in memory.

The model is made on the meta device, without storage and without drawing random numbers; each
tensor of the (memory-mapped) files is then copied straight into place. Everything is compared
before anything is copied, so an error lists all that does not fit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fastseg.kernels.core.precision import FAST, fast_dtype

from .configuration import check_overrides, make_config, settle_labels
from .devices import chosen_device
from .files import PREPROCESSOR_NAME, Tensors
from .hub import resolve_file
from .match import FLOATS, fill, match_tensors
from .report import CheckpointError, CheckpointWarning, LoadReport, Mismatch
from .save import save_pretrained
from .source import beside, local_file, read_source
from .training import Choice
from .values import ClassNames

_log = logging.getLogger(__name__)

# Where transformers' Trainer saves a model of a class that is not its own, this is beside.
_TRAINER_NAME = "training_args.bin"
_BY_TRAINER = (
    "transformers' Trainer has written weights without a config.json, so names of classes are not "
    "known: give config= or id2label=, and write models with save_pretrained after a training"
)

_WEIGHTS = ("model", "ema")
_SOURCES = (None, "keras_cv")

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
    path: str | os.PathLike[str] | None,
    model_class: type[Any] | Sequence[type[Any]],
    *,
    config: Any = None,
    state_dict: Mapping[str, Any] | None = None,
    num_labels: int | None = None,
    id2label: ClassNames | None = None,
    ignore_mismatched_sizes: bool = False,
    strict: bool = True,
    weights: str = "model",
    source: str | None = None,
    output_loading_info: bool = False,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: Any = None,
    subfolder: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    **config_overrides: Any,
) -> Any:
    """A model in eval mode, from a checkpoint of transformers or of another library.

    Args:
        path, and what is not below: as of `fastseg.from_pretrained`; errors too.
        model_class: the class to load, or several to choose one from by `model_type` and
            `architectures` in config.json, else by the names in the file.
    """
    classes = [model_class] if isinstance(model_class, type) else list(model_class)
    families = {one.config_class.model_type: one.checkpoint_names for one in classes}
    # The name of `dtype` in transformers before 4.56.
    torch_dtype = config_overrides.pop("torch_dtype", None)
    dtype = torch_dtype if dtype is None else dtype
    config_classes = [one.config_class for one in classes]
    check_overrides(config_classes, config_overrides, inspect.signature(load_pretrained).parameters)
    _check_given(path, config, state_dict, config_classes)
    if weights not in _WEIGHTS:
        expected = " or ".join(map(repr, _WEIGHTS))
        raise ValueError(f"weights: expected {expected}, got {weights!r}")
    if source not in _SOURCES:
        raise ValueError(f"source: expected {' or '.join(map(repr, _SOURCES))}, got {source!r}")
    file = local_file(path)
    _check_place(file, state_dict, subfolder, variant)
    folder = Path(path) / (subfolder or "") if isinstance(path, str | os.PathLike) else None
    device = chosen_device(device, device_map)
    resolve: Callable[[str], Path] = _resolve_nothing
    if file is not None:
        resolve = beside(file)
    elif path is not None:
        resolve = functools.partial(
            resolve_file,
            path,
            subfolder=subfolder or None,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
    try:
        found = read_source(
            folder,
            resolve,
            families,
            config_overrides,
            config,
            state_dict,
            variant,
            Choice(weights == "ema", strict, source),
        )
    except FileNotFoundError as error:
        if path is not None and Path(path).exists():
            raise CheckpointError(str(error)) from error
        raise
    family = families[found.model_type]
    classes = [one for one in classes if one.config_class.model_type == found.model_type]
    config_class = classes[0].config_class
    # Those of another family were fine as long as this one was not known.
    check_overrides([config_class], config_overrides, inspect.signature(load_pretrained).parameters)
    fields, translation = found.fields, found.translation
    tensors, names = translation.tensors, translation.names
    stored_dtype = fields.pop("dtype", None) or fields.get("torch_dtype")
    fields.pop("torch_dtype", None)
    fields.pop("quantization_config", None)  # the model has floats
    if config is not None:  # of a model in use, it may name the class that it was loaded from
        fields.pop("architectures", None)
    chosen = _choose_class(classes, fields, family.class_name(names.values()))
    described_by = found.config_path or found.path
    notes = found.notes
    if num_labels is None and id2label is None:
        rows = _rows(names, tensors, family.classifiers)
        notes += settle_labels(fields, rows, described_by)
        if found.config_path is None and folder is not None and (folder / _TRAINER_NAME).exists():
            notes += (_BY_TRAINER,)
    config = make_config(config_class, described_by, fields, num_labels, id2label, config_overrides)
    notes += family.fit(names, tensors, config)

    with torch.device("meta"), _NoRandomNumbers():
        model = chosen(config)
    if translation.foreign_head and hasattr(model, family.segmentation_head):
        raise CheckpointError(f"{found.path}: {translation.foreign_head}")
    if not hasattr(model, model.base_model_prefix):
        names = {name: full.removeprefix(family.base) for name, full in names.items()}
    assignment = match_tensors(
        model,
        names,
        tensors,
        family,
        new_classifier=num_labels is not None or id2label is not None,
        new_mismatched=ignore_mismatched_sizes,
        strict=strict,
    )
    if assignment.errors:
        raise CheckpointError(
            f"{found.path}: the tensors do not fit {chosen.__name__} as {found.described_by} it\n"
            + "\n".join(assignment.errors)
        )
    report = dataclasses.replace(
        assignment.report,
        unexpected=(*assignment.report.unexpected, *translation.left_out, *found.left_out),
        notes=notes,
    )
    info = _loading_info(report, model, names, tensors)
    used = [tensors[name] for name in assignment.copied.values()]
    target_dtype = _target_dtype(dtype, stored_dtype, used, described_by, device)

    def allocate(tensor: torch.Tensor) -> torch.Tensor:
        tensor_dtype = target_dtype if tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=tensor_dtype, device=device)

    # What to() and to_empty() do one after the other, without an import of sympy by the latter.
    model._apply(allocate)
    fill(model, assignment, tensors)
    model.load_report = report
    model.name_or_path = "" if path is None else os.fspath(path)
    # For `fastseg.segment`. Absolute, for the working directory may change.
    if found.preprocessor_path is not None:
        model.preprocessor_file = found.preprocessor_path.absolute()
    with contextlib.suppress(FileNotFoundError):
        model.preprocessor_file = resolve(PREPROCESSOR_NAME).absolute()
    if report:
        warnings.warn(
            f"{found.path}, loaded into {chosen.__name__}:\n{report}",
            CheckpointWarning,
            stacklevel=3,  # the caller of from_pretrained
        )
    _log.info("%s: %s, %s, on %s", found.path, chosen.__name__, model.dtype, device)
    return (model.eval(), info) if output_loading_info else model.eval()


def _check_given(
    path: Any, config: Any, state_dict: Any, config_classes: Sequence[type[Any]]
) -> None:
    if path is None and state_dict is None:
        raise ValueError(
            "pretrained_model_name_or_path: expected a directory, a file or a hub id, or None with "
            "the weights as state_dict=; a model of new weights is made from its configuration, as "
            "SegformerModel(config)"
        )
    if config is not None and not isinstance(config, tuple(config_classes)):
        expected = " or ".join(dict.fromkeys(one.__name__ for one in config_classes))
        raise TypeError(f"config: expected a {expected}, got {type(config).__name__}")
    if state_dict is not None and not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict: expected a dictionary of tensors, got {type(state_dict).__name__}"
        )


def _check_place(
    file: Path | None, state_dict: Any, subfolder: str | None, variant: str | None
) -> None:
    if file is not None and subfolder:
        raise ValueError(f"subfolder: expected None for the single file {file}, got {subfolder!r}")
    if variant and (file is not None or state_dict is not None):
        given = "with state_dict=" if file is None else f"for the single file {file}"
        raise ValueError(f"variant: expected None {given}, got {variant!r}")


def _resolve_nothing(name: str) -> Path:
    raise FileNotFoundError(f"{name}: there is no checkpoint that it could be in")


def _rows(names: Mapping[str, str], tensors: Tensors, classifiers: Collection[str]) -> int | None:
    """Classes that the classifier in a file has; None where there is none."""
    for label, name in names.items():
        layer, _, parameter = name.rpartition(".")
        if layer in classifiers and parameter == "weight":
            return tensors[label].shape[0]
    return None


def _loading_info(
    report: LoadReport,
    model: Any,
    names: Mapping[str, str],
    tensors: Tensors,
) -> dict[str, list[Any]]:
    """Build what transformers' `output_loading_info=True` returns."""
    state = model.state_dict()
    shapes = {names[label]: tuple(tensor.shape) for label, tensor in tensors.items()}
    return {
        "missing_keys": list(report.missing),
        "unexpected_keys": list(report.unexpected),
        "mismatched_keys": [
            (one.name, shapes[one.name], tuple(state[one.name].shape)) for one in report.mismatched
        ],
        "error_msgs": [],
    }


def _choose_class(
    classes: Sequence[type[Any]], fields: Mapping[str, Any], by_tensors: str
) -> type[Any]:
    by_name = {candidate.__name__: candidate for candidate in classes}
    for architecture in fields.get("architectures") or ():
        if architecture in by_name:
            return by_name[architecture]
    return by_name.get(by_tensors, classes[0])


def _target_dtype(
    dtype: torch.dtype | str | None,
    stored: Any,
    tensors: Sequence[torch.Tensor],
    config_path: Path | str,
    device: torch.device,
) -> torch.dtype:
    if dtype == FAST:
        return fast_dtype(device)[0]
    if dtype is None or dtype == "auto":
        found = _stored_dtype(stored, tensors, config_path)
        on_cpu = dtype is None and device.type == "cpu"
        return torch.promote_types(found, torch.float32) if on_cpu else found
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in FLOATS:
        expected = ", ".join(str(known) for known in FLOATS)
        raise ValueError(f'dtype: expected "auto", "fast" or one of {expected}, got {dtype!r}')
    return resolved


def _stored_dtype(
    stored: Any, tensors: Sequence[torch.Tensor], config_path: Path | str
) -> torch.dtype:
    if stored is not None:
        resolved = getattr(torch, str(stored).removeprefix("torch."), None)
        if resolved not in FLOATS:
            raise CheckpointError(f"{config_path}: expected a floating dtype, got {stored!r}")
        return resolved
    # Where a file mixes them, the one that loses nothing.
    floats = [tensor.dtype for tensor in tensors if tensor.dtype in FLOATS]
    return functools.reduce(torch.promote_types, floats) if floats else torch.float32

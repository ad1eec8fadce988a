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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .checkpoint_files import (
    CONFIG_NAME,
    PREPROCESSOR_NAME,
    Tensors,
    read_config,
    read_weights,
)
from .checkpoint_keys import BASE_PREFIX, HEADS, class_name_of, full_names
from .checkpoint_report import CheckpointError, CheckpointWarning, LoadReport, Mismatch, section
from .checkpoint_save import save_pretrained
from .hub import resolve_file

__all__ = [
    "CheckpointError",
    "CheckpointWarning",
    "LoadReport",
    "Mismatch",
    "load_pretrained",
    "save_pretrained",
]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class _NoRandomNumbers(TorchFunctionMode):
    """Leaves random initialisation out.

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
    """A model in eval mode, from config.json and the weights beside it.

    Reads model.safetensors and pytorch_model.bin, whole or in shards, with the tensor names of
    transformers 4 or 5. A head that the file does not have at all is newly initialised; the
    head of another class in the file is left out. Both are told by a CheckpointWarning and in
    `model.load_report`.

    Args:
        path: a directory or a Hugging Face hub id.
        model_class: the class to load, or several to choose one from by `architectures` in
            config.json, else by the names in the file.
        num_labels, id2label: other classes than config.json says; a classifier of another size in
            the file is then newly initialised.
        ignore_mismatched_sizes: newly initialise every tensor of another shape in the file.
        dtype: of the model; None or "auto" for the one in config.json, else the file's own.
        device: of the model; None for PyTorch's default device.
        revision, cache_dir, token, local_files_only: see `fastseg.hub.resolve_file`.
        **config_overrides: other fields of the configuration, such as `drop_path_rate=0.2`.

    Raises:
        CheckpointError: a file is missing in the directory, corrupt, unsafe or of another model;
            or tensors are missing, unexpected or of another shape: one error lists them all.
        FileNotFoundError: there is no such directory, and no such hub id or file in it.
        ImportError: a hub id was given and huggingface_hub is not installed.
        TypeError, ValueError: an argument is wrong.
    """
    classes = [model_class] if isinstance(model_class, type) else list(model_class)
    config_class = classes[0].config_class
    # The name of `dtype` in transformers before 4.56.
    torch_dtype = config_overrides.pop("torch_dtype", None)
    dtype = torch_dtype if dtype is None else dtype
    _check_overrides(config_class, config_overrides)
    resolve = functools.partial(
        resolve_file,
        path,
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=local_files_only,
    )
    try:
        config_path = resolve(CONFIG_NAME)
        fields = read_config(config_path, config_class.model_type)
        source, tensors = read_weights(resolve)
    except FileNotFoundError as error:
        if Path(path).is_dir():
            raise CheckpointError(str(error)) from error
        raise
    stored_dtype = fields.pop("dtype", None) or fields.get("torch_dtype")
    fields.pop("torch_dtype", None)
    names = full_names(tensors)
    chosen = _choose_class(classes, fields, names)
    target_dtype = _target_dtype(dtype, stored_dtype, tensors, config_path)
    config = _make_config(config_class, config_path, fields, num_labels, id2label, config_overrides)

    with torch.device("meta"), _NoRandomNumbers():
        model = chosen(config)
    if not hasattr(model, model.base_model_prefix):
        names = {name: full.removeprefix(BASE_PREFIX) for name, full in names.items()}
    plan = _plan(
        model,
        names,
        tensors,
        new_classifier=num_labels is not None or id2label is not None,
        new_mismatched=ignore_mismatched_sizes,
    )
    if plan.errors:
        raise CheckpointError(
            f"{source}: the tensors do not fit {chosen.__name__} as {config_path.name} describes it"
            "\n" + "\n".join(plan.errors)
        )
    if device is None:
        device = torch.get_default_device()

    def allocate(tensor: torch.Tensor) -> torch.Tensor:
        tensor_dtype = target_dtype if tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=tensor_dtype, device=device)

    # What to() and to_empty() do one after the other, without an import of sympy by the latter.
    model._apply(allocate)
    _fill(model, plan, tensors)
    model.load_report = plan.report
    model.name_or_path = os.fspath(path)
    # For `fastseg.segment`. Absolute, for the working directory may change.
    with contextlib.suppress(FileNotFoundError):
        model.preprocessor_file = resolve(PREPROCESSOR_NAME).absolute()
    if plan.report:
        warnings.warn(
            f"{source}, loaded into {chosen.__name__}:\n{plan.report}",
            CheckpointWarning,
            stacklevel=3,  # the caller of from_pretrained
        )
    return model.eval()


def _check_overrides(config_class: type[Any], overrides: Mapping[str, Any]) -> None:
    known = inspect.signature(config_class).parameters
    unknown = [name for name in overrides if name not in known or name == "kwargs"]
    if unknown:
        raise TypeError(
            f"{unknown[0]}: expected an argument of from_pretrained or a field of "
            f"{config_class.__name__}, got {unknown[0]}={overrides[unknown[0]]!r}"
        )


def _choose_class(
    classes: Sequence[type[Any]], fields: Mapping[str, Any], names: Mapping[str, str]
) -> type[Any]:
    by_name = {candidate.__name__: candidate for candidate in classes}
    for architecture in fields.get("architectures") or ():
        if architecture in by_name:
            return by_name[architecture]
    return by_name.get(class_name_of(names.values()), classes[0])


def _make_config(
    config_class: type[Any],
    path: Path,
    fields: dict[str, Any],
    num_labels: int | None,
    id2label: Mapping[Any, str] | None,
    overrides: Mapping[str, Any],
) -> Any:
    try:
        config = config_class.from_dict(fields)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a valid configuration: {error}") from error
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
            if resolved not in _FLOATS:
                raise CheckpointError(f"{config_path}: expected a floating dtype, got {stored!r}")
            return resolved
        # Where a file mixes them, the one that loses nothing.
        floats = [tensor.dtype for tensor in tensors.values() if tensor.dtype in _FLOATS]
        return functools.reduce(torch.promote_types, floats) if floats else torch.float32
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in _FLOATS:
        expected = ", ".join(str(known) for known in _FLOATS)
        raise ValueError(f'dtype: expected "auto" or one of {expected}, got {dtype!r}')
    return resolved


@dataclass
class _Plan:
    """What to do with each tensor of a model."""

    copied: dict[str, str] = field(default_factory=dict)  # name in the model -> name in the file
    new: list[str] = field(default_factory=list)
    counters: list[str] = field(default_factory=list)
    report: LoadReport = field(default_factory=LoadReport)
    errors: list[str] = field(default_factory=list)


def _plan(
    model: nn.Module,
    names: Mapping[str, str],
    tensors: Tensors,
    *,
    new_classifier: bool,
    new_mismatched: bool,
) -> _Plan:
    expected = model.state_dict()
    parts = {name.partition(".")[0] for name in names.values()}
    other_heads = HEADS - {name.partition(".")[0] for name, _ in model.named_children()}
    absent_heads = HEADS - parts
    plan = _Plan()
    missing, unexpected, unused, mismatched, misfits = [], [], [], [], []

    for file_name, name in names.items():
        if name in expected:
            if name in plan.copied:
                unexpected.append(f"{file_name}: the same tensor as {plan.copied[name]}")
            plan.copied[name] = file_name
        elif name.partition(".")[0] in other_heads:
            unused.append(file_name)
        else:
            unexpected.append(f"{file_name}: got {_describe(tensors[file_name])}")

    for name, target in expected.items():
        if name not in plan.copied:
            if name.endswith(".num_batches_tracked"):  # absent in files of old PyTorch versions
                plan.counters.append(name)
            elif name.partition(".")[0] in absent_heads:
                plan.new.append(name)
            else:
                missing.append(f"{name}: expected {_describe(target)}")
            continue
        tensor = tensors[plan.copied[name]]
        # An int8 or fp8 tensor holds codes of its numbers, not the numbers.
        same_kind = tensor.dtype in _FLOATS or not target.is_floating_point()
        if tensor.shape == target.shape and same_kind:
            continue
        mismatch = Mismatch(name, _describe(target), _describe(tensor))
        is_classifier = name.rpartition(".")[0] in ("classifier", "decode_head.classifier")
        if same_kind and (new_mismatched or (new_classifier and is_classifier)):
            mismatched.append(mismatch)
            plan.new.append(name)
            del plan.copied[name]
        else:
            misfits.append(mismatch)

    plan.errors = [
        *section("missing", missing),
        *section("unexpected", unexpected),
        *section("of another shape (ignore_mismatched_sizes=True initialises them anew)", misfits),
    ]
    plan.report = LoadReport(
        missing=tuple(name for name in plan.new if name not in {m.name for m in mismatched}),
        unexpected=tuple(unused),
        mismatched=tuple(mismatched),
        reinitialized=tuple(plan.new),
    )
    return plan


def _describe(tensor: torch.Tensor) -> str:
    kind = "" if tensor.dtype in _FLOATS else f" {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)}{kind}"


def _fill(model: Any, plan: _Plan, tensors: Tensors) -> None:
    # Whole layers are initialised, as the model's constructor does it; what the file has of them
    # is copied over that.
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in plan.new):
        module = model.get_submodule(layer)
        module.reset_parameters()
        model._init_weights(module)
    state = model.state_dict()
    for name in plan.counters:
        state[name].zero_()
    for name, file_name in plan.copied.items():
        state[name].copy_(tensors.pop(file_name))

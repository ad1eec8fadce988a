"""PyTorch's pickled files (.pth, .pt, .bin, .ckpt), read without running anything in them.

PyTorch's own restricted reader goes first. It refuses files with anything besides tensors, as the
training state that mmseg and Lightning store beside the weights. Those are read once more with a
stand-in for every class and function that is not needed to make a tensor: it takes what the file
does to it and does nothing. What a model needs must then be tensors all the same.
"""

from __future__ import annotations

import pickle
import re
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .report import CheckpointError
from .training import DEFAULT_CHOICE, Choice, weights_in

# What PyTorch's restricted reader says of a function or class that it does not call, and of
# anything else; the advice around that is left out, since it is to load without the restriction.
_REFUSED = re.compile(r"GLOBAL (\S+)")
_REASON = re.compile(r"WeightsUnpickler error:\s*(.+)")


class Pickled(NamedTuple):
    """Content of a file; the fields are the first of `Weights` (`files.py`)."""

    tensors: dict[str, torch.Tensor]
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    averaged: bool = False


def read_pickled(path: Path, choice: Choice = DEFAULT_CHOICE) -> Pickled:
    """The weights in a file.

    Raises:
        CheckpointError: the file is corrupt, or holds something else than tensors under their
            names, such as objects that only its own code could make.
    """
    try:
        content = _open(path, weights_only=True)
    except pickle.UnpicklingError as error:
        try:
            content = _load_inert(path)
        except Exception as failure:
            refused = _REFUSED.search(str(error))
            raise (_unsafe(path, refused[1]) if refused else _corrupt(path, error)) from failure
    # On corrupt files the unpickler raises almost anything: KeyError, IndexError, EOFError, ...
    except Exception as error:
        raise _corrupt(path, error) from error
    if isinstance(content, _Inert):  # a whole model
        raise _unsafe(path, _name(content))
    return take_weights(content, path, choice)


def _open(path: Path, **options: Any) -> Any:
    """What PyTorch's reader gives with these options; tensors in memory-mapped files."""
    if path.suffix == ".safetensors":  # by its path it would be taken for that
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", **options)
    return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), **options)


def take_weights(content: Any, path: Path | str, choice: Choice) -> Pickled:
    """The weights in a dictionary that a file at `path` held, or that stands for one.

    Raises:
        CheckpointError: it holds something else than tensors under their names.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: expected a dictionary of tensors, got {type(content).__name__}"
        )
    try:
        tensors, notes, averaged = weights_in(content, choice.average)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    others = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
    leave_out = not choice.strict and len(others) < len(tensors)
    for name in others:
        if isinstance(tensors[name], _Inert) and not leave_out:
            raise _unsafe(path, _name(tensors[name]))
    if others and not leave_out:
        shown = ", ".join(f"{name!r} ({type(tensors[name]).__name__})" for name in others[:10])
        raise CheckpointError(f"{path}: expected a dictionary of tensors, got entries {shown}")
    # Without attributes that a file may have put on a tensor.
    plain = {
        str(name): torch.Tensor.detach(tensor)
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor)
    }
    return Pickled(plain, _class_names(content), notes, tuple(map(str, others)), averaged)


def _corrupt(path: Path, error: Exception) -> CheckpointError:
    match = _REASON.search(str(error))
    reason = match[1] if match else str(error).partition(". ")[0] or type(error).__name__
    return CheckpointError(
        f"{path}: expected a PyTorch file, got one that is truncated or corrupt: {reason}"
    )


def _unsafe(path: Path | str, refused: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: expected tensors only, got a pickle that calls {refused}. Loading it would run "
        "code from the file, so it was not loaded (weights_only=True); where you trust it, save "
        "its state_dict again as safetensors"
    )


def _class_names(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the data set's classes, as mmseg 0.x and 1.x store them."""
    meta = content.get("meta")
    if not isinstance(meta, dict):
        return ()
    dataset = meta.get("dataset_meta")
    names = meta.get("CLASSES") or (dataset.get("classes") if isinstance(dataset, dict) else None)
    if not isinstance(names, list | tuple) or any(type(name) is not str for name in names):
        return ()
    return tuple(names)


class _Inert:
    """Stand-in for a class or function that a file names, and for what would come of calling it."""

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    extend = add = append


def _name(thing: _Inert) -> str:
    """Name of the class or function that a stand-in stands for."""
    return f"{type(thing).__module__}.{type(thing).__name__}"


class _Function:
    """A function that files may call, its attributes out of their reach."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function has no state")


def _rebuild_tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    """A tensor on its storage; whether it wants gradients and its hooks are left out."""
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError(f"expected a storage, got {type(storage).__name__}")
    tensor = torch.empty(0, dtype=storage.dtype)
    return tensor.set_(storage._untyped_storage, offset, tuple(size), tuple(stride))


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


def _rebuild_with_attributes(rebuild: Any, kind: Any, args: Any, attributes: Any) -> torch.Tensor:
    if not isinstance(rebuild, _Function):
        raise pickle.UnpicklingError(f"expected a function that makes a tensor, got {rebuild!r}")
    return rebuild(*args)


# All that a file may call. Storages come by persistent ids, which PyTorch's reader resolves.
_CALLABLE: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): _Function(_rebuild_with_attributes),
}


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return what a file may call, or else a stand-in class; never import anything."""
        allowed = _CALLABLE.get((module, name))
        if allowed is not None:
            return allowed
        return type(name, (_Inert,), {"__slots__": (), "__module__": module})


def _load(file: Any, **arguments: Any) -> Any:
    return _InertUnpickler(file, **arguments).load()


def _load_inert(path: Path) -> Any:
    """The content of a file whose pickle PyTorch's restricted reader refused.

    It came as far as the pickle, so this is no TorchScript archive and no old tar file: the
    restricted reader refuses these earlier, with a RuntimeError, while PyTorch's common reader,
    used here, would open them by other means than this unpickler.
    """
    reader = types.SimpleNamespace(__name__="inert", Unpickler=_InertUnpickler, load=_load)
    return _open(path, pickle_module=reader, weights_only=False)

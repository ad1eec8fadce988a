"""Models as ONNX files that are kept: written once for the same weights and options."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import torch

from fastseg._version import __version__

from .export import describe, export

_PREFIX = "fastseg-"
_LEFT_OVER = 3600  # seconds after which a file that was not finished is nobody's


def exported(model: Any, folder: Path | None) -> Path:
    """The ONNX file of `model`, written and checked where there is none yet.

    Its name has a hash of the weights, the configuration, the image processor and the version of
    fastseg. It is there whole or not at all, whatever becomes of the process that writes it.

    Args:
        folder: where to keep it. None, or one that cannot be written to, is the user's folder for
            caches.

    Raises:
        ImportError, ValueError, OSError: as `export` raises them.
    """
    name = f"{_PREFIX}{_key(model)}.onnx"
    folders = [_user_folder()] if folder is None else [folder, _user_folder()]
    for one in folders:
        if (one / name).is_file():
            return one / name
    kept = folders[0] if os.access(folders[0], os.W_OK) else _user_folder()
    kept.mkdir(parents=True, exist_ok=True)
    for path in kept.glob(f".{_PREFIX}*.onnx"):  # of a process that was killed
        if time.time() - path.stat().st_mtime > _LEFT_OVER:
            path.unlink(missing_ok=True)
    export(model, kept / name)
    return kept / name


def _user_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastseg"


def _key(model: Any) -> str:
    found = hashlib.blake2b(repr((__version__, describe(model))).encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()

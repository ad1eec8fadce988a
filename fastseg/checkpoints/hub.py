"""Paths of a checkpoint's files: in a local directory, or on the Hugging Face hub.

huggingface_hub is optional and imported only for a name that is no local directory; its cache, its
login and its offline mode (`HF_HUB_OFFLINE=1`) apply.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from .kinds import folder_kind

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
# Of files of weights: no repository is called so, and asking the hub for one takes half a minute.
_WEIGHTS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".h5", ".hdf5", ".keras", ".onnx")
_LISTED = 20


def resolve_file(
    repo_or_dir: str | os.PathLike[str],
    filename: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local path of `filename`, downloaded first where `repo_or_dir` is a hub id.

    Args:
        repo_or_dir: a directory, or a hub id such as "nvidia/mit-b0"; a directory of that name
            goes first.
        filename: name of a file in it.
        subfolder: of it, where the file is.
        revision: branch, tag or commit on the hub.
        cache_dir, token: as in huggingface_hub.
        local_files_only: take the file from the cache, never from the network.

    Raises:
        FileNotFoundError: there is no such directory, repository, revision or file.
        ImportError: a hub id was given and huggingface_hub is not installed.
    """
    if not isinstance(repo_or_dir, str | os.PathLike):
        raise TypeError(
            f"repo_or_dir: expected a directory or a hub id, got {type(repo_or_dir).__name__}"
        )
    directory = Path(repo_or_dir)
    if directory.is_dir():
        return _local_file(directory, filename, subfolder)
    if directory.exists():
        raise FileNotFoundError(f"{directory}: expected a directory or a hub id, got a file")
    repo_id = os.fspath(repo_or_dir)
    if repo_id.lower().endswith(_WEIGHTS):
        raise FileNotFoundError(f"{repo_id}: there is no such file or folder")
    if not _HUB_ID.fullmatch(repo_id) or repo_id.startswith("."):
        raise FileNotFoundError(f"{repo_id}: there is no such file or folder, and it is no hub id")
    return _hub_file(
        repo_id,
        filename,
        revision,
        subfolder=subfolder,
        cache_dir=None if cache_dir is None else Path(cache_dir),
        token=token,
        local_files_only=local_files_only,
    )


def find_file(repo_or_dir: str | os.PathLike[str], filename: str, **where: Any) -> Path | None:
    """Return what `resolve_file` gives; None where a file is not there or cannot be reached."""
    try:
        return resolve_file(repo_or_dir, filename, **where)
    except FileNotFoundError:
        return None


def _local_file(directory: Path, filename: str, subfolder: str | None) -> Path:
    if subfolder and not (directory / subfolder).is_dir():
        filename = f"{subfolder}/{filename}"  # so that the error says what is there instead
    elif subfolder:
        directory = directory / subfolder
    path = directory / filename
    if path.is_file():
        return path
    if path.is_symlink():
        raise FileNotFoundError(
            f"{path}: a link to {os.readlink(path)}, which is not there; copy the folder with what "
            "its links lead to, as `cp -rL` does"
        )
    names = sorted(entry.name for entry in directory.iterdir())
    shown = ", ".join(names[:_LISTED]) or "nothing"
    if len(names) > _LISTED:
        shown += f" and {len(names) - _LISTED} more"
    kind = folder_kind(names)
    raise FileNotFoundError(
        f"{directory}: expected a file {filename}, found {shown}{f' ({kind})' if kind else ''}"
    )


def _hub_file(repo_id: str, filename: str, revision: str | None, **where: Any) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{repo_id}: there is no such file or folder, and to load it from the Hugging Face hub "
            'huggingface_hub is needed: pip install "fastseg-segformer[hub]"'
        ) from error
    place = f"{repo_id} on the Hugging Face hub" + (f", revision {revision}" if revision else "")
    if where["subfolder"]:
        place += f", folder {where['subfolder']}"
    try:
        return Path(hf_hub_download(repo_id, filename, revision=revision, **where))
    # Subclasses first: a gated repository is a RepositoryNotFoundError, a file missing from the
    # cache an EntryNotFoundError.
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{repo_id}: there is no such file or folder, and it is no hub id: {error}"
        ) from error
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{place}: access is restricted; ask for it on the hub and log in or pass token"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id}: there is neither such a directory nor such a repository on the Hugging "
            "Face hub (a private one needs a login or token)"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{place}: there is no such revision") from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id}: there is no such file or folder, {filename} of this hub id is not in the "
            f"cache, and it could not be downloaded: {error}"
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{place}: there is no file {filename}") from error

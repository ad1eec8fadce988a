"""Saving a model as config.json + model.safetensors, which transformers 4 and 5 load.

A save that fails leaves the directory as it was. First everything is written into a temporary
directory inside the target, where a full disk or a bad configuration does no harm; then the files
are moved into place, with links to the earlier ones kept to undo that; leftovers of the earlier
checkpoint go last.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from .files import CONFIG_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, Tensors
from .layouts import Layout

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", re.IGNORECASE)


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    is_main_process: bool = True,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    max_shard_size: int | str | None = None,
    safe_serialization: bool = True,
) -> None:
    """Write config.json and model.safetensors of `model` into `directory`.

    An earlier checkpoint there is replaced; other files stay.

    Args:
        model: one of fastseg's models; it is not changed.
        directory: made where it does not exist, with its parents.
        is_main_process: False writes nothing, for all processes of a training but one.
        state_dict: the weights to write instead of the model's, under its names, such as those
            gathered from several GPUs.
        max_shard_size: split larger weights into files of at most this many bytes, such as
            500_000_000, "500MB" or "2GiB", with an index; None for one file.
        safe_serialization: True; pickled files are not written.

    Raises:
        TypeError, ValueError: an argument is wrong, names in `state_dict` are others, or a field of
            the configuration cannot be written as JSON.
        OSError: writing failed, or `directory` is a file.
    """
    limit = _size_in_bytes(max_shard_size)
    if not safe_serialization:
        raise ValueError(
            "safe_serialization: expected True, as fastseg writes safetensors only; "
            "torch.save(model.state_dict(), path) makes a pickled file"
        )
    if not is_main_process:
        return
    weights = model.state_dict()
    if state_dict is not None and (others := weights.keys() ^ state_dict.keys()):
        raise ValueError(
            f"state_dict: expected the model's names, got others: {', '.join(sorted(others))}"
        )
    config_text = _config_text(model)
    tensors = plain_tensors(weights if state_dict is None else state_dict)
    write_folder(Path(directory), config_text, tensors, limit)


def write_folder(
    directory: Path, config_text: str, tensors: Tensors, limit: int | None = None
) -> None:
    """Write config.json and the weights, in shards of at most `limit` bytes, or nothing.

    Raises:
        OSError: writing failed, or `directory` is a file.
    """
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as temporary:
            written = _write(Path(temporary), config_text, tensors, limit)
            _move_into_place(Path(temporary), directory, written)
    except BaseException:
        if made:
            with contextlib.suppress(OSError):  # not empty: somebody else has written there
                directory.rmdir()
        raise


def save_for(model: Any, layout: Layout, path: Path) -> None:
    """Write a model's weights as another library reads them: in a file, or where it has a
    config.json in a folder.

    What is there is replaced, or left as it was where writing fails.

    Raises:
        OSError: it cannot be written.
    """
    tensors = plain_tensors(layout.tensors(model.state_dict()))
    config = layout.config(model)
    if config is not None:
        write_folder(path, json.dumps(config, indent=2, sort_keys=True) + "\n", tensors)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(layout.content(model, tensors), temporary)
        os.replace(temporary, path)
    except RuntimeError as error:  # of torch's writer, such as a full disk
        raise OSError(f"{path.name} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _config_text(model: Any) -> str:
    fields = model.config.to_dict()
    fields["architectures"] = [type(model).__name__]
    fields["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    try:
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"
    except (TypeError, ValueError) as error:
        raise type(error)(f"config: expected values that JSON can hold: {error}") from error


def plain_tensors(state_dict: Mapping[str, torch.Tensor]) -> Tensors:
    """The weights on the CPU, each tensor contiguous and in memory of its own.

    safetensors refuses tensors that share memory, such as tied weights or views of one buffer.
    """
    tensors: Tensors = {}
    seen: set[int] = set()
    for name, tensor in state_dict.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[name] = tensor
    return tensors


def _write(folder: Path, config_text: str, tensors: Tensors, limit: int | None) -> list[str]:
    """Write all files into `folder`; their names, in the order they are to be moved in."""
    config_path = folder / CONFIG_NAME
    config_path.write_text(config_text, encoding="utf-8")
    shards = list(_split(tensors, limit))
    weight_map: dict[str, str] = {}
    names = []
    for number, shard in enumerate(shards, start=1):
        name = WEIGHTS_NAME
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys(shard, name))
        try:
            save_file(shard, folder / name, metadata={"format": "pt"})
        except SafetensorError as error:  # such as a full disk
            raise OSError(f"{name} could not be written: {error}") from error
        # safetensors makes files that only their owner can read.
        shutil.copymode(config_path, folder / name)
        names.append(name)
    if len(shards) > 1:
        total_size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        index_text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / WEIGHTS_INDEX_NAME).write_text(index_text, encoding="utf-8")
        names.append(WEIGHTS_INDEX_NAME)
    names.append(CONFIG_NAME)
    for name in names:
        _flush_to_disk(folder / name)
    return names


def _flush_to_disk(path: Path) -> None:
    # Before the rename: otherwise a power cut can leave the new name on an empty file.
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _split(tensors: Tensors, limit: int | None) -> Iterator[Tensors]:
    shard: Tensors = {}
    size = 0
    for name, tensor in tensors.items():
        if limit is not None and shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _move_into_place(folder: Path, directory: Path, names: list[str]) -> None:
    """Move files from `folder` over those in `directory`, or leave `directory` as it was."""
    # The order is for a process that is killed in between, which nothing undoes: weights first,
    # then the index that names them, then config.json, then leftovers of the earlier checkpoint.
    # So a reader finds the earlier weights or the new ones. Only where shards take the names of
    # earlier shards would the earlier index mix the two without an error: there it goes first,
    # and a reader finds no weights until the new index is in place.
    earlier = [
        entry.name
        for entry in directory.iterdir()
        if entry.name in (CONFIG_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
        or _SHARD.fullmatch(entry.name)
    ]
    kept = folder / "earlier"
    kept.mkdir()
    for name in earlier:
        _link_or_copy(directory / name, kept / name)
    stale = {*earlier} - {*names}
    taken = {*earlier} & {*names}
    touched = set()
    try:
        if WEIGHTS_INDEX_NAME in taken and any(_SHARD.fullmatch(name) for name in taken):
            touched.add(WEIGHTS_INDEX_NAME)
            (directory / WEIGHTS_INDEX_NAME).unlink()
        for name in names:
            touched.add(name)
            os.replace(folder / name, directory / name)
        # model.safetensors before other leftovers: loaders prefer it to an index.
        for name in sorted(stale, key=lambda name: name != WEIGHTS_NAME):
            touched.add(name)
            (directory / name).unlink()
    except BaseException:
        for name in touched:
            if name in earlier:
                os.replace(kept / name, directory / name)
            else:
                (directory / name).unlink(missing_ok=True)
        raise


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _size_in_bytes(size: int | str | None) -> int | None:
    """Bytes of 500_000_000, "500MB" (10^6) or "2GiB" (2^30); None stays None."""
    if size is None:
        return None
    if isinstance(size, str) and (match := _SIZE.fullmatch(size.strip())):
        number, prefix, binary = match.groups()
        size = int(
            float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " ")
        )
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f'max_shard_size: expected bytes or a text such as "2GB", got {size!r}')
    return size

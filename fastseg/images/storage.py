"""Folders that files are written to and read from: here, or behind URLs that pyarrow reaches.

URLs are those of `pyarrow.fs.FileSystem.from_uri`, such as `s3://bucket/folder`, `gs://`, `abfs://`,
`hdfs://` and `fsspec+NAME://`. Parameters of a filesystem are behind a question mark.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from .marked import write_whole

# In these an object is there as soon as it is whole, and to rename is to copy.
_OBJECT_STORES = {"s3", "gcs", "abfs"}


class Item(NamedTuple):
    """A file: its name below the folder, and when it was written, in seconds."""

    name: str
    written: float


def is_url(place: str | os.PathLike[str]) -> bool:
    """Return whether a place is a URL and not a path."""
    return "://" in str(place)


class Storage:
    """A folder whose files are written whole or not at all.

    Args:
        where: a path, or a URL that pyarrow reaches. It need not be there.

    Raises:
        ImportError: a URL needs pyarrow, which is not installed.
        ValueError: pyarrow knows no such URL.
    """

    def __init__(self, where: str | os.PathLike[str]) -> None:
        self.where = os.fspath(where)
        self.is_remote = is_url(self.where)
        if self.is_remote:
            filesystem_of(self.where)

    def __str__(self) -> str:
        return self.where

    def place(self, name: str) -> str:
        """The path, or the URL, of a file below the folder."""
        if not self.is_remote:
            return os.path.join(self.where, name)
        base, mark, options = self.where.partition("?")
        return f"{base.rstrip('/')}/{name}{mark}{options}"

    def write(self, name: str, content: bytes) -> None:
        """Write a file, with the folders that it lies in.

        Raises:
            OSError: it cannot be written.
        """
        if not self.is_remote:
            write_whole(Path(self.where, name), lambda file: file.write(content))
            return
        filesystem, path = filesystem_of(self.place(name))
        if filesystem.type_name in _OBJECT_STORES:
            with filesystem.open_output_stream(path) as file:
                file.write(content)
            return
        folder = path.rpartition("/")[0]
        filesystem.create_dir(folder, recursive=True)
        temporary = f"{folder}/.{uuid.uuid4().hex}.tmp"
        try:
            with filesystem.open_output_stream(temporary) as file:
                file.write(content)
            filesystem.move(temporary, path)
        except BaseException:
            with contextlib.suppress(Exception):
                filesystem.delete_file(temporary)
            raise

    def open(self, name: str) -> IO[bytes]:
        """Open a file to read and to seek in.

        Raises:
            OSError: it cannot be opened.
        """
        if not self.is_remote:
            return open(Path(self.where, name), "rb")
        filesystem, path = filesystem_of(self.place(name))
        return filesystem.open_input_file(path)

    def remove(self, name: str) -> None:
        """Remove a file."""
        if not self.is_remote:
            Path(self.where, name).unlink()
            return
        filesystem, path = filesystem_of(self.place(name))
        filesystem.delete_file(path)

    def files(self, ending: str = "", below: bool = False) -> Iterator[Item]:
        """Files with an `ending` in the folder, with `below` in those below too, but hidden ones.

        Nothing where there is no folder. Of a folder here they are in the order of their names.

        Raises:
            OSError: the folder cannot be read.
        """
        found: Iterator[Item]
        if self.is_remote:
            from pyarrow.fs import FileSelector, FileType

            filesystem, base = filesystem_of(self.where)
            selector = FileSelector(base, allow_not_found=True, recursive=below)
            found = (
                Item(info.path[len(base.rstrip("/")) + 1 :], (info.mtime_ns or 0) / 1e9)
                for info in filesystem.get_file_info(selector)
                if info.type == FileType.File
            )
        else:
            found = _files_here(self.where, below)
        for item in found:
            hidden = item.name.startswith(".") or "/." in item.name
            if item.name.endswith(ending) and not hidden:
                yield item


def read_bytes(url: str) -> bytes:
    """What is behind a URL that pyarrow reaches.

    Raises:
        OSError: it cannot be read.
    """
    filesystem, path = filesystem_of(url)
    with filesystem.open_input_file(path) as file:
        return file.read()


def open_place(place: str) -> Path | IO[bytes]:
    """A file to read a picture from: its path, or the bytes behind its URL."""
    return io.BytesIO(read_bytes(place)) if is_url(place) else Path(place)


def filesystem_of(url: str) -> tuple[Any, str]:
    """pyarrow's filesystem of a URL, and the path in it, where names are as they stand in the URL.

    Raises:
        ImportError, ValueError: as of `Storage`.
    """
    where, mark, options = url.partition("?")
    scheme, _, rest = where.partition("://")
    host, slash, path = rest.partition("/")
    filesystem, base = _filesystem(f"{scheme}://{host}/{mark}{options}")
    return filesystem, f"{base.rstrip('/')}{slash}{path}"


@functools.lru_cache(maxsize=32)
def _filesystem(root: str) -> tuple[Any, str]:
    try:
        from pyarrow.fs import FileSystem
    except ImportError:
        raise ImportError(
            f'{root}: URLs need pyarrow: pip install "fastseg-segformer[datasets]"'
        ) from None
    return FileSystem.from_uri(root)


def _files_here(folder: str, below: bool) -> Iterator[Item]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(folders) if below else []
        for name in sorted(names):
            path = os.path.join(place, name)
            yield Item(os.path.relpath(path, folder), os.stat(path).st_mtime)

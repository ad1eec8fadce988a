"""One file of COCO annotations for all pictures of a run."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from .files import Source, json_bytes
from .options import CommandError, first_line


class CocoFile:
    """Annotations, an object for each class of each picture: segmentation is run lengths.

    What is added waits in temporary files, so that memory does not grow with the pictures; the file
    itself appears in the end, whole.

    Args:
        names: of the categories, by number.

    Raises:
        CommandError: the folder cannot be written to.
    """

    def __init__(self, path: Path, names: Mapping[int, str]) -> None:
        self._path, self._names = path, names
        self.error: str | None = None  # why it cannot be written
        self._pictures = self._annotations = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir() or not os.access(path.parent, os.W_OK):
                raise OSError("is a folder" if path.is_dir() else "no permission to write there")
        except OSError as error:
            raise CommandError(f"--coco {path}: {first_line(error)}") from error
        # Closed in `finish`, and by the system where a run ends early.
        self._parts = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115

    def add(self, source: Source, described: Mapping[str, Any]) -> None:
        """Add a picture by what `ResultWriter` told of it."""
        self._pictures += 1
        picture = {"id": self._pictures, "file_name": str(source.path)}
        picture |= {name: described[name] for name in ("width", "height")}
        images, annotations = self._parts
        try:
            _append(images, picture)
            for annotation in described["annotations"]:
                self._annotations += 1
                ids = {"id": self._annotations, "image_id": self._pictures}
                _append(annotations, {**annotation, **ids})
        except OSError as error:
            self.error = self.error or first_line(error)

    def finish(self) -> None:
        """Write the file, whole or not at all; where that fails, the reason is in `error`."""
        categories = [{"id": number, "name": name} for number, name in self._names.items()]
        temporary = self._path.parent / f".{uuid.uuid4().hex}.tmp"
        try:
            if self.error is None:
                with temporary.open("xb") as file:
                    file.write(f'{{"categories": {json.dumps(categories)}'.encode())
                    for name, part in zip(("images", "annotations"), self._parts, strict=True):
                        file.write(f',\n"{name}": ['.encode())
                        part.seek(0)
                        shutil.copyfileobj(part, file)
                        file.write(b"]")
                    file.write(b"}\n")
                os.replace(temporary, self._path)
        except OSError as error:
            self.error = first_line(error)
        finally:
            temporary.unlink(missing_ok=True)
            for part in self._parts:
                part.close()


def _append(file: IO[bytes], row: dict[str, Any]) -> None:
    if file.tell():
        file.write(b",\n")
    file.write(json_bytes(row).rstrip())

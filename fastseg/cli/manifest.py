"""The manifest of `fastseg predict`: a line of JSON for each picture, added as it is done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import Source, Target, json_bytes
from .options import CommandError, first_line


class Manifest:
    """A file that rows are added to.

    Args:
        resumes: read who has a row without an error already.

    Raises:
        CommandError: the file cannot be opened, or is something else.
    """

    def __init__(self, path: Path, resumes: bool) -> None:
        self._done: set[str] = set()
        self.error: str | None = None  # why rows cannot be written any more
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)  # several processes may add to it
            if path.stat().st_size:
                self._read(path, resumes)
        except (OSError, ValueError) as error:
            raise CommandError(f"--manifest {path}: {first_line(error)}") from error

    def _read(self, path: Path, resumes: bool) -> None:
        whole = 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if number == 1 or (resumes and line.endswith(b"\n")):
                    try:
                        row = json.loads(line)
                        error, source = row["error"], row["source"]
                    except (ValueError, TypeError, KeyError):
                        raise ValueError(
                            f"expected rows of earlier runs, found in line {number} something else"
                        ) from None
                    if error is None:
                        self._done.add(source)
                whole += len(line) if line.endswith(b"\n") else 0
        self._file.truncate(whole)  # what was cut off, as by a full disk

    def has(self, source: Source) -> bool:
        """Return whether an earlier run has added a row on a picture, without an error."""
        return _identity(source) in self._done

    def add(
        self,
        source: Source,
        target: Target,
        described: Mapping[str, Any],
        reason: str,
        seconds: Mapping[str, float],
    ) -> None:
        """Add a row; where that fails, keep the reason in `error`."""
        row = {
            "image": str(source.path),
            "page": source.page,
            "source": _identity(source),
            "output": str(target.stem),
            "error": reason or None,
            **described,
            "ms": {stage: round(1000 * value, 2) for stage, value in seconds.items()},
        }
        try:
            self._file.write(json_bytes(row))
        except OSError as error:
            self.error = self.error or first_line(error)

    def close(self) -> None:
        self._file.close()


def _identity(source: Source) -> str:
    """What tells a picture from others, and its page from others of the file."""
    return source.mark if source.page == 1 else f"{source.mark}-{source.page}"

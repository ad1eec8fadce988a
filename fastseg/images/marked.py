"""Files that carry fastseg's mark, written whole or not at all.

The mark tells the picture that a result was made of, so that a later run neither takes a result for
a picture nor replaces that of another one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastseg._version import __version__

SOFTWARE = "fastseg"
SOURCE_KEYWORD = "fastseg-source"

# The default level takes 4 times as long for a photograph, and saves a twelfth of the file.
_PNG_LEVEL = 1
_RUNS = 3  # zlib's Z_RLE: of label maps smaller and quicker than to look for repetitions


def mark_of(identity: str | bytes | os.PathLike[str]) -> str:
    """What tells a picture from others: a hash of its absolute path, its URL or its content."""
    return hashlib.sha256(os.fsencode(identity)).hexdigest()


def marks(mark: str) -> dict[str, str]:
    """What a marked picture says of itself, by keyword."""
    return {"Software": f"{SOFTWARE} {__version__}", SOURCE_KEYWORD: mark}


def png_bytes(image: Image.Image, mark: str, runs: bool = False) -> bytes:
    """A PNG with a mark in its text chunks; with `runs` compressed by run lengths."""
    texts = PngInfo()
    for keyword, text in marks(mark).items():
        texts.add_text(keyword, text)
    options: dict[str, Any] = {"pnginfo": texts, "compress_level": _PNG_LEVEL}
    if runs:
        options["compress_type"] = _RUNS
    stream = io.BytesIO()
    image.save(stream, format="PNG", **options)
    return stream.getvalue()


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill a file that then takes its place at once, its folder made where absent.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "xb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()

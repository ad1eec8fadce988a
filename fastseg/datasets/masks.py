"""Label maps in files: read as they are stored, or other numbers put in the place of theirs."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from fastseg.images.inputs import read_label_map
from fastseg.images.modes import upright
from fastseg.images.palettes import cityscapes_label_ids

IGNORED = 255

LABEL_IDS, BINARY = "labelIds", "binary"
NUMBERINGS = (LABEL_IDS, BINARY)


def numbering(name: str | None) -> np.ndarray | None:
    """Class number of each byte of a mask, uint8 (256,); None leaves them as they are.

    Args:
        name: "labelIds": Cityscapes' own ids become train ids, those of no class 255; "binary":
            255 becomes 1.

    Raises:
        ValueError: another name.
    """
    if name is None:
        return None
    if name == LABEL_IDS:
        table = np.full(256, IGNORED, np.uint8)
        ids = list(cityscapes_label_ids())
        table[ids] = np.arange(len(ids))
        return table
    if name == BINARY:
        table = np.arange(256, dtype=np.uint8)
        table[255] = 1
        return table
    raise ValueError(f"numbers: expected None or one of {', '.join(NUMBERINGS)}, got {name!r}")


def read_picture(source: Path | io.BytesIO, name: str) -> Image.Image:
    """A picture as people see it, turned as its EXIF orientation says.

    Raises:
        ValueError: it cannot be read; with `name`.
    """
    try:
        return upright(_open(source), name)
    except Exception as error:  # decoders meet broken files with errors of any class
        raise ValueError(f"{name}: {_reason(error)}") from error


def read_mask(
    source: Path | io.BytesIO, name: str, numbers: np.ndarray | None = None
) -> np.ndarray:
    """Labels (H, W) of a mask, uint8 where the file has 8 bits; of a palette its indices.

    Args:
        numbers: as `numbering` gives them.

    Raises:
        ValueError: it cannot be read, or has colours; with `name`.
    """
    try:
        labels = read_label_map(_open(source), name)
    except Exception as error:
        raise ValueError(f"{name}: {_reason(error).removeprefix(f'{name}: ')}") from error
    if labels.dtype == bool:
        labels = labels.astype(np.uint8)
    if numbers is None:
        return labels
    if labels.min() < 0 or labels.max() > 255:
        raise ValueError(f"{name}: expected numbers from 0 to 255, got up to {labels.max()}")
    return numbers[labels]


def _open(source: Path | io.BytesIO) -> Image.Image:
    # From a stream, as PIL mixes up grey TIFFs that it maps and turns.
    return Image.open(io.BytesIO(source.read_bytes()) if isinstance(source, Path) else source)


def _reason(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    if "cannot identify image file" in reason:
        return "cannot be read as a picture"
    return reason or type(error).__name__

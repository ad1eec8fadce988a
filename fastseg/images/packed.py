"""Label maps as bytes: PNG files, and smaller forms for columns of tables."""

from __future__ import annotations

import io
import json
import zlib

import numpy as np
from PIL import Image

from .marked import png_bytes
from .overlay import MAX_INDEXED, label_image
from .run_lengths import class_runs, label_map
from .types import RunLengths

PNG, GREY, ZLIB, RLE = FORMS = ("png", "grey", "zlib", "rle")

_PNG_START = b"\x89PNG"


def pack(labels: np.ndarray, form: str, colours: np.ndarray, mark: str) -> bytes:
    """A label map (H, W) of integers from 0 as bytes.

    Args:
        form: "png", indexed with `colours`; "grey", a PNG of the same numbers; "zlib", the numbers
            row by row in uint8, or little-endian uint16 where there are more than 256 colours,
            compressed by zlib; "rle", JSON with COCO's run lengths of each class by its number.
        colours: (K, 3) uint8, of the classes.
        mark: of PNGs, as `marked.mark_of` makes it.
    """
    if form in (PNG, GREY):
        return png_bytes(label_image(labels, colours, form == GREY), mark, runs=True)
    if form == RLE:
        masks = {str(number): runs.to_coco() for number, runs in class_runs(labels).items()}
        return json.dumps(masks, separators=(",", ":")).encode()
    numbers = labels.astype("u1" if len(colours) <= MAX_INDEXED else "<u2", copy=False)
    # The highest levels take ten times as long for a fifth less.
    return zlib.compress(np.ascontiguousarray(numbers).tobytes(), 1)


def unpack(content: bytes, height: int, width: int) -> np.ndarray:
    """The label map (H, W) that `pack` made bytes of, in whichever form; uint8 or uint16.

    Raises:
        ValueError: they are none, or of another size.
    """
    try:
        labels = _unpack(content, height, width)
    except (ValueError, KeyError, OSError, zlib.error) as error:
        raise ValueError(f"labels: expected what Segmenter packs, got {error}") from error
    if labels.shape != (height, width):
        raise ValueError(f"labels: expected a map of {(height, width)}, got {labels.shape}")
    return labels


def _unpack(content: bytes, height: int, width: int) -> np.ndarray:
    if content.startswith(_PNG_START):
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image)
    if content.startswith(b"{"):
        masks: dict[str, RunLengths] = json.loads(content)
        return label_map({int(number): mask for number, mask in masks.items()}, height, width)
    numbers = zlib.decompress(content)
    kind = "u1" if len(numbers) == height * width else "<u2"
    return np.frombuffer(numbers, kind).reshape(height, width)

"""Reading pictures as people see them, upright; the next ones while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

from .options import first_line

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def open_image(path: Path) -> Image.Image:
    """The picture in a file, turned as its EXIF orientation says; the first frame of many.

    16-bit grey is scaled to 8 bits; other modes, alpha included, stay for the image processor.

    Raises:
        ValueError: the file cannot be decoded, or its pixels have no known range.
    """
    try:
        with Image.open(path) as file:
            return _to_8_bits(ImageOps.exif_transpose(file))
    except Exception as error:  # decoders meet broken files with errors of any class
        raise ValueError(first_line(error)) from error


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale grey of 16 bits to 8: PIL's conversion would cut values over 255 down to white."""
    if not image.mode.startswith(("I", "F")):
        image.load()
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"expected 8- or 16-bit pixels, got mode {image.mode}")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def read_ahead(
    items: Sequence[_Item], batch_size: int, read: Callable[[_Item], _Result]
) -> Iterator[list[_Result]]:
    """`read` of every item, in lists of `batch_size`; a thread reads the next list meanwhile.

    At most two lists are alive at a time.
    """

    def read_batch(start: int) -> list[_Result]:
        return [read(item) for item in items[start : start + batch_size]]

    with ThreadPoolExecutor(max_workers=1) as thread:
        starts = range(0, len(items), batch_size)
        pending = thread.submit(read_batch, starts[0]) if items else None
        for following in [*starts[1:], None]:
            if pending is None:
                return
            batch = pending.result()
            pending = None if following is None else thread.submit(read_batch, following)
            yield batch

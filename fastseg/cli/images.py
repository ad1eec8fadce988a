"""Reading pictures as people see them, upright; the next ones while a model runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from PIL import Image
from tqdm import tqdm

from fastseg.images.modes import upright

from .options import first_line

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def open_image(path: Path) -> Image.Image:
    """The picture in a file, turned as its EXIF orientation says; the first frame of many.

    Grey of more than 8 bits becomes 8 bits, and what that loses is told on stderr; other modes,
    alpha included, stay for the image processor.

    Raises:
        ValueError: the file cannot be decoded, or its pixels have no known range.
    """

    def tell(message: str) -> None:
        tqdm.write(f"{path}: {message}", file=sys.stderr)  # which leaves a progress bar whole

    try:
        # Where PIL has a path it maps the file, and mixes up grey TIFFs that are to be turned.
        with open(path, "rb") as stream, Image.open(stream) as file:
            return upright(file, "", tell)
    except Exception as error:  # decoders meet broken files with errors of any class
        raise ValueError(first_line(error)) from error


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

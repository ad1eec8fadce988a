"""Reading pictures as people see them, upright; the next ones while a model runs."""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from fastseg.images.modes import upright

from .formats import RAW, RAW_SUFFIXES, cannot_read, why_unreadable
from .options import first_line

_Item = TypeVar("_Item")

_SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
# Bits of a TIFF's NewSubfileType: a smaller version of another page, and a mask.
_NEW_SUBFILE_TYPE, _NO_PAGE = 254, 0b101


@dataclass(frozen=True)
class Page:
    """A page of a picture, or the reason why it cannot be read.

    `left_out` counts the pages of its file that were not asked for.
    """

    image: Image.Image | None = None
    reason: str = ""
    left_out: int = 0


def open_image(path: Path) -> Image.Image:
    """The picture in a file, turned as its EXIF orientation says; the first page of many.

    Grey of more than 8 bits becomes 8 bits, and what that loses is told on stderr; other modes,
    alpha included, stay for the image processor.

    Raises:
        ValueError: the file cannot be decoded, or its pixels have no known range.
    """
    page = next(read_pages(path))
    if page.image is None:
        raise ValueError(page.reason)
    return page.image


def read_pages(path: Path, numbers: Sequence[int] = (1,)) -> Iterator[Page]:
    """Pages of a file, by their numbers from 1, as `open_image` gives them; one is alive at a time.

    The file stays open between them: animations are decoded from their start.
    """

    def tell(message: str) -> None:
        tqdm.write(f"{path}: {message}", file=sys.stderr)  # which leaves a progress bar whole

    with contextlib.ExitStack() as opened:
        file = None
        for number in numbers:
            try:
                if file is None:
                    file = opened.enter_context(_open(path))
                if number > 1:
                    file.seek(number - 1)
                page = Page(upright(file, "", tell))
                if len(numbers) == 1:
                    page = Page(page.image, left_out=len(_page_numbers(file)) - 1)
            except Exception as error:  # decoders meet broken files with errors of any class
                page = Page(reason=first_line(error))
                opened.close()  # what comes after may be made from it: it is decoded anew
                file = None
            yield page


def page_numbers(path: Path) -> list[int]:
    """Numbers, from 1, of the pages or frames of a file; [1] where it cannot be read."""
    try:
        with _open(path) as file:
            return _page_numbers(file)
    except Exception:  # told when it is read
        return [1]


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:  # it might never answer
        raise ValueError(f"expected a file, found {_SPECIAL.get(kind, 'something else')}")
    if path.suffix.lower() in RAW_SUFFIXES:
        raise ValueError(cannot_read(RAW))
    # Where PIL has a path it maps the file, and mixes up grey TIFFs that are to be turned.
    with open(path, "rb") as stream:
        try:
            file = Image.open(stream)
        except UnidentifiedImageError:
            raise ValueError(why_unreadable(path)) from None
        with file:
            yield file


def _page_numbers(file: Any) -> list[int]:
    """Pages of an open file; where they cannot be counted, one more than the first.

    Not taken for pages: smaller versions of a page and masks, in a TIFF; what a phone puts behind
    its photograph, in a JPEG (MPO); layers.
    """
    try:
        numbers = list(range(1, getattr(file, "n_frames", 1) + 1))
    except Exception:
        return [1, 2]
    if file.format == "PSD":
        return [1]
    return [1, *(number for number in numbers[1:] if _is_page(file, number))]


def _is_page(file: Any, number: int) -> bool:
    try:
        if file.format == "MPO":
            return "Multi-Frame" in file.mpinfo[0xB002][number - 1]["Attribute"]["MPType"]
        if file.format == "TIFF":
            file.seek(number - 1)
            return not file.tag_v2.get(_NEW_SUBFILE_TYPE, 0) & _NO_PAGE
    except Exception:  # told when it is read
        return True
    return True


def read_ahead(items: Iterable[_Item], batch_size: int) -> Iterator[list[_Item]]:
    """What `items` gives, in lists of `batch_size`; a thread takes the next list meanwhile.

    At most two lists are alive at a time.
    """
    iterator = iter(items)

    def take() -> list[_Item]:
        return list(itertools.islice(iterator, batch_size))

    with ThreadPoolExecutor(max_workers=1) as thread:
        pending = thread.submit(take)
        while batch := pending.result():
            pending = thread.submit(take)
            yield batch

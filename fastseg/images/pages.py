"""Reading pictures as people see them, upright: the pages of a file, or of its bytes."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from .formats import RAW, RAW_SUFFIXES, cannot_read, heif_is_readable, why_unreadable
from .modes import Tell, upright
from .rasters import NO_PAGE, Raster, is_tiff
from .reasons import first_line

File = Path | IO[bytes]

_SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
# Tags of TIFF.
_NEW_SUBFILE_TYPE, _BITS_PER_SAMPLE, _SAMPLES_PER_PIXEL = 254, 258, 277
_PLANAR_CONFIGURATION = 284


@dataclass(frozen=True)
class Page:
    """A page of a picture, or the reason why it cannot be read.

    Pictures are PIL's, those of many bands and of floats arrays (H, W, bands). `left_out` counts
    the pages of its file that were not asked for.
    """

    image: Image.Image | np.ndarray | None = None
    reason: str = ""
    left_out: int = 0


def read_pages(
    path: File,
    numbers: Sequence[int] = (1,),
    *,
    name: str = "",
    channels: int | None = None,
    raw: bool = False,
    tell: Tell = warnings.warn,
) -> Generator[Page]:
    """Pages of a file, by their numbers from 1, upright and of 8 bits; one is alive at a time.

    The file stays open between them: animations are decoded from their start.

    Args:
        path: the file, or a stream of its bytes.
        name: what messages call it, if not by its path; of a stream its suffix tells of formats.
        channels: of the model. TIFFs of as many bands are read by tifffile where they are more
            than four, or where Pillow does not read them.
        raw: keep floats, and what tifffile reads, as they are.
        tell: called with a message where pixels are not taken as they stand in the file.
    """

    def tell_of_it(message: str) -> None:
        tell(f"{name or path}: {message}")

    with contextlib.ExitStack() as opened:
        file = None
        for number in numbers:
            try:
                if file is None:
                    file = opened.enter_context(_open(path, channels, name))
                if isinstance(file, Raster):
                    page = Page(file.read(number, channels, tell_of_it, raw))
                else:
                    if len(numbers) > 1 or number > 1:  # HEIF opens at its primary image
                        file.seek(number - 1)
                    _tell_of_bands(file, tell_of_it)
                    page = Page(upright(file, "", tell_of_it, raw))
                if len(numbers) == 1:
                    page = Page(page.image, left_out=len(_page_numbers(file)) - 1)
            except Exception as error:  # decoders meet broken files with errors of any class
                page = Page(reason=_why(error))
                opened.close()  # what comes after may be made from it: it is decoded anew
                file = None
            yield page


def count_pixels(path: File, channels: int | None, name: str = "") -> int:
    """Pixels of the first page, by the beginning of its file; 0 where that cannot be read."""
    try:
        with _open(path, channels, name) as file:
            return file.width * file.height
    except Exception:  # told when it is read
        return 0


def _why(error: Exception) -> str:
    reason = first_line(error)
    if isinstance(error, Image.DecompressionBombError):
        pixels = re.search(r"(\d+) pixels", reason)
        number = pixels[1] if pixels else "N"
        reason = reason.rstrip(".") + f"; `fastseg predict --max-pixels {number}` reads it"
    return reason


def _tell_of_bands(file: Image.Image, tell: Callable[[str], object]) -> None:
    bands = file.tag_v2.get(_SAMPLES_PER_PIXEL, 1) if hasattr(file, "tag_v2") else 1
    if bands > 4:
        tell(f"{bands} bands, of which the first three are taken as red, green and blue")


def page_numbers(path: Path, channels: int | None = None) -> list[int]:
    """Numbers, from 1, of the pages or frames of a file; [1] where it cannot be read."""
    try:
        with _open(path, channels) as file:
            return _page_numbers(file)
    except Exception:  # told when it is read
        return [1]


@contextlib.contextmanager
def _open(file: File, channels: int | None, name: str = "") -> Iterator[Image.Image | Raster]:
    path = file if isinstance(file, Path) else Path(name)
    if isinstance(file, Path):
        kind = stat.S_IFMT(os.stat(file).st_mode)
        if kind != stat.S_IFREG:  # it might never answer
            raise ValueError(f"expected a file, found {_SPECIAL.get(kind, 'something else')}")
    suffix = path.suffix.lower()
    if suffix in RAW_SUFFIXES:
        raise ValueError(cannot_read(RAW))
    with contextlib.ExitStack() as opened:
        if isinstance(file, Path):
            # Where PIL has a path it maps the file, and mixes up grey TIFFs that are to be turned.
            stream: IO[bytes] = opened.enter_context(open(file, "rb"))
        else:
            stream = file
            stream.seek(0)
        if is_tiff(stream) and channels is not None and channels > 4:
            yield Raster(stream)
            return
        heif_is_readable()  # registers what reads it, where that is installed
        try:
            image = Image.open(stream)
        except UnidentifiedImageError:
            stream.seek(0)
            if not is_tiff(stream):
                raise ValueError(why_unreadable(stream.read(64), suffix)) from None
            yield Raster(stream)
            return
        if _is_mixed_up(image):
            stream.seek(0)
            yield Raster(stream)
            return
        with image:
            yield image


def _is_mixed_up(file: Any) -> bool:
    """Return whether Pillow, without a word, reads noise: of colour in planes of 16 bits."""
    tags = getattr(file, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, ())
    return tags.get(_PLANAR_CONFIGURATION) == 2 and len(bits) > 1 and max(bits) > 8


def _page_numbers(file: Any) -> list[int]:
    """Pages of an open file; where they cannot be counted, one more than the first.

    Not taken for pages: smaller versions of a page and masks, in a TIFF; what a phone puts behind
    its photograph, in a JPEG (MPO); layers.
    """
    if isinstance(file, Raster):
        return file.page_numbers()
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
            return not file.tag_v2.get(_NEW_SUBFILE_TYPE, 0) & NO_PAGE
    except Exception:  # told when it is read
        return True
    return True

"""Pictures for commands: what is to be told of them goes to stderr; pages by threads, in turn."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from fastseg.images import pages
from fastseg.images.pages import Page, count_pixels, page_numbers
from fastseg.inference.pipeline import Place

from .remote import Remote

__all__ = ["Page", "PagesInTurn", "open_image", "page_numbers", "read_pages"]


def read_pages(path: Path, numbers: Sequence[int] = (1,), **options: Any) -> Generator[Page]:
    """Pages of a file, as `fastseg.images.pages` reads them."""
    return pages.read_pages(path, numbers, tell=_tell, **options)


def _tell(message: str) -> None:
    tqdm.write(message, file=sys.stderr)  # a progress bar stays whole


def open_image(path: Path) -> Image.Image:
    """The picture in a file, turned as its EXIF orientation says; the first page of many.

    Grey of more than 8 bits becomes 8 bits, and what that loses is told on stderr; other modes,
    alpha included, stay for the image processor.

    Raises:
        ValueError: the file cannot be decoded, or its pixels have no known range.
    """
    page = next(read_pages(path, channels=3))
    if not isinstance(page.image, Image.Image):
        raise ValueError(page.reason)
    return page.image


class PagesInTurn:
    """Pages of a file for threads that want one each, which are given in the order of `numbers`.

    Args:
        path: the file; of a URL the copy, which is dropped after the last page.
        reading: options of `read_pages`.
    """

    def __init__(self, path: Path | Remote, numbers: Sequence[int], **reading: Any) -> None:
        self._path = path
        self._reading = reading
        self._numbers = list(numbers)
        self._given = 0
        self._changed = threading.Condition()
        self._pages: Generator[Page] | None = None

    @contextlib.contextmanager
    def page(self, number: int, place: Place) -> Iterator[Page]:
        """A page, after those before it; the next one's turn is when the block ends.

        Raises:
            ValueError: there is no file.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._numbers[self._given] == number)
        try:
            file = self._path
            if isinstance(file, Remote):
                with place(0):
                    file = file.file()
            with place(count_pixels(file, self._reading.get("channels"))):
                if self._pages is None:
                    name = str(self._path)
                    self._pages = read_pages(file, self._numbers, name=name, **self._reading)
                yield next(self._pages)
        finally:
            if self._given == len(self._numbers) - 1:
                self._close()
            with self._changed:
                self._given += 1
                self._changed.notify_all()

    def _close(self) -> None:
        if self._pages is not None:
            self._pages.close()
            self._pages = None
        if isinstance(self._path, Remote):
            self._path.drop()

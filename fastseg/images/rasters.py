"""TIFFs that Pillow does not read: of many bands, and of floats; by tifffile, which is optional."""

from __future__ import annotations

from collections.abc import Callable
from typing import IO, Any

import numpy as np
from PIL import Image

from .modes import Tell, values_to_8_bits

NO_PAGE = 0b101  # bits of NewSubfileType: a smaller version of another page, and a mask
_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the latter of BigTIFF
_ORIENTATION = 274
# By its value what turns rows and columns upright.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda array: np.rot90(array, 2),
    4: np.flipud,
    5: lambda array: array.swapaxes(0, 1),
    6: lambda array: np.rot90(array, -1),
    7: lambda array: np.rot90(array, 2).swapaxes(0, 1),
    8: np.rot90,
}


def is_tiff(stream: IO[bytes]) -> bool:
    """Return whether a file begins as TIFFs do; it is read from its start afterwards."""
    start = stream.read(4)
    stream.seek(0)
    return start in _MAGIC


class Raster:
    """A TIFF as tifffile reads it, whose pages are arrays (H, W, bands).

    Raises:
        ImportError: tifffile is not installed.
        ValueError: the file cannot be read.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        try:
            import tifffile
        except ImportError:
            raise ImportError(
                "a TIFF that Pillow does not read; tifffile reads many bands and floats: "
                'pip install "fastseg-segformer[tiff]"'
            ) from None
        self._pages: Any = tifffile.TiffFile(stream).pages
        first: Any = self._pages[0]
        self.width, self.height = first.imagewidth, first.imagelength

    def page_numbers(self) -> list[int]:
        """Numbers of its pages, from 1, without smaller versions and masks."""
        kinds = [page.subfiletype for page in self._pages]
        return [1, *(i + 1 for i, kind in enumerate(kinds) if i and not kind & NO_PAGE)]

    def read(
        self, number: int, channels: int | None, tell: Tell, raw: bool = False
    ) -> Image.Image | np.ndarray:
        """A page, turned upright: a PIL image where it is one of RGB, else an array (H, W, bands).

        Its values become bytes, by the rule for pictures of more than 8 bits.

        Args:
            channels: how many bands it must have; None for any number.
            tell: called with what the rule has to tell.
            raw: leave the values as they are.

        Raises:
            ValueError: other bands, values outside the ranges, or a page that cannot be decoded.
        """
        page = self._pages[number - 1]
        if page.axes not in ("YX", "YXS", "SYX"):
            raise ValueError(f"expected rows, columns and bands, found axes {page.axes}")
        check_pixels(page.imagewidth, page.imagelength)
        bands = page.samplesperpixel
        if channels is not None and bands != channels:
            raise ValueError(f"a TIFF of {bands} bands, where the model takes {channels}")
        array = page.asarray()
        array = np.moveaxis(array, 0, -1) if page.axes == "SYX" else array
        array = array[..., None] if array.ndim == 2 else array
        orientation = page.tags.get(_ORIENTATION)
        if orientation is not None and orientation.value in _TURNS:
            array = _TURNS[orientation.value](array)
        if not raw:
            array = values_to_8_bits(array, "", tell)
        array = np.ascontiguousarray(array)
        return Image.fromarray(array) if array.dtype == np.uint8 and bands == 3 else array


def check_pixels(width: int, height: int) -> None:
    """Raise what Pillow raises for a picture above its limit."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > 2 * limit:
        raise Image.DecompressionBombError(
            f"Image size ({width * height} pixels) exceeds limit of {2 * limit} pixels"
        )


def visible(image: Image.Image | np.ndarray) -> Image.Image:
    """What an overlay shows of a picture: of an array (H, W, bands) the first three, or the first.

    Floats, and whole numbers that are no bytes, are stretched from the least to the largest.
    """
    if isinstance(image, Image.Image):
        if image.mode != "F":
            return image
        image = np.asarray(image)[..., None]
    bands = image[..., :3] if image.shape[2] > 2 else image[..., 0]
    if bands.dtype != np.uint8:
        values = np.nan_to_num(bands.astype(np.float64))
        low = values.min()
        bands = ((values - low) * (255 / (np.ptp(values) or 1))).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(bands))

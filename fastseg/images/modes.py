"""PIL pictures of every mode as 8 bits and as RGB: one rule for all that open or take pictures."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

Tell = Callable[[str], object]


def upright(
    file: Image.Image, name: str = "image", tell: Tell = warnings.warn, floats: bool = False
) -> Image.Image:
    """A picture from a file as people see it: turned as its EXIF orientation says, of 8 bits.

    With `floats` those of mode F stay as they are. `name`, `tell` and errors as of `to_8_bits`.
    """
    if _cut_to_8_bits(file):  # which is known until the file is read
        to_8_bits(file, name, tell)
    image = ImageOps.exif_transpose(file)
    return image if floats and image.mode == "F" else to_8_bits(image, name, tell)


def to_8_bits(image: Image.Image, name: str = "image", tell: Tell = warnings.warn) -> Image.Image:
    """`image` with 8 bits a band: grey of more (modes I;16, I, F) becomes L, others stay.

    Whole numbers up to 255 stay as they are; where there are larger ones, up to 65535, they are
    taken for 16 bits. Floats are taken for [0, 1] where none is larger, else for [0, 255].

    Args:
        name: what messages call the picture, if not "".
        tell: called with a message where a picture of 16 bits leaves the upper ones unused.

    Raises:
        ValueError: values outside these ranges.
    """
    if not image.mode.startswith(("I", "F")):
        if _cut_to_8_bits(image):
            bands = zip(image.split(), image.getbands(), strict=True)
            high = max(np.asarray(band).max() for band, letter in bands if letter not in "AX")
            _tell_of_unused_bits(int(high) << 8 | 255, name and f"{name}: ", tell)
        return image
    return Image.fromarray(values_to_8_bits(np.asarray(image), name, tell))


def values_to_8_bits(
    values: np.ndarray, name: str = "image", tell: Tell = warnings.warn
) -> np.ndarray:
    """Numbers of any depth and shape as uint8, by the rule of `to_8_bits`, which has the rest."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    name = name and f"{name}: "
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if not (low >= 0 and high <= 255):  # NaN among them too
            raise ValueError(
                f"{name}expected floats in [0, 1] or [0, 255], got values in [{low:g}, {high:g}]"
            )
        values = np.rint(values * 255 if high <= 1 else values)
    elif low < 0 or high > 65535:
        raise ValueError(
            f"{name}expected whole numbers in [0, 255] or [0, 65535], got values in [{low}, {high}]"
        )
    elif high > 255:
        _tell_of_unused_bits(int(high), name, tell)
        values = (values.astype(np.uint32) + 128) // 257
    elif high > 0 and values.dtype.itemsize == 2:
        tell(f"{name}16-bit pixels of at most {high}: taken for 8 bits, with 255 as white")
    return values.astype(np.uint8)


def to_rgb(image: Image.Image, over_white: bool = False) -> Image.Image:
    """A picture of 8 bits as RGB: its alpha is dropped, or with `over_white` laid over white."""
    if image.mode == "La":
        image = image.convert("LA")
    transparent = "A" in image.getbands() or "transparency" in image.info
    if transparent and (over_white or image.mode != "RGB"):
        image = image.convert("RGBA")
        if over_white:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _cut_to_8_bits(image: Image.Image) -> bool:
    """Whether PIL keeps the upper 8 of 16 bits alone, as of colour, of a file not read yet."""
    layout = str(getattr(image, "tile", [])[:1])
    # BGR;16 has 16 bits for all three colours.
    return ";16" in layout and "BGR;16" not in layout and not image.mode.startswith("I")


def _tell_of_unused_bits(high: int, name: str, tell: Tell) -> None:
    if high < 4096:
        tell(
            f"{name}16-bit pixels of at most {high}, where 65535 is white: nearly black to a "
            "model; multiply data of 12 bits by 16 first, of 10 bits by 64"
        )

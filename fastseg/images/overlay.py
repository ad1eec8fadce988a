"""Label maps made visible: class colours, indexed PNGs, and overlays with a legend.

A legend lists the classes of one picture with the share of its pixels, largest first, beside the
picture or, for wide pictures, below it. Type and spacing follow the size of the picture.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .modes import to_8_bits, to_rgb
from .palettes import check_palette

MAX_INDEXED = 256  # colours that an indexed image holds
_MAX_LABEL = (1 << 16) - 1

_PAPER = (252, 252, 253)
_INK = (28, 31, 38)
_FAINT_INK = (104, 110, 122)
_TRACK = (228, 230, 235)
_BORDER = (255, 255, 255)
_BORDER_OPACITY = 0.7

_SMALLEST_TYPE, _LARGEST_TYPE = 12, 72
_LONGEST_NAME = 13  # widest class name in a legend, in multiples of the type size
_WIDE = 1.45  # pictures wider than this many heights have their legend below
_MIN_ROWS = 12  # rows that a legend may have even where the picture is not so tall
_MAX_ROWS_BELOW = 6


def label_image(labels: Any, palette: Any, grey: bool = False) -> Image.Image:
    """A label map as an image whose pixel values are the class numbers.

    Up to 256 colours it is an indexed image (mode "P") with those colours, or with `grey` one of
    8 bits (mode "L"); beyond, a 16-bit grey one (mode "I;16"), since an indexed image ends at 256.
    All are lossless as PNG.

    Args:
        labels: (H, W) integers, NumPy or torch, each at least 0. They may exceed the palette, as
            an ignored label of 255 does, within 8 or 16 bits; such pixels are shown black.
        palette: (K, 3) uint8, RGB.

    Raises:
        TypeError, ValueError: `labels` or `palette` is not of that form.
    """
    colours = check_palette(palette, "palette")
    small = len(colours) <= MAX_INDEXED
    numbers = _check_labels(labels, largest=MAX_INDEXED - 1 if small else _MAX_LABEL)
    if not small:
        return Image.fromarray(numbers.astype(np.uint16))
    numbers = numbers.copy()  # PIL would share the caller's memory
    return Image.fromarray(numbers) if grey else _indexed(numbers, colours)


def overlay(
    image: Any,
    labels: Any,
    palette: Any,
    id2label: Mapping[int, str],
    alpha: float = 0.55,
    legend: bool = True,
) -> Image.Image:
    """The picture with its classes blended over it, their borders drawn, and a legend.

    Args:
        image: PIL image, or uint8 (H, W), (H, W, 3) or (H, W, 4) array; alpha is dropped, and
            more than 8 bits become 8, as the image processor takes them.
        labels: (H, W) integers; numbers beyond the palette are left untinted.
        palette: (K, 3) uint8, RGB.
        id2label: class names by number.
        alpha: opacity of the colours, 0 to 1.
        legend: whether to add the legend. Without it the result has the size of the picture.

    Raises:
        TypeError, ValueError: an argument is not of that form, or sizes differ.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number from 0 to 1, got {alpha}")
    colours = check_palette(palette, "palette")
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture = to_rgb(to_8_bits(picture))
    numbers = _check_labels(labels)
    if numbers.shape != (picture.height, picture.width):
        raise ValueError(
            f"labels: expected the picture's height and width, {(picture.height, picture.width)}, "
            f"got {numbers.shape}"
        )
    if numbers.dtype == np.uint8:
        tint = _indexed(numbers, colours).convert("RGB")
    else:
        tint = Image.fromarray(colours[np.minimum(numbers, len(colours) - 1)])
    blended = Image.blend(picture, tint, alpha)
    if numbers.max() >= len(colours):
        blended.paste(picture, mask=Image.fromarray(numbers >= len(colours)))
    if alpha > 0:
        _draw_borders(blended, numbers)
    if not legend:
        return blended
    return _add_legend(blended, class_shares(numbers, id2label), colours)


@dataclass(frozen=True)
class ClassShare:
    """One class of a label map: its number, its name, its pixels, and their share, 0 to 1."""

    id: int
    name: str
    pixels: int
    share: float


def class_shares(labels: Any, id2label: Mapping[int, str]) -> list[ClassShare]:
    """The classes in an (H, W) label map, largest share first, ties by number.

    Classes without a name are called by their number.
    """
    numbers = _check_labels(labels)
    if numbers.dtype == np.uint8:
        counts = Image.fromarray(numbers).histogram()
    else:
        counts = np.bincount(numbers.ravel()).tolist()
    shares = [
        ClassShare(index, str(id2label.get(index, index)), pixels, pixels / numbers.size)
        for index, pixels in enumerate(counts)
        if pixels
    ]
    return sorted(shares, key=lambda item: (-item.pixels, item.id))


def format_share(share: float) -> str:
    """A share of pixels for people: 0.4123 is "41.2%", anything under 0.05% is "<0.1%"."""
    return "<0.1%" if 0 < share < 0.0005 else f"{100 * share:.1f}%"


def _check_labels(labels: Any, largest: int = _MAX_LABEL) -> np.ndarray:
    """A label map (H, W) as uint8, or as uint16 where that is too small; perhaps not a copy."""
    array = np.asarray(labels.cpu() if hasattr(labels, "cpu") else labels)
    if array.dtype.kind not in "iu":
        raise TypeError(f"labels: expected integers, got {array.dtype}")
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"labels: expected a map of shape (height, width), got {array.shape}")
    if array.dtype == np.uint8:
        return array
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > largest:
        raise ValueError(f"labels: expected numbers from 0 to {largest}, got {low} to {high}")
    return array.astype(np.uint8 if high < MAX_INDEXED else np.uint16)


def _indexed(numbers: np.ndarray, colours: np.ndarray) -> Image.Image:
    """An indexed image of uint8 numbers, whose memory it shares; those beyond colours are black."""
    # A full palette: with a shorter one, files hold fewer bits a pixel and cut greater labels off.
    full = np.zeros((MAX_INDEXED, 3), dtype=np.uint8)
    full[: len(colours)] = colours[:MAX_INDEXED]
    image = Image.fromarray(numbers)
    image.putpalette(full.tobytes())  # turns grey into "P"
    return image


def _draw_borders(picture: Image.Image, labels: np.ndarray) -> None:
    """Thin light lines where neighbouring pixels differ in class; thicker in large pictures."""
    edges = np.zeros(labels.shape, dtype=bool)
    np.not_equal(labels[:, 1:], labels[:, :-1], out=edges[:, 1:])
    edges[1:, :] |= labels[1:, :] != labels[:-1, :]
    for _ in range(round(min(labels.shape) / 1200)):
        edges[:, 1:] |= edges[:, :-1].copy()
        edges[1:, :] |= edges[:-1, :].copy()
    opacity = edges.view(np.uint8) * round(255 * _BORDER_OPACITY)
    picture.paste(_BORDER, mask=Image.fromarray(opacity))


def _add_legend(picture: Image.Image, shares: list[ClassShare], colours: np.ndarray) -> Image.Image:
    width, height = picture.size
    below = width > _WIDE * height
    type_size = min(max(round(min(width, height) / 30), _SMALLEST_TYPE), _LARGEST_TYPE)
    if not below:  # smaller type before classes are left out
        fitting = int(height / (len(shares) + 1) / _Legend.ROW)
        type_size = max(min(type_size, fitting), _SMALLEST_TYPE)
    sheet = _Legend(type_size, shares, colours)
    if below:
        columns = max(1, width // sheet.column_width)
        sheet.limit(columns * _MAX_ROWS_BELOW)
        rows = -(-len(sheet.entries) // columns)
        size = (max(width, sheet.column_width), height + sheet.height(rows))
        origin = (0, height)
        pitch = size[0] // columns
    else:
        rows = max(_MIN_ROWS, int((height - sheet.margin) / sheet.row))
        sheet.limit(rows)
        size = (width + sheet.column_width, max(height, sheet.height(len(sheet.entries))))
        origin = (width, 0)
        pitch = sheet.column_width
    canvas = Image.new("RGB", size, _PAPER)
    canvas.paste(picture)
    for index, entry in enumerate(sheet.entries):
        column, row = divmod(index, rows)
        sheet.draw(canvas, (origin[0] + column * pitch, origin[1] + row * sheet.row), pitch, entry)
    return canvas


@dataclass(frozen=True)
class _Entry:
    name: str
    share: float
    colour: tuple[int, int, int] | None


class _Legend:
    """Entries of a legend and their geometry: a swatch, a name, a share, and a bar under both."""

    ROW = 2.1  # height of a row, in multiples of the type size

    def __init__(self, type_size: int, shares: list[ClassShare], colours: np.ndarray) -> None:
        self.type_size = type_size
        self.font = _font(type_size)
        self.row = round(self.ROW * type_size)
        self.margin = type_size
        self.swatch = type_size
        self.gap = round(0.6 * type_size)
        self.entries = [
            _Entry(
                self._shorten(item.name),
                item.share,
                tuple(colours[item.id].tolist()) if item.id < len(colours) else None,
            )
            for item in shares
        ]
        self.share_width = round(self.font.getlength("100.0%"))
        names = [self.font.getlength(entry.name) for entry in self.entries]
        name_width = round(max([*names, 4 * type_size]))
        self.column_width = (
            2 * self.margin + self.swatch + 3 * self.gap + name_width + self.share_width
        )

    def height(self, rows: int) -> int:
        return rows * self.row + self.margin

    def limit(self, count: int) -> None:
        """Keep the largest classes and sum the others up in one last entry."""
        if len(self.entries) > count:
            rest = self.entries[count - 1 :]
            total = sum(entry.share for entry in rest)
            self.entries[count - 1 :] = [_Entry(f"{len(rest)} more", total, None)]

    def draw(self, canvas: Image.Image, corner: tuple[int, int], width: int, entry: _Entry) -> None:
        draw = ImageDraw.Draw(canvas)
        left, right = corner[0] + self.margin, corner[0] + width - self.margin
        top = corner[1] + self.margin
        middle = top + self.swatch / 2
        if entry.colour is not None:
            canvas.paste(entry.colour, (left, top), _rounded_square(self.swatch))
        text = left + self.swatch + self.gap
        draw.text((text, middle), entry.name, font=self.font, fill=_INK, anchor="lm")
        share = format_share(entry.share)
        draw.text((right, middle), share, font=self.font, fill=_FAINT_INK, anchor="rm")
        bar = top + round(1.28 * self.type_size)
        thickness = max(2, round(self.type_size / 7))
        for end, colour in (
            (right, _TRACK),
            (text + entry.share * (right - text), entry.colour or _FAINT_INK),
        ):
            draw.rectangle((text, bar, max(end, text + 1), bar + thickness - 1), fill=colour)

    def _shorten(self, name: str) -> str:
        limit = _LONGEST_NAME * self.type_size
        if self.font.getlength(name) <= limit:
            return name
        while name and self.font.getlength(name + "…") > limit:
            name = name[:-1]
        return name.rstrip(" ,;") + "…"


# To load it takes longer than to draw a legend.
_font = functools.lru_cache(maxsize=8)(ImageFont.load_default)


@functools.lru_cache(maxsize=8)
def _rounded_square(side: int) -> Image.Image:
    """A mask with smooth corners: drawn four times as large, then reduced."""
    mask = Image.new("L", (4 * side, 4 * side))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * side - 1, 4 * side - 1), side, fill=255)
    return mask.resize((side, side), Image.Resampling.LANCZOS)

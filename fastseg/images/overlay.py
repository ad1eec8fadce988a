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

MAX_INDEXED = 256  # colours that an indexed image holds
_MAX_LABEL = (1 << 16) - 1

# The colours and names of Cityscapes' 19 evaluated classes, as published by its authors.
_CITYSCAPES = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "pole": (153, 153, 153),
    "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "rider": (255, 0, 0),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
}

# The first colours are chosen by eye: bright enough over a photograph, far from one another.
_FIRST_COLOURS = (
    (64, 132, 232),
    (240, 130, 40),
    (54, 170, 84),
    (222, 52, 70),
    (150, 92, 208),
    (244, 206, 60),
    (34, 188, 196),
    (236, 112, 184),
    (142, 94, 58),
    (158, 208, 62),
    (46, 70, 150),
    (190, 190, 200),
)

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


def palette(num_labels: int, id2label: Mapping[int, str] | None = None) -> np.ndarray:
    """Colours for `num_labels` classes: uint8 (num_labels, 3), RGB.

    The first colours do not depend on `num_labels`; each further one is as far as possible, to the
    eye, from all before it. All are distinct up to some 2,000 classes, after which they repeat.
    Where `id2label` names the 19 classes of Cityscapes, the colours are those of Cityscapes.

    Raises:
        ValueError: `num_labels` is less than 1.
    """
    if num_labels < 1:
        raise ValueError(f"num_labels: expected 1 or more, got {num_labels}")
    if id2label is not None and num_labels == len(_CITYSCAPES):
        names = [str(id2label.get(index, "")).lower() for index in range(num_labels)]
        if sorted(names) == sorted(_CITYSCAPES):
            return np.array([_CITYSCAPES[name] for name in names], dtype=np.uint8)
    return np.resize(_distant_colours(), (num_labels, 3))


def config_palette(config: Any) -> np.ndarray:
    """The colours of a model: its configuration's own `palette`, one RGB triple for each class,
    where it has one, else `palette(config.num_labels, config.id2label)`.

    Raises:
        ValueError: the configuration's palette is not of that form.
    """
    own = getattr(config, "palette", None)
    if own is None:
        return palette(config.num_labels, config.id2label)
    return _check_palette(own, "config.palette", config.num_labels)


def label_image(labels: Any, palette: Any) -> Image.Image:
    """A label map as an image whose pixel values are the class numbers.

    Up to 256 colours it is an indexed image (mode "P") with those colours; beyond, a 16-bit grey
    one (mode "I;16"), since an indexed image ends at 256. Both are lossless as PNG.

    Args:
        labels: (H, W) integers, NumPy or torch, each at least 0. They may exceed the palette, as
            an ignored label of 255 does, within 8 or 16 bits; such pixels are shown black.
        palette: (K, 3) uint8, RGB.

    Raises:
        TypeError, ValueError: `labels` or `palette` is not of that form.
    """
    colours = _check_palette(palette, "palette")
    indexed = len(colours) <= MAX_INDEXED
    numbers = _check_labels(labels, largest=MAX_INDEXED - 1 if indexed else _MAX_LABEL)
    if not indexed:
        return Image.fromarray(numbers.astype(np.uint16))
    image = Image.fromarray(numbers.astype(np.uint8))
    # A full palette: with a shorter one, files hold fewer bits a pixel and cut greater labels off.
    full = np.zeros((MAX_INDEXED, 3), dtype=np.uint8)
    full[: len(colours)] = colours
    image.putpalette(full.tobytes())  # turns grey into "P"
    return image


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
    colours = _check_palette(palette, "palette")
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture = to_rgb(to_8_bits(picture))
    numbers = _check_labels(labels)
    if numbers.shape != (picture.height, picture.width):
        raise ValueError(
            f"labels: expected the picture's height and width, {(picture.height, picture.width)}, "
            f"got {numbers.shape}"
        )
    known = numbers < len(colours)
    tint = Image.fromarray(colours[np.where(known, numbers, 0)])
    blended = Image.blend(picture, tint, alpha)
    if not known.all():
        blended.paste(picture, mask=Image.fromarray(~known))
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


def _check_palette(colours: Any, name: str, count: int | None = None) -> np.ndarray:
    array = np.asarray(colours)
    if array.ndim != 2 or array.shape[1:] != (3,) or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: expected integers of shape (classes, 3), got {array.dtype} {array.shape}"
        )
    if count is not None and len(array) != count:
        raise ValueError(f"{name}: expected {count} colours, one a class, got {len(array)}")
    if len(array) == 0 or array.min() < 0 or array.max() > 255:
        raise ValueError(f"{name}: expected one colour or more, from 0 to 255")
    return array.astype(np.uint8)


def _check_labels(labels: Any, largest: int = _MAX_LABEL) -> np.ndarray:
    array = np.asarray(labels.cpu() if hasattr(labels, "cpu") else labels)
    if array.dtype.kind not in "iu":
        raise TypeError(f"labels: expected integers, got {array.dtype}")
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"labels: expected a map of shape (height, width), got {array.shape}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > largest:
        raise ValueError(f"labels: expected numbers from 0 to {largest}, got {low} to {high}")
    return array.astype(np.uint16)


@functools.lru_cache(maxsize=1)
def _distant_colours() -> np.ndarray:
    """All colours of a grid, ordered so that each is the farthest from all before it."""
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _oklab(grid)
    lightness, chroma = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2])
    # Near-black, near-white and grey vanish in photographs.
    keep = (lightness > 3500) & (lightness < 9300) & (chroma > 500)
    colours = np.concatenate([np.array(_FIRST_COLOURS, dtype=np.uint8), grid[keep]])
    lab = _oklab(colours)
    order = list(range(len(_FIRST_COLOURS)))
    nearest = np.full(len(colours), np.iinfo(np.int64).max)
    while True:
        for index in order if len(order) == len(_FIRST_COLOURS) else order[-1:]:
            nearest = np.minimum(nearest, ((lab - lab[index]) ** 2).sum(axis=1))
        farthest = int(nearest.argmax())
        if nearest[farthest] == 0 or len(order) == 2048:
            return colours[order]
        order.append(farthest)


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """Oklab coordinates times 10,000 as integers, so that distances compare exactly anywhere."""
    srgb = rgb / 255.0
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    cones = np.cbrt(
        linear
        @ np.array(
            [
                [0.4122214708, 0.2119034982, 0.0883024619],
                [0.5363325363, 0.6806995451, 0.2817188376],
                [0.0514459929, 0.1073969566, 0.6299787005],
            ]
        )
    )
    lab = cones @ np.array(
        [
            [0.2104542553, 1.9779984951, 0.0259040371],
            [0.7936177850, -2.4285922050, 0.7827717662],
            [-0.0040720468, 0.4505937099, -0.8086757660],
        ]
    )
    return (lab * 10_000).round().astype(np.int64)


def _draw_borders(picture: Image.Image, labels: np.ndarray) -> None:
    """Thin light lines where neighbouring pixels differ in class; thicker in large pictures."""
    edges = np.zeros(labels.shape, dtype=bool)
    edges[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edges[1:, :] |= labels[1:, :] != labels[:-1, :]
    for _ in range(round(min(labels.shape) / 1200)):
        edges[:, 1:] |= edges[:, :-1].copy()
        edges[1:, :] |= edges[:-1, :].copy()
    opacity = edges.astype(np.uint8) * round(255 * _BORDER_OPACITY)
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
        self.font = ImageFont.load_default(size=type_size)
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


@functools.lru_cache(maxsize=8)
def _rounded_square(side: int) -> Image.Image:
    """A mask with smooth corners: drawn four times as large, then reduced."""
    mask = Image.new("L", (4 * side, 4 * side))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * side - 1, 4 * side - 1), side, fill=255)
    return mask.resize((side, side), Image.Resampling.LANCZOS)

"""Confusion matrices and pictures with their errors, as images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastseg.images.modes import to_8_bits, to_rgb
from fastseg.images.overlay import overlay

from .confusion import ratio
from .result import Evaluation, PictureResult

_PAPER, _INK, _FAINT_INK = (252, 252, 253), (28, 31, 38), (104, 110, 122)
_RIGHT, _WRONG = (46, 98, 190), (214, 44, 62)
_MATRIX_SIDE = 760  # of the cells together, for a few classes
_SMALLEST_CELL, _LARGEST_CELL, _CELL_WITH_NUMBER = 13, 60, 34
_PANEL_SIDE = 900  # the longer side of a picture among the worst


def draw_confusion(evaluation: Evaluation) -> Image.Image:
    """The confusion matrix: rows are the true classes, columns the predicted ones.

    A cell has the share of the row's pixels, in blue where it is right and in red, by its square
    root, where it is wrong; beside a row is the IoU. Classes in neither map are left out.
    """
    confusion = evaluation.confusion
    shown = np.flatnonzero(confusion.union)
    names = [evaluation.names[index] for index in shown.tolist()]
    matrix = confusion.matrix[np.ix_(shown, shown)]
    shares = ratio(matrix, confusion.truth[shown][:, None].repeat(len(shown), axis=1))
    cell = min(max(_MATRIX_SIDE // len(shown), _SMALLEST_CELL), _LARGEST_CELL)
    size = min(max(round(0.45 * cell), 10), 17)
    font, small = ImageFont.load_default(size), ImageFont.load_default(max(round(0.3 * cell), 9))
    title_font = ImageFont.load_default(17)
    labels = round(max(font.getlength(name) for name in names)) + size
    side, margin, head = cell * len(shown), 24, 84
    wide = margin + labels + side + 5 * size + margin
    title = f"mIoU {100 * evaluation.mean_iou:.2f} %, {evaluation.pictures} pictures"
    told = "rows: true classes; columns: what was predicted, in % of the row; right: IoU, %"
    wide = max(wide, round(title_font.getlength(told)) + 2 * margin)
    canvas = Image.new("RGB", (wide, head + labels + side + margin), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, 22), title, font=title_font, fill=_INK)
    draw.text((margin, 46), told, font=ImageFont.load_default(15), fill=_FAINT_INK)
    left, top = margin + labels, head + labels
    for index, name in enumerate(names):
        along = round((index + 0.5) * cell)
        middle = top + along
        draw.text((left - size // 2, middle), name, font=font, fill=_INK, anchor="rm")
        _draw_upwards(canvas, (left + along, top - size // 2), name, font)
        iou = f"{100 * evaluation.iou[shown[index]]:.1f}"
        draw.text((left + side + 4 * size, middle), iou, font=font, fill=_FAINT_INK, anchor="rm")
    for row, column in np.ndindex(*shares.shape):
        share = shares[row, column]
        corner = (left + column * cell, top + row * cell)
        box = (*corner, corner[0] + cell - 2, corner[1] + cell - 2)
        depth = 0.0 if np.isnan(share) else float(share if row == column else np.sqrt(share))
        colour = _blend(_RIGHT if row == column else _WRONG, depth)
        draw.rectangle(box, fill=colour)
        if cell >= _CELL_WITH_NUMBER and share >= 0.0005:
            number = f"{100 * share:.0f}" if share >= 0.0995 else f"{100 * share:.1f}"
            centre = (corner[0] + cell // 2 - 1, corner[1] + cell // 2 - 1)
            ink = _PAPER if depth > 0.55 else _INK
            draw.text(centre, number, font=small, fill=ink, anchor="mm")
    return canvas


def draw_errors(picture: PictureResult, names: Mapping[int, str], palette: Any) -> Image.Image:
    """A picture, its true labels, the predicted ones, and where these are wrong, with the IoUs.

    Args:
        names: of the classes by number.
        palette: (K, 3) uint8, RGB.
    """
    image = picture.image
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    image = to_rgb(to_8_bits(image))
    scale = min(1.0, _PANEL_SIDE / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    maps = [
        Image.fromarray(labels.astype(np.int32)).resize(size, Image.Resampling.NEAREST)
        for labels in (picture.truth, picture.predicted)
    ]
    truth, predicted = (np.asarray(one) for one in maps)
    image = image.resize(size, Image.Resampling.BILINEAR)
    known = truth < len(palette)
    wrong = np.asarray(image.convert("L").convert("RGB")) // 2 + 64
    wrong[~known] = _INK
    wrong[known & (truth != predicted)] = _WRONG
    panels = {
        "picture": image,
        "true labels (untinted: ignored)": overlay(image, truth, palette, names, legend=False),
        "predicted": overlay(image, predicted, palette, names, legend=False),
        "wrong (black: ignored)": Image.fromarray(wrong),
    }
    gap, head = 14, 30
    font, width = ImageFont.load_default(15), 2 * size[0] + 3 * gap
    entries = [(index, iou) for index, iou in enumerate(picture.iou.tolist()) if iou == iou]
    column = 230
    columns = max(1, (width - 2 * gap) // column)
    rows = -(-len(entries) // columns)
    height = head + 2 * (size[1] + head) + gap + 24 * rows + gap
    canvas = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    title = f"{picture.name}: mean IoU {100 * picture.mean_iou:.1f} %"
    draw.text((gap, head // 2), title, font=font, fill=_INK, anchor="lm")
    for place, (caption, panel) in enumerate(panels.items()):
        x = gap + place % 2 * (size[0] + gap)
        y = head + place // 2 * (size[1] + head)
        draw.text((x, y + head // 2), caption, font=font, fill=_FAINT_INK, anchor="lm")
        canvas.paste(panel, (x, y + head))
    for place, (index, iou) in enumerate(entries):
        x = gap + place % columns * column
        y = head + 2 * (size[1] + head) + gap + place // columns * 24
        draw.rectangle((x, y + 4, x + 14, y + 18), fill=tuple(np.asarray(palette)[index].tolist()))
        text = f"{str(names.get(index, index))[:20]}  {100 * iou:.1f} %"
        draw.text((x + 22, y + 11), text, font=font, fill=_INK, anchor="lm")
    return canvas


def _blend(colour: tuple[int, int, int], depth: float) -> tuple[int, ...]:
    """White paper at depth 0, the colour at 1."""
    return tuple(round(244 + depth * (end - 244)) for end in colour)


def _draw_upwards(canvas: Image.Image, bottom: tuple[int, int], text: str, font: Any) -> None:
    """Text that runs upwards from a point, centred on its column."""
    _, top, right, low = font.getbbox(text)
    line = Image.new("L", (max(1, round(right)), max(1, round(low))))
    ImageDraw.Draw(line).text((0, 0), text, font=font, fill=255)
    turned = line.rotate(90, expand=True)
    canvas.paste(_INK, (bottom[0] - round((top + low) / 2), bottom[1] - turned.height), turned)

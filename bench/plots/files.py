"""Pictures as files. An SVG of the same rows is the same file, and keeps the figures it shows."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from . import style
from .draw import figure_of
from .model import Picture

_DESCRIPTION = "{http://purl.org/dc/elements/1.1/}description"
_PNG_DPI = 160


def save(picture: Picture, folder: Path, png: bool = False) -> list[Path]:
    """Write `picture` as an SVG into `folder`, and as a PNG on request."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{picture.name}.svg"
    metadata = {
        "Title": picture.title,
        "Description": json.dumps(picture.data(), sort_keys=True),
        "Creator": "python -m bench.plots",
        "Date": None,
    }
    with style.settings():
        figure = figure_of(picture)
        figure.savefig(path, metadata=metadata)
        if not png:
            return [path]
        image = path.with_suffix(".png")
        figure.savefig(image, dpi=_PNG_DPI)
    return [path, image]


def data_of(path: Path) -> Any:
    """What `Picture.data` gave when the SVG `path` was written.

    Raises:
        ValueError: it is not an SVG of `save`.
    """
    description = ElementTree.parse(path).find(f".//{_DESCRIPTION}")
    if description is None or not description.text:
        raise ValueError(f"{path}: expected an SVG with figures in its description, got none")
    return json.loads(description.text)

"""Files to write: never over one that fastseg did not write, nor over another picture's results.

Outputs carry a mark, so that a later run neither takes them for inputs nor replaces anything else.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import fastseg
from fastseg.images.marked import (
    SOFTWARE,
    SOURCE_KEYWORD,
    mark_of,
    marks,
    png_bytes,
    write_whole,
)

from .remote import Remote

LABELS, SCORES, JSON = "_labels.png", "_scores.png", ".json"
POLYGONS, CUTOUT = "_polygons.geojson", "_cutout.png"
# By the format of overlays.
OVERLAYS = {"jpg": "_overlay.jpg", "png": "_overlay.png"}

_JPEG_QUALITY = 90
_LONGEST_JPEG = 65500


@dataclass(frozen=True)
class Source:
    """A page of a picture: its number from 1, and the greatest number in the file."""

    path: Path | Remote
    page: int = 1
    pages: int = 1

    def __str__(self) -> str:
        return str(self.path) if self.pages == 1 else f"{self.path}, page {self.page}"

    @property
    def mark(self) -> str:
        """What tells the picture from others: a hash of its path, its URL or its content."""
        path = self.path
        return mark_of(path.identity if isinstance(path, Remote) else path)


@dataclass(frozen=True)
class Target:
    """Place of the outputs of one picture: `stem` and an ending each.

    `numbered` is True where the name was taken, and got a number.
    """

    stem: Path
    numbered: bool = False

    def path(self, ending: str) -> Path:
        return self.stem.with_name(self.stem.name + ending)


class OutputPlan:
    """Where results go: targets that are all different, none on a file of another picture.

    Pictures keep their place below `root` and their name without suffix: `root/x/a.jpg` becomes
    `output/x/a_labels.png`; those of URLs have a name alone. Where that serves several pictures
    (`a.jpg`, `a.png`), all of them keep their suffix: `a.jpg_labels.png`. Of several pages each has
    its number: `a-page0002_labels.png`. What is taken still gets another: `a-2_labels.png`.
    """

    def __init__(self, root: Path, output: Path, endings: Sequence[str]) -> None:
        self.endings = endings
        self._root, self._output = root, output
        self._taken: set[int] = set()  # hashes, as there may be millions: equal ones get a number

    def target(self, source: Source, shares_name: bool = False) -> Target:
        """The next target; `shares_name` where the name without suffix serves several."""
        path = place_of(source.path, self._root)
        name = self._output / (path if shares_name else without_suffix(path))
        if source.pages > 1:
            digits = max(4, len(str(source.pages)))
            name = name.with_name(f"{name.name}-page{source.page:0{digits}d}")
        target, number = Target(name), 1
        while hash(key(target.stem)) in self._taken or not all(
            _is_free(target.path(ending), source) for ending in self.endings
        ):
            number += 1
            target = Target(name.with_name(f"{name.name}-{number}"), numbered=True)
        self._taken.add(hash(key(target.stem)))
        return target

    def is_done(self, target: Target) -> bool:
        """Return whether all results of a picture are there."""
        return all(os.path.lexists(target.path(ending)) for ending in self.endings)


def place_of(path: Path | Remote, root: Path) -> Path:
    """Where a picture lies below `root`."""
    return Path(path.name if isinstance(path, Remote) else os.path.relpath(path, root))


def without_suffix(path: Path) -> Path:
    """`path` without suffix, but for names that are hardly anything else, such as "..png"."""
    return path.with_suffix("") if path.stem.strip(".") else path


def key(path: Path) -> str:
    """Key that is equal for paths that some file systems, blind to case, hold for the same."""
    return str(path).casefold()


def _is_free(path: Path, source: Source) -> bool:
    return not os.path.lexists(path) or read_mark(path) == source.mark


def is_own(path: Path) -> bool:
    """Return whether fastseg wrote a file."""
    return read_mark(path) is not None


def read_mark(path: Path) -> str | None:
    """The mark of the source of an output, "" where an older version wrote none.

    None where fastseg did not write the file. PNGs have their marks in text chunks, JPEGs in the
    comment, JSON files in fields.
    """
    if not os.path.isfile(path):  # opening a named pipe would wait for ever
        return None
    try:
        if path.suffix in (JSON, Path(POLYGONS).suffix):
            content = json.loads(path.read_text(encoding="utf-8"))
            software, mark = content.get("software"), content.get("source", "")
        else:
            with Image.open(path) as image:
                info = image.info
            if path.suffix == ".jpg":
                comment = info.get("comment", b"").decode("ascii")
                info = dict(line.split("=", 1) for line in comment.splitlines())
            software = str(info.get("Software", "")).split(" ")[0]
            mark = str(info.get(SOURCE_KEYWORD, ""))
    except Exception:  # decoders meet files of others with errors of any class
        return None
    return mark if software == SOFTWARE else None


def write_png(path: Path, image: Image.Image, source: Source, runs: bool = False) -> None:
    """Write a marked PNG, whole or not at all; with `runs` compressed by run lengths."""
    content = png_bytes(image, source.mark, runs)
    write_whole(path, lambda file: file.write(content))


def write_jpeg(path: Path, image: Image.Image, source: Source) -> None:
    """Write a marked JPEG, whole or not at all.

    Raises:
        ValueError: the picture has more pixels a side than JPEGs have.
    """
    if max(image.size) > _LONGEST_JPEG:
        raise ValueError(
            f"an overlay of {image.width}x{image.height} pixels, where a JPEG has at most "
            f"{_LONGEST_JPEG} a side; --overlay png"
        )
    comment = "\n".join(f"{keyword}={text}" for keyword, text in marks(source.mark).items())
    options = {"quality": _JPEG_QUALITY, "comment": comment}
    write_whole(path, lambda file: image.save(file, format="JPEG", **options))


def write_json(path: Path, content: Mapping[str, object], source: Source) -> None:
    """Write a marked JSON file, whole or not at all."""
    marked = {
        "software": SOFTWARE,
        "version": fastseg.__version__,
        "source": source.mark,
        **content,
    }
    text = json_bytes(marked, indent=2)
    write_whole(path, lambda file: file.write(text))


def json_bytes(content: Mapping[str, object], indent: int | None = None) -> bytes:
    """A dictionary as JSON, with a line break at the end."""
    text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
    # Bytes of names that are not UTF-8: escapes of them are valid JSON that many readers refuse.
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text).encode("utf-8")

"""Pictures to read, and files to write: never over one that fastseg did not write.

Outputs carry a mark, so that a later run neither takes them for inputs nor replaces anything else.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

import fastseg

SOFTWARE = "fastseg"
LABELS, OVERLAY, JSON = "_labels.png", "_overlay.png", ".json"

# Formats that hold photographs and that Pillow reads. Folders are searched for these.
IMAGE_SUFFIXES = {".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg"}
IMAGE_SUFFIXES |= {".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass
class ImageFiles:
    """Pictures in the order of the arguments; `root` is the folder that contains all of them.

    `missing` lists arguments that led to nothing, with the reason; `skipped` counts files in
    folders by a suffix that is no image's; `own` counts outputs of earlier runs, left out.
    """

    paths: list[Path] = field(default_factory=list)
    root: Path = field(default_factory=Path)
    missing: list[tuple[str, str]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    own: int = 0


@dataclass(frozen=True)
class Target:
    """Place of the outputs of one picture: `stem` and an ending each."""

    stem: Path

    def path(self, ending: str) -> Path:
        return self.stem.with_name(self.stem.name + ending)


def find_images(arguments: Sequence[str], output: Path) -> ImageFiles:
    """Files as named, whatever their suffix; images in folders and below them; matches of globs.

    Folders are searched without hidden files and folders, without following links to folders, and
    without `output` where it lies inside. A picture reached twice is listed once.
    """
    images = ImageFiles()
    bases: dict[Path, Path] = {}  # picture: the folder its output path is relative to
    for argument in arguments:
        if os.path.lexists(argument):
            matches, named = [Path(argument)], True
        else:
            matches = [Path(match) for match in sorted(glob.glob(argument, recursive=True))]
            named = False
        reached = 0
        for match in matches:
            if match.is_dir():
                candidates, base, filtered = _files_below(match, output), match, True
            else:
                candidates, base, filtered = iter([match]), match.parent, not named
            for path in candidates:
                if filtered and path.suffix.lower() not in IMAGE_SUFFIXES:
                    images.skipped[path.suffix.lower() or "no suffix"] += 1
                    continue
                reached += 1
                if path.name.endswith((LABELS, OVERLAY)) and is_own(path):
                    images.own += 1
                else:
                    bases.setdefault(Path(os.path.abspath(path)), Path(os.path.abspath(base)))
        if not matches:
            images.missing.append((argument, "no such file or folder, and no match as a glob"))
        elif not reached:
            images.missing.append((argument, "no images there"))
    images.paths = list(bases)
    if bases:
        images.root = Path(os.path.commonpath([str(base) for base in bases.values()]))
    return images


def _files_below(folder: Path, output: Path) -> Iterator[Path]:
    """Visible files below a folder, sorted, leaving out an output folder that lies inside it."""
    apart = os.path.realpath(output)
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(place, name)) != apart
        )
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(place, name)


def plan_outputs(
    images: Sequence[Path], root: Path, output: Path, endings: Sequence[str]
) -> list[Target]:
    """One target for each picture, all different, none on a file that is not fastseg's own.

    Pictures keep their place below `root` and their name without suffix: `root/x/a.jpg` becomes
    `output/x/a_labels.png`. Where that serves several pictures (`a.jpg`, `a.png`), all of them keep
    their suffix: `a.jpg_labels.png`. What is taken still gets a number: `a-2_labels.png`.
    """
    relative = [Path(os.path.relpath(image, root)) for image in images]
    sharing = Counter(_key(path.with_suffix("")) for path in relative)
    taken: set[str] = set()
    targets = []
    for path in relative:
        short = path.with_suffix("")
        name = output / (path if sharing[_key(short)] > 1 else short)
        target, number = Target(name), 1
        while _key(target.stem) in taken or not all(
            _is_free(target.path(ending)) for ending in endings
        ):
            number += 1
            target = Target(name.with_name(f"{name.name}-{number}"))
        taken.add(_key(target.stem))
        targets.append(target)
    return targets


def _key(path: Path) -> str:
    """Key that is equal for paths that some file systems, blind to case, hold for the same."""
    return str(path).casefold()


def _is_free(path: Path) -> bool:
    return not os.path.lexists(path) or is_own(path)


def is_own(path: Path) -> bool:
    """Return whether fastseg wrote a file: PNGs say so in a text chunk, JSON files in a field."""
    if path.suffix == JSON:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(content, dict) and content.get("software") == SOFTWARE
    try:
        with Image.open(path) as image:
            return str(image.info.get("Software", "")).split(" ")[0] == SOFTWARE
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def write_png(path: Path, image: Image.Image) -> None:
    """Write a marked PNG, whole or not at all."""
    mark = PngInfo()
    mark.add_text("Software", f"{SOFTWARE} {fastseg.__version__}")
    _write(path, lambda file: image.save(file, format="PNG", pnginfo=mark))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a marked JSON file, whole or not at all."""
    marked = {"software": SOFTWARE, "version": fastseg.__version__, **content}
    text = json.dumps(marked, indent=2, ensure_ascii=False) + "\n"
    _write(path, lambda file: file.write(text.encode("utf-8")))


def _write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "xb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()

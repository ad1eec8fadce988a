"""Finding pictures in files, folders, globs and URLs; whatever is left out is counted or named."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .files import LABELS, OVERLAYS, SCORES, is_own
from .formats import UNREADABLE, is_searched_for
from .options import first_line
from .remote import Remote, is_remote

# Ends of the names of pictures that fastseg writes.
_OWN = (LABELS, SCORES, *OVERLAYS.values())


@dataclass
class ImageFiles:
    """Pictures in the order of the arguments; `root` is the folder that contains all files.

    `missing` has arguments that led to nothing and folders that cannot be searched, with the
    reason. Left out are: `unreadable` pictures of formats that cannot be read, and `skipped` files
    of other kinds, counted by suffix, and `own` outputs of earlier runs.
    """

    paths: list[Path | Remote] = field(default_factory=list)
    root: Path = field(default_factory=Path)
    missing: dict[str, str] = field(default_factory=dict)
    unreadable: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    own: int = 0


def find_images(arguments: Sequence[str], output: Path, copies: Path | None = None) -> ImageFiles:
    """Files as named, whatever their suffix; images in folders and below them; matches of globs.

    URLs and "-" are taken as they stand: nothing is read yet, and copies of what they give will be
    in the folder `copies`.

    Folders are searched without hidden files and folders, without following links to folders, and
    without `output` where it lies inside. A picture reached twice is listed once.
    """
    images = ImageFiles()
    found: dict[Path | str, Path | Remote] = {}
    bases = set()  # folders that output paths are relative to
    for argument in arguments:
        if copies is not None and is_remote(argument):
            found.setdefault(argument, Remote(argument, copies))
            continue
        told, reached = len(images.missing), 0
        matches, named, reason = _matches(argument, images)
        for match in matches:
            if os.path.isdir(match):
                candidates, base, filtered = _files_below(match, output, images), match, True
            else:
                candidates, base, filtered = iter([match]), match.parent, not named
            for path in candidates:
                suffix = path.suffix.lower()
                if filtered and not is_searched_for(suffix):
                    known = suffix in UNREADABLE
                    reached += known
                    (images.unreadable if known else images.skipped)[suffix or "no suffix"] += 1
                    continue
                reached += 1
                if path.name.endswith(_OWN) and is_own(path):
                    images.own += 1
                else:
                    absolute = Path(os.path.abspath(path))
                    if absolute not in found:
                        found[absolute] = absolute
                        bases.add(os.path.abspath(base))
        if not reached and len(images.missing) == told:
            images.missing[argument] = reason
    images.paths = list(found.values())
    if bases:
        images.root = Path(os.path.commonpath(bases))
    return images


def _matches(argument: str, images: ImageFiles) -> tuple[list[Path], bool, str]:
    """Paths that an argument leads to, whether it names one, and what to say where it has none."""
    try:
        os.lstat(argument)
        return [Path(argument)], True, "no images there"
    except OSError as error:
        reason = first_line(error)
        if isinstance(error, FileNotFoundError):
            reason = "no such file or folder, and no match as a glob"
    for folder in _closed_folders(argument) if glob.has_magic(argument) else ():
        images.missing[folder] = "no permission to search this folder"
    found = [Path(match) for match in sorted(glob.glob(argument, recursive=True))]
    return found, False, "no images there" if found else reason


def _closed_folders(pattern: str) -> Iterator[str]:
    """Folders without permission on the way of a glob, which passes them by without a word."""
    folder = os.path.dirname(pattern)
    while folder and folder != os.path.dirname(folder):
        for match in glob.glob(folder, recursive=True):
            if os.path.isdir(match) and not os.access(match, os.R_OK | os.X_OK):
                yield match
        folder = os.path.dirname(folder)


def _files_below(folder: Path, output: Path, images: ImageFiles) -> Iterator[Path]:
    """Visible files below a folder, sorted, leaving out an output folder that lies inside it."""

    def unreadable(error: OSError) -> None:
        images.missing[str(error.filename)] = f"cannot search this folder: {first_line(error)}"

    apart = os.path.realpath(output)
    for place, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(place, name)) != apart
        )
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(place, name)

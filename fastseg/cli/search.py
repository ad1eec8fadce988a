"""Finding pictures in files, folders, globs and URLs; whatever is left out is counted or named.

Folders are searched while their first pictures are at work: of a million files that takes long.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fastseg.images.formats import UNREADABLE, is_searched_for

from .files import LABELS, OVERLAYS, SCORES, is_own, key, place_of, without_suffix
from .options import first_line
from .remote import Copies, Remote, is_remote

# Ends of the names of pictures that fastseg writes.
_OWN_NAMES = (LABELS, SCORES, *OVERLAYS.values())
_NOTHING = "no images there"
# What a file is.
_PICTURE, _OWN, _UNREADABLE, _OTHER = "picture", "own", "unreadable", "other"


class Found(NamedTuple):
    """A picture, and whether without its suffix it has the name of another beside it."""

    path: Path | Remote
    shares_name: bool = False


class ImageFiles:
    """Pictures, found as they are asked for, each once: those named, then those in folders.

    Files as named, whatever their suffix; images in folders and below them; matches of globs. URLs
    and "-" are taken as they stand: nothing is read yet. Folders are searched without hidden files
    and folders, without following links to folders, and without `output` where it lies inside.

    Args:
        copies: where those of what URLs give will be; None takes no URLs.
        tell: called with an argument or a folder that leads to nothing, and the reason.

    Attributes:
        root: the folder that contains all files.
        missing: arguments that led to nothing and folders that cannot be searched, with the reason.
        unreadable: pictures of formats that cannot be read, which are left out, by suffix.
        skipped: files of other kinds, which are left out, by suffix.
        own: outputs of earlier runs, which are left out.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        output: Path,
        copies: Copies | None = None,
        tell: Callable[[str, str], object] = lambda place, reason: None,
    ) -> None:
        self.missing: dict[str, str] = {}
        self.unreadable: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.own = 0
        self._output = os.path.realpath(output)
        self._tell = tell
        self._reached = 0  # files and folders that are told of
        self._named: dict[Path | str, Path | Remote] = {}
        self._folders: list[tuple[str, list[Path]]] = []  # by argument
        bases = set()  # folders that output paths are relative to
        for argument in arguments:
            if copies is not None and is_remote(argument):
                self._named.setdefault(argument, Remote(argument, copies))
                continue
            reached = self._reached
            matches, is_name, reason = self._matches(argument)
            folders = []
            for match in matches:
                if os.path.isdir(match):
                    folders.append(match)
                    if self._has_pictures(match):
                        bases.add(os.path.abspath(match))
                elif self._is_picture(str(match), is_name):
                    absolute = Path(os.path.abspath(match))
                    self._named.setdefault(absolute, absolute)
                    bases.add(os.path.abspath(match.parent))
            if folders:
                self._folders.append((argument, folders))
            elif self._reached == reached:
                self._miss(argument, reason)
        self.root = Path(os.path.commonpath(bases)) if bases else Path()

    def __iter__(self) -> Iterator[Found]:
        keys = [key(without_suffix(place_of(path, self.root))) for path in self._named.values()]
        counts = Counter(keys)
        for path, one in zip(self._named.values(), keys, strict=True):
            yield Found(path, counts[one] > 1)
        seen: set[Path | Remote | str] = set(self._named)
        several = sum(len(folders) for _, folders in self._folders) > 1
        for argument, folders in self._folders:
            reached = self._reached
            for found in (one for folder in folders for one in self._in_folder(folder)):
                if found.path not in seen:
                    yield found
                    if several:  # else none is met twice
                        seen.add(found.path)
            if self._reached == reached:
                self._miss(argument, _NOTHING)

    def _in_folder(self, folder: Path) -> Iterator[Found]:
        for place, names in _places_below(folder, self._output, self._miss):
            pictures = [name for name in names if self._is_picture(os.path.join(place, name))]
            keys = [key(without_suffix(Path(name))) for name in pictures]
            counts, absolute = Counter(keys), Path(os.path.abspath(place))
            for name, one in zip(pictures, keys, strict=True):
                yield Found(absolute / name, counts[one] > 1)

    def _has_pictures(self, folder: Path) -> bool:
        below = _places_below(folder, self._output)
        paths = (os.path.join(place, name) for place, names in below for name in names)
        return any(_kind(path)[0] == _PICTURE for path in paths)

    def _is_picture(self, path: str, is_name: bool = False) -> bool:
        """Count a file by its kind; return whether it is to be segmented."""
        kind, suffix = _kind(path, is_name)
        self._reached += kind != _OTHER
        self.own += kind == _OWN
        if kind in (_UNREADABLE, _OTHER):
            counts = self.unreadable if kind == _UNREADABLE else self.skipped
            counts[suffix or "no suffix"] += 1
        return kind == _PICTURE

    def _miss(self, place: str, reason: str) -> None:
        self._reached += 1
        self.missing[place] = reason
        self._tell(place, reason)

    def _matches(self, argument: str) -> tuple[list[Path], bool, str]:
        """Paths that an argument leads to, whether it names one, and what to say if to nothing."""
        try:
            os.lstat(argument)
            return [Path(argument)], True, _NOTHING
        except OSError as error:
            reason = first_line(error)
            if isinstance(error, FileNotFoundError):
                reason = "no such file or folder, and no match as a glob"
        for folder in _closed_folders(argument) if glob.has_magic(argument) else ():
            self._miss(folder, "no permission to search this folder")
        found = [Path(match) for match in sorted(glob.glob(argument, recursive=True))]
        return found, False, _NOTHING if found else reason


def _kind(path: str, is_name: bool = False) -> tuple[str, str]:
    """What a file is, and its suffix; one that is named itself may have any."""
    suffix = os.path.splitext(path)[1].rstrip(".").lower()
    if not is_name and not is_searched_for(suffix):
        return _UNREADABLE if suffix in UNREADABLE else _OTHER, suffix
    is_result = path.endswith(_OWN_NAMES) and is_own(Path(path))
    return _OWN if is_result else _PICTURE, suffix


def _closed_folders(pattern: str) -> Iterator[str]:
    """Folders without permission on the way of a glob, which passes them by without a word."""
    folder = os.path.dirname(pattern)
    while folder and folder != os.path.dirname(folder):
        for match in glob.glob(folder, recursive=True):
            if os.path.isdir(match) and not os.access(match, os.R_OK | os.X_OK):
                yield match
        folder = os.path.dirname(folder)


def _places_below(
    folder: Path, output: str, miss: Callable[[str, str], object] = lambda place, reason: None
) -> Iterator[tuple[str, list[str]]]:
    """A folder and those below it, sorted, each with its visible files; without `output`."""

    def unreadable(error: OSError) -> None:
        miss(str(error.filename), f"cannot search this folder: {first_line(error)}")

    for place, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(place, name)) != output
        )
        yield place, sorted(name for name in files if not name.startswith("."))

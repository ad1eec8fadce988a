"""Pictures for the actors of a cluster: in files that all machines see, and behind URLs."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastseg.images.formats import is_searched_for
from fastseg.images.storage import Storage, filesystem_of, is_url

from .files import key, without_suffix
from .options import CommandError
from .search import Found, ImageFiles
from .searched import report_search, tell


class LocalFiles:
    """Pictures on a file system that all machines see at the same paths.

    Args:
        output: a folder, which is left out, or a URL.

    Attributes:
        root, unreadable, missing: as of `ImageFiles`.
    """

    def __init__(self, arguments: Sequence[str], output: Path | str) -> None:
        # Where results are behind a URL, no folder here is left out.
        here = os.devnull if is_url(output) else output
        self._images = ImageFiles(arguments, Path(here), None, tell)
        self.root, self.missing = self._images.root, self._images.missing
        self.unreadable = self._images.unreadable

    def __iter__(self) -> Iterator[Found]:
        return iter(self._images)

    def name_of(self, place: Any) -> str:
        """What an actor opens."""
        return str(place)

    def report(self) -> None:
        """Tell what was left out."""
        report_search(self._images)


class UrlFiles:
    """Pictures behind URLs: a file each, or all below a folder, listed at once.

    Attributes are those of `LocalFiles`. `root` stands for what all URLs have in common, and the
    places that are found are below it.

    Raises:
        CommandError: paths are among the URLs.
        OSError, ValueError: a URL cannot be read.
    """

    root = Path("/")

    def __init__(self, arguments: Sequence[str], output: Path | str) -> None:
        from pyarrow.fs import FileType

        self.missing: dict[str, str] = {}
        self.unreadable: Counter[str] = Counter()
        for argument in itertools.filterfalse(is_url, arguments):
            raise CommandError(
                f"{argument}: expected URLs of pyarrow's filesystems alone, or files alone", 2
            )
        urls: dict[str, None] = {}
        folders = []
        own = _plain(str(output)) + "/"
        for argument in arguments:
            filesystem, path = filesystem_of(argument)
            if filesystem.get_file_info(path).type == FileType.File:
                urls[argument] = None
                folders.append(_plain(argument).rpartition("/")[0])
                continue
            before = len(urls)
            storage = Storage(argument)
            for item in storage.files(below=True):
                url = storage.place(item.name)
                if is_searched_for(Path(item.name).suffix.lower()) and not url.startswith(own):
                    urls[url] = None
            if len(urls) == before:
                self.missing[argument] = "no images there"
                tell(argument, self.missing[argument])
            else:
                folders.append(_plain(argument))
        levels = zip(*map(_parts, folders), strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda level: len({*level}) == 1, levels))
        self._urls: dict[Path, list[str]] = {}
        for url in urls:
            place = self.root.joinpath(*_parts(_plain(url))[common:])
            self._urls.setdefault(place, []).append(url)  # several of other hosts

    def __iter__(self) -> Iterator[Found]:
        counts = Counter(key(without_suffix(place)) for place in self._urls)
        for place, urls in self._urls.items():
            for _ in range(len(urls)):
                yield Found(place, counts[key(without_suffix(place))] > 1)

    def name_of(self, place: Path) -> str:
        """The URL of a picture that was found; of several at one place each in turn."""
        urls = self._urls[place]
        urls.append(urls.pop(0))
        return urls[-1]

    def report(self) -> None:
        """Tell nothing: what is no picture was not looked at."""


def _plain(url: str) -> str:
    """A URL without the parameters of its filesystem."""
    return url.partition("?")[0].rstrip("/")


def _parts(url: str) -> list[str]:
    """Host and folders of a URL."""
    return [part for part in url.partition("://")[2].split("/") if part]

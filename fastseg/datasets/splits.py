"""Splits of a data set by the words that people have for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

_Item = TypeVar("_Item")

_SAME = {"validation": "val", "valid": "val", "training": "train", "testing": "test"}
_LISTED = 5  # names that an error lists


class NoSuchSplit(FileNotFoundError):
    """There are other splits, or none: `there` has their words, of "train", "val" and "test"."""

    def __init__(self, message: str, there: Iterable[str]) -> None:
        super().__init__(message)
        self.there = sorted({"train", "val", "test"}.intersection(there))


def choose_split(
    root: Path, there: Mapping[str, _Item], split: str | None, otherwise: _Item | None = None
) -> _Item:
    """The item of `split`; where that is None of the validation split.

    Args:
        otherwise: taken where `split` is None and none of the names is a split's; by default the
            only item.

    Raises:
        NoSuchSplit: there is none of this name.
    """
    by_word = {_SAME.get(name, name): item for name, item in there.items()}
    wanted = _SAME.get(split or "val", split or "val")
    if wanted in by_word:
        return by_word[wanted]
    if split is None and not by_word.keys() & {"train", "test"}:
        if otherwise is not None:
            return otherwise
        if len(there) == 1:
            return next(iter(there.values()))
    named = listed(sorted(there)) or "none"
    raise NoSuchSplit(f"{root}: no split {split or 'val'!r}; there are {named}", by_word)


def listed(names: Iterable[object]) -> str:
    """The first few names, for a message."""
    all_names = [str(name) for name in names]
    more = f" and {len(all_names) - _LISTED} more" if len(all_names) > _LISTED else ""
    return ", ".join(all_names[:_LISTED]) + more

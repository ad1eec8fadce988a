"""The classes of a model as its results show them: names, colours, numbers, and which of them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastseg.images.overlay import MAX_INDEXED
from fastseg.images.palettes import cityscapes_label_ids, config_palette, dataset, find_dataset

from .options import CommandError

LABEL_IDS = "labelIds"
UNLABELED = "unlabeled"  # Cityscapes' word

_MAX_NAMED = 8  # classes that an error lists


@dataclass(frozen=True)
class Classes:
    """Names and colours of classes by their numbers, and which of them are shown.

    chosen: numbers of the classes to show, the others being `ignored`; None shows all.
    label_ids: Cityscapes' id of each class, to be written in the place of its number, or None.
    """

    names: dict[int, str]
    colours: np.ndarray  # (classes, 3)
    chosen: tuple[int, ...] | None = None
    label_ids: tuple[int, ...] | None = None

    @property
    def ignored(self) -> int:
        """The number of what is left out: one that is no class."""
        return 255 if len(self.colours) <= 255 else 65535

    def show(self, labels: np.ndarray) -> np.ndarray:
        """A label map (H, W) with what is not chosen left out."""
        if self.chosen is None:
            return labels
        numbers = np.full(self.ignored + 1, self.ignored, dtype=np.min_scalar_type(self.ignored))
        numbers[list(self.chosen)] = self.chosen
        return numbers[labels]

    def written(self) -> Classes:
        """The classes as files have them: by Cityscapes' ids, where these are asked for."""
        names, colours = self.names, self.colours
        if self.label_ids is not None:
            names = {own: names[number] for number, own in enumerate(self.label_ids)}
            colours = np.zeros((max(self.label_ids) + 1, 3), dtype=np.uint8)
            colours[list(self.label_ids)] = self.colours
            names[0] = UNLABELED
        elif len(colours) == MAX_INDEXED and self.chosen is not None:
            # Their numbers leave no place for `ignored` in 8 bits: one more makes it 16.
            colours = np.vstack([colours, np.zeros((1, 3), dtype=np.uint8)])
        return Classes(names, colours)

    def write(self, shown: np.ndarray) -> np.ndarray:
        """What `show` gives, in the numbers of `written`."""
        if self.label_ids is None:
            return shown
        numbers = np.zeros(self.ignored + 1, dtype=np.uint8)  # where left out: unlabeled, 0
        numbers[: len(self.label_ids)] = self.label_ids
        return numbers[shown]


def choose_classes(
    config: Any,
    palette: str | None = None,
    chosen: str | None = None,
    numbers: str | None = None,
) -> Classes:
    """The classes of a model with configuration `config`, by options of `fastseg predict`.

    Args:
        palette: the data set of the model's classes; None finds it by their names.
        chosen: names and numbers of classes to show, with commas between them; None for all.
        numbers: LABEL_IDS for Cityscapes' ids in place of class numbers.

    Raises:
        CommandError: an option does not fit the model.
        ValueError: the configuration's palette is not one colour for each class.
    """
    names = {number: str(name) for number, name in config.id2label.items()}
    if palette is not None:
        data = dataset(palette)
        if config.num_labels != len(data.names):
            raise CommandError(
                f"--palette {palette}: expected a model of {len(data.names)} classes, got one of "
                f"{config.num_labels}",
                status=2,
            )
        order = data.order(names)
        if order is None:
            order = list(range(len(data.names)))
            names = dict(enumerate(data.names))
        colours = data.colours[order]
    else:
        colours = config_palette(config)
    label_ids = None
    if numbers is not None:
        label_ids = _label_ids(names)
    if config.num_labels == 1:  # its label maps hold 1 where the class is, else 0
        names = {0: "background", 1: names.get(0, "1")}
        colours = np.vstack([np.zeros((1, 3), dtype=np.uint8), colours])
    found = None if chosen is None else find_classes("--classes", chosen, names)
    classes = Classes(names, colours, found, label_ids)
    if chosen is not None:
        classes.names[classes.ignored] = UNLABELED
    return classes


def _label_ids(names: dict[int, str]) -> tuple[int, ...]:
    order = dataset("cityscapes").order(names)
    if order is None:
        found = find_dataset(names)
        raise CommandError(
            f"--map {LABEL_IDS}: expected the classes of Cityscapes, by the model's own names or "
            f"with --palette cityscapes, got {found or 'others'}",
            status=2,
        )
    ids = cityscapes_label_ids()
    return tuple(ids[train_id] for train_id in order)


def find_classes(option: str, chosen: str, names: dict[int, str]) -> tuple[int, ...]:
    """Numbers of the classes that `chosen` lists by names or numbers, as `option` was given.

    Raises:
        CommandError: one of them is no class.
    """
    by_name: dict[str, list[int]] = {}
    for number, name in names.items():
        # By its first synonym too: "building" of "building, edifice".
        for key in {_plain(name), _plain(name.split(",")[0])}:
            by_name.setdefault(key, []).append(number)
    if _plain(chosen) in by_name:  # a name with commas
        return tuple(by_name[_plain(chosen)])
    found: list[int] = []
    for item in chosen.split(","):
        key = _plain(item)
        if key in by_name:
            found += by_name[key]
        elif key.isdecimal() and int(key) in names:
            found.append(int(key))
        else:
            raise CommandError(f"{option}: the model has no class {item!r}; {_near(key, names)}", 2)
    return tuple(dict.fromkeys(found))


def _near(key: str, names: dict[int, str]) -> str:
    plain = {_plain(name): name for name in names.values()}
    near = difflib.get_close_matches(key, plain, n=3)
    if near:
        return f"the nearest: {', '.join(plain[name] for name in near)}"
    listed = [f"{name} ({number})" for number, name in sorted(names.items())]
    more = f" and {len(listed) - _MAX_NAMED} more" if len(listed) > _MAX_NAMED else ""
    return f"it has {', '.join(listed[:_MAX_NAMED])}{more}"


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())

"""True label maps as a data set gives them: read, lowered, and checked against the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastseg.images.inputs import read_label_map
from fastseg.images.transforms import reduce_labels
from fastseg.models.seggpt.prompts import SegGptPrompt

from .confusion import Confusion

IGNORED = 255  # what `reduce_labels` makes of 0


def class_names(
    model: Any, num_labels: int | None, prompts: Sequence[Any] | None, dataset: Any
) -> list[str]:
    """Names of the classes by number; a model of one class has the background before it.

    Raises:
        ValueError: nothing says how many there are, or the data set has others.
    """
    if prompts is not None:
        if not all(isinstance(p, SegGptPrompt) and p.num_labels for p in prompts) or not prompts:
            raise ValueError("prompts: expected what fastseg.keep_prompt makes, with num_labels")
        return ["background", *(f"class {n + 1}" for n in range(prompts[0].num_labels))]
    config = getattr(getattr(model, "module", model), "config", None)
    of_config = getattr(config, "num_labels", None)
    of_data = getattr(dataset, "classes", None)
    count = num_labels or of_config or (len(of_data) if of_data else None)
    if not isinstance(count, int):
        raise ValueError("num_labels: expected the number of classes, as the model has no config")
    known: Mapping[int, str] = getattr(config, "id2label", None) or {}
    if not known and of_data and len(of_data) == count:
        known = dict(enumerate(of_data))
    names = [str(known.get(index, f"class {index}")) for index in range(count)]
    return ["background", *names] if count == 1 else names


def check_classes(argument: str, classes: Sequence[str], of_model: Sequence[str]) -> None:
    """Raise ValueError where `argument` has another number of classes, or another order of them."""
    if len(classes) != len(of_model):
        raise ValueError(
            f"{argument}: expected the {len(of_model)} classes of the model, {_shown(of_model)}; "
            f"got {len(classes)}, {_shown(classes)}"
        )
    ours, theirs = ([_key(name) for name in names] for names in (of_model, classes))
    if ours != theirs and sorted(ours) == sorted(theirs):
        first = next(
            i for i, names in enumerate(zip(ours, theirs, strict=True)) if len({*names}) > 1
        )
        raise ValueError(
            f"{argument}: expected its classes in the order of the model's, where class {first} is "
            f"{of_model[first]}, got {classes[first]}: renumber them"
        )


def read_truth(label_map: Any, name: str, reduce: bool) -> np.ndarray:
    """A true label map (H, W) of integers; with `reduce` lowered by one, 0 and 255 becoming 255.

    Raises:
        TypeError, ValueError: it is none.
    """
    labels = read_label_map(label_map, name)
    if labels.dtype == bool:
        labels = labels.astype(np.uint8)
    if not reduce:
        # Whole numbers in floats are labels as well.
        return labels if labels.dtype.kind in "iu" else labels.astype(np.int64)
    return _REDUCED[labels] if labels.dtype == np.uint8 else reduce_labels(labels.astype(np.int64))


# Less one, on bytes, would make 254 of 255: a class.
_REDUCED = reduce_labels(np.arange(256)).astype(np.uint8)


def check_size(truth: np.ndarray, labels: Any, name: str, of_image: str) -> None:
    """Raise ValueError where a label map has not the size of its picture."""
    if truth.shape != tuple(labels.shape):
        raise ValueError(
            f"{name}: expected the height and width of {of_image}, turned as its EXIF orientation "
            f"says, {tuple(labels.shape)}, got {truth.shape}: resize the picture, or the mask by "
            "the nearest neighbour"
        )


def check_counted(confusion: Confusion, pictures: int, last: bool) -> None:
    """Raise ValueError where the label maps cannot be meant as they are, after some pictures."""
    labelled = confusion.truth
    if last and not labelled.sum():
        raise ValueError(
            f"dataset: expected labelled pixels, got {confusion.ignored} that are all "
            f"{confusion.ignore_index}, which is ignored, in {pictures} pictures"
        )
    alone = labelled.sum() and not labelled[1:].sum()
    if alone and confusion.ignored and confusion.ignore_index == IGNORED:
        raise ValueError(
            f"dataset: the masks hold 0 and 255 alone, in {pictures} pictures, and 255 is ignored: "
            "where it is class 1, divide them by 255, or pass --map binary; where it is not, there "
            "is nothing but class 0 to evaluate"
        )


def remarks_of(confusion: Confusion) -> list[str]:
    """What the figures hint at."""
    matrix = confusion.matrix
    right = np.trace(matrix)
    below, above = np.trace(matrix, offset=-1), np.trace(matrix, offset=1)
    if below > max(right, matrix.sum() / 2):
        return [
            "remark: most pixels are predicted one class below their label; where labels count "
            "from 1 and 0 is no class, pass reduce_labels=True (--reduce-labels on)"
        ]
    if above > max(right, matrix.sum() / 2):
        return [
            "remark: most pixels are predicted one class above their label; where labels were "
            "lowered by one already, pass reduce_labels=False (--reduce-labels off)"
        ]
    return []


def _key(name: str) -> str:
    """A class name without case and synonyms."""
    return name.split(",")[0].strip().casefold()


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")

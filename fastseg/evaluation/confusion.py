"""The confusion matrix of a data set, and the figures that come of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

_BYTES = 256
_LISTED = 5  # labels that an error lists


class LabelError(ValueError):
    """Labels that are no classes; the message says what may be done."""


class Confusion:
    """Pixels counted by (true class, predicted class), over all pictures that were added.

    Every figure comes of this one matrix, so means are over the pixels of the whole data set, not
    over pictures. A pixel whose true label is `ignore_index` counts nowhere, whatever is predicted
    there. A class that is in neither map has no figures (nan) and no part in means; one that is
    only predicted has an IoU of 0. As torchmetrics' MulticlassConfusionMatrix counts, and the
    mean_iou of Hugging Face evaluate is defined.

    Args:
        num_labels: of the classes, from 0.
        ignore_index: the true label that is left out; None leaves out none. Where it is a class,
            that class may still be predicted, wrongly, where another is.

    Raises:
        ValueError: `num_labels` is no integer from 1.
    """

    def __init__(self, num_labels: int, ignore_index: int | None = 255) -> None:
        if not isinstance(num_labels, int) or num_labels < 1:
            raise ValueError(f"num_labels: expected an integer from 1, got {num_labels!r}")
        self.num_labels, self.ignore_index = num_labels, ignore_index
        self.matrix = np.zeros((num_labels, num_labels), np.int64)  # (true, predicted)
        self.ignored = 0  # pixels

    def add(self, predicted: Any, truth: Any) -> np.ndarray:
        """Count a picture, and return its own matrix (true, predicted), int64.

        Args:
            predicted, truth: integers of one shape, NumPy or torch. Where `predicted` is on a GPU,
                it counts.

        Raises:
            TypeError: they are no integers.
            ValueError: they differ in shape. LabelError: they hold what is no class.
        """
        if 0 in predicted.shape or tuple(predicted.shape) != tuple(truth.shape):
            raise ValueError(
                f"truth: expected pixels in the shape of predicted, {tuple(predicted.shape)}, "
                f"got {tuple(truth.shape)}"
            )
        if not _is_on_gpu(predicted):
            predicted = _to_numpy(predicted)
        truth = _to_numpy(truth)
        of_predicted, of_truth = _as_bytes(predicted, "predicted"), _as_bytes(truth, "truth")
        if of_predicted is None or of_truth is None or self.num_labels > _BYTES:
            counts, ignored = self._count_any(_to_numpy(predicted), truth)
        else:
            counts, ignored = self._count_bytes(of_predicted, of_truth)
        self.matrix += counts
        self.ignored += ignored
        return counts

    def merge(self, other: Confusion) -> None:
        """Add what another has counted, as of a shard of the data set.

        Raises:
            ValueError: its arguments were others.
        """
        if (other.num_labels, other.ignore_index) != (self.num_labels, self.ignore_index):
            raise ValueError("other: expected the same num_labels and ignore_index")
        self.matrix += other.matrix
        self.ignored += other.ignored

    @property
    def truth(self) -> np.ndarray:
        """Pixels of each class, (K,) int64."""
        return self.matrix.sum(axis=1)

    @property
    def predicted(self) -> np.ndarray:
        """Pixels that each class was predicted for, (K,) int64."""
        return self.matrix.sum(axis=0)

    @property
    def intersection(self) -> np.ndarray:
        """Pixels of each class that were predicted, (K,) int64."""
        return intersection_and_union(self.matrix)[0]

    @property
    def union(self) -> np.ndarray:
        """Pixels that are of a class or that it was predicted for, (K,) int64."""
        return intersection_and_union(self.matrix)[1]

    @property
    def iou(self) -> np.ndarray:
        """Intersection over union of each class, (K,) float64; nan where it is in neither map."""
        return ratio(self.intersection, self.union)

    @property
    def accuracy(self) -> np.ndarray:
        """Share of the pixels of each class that are right, (K,) float64; nan where none are."""
        return ratio(self.intersection, self.truth)

    @property
    def mean_iou(self) -> float:
        """Mean of `iou` over the classes that have one."""
        return mean(self.iou)

    @property
    def mean_accuracy(self) -> float:
        """Mean of `accuracy` over the classes that have one."""
        return mean(self.accuracy)

    @property
    def pixel_accuracy(self) -> float:
        """Share of all pixels that are right."""
        return float(ratio(self.intersection.sum(), self.matrix.sum()))

    @property
    def frequency_weighted_iou(self) -> float:
        """Mean of `iou` weighted by the pixels of each class."""
        weighted = np.where(self.truth > 0, self.truth * self.iou, 0)
        return float(ratio(weighted.sum(), self.truth.sum()))

    def _count_bytes(self, predicted: Any, truth: Any) -> tuple[np.ndarray, int]:
        # All pairs of bytes are counted: what is no class shows, without a look for it.
        count = _pairs_on_gpu if _is_on_gpu(predicted) else _pairs
        pairs = count(predicted, truth)
        ignored = 0
        if self.ignore_index is not None and 0 <= self.ignore_index < _BYTES:
            ignored = int(pairs[self.ignore_index].sum())
            pairs[self.ignore_index] = 0
        for name, counts in (("truth", pairs.sum(axis=1)), ("predicted", pairs.sum(axis=0))):
            wrong = self.num_labels + np.flatnonzero(counts[self.num_labels :])
            self._refuse(name, wrong, int(counts[wrong].sum()), int(pairs.sum()) + ignored)
        return pairs[: self.num_labels, : self.num_labels], ignored

    def _count_any(self, predicted: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, int]:
        """The same of labels that are no bytes, negative or large ones."""
        keep = (
            np.ones(truth.shape, bool) if self.ignore_index is None else truth != self.ignore_index
        )
        kept = {
            "truth": truth[keep].astype(np.int64),
            "predicted": predicted[keep].astype(np.int64),
        }
        for name, labels in kept.items():
            wrong = labels[(labels < 0) | (labels >= self.num_labels)]
            self._refuse(name, np.unique(wrong), wrong.size, truth.size)
        pairs = kept["truth"] * self.num_labels + kept["predicted"]
        counts = np.bincount(pairs, minlength=self.num_labels**2)
        return counts.reshape(self.num_labels, -1), truth.size - pairs.size

    def _refuse(self, name: str, wrong: np.ndarray, pixels: int, of: int) -> None:
        """Raise where there are labels that are `wrong`."""
        if pixels == 0:
            return
        found = wrong.tolist()
        listed = ", ".join(map(str, found[:_LISTED])) + (" ..." if len(found) > _LISTED else "")
        ignored = "" if self.ignore_index is None else f", or {self.ignore_index} to be left out"
        message = (
            f"{name}: expected classes from 0 to {self.num_labels - 1}{ignored}, "
            f"got {listed} in {pixels} of {of} pixels"
        )
        if name == "truth":
            message += f"; {self._advice(found)}"
        raise LabelError(message)

    def _advice(self, found: list[int]) -> str:
        if found == [255] and self.num_labels <= 2:
            return "where 255 is class 1, divide by 255, or pass --map binary"
        if found == [255]:
            return "where 255 is no class, pass ignore_index=255 (--ignore 255)"
        if min(found) < 0:
            return f"where {min(found)} is no class, pass it as ignore_index (--ignore)"
        if found == [self.num_labels]:
            return (
                "where labels count from 1, and 0 is no class, pass reduce_labels=True "
                "(--reduce-labels on)"
            )
        if self.num_labels == 19 and max(found) <= 33:
            return (
                "where these are Cityscapes' own ids, make them train ids, or pass --map labelIds"
            )
        return (
            "has the model other classes, or are these grey values or colours? Class numbers are "
            "to stand in their place"
        )


def intersection_and_union(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of each class in both maps, and in either, of a matrix (true, predicted)."""
    intersection = np.diag(matrix)
    return intersection, matrix.sum(axis=0) + matrix.sum(axis=1) - intersection


def ratio(part: Any, whole: Any) -> np.ndarray:
    """`part` over `whole`, elementwise in float64; nan where `whole` is 0."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)


def mean(values: np.ndarray) -> float:
    """Mean of what is not nan; nan of nothing."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _is_on_gpu(labels: Any) -> bool:
    return isinstance(labels, torch.Tensor) and labels.device.type != "cpu"


def _to_numpy(labels: Any) -> np.ndarray:
    return labels.cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)


def _as_bytes(labels: Any, name: str) -> Any:
    """`labels` as uint8, or None where they do not fit; TypeError where they are no integers."""
    if isinstance(labels, torch.Tensor):
        if labels.dtype.is_floating_point or labels.dtype.is_complex:
            raise TypeError(f"{name}: expected integers, got {labels.dtype}")
        small = labels.to(torch.uint8)
    else:
        if labels.dtype.kind not in "bui":
            raise TypeError(f"{name}: expected integers, got {labels.dtype}")
        small = labels.astype(np.uint8, copy=False)
    return small if small is labels or bool((small == labels).all()) else None


def _pairs(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Pixels of each pair of bytes (true, predicted), int64 (256, 256).

    Label maps are made of runs, so runs of pairs are counted, with their lengths for weights: half
    the time of counting pixels one by one, on photographs.
    """
    predicted, truth = predicted.ravel(), truth.ravel()
    changes = truth[1:] != truth[:-1]
    changes |= predicted[1:] != predicted[:-1]
    starts = np.append(0, np.flatnonzero(changes) + 1)
    lengths = np.diff(starts, append=truth.size)
    pairs = truth[starts].astype(np.uint16) << 8 | predicted[starts]
    # float64 holds the pixels of any picture exactly.
    counts = np.bincount(pairs, weights=lengths, minlength=_BYTES**2)
    return counts.astype(np.int64).reshape(_BYTES, _BYTES)


def _pairs_on_gpu(predicted: torch.Tensor, truth: np.ndarray) -> np.ndarray:
    pairs = torch.tensor(truth, device=predicted.device).int() << 8 | predicted
    counts = torch.bincount(pairs.flatten(), minlength=_BYTES**2)
    return counts.reshape(_BYTES, _BYTES).cpu().numpy()

"""Boundary F1: how well the borders of classes are met, by their distance.

A border pixel of class k is one of class k with a neighbour (above, below, left, right) of another
class. It is met where the other map has a border pixel of the same class within d, in Euclidean
distance. Precision is the share of met border pixels of the predicted map, recall that of the true
one, both over all pictures, and F1 their harmonic mean (Csurka et al., "What is a good evaluation
measure for semantic segmentation?", BMVC 2013, who take the mean over pictures). d is 0.75 % of the
picture's diagonal, as there.
"""

from __future__ import annotations

import numpy as np

from .confusion import mean, ratio

SHARE_OF_DIAGONAL = 0.0075
_NONE = -1


class BoundaryF1:
    """Border pixels by class, and how many are met, over all pictures that were added.

    Args:
        num_labels, ignore_index: as of `Confusion`. What is ignored has no borders.
    """

    def __init__(self, num_labels: int, ignore_index: int | None = 255) -> None:
        self.num_labels, self.ignore_index = num_labels, ignore_index
        self.met = np.zeros((2, num_labels), np.int64)  # of the predicted map, of the true one
        self.borders = np.zeros((2, num_labels), np.int64)

    def add(self, predicted: np.ndarray, truth: np.ndarray) -> None:
        """Count a picture: (H, W) integers, whose labels `Confusion` has checked."""
        ignored = np.zeros(truth.shape, bool)
        if self.ignore_index is not None:
            ignored = truth == self.ignore_index
        maps = [_borders(labels, ignored) for labels in (predicted, truth)]
        offsets = _disk(SHARE_OF_DIAGONAL * float(np.hypot(*truth.shape)))
        for index, (one, other) in enumerate((maps, maps[::-1])):
            rows, columns = np.nonzero(one != _NONE)
            self.borders[index] += self._by_class(one[rows, columns])
            missed = _missed(one, other, rows, columns, offsets)
            self.met[index] += self._by_class(one[rows, columns]) - self._by_class(missed)

    def merge(self, other: BoundaryF1) -> None:
        """Add what another has counted, as of a shard of the data set."""
        self.met += other.met
        self.borders += other.borders

    @property
    def f1(self) -> np.ndarray:
        """F1 of each class, (K,) float64; nan where it has borders in neither map."""
        precision, recall = ratio(self.met, self.borders)
        f1 = ratio(2 * precision * recall, precision + recall)
        return np.where(self.borders.sum(axis=0) > 0, np.nan_to_num(f1), np.nan)

    @property
    def mean_f1(self) -> float:
        """Mean of `f1` over the classes that have one."""
        return mean(self.f1)

    def _by_class(self, labels: np.ndarray) -> np.ndarray:
        return np.bincount(labels, minlength=self.num_labels)


def _borders(labels: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """The class of each border pixel, int32 (H, W), and _NONE elsewhere."""
    labels = np.where(ignored, _NONE, labels).astype(np.int32)
    edge = np.zeros(labels.shape, bool)
    for one, other in (
        ((slice(None), slice(1, None)), (slice(None), slice(-1))),
        ((slice(1, None), slice(None)), (slice(-1), slice(None))),
    ):
        differs = (labels[one] != labels[other]) & ~ignored[one] & ~ignored[other]
        edge[one] |= differs
        edge[other] |= differs
    return np.where(edge, labels, _NONE)


def _disk(radius: float) -> np.ndarray:
    """Whole-numbered offsets (n, 2) of at most `radius`, at least 1, the nearest first."""
    radius = max(radius, 1.0)
    side = np.arange(-int(radius), int(radius) + 1)
    offsets = np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1).reshape(-1, 2)
    squares = (offsets**2).sum(axis=1)
    order = np.argsort(squares, kind="stable")
    return offsets[order][squares[order] <= radius**2]


def _missed(
    one: np.ndarray, other: np.ndarray, rows: np.ndarray, columns: np.ndarray, offsets: np.ndarray
) -> np.ndarray:
    """Classes of the border pixels of `one` that no border pixel of `other` meets."""
    reach = int(np.abs(offsets).max())
    padded = np.pad(other, reach, constant_values=_NONE)
    places = (rows + reach) * padded.shape[1] + columns + reach
    classes, flat = one[rows, columns], padded.ravel()
    for row, column in offsets:  # most are met at once, so few are looked up often
        left = flat[places + row * padded.shape[1] + column] != classes
        places, classes = places[left], classes[left]
    return classes

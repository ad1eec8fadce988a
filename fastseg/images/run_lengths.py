"""Run lengths of a label map, as COCO writes masks: all classes in one pass.

A mask of COCO is a list of counts, of 0 and of 1 in turn, down the columns one after another. One
pass over the columns gives the runs of all classes; with a mask, and a pass, for each of 12
classes it took nine times as long.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .types import RunLengths


@dataclass(frozen=True)
class Runs:
    """Where a class is in a label map, down its columns: from `starts` to `stops`."""

    starts: np.ndarray  # (N,) int64
    stops: np.ndarray
    height: int
    width: int

    @property
    def area(self) -> int:
        """Its pixels."""
        return int((self.stops - self.starts).sum())

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, width and height of the least box around it."""
        first, last = self.starts // self.height, (self.stops - 1) // self.height
        wraps = bool((first != last).any())  # then it goes on at the top of the next column
        top = 0 if wraps else int((self.starts % self.height).min())
        bottom = self.height - 1 if wraps else int(((self.stops - 1) % self.height).max())
        left, right = int(first.min()), int(last.max())
        return left, top, right - left + 1, bottom - top + 1

    def counts(self) -> np.ndarray:
        """(M,) COCO's counts: of pixels outside, inside, outside and so on."""
        size = self.height * self.width
        counts = np.empty(2 * len(self.starts), dtype=np.int64)
        counts[0::2] = self.starts - np.concatenate(([0], self.stops[:-1]))
        counts[1::2] = self.stops - self.starts
        rest = size - int(self.stops[-1])
        return np.append(counts, rest) if rest else counts

    def to_coco(self) -> RunLengths:
        """COCO's compressed form, {"size": [height, width], "counts": str}."""
        return {"size": [self.height, self.width], "counts": _compress(self.counts())}


def class_runs(labels: np.ndarray) -> dict[int, Runs]:
    """The runs of every class in a label map (H, W) of integers, by its number."""
    height, width = labels.shape
    flat = labels.T.ravel()
    cuts = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts, stops = np.concatenate(([0], cuts)), np.append(cuts, flat.size)
    numbers = flat[starts]
    order = np.argsort(numbers, kind="stable")
    classes, first = np.unique(numbers[order], return_index=True)
    return {
        int(number): Runs(starts[some], stops[some], height, width)
        for number, some in zip(classes, np.split(order, first[1:]), strict=True)
    }


def _compress(counts: np.ndarray) -> str:
    """COCO's string of counts: from the fourth on less the last but one, in groups of 5 bits.

    As `rleToString` of the COCO API has it; a group's sixth bit tells that another follows.
    """
    rest = counts.copy()
    rest[3:] -= counts[1:-2]
    groups = []
    more = np.ones(len(rest), dtype=bool)
    while more.any():
        low = rest & 31
        rest >>= 5  # with its sign
        goes_on = np.where(low & 16, rest != -1, rest != 0)
        groups.append(np.where(more, low + 32 * goes_on + 48, 0))
        more &= goes_on
    text = np.stack(groups, axis=1).ravel()
    return text[text > 0].astype(np.uint8).tobytes().decode("ascii")


def label_map(masks: Mapping[int, RunLengths], height: int, width: int) -> np.ndarray:
    """The label map (H, W), uint8 or uint16, whose classes have these masks, in COCO's form.

    Raises:
        ValueError: a mask is of another size, or not all pixels are in one.
    """
    largest = max(masks, default=0)
    flat = np.zeros(height * width, dtype=np.uint8 if largest < 256 else np.uint16)
    covered = 0
    for number, mask in masks.items():
        counts = _expand(mask["counts"])
        if list(mask["size"]) != [height, width] or counts.sum() != flat.size:
            raise ValueError(f"expected masks of {[height, width]}, got {mask['size']}")
        inside = np.arange(len(counts)) % 2 == 1
        flat[np.repeat(inside, counts)] = number
        covered += int(counts[inside].sum())
    if covered != flat.size:
        raise ValueError(f"expected masks of all {flat.size} pixels, got {covered}")
    return np.ascontiguousarray(flat.reshape(width, height).T)


def _expand(text: str) -> np.ndarray:
    """Counts of COCO's string: `_compress` the other way."""
    groups = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
    last = (groups & 32) == 0
    firsts = np.concatenate(([0], np.flatnonzero(last)[:-1] + 1))
    place = np.arange(len(groups)) - np.repeat(firsts, np.diff(np.append(firsts, len(groups))))
    counts = np.add.reduceat((groups & 31) << (5 * place), firsts)
    negative = (groups[last] & 16) != 0
    counts -= np.where(negative, 1 << (5 * (place[last] + 1)), 0)
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    return counts

"""Two models on the same pictures: the difference of their mIoU, and how sure it is."""

from __future__ import annotations

import numpy as np
import torch

from .confusion import intersection_and_union, mean, ratio

RESAMPLES = 1000
CONFIDENCE = 0.95
_AT_ONCE = 50  # resamples in memory


class Comparison:
    """Label maps of a model and of another, picture by picture.

    It keeps each picture's intersections and unions of every class for both models, 2.4 kB a
    picture at 150 classes.
    """

    def __init__(self) -> None:
        self.equal = 0  # pixels, those ignored too
        self.pixels = 0
        self._counts: list[np.ndarray] = []  # (2 models, 2, K) uint32

    def add(
        self,
        labels: torch.Tensor,
        others: torch.Tensor,
        counts: np.ndarray,
        other_counts: np.ndarray,
    ) -> None:
        """Add a picture.

        Args:
            labels, others: of the model and of the other, (H, W).
            counts, other_counts: the picture's confusion matrices of both, (K, K).
        """
        self.equal += int((labels == others.to(labels.device)).sum())
        self.pixels += labels.numel()
        both = [intersection_and_union(matrix) for matrix in (counts, other_counts)]
        self._counts.append(np.stack(both).astype(np.uint32))

    @property
    def equal_share(self) -> float:
        """Share of pixels to which both give the same label."""
        return self.equal / self.pixels

    def difference(self) -> float:
        """mIoU of the model less that of the other."""
        counts = np.stack(self._counts).astype(np.float64).sum(axis=0)
        return _mean_iou(counts[0]) - _mean_iou(counts[1])

    def interval(self, seed: int = 0) -> tuple[float, float]:
        """Ends of the 95 % interval of the difference, by the bootstrap over pictures.

        Pictures are drawn with replacement, as many as there are, 1,000 times, and the difference
        taken of each draw; the interval is that of its percentiles (Efron and Tibshirani, "An
        Introduction to the Bootstrap", 1993, chapter 13). It says how far other pictures of the
        same kind would move the difference, and nothing of other training runs. nan of one picture.
        """
        count = len(self._counts)
        if count < 2:
            return float("nan"), float("nan")
        counts = np.stack(self._counts).astype(np.float64).reshape(count, -1)
        shape = self._counts[0].shape
        generator = np.random.Generator(np.random.PCG64(seed))
        found = []
        for start in range(0, RESAMPLES, _AT_ONCE):
            draws = min(_AT_ONCE, RESAMPLES - start)
            times = generator.multinomial(count, np.full(count, 1 / count), size=draws)
            sums = (times @ counts).reshape(draws, *shape)
            found += [_mean_iou(one) - _mean_iou(other) for one, other in sums]
        low, high = np.percentile(found, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
        return float(low), float(high)


def _mean_iou(counts: np.ndarray) -> float:
    """Of intersections and unions, (2, K)."""
    return mean(ratio(counts[0], counts[1]))

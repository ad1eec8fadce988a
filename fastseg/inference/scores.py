"""Scores beside label maps, and labels that a threshold leaves out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

IGNORED = 255  # the label of pixels that are not certain, as losses and metrics leave it out
LABEL_DTYPES = (torch.int64, torch.uint8)
SCORE_DTYPES = (torch.float16, torch.float32, torch.uint8)

# A label map (H, W), and its scores where they are asked for.
LabelMap = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Wanted:
    """What is asked for beside the highest class.

    Args:
        threshold: the least probability of a label that stays; None where all do.
        dtype: of the scores; None where there are to be none.
        of_probabilities: whether the model upsamples probabilities and not logits.
        labels: dtype of the label maps.
    """

    threshold: float | None = None
    dtype: torch.dtype | None = None
    of_probabilities: bool = False
    labels: torch.dtype = torch.int64

    @classmethod
    def of(
        cls, model: Any, return_scores: Any, scores_dtype: Any, threshold: Any, dtype: Any
    ) -> Wanted:
        """Check the arguments of `segment`."""
        if dtype not in LABEL_DTYPES:
            expected = ", ".join(map(str, LABEL_DTYPES))
            raise ValueError(f"dtype: expected one of {expected}, got {dtype!r}")
        if scores_dtype not in SCORE_DTYPES:
            expected = ", ".join(map(str, SCORE_DTYPES))
            raise ValueError(f"scores_dtype: expected one of {expected}, got {scores_dtype!r}")
        number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if threshold is not None and not (number and 0 <= threshold <= 1):
            raise ValueError(f"threshold: expected a number from 0 to 1, got {threshold!r}")
        config = getattr(getattr(model, "module", model), "config", None)
        upsamples = bool(getattr(config, "upsamples_probabilities", False))
        return cls(threshold, scores_dtype if return_scores else None, upsamples, dtype)

    @property
    def probability(self) -> bool:
        """Return whether it needs the probability of every pixel's class."""
        return self.threshold is not None or self.dtype is not None

    def check(self, classes: int) -> None:
        """Raise where `labels` cannot hold so many classes, or a label is not apart from them."""
        if self.labels == torch.uint8 and classes > IGNORED + 1:
            raise ValueError(
                f"dtype: torch.uint8 tells {IGNORED + 1} classes apart, the model has {classes}"
            )
        if self.threshold is not None and classes > IGNORED:
            raise ValueError(
                f"threshold: expected a model of at most {IGNORED} classes, as {IGNORED} is the "
                f"label of pixels below it, got {classes}"
            )

    def finish(
        self, labels: torch.Tensor, probability: torch.Tensor | None, classes: int
    ) -> LabelMap:
        """`labels`, changed by the threshold, and scores of `dtype`.

        Args:
            labels: (H, W), the highest class; written to.
            probability: (H, W) of that class; of a model of one class of that class, whether it
                is there or not. None where `self.probability` is False.
        """
        if probability is None:
            return labels, None
        if classes == 1:
            if self.threshold is not None:
                labels = (probability > self.threshold).to(self.labels)
            probability = torch.where(labels == 1, probability, 1 - probability)
        elif self.threshold is not None:
            labels.masked_fill_(~(probability >= self.threshold), IGNORED)  # NaN is not certain
        if self.dtype is None:
            return labels, None
        if self.dtype == torch.uint8:
            probability = probability.nan_to_num(0.0).mul_(255).round_()
        return labels, probability.to(self.dtype)

"""What `evaluate` returns: the figures, as attributes, as a table and for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastseg.images.types import ImageInput

from .boundary import BoundaryF1
from .comparison import RESAMPLES, Comparison
from .confusion import Confusion, mean, ratio


@dataclass(frozen=True)
class PictureResult:
    """A picture with its label maps (H, W), and the IoU of each class there."""

    name: str
    iou: np.ndarray  # (K,), nan of classes in neither map
    image: ImageInput
    truth: np.ndarray
    predicted: np.ndarray

    @property
    def mean_iou(self) -> float:
        """Mean over the classes in either map."""
        return mean(self.iou)


@dataclass(frozen=True)
class Evaluation:
    """Figures of a model on a data set; `print` it for a table.

    Args:
        confusion: pixels by (true, predicted) class, with all that is computed of them.
        names: of the classes, by number.
        pictures: how many were evaluated.
        settings: how it was done: mode, tta, ignore_index, reduce_labels, dtype, device.
        seconds: by stage: reading (waiting for pictures), segmenting, counting.
        boundary: where it was asked for, with `f1` of each class and `mean_f1`.
        worst: pictures of the lowest mean IoU, the lowest first.
        against: the same of the other model, and `comparison` of both.
        remarks: what people should know who read the figures.
    """

    confusion: Confusion
    names: Sequence[str]
    pictures: int
    settings: Mapping[str, object]
    seconds: Mapping[str, float]
    boundary: BoundaryF1 | None = None
    worst: Sequence[PictureResult] = ()
    against: Evaluation | None = None
    comparison: Comparison | None = None
    remarks: Sequence[str] = ()

    @property
    def mean_iou(self) -> float:
        """Mean of `iou` over the classes that are in the true or in the predicted maps."""
        return self.confusion.mean_iou

    @property
    def iou(self) -> np.ndarray:
        """Intersection over union of each class, (K,) float64; nan where it is in neither map."""
        return self.confusion.iou

    @property
    def pixel_accuracy(self) -> float:
        """Share of the labelled pixels that are right."""
        return self.confusion.pixel_accuracy

    @property
    def mean_accuracy(self) -> float:
        """Mean over classes of the share of their pixels that are right."""
        return self.confusion.mean_accuracy

    @property
    def frequency_weighted_iou(self) -> float:
        """Mean of `iou` weighted by the pixels of each class."""
        return self.confusion.frequency_weighted_iou

    @property
    def absent(self) -> list[str]:
        """Names of the classes in neither map, which have no part in means."""
        return [
            name for name, union in zip(self.names, self.confusion.union, strict=True) if not union
        ]

    def to_dict(self) -> dict[str, object]:
        """Everything but the pictures, of JSON types alone; what is not defined is None."""
        confusion = self.confusion
        found: dict[str, Any] = {
            "pictures": self.pictures,
            "pixels": int(confusion.matrix.sum()),
            "ignored_pixels": confusion.ignored,
            **{name: _plain(getattr(confusion, name)) for name in _FIGURES},
            "absent_classes": self.absent,
        }
        columns = {
            "iou": confusion.iou,
            "accuracy": confusion.accuracy,
            "pixels": confusion.truth,
            "predicted_pixels": confusion.predicted,
        }
        if self.boundary is not None:
            found["mean_boundary_f1"] = _plain(self.boundary.mean_f1)
            columns["boundary_f1"] = self.boundary.f1
        found["classes"] = [
            {"id": index, "name": name}
            | {column: _plain(values[index]) for column, values in columns.items()}
            for index, name in enumerate(self.names)
        ]
        found["confusion_matrix"] = confusion.matrix.tolist()
        found["settings"] = dict(self.settings)
        found["seconds"] = dict(self.seconds)
        if self.worst:
            found["worst"] = [{"name": p.name, "mean_iou": _plain(p.mean_iou)} for p in self.worst]
        if self.against is not None and self.comparison is not None:
            low, high = self.comparison.interval()
            found["against"] = {
                "difference_of_mean_iou": _plain(self.comparison.difference()),
                "interval": [_plain(low), _plain(high)],
                "equal_labels": self.comparison.equal_share,
                **self.against.to_dict(),
            }
        if self.remarks:
            found["remarks"] = list(self.remarks)
        return found

    def __str__(self) -> str:
        return "\n".join([*self._table(), "", *self._summary()])

    def _table(self) -> list[str]:
        columns = {
            "IoU": self.iou,
            "accuracy": self.confusion.accuracy,
            "share": ratio(self.confusion.truth, self.confusion.truth.sum()),
        }
        if self.boundary is not None:
            columns["border F1"] = self.boundary.f1
        if self.against is not None:
            columns["IoU of other"] = self.against.iou
            columns["difference"] = self.iou - self.against.iou
        wide = max(len("class"), *map(len, self.names))
        lines = [f"{'class, %':<{wide}}" + "".join(f"{name:>{len(name) + 4}}" for name in columns)]
        for index in np.flatnonzero(self.confusion.union).tolist():
            line = f"{self.names[index]:<{wide}}"
            for name, values in columns.items():
                sign = "+" if name == "difference" else ""
                line += f"{100 * values[index]:>{sign}{len(name) + 4}.2f}"
            lines.append(line)
        return lines

    def _summary(self) -> list[str]:
        confusion = self.confusion
        pixels = int(confusion.matrix.sum()) + confusion.ignored
        figures = {
            f"mIoU, mean of {len(self.names) - len(self.absent)} classes": self.mean_iou,
            "pixel accuracy": self.pixel_accuracy,
            "mean accuracy": self.mean_accuracy,
            "frequency-weighted IoU": self.frequency_weighted_iou,
        }
        if self.boundary is not None:
            figures["boundary F1"] = self.boundary.mean_f1
        lines = [f"{name:<32}{_percent(value):>9}" for name, value in figures.items()]
        lines.append(
            f"of {self.pictures} pictures, with {_percent(confusion.ignored / pixels)} of their "
            "pixels ignored"
        )
        if self.absent:
            named = ", ".join(self.absent[:_LISTED]) + (
                " ..." if len(self.absent) > _LISTED else ""
            )
            lines.append(f"in neither map, and in no mean: {len(self.absent)} classes: {named}")
        if self.against is not None and self.comparison is not None:
            low, high = self.comparison.interval()
            line = (
                f"the other: mIoU {_percent(self.against.mean_iou)}; "
                f"difference {100 * self.comparison.difference():+.3f}"
            )
            if not math.isnan(low):
                line += (
                    f", 95 % of {RESAMPLES} resamplings of the pictures between "
                    f"{100 * low:+.3f} and {100 * high:+.3f}"
                )
            lines.append(
                f"{line}; equal labels in {100 * self.comparison.equal_share:.4f} % of pixels"
            )
        return lines + list(self.remarks)


_FIGURES = ("mean_iou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou")
_LISTED = 8  # classes


def _plain(value: Any) -> Any:
    """A number for JSON, which has no nan."""
    number = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(number, float) and math.isnan(number) else number


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"

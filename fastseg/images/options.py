"""The options of the image processor: their defaults, what they may be, and the sizes they mean."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from .transforms import ValueScale

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Size = int | Sequence[int] | Mapping[str, int]

_SIZE_KEYS = (
    {"height", "width"},
    {"shortest_edge"},
    {"shortest_edge", "longest_edge"},
    {"max_height", "max_width"},
)


@dataclass
class ImageOptions:
    """Options of SegformerImageProcessor, checked and brought to one form on construction.

    Raises TypeError or ValueError, which name the option.
    """

    do_resize: bool = True
    size: dict[str, int] = field(default_factory=lambda: {"height": 512, "width": 512})
    resample: Image.Resampling = Image.Resampling.BILINEAR
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: float | list[float] = field(default_factory=lambda: list(IMAGENET_MEAN))
    image_std: float | list[float] = field(default_factory=lambda: list(IMAGENET_STD))
    do_reduce_labels: bool = False
    do_convert_rgb: bool | None = None

    def __post_init__(self) -> None:
        for name in ("do_resize", "do_rescale", "do_normalize", "do_reduce_labels"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")
        if not isinstance(self.do_convert_rgb, bool | None):
            raise TypeError(f"do_convert_rgb: expected a bool or None, got {self.do_convert_rgb!r}")
        self.size = parse_size(self.size)
        self.resample = _parse_resample(self.resample)
        self.rescale_factor = _parse_number(self.rescale_factor, "rescale_factor")
        self.image_mean = _parse_channel_values(self.image_mean, "image_mean")
        self.image_std = _parse_channel_values(self.image_std, "image_std")
        std = self.image_std if isinstance(self.image_std, list) else [self.image_std]
        if 0.0 in std:
            raise ValueError(f"image_std: expected values other than zero, got {self.image_std}")
        if self.channels is not None and len(set(self._channel_counts())) > 1:
            raise ValueError(
                "image_mean and image_std: expected one value for each channel in both, "
                f"got {self.image_mean} and {self.image_std}"
            )

    def _channel_counts(self) -> list[int]:
        both = (self.image_mean, self.image_std)
        return [len(values) for values in both if isinstance(values, list)]

    @property
    def value_scale(self) -> ValueScale:
        """Rescaling and normalizing of values, as far as they are asked for."""
        return ValueScale(
            self.rescale_factor if self.do_rescale else None,
            self.image_mean if self.do_normalize else None,
            self.image_std if self.do_normalize else None,
        )

    @property
    def channels(self) -> int | None:
        """The number of channels that normalization calls for; None where any will do."""
        counts = self._channel_counts() if self.do_normalize else []
        return counts[0] if counts else None


def parse_size(size: Any) -> dict[str, int]:
    """The dict form of `size`: n is n x n, a pair is (height, width), a dict is checked."""
    if isinstance(size, numbers.Integral):
        size = {"height": size, "width": size}
    elif isinstance(size, Sequence) and not isinstance(size, str) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    if not isinstance(size, Mapping) or set(size) not in _SIZE_KEYS:
        forms = ", ".join("{" + ", ".join(sorted(keys)) + "}" for keys in _SIZE_KEYS)
        raise ValueError(
            f"size: expected an int, a pair (height, width) or a dict with the keys of one of "
            f"{forms}; got {size!r}"
        )
    for key, value in size.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"size: expected a positive int for {key}, got {value!r}")
    return {key: int(value) for key, value in size.items()}


def resized_size(size: Mapping[str, int], height: int, width: int) -> tuple[int, int]:
    """(height, width) that an image of this height and width is resized to.

    `shortest_edge` and `max_height` / `max_width` keep the aspect ratio; `longest_edge` bounds
    the longer side. Fractions are cut off as in transformers, yet no side falls under 1 pixel.
    """
    if "height" in size:
        return size["height"], size["width"]
    if "max_height" in size:
        scale = min(size["max_height"] / height, size["max_width"] / width)
        return max(1, int(height * scale)), max(1, int(width * scale))
    short, long = min(height, width), max(height, width)
    wanted: float = size["shortest_edge"]
    new_short = size["shortest_edge"]
    if "longest_edge" in size and long / short * wanted > size["longest_edge"]:
        wanted = size["longest_edge"] * short / long
        new_short = round(wanted)
    # An image whose short side already fits is left alone, even if rounding would move the long.
    new_long = long if new_short == short and "longest_edge" in size else int(wanted * long / short)
    new_short, new_long = max(1, new_short), max(1, new_long)
    return (new_short, new_long) if height <= width else (new_long, new_short)


def _parse_resample(resample: Any) -> Image.Resampling:
    if not isinstance(resample, int) or isinstance(resample, bool):
        raise TypeError(f"resample: expected an int or PIL.Image.Resampling, got {resample!r}")
    try:
        return Image.Resampling(resample)
    except ValueError:
        known = ", ".join(f"{item.value} ({item.name})" for item in Image.Resampling)
        raise ValueError(f"resample: expected one of {known}; got {resample}") from None


def _parse_number(value: Any, name: str) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)


def _parse_channel_values(values: Any, name: str) -> float | list[float]:
    if isinstance(values, numbers.Real):
        return _parse_number(values, name)
    if isinstance(values, str | Mapping) or not hasattr(values, "__len__") or len(values) == 0:
        raise TypeError(f"{name}: expected a number or one for each channel, got {values!r}")
    return [_parse_number(value, name) for value in values]

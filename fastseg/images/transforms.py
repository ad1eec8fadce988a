"""The arithmetic between an image and the tensor of a model: resize, rescale, normalize.

Every result equals, bit for bit, that of transformers' PIL image processor: the same resampling
of bytes by PIL, the same order of operations, the same intermediate types. After a resize there
are only 256 values, so the rest is worked out once for each and looked up for every pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass
class Pixels:
    """(H, W, C) values; `unit`: they stood in [0, 1] and are now held as bytes, 255 times that."""

    values: np.ndarray
    unit: bool = False


def resize_image(
    image: Image.Image | np.ndarray, size: tuple[int, int], resample: Image.Resampling, name: str
) -> Pixels:
    """Resample to size (height, width), as bytes.

    Arrays of other types than uint8 must hold whole numbers in [0, 255] or any in [0, 1], as in
    transformers, or ValueError is raised. More than 4 channels are resized one by one.
    """
    unit = False
    if isinstance(image, np.ndarray):
        array, unit = _to_bytes(image, name)
        if array.shape[-1] > 4:
            bands = [
                Image.fromarray(np.ascontiguousarray(array[..., band]))
                for band in range(array.shape[-1])
            ]
            resized = [np.asarray(band.resize((size[1], size[0]), resample)) for band in bands]
            return Pixels(np.stack(resized, axis=-1), unit)
        array = array[..., 0] if array.shape[-1] == 1 else array
        image = Image.fromarray(np.ascontiguousarray(array))
    values = np.asarray(image.resize((size[1], size[0]), resample))
    return Pixels(values[..., None] if values.ndim == 2 else values, unit)


@dataclass
class ValueScale:
    """Scale of pixel values for the model: times `factor`, less `mean`, over `std`; None skips."""

    factor: float | None
    mean: float | list[float] | None
    std: float | list[float] | None

    def apply(self, values: np.ndarray, unit: bool = False) -> np.ndarray:
        """Scale values (..., C)."""
        if unit:
            values = _times(values, 1 / 255)
        if self.factor is not None:
            values = _times(values, self.factor)
        if self.mean is not None:
            if values.dtype.kind != "f":
                values = values.astype(np.float32)
            mean = np.asarray(self.mean, dtype=values.dtype)
            values = (values - mean) / np.asarray(self.std, dtype=values.dtype)
        return values

    def by_channel(self, channels: int) -> tuple[list[float], list[float]]:
        """By channel, what values are multiplied with and what is added."""
        std = np.ones(channels) * (1 if self.std is None else self.std)
        mean = np.zeros(channels) + (0 if self.mean is None else self.mean)
        return ((1 if self.factor is None else self.factor) / std).tolist(), (-mean / std).tolist()

    def dtype(self, pixels: Pixels) -> np.dtype:
        """The type `apply` gives for these pixels."""
        return self.apply(pixels.values[:1, :1], pixels.unit).dtype

    def write(self, pixels: Pixels, out: np.ndarray) -> None:
        """Write scaled values into `out` (H, W, C), whatever its strides."""
        if pixels.values.dtype != np.uint8:
            out[...] = self.apply(pixels.values, pixels.unit)
            return
        channels = pixels.values.shape[-1]
        every_byte = np.repeat(np.arange(256, dtype=np.uint8)[:, None], channels, axis=1)
        table = self.apply(every_byte, pixels.unit).astype(out.dtype)
        for channel in range(channels):
            # "clip" lets take write straight into out; no index is out of range.
            np.take(
                np.ascontiguousarray(table[:, channel]),
                pixels.values[..., channel],
                out=out[..., channel],
                mode="clip",
            )


def resize_label_map(label_map: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
    """Nearest neighbour, from (H, W) to `size` (height, width); any label that fits 32 bits."""
    if label_map.dtype != np.uint8:
        limits = np.iinfo(np.int32)
        low, high = label_map.min(), label_map.max()
        if low < limits.min or high > limits.max:
            raise ValueError(f"{name}: expected labels of at most 32 bits, got [{low}, {high}]")
        label_map = label_map.astype(np.int32)
    image = Image.fromarray(np.ascontiguousarray(label_map))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.NEAREST))


def reduce_labels(label_map: np.ndarray) -> np.ndarray:
    """Reduce int64 labels by one; 0, the background, becomes 255, as do those ignored already: 255
    and negative ones, such as -1 and -100.
    """
    return np.where((label_map <= 0) | (label_map == 255), 255, label_map - 1)


def _to_bytes(array: np.ndarray, name: str) -> tuple[np.ndarray, bool]:
    """uint8, and whether values in [0, 1] were multiplied by 255 to get there."""
    if array.dtype == np.uint8:
        return array, False
    low, high = array.min(), array.max()
    whole = low >= 0 and high <= 255 and np.allclose(array, array.astype(np.int64))
    if whole:
        return array.astype(np.uint8), False
    if low >= 0 and high <= 1:
        return _times(array, 255).astype(np.uint8), True
    advice = "; of 16 bits divide by 257, of 12 bits by 16" if array.dtype == np.uint16 else ""
    raise ValueError(
        f"{name}: expected whole numbers in [0, 255] or values in [0, 1] to resize, "
        f"got values in [{low}, {high}] of dtype {array.dtype}{advice}"
    )


def _times(values: np.ndarray, factor: float) -> np.ndarray:
    return (values.astype(np.float64) * factor).astype(np.float32)

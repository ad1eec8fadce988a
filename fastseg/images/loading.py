"""From an image or a label map to the array that a model takes, by the options of a processor."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from .inputs import read_image, read_label_map, why_out_of_range
from .options import ImageOptions, resized_size
from .transforms import Pixels, reduce_labels, resize_image, resize_label_map


def load(image: Any, name: str, options: ImageOptions, input_data_format: str | None) -> Pixels:
    """Load one image, resized where that is asked for."""
    loaded = read_image(
        image,
        name,
        channels=options.channels,
        convert_rgb=options.do_convert_rgb,
        input_data_format=input_data_format,
        floats=not options.do_rescale,
    )
    if options.do_rescale:
        reason = why_out_of_range(loaded, options.rescale_factor, options.do_resize)
        if reason is not None:
            warnings.warn(f"{name}: {reason}", stacklevel=4)
    if not options.do_resize:
        return Pixels(np.asarray(loaded))
    height, width = loaded.shape[:2] if isinstance(loaded, np.ndarray) else loaded.size[::-1]
    return resize_image(loaded, resized_size(options.size, height, width), options.resample, name)


def load_labels(label_map: Any, name: str, options: ImageOptions) -> np.ndarray:
    """Read one label map as int64, resized and reduced where that is asked for."""
    labels = read_label_map(label_map, name)
    ignored = labels == 255
    if ignored.any() and (ignored | (labels == 0)).all() and not ignored.all():
        warnings.warn(
            f"{name}: holds 0 and 255 alone, and training leaves out 255; where it is the second "
            "class, give labels of 0 and 1",
            stacklevel=4,
        )
    if options.do_resize:
        labels = resize_label_map(labels, resized_size(options.size, *labels.shape), name)
    labels = labels.astype(np.int64)
    return reduce_labels(labels) if options.do_reduce_labels else labels


def scale_all(
    pixels: list[Pixels], options: ImageOptions, channels_last: bool, stacked: bool
) -> np.ndarray | list[np.ndarray]:
    """Rescale and normalize, into one array (B, ...) if `stacked`, else into one each."""
    scale = options.value_scale
    shapes: list[tuple[int, ...]] = []
    for item in pixels:
        height, width, channels = item.values.shape
        shapes.append((height, width, channels) if channels_last else (channels, height, width))
    dtypes = [scale.dtype(item) for item in pixels]
    outs: np.ndarray | list[np.ndarray]
    if stacked:
        check_equal("images", shapes)
        outs = np.empty((len(pixels), *shapes[0]), dtype=np.result_type(*dtypes))
    else:
        outs = [np.empty(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    for item, out in zip(pixels, outs, strict=True):
        scale.write(item, out if channels_last else np.moveaxis(out, 0, -1))
    return outs


def check_equal(argument: str, shapes: list[tuple[int, ...]]) -> None:
    for i, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ValueError(
                f"{argument}: expected equal sizes to make one batch, got {shapes[0]} of the "
                f"first and {shape} of number {i}; resize them, or pass return_tensors=None"
            )

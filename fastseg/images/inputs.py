"""Images and label maps as users hand them over, brought to one form.

Single or batched, nested or not, PIL, NumPy or torch, channels first or last: out come lists of
(H, W, C) images and of (H, W) label maps. Nothing given is ever written to.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image

from .modes import to_8_bits, to_rgb
from .types import ImageInput

_GREY = ("1", "P", "PA", "LA", "La")  # modes of PIL that may be grey, and are not as they stand
CHANNELS_FIRST, CHANNELS_LAST = "channels_first", "channels_last"


def flatten_images(images: Any, argument: str = "images", ndim: int = 3) -> list[ImageInput]:
    """A flat list of single images from an image, a batch, or (nested) lists of these.

    `ndim` is that of one array with its channels: 3 for images (where 2, a grey image, passes
    too), 2 for label maps (where 3 passes for one read with its colours, (H, W, 1 to 4)). An array
    of one dimension more is a batch, of label maps of two more too.
    Raises TypeError for other types, ValueError for other dimensions and for no image at all.
    """
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, np.ndarray | torch.Tensor):
        shape = tuple(images.shape)
        banded = (
            ndim == 2 and len(shape) == 3 and shape[2] in (1, 2, 3, 4) and shape[2] < min(shape[:2])
        )
        if len(shape) in (2, ndim) or banded:
            return [images]
        if len(shape) not in (3, 4):
            raise ValueError(f"{argument}: expected 2 to 4 dimensions, got shape {shape}")
        images = list(images)
    if not isinstance(images, list | tuple):
        is_path = isinstance(images, str | os.PathLike)
        raise TypeError(
            f"{argument}: expected a PIL image, a NumPy array, a torch tensor, or a list of them, "
            f"got {type(images).__name__}{'; open it by PIL.Image.open first' if is_path else ''}"
        )
    if not images:
        raise ValueError(f"{argument}: expected at least one, got none")
    return [single for item in images for single in flatten_images(item, argument, ndim)]


def channels_last(
    image: ImageInput, name: str, input_data_format: str | None, channels: int | None
) -> Image.Image | np.ndarray:
    """One image as (H, W, C), or the PIL image as it is.

    Where `input_data_format` is None, the channels are at the end that is `channels` long, or that
    is 1, 3 or 4 long where `channels` is None or one of these, which may be converted.
    Raises TypeError or ValueError: no image, or channels that may be at both ends or at none.
    """
    if isinstance(image, Image.Image):
        _check_pixels(name, image.height, image.width)
        return image
    array = _as_numpy(image, name)
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3:
        axis = _channel_axis(array.shape, name, input_data_format, channels)
        array = np.moveaxis(array, axis, -1)
    else:
        raise ValueError(f"{name}: expected 2 or 3 dimensions, got shape {array.shape}")
    _check_pixels(name, *array.shape[:2])
    return array


def read_image(
    image: ImageInput,
    name: str,
    *,
    channels: int | None,
    convert_rgb: bool | None,
    input_data_format: str | None,
    floats: bool = False,
) -> Image.Image | np.ndarray:
    """Read one image as (H, W, C): a PIL image of mode RGB as it came, or else an array.

    channels: how many the image must have; None takes any number.
    convert_rgb: None converts to RGB where `channels` is 3 and the image has another number,
    alpha dropped; True converts any image, alpha laid over white; False converts none.
    floats: a PIL image of mode F stays as it is; it becomes 8 bits, as of I and I;16, otherwise.
    Raises ValueError for channels that do not fit, pixels that are not finite, empty images.
    """
    wants_rgb = convert_rgb or (convert_rgb is None and channels == 3)
    found = channels_last(image, name, input_data_format, channels)
    if isinstance(found, Image.Image):
        if found.mode != "F" or not floats:
            found = to_8_bits(found, name)
            if wants_rgb:
                found = to_rgb(found, over_white=convert_rgb is True)
            elif (
                convert_rgb is None and channels == 1 and found.mode in ("1", "P", "PA", "LA", "La")
            ):
                found = to_rgb(found).convert("L")
        if found.mode == "RGB" and channels in (None, 3):
            return found
        array = np.asarray(found)
        array = array[..., None] if array.ndim == 2 else array
    else:
        array = found
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite pixels, got NaN or infinity among them")
    if wants_rgb and array.shape[-1] in (1, 2, 4):
        array = _array_to_rgb(array, name, over_white=convert_rgb is True)
    if channels is not None and array.shape[-1] != channels:
        raise ValueError(
            f"{name}: expected {channels} channels, as many as image_mean and image_std have, "
            f"got {array.shape[-1]}"
        )
    return array


def read_label_map(label_map: ImageInput, name: str) -> np.ndarray:
    """Read one label map as an (H, W) array of integers, of whatever type; perhaps not a copy.

    From a PIL image (indices of a palette stay indices) or an array of integers or of floats with
    whole values, of one band or of equal ones, with or without alpha that is the same everywhere.
    Raises TypeError or ValueError for anything else.
    """
    is_pil = isinstance(label_map, Image.Image)
    array = np.asarray(label_map) if is_pil else _as_numpy(label_map, name)
    if array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(
            f"{name}: expected one label for each pixel, (height, width), got shape {array.shape}"
        )
    if array.ndim == 3:
        has_alpha = array.shape[2] in (2, 4)
        bands = array[..., :-1] if has_alpha else array
        alpha = array[..., -1] if has_alpha else np.zeros(1)
        if (bands != bands[..., :1]).any() or (alpha != alpha.flat[0]).any():
            raise ValueError(
                f"{name}: expected one label for each pixel, (height, width), got shape "
                f"{array.shape} with bands that differ, as in a mask of colours: put the class "
                "number of each colour in its place first"
            )
        array = bands[..., 0]
    if array.dtype.kind == "f" and not (np.isfinite(array) & (array == np.trunc(array))).all():
        raise ValueError(f"{name}: expected whole numbers, got fractions, NaN or infinity")
    return array


def is_unit(image: Any) -> bool:
    """Return whether this is an array of floats in [0, 1], not all of them 0."""
    if not isinstance(image, np.ndarray) or image.dtype.kind != "f":
        return False
    return bool(image.min() >= 0 and 0 < image.max() <= 1)


def why_out_of_range(image: Image.Image | np.ndarray, factor: float, resize: bool) -> str | None:
    """What is wrong with pixels that are multiplied by `factor`, where something plainly is.

    resize: they are resized before, which refuses values outside [0, 255] by itself.
    """
    if is_unit(image):
        return "the values are in [0, 1] already and will be rescaled again; pass do_rescale=False"
    if resize or not isinstance(image, np.ndarray) or image.dtype == np.uint8:
        return None
    low, high = float(image.min()), float(image.max())
    largest = max(-low, high) * factor
    found = f"the values are in [{low:g}, {high:g}] and are multiplied by rescale_factor={factor:g}"
    if largest > 3:
        return (
            f"{found}: scale them to [0, 255], or use an image processor with a rescale_factor "
            "for their range"
        )
    if image.dtype.kind == "f" and low < 0 and largest < 0.1:
        return (
            f"{found}: where they are normalized already, use an image processor with "
            "do_rescale=False and do_normalize=False"
        )
    return None


def _check_pixels(name: str, height: int, width: int) -> None:
    if height == 0 or width == 0:
        raise ValueError(f"{name}: expected at least one pixel, got {height} x {width}")


def _as_numpy(image: Any, name: str) -> np.ndarray:
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        # NumPy has no bfloat16; float32 holds every value of it.
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    if image.dtype.kind not in "buif":
        raise TypeError(f"{name}: expected bools, integers or floats, got dtype {image.dtype}")
    return image


def _channel_axis(
    shape: tuple[int, ...], name: str, input_data_format: str | None, channels: int | None
) -> int:
    """The channels' axis, 0 or 2: by `input_data_format`, or by which end has their length."""
    if input_data_format == CHANNELS_FIRST:
        return 0
    if input_data_format == CHANNELS_LAST:
        return 2
    lengths = (1, 3, 4) if channels in (None, 1, 3, 4) else (channels,)
    first, last = (shape[axis] in lengths for axis in (0, 2))
    if first == last:
        wanted = "1, 3 or 4" if len(lengths) > 1 else channels
        ends = "both ends could be" if first else "neither end is"
        raise ValueError(
            f"{name}: expected {wanted} channels in the first or the last dimension, but {ends} "
            f"the channels of shape {tuple(shape)}; pass input_data_format='{CHANNELS_FIRST}' or "
            f"'{CHANNELS_LAST}'"
        )
    return 0 if first else 2


def _array_to_rgb(array: np.ndarray, name: str, over_white: bool) -> np.ndarray:
    """(H, W, 3) from grey (1 channel), grey + alpha (2) or RGBA (4)."""
    colour = array[..., :1] if array.shape[-1] < 3 else array[..., :3]
    if over_white and array.shape[-1] in (2, 4):
        white = 1.0 if array.dtype.kind == "f" else 255
        if array.min() < 0 or array.max() > white:
            raise ValueError(
                f"{name}: expected values in [0, {white:g}] to lay alpha over white, "
                f"got [{array.min()}, {array.max()}]"
            )
        alpha = array[..., -1:] / white
        blend = alpha * colour + (1 - alpha) * white
        colour = (blend if array.dtype.kind == "f" else np.round(blend)).astype(array.dtype)
    return np.repeat(colour, 3, axis=-1) if colour.shape[-1] == 1 else colour

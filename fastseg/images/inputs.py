"""Images and label maps as users hand them over, brought to one form.

Single or batched, nested or not, PIL, NumPy or torch, channels first or last: out come lists of
(H, W, C) images and of (H, W) label maps. Nothing given is ever written to.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

SingleImage = Image.Image | np.ndarray | torch.Tensor

CHANNELS_FIRST, CHANNELS_LAST = "channels_first", "channels_last"


def flatten_images(images: Any, argument: str = "images", ndim: int = 3) -> list[SingleImage]:
    """A flat list of single images from an image, a batch, or (nested) lists of these.

    `ndim` is that of one array with its channels: 3 for images (where 2, a grey image, passes
    too), 2 for label maps. An array of one dimension more is a batch.
    Raises TypeError for other types, ValueError for other dimensions and for no image at all.
    """
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, np.ndarray | torch.Tensor):
        if images.ndim == ndim or (images.ndim == 2 and ndim == 3):
            return [images]
        if images.ndim != ndim + 1:
            raise ValueError(
                f"{argument}: expected {2 if ndim == 3 else ndim} to {ndim + 1} dimensions, "
                f"got shape {tuple(images.shape)}"
            )
        images = list(images)
    if not isinstance(images, list | tuple):
        raise TypeError(
            f"{argument}: expected a PIL image, a NumPy array, a torch tensor, or a list of them, "
            f"got {type(images).__name__}"
        )
    if not images:
        raise ValueError(f"{argument}: expected at least one, got none")
    return [single for item in images for single in flatten_images(item, argument, ndim)]


def image_size(image: SingleImage, input_data_format: str | None = None) -> tuple[int, int]:
    """(height, width) of one image, its channels found as the image processor finds them."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    if not isinstance(image, np.ndarray | torch.Tensor):
        raise TypeError(
            "image: expected a PIL image, a NumPy array or a torch tensor, "
            f"got {type(image).__name__}"
        )
    shape = list(image.shape)
    if len(shape) not in (2, 3):
        raise ValueError(f"image: expected 2 or 3 dimensions, got shape {tuple(shape)}")
    if len(shape) == 3:
        del shape[_channel_axis(tuple(shape), "image", input_data_format)]
    return shape[0], shape[1]


def read_image(
    image: SingleImage,
    name: str,
    *,
    channels: int | None,
    convert_rgb: bool | None,
    input_data_format: str | None,
) -> Image.Image | np.ndarray:
    """Read one image as (H, W, C): a PIL image of mode RGB as it came, or else an array.

    channels: how many the image must have; None takes any number.
    convert_rgb: None converts to RGB where `channels` is 3 and the image has another number,
    alpha dropped; True converts any image, alpha laid over white; False converts none.
    Raises ValueError for channels that do not fit, pixels that are not finite, empty images.
    """
    to_rgb = convert_rgb or (convert_rgb is None and channels == 3)
    if isinstance(image, Image.Image):
        _check_pixels(name, image.height, image.width)
        if to_rgb:
            image = _pil_to_rgb(image, over_white=convert_rgb is True)
        if isinstance(image, Image.Image) and image.mode == "RGB" and channels in (None, 3):
            return image
        array = np.asarray(image)
        array = array[..., None] if array.ndim == 2 else array
    else:
        array = _as_numpy(image, name)
        if array.ndim == 2:
            array = array[..., None]
        elif array.ndim == 3:
            array = np.moveaxis(array, _channel_axis(array.shape, name, input_data_format), -1)
        else:
            raise ValueError(f"{name}: expected 2 or 3 dimensions, got shape {array.shape}")
        _check_pixels(name, *array.shape[:2])
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite pixels, got NaN or infinity among them")
    if to_rgb and array.shape[-1] in (1, 2, 4):
        array = _array_to_rgb(array, name, over_white=convert_rgb is True)
    if channels is not None and array.shape[-1] != channels:
        raise ValueError(
            f"{name}: expected {channels} channels, as many as image_mean and image_std have, "
            f"got {array.shape[-1]}"
        )
    return array


def read_label_map(label_map: SingleImage, name: str) -> np.ndarray:
    """Read one label map as an (H, W) array of integers, of whatever type; perhaps not a copy.

    From a PIL image of one band (indices of a palette stay indices), or a 2-D array of integers
    or of floats with whole values. Raises TypeError or ValueError for anything else.
    """
    is_pil = isinstance(label_map, Image.Image)
    array = np.asarray(label_map) if is_pil else _as_numpy(label_map, name)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(
            f"{name}: expected one label for each pixel, (height, width), got shape {array.shape}"
        )
    if array.dtype.kind == "f" and not (np.isfinite(array) & (array == np.trunc(array))).all():
        raise ValueError(f"{name}: expected whole numbers, got fractions, NaN or infinity")
    return array


def looks_rescaled(image: Image.Image | np.ndarray) -> bool:
    """Return whether the pixels are floats that already lie in [0, 1]."""
    if not isinstance(image, np.ndarray) or image.dtype.kind != "f":
        return False
    return bool(image.min() >= 0 and 0 < image.max() <= 1)


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


def _channel_axis(shape: tuple[int, ...], name: str, input_data_format: str | None) -> int:
    """The channels' axis, 0 or 2: by `input_data_format`, or by which end is 1, 3 or 4 long."""
    if input_data_format == CHANNELS_FIRST:
        return 0
    if input_data_format == CHANNELS_LAST:
        return 2
    first, last = (shape[axis] in (1, 3, 4) for axis in (0, 2))
    if first == last:
        ends = "both ends could be" if first else "neither end is"
        raise ValueError(
            f"{name}: expected 1, 3 or 4 channels in the first or the last dimension, but {ends} "
            f"the channels of shape {tuple(shape)}; pass input_data_format='{CHANNELS_FIRST}' or "
            f"'{CHANNELS_LAST}'"
        )
    return 0 if first else 2


def _pil_to_rgb(image: Image.Image, over_white: bool) -> Image.Image | np.ndarray:
    """Convert to RGB; or, for the modes of more than 8 bits, to a grey array (H, W, 1)."""
    if image.mode.startswith("I;16"):
        # PIL would cut every value over 255 down to white.
        return ((np.asarray(image).astype(np.uint32)[..., None] + 128) // 257).astype(np.uint8)
    if image.mode in ("I", "F"):
        return np.asarray(image)[..., None]
    transparent = "A" in image.getbands() or "transparency" in image.info
    if transparent and (over_white or image.mode != "RGB"):
        image = image.convert("RGBA")
        if over_white:
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


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

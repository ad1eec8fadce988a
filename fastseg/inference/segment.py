"""`segment`: from images to label maps at the images' own sizes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from fastseg.images.inputs import flatten_images, image_size
from fastseg.images.label_maps import logits_of
from fastseg.images.processor import SegformerImageProcessor
from fastseg.kernels import upsample_argmax

from .sliding import sliding_labels, window_pair


def segment(
    model: Any,
    images: Any,
    *,
    processor: SegformerImageProcessor | None = None,
    batch_size: int = 8,
    slide: Sequence[int | Sequence[int]] | None = None,
) -> list[torch.Tensor]:
    """The class of every pixel of `images`.

    Args:
        model: a segmentation model in eval mode whose output is logits or has them: fastseg's,
            transformers', or another library's.
        images: an image, a batch or a list of images of any sizes: PIL, NumPy or torch, as
            SegformerImageProcessor takes them.
        processor: prepares the images; where None, the one saved beside the model's checkpoint,
            else one with the default options (512x512, ImageNet statistics).
        batch_size: images, or sliding windows, in one forward.
        slide: (crop, stride) in pixels, each a number or (height, width): the image is not resized
            but cut into overlapping windows, whose logits are averaged, as in mmseg. None to see
            the whole image at once, resized as `processor` says.

    Returns:
        a list with one (H, W) int64 label map for each image, on the model's device, H and W the
        image's own size. A model of one class (`num_labels == 1`) gives 1 where its logit is
        positive, else 0.

    Raises:
        TypeError, ValueError: as SegformerImageProcessor raises them, or `batch_size` or `slide` is
            wrong, or `model` is in training mode.
    """
    if model.training:
        raise ValueError("model: expected eval mode, got training mode; call model.eval() first")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected an integer of at least 1, got {batch_size!r}")
    windows = None
    if slide is not None:
        if not isinstance(slide, Sequence) or len(slide) != 2:
            raise ValueError(f"slide: expected (crop, stride), got {slide!r}")
        windows = window_pair("crop", slide[0]), window_pair("stride", slide[1])
    if processor is None:
        processor = saved_processor(model)
    labels: list[torch.Tensor] = []
    with torch.no_grad():
        for image_batch in _batches(flatten_images(images), batch_size):
            if windows is None:
                labels += _segment_batch(model, image_batch, processor)
                continue
            for image in image_batch:
                pixels, scale = _input(model, image, processor, do_resize=False)
                forward = functools.partial(model, **scale)
                labels.append(sliding_labels(forward, pixels, *windows, batch_size))
    return labels


def saved_processor(model: Any) -> SegformerImageProcessor:
    """The image processor saved beside the checkpoint that `model` came from, else the default.

    Where there was a checkpoint without one, a warning says so.
    """
    model = getattr(model, "module", model)  # inside DataParallel
    processor_class = getattr(model, "image_processor_class", SegformerImageProcessor)
    # fastseg's models know the file; of others the folder or the hub id is known.
    source = getattr(model, "preprocessor_file", None) or getattr(model, "name_or_path", "")
    if source:
        try:
            return processor_class.from_pretrained(source, local_files_only=True)
        except (FileNotFoundError, ImportError):
            warnings.warn(
                f"no preprocessor_config.json with {source}: images are prepared with the default "
                f"{processor_class.__name__}, at 512x512",
                stacklevel=3,  # the caller of segment
            )
    return processor_class()


def _batches(images: Sequence[Any], batch_size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(images), batch_size):
        yield images[start : start + batch_size]


class _Input(NamedTuple):
    """What a model is called with: pixels, and keyword arguments."""

    pixel_values: torch.Tensor
    scale: dict[str, torch.Tensor]


def _input(model: Any, image: Any, processor: Any, **options: Any) -> _Input:
    """The input that `processor` makes of `image`, on the model's device.

    A model that takes bytes gets them as they are after resizing, in a quarter of the memory, and
    rescales and normalizes them in its first op.
    """
    parameter = next(model.parameters())
    device = parameter.device
    found = None
    if getattr(model, "takes_bytes", False) and hasattr(processor, "bytes_and_scale"):
        found = processor.bytes_and_scale(image, **options)
    if found is not None:
        pixels = torch.from_numpy(np.array(found[0]))[None].to(device).permute(0, 3, 1, 2)
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        scale, offset = (torch.tensor(one, dtype=dtype, device=device) for one in found[1:])
        return _Input(pixels, {"pixel_scale": scale, "pixel_offset": offset})
    pixels = processor(image, return_tensors="pt", **options)["pixel_values"]
    return _Input(pixels.to(device=device, dtype=parameter.dtype), {})


def _segment_batch(
    model: Any, images: Sequence[Any], processor: SegformerImageProcessor
) -> list[torch.Tensor]:
    """Label maps of `images`: one forward where the processor makes them all one size."""
    prepared = [_input(model, image, processor) for image in images]
    by_shape: dict[Any, list[int]] = {}
    for index, one in enumerate(prepared):
        key = (one.pixel_values.shape, one.pixel_values.dtype)
        by_shape.setdefault(key, []).append(index)
    labels: dict[int, torch.Tensor] = {}
    for indices in by_shape.values():
        batch = torch.cat([prepared[index].pixel_values for index in indices])
        logits = logits_of(model(batch, **prepared[indices[0]].scale))
        for position, index in enumerate(indices):
            size = image_size(images[index])
            labels[index] = _label_map(logits[position : position + 1], size)
    return [labels[index] for index in range(len(images))]


def _label_map(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if logits.shape[1] > 1:
        return upsample_argmax(logits, size)[0]
    # One class: is it, or is it not.
    resized = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    return (resized[0, 0] > 0).long()

"""`segment`: from images to label maps, and scores, at the images' own sizes."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fastseg.images.inputs import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    channels_last,
    flatten_images,
    is_unit,
)
from fastseg.images.label_maps import logits_of
from fastseg.images.processor import SegformerImageProcessor
from fastseg.kernels import upsample_argmax, upsample_scores
from fastseg.kernels.labels.scores import highest_blend
from fastseg.models.seggpt.prompts import is_seggpt

from .augmented import Views, augmented_labels
from .prompted import segment_by_prompts
from .scores import LabelMap, Wanted
from .sliding import sliding_labels, window_pair


@overload
def segment(
    model: Any,
    images: Any,
    *,
    processor: SegformerImageProcessor | None = ...,
    batch_size: int = ...,
    slide: Sequence[int | Sequence[int]] | None = ...,
    tta: Sequence[str | float] | None = ...,
    input_data_format: str | None = ...,
    return_scores: Literal[False] = ...,
    scores_dtype: torch.dtype = ...,
    threshold: float | None = ...,
    prompts: Sequence[Any] | None = ...,
    num_labels: int | None = ...,
    embedding_type: str | None = ...,
    ensemble_rule: str = ...,
) -> list[torch.Tensor]: ...


@overload
def segment(
    model: Any,
    images: Any,
    *,
    processor: SegformerImageProcessor | None = ...,
    batch_size: int = ...,
    slide: Sequence[int | Sequence[int]] | None = ...,
    tta: Sequence[str | float] | None = ...,
    input_data_format: str | None = ...,
    return_scores: Literal[True],
    scores_dtype: torch.dtype = ...,
    threshold: float | None = ...,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]: ...


def segment(
    model: Any,
    images: Any,
    *,
    processor: SegformerImageProcessor | None = None,
    batch_size: int = 8,
    slide: Sequence[int | Sequence[int]] | None = None,
    tta: Sequence[str | float] | None = None,
    input_data_format: str | None = None,
    return_scores: bool = False,
    scores_dtype: torch.dtype = torch.float16,
    threshold: float | None = None,
    prompts: Sequence[Any] | None = None,
    num_labels: int | None = None,
    embedding_type: str | None = None,
    ensemble_rule: str = "painter",
) -> list[torch.Tensor] | tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The class of every pixel of `images`.

    Args:
        model: a segmentation model in eval mode whose output is logits or has them: fastseg's,
            transformers', or another library's.
        images: an image, a batch or a list of images of any sizes: PIL, NumPy or torch, as
            SegformerImageProcessor takes them. Floats in [0, 1] are taken for 255 times that where
            `processor` rescales.
        processor: prepares the images; where None, the one saved beside the model's checkpoint,
            else one with the default options (512x512, ImageNet statistics).
        batch_size: images, or sliding windows, in one forward.
        slide: (crop, stride) in pixels, each a number or (height, width): the image is not resized
            but cut into overlapping windows, whose logits are averaged, as in mmseg. None to see
            the whole image at once, resized as `processor` says.
        tta: test-time augmentation as in mmseg: "flip" and scales, such as ("flip", 0.75, 1.25).
            The image is seen at its own scale and at these, mirrored too with "flip", and the
            mean of the probabilities decides. Scales are of the size that `processor` makes, or
            with `slide` of the image's own.
        input_data_format: "channels_first" or "channels_last", of arrays; None finds the end that
            is as long as the processor's `image_mean`, or 1, 3 or 4 long.
        return_scores: give the probability of every pixel's label too: the softmax of its logits
            after upsampling, or after the mean over windows; with `upsamples_probabilities` in the
            model's configuration before both.
        scores_dtype: of these: torch.float16, torch.float32, or torch.uint8 for 255 times the
            probability, rounded.
        threshold: a probability. A pixel whose highest class has less gets the label 255, for
            none of them. With one class it takes the place of 1/2: the label is 1 where the
            class's probability is higher.
        prompts: of a SegGPT, which needs them: pairs (image, mask), the mask of class numbers
            with 0 as the background, or what `fastseg.keep_prompt` has made of them. With several
            each image is segmented once, by all of them.
        num_labels, embedding_type: of the prompts, as in `fastseg.keep_prompt`.
        ensemble_rule: of several prompts: "painter", as the authors of SegGPT wrote it, or
            "transformers", whose layer of the merge averages otherwise (docs/seggpt.md).

    A side that is too short for the model is padded to the least it takes, after normalizing, with
    zeros, below or to the right, as mmseg's data preprocessor pads; the padding is cut off again.

    Returns:
        a list with one (H, W) int64 label map for each image, on the model's device, H and W the
        image's own size. A model of one class (`num_labels == 1`) gives 1 where its logit is
        positive, else 0. With `return_scores` a pair of lists: the label maps, and as many scores
        (H, W) of `scores_dtype`: of the highest class, also where `threshold` put 255; with one
        class its sigmoid where the label is 1, and 1 less that where it is 0. No map of all
        classes is made at full size.

    Raises:
        TypeError, ValueError: as SegformerImageProcessor raises them, or `batch_size`, `slide`,
            `tta`, `input_data_format`, `scores_dtype` or `threshold` is wrong, or `model` is in
            training mode, or takes other channels than `processor` gives, or has more than 255
            classes and there is a `threshold`.
    """
    if prompts is not None:
        if slide is not None or tta is not None:
            raise ValueError("slide, tta: expected None with prompts, which are of whole images")
        if return_scores or threshold is not None:
            raise ValueError(
                "return_scores, threshold: expected neither with prompts: a SegGPT's classes are "
                "the nearest colours, which have no probabilities"
            )
        return segment_by_prompts(
            *(model, images, prompts),
            num_labels=num_labels,
            embedding_type=embedding_type,
            ensemble_rule=ensemble_rule,
            processor=processor,
            input_data_format=input_data_format,
        )
    if is_seggpt(model):
        raise ValueError("prompts: expected [(image, mask), ...] for a SegGPT, got None")
    if model.training:
        raise ValueError("model: expected eval mode, got training mode; call model.eval() first")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected an integer of at least 1, got {batch_size!r}")
    if input_data_format not in (None, CHANNELS_FIRST, CHANNELS_LAST):
        raise ValueError(
            f"input_data_format: expected None, {CHANNELS_FIRST!r} or {CHANNELS_LAST!r}, "
            f"got {input_data_format!r}"
        )
    wanted = Wanted.of(model, return_scores, scores_dtype, threshold)
    views = Views.of(tta)
    least = least_side(model)
    windows = None
    if slide is not None:
        if not isinstance(slide, Sequence) or len(slide) != 2:
            raise ValueError(f"slide: expected (crop, stride), got {slide!r}")
        windows = window_pair("crop", slide[0]), window_pair("stride", slide[1])
        if min(windows[0]) < least:
            raise ValueError(
                f"slide: expected a crop of at least {least} pixels for this model, "
                f"got {slide[0]!r}"
            )
    if processor is None:
        processor = saved_processor(model)
    channels = _channels(model, processor)
    prepare = functools.partial(_prepare, model, processor, input_data_format, channels, least)
    singles = flatten_images(images)
    found: list[LabelMap] = []
    with torch.no_grad():
        for start in range(0, len(singles), batch_size):
            indices = range(start, min(start + batch_size, len(singles)))
            if views is not None:
                for i in indices:
                    of_image = functools.partial(prepare, singles[i], i)
                    found.append(
                        augmented_labels(model, of_image, views, windows, batch_size, wanted)
                    )
                continue
            if windows is None:
                inputs = [prepare(singles[i], i) for i in indices]
                found += _segment_batch(model, inputs, wanted)
                continue
            for i in indices:
                one = prepare(singles[i], i, do_resize=False)
                forward = functools.partial(model, **one.scale)
                labels, scores = sliding_labels(
                    forward, one.pixel_values, *windows, batch_size, wanted
                )
                inside = tuple(slice(side) for side in one.size)
                found.append((labels[inside], None if scores is None else scores[inside]))
    all_labels = [labels for labels, _ in found]
    if not return_scores:
        return all_labels
    return all_labels, [scores for _, scores in found if scores is not None]


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
            if source == getattr(model, "name_or_path", "") and Path(source).is_file():
                raise FileNotFoundError(source)  # of weights
            return processor_class.from_pretrained(source, local_files_only=True)
        except (FileNotFoundError, ImportError):
            warnings.warn(
                f"no preprocessor_config.json with {source}: images are prepared with the default "
                f"{processor_class.__name__}, at 512x512",
                stacklevel=3,  # the caller of segment
            )
    return processor_class()


def least_side(model: Any) -> int:
    """The least height and width that give every stage a grid as large as its spatial reduction.

    1 for models whose configuration does not tell.
    """
    config = getattr(getattr(model, "module", model), "config", None)
    names = ("patch_sizes", "strides", "sr_ratios")
    stages = [getattr(config, name, None) for name in names]
    if not all(isinstance(values, Sequence) for values in stages):
        return 1

    def fits(side: int) -> bool:
        for patch_size, stride, reduction in zip(*stages, strict=True):
            side = (side + 2 * (patch_size // 2) - patch_size) // stride + 1
            if side < reduction:
                return False
        return True

    return next(side for side in itertools.count(1) if fits(side))


def _channels(model: Any, processor: Any) -> int | None:
    """How many channels an image has for the processor, or else for the model, where they tell."""
    mean = getattr(processor, "image_mean", None) if processor.do_normalize else None
    given = len(mean) if isinstance(mean, Sequence) else None
    config = getattr(getattr(model, "module", model), "config", None)
    taken = getattr(config, "num_channels", None)
    if given is not None and isinstance(taken, int) and given != taken:
        raise ValueError(
            f"processor: expected an image_mean and an image_std of {taken} values each, as many "
            f"as the model takes channels, got {given}"
        )
    return taken if given is None else given


class _Input(NamedTuple):
    """What a model is called with, pixels and keyword arguments, and the sizes of its image."""

    pixel_values: torch.Tensor  # (1, C, H, W), padded
    scale: dict[str, torch.Tensor]
    unpadded: tuple[int, int]
    size: tuple[int, int]  # as it was given


def _prepare(
    model: Any,
    processor: Any,
    input_data_format: str | None,
    channels: int | None,
    least: int,
    image: Any,
    index: int,
    **options: Any,
) -> _Input:
    """The input that `processor` makes of one image, on the model's device.

    A model that takes bytes gets them as they are after resizing, in a quarter of the memory, and
    rescales and normalizes them in its first op.
    """
    name = f"images[{index}]"
    image = channels_last(image, name, input_data_format, channels)
    size = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]
    if processor.do_rescale and is_unit(image):
        image = image.astype(np.float32) * 255
        if options.get("do_resize", processor.do_resize):
            image = np.rint(image).astype(np.uint8)
    if not isinstance(image, Image.Image):
        options["input_data_format"] = CHANNELS_LAST
    parameter = next(model.parameters())
    device = parameter.device
    try:
        found = None
        if getattr(model, "takes_bytes", False) and hasattr(processor, "bytes_and_scale"):
            found = processor.bytes_and_scale(image, **options)
        # Padding is 0 after normalizing, which no byte needs to be.
        if found is not None and min(found[0].shape[:2]) >= least:
            pixels = torch.from_numpy(np.array(found[0]))[None].to(device).permute(0, 3, 1, 2)
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            scale, offset = (torch.tensor(one, dtype=dtype, device=device) for one in found[1:])
            height, width = pixels.shape[2:]
            keywords = {"pixel_scale": scale, "pixel_offset": offset}
            return _Input(pixels, keywords, (height, width), size)
        pixels = processor(image, return_tensors="pt", **options)["pixel_values"]
    except (TypeError, ValueError) as error:
        error.args = (str(error).replace("images[0]", name), *error.args[1:])
        raise
    height, width = pixels.shape[2:]
    pixels = F.pad(pixels, (0, max(least - width, 0), 0, max(least - height, 0)))
    return _Input(pixels.to(device=device, dtype=parameter.dtype), {}, (height, width), size)


def _segment_batch(model: Any, inputs: Sequence[_Input], wanted: Wanted) -> list[LabelMap]:
    """Label maps of whole images: one forward where the processor makes them all one size."""
    by_shape: dict[Any, list[int]] = {}
    for index, one in enumerate(inputs):
        key = (one.pixel_values.shape, one.pixel_values.dtype)
        by_shape.setdefault(key, []).append(index)
    found: dict[int, LabelMap] = {}
    for indices in by_shape.values():
        batch = torch.cat([inputs[index].pixel_values for index in indices])
        logits = logits_of(model(batch, **inputs[indices[0]].scale))
        for position, index in enumerate(indices):
            found[index] = _label_map(logits[position : position + 1], inputs[index], wanted)
    return [found[index] for index in range(len(inputs))]


def _label_map(logits: torch.Tensor, one: _Input, wanted: Wanted) -> LabelMap:
    classes = logits.shape[1]
    wanted.check(classes)
    padded, (height, width) = one.pixel_values.shape[2:], one.unpadded
    if padded != (height, width):
        logits = F.interpolate(logits, size=padded, mode="bilinear", align_corners=False)
        logits = logits[:, :, :height, :width]
    probability = None
    if classes > 1:
        labels = upsample_argmax(logits, one.size)[0]
        if wanted.probability:
            highest = highest_blend if wanted.of_probabilities else upsample_scores
            probability = highest(logits, one.size)[0]
    else:  # is it, or is it not
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        resized = F.interpolate(logits, size=one.size, mode="bilinear", align_corners=False)[0, 0]
        labels = (resized > 0).long()
        if wanted.probability:
            probability = resized.sigmoid_()
    return wanted.finish(labels, probability, classes)

"""`segment` with prompts: masks of images from an example or several, by a SegGPT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastseg.images.inputs import (
    CHANNELS_LAST,
    channels_last,
    flatten_images,
    is_unit,
    read_label_map,
)
from fastseg.images.types import ImageInput
from fastseg.models.seggpt.layers import EMBEDDING_TYPES
from fastseg.models.seggpt.palette import colours_of, label_map
from fastseg.models.seggpt.processor import SegGptImageProcessor
from fastseg.models.seggpt.prompts import RULES, SegGptPrompt, is_seggpt, paint, streams_of

from .scores import Wanted


def keep_prompt(
    model: nn.Module,
    image: ImageInput,
    mask: ImageInput,
    *,
    num_labels: int | None = None,
    embedding_type: str | None = None,
    processor: SegGptImageProcessor | None = None,
) -> SegGptPrompt:
    """Prepare an image and its mask once, as a prompt for many calls of `segment`.

    Args:
        model: a SegGptForImageSegmentation in eval mode, of fastseg or of transformers.
        image: PIL, NumPy or torch, as SegGptImageProcessor takes it.
        mask: class numbers (H, W), 0 the background. Of a mask of 0 and 255 alone 255 is class 1.
        num_labels: classes beside the background; the largest number in the mask where None.
        embedding_type: "instance" or "semantic"; None is the model's own default.
        processor: prepares both; where None, the one saved beside the model's checkpoint, else one
            with the default options. With `do_convert_rgb=False` the mask is an image in colours,
            and label maps are their mean without `num_labels`.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    _check(model)
    if embedding_type is None:
        embedding_type = getattr(model, "default_embedding_type", EMBEDDING_TYPES[0])
    if embedding_type not in EMBEDDING_TYPES:
        raise ValueError(
            f"embedding_type: expected one of {', '.join(EMBEDDING_TYPES)}, got {embedding_type!r}"
        )
    processor = _processor_of(model) if processor is None else processor
    mask, most = read_mask(mask, processor)
    num_labels = most if num_labels is None else num_labels
    image, _ = _as_pixels(image, "image", processor)
    found = processor(
        prompt_images=image,
        prompt_masks=mask,
        num_labels=num_labels,
        size=_size(model),
        return_tensors="pt",
        input_data_format=CHANNELS_LAST,
    )
    prompt = SegGptPrompt(
        model, found["prompt_pixel_values"], found["prompt_masks"], num_labels, embedding_type
    )
    with torch.no_grad():
        prompt.streams()
    return prompt


def keep_prompts(
    model: Any,
    prompts: Sequence[Any],
    processor: Any,
    *,
    num_labels: int | None = None,
    embedding_type: str | None = None,
) -> list[SegGptPrompt]:
    """Prompts, or pairs (image, mask), of which are made prompts of the same classes.

    Raises:
        TypeError, ValueError: an argument is wrong, or the prompts differ in their kind.
    """
    _check(model)
    if isinstance(prompts, SegGptPrompt) or not isinstance(prompts, Sequence) or not prompts:
        raise ValueError(
            "prompts: expected a list of prompts of keep_prompt, or of pairs (image, mask), "
            f"got {prompts!r}"
        )
    if not isinstance(processor, SegGptImageProcessor):
        got = type(processor).__name__
        raise TypeError(f"processor: expected a SegGptImageProcessor, got {got}")
    for index, one in enumerate(prompts):
        if isinstance(one, SegGptPrompt):
            if one.model is not model:
                raise ValueError(f"prompts[{index}]: expected one of this model, got another's")
        elif not isinstance(one, Sequence) or len(one) != 2:
            raise ValueError(f"prompts[{index}]: expected (image, mask), got {one!r}")
    if num_labels is None:  # the largest number of all masks: colours depend on it
        counts = [
            one.num_labels if isinstance(one, SegGptPrompt) else read_mask(one[1], processor)[1]
            for one in prompts
        ]
        num_labels = max((count for count in counts if count is not None), default=None)
    kept = [
        one
        if isinstance(one, SegGptPrompt)
        else keep_prompt(
            model,
            *one,
            num_labels=num_labels,
            embedding_type=embedding_type,
            processor=processor,
        )
        for one in prompts
    ]
    for name in ("num_labels", "embedding_type"):
        values = [getattr(one, name) for one in kept]
        if len({*values}) > 1:
            raise ValueError(f"prompts: expected the same {name} of all, got {values}")
    return kept


def segment_by_prompts(
    model: Any,
    images: Any,
    prompts: Sequence[Any],
    *,
    num_labels: int | None = None,
    embedding_type: str | None = None,
    ensemble_rule: str = RULES[0],
    processor: Any = None,
    input_data_format: str | None = None,
    dtype: torch.dtype = torch.int64,
) -> list[torch.Tensor]:
    """Label maps of images by prompts: see `segment`."""
    _check(model)
    if ensemble_rule not in RULES:
        raise ValueError(
            f"ensemble_rule: expected one of {', '.join(RULES)}, got {ensemble_rule!r}"
        )
    if processor is None:
        processor = _processor_of(model)
    kept = keep_prompts(
        model, prompts, processor, num_labels=num_labels, embedding_type=embedding_type
    )
    num_labels = kept[0].num_labels
    if num_labels is not None:
        Wanted(labels=dtype).check(num_labels + 1)
    labels = []
    with torch.no_grad():
        streams = kept[0].streams() if len(kept) == 1 else streams_of(model, kept, ensemble_rule)
        for index, image in enumerate(flatten_images(images)):
            pixels, size = _as_pixels(image, f"images[{index}]", processor, input_data_format)
            inputs = processor(
                pixels, size=_size(model), return_tensors="pt", input_data_format=CHANNELS_LAST
            )
            painted = paint(model, inputs["pixel_values"], streams, ensemble_rule)
            (colours,) = colours_of(painted, processor.image_mean, processor.image_std)
            found = label_map(colours, size, kept[0].num_labels)
            labels.append(found.byte() if dtype == torch.uint8 else found)
    return labels


class PromptedSteps:
    """What `Steps` are, of `segment` with prompts: one step, with the options of that."""

    def __init__(self, model: Any, **options: Any) -> None:
        self._model, self._options = model, options

    def prepare(self, image: Any, name: str) -> Any:
        return image

    def label_maps(self, images: Sequence[Any]) -> list[tuple[torch.Tensor, None]]:
        options = {"input_data_format": CHANNELS_LAST, **self._options}
        return [(labels, None) for labels in segment_by_prompts(self._model, images, **options)]


def _check(model: Any) -> None:
    if not is_seggpt(model):
        raise TypeError(
            "model: expected a SegGptForImageSegmentation, which takes prompts, got a "
            f"{type(model).__name__}"
        )
    if model.training:
        raise ValueError("model: expected eval mode, got training mode; call model.eval() first")


def read_mask(mask: Any, processor: SegGptImageProcessor) -> tuple[Any, int | None]:
    """A prompt's mask as the processor takes it, and the classes in it; None for one in colours."""
    if not processor.do_convert_rgb:
        return mask, processor.num_labels
    labels = read_label_map(mask, "mask")
    if labels.dtype == bool or set(np.unique(labels).tolist()) == {0, 255}:
        labels = (labels != 0).astype(np.uint8)
    return labels, processor.num_labels or max(int(labels.max()), 1)


def _size(model: Any) -> tuple[int, int]:
    height, width = model.config.image_size
    return height // 2, width


def _processor_of(model: Any) -> SegGptImageProcessor:
    """The image processor saved beside the checkpoint that `model` came from, else the default."""
    source = getattr(model, "preprocessor_file", None) or getattr(model, "name_or_path", "")
    if source:
        try:
            found = SegGptImageProcessor.from_pretrained(source, local_files_only=True)
            assert isinstance(found, SegGptImageProcessor)
            return found
        except (FileNotFoundError, ImportError):
            return SegGptImageProcessor()  # the published model's options
    return SegGptImageProcessor()


def _as_pixels(
    image: Any, name: str, processor: SegGptImageProcessor, input_data_format: str | None = None
) -> tuple[Any, tuple[int, int]]:
    """One image as the processor takes it, floats in [0, 1] too, and its height and width."""
    image = channels_last(image, name, input_data_format, 3)
    if isinstance(image, Image.Image):
        return image, (image.height, image.width)
    if processor.do_rescale and is_unit(image):
        image = np.rint(image.astype(np.float32) * 255).astype(np.uint8)
    return np.ascontiguousarray(image), image.shape[:2]

"""`segment`: from images to label maps, and scores, at the images' own sizes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import nn

from fastseg.images.inputs import flatten_images
from fastseg.images.processor import SegformerImageProcessor
from fastseg.images.types import ImageInputs, ImageProcessor, Pair
from fastseg.kernels.blocks.workers import thread_pool
from fastseg.models.seggpt.prompts import SegGptPrompt, is_seggpt

from .prompted import segment_by_prompts
from .result import Result, results_of
from .scores import LabelMap, Wanted
from .steps import Steps
from .workers import worker_count

# The second as type checkers see what torch.compile and fastseg.graphed make of a module.
Model = nn.Module | Callable[..., object]


@overload
def segment(
    model: Model,
    images: ImageInputs,
    *,
    processor: ImageProcessor | None = ...,
    batch_size: int = ...,
    slide: Sequence[int | Sequence[int]] | None = ...,
    tta: Sequence[str | float] | None = ...,
    input_data_format: str | None = ...,
    dtype: torch.dtype = ...,
    return_scores: Literal[False] = ...,
    scores_dtype: torch.dtype = ...,
    threshold: float | None = ...,
    prompts: Sequence[SegGptPrompt | Pair] | None = ...,
    num_labels: int | None = ...,
    embedding_type: str | None = ...,
    ensemble_rule: str = ...,
    results: Literal[False] = ...,
) -> list[torch.Tensor]: ...


@overload
def segment(
    model: Model,
    images: ImageInputs,
    *,
    processor: ImageProcessor | None = ...,
    batch_size: int = ...,
    slide: Sequence[int | Sequence[int]] | None = ...,
    tta: Sequence[str | float] | None = ...,
    input_data_format: str | None = ...,
    dtype: torch.dtype = ...,
    return_scores: Literal[True],
    scores_dtype: torch.dtype = ...,
    threshold: float | None = ...,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]: ...


@overload
def segment(
    model: Model,
    images: ImageInputs,
    *,
    processor: ImageProcessor | None = ...,
    batch_size: int = ...,
    slide: Sequence[int | Sequence[int]] | None = ...,
    tta: Sequence[str | float] | None = ...,
    input_data_format: str | None = ...,
    dtype: torch.dtype = ...,
    return_scores: bool = ...,
    scores_dtype: torch.dtype = ...,
    threshold: float | None = ...,
    prompts: Sequence[SegGptPrompt | Pair] | None = ...,
    num_labels: int | None = ...,
    embedding_type: str | None = ...,
    ensemble_rule: str = ...,
    results: Literal[True],
) -> list[Result]: ...


def segment(
    model: Model,
    images: ImageInputs,
    *,
    processor: ImageProcessor | None = None,
    batch_size: int = 8,
    slide: Sequence[int | Sequence[int]] | None = None,
    tta: Sequence[str | float] | None = None,
    input_data_format: str | None = None,
    dtype: torch.dtype = torch.int64,
    return_scores: bool = False,
    scores_dtype: torch.dtype = torch.float16,
    threshold: float | None = None,
    prompts: Sequence[SegGptPrompt | Pair] | None = None,
    num_labels: int | None = None,
    embedding_type: str | None = None,
    ensemble_rule: str = "painter",
    results: bool = False,
) -> list[torch.Tensor] | tuple[list[torch.Tensor], list[torch.Tensor]] | list[Result]:
    """The class of every pixel of `images`.

    Args:
        model: a segmentation model in eval mode whose output is logits or has them: fastseg's,
            transformers', or another library's.
        images: an image, a batch or a list of images of any sizes: PIL, NumPy or torch, as
            SegformerImageProcessor takes them. Floats in [0, 1] are taken for 255 times that where
            `processor` rescales.
        processor: prepares the images: fastseg's or transformers'; where None, the one saved
            beside the model's checkpoint, else one with the default options (512x512, ImageNet
            statistics).
        batch_size: images, or sliding windows, in one forward. On a CPU so many images are taken
            at once: torch's threads are spread over them, and each is computed as by itself.
        slide: (crop, stride) in pixels, each a number or (height, width): the image is not resized
            but cut into overlapping windows, whose logits are averaged, as in mmseg. None to see
            the whole image at once, resized as `processor` says.
        tta: test-time augmentation as in mmseg: "flip" and scales, such as ("flip", 0.75, 1.25).
            The image is seen at its own scale and at these, mirrored too with "flip", and the
            mean of the probabilities decides. Scales are of the size that `processor` makes, or
            with `slide` of the image's own.
        input_data_format: "channels_first" or "channels_last", of arrays; None finds the end that
            is as long as the processor's `image_mean`, or 1, 3 or 4 long.
        dtype: of the label maps: torch.int64, or torch.uint8 for at most 256 classes, in an eighth
            of the memory and of the way from a GPU.
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
        results: give a `fastseg.Result` for each image, with label map, scores and picture, that
            draws overlays, cuts out classes and writes COCO and GeoJSON.

    A side that is too short for the model is padded to the least it takes, after normalizing, with
    zeros, below or to the right, as mmseg's data preprocessor pads; the padding is cut off again.

    Returns:
        a list with one (H, W) label map of `dtype` for each image, on the model's device, H and W
        the image's own size. A model of one class (`num_labels == 1`) gives 1 where its logit is
        positive, else 0. With `return_scores` a pair of lists: the label maps, and as many scores
        (H, W) of `scores_dtype`: of the highest class, also where `threshold` put 255; with one
        class its sigmoid where the label is 1, and 1 less that where it is 0. No map of all
        classes is made at full size. With `results` a list of Results.

    Raises:
        TypeError, ValueError: as SegformerImageProcessor raises them, or `batch_size`, `slide`,
            `tta`, `input_data_format`, `dtype`, `scores_dtype` or `threshold` is wrong, or `model`
            is in training mode, or takes other channels than `processor` gives, or has more classes
            than `dtype` holds, or than 255 with a `threshold`.
    """
    wanted = Wanted.of(model, return_scores, scores_dtype, threshold, dtype)
    if prompts is not None:
        if slide is not None or tta is not None:
            name = "tta" if slide is None else "slide"
            raise ValueError(f"{name}: expected None with prompts, which are of whole images")
        if return_scores or threshold is not None:
            raise ValueError(
                "return_scores, threshold: expected neither with prompts: a SegGPT's classes are "
                "the nearest colours, which have no probabilities"
            )
        by_prompts = segment_by_prompts(
            *(model, images, prompts),
            num_labels=num_labels,
            embedding_type=embedding_type,
            dtype=dtype,
            ensemble_rule=ensemble_rule,
            processor=processor,
            input_data_format=input_data_format,
        )
        if not results:
            return by_prompts
        maps = [(labels, None) for labels in by_prompts]
        return results_of(model, images, maps, input_data_format, by_prompts=True)
    if is_seggpt(model):
        raise ValueError("prompts: expected [(image, mask), ...] for a SegGPT, got None")
    if processor is None:
        processor = saved_processor(model)
    options: dict[str, Any] = {"batch_size": batch_size, "slide": slide, "tta": tta}
    steps = Steps(model, processor, wanted, input_data_format=input_data_format, **options)
    found = _in_batches(model, steps, flatten_images(images), batch_size)
    if results:
        return results_of(model, images, found, input_data_format)
    all_labels = [labels for labels, _ in found]
    if not return_scores:
        return all_labels
    return all_labels, [scores for _, scores in found if scores is not None]


def _in_batches(model: Any, steps: Steps, images: Sequence[Any], batch_size: int) -> list[LabelMap]:
    """The label maps, and scores, of a batch at a time."""

    def segment_one(index: int) -> LabelMap:
        return steps.label_maps([steps.prepare(images[index], f"images[{index}]")])[0]

    found: list[LabelMap] = []
    workers = worker_count(model, min(len(images), batch_size))
    with contextlib.ExitStack() as stack:
        if workers > 1:
            pool = stack.enter_context(thread_pool(workers, torch.get_num_threads() // workers))
        for start in range(0, len(images), batch_size):
            indices = range(start, min(start + batch_size, len(images)))
            if workers > 1:
                found += pool.map(segment_one, indices)
            elif steps.one_at_a_time:
                found += map(segment_one, indices)
            else:
                inputs = [steps.prepare(images[index], f"images[{index}]") for index in indices]
                found += steps.label_maps(inputs)
    return found


def saved_processor(model: Any) -> SegformerImageProcessor:
    """The image processor saved beside the checkpoint that `model` came from, else the default.

    Where there was a checkpoint without one, a warning says so.
    """
    model = getattr(model, "module", model)  # inside DataParallel
    if getattr(model, "image_processor", None) is not None:  # of a RuntimeModel
        return model.image_processor
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

"""SegGptImageProcessor: images, prompts and their masks to tensors, and painted masks to maps.

A drop-in for transformers' image processor, on PIL and NumPy alone.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self, overload

import numpy as np
import torch
from PIL import Image

from fastseg.checkpoints.values import whole
from fastseg.images.batch_feature import BatchFeature
from fastseg.images.inputs import flatten_images, read_label_map
from fastseg.images.label_maps import parse_target_sizes
from fastseg.images.options import ImageOptions, Size
from fastseg.images.processor import SegformerImageProcessor
from fastseg.images.types import ChannelValues, ImageInputs, TargetSizes

from .palette import build_palette, colours_of, label_map, paint, scores

_DARK = 2  # of 255: a mask of this and less is taken for black


@dataclasses.dataclass
class SegGptOptions(ImageOptions):
    """Options of SegGptImageProcessor, checked and brought to one form on construction."""

    size: dict[str, int] = dataclasses.field(default_factory=lambda: {"height": 448, "width": 448})
    resample: Image.Resampling = Image.Resampling.BICUBIC
    do_convert_rgb: bool | None = True
    num_labels: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_labels is not None:
            self.num_labels = whole("num_labels", self.num_labels)
            if self.num_labels < 1:
                raise ValueError(f"num_labels: expected at least 1, got {self.num_labels}")


_OPTIONS = tuple(
    field.name for field in dataclasses.fields(SegGptOptions) if field.name != "do_reduce_labels"
)


class SegGptImageProcessor(SegformerImageProcessor):
    """Processor that resizes and normalizes images, and paints the masks of prompts in colours.

    Results equal those of transformers 4.57, and of 5 without torchvision, bit for bit, but for
    these:
    - Grey and RGBA images, PIL's of any mode, become RGB, as of SegformerImageProcessor;
      transformers fails on them.
    - Label maps may be floats of whole values.
    - `num_labels` of the processor is that of `post_process_semantic_segmentation` too;
      transformers takes it for masks alone.

    Args:
        do_resize: resize to `size`.
        size: 448 x 448 by default; forms as of SegformerImageProcessor.
        resample: a PIL.Image.Resampling, for images, bicubic by default (masks always take the
            nearest pixel).
        do_rescale, rescale_factor: multiply by this; 1/255 by default.
        do_normalize, image_mean, image_std: of images and masks; those of ImageNet by default.
        do_convert_rgb: True (the default) takes masks for label maps (H, W), and paints them; False
            takes them for images, painted already.
        num_labels: classes beside the background 0, each of which gets a colour of its own. None
            repeats the numbers in all channels, which makes labels such as 0 and 1 all but black.

    None stands for the default. The options are attributes of the same names; each can be
    overridden in a call.

    Raises TypeError or ValueError, naming the argument.
    """

    num_labels: int | None
    model_input_names = ("pixel_values", "prompt_pixel_values", "prompt_masks")

    def __init__(
        self,
        do_resize: bool | None = None,
        size: Size | None = None,
        resample: int | None = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: ChannelValues | None = None,
        image_std: ChannelValues | None = None,
        do_convert_rgb: bool | None = None,
        num_labels: int | None = None,
    ) -> None:
        given = {
            "do_resize": do_resize,
            "size": size,
            "resample": resample,
            "do_rescale": do_rescale,
            "rescale_factor": rescale_factor,
            "do_normalize": do_normalize,
            "image_mean": image_mean,
            "image_std": image_std,
            "do_convert_rgb": do_convert_rgb,
            "num_labels": num_labels,
        }
        chosen: dict[str, Any] = {name: v for name, v in given.items() if v is not None}
        self._set(SegGptOptions(**chosen))
        self.extra: dict[str, Any] = {}

    def __call__(  # type: ignore[override]
        self,
        images: ImageInputs | None = None,
        prompt_images: ImageInputs | None = None,
        prompt_masks: ImageInputs | None = None,
        **kwargs: object,
    ) -> BatchFeature:
        """Call `preprocess`."""
        given: dict[str, Any] = kwargs
        return self.preprocess(images, prompt_images, prompt_masks, **given)

    def preprocess(  # type: ignore[override]
        self,
        images: ImageInputs | None = None,
        prompt_images: ImageInputs | None = None,
        prompt_masks: ImageInputs | None = None,
        *,
        return_tensors: str | None = None,
        data_format: str | None = None,
        input_data_format: str | None = None,
        **options: object,
    ) -> BatchFeature:
        """The model's input for images, for prompts, or for both.

        Args:
            images, prompt_images: one or many, as SegformerImageProcessor takes them.
            prompt_masks: the prompts' masks, one or many: PIL images or arrays (H, W) of class
                numbers, 0 the background; with `do_convert_rgb=False` images in colours.
            return_tensors: "pt" or "np" for batches; None for lists of arrays.
            data_format: "channels_first" (by default) or "channels_last", of what is returned.
            input_data_format: the same of arrays given.
            options: any option of the class, for this call; None keeps the processor's.

        Returns:
            BatchFeature with "pixel_values", "prompt_pixel_values" and "prompt_masks", as far as
            they were given, each (3, H, W) float32.

        Raises:
            TypeError, ValueError: naming the argument, what it should be and what it was.
        """
        if all(one is None for one in (images, prompt_images, prompt_masks)):
            raise ValueError("images: expected images, prompt_images or prompt_masks, got none")
        resolved = self._resolve(options)
        of_images = SegformerImageProcessor(
            **{
                name: getattr(resolved, name)
                for name in _OPTIONS
                if name not in ("do_convert_rgb", "num_labels")
            }
        )
        calls: dict[str, Any] = {
            "return_tensors": return_tensors,
            "data_format": data_format,
            "input_data_format": input_data_format,
        }
        features = BatchFeature()
        for name, given in (("images", images), ("prompt_images", prompt_images)):
            if given is not None:
                with _named(name):
                    found = of_images(given, **calls)["pixel_values"]
                features["pixel_values" if name == "images" else "prompt_pixel_values"] = found
        if prompt_masks is not None:
            masks: Any = prompt_masks
            if resolved.do_convert_rgb:
                masks = _painted(prompt_masks, resolved.num_labels)
                calls["input_data_format"] = "channels_last"
            with _named("prompt_masks"):
                features["prompt_masks"] = of_images(
                    masks, resample=Image.Resampling.NEAREST, do_convert_rgb=False, **calls
                )["pixel_values"]
        return features

    def pre_process_semantic_segmentation(
        self, prompt_masks: ImageInputs, num_labels: int | None = None, **kwargs: object
    ) -> BatchFeature:
        """The colours of label maps alone: `preprocess` of `prompt_masks`."""
        given: dict[str, Any] = kwargs
        return self.preprocess(prompt_masks=prompt_masks, num_labels=num_labels, **given)

    def get_palette(self, num_labels: int) -> list[tuple[int, int, int]]:
        """Colours (red, green, blue) of the background and of `num_labels` classes."""
        return build_palette(num_labels)

    @overload  # type: ignore[override]
    def post_process_semantic_segmentation(
        self,
        outputs: object,
        target_sizes: TargetSizes | None = ...,
        num_labels: int | None = ...,
        return_segmentation_scores: Literal[False] = ...,
    ) -> list[torch.Tensor]: ...

    @overload
    def post_process_semantic_segmentation(
        self,
        outputs: object,
        target_sizes: TargetSizes | None = ...,
        num_labels: int | None = ...,
        *,
        return_segmentation_scores: Literal[True],
    ) -> list[BatchFeature]: ...

    def post_process_semantic_segmentation(
        self,
        outputs: object,
        target_sizes: TargetSizes | None = None,
        num_labels: int | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[torch.Tensor] | list[BatchFeature]:
        """Label maps, one (H, W) tensor for each image of the batch.

        Args:
            outputs: what the model returned, with `pred_masks`, or these themselves.
            target_sizes: (height, width) for each image, a list or a tensor (B, 2). None keeps that
                of the masks.
            num_labels: as in `preprocess`: maps are int64 with the class of the nearest colour, 0
                the background. None is the processor's; where that is None too, maps are int32
                with the mean of the channels, from 0 to 255.
            return_segmentation_scores: give for each image a BatchFeature of "segmentation", the
                map, and "segmentation_scores" (num_labels + 1, H, W): negative squared distances to
                the colours, or None without `num_labels`.

        Raises:
            TypeError, ValueError: for outputs without such masks, or sizes that do not fit.
        """
        masks = _masks_of(outputs)
        sizes: Sequence[tuple[int, int] | None] = [None] * len(masks)
        if target_sizes is not None:
            sizes = parse_target_sizes(target_sizes, len(masks))
        count = self._resolve({"num_labels": num_labels}).num_labels
        found: list[Any] = []
        for colours, size in zip(
            colours_of(masks[:, :, masks.shape[2] // 2 :], self.image_mean, self.image_std),
            sizes,
            strict=True,
        ):
            segmentation: Any = label_map(colours, size, count)
            if return_segmentation_scores:
                of_classes = None if count is None else scores(colours, size, count)
                segmentation = BatchFeature(
                    segmentation=segmentation, segmentation_scores=of_classes
                )
            found.append(segmentation)
        return found

    @classmethod
    def from_dict(cls, config: Mapping[str, object], **options: object) -> Self:
        """Make one from the content of preprocessor_config.json; `options` replace what it says.

        Entries that are no option are kept in `extra` and written again by `save_pretrained`.
        """
        entries: dict[str, Any] = dict(config)
        for name in ("image_processor_type", "feature_extractor_type"):
            entries.pop(name, None)
        processor = cls(**{name: entries.pop(name) for name in _OPTIONS if name in entries})
        processor._set(processor._resolve(options))
        processor.extra = entries
        return processor

    def to_dict(self) -> dict[str, object]:
        """Options as `save_pretrained` writes them: JSON types alone."""
        resolved = self._resolve({})
        options = {name: getattr(resolved, name) for name in _OPTIONS}
        config: dict[str, object] = {**self.extra, **options}
        config["resample"] = int(self.resample)
        if config["num_labels"] is None:
            del config["num_labels"]  # transformers 4.x warns of names it does not know
        config["image_processor_type"] = "SegGptImageProcessor"
        return config

    def _set(self, options: ImageOptions) -> None:
        for name in _OPTIONS:
            setattr(self, name, getattr(options, name))

    def _resolve(self, overrides: Mapping[str, object]) -> SegGptOptions:
        """The options of one call, checked anew, for attributes may have been set since."""
        unknown = sorted(set(overrides) - set(_OPTIONS))
        if unknown:
            raise TypeError(
                f"{', '.join(unknown)}: no such option; expected one of {', '.join(_OPTIONS)}"
            )
        values = {name: getattr(self, name) for name in _OPTIONS}
        values.update((name, v) for name, v in overrides.items() if v is not None)
        return SegGptOptions(**values)


@contextmanager
def _named(argument: str) -> Iterator[None]:
    """Let errors name `argument` in the place of "images"."""
    try:
        yield
    except (TypeError, ValueError) as error:
        text = str(error)
        if text.startswith("images"):
            text = argument + text.removeprefix("images")
        if argument == "prompt_masks" and "channels" in text:
            text += "; do_convert_rgb=False takes masks for images in colours, True for label maps"
        error.args = (text, *error.args[1:])
        raise


def _painted(prompt_masks: Any, num_labels: int | None) -> list[np.ndarray]:
    """Label maps in the colours of their classes, uint8 (H, W, 3)."""
    painted = []
    for index, mask in enumerate(flatten_images(prompt_masks, "prompt_masks", ndim=2)):
        name = f"prompt_masks[{index}]"
        try:
            labels = read_label_map(mask, name)
        except ValueError as error:
            error.args = (
                f"{error}; or pass do_convert_rgb=False where these are the colours to paint in",
            )
            raise
        colours = paint(labels, num_labels, name)
        _warn_of_one_colour(colours, num_labels, name)
        painted.append(colours)
    return painted


def _warn_of_one_colour(colours: np.ndarray, num_labels: int | None, name: str) -> None:
    high = colours.max()
    why = None
    if high <= _DARK and num_labels is None and high > 0:
        why = f"holds {high} at most, of 255, which is all but black; pass num_labels={high}"
    elif (colours == colours[:1, :1]).all():
        why = "is all of one colour, which shows nothing to tell apart"
    if why is not None:
        warnings.warn(f"{name}: {why}", stacklevel=5)


def _masks_of(outputs: Any) -> torch.Tensor:
    """The painted masks (B, 3, 2 H, W) that a model has given, in its output or by themselves."""
    masks = outputs
    if isinstance(outputs, Mapping):
        masks = outputs.get("pred_masks")
    elif not isinstance(outputs, torch.Tensor):
        masks = getattr(outputs, "pred_masks", None)
    if not isinstance(masks, torch.Tensor):
        raise TypeError(
            "outputs: expected the output of a SegGPT, with pred_masks, or a tensor, "
            f"got {type(outputs).__name__}"
        )
    if masks.ndim != 4 or masks.shape[1] != 3 or not masks.is_floating_point():
        raise ValueError(
            "outputs: expected floating-point pred_masks (batch, 3, 2 height, width), "
            f"got {masks.dtype} of shape {tuple(masks.shape)}"
        )
    return masks.detach()

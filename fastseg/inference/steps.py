"""What `segment` does with an image, in two steps that may be in different threads.

The first prepares an image on the CPU, the second runs the model on several of them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fastseg.images.inputs import CHANNELS_FIRST, CHANNELS_LAST, channels_last, is_unit
from fastseg.images.label_maps import logits_of
from fastseg.kernels import upsample_argmax, upsample_scores
from fastseg.kernels.labels.scores import highest_blend

from .augmented import Views, augmented_labels
from .scores import LabelMap, Wanted
from .sliding import sliding_labels, window_pair


class Prepared(NamedTuple):
    """What a model is called with for an image, pixels and keyword arguments, and its sizes."""

    pixel_values: torch.Tensor  # (1, C, H, W), padded
    scale: dict[str, torch.Tensor]  # of bytes
    unpadded: tuple[int, int]
    size: tuple[int, int]  # as it was given
    views: tuple[Prepared, ...] = ()  # at other scales

    @property
    def kind(self) -> Hashable:
        """What is equal for those that may be in one forward."""
        return self.pixel_values.shape, self.pixel_values.dtype

    def to(self, parameter: torch.Tensor) -> Prepared:
        """The same on the device of a model's parameter, and in its dtype where it is no bytes."""
        pixels, device = self.pixel_values, parameter.device
        pixels = pixels.to(device, parameter.dtype) if not self.scale else pixels.to(device)
        scale = {name: value.to(device) for name, value in self.scale.items()}
        return self._replace(pixel_values=pixels, scale=scale)


class Steps:
    """The steps of `segment`, which has the arguments and errors."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        wanted: Wanted,
        *,
        batch_size: int = 8,
        slide: Sequence[int | Sequence[int]] | None = None,
        tta: Sequence[str | float] | None = None,
        input_data_format: str | None = None,
    ) -> None:
        if model.training:
            raise ValueError(
                "model: expected eval mode, got training mode; call model.eval() first"
            )
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: expected an integer of at least 1, got {batch_size!r}")
        if input_data_format not in (None, CHANNELS_FIRST, CHANNELS_LAST):
            raise ValueError(
                f"input_data_format: expected None, {CHANNELS_FIRST!r} or {CHANNELS_LAST!r}, "
                f"got {input_data_format!r}"
            )
        self._model = model
        self._processor = processor
        self._wanted = wanted
        self._batch_size = batch_size
        self._input_data_format = input_data_format
        self._least = least_side(model)
        self._channels = _channels(model, processor)
        self._views = Views.of(tta)
        self._windows = None
        if slide is not None:
            if not isinstance(slide, Sequence) or len(slide) != 2:
                raise ValueError(f"slide: expected (crop, stride), got {slide!r}")
            self._windows = window_pair("crop", slide[0]), window_pair("stride", slide[1])
            if min(self._windows[0]) < self._least:
                raise ValueError(
                    f"slide: expected a crop of at least {self._least} pixels for this model, "
                    f"got {slide[0]!r}"
                )

    @property
    def one_at_a_time(self) -> bool:
        """Return whether images go by windows or views, of which a batch is, and not together."""
        return self._windows is not None or self._views is not None

    def prepare(self, image: Any, name: str) -> Prepared:
        """The input that the processor makes of one image; errors call it `name`.

        A model that takes bytes gets them as they are after resizing, in a quarter of the memory,
        and rescales and normalizes them in its first op.
        """
        image = channels_last(image, name, self._input_data_format, self._channels)
        whole = self._windows is None
        first = self._prepare(image, name, {} if whole else {"do_resize": False})
        if self._views is None:
            return first
        views = []
        for scale in self._views.scales[1:]:
            # As mmcv rounds. Of whole images it is the size for the model that is scaled.
            height, width = (max(1, int(side * scale + 0.5)) for side in first.unpadded)
            options = {"do_resize": True, "size": {"height": height, "width": width}}
            views.append(self._prepare(image, name, options))
        return first._replace(views=tuple(views))

    def _prepare(self, image: Any, name: str, options: dict[str, Any]) -> Prepared:
        processor, least = self._processor, self._least
        size = (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]
        if processor.do_rescale and is_unit(image):
            image = image.astype(np.float32) * 255
            if options.get("do_resize", processor.do_resize):
                image = np.rint(image).astype(np.uint8)
        if not isinstance(image, Image.Image):
            options["input_data_format"] = CHANNELS_LAST
        try:
            found = None
            if getattr(self._model, "takes_bytes", False) and hasattr(processor, "bytes_and_scale"):
                found = processor.bytes_and_scale(image, **options)
            # Padding is 0 after normalizing, which no byte needs to be.
            if found is not None and min(found[0].shape[:2]) >= least:
                pixels = torch.from_numpy(np.array(found[0]))[None].permute(0, 3, 1, 2)
                dtype = torch.promote_types(next(self._model.parameters()).dtype, torch.float32)
                scale, offset = (torch.tensor(one, dtype=dtype) for one in found[1:])
                height, width = pixels.shape[2:]
                keywords = {"pixel_scale": scale, "pixel_offset": offset}
                return Prepared(pixels, keywords, (height, width), size)
            pixels = processor(image, return_tensors="pt", **options)["pixel_values"]
        except (TypeError, ValueError) as error:
            error.args = (str(error).replace("images[0]", name), *error.args[1:])
            raise
        height, width = pixels.shape[2:]
        pixels = F.pad(pixels, (0, max(least - width, 0), 0, max(least - height, 0)))
        return Prepared(pixels, {}, (height, width), size)

    def label_maps(self, inputs: Sequence[Prepared]) -> list[LabelMap]:
        """Label maps, and scores, on the device: of whole images those of a kind in one forward."""
        with torch.no_grad():
            if self.one_at_a_time:
                return [self._alone(one.to(next(self._model.parameters()))) for one in inputs]
            by_kind: dict[Hashable, list[int]] = {}
            for index, one in enumerate(inputs):
                by_kind.setdefault(one.kind, []).append(index)
            found: dict[int, LabelMap] = {}
            for indices in by_kind.values():
                group = [inputs[index] for index in indices]
                found |= zip(indices, self._together(group), strict=True)
        return [found[index] for index in range(len(inputs))]

    def _together(self, inputs: Sequence[Prepared]) -> Iterator[LabelMap]:
        pixels = torch.cat([one.pixel_values for one in inputs])
        batch = inputs[0]._replace(pixel_values=pixels).to(next(self._model.parameters()))
        logits = logits_of(self._model(batch.pixel_values, **batch.scale))
        for index, one in enumerate(inputs):
            yield self._label_map(logits[index : index + 1], one)

    def _alone(self, one: Prepared) -> LabelMap:
        """By windows or views."""
        if self._views is not None:
            views = [one, *(view.to(next(self._model.parameters())) for view in one.views)]
            return augmented_labels(
                *(self._model, views, self._views.flip, self._windows),
                *(self._batch_size, self._wanted),
            )
        assert self._windows is not None
        forward = functools.partial(self._model, **one.scale)
        labels, scores = sliding_labels(
            forward, one.pixel_values, *self._windows, self._batch_size, self._wanted
        )
        inside = tuple(slice(side) for side in one.size)
        return labels[inside], None if scores is None else scores[inside]

    def _label_map(self, logits: torch.Tensor, one: Prepared) -> LabelMap:
        wanted, classes = self._wanted, logits.shape[1]
        wanted.check(classes)
        padded, (height, width) = one.pixel_values.shape[2:], one.unpadded
        if padded != (height, width):
            logits = F.interpolate(logits, size=padded, mode="bilinear", align_corners=False)
            logits = logits[:, :, :height, :width]
        probability = None
        if classes > 1:
            labels = upsample_argmax(logits, one.size, wanted.labels)[0]
            if wanted.probability:
                highest = highest_blend if wanted.of_probabilities else upsample_scores
                probability = highest(logits, one.size)[0]
        else:  # is it, or is it not
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            resized = F.interpolate(logits, size=one.size, mode="bilinear", align_corners=False)
            labels = (resized[0, 0] > 0).to(wanted.labels)
            if wanted.probability:
                probability = resized[0, 0].sigmoid_()
        return wanted.finish(labels, probability, classes)


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

"""SegformerImageProcessor: from images to the tensor a SegFormer takes, and from logits to maps.

A drop-in for the image processor of transformers, on PIL and NumPy alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, overload

import numpy as np
import torch

from fastseg.checkpoints.files import CONFIG_NAME, PREPROCESSOR_NAME, read_json
from fastseg.checkpoints.hdf5 import keras_config, keras_cv_processor
from fastseg.checkpoints.hub import find_file, resolve_file
from fastseg.checkpoints.push import PushesToHub
from fastseg.checkpoints.report import CheckpointError

from .batch_feature import BatchFeature
from .inputs import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    flatten_images,
)
from .label_maps import post_process_semantic_segmentation
from .loading import check_equal, load, load_labels, scale_all
from .options import ImageOptions, Size
from .types import ChannelValues, ImageInput, ImageInputs, TargetSizes

PROCESSOR_FILE = "processor_config.json"

_OPTION_NAMES = tuple(field.name for field in dataclasses.fields(ImageOptions))


class SegformerImageProcessor(PushesToHub):
    """Processor that resizes, rescales and normalizes images, and resizes and reduces label maps.

    Results equal those of transformers' PIL processor bit for bit, but for these:
    - Images of another number of channels than the three that `image_mean` and `image_std` are
      for, where transformers fails, become RGB before they are normalized: PIL images of any
      mode, grey (H, W) and RGBA arrays. Alpha is dropped, as PIL's `convert("RGB")` drops it.
      PIL's YCbCr, LAB and HSV become RGB as well, where transformers takes their bands for red,
      green and blue. Where they are for one channel, PIL's modes 1, P, PA and LA become grey.
    - PIL images of more than 8 bits (modes I;16, I, F) become 8 bits: values up to 255 as they
      are, larger whole numbers as 16 bits, floats in [0, 1] times 255. A warning says where 12
      bits lie in 16. Mode F stays with `do_rescale=False`. Arrays of bools are 0 and 255.
    - An array whose channels may stand first or last is an error; transformers takes the first.
    - More than 4 channels, or 2, need no `input_data_format` where `image_mean` has as many
      values. More than 4 are resized one by one; 2 and 4, as in transformers, like PIL's LA and
      RGBA, whose last channel weighs the others: resize bands that are no alpha yourself.
    - Label maps may have equal bands, and labels may lie outside [0, 255]; `do_reduce_labels`
      makes negative ones 255. A side never shrinks to less than one pixel.
    - The older option `reduce_labels` is obeyed in files, as `do_reduce_labels`.
    - `data_format` is obeyed, as in transformers 4.

    The orientation in EXIF is not applied: that is for the code that opens the file.

    Args:
        do_resize: resize to `size`.
        size: {"height", "width"}; n or (height, width) for the same; {"shortest_edge"} and
            {"shortest_edge", "longest_edge"} or {"max_height", "max_width"}, which keep the
            aspect ratio. By default 512 x 512.
        resample: a PIL.Image.Resampling, for images (label maps always take the nearest).
        do_rescale, rescale_factor: multiply by this; 1/255 by default.
        do_normalize, image_mean, image_std: subtract the mean and divide by the standard
            deviation, one number or one for each channel; those of ImageNet by default.
        do_reduce_labels: lower every label by one, with the background 0 becoming 255.
        do_convert_rgb: True converts every image to RGB, alpha laid over white; False converts
            none; None, the default, converts as said above.

    None stands for the default. The options are attributes of the same names; each can be
    overridden in a call. `extra` holds what else the file it was read from said; of that,
    `do_center_crop` and `crop_size` are kept and never applied, as in transformers.

    Raises TypeError or ValueError, naming the argument.
    """

    model_input_names: tuple[str, ...] = ("pixel_values",)

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
        do_reduce_labels: bool | None = None,
        do_convert_rgb: bool | None = None,
    ) -> None:
        chosen: dict[str, Any] = {
            "do_resize": do_resize,
            "size": size,
            "resample": resample,
            "do_rescale": do_rescale,
            "rescale_factor": rescale_factor,
            "do_normalize": do_normalize,
            "image_mean": image_mean,
            "image_std": image_std,
            "do_reduce_labels": do_reduce_labels,
            "do_convert_rgb": do_convert_rgb,
        }
        options = ImageOptions(**{name: v for name, v in chosen.items() if v is not None})
        self._set(options)
        self.extra: dict[str, Any] = {}

    def __call__(
        self,
        images: ImageInputs,
        segmentation_maps: ImageInputs | None = None,
        **kwargs: object,
    ) -> BatchFeature:
        """Call `preprocess`."""
        given: dict[str, Any] = kwargs
        return self.preprocess(images, segmentation_maps, **given)

    def preprocess(
        self,
        images: ImageInputs,
        segmentation_maps: ImageInputs | None = None,
        *,
        return_tensors: str | None = None,
        data_format: str | None = None,
        input_data_format: str | None = None,
        **options: object,
    ) -> BatchFeature:
        """The model's input for one image or many, and its labels for their label maps.

        Args:
            images: PIL images, NumPy arrays or torch tensors: one, a (nested) list, or a batch
                (B, ...). Arrays are (H, W), (H, W, C) or (C, H, W), of bytes or other whole
                numbers in [0, 255]; or floats in [0, 1], which need `do_rescale=False`.
            segmentation_maps: as many label maps: PIL images or arrays (H, W), of one band or of
                equal ones; a palette's indices are the labels.
            return_tensors: "pt" or "np" for one batch, a torch tensor or NumPy array, of
                images that come out equal in size; None for a list of arrays.
            data_format: "channels_first" (by default) or "channels_last", of what is returned.
            input_data_format: the same of arrays given; None finds the end that is as long as
                `image_mean`, or 1, 3 or 4 long.
            options: any option of the class, for this call; None keeps the processor's.

        Returns:
            BatchFeature with "pixel_values", each (C, H, W) or (H, W, C), float32 (floats keep
            their type without resizing and rescaling; bytes stay bytes without rescaling and
            normalizing), and with segmentation_maps "labels", each (H, W) int64.

        Raises:
            TypeError, ValueError: naming the argument, what it should be and what it was.
        """
        resolved = self._resolve(options)
        _check_choice("return_tensors", return_tensors, (None, "pt", "np"))
        _check_choice("data_format", data_format, (None, CHANNELS_FIRST, CHANNELS_LAST))
        _check_choice("input_data_format", input_data_format, (None, CHANNELS_FIRST, CHANNELS_LAST))
        singles = flatten_images(images)
        maps = None
        if segmentation_maps is not None:
            maps = flatten_images(segmentation_maps, "segmentation_maps", ndim=2)
            if len(maps) != len(singles):
                raise ValueError(
                    f"segmentation_maps: expected one for each of {len(singles)} images, "
                    f"got {len(maps)}"
                )
        pixels = [
            load(image, f"images[{i}]", resolved, input_data_format)
            for i, image in enumerate(singles)
        ]
        values = scale_all(
            pixels, resolved, data_format == CHANNELS_LAST, return_tensors is not None
        )
        features = BatchFeature(pixel_values=values)
        if maps is not None:
            labels = [
                load_labels(label_map, f"segmentation_maps[{i}]", resolved)
                for i, label_map in enumerate(maps)
            ]
            if return_tensors is not None:
                check_equal("segmentation_maps", [label_map.shape for label_map in labels])
            features["labels"] = labels if return_tensors is None else np.stack(labels)
        if return_tensors == "pt":
            return BatchFeature({name: torch.from_numpy(v) for name, v in features.items()})
        return features

    def bytes_and_scale(
        self, image: ImageInput, *, input_data_format: str | None = None, **options: object
    ) -> tuple[np.ndarray, list[float], list[float]] | None:
        """One image as uint8 (H, W, C), resized, and by channel what it is to be multiplied with
        and what is to be added to give `preprocess`'s values; None for an image of no bytes.
        """
        resolved = self._resolve(options)
        pixels = load(image, "images[0]", resolved, input_data_format)
        if pixels.unit or pixels.values.dtype != np.uint8:
            return None
        return pixels.values, *resolved.value_scale.by_channel(pixels.values.shape[-1])

    @overload
    def post_process_semantic_segmentation(
        self,
        outputs: object,
        target_sizes: TargetSizes | None = ...,
        return_segmentation_scores: Literal[False] = ...,
    ) -> list[torch.Tensor]: ...

    @overload
    def post_process_semantic_segmentation(
        self,
        outputs: object,
        target_sizes: TargetSizes | None = ...,
        *,
        return_segmentation_scores: Literal[True],
    ) -> list[BatchFeature]: ...

    def post_process_semantic_segmentation(
        self,
        outputs: object,
        target_sizes: TargetSizes | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[torch.Tensor] | list[BatchFeature]:
        """Label maps, one (H, W) int64 tensor for each image of the batch.

        Args:
            outputs: what the model returned, or the logits themselves: (B, num_labels, h, w).
            target_sizes: (height, width) for each image, a list or a tensor (B, 2): the logits
                are resized to it, bilinear, before the best class is taken. None keeps (h, w).
            return_segmentation_scores: give for each image a BatchFeature of "segmentation",
                the map, and "segmentation_scores", the resized logits (num_labels, H, W).

        Of outputs with `probabilities` these are resized and not the logits.

        A model of one class (`num_labels == 1`) has one candidate, so its maps are all 0, as in
        transformers: compare the sigmoid of its scores with a threshold instead.

        Raises:
            TypeError, ValueError: for outputs without such logits, or sizes that do not fit.
        """
        return post_process_semantic_segmentation(outputs, target_sizes, return_segmentation_scores)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **options: object,
    ) -> Self:
        """Read preprocessor_config.json of a directory or hub id, or a JSON file by its path.

        Files of transformers 4.x and 5.x, and those of the older SegformerFeatureExtractor; a
        processor_config.json with an image processor in it is read where the other is missing, and
        of a preset or an archive of KerasCV its config.json.

        Args:
            subfolder: of the directory or hub id, where the file is.
            revision, cache_dir, token, local_files_only: for hub ids, as in huggingface_hub.
            options: options of the class that replace those of the file.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: it is not the JSON of an image processor, or an option in it is wrong.
            TypeError, ValueError: an option given here is wrong.
        """
        where: dict[str, Any] = {
            "subfolder": subfolder,
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
        }
        path = Path(pretrained_model_name_or_path)
        if not path.is_file():
            file = find_file(pretrained_model_name_or_path, PREPROCESSOR_NAME, **where)
            if file is None:
                file = find_file(pretrained_model_name_or_path, PROCESSOR_FILE, **where)
            if file is None:
                file = find_file(pretrained_model_name_or_path, CONFIG_NAME, **where)
                if file is not None and keras_cv_processor(read_json(file)) is None:
                    file = None
            # With none of these there, this raises and says what is.
            path = file or resolve_file(pretrained_model_name_or_path, PREPROCESSOR_NAME, **where)
        config = _read(path)
        nested = config.get("image_processor")
        try:
            processor = cls.from_dict(nested if isinstance(nested, dict) else config)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        processor._set(processor._resolve(options))
        return processor

    @classmethod
    def from_dict(cls, config: Mapping[str, object], **options: object) -> Self:
        """Make one from the content of preprocessor_config.json; `options` replace what it says.

        `reduce_labels`, the older name, is read as `do_reduce_labels`. Entries that are no
        option are kept in `extra` and written again by `save_pretrained`.
        """
        entries: dict[str, Any] = dict(config)
        for name in ("image_processor_type", "feature_extractor_type"):
            entries.pop(name, None)
        reduce = entries.pop("reduce_labels", None)
        if entries.get("do_reduce_labels") is None:
            entries["do_reduce_labels"] = reduce
        known = {name: entries.pop(name) for name in _OPTION_NAMES if name in entries}
        processor = cls(**known)
        processor._set(processor._resolve(options))
        processor.extra = entries
        if entries.get("do_center_crop"):
            warnings.warn(
                "do_center_crop: kept but not applied, as in transformers' SegFormer processor",
                stacklevel=2,
            )
        return processor

    def to_dict(self) -> dict[str, object]:
        """Options as `save_pretrained` writes them: JSON types alone."""
        config: dict[str, object] = {**self.extra, **dataclasses.asdict(self._resolve({}))}
        config["resample"] = int(self.resample)
        if config["do_convert_rgb"] is None:
            del config["do_convert_rgb"]  # transformers 4.x warns of names it does not know
        config["image_processor_type"] = "SegformerImageProcessor"
        return config

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write `to_json_string` into a file."""
        Path(json_file_path).write_text(self.to_json_string(), encoding="utf-8")

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> list[str]:
        """Write preprocessor_config.json, which transformers 4.x and 5.x load; return its path.

        The directory is made where there is none; the file appears whole or not at all.
        """
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / PREPROCESSOR_NAME
        text = self.to_json_string()
        temporary = directory / f".{PREPROCESSOR_NAME}.{os.getpid()}.tmp"
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return [str(path)]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    def _set(self, options: ImageOptions) -> None:
        self.do_resize = options.do_resize
        self.size = options.size
        self.resample = options.resample
        self.do_rescale = options.do_rescale
        self.rescale_factor = options.rescale_factor
        self.do_normalize = options.do_normalize
        self.image_mean = options.image_mean
        self.image_std = options.image_std
        self.do_reduce_labels = options.do_reduce_labels
        self.do_convert_rgb = options.do_convert_rgb

    def _resolve(self, overrides: Mapping[str, object]) -> ImageOptions:
        """The options of one call, checked anew, for attributes may have been set since."""
        unknown = sorted(set(overrides) - set(_OPTION_NAMES))
        if unknown:
            raise TypeError(
                f"{', '.join(unknown)}: no such option; expected one of {', '.join(_OPTION_NAMES)}"
            )
        values = {name: getattr(self, name) for name in _OPTION_NAMES}
        values.update((name, v) for name, v in overrides.items() if v is not None)
        return ImageOptions(**values)


def _read(path: Path) -> dict[str, Any]:
    """The options in a JSON file, also in a config.json of KerasCV, or in its `.keras` archive."""
    if not zipfile.is_zipfile(path):
        config = read_json(path)
        return keras_cv_processor(config) or config
    if (options := keras_cv_processor(keras_config(path))) is None:
        raise CheckpointError(
            f"{path}: expected options of an image processor, got an archive without them, which "
            "is not of KerasCV"
        )
    return options


def _check_choice(name: str, value: Any, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}; got {value!r}")

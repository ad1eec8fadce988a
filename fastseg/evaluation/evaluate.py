"""`evaluate`: label maps of a model against true ones, and against another model's."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastseg.datasets.pictures import LabelledPictures, open_dataset
from fastseg.folding.conditions import plain_path
from fastseg.images.types import ImageProcessor, Pair, Pairs
from fastseg.inference.segment import Model, saved_processor, segment
from fastseg.models.seggpt.prompts import SegGptPrompt

from .boundary import BoundaryF1
from .comparison import Comparison
from .confusion import Confusion, LabelError, intersection_and_union, mean, ratio
from .result import Evaluation, PictureResult
from .truth import (
    check_classes,
    check_counted,
    check_size,
    class_names,
    read_truth,
    remarks_of,
)

PLAIN = "plain"
_EARLY = 16  # pictures after which masks of 0 and 255 are told, of models of two classes


def evaluate(
    model: Model,
    dataset: str | Path | Pairs,
    *,
    processor: ImageProcessor | None = None,
    batch_size: int | None = None,
    slide: Sequence[int | Sequence[int]] | None = None,
    tta: Sequence[str | float] | None = None,
    prompts: Sequence[SegGptPrompt | Pair] | None = None,
    split: str | None = None,
    num_labels: int | None = None,
    ignore_index: int | None = 255,
    reduce_labels: bool | None = None,
    boundary: bool = False,
    against: Model | str | None = None,
    against_processor: ImageProcessor | None = None,
    worst: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """Mean IoU and the rest of `model` on pictures with true label maps.

    All pixels of all pictures are counted in one confusion matrix, at the label maps' own size, so
    memory does not grow with the pictures (with `against` by 2.4 kB a picture at 150 classes).

    Args:
        model: in eval mode, as `fastseg.segment` takes it: fastseg's, transformers', accelerated
            or not, or any other whose output is logits or has them. One of a single class is taken
            for two, the background and its class.
        dataset: any iterable of (image, label map), such as a list or a torch Dataset: images as
            `fastseg.segment` takes them, label maps (H, W) of integers, NumPy, torch or PIL. Or a
            folder, in one of the layouts of docs/evaluate.md.
        processor, slide, tta, prompts: as of `fastseg.segment`; prompts are what
            `fastseg.keep_prompt` makes.
        batch_size: pictures, or windows, in one forward; None takes 8 on a GPU and 1 elsewhere.
        split: of a folder; None takes the validation split.
        num_labels: of the model, where its configuration does not tell.
        ignore_index: the label of pixels that count nowhere, whatever is predicted there; None
            counts all.
        reduce_labels: lower true labels by one, 0 becoming 255. None does it where the data set
            is ADE20K, or of unknown kind and the processor does (`do_reduce_labels`).
        boundary: find the boundary F1 of each class too.
        against: another model, on the same pictures; or "plain" for `model` by its plain path.
        against_processor: of that model; None takes `processor`, or else the model's own.
        worst: keep so many pictures, those of the lowest mean IoU.
        progress: called with the number of pictures that were done since the last call.

    Raises:
        TypeError, ValueError: as `segment` raises them; or label maps hold what is no class, differ
            in size from their pictures, or leave nothing to count; the message names the picture.
        FileNotFoundError: a folder has no known layout, or masks are missing.
        ImportError: reading it needs a package that is not installed.
    """
    if isinstance(dataset, str | Path):
        dataset = open_dataset(dataset, split)
    elif split is not None:
        raise ValueError(f"split: expected None with a dataset that is no folder, got {split!r}")
    return evaluate_part(
        model,
        dataset,
        is_whole=True,
        processor=processor,
        batch_size=batch_size,
        slide=slide,
        tta=tta,
        prompts=prompts,
        num_labels=num_labels,
        ignore_index=ignore_index,
        reduce_labels=reduce_labels,
        boundary=boundary,
        against=against,
        against_processor=against_processor,
        worst=worst,
        progress=progress,
    )


def evaluate_part(
    model: Any,
    dataset: Any,
    *,
    is_whole: bool = False,
    processor: Any = None,
    batch_size: int | None = None,
    slide: Sequence[int | Sequence[int]] | None = None,
    tta: Sequence[str | float] | None = None,
    prompts: Sequence[Any] | None = None,
    num_labels: int | None = None,
    ignore_index: int | None = 255,
    reduce_labels: bool | None = None,
    boundary: bool = False,
    against: Any = None,
    against_processor: Any = None,
    worst: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Evaluation:
    """What `evaluate` gives, of a part of a data set, which may have no picture and no label.

    With `is_whole` neither is right.
    """
    if isinstance(against, str) and against != PLAIN:
        raise ValueError(f"against: expected a model or {PLAIN!r}, got {against!r}")
    if not isinstance(worst, int) or worst < 0:
        raise ValueError(f"worst: expected an integer from 0, got {worst!r}")
    names = class_names(model, num_labels, prompts, dataset)
    measure: dict[str, Any] = {
        "num_labels": len(names),
        "ignore_index": ignore_index,
        "boundary": boundary,
    }
    options = {"slide": slide, "tta": tta, "prompts": prompts}
    runs = [_Run(model, processor, options, **measure)]
    if isinstance(against, str):
        runs.append(_Run(model, runs[0].processor, options, plain=True, **measure))
    elif against is not None:
        if getattr(against, "config", None) is not None:
            check_classes("against", class_names(against, None, prompts, ()), names)
        runs.append(_Run(against, against_processor or processor, options, **measure))
    comparison = Comparison() if len(runs) > 1 else None

    of_data = getattr(dataset, "reduce_labels", None)
    reduce = of_data if reduce_labels is None else reduce_labels
    if reduce is None:
        reduce = bool(getattr(runs[0].processor, "do_reduce_labels", False))
    classes = getattr(dataset, "classes", None)
    if classes is not None and reduce == bool(of_data):
        check_classes("dataset", classes, names)
    if batch_size is None:
        batch_size = 1 if runs[0].device.type == "cpu" else 8

    kept: list[PictureResult] = []
    count, reading = 0, _Stopwatch()
    batches = _batches(dataset, batch_size)
    while True:
        with reading:
            batch = next(batches, None)
        if batch is None:
            break
        images = [image for image, _ in batch]
        try:
            maps = [run.segment(images, batch_size) for run in runs]
        except (TypeError, ValueError) as error:
            named = str(error)
            for index in range(len(batch)):
                named = named.replace(f"images[{index}]", _names_of(dataset, count + index)[0])
            error.args = (named, *error.args[1:])
            raise
        for (image, label_map), *labels in zip(batch, *maps, strict=True):
            of_image, of_mask = _names_of(dataset, count)
            with runs[0].counting:
                truth = read_truth(label_map, of_mask, reduce)
            check_size(truth, labels[0], of_mask, of_image)
            try:
                counts = [run.count(one, truth) for run, one in zip(runs, labels, strict=True)]
            except LabelError as error:
                raise ValueError(f"{of_mask}: {str(error).removeprefix('truth: ')}") from error
            if comparison is not None:
                comparison.add(labels[0], labels[1], counts[0], counts[1])
            if worst and counts[0].any():
                iou = ratio(*intersection_and_union(counts[0]))
                if len(kept) < worst or mean(iou) < kept[-1].mean_iou:
                    found = PictureResult(of_image, iou, image, truth, labels[0].cpu().numpy())
                    kept = sorted([*kept, found], key=lambda one: one.mean_iou)[:worst]
            count += 1
            if is_whole and count == _EARLY and len(names) <= 2:
                check_counted(runs[0].confusion, count, last=False)
        if progress is not None:
            progress(len(batch))
    if is_whole:
        if not count:
            raise ValueError("dataset: expected pictures, got none")
        check_counted(runs[0].confusion, count, last=True)

    settings = {
        "mode": "whole" if slide is None else "slide",
        **{
            name: value
            for name, value in options.items()
            if value is not None and name != "prompts"
        },
        "ignore_index": ignore_index,
        "reduce_labels": reduce,
    }
    results = [
        Evaluation(
            confusion=run.confusion,
            names=names,
            pictures=count,
            settings={**settings, **run.settings},
            seconds={"reading": reading.seconds, **run.seconds},
            boundary=run.boundary,
        )
        for run in runs
    ]
    remarks = [*getattr(dataset, "remarks", ()), *remarks_of(runs[0].confusion)]
    against_result = results[1] if comparison is not None else None
    return dataclasses.replace(
        results[0],
        worst=kept,
        against=against_result,
        comparison=comparison,
        remarks=remarks,
    )


class _Stopwatch:
    """Seconds in its blocks, summed up."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


class _Run:
    """A model over the data set: its label maps, what is counted of them, and the time of both."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        options: Mapping[str, Any],
        plain: bool = False,
        *,
        num_labels: int,
        ignore_index: int | None,
        boundary: bool,
    ) -> None:
        self.processor = saved_processor(model) if processor is None else processor
        self.confusion = Confusion(num_labels, ignore_index)
        self.boundary = BoundaryF1(num_labels, ignore_index) if boundary else None
        parameter = next(model.parameters())
        self.device = parameter.device
        self.settings = {
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": str(parameter.device),
            "path": "plain" if plain else "fast",
        }
        self.segmenting, self.counting = _Stopwatch(), _Stopwatch()
        self._model, self._options, self._plain = model, options, plain

    def segment(self, images: list[Any], batch_size: int) -> list[torch.Tensor]:
        with self.segmenting, plain_path() if self._plain else contextlib.nullcontext():
            maps = segment(
                self._model,
                images,
                processor=self.processor,
                batch_size=batch_size,
                # Bytes are counted sooner, and are an eighth of what a GPU holds.
                dtype=torch.uint8 if self.confusion.num_labels <= 256 else torch.int64,
                **self._options,
            )
            if self.device.type != "cpu":  # or counting would wait for it
                torch.accelerator.synchronize(self.device)
        return maps

    def count(self, labels: torch.Tensor, truth: np.ndarray) -> np.ndarray:
        """Count a picture, and return its confusion matrix."""
        with self.counting:
            counts = self.confusion.add(labels, truth)
        if self.boundary is not None:
            self.boundary.add(labels.cpu().numpy(), truth)
        return counts

    @property
    def seconds(self) -> dict[str, float]:
        return {"segmenting": self.segmenting.seconds, "counting": self.counting.seconds}


def _batches(dataset: Any, size: int) -> Iterator[list[tuple[Any, Any]]]:
    """The pairs of a data set, in lists.

    Raises:
        TypeError: it gives something else.
    """
    if isinstance(dataset, Iterable):
        items = iter(dataset)
    elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):  # a Dataset of torch
        items = (dataset[index] for index in range(len(dataset)))
    else:
        raise TypeError(
            "dataset: expected a folder or an iterable of (image, label map), got "
            f"{type(dataset).__name__}"
        )
    while batch := list(itertools.islice(items, size)):
        for item in batch:
            if not isinstance(item, tuple | list) or len(item) != 2:
                raise TypeError(
                    f"dataset: expected pairs (image, label map), got {type(item).__name__}; of "
                    "rows with columns make pairs: ((row['image'], row['label']) for row in rows)"
                )
        yield batch


def _names_of(dataset: Any, index: int) -> tuple[str, str]:
    """What messages call a picture and its label map."""
    if isinstance(dataset, LabelledPictures):
        return dataset.names[index]
    return f"image {index} of dataset", f"label map {index} of dataset"

"""What `fastseg evaluate` evaluates and writes, in its own process and in actors of a cluster."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastseg.datasets.pictures import LabelledPictures, open_dataset
from fastseg.evaluation.drawing import draw_confusion, draw_errors
from fastseg.evaluation.result import Evaluation
from fastseg.images.reasons import first_line
from fastseg.models.seggpt.prompts import SegGptPrompt

from .classes import Classes
from .files import Source, is_own, write_json, write_png
from .options import EMBEDDED_NAME, CommandError, load_model
from .prompts import config_with_classes, keep_prompts

METRICS, CONFUSION, WORST = "metrics.json", "confusion.png", "worst-{:02d}.png"


@dataclass(frozen=True)
class Subject:
    """A model, its image processor and prompts, and the configuration that names its classes."""

    name: str
    model: Any
    processor: Any
    prompts: list[SegGptPrompt] | None
    config: Any


def load_subject(arguments: argparse.Namespace) -> Subject:
    """The model of `--model`.

    Raises:
        CommandError: it cannot be loaded, or does not go with other options.
    """
    model, processor = load_model(arguments.model, arguments.device, arguments.dtype)
    prompts = keep_prompts(arguments, model, processor)
    config = model.config if prompts is None else config_with_classes(model.config, prompts)
    return Subject(arguments.model or EMBEDDED_NAME, model, processor, prompts, config)


def options_of(arguments: argparse.Namespace, subject: Subject) -> dict[str, Any]:
    """Options of `fastseg.evaluate`, but for another model and the worst pictures."""
    return {
        "processor": subject.processor,
        "prompts": subject.prompts,
        "batch_size": arguments.batch_size,
        "slide": tuple(arguments.slide) if arguments.slide else None,
        "tta": arguments.tta,
        "ignore_index": arguments.ignore,
        "reduce_labels": {"auto": None, "on": True, "off": False}[arguments.reduce_labels],
        "boundary": arguments.boundary,
    }


def open_data(arguments: argparse.Namespace) -> LabelledPictures:
    try:
        data = open_dataset(
            arguments.data,
            arguments.split,
            split_file=arguments.split_file,
            image_column=arguments.image_column,
            label_column=arguments.label_column,
            numbers=arguments.map,
        )
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(str(error)) from error
    return data.first(arguments.limit) if arguments.limit else data


def write_evaluation(
    folder: Path,
    found: Evaluation,
    content: dict[str, Any],
    source: Source,
    classes: Classes | None = None,
) -> list[Path]:
    """Write the figures, the confusion matrix where it holds pixels, and the worst pictures.

    Args:
        content: what stands before the figures.
        classes: for drawings of the worst pictures.

    Raises:
        OSError: a file cannot be written.
    """
    write_json(folder / METRICS, content | found.to_dict(), source)
    written = [folder / METRICS]
    if found.confusion.matrix.any():
        write_png(folder / CONFUSION, draw_confusion(found), source)
        written.append(folder / CONFUSION)
    for path in folder.glob(WORST.replace("{:02d}", "*")):
        if is_own(path):  # of an earlier run, which may have had more
            path.unlink()
    for index, picture in enumerate(found.worst if classes is not None else ()):
        assert classes is not None
        path = folder / WORST.format(index + 1)
        write_png(path, draw_errors(picture, classes.names, classes.colours), source)
        written.append(path)
    return written


def check_output(folder: Path) -> None:
    """Before hours of work, none of which could be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output {folder}: {first_line(error)}", 2) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CommandError(f"--output {folder}: no permission to write there")
    for path in (folder / METRICS, folder / CONFUSION):
        if path.exists() and not is_own(path):
            raise CommandError(f"{path} is not fastseg's: choose another --output", 2)

"""Prompts of `fastseg predict`: pictures with their masks, for a SegGPT."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

from PIL import Image

import fastseg
from fastseg.images.modes import upright
from fastseg.inference.prompted import read_mask
from fastseg.models.seggpt.prompts import SegGptPrompt, is_seggpt

from .options import CommandError, first_line


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt",
        nargs=2,
        action="append",
        metavar=("IMAGE", "MASK"),
        help="a picture and its mask, which a SegGPT is shown; several are taken together. The "
        "mask has class numbers, 0 for the background; of 0 and 255 alone 255 is class 1",
    )


def keep_prompts(
    arguments: argparse.Namespace, model: Any, processor: Any
) -> list[SegGptPrompt] | None:
    """The prompts that are given, prepared for `model`; None for a model that takes none.

    Raises:
        CommandError: they are missing, cannot be read, or do not go with other options.
    """
    pairs: Sequence[Sequence[str]] = arguments.prompt or ()
    if not is_seggpt(model):
        if pairs:
            kind = type(model).__name__
            raise CommandError(f"--prompt: expected a SegGPT by --model, got a {kind}", 2)
        return None
    if not pairs:
        raise CommandError("--model: a SegGPT needs an example: --prompt IMAGE MASK", 2)
    for name in ("slide", "tta", "scores", "threshold"):
        if getattr(arguments, name):
            raise CommandError(f"--{name}: not with --prompt", 2)
    read = []
    count = 0
    for image, mask in pairs:
        try:
            labels, most = read_mask(Image.open(mask), processor)
            read.append((upright(Image.open(image), image), labels))
        except (OSError, ValueError) as error:
            raise CommandError(f"--prompt {image} {mask}: {first_line(error)}") from error
        if most is None:
            raise CommandError(
                "--model: expected an image processor that takes masks as class numbers, got one "
                "with do_convert_rgb=False"
            )
        count = max(count, most)
    kept = []
    for (image, mask), (picture, labels) in zip(pairs, read, strict=True):
        try:
            kept.append(
                fastseg.keep_prompt(model, picture, labels, num_labels=count, processor=processor)
            )
        except (ValueError, TypeError) as error:
            raise CommandError(f"--prompt {image} {mask}: {first_line(error)}") from error
    return kept


def config_with_classes(config: Any, prompts: Sequence[SegGptPrompt]) -> Any:
    """The configuration with names for the classes of the prompts, which have none."""
    config = copy.copy(config)
    count = prompts[0].num_labels
    assert count is not None
    config.id2label = {0: "background"} | {n: f"class {n}" for n in range(1, count + 1)}
    return config

"""`fastseg demo`: the embedded model on a scene, and what the fast path gains there."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import fastseg
from fastseg.demo.scenes import draw_scene
from fastseg.images.overlay import class_shares, format_share

from .classes import choose_classes
from .files import OutputPlan, Source
from .images import open_image
from .options import (
    EMBEDDED_NAME,
    CommandError,
    add_device_options,
    first_line,
    load_model,
    positive,
)
from .results import ResultWriter
from .scenes import write_scenes

SCENE = Path(fastseg.__file__).parent / "demo" / "assets" / "scene.png"
ROUNDS = 9


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="run the embedded model on a scene and time it",
        description="Segments a drawn scene with the embedded model, writes a label map and an "
        "overlay, and times the fast path against the plain one.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output"),
        metavar="DIR",
        help="folder to write to, made where absent (default: output)",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--image", type=Path, metavar="FILE", help="a picture of your own, its first page"
    )
    source.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="draw a new scene and compare with its true labels; the model was trained on scenes "
        "of seeds from 1000000",
    )
    parser.add_argument(
        "--scenes",
        type=positive,
        metavar="N",
        help="write N scenes and their true labels instead, of seeds from that of --seed or 0: "
        "images/, masks/ and classes.txt, to evaluate and to train on",
    )
    add_device_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.scenes is not None:
        return _write_scenes(arguments)
    path, image, truth = _picture(arguments)
    if os.path.exists(arguments.output) and not os.path.isdir(arguments.output):
        raise CommandError(f"--output {arguments.output}: not a folder", 2)
    model, processor = load_model(None, arguments.device, arguments.dtype)
    labels = fastseg.segment(model, [image], processor=processor)[0].cpu().numpy()

    writer = ResultWriter(choose_classes(model.config), EMBEDDED_NAME)
    source = Source(path)
    target = OutputPlan(path.parent, arguments.output, writer.endings).target(source)
    try:
        writer.write(target, source, image, labels)
    except OSError as error:
        raise CommandError(f"cannot write to {arguments.output}: {first_line(error)}") from error
    print(f"{path.name}, {image.width}x{image.height}, model {EMBEDDED_NAME}")
    for ending in writer.endings:
        print(f"wrote {target.path(ending)}")

    print(f"\n{'class':<16}{'share':>8}{'pixels':>10}")
    for item in class_shares(labels, model.config.id2label):
        print(f"{item.name:<16}{format_share(item.share):>8}{item.pixels:>10}")
    if truth is not None:
        agreement, mean_iou = _compare(labels, truth)
        print(f"\nagreement with the true labels: {agreement:.2%} of pixels, mIoU {mean_iou:.3f}")
    print("\n" + _time(model, processor, image, labels))
    return 0


def _write_scenes(arguments: argparse.Namespace) -> int:
    if arguments.image is not None:
        raise CommandError("--scenes: not with --image", 2)
    first = arguments.seed or 0
    try:
        write_scenes(arguments.output, range(first, first + arguments.scenes))
    except ValueError as error:
        raise CommandError(f"--seed: {error}", 2) from error
    except OSError as error:
        raise CommandError(f"--output {arguments.output}: {first_line(error)}") from error
    print(f"{arguments.scenes} scenes in {arguments.output}: images/, masks/, classes.txt")
    return 0


def _picture(arguments: argparse.Namespace) -> tuple[Path, Image.Image, np.ndarray | None]:
    """The name that the outputs take, the picture, and its true labels where it is drawn."""
    if arguments.seed is not None:
        try:
            scene = draw_scene(arguments.seed, (512, 512))
        except ValueError as error:
            raise CommandError(f"--seed: {error}", 2) from error
        return Path(f"scene-{arguments.seed}.png"), Image.fromarray(scene.image), scene.labels
    path = arguments.image or SCENE
    try:
        image = open_image(path)
    except ValueError as error:
        raise CommandError(f"{path}: {error}") from error
    # The embedded scene is the same one wherever fastseg is installed.
    return Path(os.path.abspath(path) if arguments.image else path.name), image, None


def _compare(labels: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Share of equal pixels, and the mean IoU over the classes that are in either map."""
    ious = []
    for index in np.union1d(labels, truth):
        predicted, true = labels == index, truth == index
        ious.append((predicted & true).sum() / (predicted | true).sum())
    return float((labels == truth).mean()), float(np.mean(ious))


def _time(model: Any, processor: Any, image: Image.Image, labels: np.ndarray) -> str:
    """A table of the fast path against the plain one: the same weights, interpolate + argmax."""
    device = next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    pixels = processor([image], return_tensors="pt")["pixel_values"].to(device, dtype)

    def forward_fast() -> torch.Tensor:
        return model(pixels).logits

    def forward_plain() -> torch.Tensor:
        with fastseg.plain_path():
            return model(pixels).logits

    def whole_fast() -> torch.Tensor:
        return fastseg.segment(model, [image], processor=processor)[0].cpu()

    def whole_plain() -> torch.Tensor:
        inputs = processor([image], return_tensors="pt")["pixel_values"].to(device, dtype)
        with fastseg.plain_path():
            logits = model(inputs).logits
        size = (image.height, image.width)
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits.argmax(dim=1)[0].cpu()

    with torch.inference_mode():
        same = float((whole_plain().numpy() == labels).mean())
        forward = _medians(forward_plain, forward_fast, device)
        whole = _medians(whole_plain, whole_fast, device)
    where = f"{torch.get_num_threads()} threads" if device.type == "cpu" else ""
    title = ", ".join(filter(None, [str(device), where, str(dtype).removeprefix("torch.")]))
    rows = [f"{title + ', ms':<34}{'plain':>9}{'fast':>9}{'ratio':>8}"]
    for name, (plain, fast) in (("forward", forward), ("picture to label map", whole)):
        rows.append(f"{name:<34}{plain:>9.1f}{fast:>9.1f}{plain / fast:>7.1f}x")
    rows.append(f"medians of {ROUNDS} runs in turn; label maps equal in {same:.3%} of pixels")
    return "\n".join(rows)


def _medians(
    first: Callable[[], Any], second: Callable[[], Any], device: torch.device
) -> tuple[float, float]:
    """Median milliseconds of both, run in turn so that drifts of the machine meet both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(ROUNDS + 1):
        for function, taken in zip((first, second), times, strict=True):
            _synchronize(device)
            start = time.perf_counter()
            function()
            _synchronize(device)
            if turn > 0:  # the first turn warms up
                taken.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

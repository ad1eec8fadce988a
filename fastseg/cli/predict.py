"""`fastseg predict`: label maps and overlays of files, folders and globs of pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

import fastseg

from .files import JSON, LABELS, OVERLAY, ImageFiles, Target, find_images, plan_outputs
from .images import open_image, read_ahead
from .options import (
    EMBEDDED_NAME,
    CommandError,
    add_device_options,
    first_line,
    fraction,
    load_model,
    positive,
    say,
)
from .results import ResultWriter

_DESCRIPTION = """\
Segments pictures. For each, writes NAME_labels.png (an indexed image whose pixel values are the
class numbers; 16-bit grey for more than 256 classes) and NAME_overlay.png (the classes over the
picture, with a legend of names and shares). Pictures are turned as their EXIF orientation says.

PATHS are files, folders (with all folders below; hidden files, and links to folders, are left out)
and glob patterns. Outputs keep the folder structure of the inputs. Where names meet, as those of
a.jpg and a.png, they keep their suffix: a.jpg_labels.png. Files that fastseg did not write are
never replaced: a-2_labels.png is written instead. Outputs of earlier runs are no inputs.

A picture that cannot be read is reported and the others go on; the exit status is then 1.
"""


@dataclass(frozen=True)
class _Job:
    path: Path
    target: Target


@dataclass(frozen=True)
class _Picture:
    """A job with its picture, or with the reason why it cannot be read."""

    job: _Job
    image: Image.Image | None = None
    reason: str = ""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "predict",
        help="segment pictures: label maps, overlays, JSON",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", metavar="PATHS", help="files, folders and globs")
    parser.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        help="checkpoint folder or hub id (default: the embedded model of drawn scenes)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output"),
        metavar="DIR",
        help="folder to write to, made where absent (default: output)",
    )
    add_device_options(parser)
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=1,
        metavar="N",
        help="pictures, or windows of a picture, to run at once (default: 1)",
    )
    parser.add_argument(
        "--slide",
        type=positive,
        nargs=2,
        metavar=("CROP", "STRIDE"),
        help="run windows of CROP pixels, STRIDE apart, unresized, and average their logits",
    )
    parser.add_argument(
        "--json", action="store_true", help="write NAME.json too: classes, pixels, shares"
    )
    parser.add_argument("--no-overlay", action="store_true", help="write no overlays")
    parser.add_argument(
        "--alpha",
        type=fraction,
        default=0.55,
        metavar="A",
        help="opacity of the colours in overlays, 0 to 1 (default: 0.55)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    slide = tuple(arguments.slide) if arguments.slide else None
    if slide and slide[1] > slide[0]:
        raise CommandError("--slide: expected STRIDE to be at most CROP, or pixels are missed", 2)
    if arguments.output.exists() and not arguments.output.is_dir():
        raise CommandError(f"--output {arguments.output}: not a folder", 2)

    images = find_images(arguments.paths, arguments.output)
    _report(images)
    if not images.paths:
        raise CommandError("no images to segment")
    if arguments.model is None:
        say(
            f"note: using the embedded model {EMBEDDED_NAME}, trained on drawn scenes only; "
            "--model DIR_OR_ID takes another"
        )
    model, processor = load_model(arguments.model, arguments.device, arguments.dtype)
    endings = [LABELS]
    endings += [] if arguments.no_overlay else [OVERLAY]
    endings += [JSON] if arguments.json else []
    writer = ResultWriter(model.config, arguments.model or EMBEDDED_NAME, endings, arguments.alpha)
    targets = plan_outputs(images.paths, images.root, arguments.output, endings)
    jobs = [_Job(path, target) for path, target in zip(images.paths, targets, strict=True)]

    def segment(images: list[Image.Image]) -> list[torch.Tensor]:
        return fastseg.segment(
            model, images, processor=processor, batch_size=arguments.batch_size, slide=slide
        )

    failures = 0
    with tqdm(total=len(jobs), unit="image", file=sys.stderr) as progress:
        for batch in read_ahead(jobs, arguments.batch_size, _read):
            for path, reason in _finish(batch, segment, writer):
                if reason:
                    failures += 1
                    progress.write(f"{path}: {reason}", file=sys.stderr)
                progress.update()
    print(f"{len(jobs) - failures} of {len(jobs)} images segmented, in {arguments.output}")
    return 1 if failures or images.missing else 0


def _report(images: ImageFiles) -> None:
    for argument, reason in images.missing:
        say(f"{argument}: {reason}")
    if images.own:
        say(f"note: {images.own} outputs of earlier runs left out")
    if images.skipped:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(images.skipped.items()))
        say(f"note: files that are no images left out: {kinds}")


def _read(job: _Job) -> _Picture:
    try:
        return _Picture(job, image=open_image(job.path))
    except ValueError as error:
        return _Picture(job, reason=str(error))


def _finish(
    batch: list[_Picture],
    segment: Callable[[list[Image.Image]], list[torch.Tensor]],
    writer: ResultWriter,
) -> Iterator[tuple[Path, str]]:
    """Segment and write a batch; return each path, with the reason where it failed, else ""."""
    readable = [(picture.job, picture.image) for picture in batch if picture.image is not None]
    yield from ((picture.job.path, picture.reason) for picture in batch if picture.image is None)
    try:
        maps = segment([image for _, image in readable]) if readable else []
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:
        if len(readable) == 1:
            yield readable[0][0].path, first_line(error)
            return
        # It may be one picture's fault: the others go on without it.
        for job, image in readable:
            yield from _finish([_Picture(job, image=image)], segment, writer)
        return
    for (job, image), labels in zip(readable, maps, strict=True):
        try:
            writer.write(job.target, job.path, image, labels.cpu().numpy())
        except OSError as error:
            yield job.path, f"cannot write to {job.target.stem.parent}: {first_line(error)}"
        else:
            yield job.path, ""

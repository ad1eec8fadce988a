"""`fastseg predict`: label maps and overlays of files, folders and globs of pictures."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

import fastseg

from .files import JSON, LABELS, OVERLAY, Source, Target, plan_outputs
from .formats import CONVERT
from .images import Page, page_numbers, read_ahead, read_pages
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
from .search import ImageFiles, find_images

_DESCRIPTION = """\
Segments pictures. For each, writes NAME_labels.png (an indexed image whose pixel values are the
class numbers; 16-bit grey for more than 256 classes) and NAME_overlay.png (the classes over the
picture, with a legend of names and shares). Pictures are turned as their EXIF orientation says.

PATHS are files, folders (with all folders below; hidden files, and links to folders, are left out)
and glob patterns. Outputs keep the folder structure of the inputs. Where names meet, as those of
a.jpg and a.png, they keep their suffix: a.jpg_labels.png. A second run on a picture replaces its
outputs; those of another picture, told by its path, and files that fastseg did not write are never
replaced: a-2_labels.png is written instead, with a note. Outputs of earlier runs are no inputs.

Of a file of several pages or frames (TIFF, animated GIF, PNG or WebP) the first is segmented and
the number of the others told; --all-pages segments all: a-page0001_labels.png and so on. Smaller
versions of a page in a TIFF, and what phones put behind a photograph, are no pages.

A picture that cannot be read is reported and the others go on; so are formats such as HEIF and
cameras' raw files, folders without permission, named pipes and devices. The exit status is then 1.
"""


@dataclass(frozen=True)
class _Job:
    source: Source
    target: Target


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
        "--all-pages",
        action="store_true",
        help="segment every page and frame of a file, one at a time (default: the first)",
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
    if os.path.exists(arguments.output) and not os.path.isdir(arguments.output):
        raise CommandError(f"--output {arguments.output}: not a folder", 2)

    images = find_images(arguments.paths, arguments.output)
    _report(images)
    unreadable = images.unreadable.total()
    if not images.paths:
        raise CommandError(f"no images to segment{' that can be read' if unreadable else ''}")
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
    sources = [Source(path) for path in images.paths]
    if arguments.all_pages:
        sources = [source for path in images.paths for source in _all_pages(path)]
    targets = plan_outputs(sources, images.root, arguments.output, endings)
    jobs = [_Job(source, target) for source, target in zip(sources, targets, strict=True)]
    _report_numbered(jobs)
    _check_output(arguments.output)

    def segment(images: list[Image.Image]) -> list[torch.Tensor]:
        return fastseg.segment(
            model, images, processor=processor, batch_size=arguments.batch_size, slide=slide
        )

    failures = 0
    left_out: dict[Path, int] = {}
    # No bar where nobody sees it move: a log would fill with its states.
    with tqdm(total=len(jobs), unit="image", file=sys.stderr, disable=None) as progress:
        for batch in read_ahead(_pages(jobs), arguments.batch_size):
            left_out |= {job.source.path: page.left_out for job, page in batch if page.left_out}
            for source, reason in _finish(batch, segment, writer):
                if reason:
                    failures += 1
                    progress.write(f"{source}: {reason}", file=sys.stderr)
                progress.update()
    if left_out:
        others = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        say(
            f"note: pages or frames after the first left out: {sum(left_out.values())}, of "
            f"{next(iter(left_out))}{others}; --all-pages segments them"
        )
    done, total = len(jobs) - failures, len(jobs) + unreadable
    print(f"{done} of {total} images segmented, in {arguments.output}")
    return 1 if done < total or images.missing else 0


def _report(images: ImageFiles) -> None:
    for place, reason in images.missing.items():
        say(f"{place}: {reason}")
    if images.own:
        say(f"note: {images.own} outputs of earlier runs left out")
    if images.unreadable:
        say(f"{_counted(images.unreadable)}: fastseg cannot read these formats; {CONVERT}")
    if images.skipped:
        say(
            f"note: files of other kinds left out: {_counted(images.skipped)} "
            "(a file that is named itself is read whatever its kind)"
        )


def _counted(suffixes: Counter[str]) -> str:
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(suffixes.items()))


def _report_numbered(jobs: list[_Job]) -> None:
    numbered = [job for job in jobs if job.target.numbered]
    if numbered:
        first, others = numbered[0], len(numbered) - 1
        say(
            f"note: {first.source} goes to {first.target.path(LABELS)}"
            + (f", and {others} more get a number likewise" if others else "")
            + ": the name is taken, by another picture or by a file that is not known to be an "
            "earlier result"
        )


def _check_output(folder: Path) -> None:
    """Before hours of work, none of which could be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output {folder}: {first_line(error)}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CommandError(f"--output {folder}: no permission to write there")


def _all_pages(path: Path) -> list[Source]:
    numbers = page_numbers(path)
    return [Source(path, number, numbers[-1]) for number in numbers]


def _pages(jobs: list[_Job]) -> Iterator[tuple[_Job, Page]]:
    """Each job with its page, read when it is asked for."""
    for path, group in itertools.groupby(jobs, key=lambda job: job.source.path):
        of_file = list(group)
        pages = read_pages(path, [job.source.page for job in of_file])
        yield from zip(of_file, pages, strict=True)


def _finish(
    batch: list[tuple[_Job, Page]],
    segment: Callable[[list[Image.Image]], list[torch.Tensor]],
    writer: ResultWriter,
) -> Iterator[tuple[Source, str]]:
    """Segment and write a batch; return each source, with the reason where it failed, else ""."""
    readable = [(job, page, page.image) for job, page in batch if page.image is not None]
    yield from ((job.source, page.reason) for job, page in batch if page.image is None)
    try:
        maps = segment([image for *_, image in readable]) if readable else []
    except Exception as error:  # pictures, memory and devices fail in more ways than can be listed
        if len(readable) == 1:
            yield readable[0][0].source, first_line(error)
            return
        # It may be one picture's fault: the others go on without it.
        for job, page, _ in readable:
            yield from _finish([(job, page)], segment, writer)
        return
    for (job, _, image), labels in zip(readable, maps, strict=True):
        try:
            writer.write(job.target, job.source, image, labels.cpu().numpy())
        except Exception as error:
            reason = f"cannot write to {job.target.stem.parent}: {first_line(error)}"
            yield job.source, reason
        else:
            yield job.source, ""

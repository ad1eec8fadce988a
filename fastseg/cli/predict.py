"""`fastseg predict`: label maps and overlays of files, folders, globs and URLs of pictures."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import tempfile
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fastseg.exporting.runtimes import RUNTIMES
from fastseg.images.inputs import CHANNELS_LAST
from fastseg.images.outlines import MISSING
from fastseg.images.overlay import MAX_INDEXED
from fastseg.images.packed import RLE, ZLIB
from fastseg.images.palettes import DATASETS
from fastseg.inference.prompted import PromptedSteps
from fastseg.inference.scores import Wanted
from fastseg.inference.steps import Steps
from fastseg.kernels.core.precision import FAST

from .classes import LABEL_IDS, choose_classes, find_classes
from .coco import CocoFile
from .engine import add_engine_options, check_engine_options
from .engine_predict import NOT_WITH_ENGINE, predict_by_engine
from .files import CUTOUT, JSON, LABELS, OVERLAYS, POLYGONS, SCORES, OutputPlan
from .jobs import Jobs, add_job_options
from .manifest import Manifest
from .options import (
    EMBEDDED,
    EMBEDDED_NAME,
    CommandError,
    add_device_options,
    add_tta_option,
    fraction,
    load_model,
    note,
    place,
    positive,
    quiet,
    say,
)
from .prompts import add_prompt_options, config_with_classes, keep_prompts
from .remote import MAX_MIB, REDIRECTS, SECONDS, Copies
from .results import GREY, PALETTE, ResultWriter
from .search import ImageFiles
from .searched import check_output, report_search, tell
from .work import Stages, Tally, carry_out

NO_OVERLAY = "none"

_DESCRIPTION = f"""\
Segments pictures. For each, writes NAME_labels.png (an indexed image whose pixel values are the
class numbers; 16-bit grey for more than 256 classes) and NAME_overlay.jpg (the classes over the
picture, with a legend of names and shares). Pictures are turned as their EXIF orientation says.

PATHS are files, folders (with all folders below; hidden files, and links to folders, are left out),
glob patterns, URLs (http:// and https://), and - for one picture on standard input. A URL may take
{SECONDS:g} seconds and {REDIRECTS} redirects; it and standard input may give {MAX_MIB} MiB.

Outputs keep the folder structure of the inputs; those of URLs have the last segment of the path for
a name. Where names meet, as those of a.jpg and a.png, they keep their suffix: a.jpg_labels.png. A
second run on a picture replaces its outputs; those of another picture, told by its path, and files
that fastseg did not write are never replaced: a-2_labels.png is written instead, with a note.
Outputs of earlier runs are no inputs.

Of a file of several pages or frames (TIFF, animated GIF, PNG or WebP) the first is segmented and
the number of the others told; --all-pages segments all: a-page0001_labels.png and so on. Smaller
versions of a page in a TIFF, and what phones put behind a photograph, are no pages.

TIFFs of many bands and of floats, for models of as many channels, need tifffile; HEIF needs
pillow-heif.

A picture that cannot be read is reported and the others go on; so are URLs that fail, formats such
as cameras' raw files, folders without permission, named pipes and devices. The exit status is then
1.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "predict",
        help="segment pictures: label maps, overlays, JSON",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "paths", nargs="+", metavar="PATHS", help="files, folders, globs, URLs, - for stdin"
    )
    parser.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        help="checkpoint: folder, file or hub id (default: the embedded model of drawn scenes)",
    )
    parser.add_argument(
        "--output",
        type=place,
        default=Path("output"),
        metavar="DIR",
        help="folder to write to, made where absent; with --engine a URL that pyarrow reaches too "
        "(default: output)",
    )
    add_device_options(parser)
    parser.add_argument(
        "--runtime",
        choices=RUNTIMES,
        help="let this library compute the model, on the CPU, from its folded graph; --model may "
        "be an ONNX file of `fastseg export` then, and --dtype is what it is to compute in "
        "(default: its own choice)",
    )
    add_prompt_options(parser)
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
    add_tta_option(parser)
    parser.add_argument(
        "--all-pages",
        action="store_true",
        help="segment every page and frame of a file, one at a time (default: the first)",
    )
    parser.add_argument(
        "--json", action="store_true", help="write NAME.json too: classes, pixels, shares"
    )
    parser.add_argument(
        "--labels",
        choices=(PALETTE, GREY, ZLIB, RLE),
        default=PALETTE,
        help="form of the label maps: indexed with the classes' colours, or grey; the pixel values "
        "are the same; with --engine zlib and rle too, in the receipts (default: palette)",
    )
    parser.add_argument(
        "--map",
        choices=(LABEL_IDS,),
        help="write Cityscapes' own ids in place of class numbers, in label maps and JSON",
    )
    parser.add_argument(
        "--classes",
        metavar="NAMES",
        help="show these alone, names or numbers with commas between them; pixels of others become "
        "255 (65535 where there are more than 255 classes, 0 with --map labelIds), are called "
        "unlabeled, and have no colour",
    )
    parser.add_argument(
        "--palette",
        choices=DATASETS,
        help="colours of a data set, and its class names where the model has others (default: by "
        "the model's class names)",
    )
    parser.add_argument(
        "--scores",
        action="store_true",
        help="write NAME_scores.png too: 255 times the probability of every pixel's class, grey",
    )
    parser.add_argument(
        "--threshold",
        type=fraction,
        metavar="P",
        help="give pixels whose class has a probability below P the label 255, not certain; of "
        "one class: find it where its probability is above P (default: 0.5)",
    )
    parser.add_argument(
        "--overlay",
        choices=(*OVERLAYS, NO_OVERLAY),
        help="format of the overlays: jpg is much quicker to write than png (default: jpg; none "
        "with --engine)",
    )
    parser.add_argument(
        "--no-overlay",
        action="store_const",
        const=NO_OVERLAY,
        dest="overlay",
        help="write no overlays: --overlay none",
    )
    parser.add_argument(
        "--alpha",
        type=fraction,
        default=0.55,
        metavar="A",
        help="opacity of the colours in overlays, 0 to 1 (default: 0.55)",
    )
    parser.add_argument(
        "--cutout",
        metavar="NAMES",
        help="write NAME_cutout.png too: these classes of the picture, names or numbers with "
        "commas between them, on a transparent ground",
    )
    parser.add_argument(
        "--polygons",
        action="store_true",
        help="write NAME_polygons.geojson too: each region with its holes, in pixels; needs "
        "fastseg-segformer[geo]",
    )
    parser.add_argument(
        "--coco",
        type=Path,
        metavar="FILE",
        help="write FILE at the end: COCO annotations of all pictures of the run, a mask of run "
        "lengths for each class",
    )
    add_job_options(parser)
    add_engine_options(parser)
    parser.add_argument(
        "--max-pixels",
        type=positive,
        metavar="N",
        help="read pictures of up to N pixels (default: Pillow's limit, some 179 million)",
    )
    parser.add_argument(
        "--quiet",
        action="store_true",
        help="tell failures and warnings alone: no notes, bar or count",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    check_engine_options(arguments, NOT_WITH_ENGINE)
    if arguments.engine is not None:
        with quiet(arguments.quiet):
            return predict_by_engine(arguments)
    if not isinstance(arguments.output, Path):
        raise CommandError(f"--output {arguments.output}: a URL only with --engine ray", 2)
    if arguments.labels in (ZLIB, RLE):
        raise CommandError(f"--labels {arguments.labels}: only with --engine ray", 2)
    arguments.overlay = arguments.overlay or "jpg"
    with (
        quiet(arguments.quiet),
        _pixel_limit(arguments.max_pixels),
        tempfile.TemporaryDirectory(prefix="fastseg-", ignore_cleanup_errors=True) as copies,
    ):
        return _run(arguments, Copies(Path(copies)))


@contextlib.contextmanager
def _pixel_limit(pixels: int | None) -> Iterator[None]:
    """Let Pillow read pictures of up to `pixels`, by default as many as it reads, without a word.

    It warns above its own limit, and fails above twice that.
    """
    before = Image.MAX_IMAGE_PIXELS
    if pixels is not None:
        Image.MAX_IMAGE_PIXELS = (pixels + 1) // 2
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _run(arguments: argparse.Namespace, copies: Copies) -> int:
    slide = tuple(arguments.slide) if arguments.slide else None
    if slide and slide[1] > slide[0]:
        raise CommandError("--slide: expected STRIDE to be at most CROP, or pixels are missed", 2)
    if arguments.coco is not None and arguments.resume:
        raise CommandError("--coco: expected no --resume, as FILE is of the pictures of one run", 2)
    if arguments.polygons and not all(map(find_spec, ("rasterio", "shapely"))):
        raise CommandError(f"--polygons: {MISSING}", 2)
    if os.path.exists(arguments.output) and not os.path.isdir(arguments.output):
        raise CommandError(f"--output {arguments.output}: not a folder", 2)

    images = ImageFiles(arguments.paths, arguments.output, copies, tell)
    found = iter(images)
    some = list(itertools.islice(found, 1))
    if not some:
        report_search(images)
        readable = " that can be read" if images.unreadable else ""
        raise CommandError(f"no images to segment{readable}")
    if arguments.model is None:
        note(
            f"using the embedded model, {EMBEDDED}, trained on drawn scenes only; "
            "--model DIR_OR_ID takes another"
        )
    model, processor = load_model(
        arguments.model, arguments.device, arguments.dtype, arguments.runtime
    )
    model_name = arguments.model or EMBEDDED_NAME
    prompts = keep_prompts(arguments, model, processor)
    config = model.config if prompts is None else config_with_classes(model.config, prompts)
    try:
        classes = choose_classes(config, arguments.palette, arguments.classes, arguments.map)
    except ValueError as error:
        raise CommandError(f"--model {model_name}: {error}") from error
    # In an eighth of the memory, where that holds all classes.
    dtype = torch.uint8 if len(classes.colours) <= MAX_INDEXED else torch.int64
    steps: Steps | PromptedSteps
    exact = None
    if prompts is None:
        wanted = Wanted.of(model, arguments.scores, torch.uint8, arguments.threshold, dtype)
        options: dict[str, Any] = {"batch_size": arguments.batch_size, "slide": slide}
        options["tta"] = arguments.tta
        options["input_data_format"] = CHANNELS_LAST
        steps = Steps(model, processor, wanted, **options)
        if arguments.dtype == FAST and arguments.runtime is None and model.dtype != torch.float32:

            def exact() -> Steps:
                same = load_model(arguments.model, arguments.device, "float32")[0]
                return Steps(same, processor, wanted, **options)
    else:
        steps = PromptedSteps(model, processor=processor, prompts=prompts, dtype=dtype)

    endings = [LABELS]
    endings += [] if arguments.overlay == NO_OVERLAY else [OVERLAYS[arguments.overlay]]
    endings += [SCORES] if arguments.scores else []
    endings += [JSON] if arguments.json else []
    endings += [CUTOUT] if arguments.cutout else []
    endings += [POLYGONS] if arguments.polygons else []
    writer = ResultWriter(classes, model_name, endings, arguments.alpha, arguments.labels)
    reading = {
        "channels": getattr(model.config, "num_channels", None),
        "raw": not processor.do_rescale,
    }
    check_output(arguments.output)
    manifest = None
    if arguments.manifest is not None:
        manifest = Manifest(arguments.manifest, arguments.resume)
        writer.describes = True
    if arguments.cutout:
        writer.cut = find_classes("--cutout", arguments.cutout, classes.names)
    coco = None
    if arguments.coco is not None:
        coco = CocoFile(arguments.coco, classes.written().names)
        writer.annotates = True
    plan = OutputPlan(images.root, arguments.output, endings)
    jobs = Jobs(itertools.chain(some, found), plan, reading, arguments, manifest)
    tally = Tally(manifest, coco)
    speed = carry_out(jobs, Stages(model, steps, writer, exact), tally, arguments, copies)
    report_search(images)
    jobs.report()
    tally.report()
    total = jobs.total + images.unreadable.total()
    if not arguments.quiet:
        print(f"{tally.done} of {total} images segmented, in {arguments.output}")
        if speed:
            print(speed)
    if coco is not None:
        coco.finish()
    for option, file in (("manifest", manifest), ("coco", coco)):
        if file is not None and file.error:
            say(f"--{option} {getattr(arguments, option)}: {file.error}")
            return 1
    return 1 if tally.done < total or images.missing else 0

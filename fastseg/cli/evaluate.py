"""`fastseg evaluate`: mean IoU and the rest on pictures with masks, and two models compared."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

import fastseg
from fastseg.datasets.masks import NUMBERINGS
from fastseg.datasets.pictures import LabelledPictures, open_dataset
from fastseg.evaluation.drawing import draw_confusion, draw_errors
from fastseg.evaluation.evaluate import PLAIN

from .classes import Classes, choose_classes
from .files import Source, is_own, write_json, write_png
from .options import (
    DTYPES,
    EMBEDDED,
    EMBEDDED_NAME,
    CommandError,
    add_device_options,
    add_tta_option,
    first_line,
    load_model,
    note,
    positive,
    quiet,
)
from .prompts import add_prompt_options, config_with_classes, keep_prompts

METRICS, CONFUSION, WORST = "metrics.json", "confusion.png", "worst-{:02d}.png"

_DESCRIPTION = f"""\
Segments pictures that have masks, and tells how right the label maps are: IoU and accuracy of each
class, their means, pixel accuracy and frequency-weighted IoU, all of one confusion matrix over the
pixels of all pictures. Writes {METRICS}, {CONFUSION} and the worst pictures.

DATA is a folder, told by what is in it: Cityscapes (leftImg8bit/, gtFine/), ADE20K (images/ and
annotations/ with its file names), Pascal VOC (JPEGImages/, SegmentationClass/), a data set of
Hugging Face datasets (save_to_disk, or parquet; a single file too), or images/ and masks/ with
masks of the same names, whose pixel values are class numbers; a folder for each split may be below,
and classes.txt beside, one name a line.

Pixels of the label 255 are ignored, whatever is predicted there. Classes in neither map have no
part in means; one that is only predicted has an IoU of 0.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="mIoU of a model on pictures with masks, and of two models against each other",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="a folder of pictures and masks")
    parser.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        help="checkpoint: folder, file or hub id (default: the embedded model of drawn scenes)",
    )
    parser.add_argument(
        "--against",
        metavar="OTHER",
        help="compare with another model on the same pictures: a folder, a file or a hub id; or "
        f"{', '.join(DTYPES)} for the same model in that precision; or {PLAIN} for it as it is "
        "trained, without the fast path",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("evaluation"),
        metavar="DIR",
        help="folder to write to, made where absent (default: evaluation)",
    )
    add_device_options(parser)
    data = parser.add_argument_group("pictures and masks")
    data.add_argument("--split", metavar="NAME", help="(default: that of validation)")
    data.add_argument(
        "--split-file",
        type=Path,
        metavar="FILE",
        help="a list of the pictures to take, one a line, by name; or of pictures and their masks",
    )
    data.add_argument("--limit", type=positive, metavar="N", help="take the first N pictures")
    data.add_argument("--image-column", metavar="NAME", help="of a table, the pictures")
    data.add_argument("--label-column", metavar="NAME", help="of a table, the masks")
    data.add_argument(
        "--map",
        choices=NUMBERINGS,
        help="labelIds: masks hold Cityscapes' own ids; binary: masks hold 0 and 255, for class 1",
    )
    data.add_argument(
        "--reduce-labels",
        choices=("auto", "on", "off"),
        default="auto",
        help="lower labels by one, 0 becoming 255, which is ignored; auto does it for ADE20K, and "
        "for folders of unknown kind where the model's image processor does (default: auto)",
    )
    data.add_argument(
        "--ignore",
        type=_label,
        default=255,
        metavar="LABEL",
        help="the label of pixels that count nowhere, or none (default: 255)",
    )
    how = parser.add_argument_group("label maps")
    how.add_argument(
        "--slide",
        type=positive,
        nargs=2,
        metavar=("CROP", "STRIDE"),
        help="run windows of CROP pixels, STRIDE apart, unresized, and average their logits "
        "(default: pictures as a whole, resized as the image processor says)",
    )
    add_tta_option(how)
    how.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        help="pictures, or windows of a picture, to run at once (default: 8 on a GPU, else 1)",
    )
    add_prompt_options(how)
    parser.add_argument("--boundary", action="store_true", help="boundary F1 of each class too")
    parser.add_argument(
        "--worst",
        type=_count,
        default=5,
        metavar="N",
        help="draw the N pictures of the lowest mean IoU (default: 5)",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="tell results and failures alone: no notes, no bar"
    )
    # What `keep_prompts` looks at, of options that are not here.
    parser.set_defaults(run=run, scores=False, threshold=None)


def _label(text: str) -> int | None:
    if text == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected an integer or none, got {text!r}") from None


def _count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def run(arguments: argparse.Namespace) -> int:
    if arguments.slide and arguments.slide[1] > arguments.slide[0]:
        raise CommandError("--slide: expected STRIDE to be at most CROP, or pixels are missed", 2)
    with quiet(arguments.quiet):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    _check_output(arguments.output)
    data = _open(arguments)
    if arguments.model is None:
        note(f"using the embedded model, {EMBEDDED}, trained on drawn scenes only")
    model, processor = load_model(arguments.model, arguments.device, arguments.dtype)
    prompts = keep_prompts(arguments, model, processor)
    config = model.config if prompts is None else config_with_classes(model.config, prompts)
    against, other_processor = _load_other(arguments)
    options: dict[str, Any] = {
        "processor": processor,
        "against": against,
        "against_processor": other_processor,
        "prompts": prompts,
        "batch_size": arguments.batch_size,
        "slide": tuple(arguments.slide) if arguments.slide else None,
        "tta": arguments.tta,
        "ignore_index": arguments.ignore,
        "reduce_labels": {"auto": None, "on": True, "off": False}[arguments.reduce_labels],
        "boundary": arguments.boundary,
        "worst": arguments.worst,
    }
    start = time.perf_counter()
    bar = {"unit": "image", "file": sys.stderr, "disable": True if arguments.quiet else None}
    with tqdm(total=len(data), **bar) as progress:
        try:
            found = fastseg.evaluate(model, data, progress=progress.update, **options)
        except (OSError, ValueError, TypeError, ImportError) as error:
            raise CommandError(str(error)) from error
    seconds = time.perf_counter() - start
    name = arguments.model or EMBEDDED_NAME
    print(f"{_told(arguments, data, name, found)}\n\n{found}\n{_speed(found, seconds)}")
    try:
        written = _write(arguments, name, found, choose_classes(config))
    except OSError as error:
        raise CommandError(f"--output {arguments.output}: {first_line(error)}") from error
    print("wrote " + ", ".join(map(str, written)))
    return 0


def _open(arguments: argparse.Namespace) -> LabelledPictures:
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


def _load_other(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """What `--against` names, and its image processor."""
    other = arguments.against
    if other is None or other == PLAIN:
        return other, None
    if other in DTYPES:
        return load_model(arguments.model, arguments.device, other)
    return load_model(other, arguments.device, arguments.dtype)


def _told(arguments: argparse.Namespace, data: LabelledPictures, name: str, found: Any) -> str:
    """What was evaluated, and how, in a line."""
    settings = found.settings
    how = "whole pictures"
    if settings["mode"] == "slide":
        how = "windows of {} pixels, {} apart".format(*settings["slide"])
    if "tta" in settings:
        how += f", tta {','.join(map(str, settings['tta']))}"
    labels = "labels lowered by one" if settings["reduce_labels"] else "labels as they are"
    ignored = settings["ignore_index"]
    where = f"{settings['dtype']} on {settings['device']}"
    return (
        f"{arguments.data} ({data.kind}), {name}, {where}: {how}; {labels}, "
        + ("none ignored" if ignored is None else f"{ignored} ignored")
        + (f"; against {arguments.against}" if arguments.against else "")
    )


def _speed(found: Any, seconds: float) -> str:
    """Pictures a second, and where the time went."""
    spent = {"reading": found.seconds["reading"], "the model": found.seconds["segmenting"]}
    if found.against is not None:
        spent["the other"] = found.against.seconds["segmenting"]
    spent["counting"] = found.seconds["counting"]
    shares = ", ".join(f"{stage} {100 * one / seconds:.1f} %" for stage, one in spent.items())
    return f"{found.pictures / seconds:.2f} pictures a second: {shares}"


def _check_output(folder: Path) -> None:
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


def _write(arguments: argparse.Namespace, name: str, found: Any, classes: Classes) -> list[Path]:
    folder, source = arguments.output, Source(arguments.data.absolute())
    content = {"model": name, "data": str(arguments.data)}
    if arguments.against:
        content["compared_with"] = arguments.against
    write_json(folder / METRICS, content | found.to_dict(), source)
    write_png(folder / CONFUSION, draw_confusion(found), source)
    written = [folder / METRICS, folder / CONFUSION]
    for path in folder.glob(WORST.replace("{:02d}", "*")):
        if is_own(path):  # of an earlier run, which may have had more
            path.unlink()
    for index, picture in enumerate(found.worst):
        path = folder / WORST.format(index + 1)
        write_png(path, draw_errors(picture, classes.names, classes.colours), source)
        written.append(path)
    return written

"""`fastseg evaluate`: mean IoU and the rest on pictures with masks, and two models compared."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

import fastseg
from fastseg.datasets.masks import NUMBERINGS
from fastseg.evaluation.evaluate import PLAIN, evaluate_part
from fastseg.evaluation.result import Evaluation

from .classes import Classes, choose_classes
from .engine import add_engine_options, check_engine_options
from .evaluate_parts import (
    NOT_WITH_ENGINE,
    Sum,
    evaluate_by_engine,
    merged,
    part_of,
    shard_folder,
)
from .evaluate_work import (
    CONFUSION,
    METRICS,
    check_output,
    load_subject,
    open_data,
    options_of,
    write_evaluation,
)
from .files import Source
from .jobs import shard
from .options import (
    DTYPES,
    EMBEDDED,
    CommandError,
    add_device_options,
    add_tta_option,
    first_line,
    load_model,
    note,
    positive,
    quiet,
)
from .prompts import add_prompt_options

_WORST = 5  # pictures that are drawn

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
    parser.add_argument(
        "data", type=Path, nargs="?", metavar="DATA", help="a folder of pictures and masks"
    )
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
        metavar="N",
        help="draw the N pictures of the lowest mean IoU (default: 5; none with --engine)",
    )
    parser.add_argument(
        "--shard",
        type=shard,
        metavar="I/N",
        help="take every N-th picture alone, from the I-th, and write into a folder of its own in "
        "--output: N machines with I from 1 to N do all, and then --merge adds up",
    )
    parser.add_argument(
        "--merge",
        type=Path,
        metavar="DIR",
        help="evaluate nothing: add up the shards in DIR, which was their --output; the figures "
        "are those of one run, exactly",
    )
    add_engine_options(parser)
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
    check_engine_options(arguments, NOT_WITH_ENGINE)
    if (arguments.data is None) == (arguments.merge is None):
        raise CommandError("DATA: expected it, or --merge DIR with the shards of an earlier run", 2)
    if arguments.shard is not None and arguments.against is not None:
        raise CommandError("--against: not with --shard, as differences do not add up", 2)
    if arguments.slide and arguments.slide[1] > arguments.slide[0]:
        raise CommandError("--slide: expected STRIDE to be at most CROP, or pixels are missed", 2)
    with quiet(arguments.quiet):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.merge is not None:
        return _merge(arguments)
    whole = arguments.output
    if arguments.shard is not None:
        arguments.output = shard_folder(whole, arguments.shard)
    check_output(arguments.output)
    data = open_data(arguments)
    if arguments.model is None:
        note(f"using the embedded model, {EMBEDDED}, trained on drawn scenes only")
    subject = load_subject(arguments)
    of = {"model": subject.name, "data": str(arguments.data), "data_kind": data.kind}
    start = time.perf_counter()
    if arguments.engine is not None:
        total, actors = evaluate_by_engine(arguments, subject)
        return _tell(arguments.output, total, f"by {actors}", time.perf_counter() - start)
    against, other_processor = _load_other(arguments)
    options = options_of(arguments, subject)
    options |= {"against": against, "against_processor": other_processor}
    options["worst"] = _WORST if arguments.worst is None else arguments.worst
    evaluate: Callable[..., Evaluation] = fastseg.evaluate
    if arguments.shard is not None:
        first, step = arguments.shard
        data, evaluate = data.some(range(first - 1, len(data), step)), evaluate_part
    bar = {"unit": "image", "file": sys.stderr, "disable": True if arguments.quiet else None}
    with tqdm(total=len(data), **bar) as progress:
        try:
            found = evaluate(subject.model, data, progress=progress.update, **options)
        except (OSError, ValueError, TypeError, ImportError) as error:
            raise CommandError(str(error)) from error
    seconds = time.perf_counter() - start
    told = _told(of, found.settings)
    told += f"; against {arguments.against}" if arguments.against else ""
    if arguments.against:
        of["compared_with"] = arguments.against
    del of["data_kind"]
    if arguments.shard is not None:
        of |= {"shard": list(arguments.shard), "data_kind": data.kind} | part_of(found)
        print(f"{told}\n{found.pictures} pictures of shard {first}/{step}", end="")
        print(f"; when all are done: fastseg evaluate --merge {whole}")
    else:
        print(f"{told}\n\n{found}\n{_speed(found, seconds)}")
    _write(arguments.output, found, of, choose_classes(subject.config))
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    """Add up the shards in a folder, and write beside them what one run would have written."""
    total = merged(arguments.merge)
    check_output(arguments.merge)
    return _tell(arguments.merge, total, "shards added up")


def _tell(folder: Path, total: Sum, by: str, seconds: float | None = None) -> int:
    """Print and write the figures of parts; with `seconds` how long it took."""
    try:
        found = total.evaluation()
    except ValueError as error:
        raise CommandError(str(error)) from error
    print(f"{_told(total.of, found.settings)}; {by}\n\n{found}")
    if seconds is not None:
        print(f"{found.pictures / seconds:.2f} pictures a second")
    content = {name: total.of[name] for name in ("model", "data")}
    _write(folder, found, content)
    return 0


def _write(
    folder: Path, found: Evaluation, content: dict[str, Any], classes: Classes | None = None
) -> None:
    source = Source(Path(content["data"]).absolute())
    try:
        written = write_evaluation(folder, found, content, source, classes)
    except OSError as error:
        raise CommandError(f"--output {folder}: {first_line(error)}") from error
    print("wrote " + ", ".join(map(str, written)))


def _load_other(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """What `--against` names, and its image processor."""
    other = arguments.against
    if other is None or other == PLAIN:
        return other, None
    if other in DTYPES:
        return load_model(arguments.model, arguments.device, other)
    return load_model(other, arguments.device, arguments.dtype)


def _told(of: dict[str, Any], settings: Mapping[str, Any]) -> str:
    """What was evaluated, and how, in a line."""
    how = "whole pictures"
    if settings["mode"] == "slide":
        how = "windows of {} pixels, {} apart".format(*settings["slide"])
    if "tta" in settings:
        how += f", tta {','.join(map(str, settings['tta']))}"
    labels = "labels lowered by one" if settings["reduce_labels"] else "labels as they are"
    ignored = settings["ignore_index"]
    where = f"{settings['dtype']} on {settings['device']}"
    return f"{of['data']} ({of['data_kind']}), {of['model']}, {where}: {how}; {labels}, " + (
        "none ignored" if ignored is None else f"{ignored} ignored"
    )


def _speed(found: Any, seconds: float) -> str:
    """Pictures a second, and where the time went."""
    spent = {"reading": found.seconds["reading"], "the model": found.seconds["segmenting"]}
    if found.against is not None:
        spent["the other"] = found.against.seconds["segmenting"]
    spent["counting"] = found.seconds["counting"]
    shares = ", ".join(f"{stage} {100 * one / seconds:.1f} %" for stage, one in spent.items())
    return f"{found.pictures / seconds:.2f} pictures a second: {shares}"

"""`fastseg predict --engine`: pictures to the actors of a cluster, and what became of them back.

Paths go there, not pixels, and rows without label maps come back. Receipts are written by the
actors, a batch a file, and say in a later run what is left to do.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from fastseg.images.packed import GREY, PNG, RLE, ZLIB
from fastseg.images.reasons import first_line
from fastseg.images.storage import Storage, is_url
from fastseg.inference.receipts import Receipts
from fastseg.inference.segmenter import LABELS_ENDING, Segmenter

from .engine import Cluster, connected
from .engine_search import LocalFiles, UrlFiles
from .files import OutputPlan, Source
from .options import EMBEDDED_MODEL, EMBEDDED_NAME, CommandError, load_model, note
from .prompts import keep_prompts
from .remote import is_remote
from .results import PALETTE
from .searched import check_output, tell

# Of these, what an actor could do has no place in a row, or is of one file for the whole run.
NOT_WITH_ENGINE: dict[str, Any] = {
    **{"runtime": None, "all_pages": False, "json": False, "map": None, "classes": None},
    **{"palette": None, "scores": False, "alpha": 0.55, "cutout": None, "polygons": False},
    **{"coco": None, "manifest": None, "max_pixels": None},
}
RECEIPTS = "receipts"
# Pictures that the driver holds at once: more are done one such round after another.
_ROUND = 1_000_000


class Picture(NamedTuple):
    """A picture to send: its path or URL, and its label map's place below the output."""

    path: str
    file: str | None


def predict_by_engine(arguments: argparse.Namespace) -> int:
    """Run the command; the status is 1 where a picture failed.

    Raises:
        CommandError: an option does not go with engines, or the whole fails.
    """
    if arguments.overlay not in (None, "none"):
        raise CommandError(f"--overlay {arguments.overlay}: not with --engine ray", 2)
    for argument in arguments.paths:
        if is_remote(argument):
            raise CommandError(
                f"{argument}: with --engine ray pictures are files, or behind URLs of pyarrow's "
                "filesystems, such as s3://bucket/folder",
                2,
            )
    if arguments.slide and arguments.slide[1] > arguments.slide[0]:
        raise CommandError("--slide: expected STRIDE to be at most CROP, or pixels are missed", 2)
    if not is_url(arguments.output):
        check_output(Path(arguments.output))
    try:
        receipts = Receipts(Storage(_absolute(arguments.output)).place(RECEIPTS))
        done = _settled(receipts, arguments)
        behind_urls = any(map(is_url, arguments.paths))
        search = (UrlFiles if behind_urls else LocalFiles)(arguments.paths, arguments.output)
    except (OSError, ValueError, ImportError) as error:
        raise CommandError(f"--engine ray: {first_line(error)}") from error
    pictures = _Pictures(search, arguments, done)
    some = list(itertools.islice(iterator := iter(pictures), 1))
    if not some and not pictures.left_out:
        search.report()
        raise CommandError("no images to segment")
    options = _options(arguments, receipts)
    run = _Run(arguments, receipts)
    if some:
        with connected(arguments) as cluster:
            note(f"{cluster} read, segment and write the pictures")
            options["device"] = cluster.device
            run.rounds(cluster, options, itertools.chain(some, iterator))
    search.report()
    if arguments.resume and some:
        receipts.settle(note)
    if pictures.left_out:
        note(f"{pictures.left_out} images left out, as receipts tell that they are done")
    total = pictures.total + search.unreadable.total()
    if not arguments.quiet:
        print(f"{run.done} of {total} images segmented, in {arguments.output}")
        if run.done:
            print(
                f"{run.done / run.seconds:.3g} images/s by {run.actors}; rows in {receipts.storage}"
            )
    return 1 if run.done < total or search.missing else 0


def _settled(receipts: Receipts, arguments: argparse.Namespace) -> set[str]:
    if arguments.resume:
        return receipts.settle(note)
    if receipts.are_there():
        raise CommandError(
            f"--output {arguments.output}: {receipts.storage} has the rows of an earlier run: pass "
            "--resume to go on with it, or choose another folder",
            2,
        )
    return set()


def _absolute(place: Path | str) -> str:
    """A place that is the same to processes with another working directory."""
    return str(place) if is_url(place) else os.path.abspath(place)


def _options(arguments: argparse.Namespace, receipts: Receipts) -> dict[str, Any]:
    """What each actor makes its Segmenter of, after a look here whether it can."""
    name = arguments.model or EMBEDDED_NAME
    if arguments.model is None:
        note(
            f"using the embedded model {EMBEDDED_NAME}, trained on drawn scenes only; "
            "--model DIR_OR_ID takes another"
        )
    model, processor = load_model(arguments.model, torch.device("cpu"), "float32")
    kept = keep_prompts(arguments, model, processor)
    options: dict[str, Any] = {
        "labels": PNG if arguments.labels == PALETTE else arguments.labels,
        "batch_size": arguments.batch_size,
        "slide": tuple(arguments.slide) if arguments.slide else None,
        "tta": arguments.tta,
        "threshold": arguments.threshold,
        "threads": arguments.workers,
        "arrow": True,
    }
    try:
        Segmenter(model, processor=processor, prompts=kept, **options)
    except (ValueError, TypeError) as error:
        raise CommandError(f"--model {name}: {first_line(error)}", 2) from error
    place = str(EMBEDDED_MODEL) if arguments.model is None else arguments.model
    options["model"] = os.path.abspath(place) if os.path.exists(place) else place
    options["dtype"] = arguments.dtype
    if kept is not None:
        pairs = arguments.prompt
        options["prompts"] = [tuple(os.path.abspath(path) for path in pair) for pair in pairs]
    if arguments.labels not in (ZLIB, RLE):
        options["output"] = _absolute(arguments.output)
    options["receipts"] = receipts.storage.where
    return options


class _Run:
    """Rounds of pictures, and what is told of their rows."""

    def __init__(self, arguments: argparse.Namespace, receipts: Receipts) -> None:
        self._arguments, self._receipts = arguments, receipts
        self.done = 0
        self.seconds = 0.0
        self.actors = ""

    def rounds(
        self, cluster: Cluster, options: dict[str, Any], pictures: Iterator[Picture]
    ) -> None:
        disable = True if self._arguments.quiet else None
        self.actors = str(cluster)
        with tqdm(unit="image", file=sys.stderr, disable=disable) as progress:
            while some := list(itertools.islice(pictures, _ROUND)):
                begun = time.perf_counter()
                progress.total = (progress.total or 0) + len(some)
                progress.refresh()
                size = cluster.block(len(some), self._arguments.batch_size)
                for rows in cluster.map(Segmenter, options, tables_of(some, size)):
                    self._tell(rows.select(["path", "error"]).to_pylist())
                    progress.update(rows.num_rows)
                self.seconds += time.perf_counter() - begun

    def _tell(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            if row["error"] is None:
                self.done += 1
            else:
                tell(row["path"], row["error"])


def tables_of(pictures: list[Picture], size: int) -> Iterator[Any]:
    """Arrow tables of so many pictures each, the last perhaps of fewer."""
    import pyarrow as pa

    schema = pa.schema({"path": pa.string(), "file": pa.string()})
    for start in range(0, len(pictures), size):
        some = pictures[start : start + size]
        yield pa.Table.from_pylist([one._asdict() for one in some], schema=schema)


class _Pictures:
    """What is to be sent, as it is found: a shard of it, up to the limit, without what is done.

    Names of label maps are those of a run without an engine. What lies behind URLs is not looked
    at: names are apart from each other, and results of an earlier run are replaced.
    """

    def __init__(self, found: Any, arguments: argparse.Namespace, done: set[str]) -> None:
        self._found, self._arguments, self._done = found, arguments, done
        keeps_files = arguments.labels in (PALETTE, GREY)
        self._keeps_files = keeps_files
        self._output = Path() if is_url(arguments.output) else Path(arguments.output)
        looks = keeps_files and not is_url(arguments.output)
        self._plan = OutputPlan(found.root, self._output, [LABELS_ENDING] if looks else [])
        self.total = 0
        self.left_out = 0

    def __iter__(self) -> Iterator[Picture]:
        first, step = self._arguments.shard
        limit = self._arguments.limit or math.inf
        for index, (place, shares_name) in enumerate(self._found):
            path = self._found.name_of(place)
            # Results behind URLs, and of URLs, are told apart by their place alone.
            target = self._plan.target(Source(place), shares_name)
            if index % step != first - 1:
                continue
            file = None
            if self._keeps_files:
                file = target.path(LABELS_ENDING).relative_to(self._output).as_posix()
            if path in self._done:
                self.left_out += 1
                continue
            if self.total == limit:
                return
            self.total += 1
            try:
                path.encode()
            except UnicodeEncodeError:
                tell(path, "its name is no UTF-8, as engines want it: rename it")
                continue
            yield Picture(path, file)

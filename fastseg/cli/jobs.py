"""What `fastseg predict` has to do: a job for each picture, found as it is asked for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import LABELS, OutputPlan, Source, Target
from .images import PagesInTurn, page_numbers
from .manifest import Manifest
from .options import note, positive
from .remote import Remote
from .search import Found


@dataclass
class Job:
    """A picture, and where its results go; `left_out` counts pages that are not segmented."""

    source: Source
    target: Target
    file: PagesInTurn
    left_out: int = 0


class Jobs:
    """The jobs of pictures that are found.

    Args:
        plan: where results go, whatever the shard.
        reading: options of `read_pages`.
        options: those of `add_job_options`, and `all_pages`.

    Attributes:
        total: jobs so far.
    """

    def __init__(
        self,
        found: Iterable[Found],
        plan: OutputPlan,
        reading: dict[str, Any],
        options: argparse.Namespace,
        manifest: Manifest | None = None,
    ) -> None:
        self._found, self._plan, self._reading = found, plan, reading
        self._options, self._manifest = options, manifest
        self.total = 0
        self._done = 0
        self._numbered = 0
        self._first_numbered: Job | None = None

    def __iter__(self) -> Iterator[Job]:
        first, step = self._options.shard
        for index, (path, shares_name) in enumerate(self._found):
            numbers = self._numbers(path)
            sources = [Source(path, number, numbers[-1]) for number in numbers]
            pairs = [(source, self._plan.target(source, shares_name)) for source in sources]
            if index % step != first - 1:
                continue
            to_do = [pair for pair in pairs if not self._is_done(*pair)]
            self._done += len(pairs) - len(to_do)
            file = PagesInTurn(path, [source.page for source, _ in to_do], **self._reading)
            for source, target in to_do:
                if self.total == self._options.limit:
                    return
                job = Job(source, target, file)
                self.total += 1
                if target.numbered:
                    self._numbered += 1
                    self._first_numbered = self._first_numbered or job
                yield job

    def _numbers(self, path: Path | Remote) -> list[int]:
        if not self._options.all_pages:
            return [1]
        try:
            file = path.file() if isinstance(path, Remote) else path
            return page_numbers(file, self._reading.get("channels"))
        except ValueError:  # told when it is read
            return [1]

    def _is_done(self, source: Source, target: Target) -> bool:
        if not self._options.resume or not self._plan.is_done(target):
            return False
        return self._manifest is None or self._manifest.has(source)

    def report(self) -> None:
        """Tell of results with a number in their names, and of what was done before."""
        first, others = self._first_numbered, self._numbered - 1
        if first is not None:
            note(
                f"{first.source} goes to {first.target.path(LABELS)}"
                + (f", and {others} more get a number likewise" if others else "")
                + ": the name is taken, by another picture or by a file that is not known to be "
                "an earlier result"
            )
        if self._done:
            note(f"{self._done} images left out, as their results are there")


def add_job_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=positive,
        default=min(8, _cores()),
        metavar="N",
        help="how many pictures are read and written at once, beside the model "
        "(default: %(default)s, as many as there are cores, at most 8)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="leave out pictures whose results are all there, and with --manifest a row on them",
    )
    parser.add_argument(
        "--shard",
        type=shard,
        default=(1, 1),
        metavar="I/N",
        help="take every N-th file alone, from the I-th: N machines with I from 1 to N do all",
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="segment at most N pictures, the first"
    )
    parser.add_argument(
        "--manifest",
        type=Path,
        metavar="FILE",
        help="add a line of JSON on each picture to FILE: size, classes, error, ms by stage",
    )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def shard(text: str) -> tuple[int, int]:
    """Option type: two integers, the first from 1 to the second."""
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected I/N, such as 3/16, got {text!r}")
    first, step = map(int, parts)
    if not 1 <= first <= step:
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, got {text!r}")
    return first, step

"""The work of `fastseg predict`: jobs on their way through a pipeline, and what is told of them."""

from __future__ import annotations

import argparse
import itertools
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from fastseg.inference.pipeline import STAGES, WRITE, Outcome, Pipeline, Place
from fastseg.inference.prompted import PromptedSteps
from fastseg.inference.workers import worker_count

from .coco import CocoFile
from .jobs import Job, Jobs
from .manifest import Manifest
from .options import first_line, note
from .remote import Copies, Remote
from .results import ResultWriter


class _Given(NamedTuple):
    """A picture that was read, and what the model takes of it."""

    image: Any
    prepared: Any


class Stages:
    """The stages of the pipeline; `steps` are `Steps` or `PromptedSteps` of `model`.

    With `exact`, which gives the steps of the model in float32, the label map of the first picture
    is compared with theirs.
    """

    def __init__(
        self, model: Any, steps: Any, writer: ResultWriter, exact: Callable[[], Any] | None = None
    ) -> None:
        self._model, self._steps, self._writer = model, steps, writer
        self._exact, self._lock = exact, threading.Lock()

    def pipeline(self, pictures: int, workers: int, batch_size: int) -> Pipeline:
        """A pipeline for at least so many pictures: on a CPU several threads run the model."""
        can_spread = not isinstance(self._steps, PromptedSteps)
        return Pipeline(
            *(self._read, self._label, self._write),
            kind=lambda given: getattr(given.prepared, "kind", None),
            workers=workers,
            batch_size=batch_size,
            model_threads=worker_count(self._model, pictures) if can_spread else 1,
        )

    def _read(self, job: Job, place: Place) -> _Given:
        with job.file.page(job.source.page, place) as page:
            job.left_out = page.left_out
            if page.image is None:
                raise ValueError(page.reason)
            return _Given(page.image, self._steps.prepare(page.image, "the picture"))

    def _label(self, given: list[_Given]) -> list[list[np.ndarray | None]]:
        maps = self._steps.label_maps([one.prepared for one in given])
        with self._lock:
            exact, self._exact = self._exact, None
        if exact is not None:
            self._compare(exact(), given[0].image, maps[0][0])
        return [[None if one is None else one.cpu().numpy() for one in pair] for pair in maps]

    def _compare(self, exact: Any, image: Any, labels: torch.Tensor) -> None:
        expected = exact.label_maps([exact.prepare(image, "the picture")])[0][0]
        share = (labels == expected).float().mean().item()
        note(f"--dtype fast: {share:.2%} of the first picture's labels are those of float32")

    def _write(self, job: Job, given: _Given, found: list[Any]) -> dict[str, Any]:
        return self._writer.write(job.target, job.source, given.image, *found)


class Tally:
    """What is told of outcomes, one by one and in the end."""

    def __init__(self, manifest: Manifest | None, coco: CocoFile | None = None) -> None:
        self._manifest, self._coco = manifest, coco
        self._left_out: dict[Path | Remote, int] = {}
        self._seconds: Counter[str] = Counter()
        self.done = 0

    def add(self, outcome: Outcome) -> None:
        job, error = outcome.item, outcome.error
        if job.left_out:
            self._left_out[job.source.path] = job.left_out
        reason = "" if error is None else first_line(error)
        if reason and outcome.stage == WRITE:
            reason = f"cannot write to {job.target.stem.parent}: {reason}"
        if reason:
            tqdm.write(f"{job.source}: {reason}", file=sys.stderr)
        else:
            self.done += 1
            self._seconds.update(outcome.seconds)
        described = outcome.result or {}
        if self._coco is not None and not reason:
            self._coco.add(job.source, described)
            described.pop("annotations")
        if self._manifest is not None:
            self._manifest.add(job.source, job.target, described, reason, outcome.seconds)

    def report(self) -> None:
        """Tell of pages that were left out."""
        if self._left_out:
            count, first = len(self._left_out) - 1, next(iter(self._left_out))
            others = f" and {count} more" if count else ""
            note(
                f"pages or frames after the first left out: {sum(self._left_out.values())}, of "
                f"{first}{others}; --all-pages segments them"
            )

    def speed(self, seconds: float, busy: float) -> str:
        """Pictures a second, the time of each stage, and how much of it the device worked."""
        stages = [f"{name} {1000 * self._seconds[name] / self.done:.0f}" for name in STAGES]
        return (
            f"{self.done / seconds:.3g} images/s; ms an image: {', '.join(stages)}; "
            f"device busy {busy:.0%}"
        )


def carry_out(
    jobs: Jobs, stages: Stages, tally: Tally, arguments: argparse.Namespace, copies: Copies
) -> str:
    """Do all jobs; return what is to be told of the speed, "" where nothing was done."""
    # No bar where nobody sees it move: a log would fill with its states.
    disable = True if arguments.quiet else None
    iterator = iter(jobs)
    first = list(itertools.islice(iterator, torch.get_num_threads()))
    pipeline = stages.pipeline(len(first), arguments.workers, arguments.batch_size)
    with tqdm(unit="image", file=sys.stderr, disable=disable) as progress, pipeline:
        begun = time.perf_counter()

        def all_jobs() -> Iterator[Job]:
            yield from itertools.chain(first, iterator)
            progress.total = jobs.total  # known by now
            progress.refresh()

        try:
            for outcome in pipeline.run(all_jobs()):
                tally.add(outcome)
                progress.update()
        except BaseException:
            copies.unwanted.set()  # nobody waits for a download
            raise
        seconds, busy = time.perf_counter() - begun, pipeline.busy_share()
    return tally.speed(seconds, busy) if tally.done else ""

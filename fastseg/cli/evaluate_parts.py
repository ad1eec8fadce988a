"""Parts of an evaluation: shards of many processes, and blocks of a cluster's actors, added up.

All figures come of one matrix of integers, which parts add up to exactly; so are border pixels.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fastseg.evaluation.boundary import BoundaryF1
from fastseg.evaluation.confusion import Confusion
from fastseg.evaluation.evaluate import evaluate_part
from fastseg.evaluation.result import Evaluation
from fastseg.evaluation.truth import check_counted, remarks_of

from .engine import connected
from .evaluate_work import METRICS, Subject, load_subject, open_data, options_of
from .options import CommandError, note, quiet

SHARD = "shard-{}-of-{}"
# Of these an actor would keep what does not add up, or is drawn.
NOT_WITH_ENGINE: dict[str, Any] = {"against": None, "worst": None, "shard": None}
_REMARK = "remark: "  # that figures give rise to; others are of the data


def part_of(found: Evaluation) -> dict[str, Any]:
    """An evaluation of some pictures as JSON types, with what `Sum` adds."""
    part = found.to_dict()
    if found.boundary is not None:
        part["borders"] = {
            "met": found.boundary.met.tolist(),
            "of": found.boundary.borders.tolist(),
        }
    return part


class Sum:
    """Parts of one data set, added up."""

    def __init__(self) -> None:
        self._first: Mapping[str, Any] = {}
        self._same: dict[str, Any] = {}
        self._confusion: Confusion | None = None
        self._boundary: BoundaryF1 | None = None
        self._pictures = 0
        self._seconds: Counter[str] = Counter()
        self._remarks: dict[str, None] = {}

    def add(self, part: Mapping[str, Any]) -> None:
        """Add a part.

        Raises:
            ValueError: it is of another model, other data or other settings than the first.
        """
        settings = {name: value for name, value in part["settings"].items() if name != "device"}
        names = [one["name"] for one in part["classes"]]
        same: dict[str, Any] = {"settings": settings, "classes": names}
        same["borders"] = "borders" in part
        for name in ("model", "data", "data_kind"):
            same[name] = part.get(name)
        if self._confusion is None:
            self._first, self._same = part, same
            self._confusion = Confusion(len(names), settings["ignore_index"])
            if same["borders"]:
                self._boundary = BoundaryF1(len(names), settings["ignore_index"])
        for name, value in same.items():
            if value != self._same[name]:
                raise ValueError(f"{name}: expected those of all, {self._same[name]}, got {value}")
        self._confusion.matrix += np.array(part["confusion_matrix"], np.int64)
        self._confusion.ignored += part["ignored_pixels"]
        if self._boundary is not None:
            self._boundary.met += np.array(part["borders"]["met"], np.int64)
            self._boundary.borders += np.array(part["borders"]["of"], np.int64)
        self._pictures += part["pictures"]
        self._seconds.update(part["seconds"])
        kept = (one for one in part.get("remarks", ()) if not one.startswith(_REMARK))
        self._remarks |= dict.fromkeys(kept)

    def evaluation(self) -> Evaluation:
        """All of them as one.

        Raises:
            ValueError: there is no pixel to evaluate.
        """
        assert self._confusion is not None
        check_counted(self._confusion, self._pictures, last=True)
        return Evaluation(
            confusion=self._confusion,
            names=self._same["classes"],
            pictures=self._pictures,
            settings=self._first["settings"],
            seconds=dict(self._seconds),
            boundary=self._boundary,
            remarks=[*self._remarks, *remarks_of(self._confusion)],
        )

    @property
    def of(self) -> dict[str, Any]:
        """Model and data, as the first part names them."""
        return {name: self._first[name] for name in ("model", "data", "data_kind")}


def merged(folder: Path) -> Sum:
    """The shards in a folder, added up.

    Raises:
        CommandError: one is missing, is there twice or cannot be read, or they are of several runs.
    """
    total, seen, count = Sum(), {}, 0
    for path in sorted(folder.glob(SHARD.format("*", "*"))):
        numbers = re.fullmatch(SHARD.format(r"(\d+)", r"(\d+)"), path.name)
        if numbers is None or not (path / METRICS).is_file():
            continue  # it has not come to its end
        index, of = map(int, numbers.groups())
        count = count or of
        if of != count:
            raise CommandError(
                f"--merge {folder}: expected shards of one run, got some of {count} and of {of}: "
                "remove those of the other"
            )
        try:
            total.add(json.loads((path / METRICS).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CommandError(f"--merge: {path / METRICS}: {error}") from error
        seen[index] = path
    if not count:
        expected = SHARD.format("I", "N")
        raise CommandError(
            f"--merge {folder}: expected folders {expected} with {METRICS}, got none"
        )
    missing = [str(index) for index in range(1, count + 1) if index not in seen]
    if missing:
        named = ", ".join(missing[:20]) + (" ..." if len(missing) > 20 else "")
        raise CommandError(
            f"--merge {folder}: {len(missing)} of {count} shards have not come to their end: "
            f"{named}"
        )
    return total


class BlockCounter:
    """What an actor does: evaluates the pictures from `start` to `stop`, of each row."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        with quiet(True):  # who began the run is told
            self._subject: Subject = load_subject(arguments)
            self._data = open_data(arguments)
        self._options = options_of(arguments, self._subject)

    def __call__(self, table: Any) -> Any:
        import pyarrow as pa

        parts = []
        for row in table.to_pylist():
            data = self._data.some(range(row["start"], row["stop"]))
            found = evaluate_part(self._subject.model, data, **self._options)
            parts.append(json.dumps(part_of(found)))
        return pa.table({"part": parts})


def evaluate_by_engine(arguments: argparse.Namespace, subject: Subject) -> tuple[Sum, str]:
    """Evaluate on the cluster of `--engine`; give the sum, and who has done it.

    Raises:
        CommandError: there is no cluster, or an actor failed.
    """
    import pyarrow as pa

    data = open_data(arguments)
    total = Sum()
    with connected(arguments) as cluster:
        note(f"{cluster} evaluate {len(data)} pictures")
        there = argparse.Namespace(**{**vars(arguments), "device": torch.device(cluster.device)})
        del there.run  # a function of the command line
        for name in ("data", "split_file"):
            if getattr(there, name) is not None:
                setattr(there, name, getattr(there, name).absolute())
        if there.model is not None and Path(there.model).exists():
            there.model = str(Path(there.model).absolute())
        if there.prompt:
            there.prompt = [[str(Path(one).absolute()) for one in pair] for pair in there.prompt]
        size = cluster.block(len(data), arguments.batch_size or 1)
        starts = range(0, len(data), size)
        blocks = [pa.table({"start": [s], "stop": [min(s + size, len(data))]}) for s in starts]
        disable = True if arguments.quiet else None
        bar = tqdm(total=len(data), unit="image", file=sys.stderr, disable=disable)
        with bar as progress:
            for table in cluster.map(BlockCounter, {"arguments": there}, blocks):
                for text in table["part"].to_pylist():
                    part = {**json.loads(text), "model": subject.name, "data": str(arguments.data)}
                    total.add({**part, "data_kind": data.kind})
                    progress.update(part["pictures"])
        return total, str(cluster)


def shard_folder(folder: Path, shard: Sequence[int]) -> Path:
    """Where a shard's figures go: beside those of the others."""
    return folder / SHARD.format(*shard)

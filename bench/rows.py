"""Results as rows: JSON lines that are only ever added to, each checked as it is written and read.

One dataclass serves all kinds of measurements. Files keep rows as they were written; those of older
schemas are read as what they mean today.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

SCHEMA = 3
WHOLE = "whole"
# Kinds, and what their figures are.
UNITS = {
    "forward": "ms",  # pixel_values to logits
    "end to end": "ms",  # images to label maps
    "labels": "ms",  # logits to label maps
    "memory": "MB",
    "op": "ms",  # one call
    "host": "ms",  # a forward before and after fastseg.accelerate
    "training": "ms",  # a step: forward, loss, backward, optimizer
    "host time": "us",  # of a call, before a GPU has anything to do
    "seggpt": "ms",  # forwards, label maps by prompts, post-processing of a SegGPT
    "seggpt memory": "MB",  # of a forward, above what the weights take
    "predict": "ms",  # processor time of one more photograph in a folder
    "predict memory": "MB",
    "evaluate": "ms",  # a photograph by fastseg.evaluate, and what counting takes of it
    "search": "ms",  # until the first of so many pictures in folders is known
    "engine": "ms",  # one more picture by an engine of many machines
    "engine processor": "ms",  # processor time of all processes for it
    "engine start": "s",  # before the first picture
    "engine memory": "MB",
    "engine bytes": "bytes",  # of a picture's receipt
    "engine driver": "ms",  # of 1,000 pictures: finding them, reading their receipts
    "engine driver memory": "bytes",  # of a picture
    "numerics": "share",  # mIoU, or how far from float64; one figure over all images
}
_DATE = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]{8,}\+00:00")
STEPS = ("pre", "forward", "post")  # parts of "end to end", beside the whole
HOST_TIME_PARTS = ("forward", "replay", "refresh")
_KEY = ("kind", "case", "host", "mode", "size", "batch", "dtype", "device", "threads", "cache")


@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one provider in one case; a ValueError tells all that is wrong with them."""

    schema: int = SCHEMA
    date: str  # UTC, ISO 8601; the same in all rows of one case of one run
    kind: str  # a key of UNITS
    case: str  # "b0" to "b5"; of "labels" the name of the logits
    part: str = WHOLE  # of "end to end" also one of STEPS; of "op" the op and its stage
    host: str = ""  # of "host" and "training" the library
    mode: str = ""  # of "host": "eager" or "compiled"; of "training" as in "150 classes"
    size: tuple[int, int]  # height, width of the image or of the label map
    batch: int
    dtype: str
    device: str
    driver: str = ""  # "" on a CPU
    cpu: str
    threads: int  # of torch and of other runtimes, on the CPU; 0: older rows did not tell
    provider: str
    provider_version: str  # of the library that computes
    baseline: str  # the provider that `ratio` compares with
    method: str = "calls"  # how it was timed
    cache: str = "warm"  # "cold": a GPU's L2 cache held nothing of use
    unit: str
    p20: float
    p50: float
    p80: float
    repeats: int
    count: int = 1  # of "op": how often a forward makes the call
    ratio: float | None = None  # median of the baseline over this one's: above 1 is better than it
    paired_ratio: float | None = None  # median of the ratios of single rounds
    setup_s: float | None = None  # from weights on disk to the first result: loading, compiling
    # Of GPU memory during a call, weights included; of "training" above what lasts, on a CPU too.
    peak_mb: float | None = None
    flops: int | None = None  # the least work of such a case; None where nobody has counted it
    bytes: int | None = None
    flops_per_second: float | None = None  # what the device was measured to do in this run
    bytes_per_second: float | None = None
    floor_ms: float | None = None  # the least time, by these
    parity: str  # what parity_error is
    parity_error: float
    parity_gate: float
    python: str
    torch: str
    triton: str = ""  # "" where it is not installed
    transformers: str = ""
    fastseg: str
    commit: str
    command: str

    def __post_init__(self) -> None:
        if wrong := [*self._wrong_types()] or [*self._wrong_values()]:
            raise ValueError("row: " + "; ".join(wrong))

    def _wrong_types(self) -> Iterator[str]:
        for name, kinds in _TYPES.items():
            value = getattr(self, name)
            # bool is an int to isinstance.
            if not isinstance(value, kinds) or isinstance(value, bool):
                yield f"{name}: expected {kinds}, got {value!r}"

    def _wrong_values(self) -> Iterator[str]:
        floor = (self.flops, self.bytes, self.flops_per_second, self.bytes_per_second)
        positive = self.p20 > 0 or self.kind == "numerics"
        several = {"end to end": (WHOLE, *STEPS), "op": (self.part,), "numerics": (self.part,)}
        several["host time"] = HOST_TIME_PARTS
        parts = several.get(self.kind, (WHOLE,))
        for name, expected, right in (
            ("schema", SCHEMA, self.schema == SCHEMA),
            ("kind", tuple(UNITS), self.kind in UNITS),
            ("part", parts, self.part in parts),
            ("unit", UNITS.get(self.kind), self.unit == UNITS.get(self.kind)),
            ("cache", "warm or cold", self.cache in ("warm", "cold")),
            ("size", "two integers", [type(side) for side in self.size] == [int, int]),
            ("p20", "0 < p20 <= p50", positive and 0 <= self.p20 <= self.p50),
            ("p80", "p50 <= p80", self.p50 <= self.p80),
            ("parity_error", "at most parity_gate", self.parity_error <= self.parity_gate),
            ("ratio", "1 of the baseline", self.provider != self.baseline or self.ratio == 1),
            ("floor_ms", "work and ceilings", (self.floor_ms is None) == (None in floor)),
            ("date", "ISO 8601 with a time zone", _DATE.fullmatch(self.date)),
        ):
            if not right:
                yield f"{name}: expected {expected}, got {getattr(self, name)!r}"

    @property
    def on_cpu(self) -> bool:
        """Whether the device is a CPU."""
        return self.device == self.cpu

    @property
    def key(self) -> tuple[Any, ...]:
        """What rows share that measure the same thing; of these the newest count."""
        return case_key(vars(self))


def case_key(fields: Mapping[str, Any]) -> tuple[Any, ...]:
    """`Row.key` of rows with these fields; those that a kind has no use for may be missing."""
    part = fields["part"] if fields["kind"] == "op" else WHOLE
    return part, *(fields.get(name, "") for name in _KEY)


_TYPES = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(Row).items()}
_TYPES["size"] = (tuple,)


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add rows at the end of `path`, made with its folder where absent.

    Raises a ValueError where its last line is cut off.
    """
    text = "".join(json.dumps(asdict(row)) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() > 0:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                raise ValueError(f"{path}: its last line is cut off; mend it before adding rows")
        file.write(text.encode())


def read_rows(path: Path) -> list[Row]:
    """All rows of `path`, oldest first, in today's schema.

    Raises a ValueError for a line that is not a valid row; its number is named.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows += [Row(**values) for values in _upgraded(json.loads(line))]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {type(error).__name__}: {error}") from error
    return rows


def newest(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of the newest run of each case, all providers together, in order of first sight."""
    latest: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        group = latest.setdefault(row.key, [])
        if group and group[0].date != row.date:
            group.clear()
        group.append(row)
    return list(latest.values())


# Older schemas. Each kind of file had its own.

_DEFAULTS = {one.name: one.default for one in fields(Row) if one.default is not MISSING}


def _upgraded(old: Any) -> Iterator[dict[str, Any]]:
    """What an object in a file means today: itself, or the rows of an older schema."""
    if not isinstance(old, dict):
        raise ValueError(f"row: expected an object, got {old!r}")
    if isinstance(old["size"], list):
        old["size"] = tuple(old["size"])
    if old["schema"] not in (1, 2):  # checked with all else
        yield old
        return
    convert = _numerics if "shortfall" in old else _host if "host_version" in old else _grid
    for new in convert(old):
        yield {**_DEFAULTS, **new, "schema": SCHEMA}


def _grid(old: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Schemas 1, which knew one CPU and two providers, and 2."""
    new = dict(old)
    if old["schema"] == 1:
        theirs = old["provider"].startswith("transformers")
        library = "transformers" if theirs else "fastseg"
        if old["kind"] == "labels" and old["provider"] != "fastseg":
            library = "torch"
        new |= {"device": old["cpu"], "provider_version": old[library]}
        if old["kind"] != "labels" and old["provider"] == "fastseg":
            new["provider"] = "fastseg eager"
    yield new


def _host(old: dict[str, Any]) -> Iterator[dict[str, Any]]:
    new = {**old, "kind": "host", "case": old["variant"], "device": old["cpu"]}
    new["provider_version"] = new.pop("host_version")
    del new["variant"]
    yield new


def _numerics(old: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row had all three figures."""
    kept = {**old, "kind": "numerics", "case": "scenes-b0", "unit": UNITS["numerics"]}
    kept |= {"batch": 1, "threads": 0, "repeats": kept.pop("images"), "baseline": "float64"}
    kept |= {"parity_error": 0.0, "parity_gate": 0.0}
    kept["provider_version"] = old["fastseg" if "fastseg" in old["provider"] else "transformers"]
    for part in (parts := ("error", "differing", "shortfall")):
        value = {name: old[part] for name in ("p20", "p50", "p80")}
        new = {**kept, **value, "part": part, "parity": part}
        yield {name: value for name, value in new.items() if name not in parts}

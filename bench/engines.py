"""`python -m bench engines`: what an engine costs, on the same photographs, in turn.

Label maps of a folder of photographs by a plain loop over `fastseg.Segmenter`, by `fastseg
predict`, and by `fastseg predict --engine ray` with one and two actors, each model on one thread.
Told is what one more picture takes: (many photographs - few of them) / the difference of their
numbers, in seconds and in processor time of all processes; what a run takes before its first
picture; and the highest resident sets. Then the bytes of a picture's receipt, and what the driver
needs before a picture is on its way and when a run goes on, from which docs/distributed.md reckons
for a hundred million. Label maps of all must be the same files.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fastseg
from fastseg.cli.engine import MAX_BLOCK
from fastseg.cli.engine_predict import Picture, tables_of
from fastseg.cli.files import LABELS, OutputPlan, Source
from fastseg.cli.search import ImageFiles
from fastseg.inference.receipts import Receipts

from . import timing
from .machine import ROOT, commit, machine, version
from .options import ACTOR, DRIVER, ENGINE, LOOP, RAY_ACTORS, RESULTS, integer
from .predict import draw_photos
from .processes import Used, used_by
from .rows import UNITS, Row, append_rows

PROVIDERS = (LOOP, "fastseg predict", *RAY_ACTORS)
_DRAWN = 20  # photographs that differ; more are links to them
_METHODS = {
    "engine": "photographs beyond the first few",
    "engine processor": "processor time of all processes, photographs beyond the first few",
    "engine start": "a run of few photographs, less what they take",
    "engine memory": "highest resident set of a process; of Ray itself the sum of its processes",
    "engine bytes": "bytes in parquet",
    "engine driver": "calls",
    "engine driver memory": "tracemalloc",
}
_LOOP = """
import os, sys
import fastseg
model, folder, output, block = sys.argv[1:]
paths = sorted(os.path.join(folder, name) for name in os.listdir(folder))
segmenter = fastseg.Segmenter(
    model, device="cpu", output=output, receipts=output + "/receipts", batch_size=1, threads=2
)
for start in range(0, len(paths), int(block)):
    some = paths[start : start + int(block)]
    files = [os.path.basename(path)[:-4] + "_labels.png" for path in some]
    assert not any(segmenter({"path": some, "file": files})["error"])
"""


def main(argv: Sequence[str]) -> int:
    """Run the command line; the status is 1 where label maps differ or a command fails."""
    options = _parser().parse_args(argv)
    line = shlex.join(["python", "-m", "bench", "engines", *argv])
    try:
        with tempfile.TemporaryDirectory(prefix="fastseg-engines-") as scratch:
            rows = _measure(options, Path(scratch), line)
    except RuntimeError as error:
        print(f"bench engines: {error}", file=sys.stderr)
        return 1
    append_rows(options.output or RESULTS / "engines.jsonl", rows)
    from .report.tables import markdown

    print(markdown(rows))
    return 0


def _measure(options: argparse.Namespace, scratch: Path, line: str) -> list[Row]:
    model = Path(fastseg.__file__).parent / "demo" / "assets" / "scenes-b0"
    drawn = draw_photos(scratch / "drawn", min(_DRAWN, options.pictures))
    folders = {}
    for count in (options.few, options.pictures):
        folders[count] = scratch / f"{count}"
        folders[count].mkdir()
        for index in range(count):
            os.link(drawn[index % len(drawn)], folders[count] / f"{index:06d}.jpg")
    more = options.pictures - options.few
    samples: dict[str, dict[str, list[float]]] = {kind: {} for kind in _METHODS}
    for turn in tqdm(range(options.repeats), leave=False, disable=None):
        for name in PROVIDERS:
            taken: list[Used] = []
            for count, folder in folders.items():
                output = scratch / f"{name} {count} {turn}"
                taken.append(_run(name, model, folder, output, options))
            few, many = taken
            wall = (many.seconds - few.seconds) / more
            busy = (sum(many.processor.values()) - sum(few.processor.values())) / more
            if min(wall, busy) <= 0:
                raise RuntimeError(
                    f"--pictures: expected so many that a run takes longer than with {options.few}"
                    f", got {options.pictures}: {name} took {many.seconds:.1f} against "
                    f"{few.seconds:.1f} s"
                )
            _add(samples["engine"], name, 1000 * wall)
            _add(samples["engine processor"], name, 1000 * busy)
            start = max(few.seconds - options.few * wall, 1e-3)
            _add(samples["engine start"], name, start)
            for kind, peak in many.peak.items():
                value = many.peaks[kind] if kind == ENGINE else peak
                _add(samples["engine memory"], f"{name}: {kind}", value)
    _compare(scratch, options)
    samples["engine bytes"] = dict(_receipts(model, drawn, scratch))
    samples["engine driver"] = dict(_driver(options.files, scratch))
    samples["engine driver memory"] = dict(_driver_memory(options.files))
    return [row for kind, by_name in samples.items() for row in _rows(options, line, kind, by_name)]


def _add(samples: dict[str, list[float]], name: str, value: float) -> None:
    samples.setdefault(name, []).append(value)


def _run(name: str, model: Path, folder: Path, output: Path, options: argparse.Namespace) -> Used:
    command = [sys.executable, "-c", _LOOP, str(model), str(folder), str(output)]
    # As many in a call as an actor gets.
    command.append(str(min(max(options.few, 8), MAX_BLOCK)))
    if name != LOOP:
        where = ["--model", str(model), "--output", str(output), "--device", "cpu", "--quiet"]
        command = [sys.executable, "-m", "fastseg", "predict", str(folder), *where]
        command += ["--no-overlay", "--workers", "2"]
    if name in RAY_ACTORS:
        command += ["--engine", "ray", "--num-actors", str(RAY_ACTORS[name]), "--address", "local"]
    packages = filter(None, (str(ROOT), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(packages), "OMP_NUM_THREADS": "1"}
    environment["RAY_USAGE_STATS_ENABLED"] = "0"
    return used_by(command, _kind, environment, ROOT)


def _kind(command: str) -> str:
    if command.startswith("ray::"):
        return ACTOR if "MapWorker" in command else ENGINE
    is_ours = "fastseg predict" in command or "fastseg.Segmenter(" in command
    return DRIVER if is_ours else ENGINE


def _compare(scratch: Path, options: argparse.Namespace) -> None:
    """Raise where a provider's label maps are not those of the loop."""
    count, turn = options.pictures, options.repeats - 1
    for index in range(count):
        file = f"{index:06d}{LABELS}"
        found = {}
        for name in PROVIDERS:
            # The mark is of the same path, so the whole files are equal.
            path = scratch / f"{name} {count} {turn}" / file
            found[name] = path.read_bytes() if path.exists() else b""
        wrong = [name for name in PROVIDERS if found[name] != found[LOOP] or not found[name]]
        if wrong:
            raise RuntimeError(f"label maps differ from the loop's: {file} of {', '.join(wrong)}")


def _receipts(
    model: Path, photos: Sequence[Path], scratch: Path
) -> Iterator[tuple[str, list[float]]]:
    """Bytes of a photograph in the receipt of a batch, with and without its label map."""
    repeated = [str(photos[index % len(photos)]) for index in range(min(MAX_BLOCK, 64))]
    # Paths of a usual length, which all differ, as they do in a folder of many.
    names = [f"/data/pictures/2026/{index // 16:04d}/{index:012d}.jpg" for index in range(64)]
    contents = {path: Path(path).read_bytes() for path in set(repeated)}
    for form in ("png", "zlib", "rle"):
        folder = scratch / f"receipts {form}"
        output = folder / "labels" if form == "png" else None
        segmenter = fastseg.Segmenter(
            model, device="cpu", labels=form, output=output, receipts=folder, batch_size=1
        )
        files = [f"{name[1:-4]}{LABELS}" for name in names]
        batch = {"path": names, "bytes": [contents[path] for path in repeated], "file": files}
        segmenter(batch)
        (part,) = folder.glob("*.parquet")
        name = "a row" if form == "png" else f"a row with labels as {form}"
        yield name, [part.stat().st_size / len(names)]


def _driver(count: int, scratch: Path) -> Iterator[tuple[str, list[float]]]:
    """Milliseconds for a thousand pictures: to find and name them, and to read their receipts."""
    folder = scratch / "found"
    for index in range(count):
        if index % 10_000 == 0:
            inside = folder / f"{index:08d}"
            inside.mkdir(parents=True)
        (inside / f"{index:08d}.jpg").touch()
    begun = time.perf_counter()
    found = ImageFiles([str(folder)], folder / "output")
    plan = OutputPlan(found.root, folder / "output", [LABELS])
    pictures = [
        Picture(str(place), str(plan.target(Source(place), shares).path(LABELS)))
        for place, shares in found
    ]
    assert len(pictures) == count
    yield "1,000 found and named", [1e6 * (time.perf_counter() - begun) / count]
    receipts = Receipts(str(scratch / "settled"))
    schema = fastseg.Segmenter.schema()
    for table in tables_of(pictures, MAX_BLOCK):
        rows = [dict.fromkeys(schema.names) | row for row in table.to_pylist()]
        receipts.write(_table(rows, schema))
    begun = time.perf_counter()
    assert len(receipts.settle(print)) == count
    yield "receipts of 1,000 read", [1e6 * (time.perf_counter() - begun) / count]


def _table(rows: list[dict[str, Any]], schema: Any) -> Any:
    import pyarrow as pa

    return pa.Table.from_pylist(rows, schema=schema)


def _driver_memory(count: int) -> Iterator[tuple[str, list[float]]]:
    """Bytes of a picture in the driver: on its way, with its batch's table, and known as done."""

    def pictures() -> list[Picture]:
        names = (f"2026/{index // 10_000:08d}/{index:012d}" for index in range(count))
        return [Picture(f"/data/pictures/{name}.jpg", f"{name}{LABELS}") for name in names]

    def held(make: Callable[[], object]) -> float:
        tracemalloc.start()
        kept = make()
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        del kept
        return size / count

    yield "a picture of a round", [held(pictures)]
    some = pictures()
    tables = list(tables_of(some, MAX_BLOCK))
    yield "a picture in the object store", [sum(table.nbytes for table in tables) / count]
    yield "a picture that is done", [held(lambda: {"".join(one.path) + "" for one in pictures()})]


def _rows(
    options: argparse.Namespace, line: str, kind: str, samples: dict[str, list[float]]
) -> list[Row]:
    baseline = next(iter(samples))
    facts: dict[str, Any] = {**machine(torch.device("cpu")), "threads": 1, "commit": commit()}
    facts |= {"command": line, "kind": kind, "case": "labels alone", "unit": UNITS[kind]}
    facts |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "baseline": baseline}
    # 2.4 megapixels in several shapes.
    facts |= {"size": (1265, 1897), "batch": options.pictures, "dtype": "float32"}
    facts |= {"method": _METHODS[kind], "parity": "share of label files that are not the loop's"}
    facts |= {"parity_error": 0.0, "parity_gate": 0.0}
    rows = []
    for name, taken in samples.items():
        by = version("ray") if name.startswith("Ray") else fastseg.__version__
        figures: dict[str, Any] = timing.quantiles(taken)
        if len(taken) == len(samples[baseline]):
            figures |= timing.ratios(samples[baseline], taken)
        own: dict[str, Any] = {"provider": name, "repeats": len(taken), "provider_version": by}
        rows.append(Row(**facts, **own, **figures))
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m bench engines",
        description="What Ray costs a picture, against a plain loop; needs it to be installed.",
    )
    more = "photographs (default: 120)"
    parser.add_argument("--pictures", type=integer(2), default=120, metavar="N", help=more)
    few = "of the small run, which is taken away (default: 16)"
    parser.add_argument("--few", type=integer(1), default=16, metavar="N", help=few)
    parser.add_argument("--repeats", type=integer(), default=3, metavar="N", help="default: 3")
    files = "files to find, and receipts to read, in the driver (default: 100000)"
    parser.add_argument("--files", type=integer(1), default=100_000, metavar="N", help=files)
    parser.add_argument("--output", type=Path, help="add rows here (default: in bench/results)")
    return parser

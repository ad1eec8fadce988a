"""`python -m bench predict`: folders of photographs, by `fastseg predict` and by others.

What is compared is the processor time that one more photograph takes, of processes with one thread
of torch: (all of them - the first alone) / (their number - 1), so that imports and the model's
loading do not count. The baseline is `fastseg predict` of the commit `--against`; transformers'
image-segmentation pipeline, which writes nothing, runs the same model over the same files.
Providers take turns. Memory is the highest resident set of a process, with few photographs and
with ten times as many. Of `fastseg.evaluate` it is what counting takes of a photograph's time.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance
from tqdm import tqdm

import fastseg
from fastseg.cli.search import ImageFiles

from . import timing
from .compare import CompareError, checkouts
from .machine import ROOT, commit, machine, version
from .options import RESULTS, integer
from .rows import UNITS, Row, append_rows

OURS, PIPELINE = "fastseg predict", "transformers pipeline"
# The share of pixels of the label maps that may differ between commits: near ties.
BOUND = 1e-3
CASES = {"labels and overlays": [], "labels alone": ["--no-overlay"]}
_MEGAPIXELS = 2.4
_METHODS = {
    "predict": "processor time of processes",
    "predict memory": "resident set",
    "search": "calls",
    "evaluate": "seconds of fastseg.evaluate",
}
_MEMORY = (20, 200)  # photographs, of which the peak should be the same
_PIPELINE = """
import sys, torch
from transformers import SegformerForSemanticSegmentation, SegformerImageProcessor, pipeline
torch.set_num_threads(1)
model = SegformerForSemanticSegmentation.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
processor = SegformerImageProcessor.from_pretrained(sys.argv[1])
run = pipeline("image-segmentation", model=model, image_processor=processor, device="cpu")
for path in sys.argv[2:]:
    run(path)
"""


def draw_photos(folder: Path, count: int) -> list[Path]:
    """JPEGs of 2.4 megapixels: crops of photographs of scikit-image, with light and grain."""
    from skimage import data

    names = ("astronaut", "coffee", "chelsea", "rocket")
    sources = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in names]
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in range(count):
        source = sources[index % len(sources)]
        aspect = float(generator.choice([4 / 3, 3 / 2, 16 / 9, 3 / 4]))
        width = int((_MEGAPIXELS * 1e6 * aspect) ** 0.5)
        height = int(_MEGAPIXELS * 1e6 / width)
        crop = min(source.width, int(source.height * aspect)) * generator.uniform(0.6, 1)
        box = (0, 0, int(crop), int(crop / aspect))
        left, top = (generator.integers(0, side + 1) for side in np.subtract(source.size, box[2:]))
        picture = source.crop((left, top, left + box[2], top + box[3])).resize((width, height))
        picture = ImageEnhance.Brightness(picture).enhance(generator.uniform(0.7, 1.3))
        grain = generator.normal(0, 5, (height, width, 1)).astype(np.float32)
        pixels = np.clip(np.asarray(picture, np.float32) + grain, 0, 255).astype(np.uint8)
        paths.append(folder / f"{index:05d}.jpg")
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


# Runs a module, and writes to a file how far its resident set rose: what the system tells of a
# child that has ended is at least what its parent had.
_PEAK = """
import atexit, runpy, sys
file, module, sys.argv = sys.argv[1], sys.argv[2], sys.argv[2:]
def peak():
    lines = open("/proc/self/status").read().splitlines()
    open(file, "w").write(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
atexit.register(peak)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def peak_megabytes(command: Sequence[str], code: Path, scratch: Path) -> float:
    """The highest resident set of `python -m module ...`, on Linux."""
    python, _, *module_and_arguments = command
    file = scratch / "peak"
    processor_seconds([python, "-c", _PEAK, str(file), *module_and_arguments], code)
    return int(file.read_text()) * 1024 / 1e6


def processor_seconds(command: Sequence[str], code: Path) -> tuple[float, float]:
    """Processor seconds and seconds of a process, with the fastseg of folder `code`.

    Raises:
        RuntimeError: it fails.
    """
    environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    begun = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=code
    )
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{shlex.join(command[:6])} ...: {said[-2000:]}")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - begun


def _predict(paths: Sequence[Path], output: Path, options: Sequence[str]) -> list[str]:
    command = [sys.executable, "-m", "fastseg", "predict", *map(str, paths)]
    return [*command, "--output", str(output), "--device", "cpu", *options]


def _pipeline(paths: Sequence[Path], model: Path) -> list[str]:
    return [sys.executable, "-c", _PIPELINE, str(model), *map(str, paths)]


def main(argv: Sequence[str], repository: Path = ROOT) -> int:
    """Run the command line; the status is 1 where label maps differ, 2 without a comparison."""
    options = _parser().parse_args(argv)
    line = shlex.join(["python", "-m", "bench", "predict", *argv])
    try:
        with (
            checkouts(repository, options.against, None) as (base, _),
            tempfile.TemporaryDirectory(prefix="fastseg-predict-") as scratch,
        ):
            rows = _measure(options, base, Path(scratch), line)
    except (CompareError, RuntimeError) as error:
        print(f"bench predict: {error}", file=sys.stderr)
        return 2
    append_rows(options.output or RESULTS / "predict.jsonl", rows)
    from .report.tables import markdown

    print(markdown(rows))
    return 0


def _measure(options: argparse.Namespace, base: Path, scratch: Path, line: str) -> list[Row]:
    photos = draw_photos(scratch / "photos", options.pictures)
    model = Path(fastseg.__file__).parent / "demo" / "assets" / "scenes-b0"
    theirs = f"{OURS} at {options.against[:7]}"
    rows: list[Row] = []
    memory: dict[str, list[float]] = {}
    for case, more in CASES.items():
        samples: dict[str, list[float]] = {theirs: [], OURS: [], PIPELINE: []}
        for _ in tqdm(range(options.repeats), case, leave=False, disable=None):
            for name in samples:
                code = base if name == theirs else ROOT
                taken = []
                for some in (photos[:1], photos):
                    output = scratch / f"{name} {case}"
                    command = _predict(some, output, more)
                    if name == PIPELINE:
                        command = _pipeline(some, model)
                    taken.append(processor_seconds(command, code)[0])
                more_photos = 1000 * (taken[1] - taken[0])
                if more_photos <= 0:  # processes vary by some tenths of a second
                    raise RuntimeError(
                        f"--pictures: expected enough of them that a process takes longer than "
                        f"with one, got {len(photos)}: {name} took {taken[1]:.2f} against "
                        f"{taken[0]:.2f} s"
                    )
                samples[name].append(more_photos / (len(photos) - 1))
        difference = max(
            _difference(scratch / f"{theirs} {case}", scratch / f"{OURS} {case}", path)
            for path in photos
        )
        if difference > BOUND:
            raise RuntimeError(f"{case}: label maps differ in {difference:.2%} of the pixels")
        rows += _rows(options, line, "predict", case, samples, difference)
    if options.files:
        samples = {OURS: [_first_of(options.files, scratch / "many")]}
        rows += _rows(options, line, "search", f"{options.files:,} files", samples, 0.0)
    rows += _rows(options, line, "evaluate", "counting", _evaluated(model, photos), 0.0)
    for count in _MEMORY:
        links = scratch / f"{count}"
        links.mkdir()
        for index in range(count):
            os.link(photos[index % len(photos)], links / f"{index:05d}.jpg")
        command = _predict([links], scratch / f"memory {count}", [])
        memory[f"{OURS}, {count} photographs"] = [peak_megabytes(command, ROOT, scratch)]
    return rows + _rows(options, line, "predict memory", "peak", memory, 0.0)


def _evaluated(model: Path, photos: Sequence[Path]) -> dict[str, list[float]]:
    """Milliseconds a photograph by `fastseg.evaluate`, and of them those of counting.

    What the model finds, moved by some pixels, stands for the truth: maps of as many runs.
    """
    accelerated = fastseg.from_pretrained(model).eval()
    pairs = []
    for path in photos:
        image = Image.open(path).convert("RGB")
        labels = fastseg.segment(accelerated, image)[0].numpy().astype(np.uint8)
        pairs.append((image, np.roll(labels, (3, 5), (0, 1))))
    seconds = fastseg.evaluate(accelerated, pairs).seconds
    each = {name: 1000 * of / len(pairs) for name, of in seconds.items()}
    return {"fastseg.evaluate": [sum(each.values())], "counting": [each["counting"]]}


def _first_of(count: int, folder: Path) -> float:
    """Milliseconds until the first of so many pictures, in folders of ten thousand, is known."""
    for index in range(count):
        if index % 10_000 == 0:
            inside = folder / f"{index:08d}"
            inside.mkdir(parents=True)
        (inside / f"{index:08d}.jpg").touch()
    begun = time.perf_counter()
    first, _ = next(iter(ImageFiles([str(folder)], folder / "output")))
    seconds = time.perf_counter() - begun
    assert str(first).endswith(".jpg")
    return 1000 * seconds


def _difference(base: Path, new: Path, path: Path) -> float:
    """Share of the pixels in which two label maps of a photograph differ."""
    maps = []
    for folder in (base, new):
        (found,) = folder.rglob(f"{path.stem}_labels.png")
        with Image.open(found) as image:
            maps.append(np.asarray(image))
    return float((maps[0] != maps[1]).mean())


def _rows(
    options: argparse.Namespace,
    line: str,
    kind: str,
    case: str,
    samples: dict[str, list[float]],
    difference: float,
) -> list[Row]:
    baseline = next(iter(samples))
    facts: dict[str, Any] = {**machine(torch.device("cpu")), "threads": 1, "commit": commit()}
    facts |= {"command": line, "kind": kind, "case": case, "unit": UNITS[kind]}
    facts |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "baseline": baseline}
    # 2.4 megapixels in several shapes.
    facts |= {"size": (1265, 1897), "batch": options.pictures, "dtype": "float32"}
    facts |= {"method": _METHODS[kind]}
    facts |= {"parity": "largest share of pixels with another label than the baseline's"}
    facts |= {"parity_error": difference, "parity_gate": BOUND}
    rows = []
    for name, taken in samples.items():
        own: dict[str, Any] = {"provider": name, "repeats": len(taken)}
        by = version("transformers") if name == PIPELINE else fastseg.__version__
        figures: dict[str, Any] = {
            **timing.quantiles(taken),
            **timing.ratios(samples[baseline], taken),
        }
        rows.append(Row(**facts, **own, provider_version=by, **figures))
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m bench predict",
        description="Processor time of `fastseg predict` for a photograph, against that of a "
        "commit and transformers' pipeline.",
    )
    parser.add_argument("--against", required=True, metavar="REV", help="the commit to compare to")
    parser.add_argument("--pictures", type=integer(2), default=20, metavar="N", help="default: 20")
    parser.add_argument("--repeats", type=integer(), default=3, metavar="N", help="default: 3")
    files = "make so many files and time the search for the first (default: 100000; 0: none)"
    parser.add_argument("--files", type=integer(0), default=100_000, metavar="N", help=files)
    parser.add_argument("--output", type=Path, help="add rows here (default: in bench/results)")
    return parser

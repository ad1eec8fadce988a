"""`python -m bench.numerics`: how far logits and labels are from float64, in each precision.

The embedded model on drawn scenes that it was not trained on. The reference is transformers' model
in float64, with its logits resized in float64. Rows are added to bench/results/numerics.jsonl, and
the table of this run is printed; `--docs` puts that of all newest rows into docs/numerics.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

import fastseg
from fastseg.cli.options import positive
from fastseg.demo.scenes import draw_scene
from fastseg.kernels import select_backend, upsample_argmax

from . import rows
from .machine import ROOT, commit, machine
from .pairs import load_fastseg, load_transformers
from .rows import Row
from .shown import all_of
from .table import rewrite
from .table_cells import commands_of, head, line

RESULTS = ROOT / "bench" / "results" / "numerics.jsonl"
DOCS = ROOT / "docs" / "numerics.md"
NAME = "numerics"  # of the markers around the table
MODEL = Path(fastseg.__file__).parent / "demo" / "assets" / "scenes-b0"
SIZE = (512, 512)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MACHINE = ("device", "cpu", "python", "torch", "transformers", "fastseg")
FIELDS: dict[str, rows.Field] = {
    "schema": int,
    "date": str,  # the same in all rows of a run
    "dtype": str,
    "provider": str,
    "images": int,
    "size": list,
    "error": float,  # relative RMS error of the logits
    "differing": float,  # share of pixels whose class is another than the reference's
    "shortfall": float,  # of the chosen class below the best one in the reference, worst pixel
    **dict.fromkeys((*_MACHINE, "commit", "command"), str),
}


def compare(logits: torch.Tensor, labels: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """Sums of squares of the error and of the reference, share of differing pixels, shortfall.

    The shortfall is how far the reference's logit of the chosen class is below its highest one, as
    a share of its largest logit: 0 where the class is the same.
    """
    error = (logits.cpu().double() - reference).square().sum().item()
    wide = F.interpolate(reference, size=SIZE, mode="bilinear", align_corners=False)
    highest, best = wide.max(dim=1)
    labels = labels.cpu()
    below = highest - wide.gather(1, labels.unsqueeze(1)).squeeze(1)
    differing = (labels != best).double().mean().item()
    shortfall = (below.max() / reference.abs().max()).item()
    return [error, reference.square().sum().item(), differing, shortfall]


@torch.inference_mode()
def measure(device: torch.device, dtype: torch.dtype, images: int) -> list[Row]:
    """Provider and figures of both sides, on the first `images` scenes."""
    exact = load_transformers(MODEL, torch.float64)
    theirs = load_transformers(MODEL, dtype).to(device)
    ours = load_fastseg(MODEL).to(device, dtype)
    processor = fastseg.SegformerImageProcessor.from_pretrained(MODEL)
    found: dict[str, list[list[float]]] = {}
    for seed in tqdm(range(images), desc=str(dtype), leave=False, disable=None):
        image = draw_scene(seed, SIZE).image
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        reference = exact(pixels.double()).logits
        pixels = pixels.to(device, dtype)
        logits = theirs(pixels).logits
        # As transformers' post_process_semantic_segmentation does it.
        resized = F.interpolate(logits, size=SIZE, mode="bilinear", align_corners=False)
        figures = compare(logits, resized.argmax(dim=1), reference)
        found.setdefault("transformers eager", []).append(figures)
        logits = ours(pixels).logits
        figures = compare(logits, upsample_argmax(logits, SIZE), reference)
        backend = {"eager": "eager", "triton": "Triton"}[select_backend(device)[0]]
        found.setdefault(f"fastseg {backend}", []).append(figures)
    made = []
    for provider, figures_of in found.items():
        errors, squares, differing, shortfalls = zip(*figures_of, strict=True)
        made.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "provider": provider,
                "error": (sum(errors) / sum(squares)) ** 0.5,
                "differing": sum(differing) / images,
                "shortfall": max(shortfalls),
            }
        )
    return made


def check_row(row: Any) -> None:
    """Raise a ValueError that lists all that is wrong with `row`."""
    if wrong := rows.wrong_fields(row, FIELDS):
        raise ValueError("row: " + "; ".join(wrong))


def markdown(found: Sequence[Row]) -> str:
    """The table of the newest rows of each device and dtype, and a line on how they were made."""
    newest: dict[tuple[str, str], list[Row]] = {}
    for row in found:
        group = newest.setdefault((row["device"], row["dtype"]), [])
        if group and group[0]["date"] != row["date"]:
            group.clear()
        group.append(row)
    shown = [row for group in newest.values() for row in group]
    heads = ("dtype", "provider", "device", "error of the logits", "other class", "shortfall")
    lines = head(*heads, left=3)
    for row in shown:
        device = "CPU" if row["device"] == row["cpu"] else row["device"]
        figures = f"{row['error']:.1e}", f"{row['differing']:.4%}", f"{row['shortfall']:.1e}"
        lines.append(line(row["dtype"], row["provider"], device, *figures))

    made = (
        f"{all_of(shown, 'images')} scenes of {'x'.join(map(str, SIZE))}; {all_of(shown, 'cpu')}; "
        f"Python {all_of(shown, 'python')}, torch {all_of(shown, 'torch')}, "
        f"transformers {all_of(shown, 'transformers')}, fastseg {all_of(shown, 'fastseg')} at "
        f"{all_of(shown, 'commit')}; {all_of(shown, 'date')}; {commands_of(shown)}."
    )
    return "\n".join([*lines, "", made])


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.numerics", description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--images", type=positive, default=4, help="scenes (default: 4)")
    parser.add_argument("--docs", action="store_true", help=f"measure nothing, write {DOCS.name}")
    given = parser.parse_args(argv)
    if given.docs:
        rewrite(DOCS, markdown(rows.read_rows(RESULTS, check_row)), NAME)
        return
    here = machine(given.device)
    common = {
        "schema": 1,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "images": given.images,
        "size": list(SIZE),
        **{name: here[name] for name in _MACHINE},
        "commit": commit(),
        "command": shlex.join(["python", "-m", "bench.numerics", *argv]),
    }
    made = [
        {**common, **figures}
        for dtype in DTYPES
        for figures in measure(given.device, dtype, given.images)
    ]
    rows.append_rows(RESULTS, made, check_row, FIELDS)
    print(markdown(made))


if __name__ == "__main__":
    main(sys.argv[1:])

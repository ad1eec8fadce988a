"""How far logits and labels of the embedded model are from float64, in each precision.

On drawn scenes that it was not trained on. The reference is transformers' model in float64, with
its logits resized in float64. Of each provider and dtype there are three rows: "error", the
relative RMS error of the logits; "differing", the share of pixels whose class is another than the
reference's; "shortfall", how far the chosen class is below the reference's best one, as a share of
its largest logit, at the worst pixel.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import fastseg
from fastseg.demo.scenes import draw_scene
from fastseg.kernels import select_backend, upsample_argmax

from ..machine import version
from ..rows import UNITS, Row
from ..setting import DTYPES, Setting, load_transformers
from .run import Run, what_of

MODEL = Path(fastseg.__file__).parent / "demo" / "assets" / "scenes-b0"
SIZE = (512, 512)


def measure(run: Run) -> None:
    """Add the rows of all dtypes."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    for dtype in DTYPES:
        run.add(_rows(run, dtype, date))


@torch.inference_mode()
def _rows(run: Run, dtype_name: str, date: str) -> list[Row]:
    device, dtype = run.options.device, DTYPES[dtype_name]
    exact = load_transformers(MODEL, torch.float64)
    theirs = load_transformers(MODEL, dtype).to(device)
    with torch.inference_mode(False):
        ours = fastseg.from_pretrained(MODEL).eval().to(device, dtype)
    own = "fastseg " + {"eager": "eager", "triton": "Triton"}[select_backend(device)[0]]
    processor = fastseg.SegformerImageProcessor.from_pretrained(MODEL)
    versions = {"transformers eager": version("transformers"), own: fastseg.__version__}
    figures: dict[str, list[list[float]]] = {name: [] for name in versions}
    for seed in tqdm(range(run.options.images), desc=dtype_name, leave=False, disable=None):
        inputs = processor(draw_scene(seed, SIZE).image, return_tensors="pt")["pixel_values"]
        reference = exact(inputs.double()).logits
        pixels = inputs.to(device, dtype)
        logits = theirs(pixels).logits
        # As transformers' post_process_semantic_segmentation does it.
        resized = F.interpolate(logits, size=SIZE, mode="bilinear", align_corners=False)
        labels = resized.argmax(dim=1)
        figures["transformers eager"].append(compare(logits, labels, reference))
        logits = ours(pixels).logits
        labels = upsample_argmax(logits, SIZE)
        figures[own].append(compare(logits, labels, reference))
    common = {**run.facts, **what_of("numerics", Setting(MODEL.name, SIZE, 1, dtype_name))}
    common |= {"date": date, "repeats": run.options.images, "baseline": "float64"}
    common |= {"unit": UNITS["numerics"], "parity_error": 0.0, "parity_gate": 0.0}
    found = []
    for name, taken in figures.items():
        common |= {"provider": name, "provider_version": versions[name]}
        for part, value in summary(taken).items():
            figure = dict.fromkeys(("p20", "p50", "p80"), value)
            found.append(Row(**{**common, **figure, "part": part, "parity": part}))
    return found


def compare(logits: torch.Tensor, labels: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """Sums of squares of the error and of the reference, share of differing pixels, shortfall."""
    error = (logits.cpu().double() - reference).square().sum().item()
    wide = F.interpolate(reference, size=SIZE, mode="bilinear", align_corners=False)
    highest, best = wide.max(dim=1)
    labels = labels.cpu()
    below = highest - wide.gather(1, labels.unsqueeze(1)).squeeze(1)
    differing = (labels != best).double().mean().item()
    shortfall = (below.max() / reference.abs().max()).item()
    return [error, reference.square().sum().item(), differing, shortfall]


def summary(figures: list[list[float]]) -> dict[str, float]:
    """The three parts over all images."""
    errors, squares, differing, shortfalls = zip(*figures, strict=True)
    return {
        "error": (sum(errors) / sum(squares)) ** 0.5,
        "differing": sum(differing) / len(figures),
        "shortfall": max(shortfalls),
    }

"""How right the embedded model is in each precision that one may take, and how far from float64.

On drawn scenes that it was not trained on. The reference is transformers' model in float64, with
its logits resized in float64. Of each provider and dtype there are four rows: "mIoU", against the
scenes' true labels; "error", the relative RMS error of the logits; "differing", the share of pixels
whose class is another than the reference's; "shortfall", how far the chosen class is below the
reference's best one, as a share of its largest logit, at the worst pixel.

On a CPU there are also weights in 8 bits, and the runtimes of `fastseg.from_pretrained`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import fastseg
from fastseg.demo.scenes import CLASSES, draw_scene
from fastseg.evaluation.confusion import Confusion
from fastseg.kernels import select_backend, upsample_argmax

from ..providers import BASELINE, PROVIDERS
from ..rows import UNITS, Row
from ..setting import DTYPES, Setting, SkippedCase, first_line, load_transformers
from .run import Run, what_of

MODEL = Path(fastseg.__file__).parent / "demo" / "assets" / "scenes-b0"
SIZE = (512, 512)
_WEIGHTS = "model.safetensors"


class Way(NamedTuple):
    """A provider in one precision."""

    provider: str
    dtype: str  # of a runtime what it was asked for; what it computes in is the model's `precision`
    load: Callable[[], Any]


class Pictured(NamedTuple):
    """A scene as models get it, and what is right."""

    pixels: torch.Tensor  # (1, 3, H, W), float32
    truth: np.ndarray
    reference: torch.Tensor  # logits in float64


def measure(run: Run) -> None:
    """Add the rows of all providers and dtypes."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    scenes = [*_pictured(run.options.images)]
    with tempfile.TemporaryDirectory() as folder:
        write_eight_bits(Path(folder))
        for way in _ways(run.options.device, Path(folder)):
            with run.telling("numerics", way.provider, ours=way.provider != BASELINE):
                run.add(_rows(run, way, way.load(), scenes, date))


@torch.inference_mode()
def _pictured(images: int) -> Iterator[Pictured]:
    exact = load_transformers(MODEL, torch.float64)
    processor = fastseg.SegformerImageProcessor.from_pretrained(MODEL)
    for seed in tqdm(range(images), desc="float64", leave=False, disable=None):
        scene = draw_scene(seed, SIZE)
        pixels = processor(scene.image, do_resize=False, return_tensors="pt")["pixel_values"]
        yield Pictured(pixels, scene.labels, exact(pixels.double()).logits)


def _ways(device: torch.device, eight_bits: Path) -> Iterator[Way]:
    """All that can be taken on the device; `eight_bits` is a checkpoint of such weights."""
    own = "fastseg " + {"eager": "eager", "triton": "Triton"}[select_backend(device)[0]]
    on_cpu = device.type == "cpu"
    for name, dtype in {"float64": torch.float64, **DTYPES}.items():
        yield Way(BASELINE, name, partial(_theirs, device, dtype))
        if name in DTYPES:
            yield Way(own, name, partial(_ours, MODEL, device, dtype))
        if name in DTYPES and on_cpu:
            load = partial(_ours, eight_bits, device, dtype)
            yield Way(f"{own}, 8-bit weights", name, load)
    if on_cpu:
        yield Way("fastseg ONNX Runtime", "float32", partial(in_runtime, "onnxruntime"))
        asked = partial(in_runtime, "openvino", torch.float32)
        yield Way("fastseg OpenVINO fp32", "float32", asked)
        yield Way("fastseg OpenVINO default", "", partial(in_runtime, "openvino"))


def _theirs(device: torch.device, dtype: torch.dtype) -> Any:
    return load_transformers(MODEL, dtype).to(device)


def _ours(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    return fastseg.from_pretrained(folder).eval().to(device, dtype)


def in_runtime(runtime: str, dtype: torch.dtype | None = None) -> Any:
    """The model in a runtime; a SkippedCase where what that needs is not installed."""
    try:
        return fastseg.from_pretrained(MODEL, runtime=runtime, dtype=dtype)
    except ImportError as error:
        raise SkippedCase(first_line(error)) from error


def write_eight_bits(folder: Path) -> None:
    """Write the model with the weights of its linear layers as bitsandbytes has them in 8 bits.

    Of each row there are codes and a scale: weight = codes SCB / 127.
    """
    tensors = load_file(MODEL / _WEIGHTS)
    for name, weight in [*tensors.items()]:
        if weight.ndim == 2:
            scale = weight.float().abs().amax(dim=1)
            tensors[name] = (weight.float() * (127 / scale)[:, None]).round().to(torch.int8)
            tensors[f"{name.removesuffix('weight')}SCB"] = scale
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    shutil.copy(MODEL / "config.json", folder)


@torch.inference_mode()
def _rows(run: Run, way: Way, model: Any, scenes: list[Pictured], date: str) -> list[Row]:
    name, dtype = way.provider, getattr(model, "precision", way.dtype)
    confusion = Confusion(len(CLASSES), ignore_index=None)
    figures = []
    for scene in tqdm(scenes, desc=f"{name}, {dtype}", leave=False, disable=None):
        logits = model(scene.pixels.to(run.options.device, model.dtype)).logits
        if name == BASELINE:
            # As transformers' post_process_semantic_segmentation does it.
            wide = F.interpolate(logits, size=SIZE, mode="bilinear", align_corners=False)
            labels = wide.argmax(dim=1)
        else:
            labels = upsample_argmax(logits, SIZE)
        figures.append(compare(logits, labels, scene.reference))
        confusion.add(labels[0], scene.truth)
    common = {**run.facts, **what_of("numerics", Setting(MODEL.name, SIZE, 1, dtype))}
    common |= {"date": date, "repeats": len(scenes), "baseline": "float64", "provider": name}
    known = PROVIDERS.get(name)
    common["provider_version"] = known.version() if known else fastseg.__version__
    common |= {"unit": UNITS["numerics"], "parity_error": 0.0, "parity_gate": 0.0}
    found = []
    for part, value in {"mIoU": confusion.mean_iou, **summary(figures)}.items():
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
    """The three parts over all images that `compare` gave figures of."""
    errors, squares, differing, shortfalls = zip(*figures, strict=True)
    return {
        "error": (sum(errors) / sum(squares)) ** 0.5,
        "differing": sum(differing) / len(figures),
        "shortfall": max(shortfalls),
    }

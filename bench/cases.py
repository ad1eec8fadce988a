"""The cases that are timed: what each provider computes, and the gate its result must pass."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

import fastseg
from fastseg.scenes import draw_scene

from . import pairs
from .gates import Gate, labels_gate, logits_gate

DEMO_MODEL = Path(fastseg.__file__).parent / "assets" / "scenes-b0"
ADE20K_CLASSES = 150
CITYSCAPES_CLASSES = 19
_SCENE_SEED = 7  # the demo model was trained on seeds from 1000000


class SkippedCase(Exception):
    """Why a case cannot run here."""


@dataclass(frozen=True)
class Case:
    """Functions without arguments that compute the same; the first one is the baseline."""

    kind: str
    name: str
    gate: Gate
    providers: Mapping[str, Callable[[], torch.Tensor]]


def forward_case(variant: str, size: tuple[int, int]) -> Case:
    """Forward of a segmentation model, "b0" to "b5", on one image of `size`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs.write_checkpoint(folder, variant)
        theirs, ours = pairs.load_transformers(folder), pairs.load_fastseg(folder)
        pixel_values = pairs.draw_pixels(size)
        gate = logits_gate(pairs.reference_logits(folder, pixel_values))
    pairs.check_scale(theirs, pixel_values)
    providers = {
        "transformers eager": lambda: theirs(pixel_values).logits,
        "fastseg": lambda: ours(pixel_values).logits,
    }
    return Case("forward", variant, gate, providers)


def _grid(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] // 4, size[1] // 4


def _random_logits(classes: int, size: tuple[int, int]) -> torch.Tensor:
    """The worst case: nearly every pixel lies between different classes."""
    return torch.randn(1, classes, *_grid(size), generator=torch.Generator().manual_seed(2))


def _smooth_logits(classes: int, size: tuple[int, int]) -> torch.Tensor:
    """Regions of some 64 pixels across with curved borders."""
    coarse = _random_logits(classes, (max(size[0] // 16, 4), max(size[1] // 16, 4)))
    return F.interpolate(coarse, size=_grid(size), mode="bicubic", align_corners=False)


def _demo_logits(size: tuple[int, int]) -> torch.Tensor:
    """Those of the demo model on a scene, with classes added that win nowhere."""
    if not (DEMO_MODEL / "config.json").exists():
        raise SkippedCase(f"no model in {DEMO_MODEL.parent.name}/{DEMO_MODEL.name}")
    model = fastseg.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    processor = fastseg.SegformerImageProcessor.from_pretrained(DEMO_MODEL)
    image = Image.fromarray(draw_scene(_SCENE_SEED, size).image)
    logits = model(processor(image, do_resize=False, return_tensors="pt")["pixel_values"]).logits
    missing = ADE20K_CLASSES - logits.shape[1]
    noise = torch.rand(1, missing, *logits.shape[2:], generator=torch.Generator().manual_seed(3))
    return torch.cat([logits, logits.min() - 1 - noise], dim=1)


# Where the logits of a case come from: a function of the size of the label map.
LABEL_CASES: dict[str, Callable[[tuple[int, int]], torch.Tensor]] = {
    "demo model, 150 classes": _demo_logits,
    "random logits, 150 classes": partial(_random_logits, ADE20K_CLASSES),
    "random logits, 19 classes": partial(_random_logits, CITYSCAPES_CLASSES),
    "smooth logits, 19 classes": partial(_smooth_logits, CITYSCAPES_CLASSES),
}


def labels_case(name: str, size: tuple[int, int]) -> Case:
    """Upsampling and argmax of the logits `name` in LABEL_CASES, to a label map of `size`.

    Each provider gets the logits in the memory layout that its model leaves them in: NCHW for
    transformers, channels-last for fastseg. The baseline on channels-last logits is there too, to
    tell what the layout alone is worth.

    Raises:
        SkippedCase: the demo model is not in this installation.
    """
    with torch.inference_mode():
        contiguous = LABEL_CASES[name](size).contiguous()
        channels_last = contiguous.contiguous(memory_format=torch.channels_last)
        gate = labels_gate(contiguous, size)

    def plain(logits: torch.Tensor) -> torch.Tensor:
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(1)

    providers = {
        "interpolate + argmax": lambda: plain(contiguous),
        "interpolate + argmax, channels-last": lambda: plain(channels_last),
        "fastseg": lambda: fastseg.kernels.upsample_argmax(channels_last, size),
    }
    return Case("labels", name, gate, providers)

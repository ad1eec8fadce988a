"""Logits to label maps: the cases, and what each provider makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image

import fastseg
from fastseg.demo.scenes import draw_scene

from .cases import DEMO_MODEL, SCENE_SEED, plain_labels
from .context import SkippedCase
from .gates import Gate, labels_gate

ADE20K_CLASSES = 150
CITYSCAPES_CLASSES = 19


@dataclass(frozen=True)
class LabelsCase:
    """Functions without arguments that compute the same; the first one is the baseline."""

    gate: Gate
    providers: Mapping[str, Callable[[], torch.Tensor]]
    logits: torch.Tensor


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
    image = Image.fromarray(draw_scene(SCENE_SEED, size).image)
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


def labels_case(name: str, size: tuple[int, int], device: torch.device | str = "cpu") -> LabelsCase:
    """Upsampling and argmax of the float32 logits `name` in LABEL_CASES, to a label map of `size`.

    Each provider gets the logits in the memory layout that its model leaves them in: NCHW for
    transformers, channels-last for fastseg. The baseline on channels-last logits is there too, to
    tell what the layout alone is worth.

    Raises:
        SkippedCase: the demo model is not in this installation.
    """
    contiguous = LABEL_CASES[name](size).contiguous().to(device)
    channels_last = contiguous.contiguous(memory_format=torch.channels_last)

    providers = {
        "interpolate + argmax": lambda: plain_labels(contiguous, size),
        "interpolate + argmax, channels-last": lambda: plain_labels(channels_last, size),
        "fastseg": lambda: fastseg.kernels.upsample_argmax(channels_last, size),
    }
    return LabelsCase(labels_gate(contiguous, size), providers, contiguous)

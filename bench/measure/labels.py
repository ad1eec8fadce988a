"""From logits to label maps: fastseg's upsampling and argmax in one, and what it replaces."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import fastseg

from ..gates import Gate, labels_gate
from ..setting import CLASSES
from ..work import labels_work
from .models import draw_images, plain_labels
from .numerics import MODEL
from .run import Checked, Run

BASELINE = "interpolate + argmax"

Functions = dict[str, Callable[[], torch.Tensor]]  # that compute the same; first the baseline


def measure(run: Run) -> None:
    """Add the rows of "labels"."""
    if "labels" not in run.options.kinds or run.options.list:
        return
    for size in run.options.sizes:
        for name in LABEL_CASES:
            what = {"kind": "labels", "case": name, "size": size, "batch": 1, "dtype": "float32"}
            label = f"labels, {name}, {size[0]}x{size[1]}"
            if run.wants(what, label):
                _measure_case(run, what, label)


def _measure_case(run: Run, what: dict[str, Any], label: str) -> None:
    name, size = what["case"], what["size"]
    functions, gate, classes = labels_case(name, size, run.options.device)

    @torch.inference_mode()
    def check(name: str) -> Checked:
        version = fastseg.__version__ if name == "fastseg" else str(torch.__version__)
        return Checked(functions[name], version, gate, gate.check(name, functions[name]()))

    if checked := run.checked(label, functions, check):
        run.time(what, checked, label, [labels_work(classes, size)])


def labels_case(
    name: str, size: tuple[int, int], device: torch.device
) -> tuple[Functions, Gate, int]:
    """Upsampling and argmax of the logits `name` in LABEL_CASES to `size`, a gate, and the classes.

    Each provider gets the logits in the memory layout that its model leaves them in: NCHW for
    transformers, channels-last for fastseg. The baseline on channels-last logits is there too, to
    tell what the layout alone is worth.
    """
    contiguous = LABEL_CASES[name](size).contiguous().to(device)
    channels_last = contiguous.contiguous(memory_format=torch.channels_last)
    functions = {
        BASELINE: lambda: plain_labels(contiguous, size),
        f"{BASELINE}, channels-last": lambda: plain_labels(channels_last, size),
        "fastseg": lambda: fastseg.kernels.upsample_argmax(channels_last, size),
    }
    return functions, labels_gate(contiguous, size), contiguous.shape[1]


def _random_logits(classes: int, size: tuple[int, int]) -> torch.Tensor:
    """The worst case: nearly every pixel lies between different classes."""
    grid = (size[0] // 4, size[1] // 4)
    return torch.randn(1, classes, *grid, generator=torch.Generator().manual_seed(2))


def _smooth_logits(classes: int, size: tuple[int, int]) -> torch.Tensor:
    """Regions of some 64 pixels across with curved borders."""
    coarse = _random_logits(classes, (max(size[0] // 16, 4), max(size[1] // 16, 4)))
    grid = (size[0] // 4, size[1] // 4)
    return F.interpolate(coarse, size=grid, mode="bicubic", align_corners=False)


def _demo_logits(size: tuple[int, int]) -> torch.Tensor:
    """Those of the demo model on a scene, with classes added that win nowhere."""
    model = fastseg.from_pretrained(MODEL, dtype=torch.float32)
    processor = fastseg.SegformerImageProcessor.from_pretrained(MODEL)
    inputs = processor(draw_images(size, 1), do_resize=False, return_tensors="pt")
    logits = model(inputs["pixel_values"]).logits
    missing = CLASSES - logits.shape[1]
    noise = torch.rand(1, missing, *logits.shape[2:], generator=torch.Generator().manual_seed(3))
    return torch.cat([logits, logits.min() - 1 - noise], dim=1)


# Where the logits of a case come from: a function of the size of the label map.
LABEL_CASES: dict[str, Callable[[tuple[int, int]], torch.Tensor]] = {
    "demo model, 150 classes": _demo_logits,
    "random logits, 150 classes": partial(_random_logits, CLASSES),
    "random logits, 19 classes": partial(_random_logits, 19),
    "smooth logits, 19 classes": partial(_smooth_logits, 19),
}

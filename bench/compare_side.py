"""A turn of a side of `python -m bench --compare`: times all cases by the fastseg in a folder.

    python compare_side.py FOLDER SCRATCH THREADS DEVICE VARIANT ...

It prints milliseconds by case, or why there are none, as JSON, and leaves results in the folder
SCRATCH. Nothing of bench is imported, and of fastseg only what the first commit had.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

_SECONDS = 1.0  # that a case is timed for
_FEWEST_CALLS = 5


def main(folder: str, scratch: str, threads: str, device: str, *variants: str) -> None:
    """Import fastseg, which must come from `folder` as a whole, and time it."""
    # An editable installation would lend modules that this side does not have.
    sys.meta_path[:] = [
        finder
        for finder in sys.meta_path
        if not getattr(finder, "__module__", "").startswith("__editable__")
    ]
    sys.path[0] = folder
    torch.backends.cudnn.allow_tf32 = False  # float32 is IEEE on all sides
    torch.set_num_threads(int(threads))
    if hasattr(os, "sched_setaffinity"):  # all sides on the same cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(threads)])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    found: dict[str, float | str] = {}
    with torch.inference_mode():
        for name, make in cases(variants, torch.device(device)):
            try:
                function = make()
                result = function()
                _check_modules(Path(folder).resolve())
                np.save(Path(scratch) / f"{name}.npy", result.cpu().numpy())
                found[name] = milliseconds(function, torch.device(device))
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    answers.write(json.dumps(found))


def cases(variants: tuple[str, ...], device: torch.device) -> Iterator[tuple[str, Any]]:
    """Forwards, one so small that dispatch is most of it, and the way to a label map."""
    for variant in variants:
        yield f"forward {variant}, 512x512", partial(forward, variant, 512, device)
    yield f"forward {variants[0]}, 64x64", partial(forward, variants[0], 64, device)
    yield "labels, 150 classes, 512x512", partial(labels, device)
    yield f"segment {variants[0]}, 480x640", partial(segment, variants[0], device)


def forward(variant: str, side: int, device: torch.device) -> Callable[[], torch.Tensor]:
    model = build_model(variant, device)
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1)).to(device)
    return lambda: model(pixels).logits


def labels(device: torch.device) -> Callable[[], torch.Tensor]:
    """Label map of logits with regions of some 64 pixels across, in the models' layout."""
    from fastseg import kernels

    coarse = torch.randn(1, 150, 8, 8, generator=torch.Generator().manual_seed(2))
    logits = F.interpolate(coarse, size=(128, 128), mode="bicubic", align_corners=False)
    logits = logits.to(device).contiguous(memory_format=torch.channels_last)
    return lambda: kernels.upsample_argmax(logits, (512, 512))


def segment(variant: str, device: torch.device) -> Callable[[], torch.Tensor]:
    """From a uint8 image, resized to 512x512, to its label map."""
    import fastseg

    model = build_model(variant, device)
    coarse = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    smooth = F.interpolate(coarse, size=(480, 640), mode="bilinear", align_corners=False)
    image = (255 * smooth[0].permute(1, 2, 0)).byte().numpy()
    return lambda: fastseg.segment(model, [image])[0]


def build_model(variant: str, device: torch.device) -> torch.nn.Module:
    """Weights that keep activations of order one, by name: modules may change their order."""
    import fastseg

    model = fastseg.from_preset(f"segformer_{variant}", num_classes=150).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            if tensor.ndim > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
            elif tensor.is_floating_point():  # variances too
                tensor.uniform_(0.5, 1.5, generator=generator)
    return model.to(device)


def milliseconds(function: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Median of calls."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    taken: list[float] = []
    stop = time.perf_counter() + _SECONDS
    while len(taken) < _FEWEST_CALLS or time.perf_counter() < stop:
        begun = time.perf_counter()
        function()
        wait()
        taken.append(1000 * (time.perf_counter() - begun))
    return float(np.median(taken[1:]))


def _check_modules(folder: Path) -> None:
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None) or folder
        if name.split(".")[0] == "fastseg" and not Path(path).resolve().is_relative_to(folder):
            raise RuntimeError(f"{name}: expected it in {folder}, got {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])

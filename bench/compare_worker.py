"""One side of `python -m bench --compare`: a process that times cases of the fastseg it finds.

bench.compare starts copies of this file, each with another fastseg first in its path. So it imports
nothing of bench, and of fastseg only what the first commit had. It answers requests, JSON objects
line by line on stdin, on stdout: "start" (threads, device), "build" (a case), "time" (calls).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

CLASSES = 150
_WARM_UP_CALLS = 3


class _Worker:
    def __init__(self) -> None:
        self._folder = Path()
        self._device = torch.device("cpu")
        self._function: Callable[[], Any] = lambda: None

    def start(self, threads: int, device: str, folder: str) -> dict[str, Any]:
        """Import fastseg, which must come from `folder` as a whole."""
        # An editable installation would lend modules that this side does not have.
        sys.meta_path[:] = [
            finder
            for finder in sys.meta_path
            if not getattr(finder, "__module__", "").startswith("__editable__")
        ]
        import fastseg

        torch.backends.cudnn.allow_tf32 = False  # float32 is IEEE on all sides
        torch.set_num_threads(threads)
        if hasattr(os, "sched_setaffinity"):  # all sides on the same cores
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        self._device = torch.device(device)
        self._folder = Path(folder).resolve()
        self._check_modules()
        return {"fastseg": fastseg.__file__, "torch": torch.__version__}

    def build(self, kind: str, variant: str, size: list[int], output: str) -> dict[str, Any]:
        """Make a case, call it to warm up, and save its result as `output`."""
        height, width = size
        make = {"forward": self._forward, "labels": self._labels, "segment": self._segment}[kind]
        self._function = make(variant, (height, width))
        result = self._function()
        self._check_modules()
        np.save(output, result.cpu().numpy())
        milliseconds = [self.time(1)["ms"] for _ in range(_WARM_UP_CALLS)]
        return {"ms": min(milliseconds)}

    def time(self, calls: int) -> dict[str, Any]:
        """Median milliseconds of `calls` calls; a first of short ones does not count."""
        if calls > 1:
            self._function()  # finds the caches as the other sides left them
        taken = []
        self._synchronize()
        for _ in range(calls):
            start = time.perf_counter()
            self._function()
            self._synchronize()
            taken.append(1000 * (time.perf_counter() - start))
        return {"ms": float(np.median(taken))}

    def _check_modules(self) -> None:
        for name, module in list(sys.modules.items()):
            path = getattr(module, "__file__", None)
            if name.split(".")[0] != "fastseg" or path is None:
                continue
            if not Path(path).resolve().is_relative_to(self._folder):
                raise RuntimeError(f"{name}: expected it in {self._folder}, got {path}")

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _model(self, variant: str) -> Any:
        import fastseg

        model = fastseg.from_preset(f"segformer_{variant}", num_classes=CLASSES).eval()
        _draw_weights(model)
        return model.to(self._device)

    def _forward(self, variant: str, size: tuple[int, int]) -> Callable[[], torch.Tensor]:
        model = self._model(variant)
        pixels = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
        pixels = pixels.to(self._device)
        return lambda: model(pixels).logits

    def _labels(self, variant: str, size: tuple[int, int]) -> Callable[[], torch.Tensor]:
        """Label map of logits with regions of some 64 pixels across, in the models' layout."""
        from fastseg import kernels

        coarse = torch.randn(1, CLASSES, size[0] // 64, size[1] // 64, generator=_generator(2))
        grid = (size[0] // 4, size[1] // 4)
        logits = F.interpolate(coarse, size=grid, mode="bicubic", align_corners=False)
        logits = logits.to(self._device).contiguous(memory_format=torch.channels_last)
        return lambda: kernels.upsample_argmax(logits, size)

    def _segment(self, variant: str, size: tuple[int, int]) -> Callable[[], torch.Tensor]:
        """From a uint8 image of `size`, resized to 512x512, to its label map."""
        import fastseg

        model = self._model(variant)
        coarse = torch.rand(1, 3, 16, 16, generator=_generator(3))
        smooth = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
        image = (255 * smooth[0].permute(1, 2, 0)).byte().numpy()
        return lambda: fastseg.segment(model, [image])[0]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _draw_weights(model: torch.nn.Module) -> None:
    """Weights that keep activations of order one, by name: modules may change their order."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = _generator(zlib.crc32(name.encode()))
            if parameter.ndim > 1:
                parameter.normal_(std=math.prod(parameter.shape[1:]) ** -0.5, generator=generator)
            else:
                mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.normal_(mean, std=0.1, generator=generator)
        for name, buffer in model.named_buffers():
            generator = _generator(zlib.crc32(name.encode()))
            if name.endswith("running_mean"):
                buffer.normal_(std=0.5, generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=generator)


def main() -> None:
    """Answer until stdin ends. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = _Worker()
    with contextlib.suppress(BrokenPipeError), torch.inference_mode():
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = getattr(worker, request.pop("do"))(**request)
            except Exception as error:  # the other side asks why
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()

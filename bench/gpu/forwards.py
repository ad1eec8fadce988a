"""The forwards that stages of `bench gpu` look at, and their command lines."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

import fastseg

from ..setting import DTYPES, Setting, build_model, draw_pixels
from .stages import read_lines

_SIZE = (512, 512)
FORWARDS = (
    *(Setting(*one, "bfloat16") for one in product(("b0", "b2", "b5"), [_SIZE], (1, 8))),
    Setting("b0", _SIZE, 1, "float32"),
)
QUICK = (Setting("b0", (64, 64), 1, "float32"),)


class Report:
    """The command line of a stage, and a file that gets a JSON line for each thing it finds.

    What the file has from an earlier call is not looked at again: `left` leaves it out.
    """

    def __init__(self, program: str, argv: Sequence[str] | None = None) -> None:
        parser = argparse.ArgumentParser(prog=f"python -m bench.gpu.{program}")
        parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
        parser.add_argument("--quick", action="store_true")
        parser.add_argument("--output", type=Path, required=True, metavar="FILE")
        parser.add_argument("--again", action="store_true", help="also what FILE has")
        given = parser.parse_args(argv)
        self.device, self._output = torch.device(given.device), given.output
        self.on_gpu = given.device == "cuda"
        self._settings = QUICK if given.quick else FORWARDS
        if given.again:
            given.output.unlink(missing_ok=True)

    def left(self) -> Iterator[tuple[Setting, torch.nn.Module, torch.Tensor]]:
        """Settings that the file has nothing of: fastseg's model and pixels of each."""
        done = {line["case"] for line in read_lines(self._output)}
        for setting in self._settings:
            if str(setting) not in done:
                dtype = DTYPES[setting.dtype]
                pixels = draw_pixels(setting.size, setting.batch).to(self.device, dtype)
                yield setting, build_model(setting.variant, self.device, dtype), pixels

    def add(self, setting: Setting, found: Sequence[dict[str, Any]]) -> None:
        """Write what was found of a setting, all at once: part of it is none."""
        lines = [json.dumps({"case": str(setting), **one}) + "\n" for one in found]
        with self._output.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
        sys.stdout.flush()


def label_map(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The label map (B, H, W) of `pixels` (B, 3, H, W)."""
    height, width = pixels.shape[2:]
    return fastseg.kernels.upsample_argmax(model(pixels).logits, (height, width))

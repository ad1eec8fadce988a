"""What a case is measured on: its setting, and models and files with the same weights for all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastseg

from . import pairs

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16)}


class SkippedCase(Exception):
    """Why something cannot run here."""


def first_line(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


class Setting(NamedTuple):
    """A model and what it is fed with."""

    variant: str  # "b0" to "b5"
    size: tuple[int, int]  # height, width
    batch: int
    dtype: str  # a key of DTYPES

    def __str__(self) -> str:
        height, width = self.size
        return f"{self.variant}, {height}x{width}, batch {self.batch}, {self.dtype}"


@dataclass
class Context:
    """The weights of a setting, on disk as transformers writes them, and where they are to run.

    Attributes:
        pixel_values: (batch, 3, H, W), of the setting's dtype, on the device.
        threads: of the CPU.
    """

    setting: Setting
    device: torch.device
    threads: int
    folder: Path
    pixel_values: torch.Tensor
    _files: dict[str, Path] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.setting.dtype]

    def transformers(self) -> Any:
        """transformers' model as its users get it."""
        model = pairs.load_transformers(self.folder, self.dtype)
        return model.to(self.device).requires_grad_(False)

    def fastseg(self) -> Any:
        """fastseg's own model."""
        model = fastseg.from_pretrained(self.folder).eval()
        return model.to(self.device, self.dtype).requires_grad_(False)

    def file(self, name: str, write: Callable[[Path], object]) -> Path:
        """The file `name`, written by the first who asks for it."""
        if name not in self._files:
            path = self.folder / name
            write(path)
            self._files[name] = path
        return self._files[name]


@contextmanager
def context(setting: Setting, device: torch.device, threads: int) -> Iterator[Context]:
    """The context of `setting`; its files are gone afterwards."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs.write_checkpoint(folder, setting.variant)
        pixels = pairs.draw_pixels(setting.size, setting.batch)
        yield Context(setting, device, threads, folder, pixels.to(device, DTYPES[setting.dtype]))

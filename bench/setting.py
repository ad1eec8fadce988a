"""What a case is measured on: a model, its weights and pixels, the same for all providers.

The weights keep activations of order one at every depth. With the default initialisation those of
the deep variants die away to denormal numbers, on which a CPU is ten times slower: such a run times
nothing that a trained model does.

transformers is imported where it is used: the process that takes the memory of fastseg is without
it, as its users' are.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastseg
from fastseg.models.segformer.presets import preset_config

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16)}
VARIANTS = ("b0", "b1", "b2", "b3", "b4", "b5")
CLASSES = 150


class SkippedCase(Exception):
    """Why something cannot run here."""


def first_line(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


class Setting(NamedTuple):
    """A model and what it is fed with."""

    variant: str  # one of VARIANTS
    size: tuple[int, int]  # height, width
    batch: int
    dtype: str  # a key of DTYPES

    def __str__(self) -> str:
        height, width = self.size
        return f"{self.variant}, {height}x{width}, batch {self.batch}, {self.dtype}"


@dataclass
class Context:
    """The weights of a setting, on disk as transformers writes them, and where they are to run."""

    setting: Setting
    device: torch.device
    threads: int  # of the CPU
    folder: Path
    pixel_values: torch.Tensor  # (batch, 3, H, W), of the setting's dtype, on the device

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.setting.dtype]

    def transformers(self, dtype: torch.dtype | None = None) -> Any:
        """transformers' model as its users get it; of the setting's dtype, or of another."""
        model = load_transformers(self.folder, dtype or self.dtype)
        return model.to(self.device).requires_grad_(False)

    def fastseg(self) -> Any:
        """fastseg's own model."""
        model = fastseg.from_pretrained(self.folder).eval()
        return model.to(self.device, self.dtype).requires_grad_(False)


@contextmanager
def context(setting: Setting, device: torch.device, threads: int) -> Iterator[Context]:
    """The context of `setting`; its files are gone afterwards."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder, setting.variant)
        pixels = draw_pixels(setting.size, setting.batch)
        yield Context(setting, device, threads, folder, pixels.to(device, DTYPES[setting.dtype]))


def load_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model as its users get it: its own choice of attention, eager otherwise."""
    import transformers

    model = transformers.SegformerForSemanticSegmentation.from_pretrained(folder, dtype=dtype)
    return model.eval()


def write_checkpoint(folder: Path, variant: str) -> None:
    """Write transformers' checkpoint of `variant` with 150 classes and drawn weights."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    fields = ("depths", "hidden_sizes", "decoder_hidden_size", "num_labels")
    known = {name: getattr(preset(variant), name) for name in fields}
    config = transformers.SegformerConfig(**known)
    model = transformers.SegformerForSemanticSegmentation(config)
    draw_weights(model)
    model.save_pretrained(folder)


def preset(variant: str) -> fastseg.SegformerConfig:
    """fastseg's configuration of `variant`, with 150 classes."""
    return preset_config(f"segformer_{variant}", num_classes=CLASSES)


def draw_weights(model: torch.nn.Module) -> None:
    """Draw weights, biases, norms and BatchNorm's statistics anew, each by its name."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            if name.endswith("running_mean"):
                tensor.normal_(std=0.5, generator=generator)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.ndim > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
            elif tensor.is_floating_point():
                mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                tensor.normal_(mean, std=0.1, generator=generator)


def draw_pixels(size: tuple[int, int], batch: int = 1) -> torch.Tensor:
    """Noise (batch, 3, H, W), float32, always the same for a size."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def build_model(variant: str, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """fastseg's own model of `variant` with 150 classes and drawn weights, without files."""
    model = fastseg.from_preset(f"segformer_{variant}", num_classes=CLASSES).eval()
    draw_weights(model)
    return model.to(device, dtype)

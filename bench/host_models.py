"""The hosts that `bench.hosts` accelerates: what a process needs to import them, and builders.

Weights are drawn the same way everywhere (`pairs.draw_weights`), 150 classes.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastseg.models.segformer.presets import preset_config

from . import pairs
from .machine import ROOT

CLASSES = 150


@dataclass(frozen=True)
class HostModels:
    """Models of one host.

    Attributes:
        library: the distribution whose version is in the rows; "" where the code is in this
            repository.
        path: a folder to be first on PYTHONPATH of the process; None for none.
        build: from a variant, "b0" to "b5", to its plain model in float32 and eval mode.
        own: from that model to fastseg's own model with the same weights; None where there is
            none that computes the same.
    """

    library: str
    path: Path | None
    build: Callable[[str], nn.Module]
    own: Callable[[Any], nn.Module] | None = None

    def version(self) -> str:
        return importlib.metadata.version(self.library) if self.library else ""


def logits_of(model: Callable[..., Any], pixel_values: torch.Tensor) -> torch.Tensor:
    """Logits of a forward, whatever it answers with."""
    output = model(pixel_values)
    return output if isinstance(output, torch.Tensor) else output.logits


def _transformers(variant: str) -> nn.Module:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        pairs.write_checkpoint(Path(folder), variant)
        return pairs.load_transformers(Path(folder))


def _own(model: Any) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return pairs.load_fastseg(Path(folder))


def _smp(variant: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    width = preset_config(f"segformer_{variant}").decoder_hidden_size
    model = smp.Segformer(
        f"mit_{variant}",
        encoder_weights=None,
        decoder_segmentation_channels=width,
        classes=CLASSES,
    )
    pairs.draw_weights(model)
    return model.eval()


def _nvlabs(variant: str) -> nn.Module:
    from tests.models.hosts import nvlabs

    preset = preset_config(f"segformer_{variant}")
    widths = preset.hidden_sizes
    backbone = nvlabs.MixVisionTransformer(
        widths, preset.num_attention_heads, depths=preset.depths, sr_ratios=preset.sr_ratios
    )
    head = nvlabs.SegFormerHead(widths, preset.decoder_hidden_size, CLASSES)
    model = nvlabs.EncoderDecoder(backbone, head)
    pairs.draw_weights(model)
    return model.eval()


HOSTS = {
    "transformers 5": HostModels("transformers", None, _transformers, _own),
    "transformers 4": HostModels(
        "transformers", ROOT / ".venv" / "transformers4", _transformers, _own
    ),
    "smp": HostModels("segmentation-models-pytorch", ROOT / ".venv" / "smp", _smp),
    "NVlabs structure": HostModels("", None, _nvlabs),
}

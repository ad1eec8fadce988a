"""transformers' SegFormer and fastseg's with the same random weights.

The weights keep activations of order one at every depth. With the default initialisation those of
the deep variants die away to denormal numbers, on which a CPU is ten times slower: such a run times
nothing that a trained model does.

transformers is imported where it is used: the process that takes the memory of fastseg is without
it, as its users' are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import fastseg
from fastseg.models.segformer.presets import preset_config

# SegformerConfig fields of transformers that a preset decides.
_FIELDS = ("depths", "hidden_sizes", "decoder_hidden_size", "num_labels")


def write_checkpoint(folder: Path, variant: str) -> None:
    """Write a checkpoint of `variant` ("b0" to "b5") with 150 classes and random weights."""
    import transformers

    preset = preset_config(f"segformer_{variant}")
    config = transformers.SegformerConfig(**{name: getattr(preset, name) for name in _FIELDS})
    model = transformers.SegformerForSemanticSegmentation(config)
    draw_weights(model)
    model.save_pretrained(folder)


def draw_weights(model: torch.nn.Module) -> None:
    """Draw weights, biases, norms and BatchNorm's statistics anew, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.normal_(std=fan_in**-0.5, generator=generator)
            else:
                mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.normal_(mean, std=0.1, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.5, generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=generator)


def draw_pixels(size: tuple[int, int], batch: int = 1) -> torch.Tensor:
    """Noise (batch, 3, H, W), float32, always the same for a size."""
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def load_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model as its users get it: its own choice of attention, eager otherwise."""
    import transformers

    model = transformers.SegformerForSemanticSegmentation.from_pretrained(folder, dtype=dtype)
    return model.eval()


def load_fastseg(folder: Path) -> Any:
    return fastseg.from_pretrained(folder).eval()


def reference_logits(folder: Path, pixel_values: torch.Tensor) -> torch.Tensor:
    """Logits of transformers' model in float64."""
    with torch.inference_mode():
        return load_transformers(folder, torch.float64)(pixel_values.double()).logits


def check_scale(model: Any, pixel_values: torch.Tensor) -> None:
    """Raise a RuntimeError where transformers' activations hold denormal numbers or explode."""
    with torch.inference_mode():
        output = model(pixel_values, output_hidden_states=True)
    for activations in (*output.hidden_states, output.logits):
        size = activations.abs()
        denormal = ((size > 0) & (size < torch.finfo(size.dtype).tiny)).sum().item()
        spread = activations.double().std().item()
        if denormal or not 1e-2 < spread < 1e2:
            raise RuntimeError(
                f"activations {tuple(size.shape)}: expected a standard deviation of order one and "
                f"no denormal number, got {spread:.3g} and {denormal}"
            )

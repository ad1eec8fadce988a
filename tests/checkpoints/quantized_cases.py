"""Small models of transformers that bitsandbytes has quantised."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch


def write_checkpoint(folder: Path) -> Path:
    """A segmentation model of transformers with widths that 4-bit weights can have."""
    import transformers

    config = transformers.SegformerConfig(
        depths=[2, 1, 1, 1],
        hidden_sizes=[64, 64, 80, 128],
        num_attention_heads=[1, 2, 5, 8],
        decoder_hidden_size=64,
        num_labels=5,
    )
    torch.manual_seed(0)
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(folder)
    return folder


def load_quantized(folder: Path, **options: Any) -> Any:
    """The model there as transformers' documentation loads it; `options` of BitsAndBytesConfig."""
    import transformers

    # It would tell at each layer that it computes with float16.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return transformers.AutoModelForSemanticSegmentation.from_pretrained(
        folder, quantization_config=transformers.BitsAndBytesConfig(**options), dtype=torch.float32
    ).eval()


def eight_bit_weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights in a state_dict of bitsandbytes, by its rule: codes SCB / 127."""
    return {
        name: (state[name].double() * scale.double()[:, None] / 127).float()
        for key, scale in state.items()
        if (name := key.removesuffix("SCB") + "weight") in state and key.endswith("SCB")
    }

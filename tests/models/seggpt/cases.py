"""Small SegGPTs with random weights, of transformers and of fastseg, and what they take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers

import fastseg
from tests.model_cases import randomize as draw

# A grid of 8 x 4 patches, and more layers than one on both sides of the merge.
SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "image_size": [64, 32],
    "patch_size": 8,
    "pretrain_image_size": 24,
    "decoder_hidden_size": 8,
    "merge_index": 1,
    "intermediate_hidden_state_indices": [1, 3, 4],
}
INPUTS = ("pixel_values", "prompt_pixel_values", "prompt_masks")


def randomize(model: torch.nn.Module) -> None:
    """Draw weights of order one; of what is 1 or 0 in a new model too, so that nothing is free."""
    draw(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rel_pos" in name or "token" in name or "position" in name:
                parameter.normal_(std=0.3)


def theirs(class_name: str = "SegGptForImageSegmentation", **config: Any) -> Any:
    """transformers' model in eval mode."""
    settings = transformers.SegGptConfig(**{**SMALL, **config})
    model = getattr(transformers, class_name)(settings).eval()
    randomize(model)
    return model


def twins(class_name: str = "SegGptForImageSegmentation", **config: Any) -> tuple[Any, Any]:
    """transformers' model and fastseg's, in eval mode, with the same weights."""
    hosts = theirs(class_name, **config)
    ours = getattr(fastseg, class_name)(fastseg.SegGptConfig(**{**SMALL, **config})).eval()
    ours.load_state_dict(hosts.state_dict())
    return hosts, ours


def inputs(model: Any, batch: int = 1, seed: int = 1, labels: bool = False) -> dict[str, Any]:
    """Random pixels in the model's dtype."""
    generator = torch.Generator().manual_seed(seed)
    height, width = model.config.image_size
    names = (*INPUTS, "labels") if labels else INPUTS
    shape = (batch, 3, height // 2, width)
    return {name: torch.randn(shape, generator=generator).to(model.dtype) for name in names}


@contextlib.contextmanager
def exact_softmax() -> Iterator[None]:
    """Let transformers take its softmax in float64 in models of that dtype, not in float32."""
    plain = torch.nn.functional.softmax

    def softmax(input, dim=None, _stacklevel=3, dtype=None):
        return plain(input, dim=dim, dtype=None if input.dtype == torch.float64 else dtype)

    torch.nn.functional.softmax = softmax
    try:
        yield
    finally:
        torch.nn.functional.softmax = plain

"""Tiny SegFormers of transformers and fastseg, for the tests of checkpoints."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

import fastseg

CLASSES = (
    "SegformerModel",
    "SegformerForSemanticSegmentation",
    "SegformerForImageClassification",
)
SEGMENTATION = CLASSES[1]
SIZES: dict[str, Any] = {
    "depths": [1, 2, 1, 1],
    "hidden_sizes": [8, 16, 24, 32],
    "num_attention_heads": [1, 2, 3, 4],
    "decoder_hidden_size": 16,
    "num_labels": 5,
}


def randomize(model: nn.Module) -> nn.Module:
    """Every tensor random, running statistics and counters too, so that a mix-up shows."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                tensor.fill_(7)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            else:
                tensor.normal_(0.2, 0.3)
    return model.eval()


def theirs(name: str, **config: Any) -> Any:
    """A random model of transformers 5."""
    return randomize(
        getattr(transformers, name)(transformers.SegformerConfig(**{**SIZES, **config}))
    )


def ours(name: str, **config: Any) -> Any:
    """A random model of fastseg."""
    return randomize(getattr(fastseg, name)(fastseg.SegformerConfig(**{**SIZES, **config})))


def assert_same_tensors(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name

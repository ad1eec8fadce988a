"""Models of other libraries that compute the loss of a segmentation in their forward."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from fastseg.training.loss import segmentation_loss

_NAMES = ("transformers.models.segformer.", "SegformerForSemanticSegmentation.forward")
# The least model that there can be, to see what its loss is.
_LEAST = {
    **{"num_encoder_blocks": 1, "depths": [1], "sr_ratios": [1], "hidden_sizes": [8]},
    **{"patch_sizes": [3], "strides": [2], "num_attention_heads": [1], "mlp_ratios": [1]},
    "decoder_hidden_size": 8,
}
_BOUND = 1e-5


def computes_loss(module: nn.Module) -> bool:
    """Return whether the forward of `module` is that of transformers, by name."""
    forward: Any = type(module).forward
    return (
        str(getattr(forward, "__module__", "")).startswith(_NAMES[0])
        and getattr(forward, "__qualname__", "") == _NAMES[1]
    )


def loss_problem(module: nn.Module) -> str | None:
    """Reason why the loss of `module`, of which `computes_loss`, cannot be taken over; or None."""
    if "forward" in module.__dict__:
        return "it has a forward of its own"
    kind: Any = getattr(module, "_fastseg_class", None) or type(module)
    config_class: Any = type(module.config)
    return _trial(kind, config_class)


@functools.cache
def _trial(kind: Any, config_class: Any) -> str | None:
    """Run the least model of `kind`, and compare its loss with what is put in its place."""
    with torch.random.fork_rng([]), torch.device("cpu"):
        torch.manual_seed(0)
        for classes in (1, 3):
            try:
                model = kind(config_class(num_labels=classes, **_LEAST)).eval()
                labels = torch.randint(0, max(classes, 2), (2, 9, 12))
                labels[0, :3] = model.config.semantic_loss_ignore_index
                with torch.no_grad():
                    output = model(torch.randn(2, 3, 8, 8), labels=labels)
                    ignored = model.config.semantic_loss_ignore_index
                    loss = segmentation_loss(output.logits, labels, ignored)
            except Exception as error:  # of the host's code, which may be anything
                return f"its trial ended in {type(error).__name__}: {error}"
            if not abs(output.loss - loss) <= _BOUND * abs(loss):
                return f"its loss is {output.loss:.6f} where {loss:.6f} was expected"
    return None
